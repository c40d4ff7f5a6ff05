-- Facts about the store itself. `store` tells it from every other one, `analysis` is the version of the text analysis that terms
-- were made with, `base` is added to places in the outbox, so that they ascend when the database was moved to another cluster.
CREATE TABLE meta (
    name text PRIMARY KEY,
    value text NOT NULL
);
INSERT INTO meta (name, value) VALUES ('store', replace(gen_random_uuid()::text, '-', '')), ('base', '0');

CREATE TABLE tenants (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL UNIQUE
);

CREATE TABLE scopes (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL,
    company text, org text, team text, project text, "user" text, session text, agent text,
    layer integer NOT NULL,
    path text NOT NULL, -- the scope as JSON; what makes it unique
    UNIQUE (tenant, path)
);

CREATE TABLE memories (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id bytea NOT NULL UNIQUE,
    tenant text NOT NULL,
    scope bigint NOT NULL REFERENCES scopes (key),
    identity bytea NOT NULL, -- content and place in the source, hashed
    record jsonb NOT NULL,   -- the whole memory
    conversation text,
    sequence bigint,
    expires_at bigint,
    deleted_at bigint,
    version bigint NOT NULL
);
-- Exact duplicates of a scope are merged: no two live rows may say the same.
CREATE UNIQUE INDEX memories_identity ON memories (scope, identity) WHERE deleted_at IS NULL;
CREATE INDEX memories_by_scope ON memories (scope, id);
CREATE INDEX memories_by_turn ON memories (scope, conversation, sequence) WHERE conversation IS NOT NULL;
CREATE INDEX memories_by_expiry ON memories (expires_at) WHERE expires_at IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX memories_by_deletion ON memories (scope, deleted_at) WHERE deleted_at IS NOT NULL;

-- What the lexical arm ranks: analysed terms that are in a memory, each once, with how often. A term begins with the number of its
-- tenant, so that no tenant reads through another's lists; the scope stands among them as `#` and its number.
CREATE TABLE texts (
    memory bigint PRIMARY KEY REFERENCES memories (key) ON DELETE CASCADE,
    tenant text NOT NULL,
    scope bigint NOT NULL,
    length integer NOT NULL, -- terms, each as often as it is there
    terms text[] NOT NULL,
    counts integer[] NOT NULL
);
CREATE INDEX texts_by_term ON texts USING gin (terms);
CREATE INDEX texts_by_tenant ON texts (tenant) INCLUDE (length);

CREATE TABLE models (
    key integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    identity text NOT NULL UNIQUE -- name and revision
);
CREATE TABLE vectors (
    model integer NOT NULL REFERENCES models (key),
    memory bigint NOT NULL REFERENCES memories (key) ON DELETE CASCADE,
    tenant text NOT NULL,
    code bytea NOT NULL,
    PRIMARY KEY (model, memory)
);
CREATE INDEX vectors_by_memory ON vectors (memory);
ALTER TABLE vectors ALTER COLUMN code SET STORAGE EXTERNAL; -- it can't be compressed

CREATE TABLE history (
    memory bytea NOT NULL, -- its id
    version bigint NOT NULL,
    tenant text NOT NULL,
    kind text NOT NULL,
    changed_at bigint NOT NULL,
    changed_by text NOT NULL,
    record jsonb NOT NULL,
    PRIMARY KEY (memory, version)
);

-- A place in the outbox is the transaction's number and the change's within it, so that all changes up to the oldest transaction
-- under way are complete, and no later one comes among them: see `horizon`.
CREATE TABLE outbox (
    sequence bigint PRIMARY KEY,
    tenant text NOT NULL,
    memory bigint NOT NULL, -- 0: a document or a policy, which `resource` names
    kind text NOT NULL,
    version bigint NOT NULL,
    committed_at bigint NOT NULL,
    id bytea,
    scope bigint,
    resource text
);
CREATE INDEX outbox_by_tenant ON outbox (tenant, sequence);

CREATE TABLE requests (
    tenant text NOT NULL,
    subject text NOT NULL,
    request_id text NOT NULL,
    digest bytea NOT NULL,
    answer text NOT NULL,
    memory text, -- the id of the memory that the answer tells of
    at bigint NOT NULL,
    PRIMARY KEY (tenant, subject, request_id)
);
CREATE INDEX requests_by_memory ON requests (tenant, memory) WHERE memory IS NOT NULL;

