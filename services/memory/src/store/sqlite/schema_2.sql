-- Facts about the store itself: `store` tells it from every other one, `analysis` is the version of the text analysis that
-- the lexical tables were made with.
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO meta (name, value) VALUES ('store', lower(hex(randomblob(16))));

-- One lexical table a tenant, `lexical_<key>`, made by the program: the statistics behind BM25 are the tenant's own.
CREATE TABLE tenants (
    key INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;
INSERT INTO tenants (name) SELECT DISTINCT tenant FROM scopes;
DROP TABLE lexical;

CREATE INDEX memories_by_expiry ON memories (expires_at) WHERE expires_at IS NOT NULL AND deleted_at IS NULL;
