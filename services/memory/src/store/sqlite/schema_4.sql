-- The models that vectors were made by. Each has a table of its own, `vectors_<key>`, made by the program: a code lies in the page
-- of its row, two of 1536 dimensions to a page; before, each had overflow pages of its own. Vectors in the older code of 12
-- bits are made again in the background.
CREATE TABLE models (
    key INTEGER PRIMARY KEY,
    identity TEXT NOT NULL UNIQUE -- name and revision
) STRICT;
DROP TABLE embeddings;
UPDATE memories SET record = json_set(record, '$.embedding_model', '');