CREATE TABLE policies (
    tenant text NOT NULL,
    name text NOT NULL,
    record text NOT NULL, -- as JSON
    PRIMARY KEY (tenant, name)
);

CREATE TABLE documents (
    key bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL,
    scope bigint NOT NULL REFERENCES scopes (key),
    path text COLLATE "C" NOT NULL,
    version bigint NOT NULL, -- the newest
    record text NOT NULL,    -- the newest version as JSON, without its content
    deleted_at bigint,
    UNIQUE (path, scope)
);
CREATE TABLE document_versions (
    document bigint NOT NULL REFERENCES documents (key),
    version bigint NOT NULL,
    tenant text NOT NULL,
    record text NOT NULL, -- as JSON, without its content
    content text NOT NULL,
    PRIMARY KEY (document, version)
);

-- How far an import has come, so that the same stream resumes it.
CREATE TABLE imports (
    tenant text NOT NULL,
    subject text NOT NULL,
    id text NOT NULL,
    items bigint NOT NULL,
    digest bytea NOT NULL, -- over the items so far
    at bigint NOT NULL,
    refused text NOT NULL, -- places of the items that were refused, as JSON
    PRIMARY KEY (tenant, subject, id)
);

-- The second wall: a session sees the rows of the tenant that it names, `*` being the service's own work for all of them, and
-- nothing before it names one. Nobody but the owner of the tables goes round it, and the service does not work as the owner.
DO $$
DECLARE
    walled text;
BEGIN
    FOREACH walled IN ARRAY ARRAY['tenants', 'scopes', 'memories', 'texts', 'vectors', 'history', 'outbox', 'requests',
        'policies', 'documents', 'document_versions', 'imports'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', walled);
        EXECUTE format('CREATE POLICY wall ON %I USING (current_setting(''aeterna.tenant'', true) IN (tenant, ''*''))', walled);
    END LOOP;
END $$;

-- The place before which the outbox is complete.
CREATE FUNCTION horizon() RETURNS bigint LANGUAGE sql STABLE
AS $$ SELECT (SELECT value::bigint FROM meta WHERE name = 'base')
    + (pg_snapshot_xmin(pg_current_snapshot())::text::bigint << 20) $$;

-- What follows looks over the wall, at nothing but numbers, or keeps to the tenant by itself: an index on terms can't be used from
-- behind a wall, since PostgreSQL does not know that comparing terms tells nothing.
CREATE FUNCTION last_sequence() RETURNS bigint LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS $$ SELECT coalesce(max(sequence), 0) FROM outbox WHERE sequence < horizon() $$;

CREATE FUNCTION has_all(places bigint[]) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS $$ SELECT NOT EXISTS (SELECT 1 FROM unnest(places) p WHERE NOT EXISTS (SELECT 1 FROM outbox WHERE sequence = p)) $$;

CREATE FUNCTION newest_memory() RETURNS bigint LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS $$ SELECT coalesce(max(key), 0) FROM memories $$;

CREATE FUNCTION owner_of(memory bytea) RETURNS text LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS $$ SELECT tenant FROM memories WHERE id = memory $$;

CREATE FUNCTION documents_with(wanted text[]) RETURNS TABLE (term text, documents bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS $$ SELECT w, (SELECT count(*) FROM texts
        WHERE terms @> ARRAY[w] AND tenant = current_setting('aeterna.tenant', true))
    FROM unnest(wanted) w $$;

-- BM25 with k1 = 1.2 and b = 0.75 over the memories that have one of the terms and, unless `marks` is null, one of the marks:
-- the newest `most` of them are ranked.
CREATE FUNCTION ranked(wanted text[], weights float8[], average float8, marks text[], most bigint)
RETURNS TABLE (memory bigint, score float8)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT
AS $$ SELECT t.memory, (SELECT sum(w.weight * c.count * 2.2 / (c.count + 1.2 * (0.25 + 0.75 * t.length / average)))
        FROM unnest(wanted, weights) w (term, weight),
        LATERAL (SELECT t.counts[array_position(t.terms, w.term)] AS count) c)
    FROM (SELECT * FROM texts
        WHERE terms && wanted AND (marks IS NULL OR terms && marks) AND tenant = current_setting('aeterna.tenant', true)
        ORDER BY texts.memory DESC LIMIT most) t $$;
