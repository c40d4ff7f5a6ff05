CREATE TABLE scopes (
    key INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    company TEXT, org TEXT, team TEXT, project TEXT, user TEXT, session TEXT, agent TEXT,
    layer INTEGER NOT NULL,
    path TEXT NOT NULL, -- the scope as JSON; what makes it unique
    UNIQUE (tenant, path)
) STRICT;

CREATE TABLE memories (
    key INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    scope INTEGER NOT NULL REFERENCES scopes (key),
    identity BLOB NOT NULL, -- content and place in the source, hashed
    record TEXT NOT NULL,   -- the whole memory as JSON
    conversation TEXT,
    sequence INTEGER,
    expires_at INTEGER,
    deleted_at INTEGER,
    version INTEGER NOT NULL
) STRICT;
-- Exact duplicates of a scope are merged: no two live rows may say the same.
CREATE UNIQUE INDEX memories_identity ON memories (scope, identity) WHERE deleted_at IS NULL;
CREATE INDEX memories_by_scope ON memories (scope, id);
CREATE INDEX memories_by_turn ON memories (scope, conversation, sequence) WHERE conversation IS NOT NULL;

CREATE TABLE embeddings (
    memory INTEGER NOT NULL REFERENCES memories (key) ON DELETE CASCADE,
    model TEXT NOT NULL,
    code BLOB NOT NULL,
    PRIMARY KEY (memory, model)
) STRICT, WITHOUT ROWID;

CREATE TABLE history (
    memory BLOB NOT NULL, -- its id, which outlives a purge
    version INTEGER NOT NULL,
    kind TEXT NOT NULL,
    changed_at INTEGER NOT NULL,
    changed_by TEXT NOT NULL,
    record TEXT NOT NULL,
    PRIMARY KEY (memory, version)
) STRICT, WITHOUT ROWID;

CREATE TABLE outbox (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    memory INTEGER NOT NULL,
    kind TEXT NOT NULL,
    version INTEGER NOT NULL,
    committed_at INTEGER NOT NULL
) STRICT;

CREATE TABLE requests (
    tenant TEXT NOT NULL,
    subject TEXT NOT NULL,
    request_id TEXT NOT NULL,
    digest BLOB NOT NULL,
    answer TEXT NOT NULL,
    at INTEGER NOT NULL,
    PRIMARY KEY (tenant, subject, request_id)
) STRICT, WITHOUT ROWID;

-- The text is analysed by the program; the tokenizer only splits it at spaces again.
CREATE VIRTUAL TABLE lexical USING fts5 (scope, body, content = '', contentless_delete = 1, tokenize = 'ascii');
