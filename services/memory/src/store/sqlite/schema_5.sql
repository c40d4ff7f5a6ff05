-- Rules per scope, and documents by path with all their versions. Their changes stand in the outbox beside those of memories,
-- with memory 0; `resource` is the policy's name or the document's path.
CREATE TABLE policies (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    record TEXT NOT NULL, -- the policy as JSON
    PRIMARY KEY (tenant, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE documents (
    key INTEGER PRIMARY KEY,
    scope INTEGER NOT NULL REFERENCES scopes (key),
    path TEXT NOT NULL,
    version INTEGER NOT NULL, -- the newest
    record TEXT NOT NULL,     -- the newest version as JSON, without its content
    deleted_at INTEGER,
    UNIQUE (path, scope)
) STRICT;

CREATE TABLE document_versions (
    document INTEGER NOT NULL REFERENCES documents (key),
    version INTEGER NOT NULL,
    record TEXT NOT NULL, -- as JSON, without its content
    content TEXT NOT NULL,
    PRIMARY KEY (document, version)
) STRICT;

ALTER TABLE outbox ADD COLUMN resource TEXT;

-- What policies may remove for good.
CREATE INDEX memories_by_deletion ON memories (scope, deleted_at) WHERE deleted_at IS NOT NULL;

-- How far an import has come, so that the same stream resumes it.
CREATE TABLE imports (
    tenant TEXT NOT NULL,
    subject TEXT NOT NULL,
    id TEXT NOT NULL,
    items INTEGER NOT NULL,
    digest BLOB NOT NULL, -- over the items so far
    at INTEGER NOT NULL,
    PRIMARY KEY (tenant, subject, id)
) STRICT, WITHOUT ROWID;
