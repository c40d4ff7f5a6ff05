-- A code lies in the page of its row, two of 1536 dimensions to a page; before, each had overflow pages of its own. Vectors
-- in the older code of 12 bits are made again in the background.
CREATE TABLE models (
    key INTEGER PRIMARY KEY,
    identity TEXT NOT NULL UNIQUE -- name and revision
) STRICT;
CREATE TABLE vectors (
    memory INTEGER NOT NULL REFERENCES memories (key) ON DELETE CASCADE,
    model INTEGER NOT NULL REFERENCES models (key),
    code BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX vectors_of ON vectors (memory, model);
DROP TABLE embeddings;
UPDATE memories SET record = json_set(record, '$.embedding_model', '');
