//! Writes: the steps of a write on PostgreSQL, all in one transaction.

use std::collections::HashMap;

use aeterna_storage::{Session, StorageError};
use aeterna_types::{Layer, MemoryId, Scope, Timestamp};
use async_trait::async_trait;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, Row as _};

use super::lexical::{self, Terms};
use super::{keyed, record, seal, seal_json, storage, unseal_json};
use crate::domain::{Document, Idempotency, Key, Kind, Memory, Policy, ScopeKey, Sequence, Text, Version, Writer};
use crate::error::MemoryError;
use crate::store::code::Code;
use crate::store::ledger::{self, Ledger, Owner, Resource, encode, system};
use crate::store::{Progress, StoredVector};

/// Changes that one transaction may bring: two to this power.
pub const CHANGES: u32 = 20;

/// The timeline of a primary: how the names of its WAL files begin.
const TIMELINE: &str = "left(pg_walfile_name(pg_current_wal_lsn()), 8)";
/// Transactions, as a power of two, that a primary can't have begun whose standby never heard of them.
const UNHEARD: u32 = 20;

/// Begins a timeline: its places come after all those of the one before, those included that a primary showed at its end and
/// nobody has any more. Others that do so at the same time wait, and find it begun.
pub async fn begin_timeline(connection: &mut PgConnection) -> Result<(), MemoryError> {
    let query = format!(
        "WITH begun AS (INSERT INTO meta (name, value) VALUES ('timeline', {TIMELINE}) ON CONFLICT (name) \
         DO UPDATE SET value = excluded.value WHERE meta.value <> excluded.value RETURNING 1) \
         UPDATE meta SET value = (value::bigint + (1::bigint << {}))::text WHERE name = 'base' AND EXISTS (SELECT 1 FROM begun)",
        UNHEARD + CHANGES
    );
    sqlx::query(AssertSqlSafe(query))
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(())
}

/// Where the changes of a transaction stand in the outbox.
#[derive(Debug)]
pub struct Places {
    first: i64,
    taken: i64,
}

impl Places {
    /// Those of the transaction under way, which gets its number by this; `None` when the timeline is a new one, which has to
    /// begin first. The message makes the transaction one that has written something, even if it only finds what another one
    /// has written: PostgreSQL lets no other wait for the standby at its commit.
    pub async fn of(connection: &mut PgConnection) -> Result<Option<Self>, MemoryError> {
        let query = format!(
            "SELECT (pg_current_xact_id()::text::bigint << {CHANGES}) + b.value::bigint, t.value = {TIMELINE}, \
             pg_logical_emit_message(true, 'aeterna', '')::text FROM meta b LEFT JOIN meta t ON t.name = 'timeline' WHERE b.name = 'base'"
        );
        let (first, same, _): (i64, Option<bool>, String) = sqlx::query_as(AssertSqlSafe(query))
            .fetch_one(connection)
            .await
            .map_err(storage)?;
        Ok((same == Some(true)).then_some(Self { first, taken: 0 }))
    }

    fn take(&mut self) -> Result<Sequence, MemoryError> {
        if self.taken >> CHANGES != 0 {
            return Err(aeterna_error::Error::internal("a transaction brings too many changes").into());
        }
        self.taken += 1;
        Ok(Sequence(self.first + self.taken - 1))
    }

    /// The last one; 0: none was taken.
    pub fn last(&self) -> i64 {
        match self.taken {
            0 => 0,
            taken => self.first + taken - 1,
        }
    }
}

/// Refuses a row that a later transaction has written, which then was quicker: what this one does to it would be told of before
/// that. All of it begins again, with later places.
fn in_turn(row: &PgRow) -> Result<(), MemoryError> {
    match row.try_get("later").map_err(storage)? {
        true => Err(StorageError::Collision("a later transaction was quicker".into()).into()),
        false => Ok(()),
    }
}

/// A write under way.
pub struct PostgresLedger<'t> {
    connection: &'t mut PgConnection,
    writer: &'t Writer,
    places: &'t mut Places,
    scopes: HashMap<String, ScopeKey>,
    tenant: Option<i64>,
}

impl<'t> PostgresLedger<'t> {
    /// In a transaction.
    pub fn new(connection: &'t mut PgConnection, writer: &'t Writer, places: &'t mut Places) -> Self {
        Self {
            connection,
            writer,
            places,
            scopes: HashMap::new(),
            tenant: None,
        }
    }

    async fn terms(&mut self, scope: ScopeKey, memory: &Memory) -> Result<Terms, MemoryError> {
        let tenant = match self.tenant {
            Some(tenant) => tenant,
            None => lexical::tenant(self.connection, &self.writer.tenant).await?,
        };
        self.tenant = Some(tenant);
        Ok(Terms::of(tenant, scope, memory))
    }

    async fn put_vector(&mut self, key: Key, vector: Option<&StoredVector>) -> Result<(), MemoryError> {
        match vector {
            Some(vector) => put_vector(self.connection, self.writer.tenant.as_str(), key, vector).await,
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Ledger for PostgresLedger<'_> {
    fn writer(&self) -> &Writer {
        self.writer
    }

    async fn answer(&mut self, idempotency: &Idempotency) -> Result<Option<(Vec<u8>, String)>, MemoryError> {
        answer(self.connection, self.writer, idempotency).await
    }

    async fn keep(&mut self, idempotency: &Idempotency, answer: String) -> Result<(), MemoryError> {
        sqlx::query(
            "INSERT INTO requests (tenant, subject, request_id, digest, answer, memory, at) \
             VALUES ($1, $2, $3, $4, $5, $5::jsonb #>> '{memory,id}', $6)",
        )
        .bind(self.writer.tenant.as_str())
        .bind(&self.writer.subject)
        .bind(idempotency.request_id.as_str())
        .bind(idempotency.digest.as_slice())
        .bind(seal_json(&answer))
        .bind(self.writer.now.micros())
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(())
    }

    async fn scope(&mut self, scope: &Scope) -> Result<ScopeKey, MemoryError> {
        let path = encode(scope)?;
        if let Some(key) = self.scopes.get(&path) {
            return Ok(*key);
        }
        let found: Option<i64> = sqlx::query_scalar("SELECT key FROM scopes WHERE tenant = $1 AND path = $2")
            .bind(self.writer.tenant.as_str())
            .bind(&path)
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        let key = match found {
            Some(key) => key,
            None => {
                let mut query = sqlx::query_scalar(
                    "INSERT INTO scopes (tenant, path, layer, company, org, team, project, \"user\", session, agent) \
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) RETURNING key",
                )
                .bind(self.writer.tenant.as_str())
                .bind(&path)
                .bind(scope.layer().map_or(0, Layer::number));
                for layer in Layer::ALL {
                    query = query.bind(scope.get(layer));
                }
                query.fetch_one(&mut *self.connection).await.map_err(storage)?
            }
        };
        self.scopes.insert(path, ScopeKey(key));
        Ok(ScopeKey(key))
    }

    async fn twin(&mut self, scope: ScopeKey, identity: [u8; 32]) -> Result<Option<(Key, Memory)>, MemoryError> {
        let row = sqlx::query(
            "SELECT key, record::text, age(xmin) < 0 AS later FROM memories \
             WHERE scope = $1 AND identity = $2 AND deleted_at IS NULL FOR UPDATE",
        )
        .bind(scope.0)
        .bind(identity.as_slice())
        .fetch_optional(&mut *self.connection)
        .await
        .map_err(storage)?;
        row.as_ref().map(in_turn).transpose()?;
        row.as_ref().map(keyed).transpose()
    }

    async fn live(&mut self, scope: ScopeKey) -> Result<i64, MemoryError> {
        // Whoever counts is alone with the scope until its transaction ends.
        sqlx::query("SELECT key FROM scopes WHERE key = $1 FOR NO KEY UPDATE")
            .bind(scope.0)
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        sqlx::query_scalar("SELECT count(*) FROM memories WHERE scope = $1 AND deleted_at IS NULL")
            .bind(scope.0)
            .fetch_one(&mut *self.connection)
            .await
            .map_err(storage)
    }

    async fn find(&mut self, id: MemoryId) -> Result<Option<(Key, Memory)>, MemoryError> {
        let row = sqlx::query(
            "SELECT key, record::text, age(xmin) < 0 AS later FROM memories WHERE id = $1 AND tenant = $2 FOR UPDATE",
        )
        .bind(id.as_bytes().as_slice())
        .bind(self.writer.tenant.as_str())
        .fetch_optional(&mut *self.connection)
        .await
        .map_err(storage)?;
        row.as_ref().map(in_turn).transpose()?;
        row.as_ref().map(keyed).transpose()
    }

    async fn owner(&mut self, id: MemoryId) -> Result<Owner, MemoryError> {
        let tenant: Option<String> = sqlx::query_scalar("SELECT owner_of($1)")
            .bind(id.as_bytes().as_slice())
            .fetch_one(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(match tenant {
            None => Owner::Nobody,
            Some(tenant) if tenant == self.writer.tenant.as_str() => Owner::Writer,
            Some(_) => Owner::Another,
        })
    }

    async fn insert(
        &mut self,
        scope: ScopeKey,
        memory: &Memory,
        vector: Option<&StoredVector>,
    ) -> Result<Key, MemoryError> {
        let source = &memory.body.source;
        let terms = self.terms(scope, memory).await?;
        let key: i64 = sqlx::query_scalar(
            "WITH added AS (INSERT INTO memories \
             (id, tenant, scope, identity, record, conversation, sequence, expires_at, deleted_at, version) \
             VALUES ($1, $2, $3, $4, $5::jsonb, $6, $7, $8, $9, $10) RETURNING key, deleted_at), \
             indexed AS (INSERT INTO texts (memory, tenant, scope, length, terms, counts) \
             SELECT key, $2, $3, $11, $12, $13 FROM added WHERE deleted_at IS NULL) SELECT key FROM added",
        )
        .bind(memory.id.as_bytes().as_slice())
        .bind(self.writer.tenant.as_str())
        .bind(scope.0)
        .bind(memory.body.identity().as_slice())
        .bind(seal_json(&encode(memory)?))
        .bind((!source.conversation.is_empty()).then(|| seal(&source.conversation)))
        .bind(source.sequence)
        .bind(memory.body.expires_at.map(|t| t.micros()))
        .bind(memory.deleted_at.map(|t| t.micros()))
        .bind(memory.version)
        .bind(terms.length)
        .bind(terms.terms)
        .bind(terms.counts)
        .fetch_one(&mut *self.connection)
        .await
        .map_err(storage)?;
        self.put_vector(Key(key), vector).await?;
        Ok(Key(key))
    }

    async fn update(&mut self, key: Key, memory: &Memory) -> Result<(), MemoryError> {
        // Looked up, since a refusal by the index would end the transaction for the other items, too; who comes in between makes
        // all of it begin again.
        let identity = memory.body.identity();
        let row = sqlx::query(
            "SELECT m.scope, m.deleted_at IS NULL AND EXISTS (SELECT 1 FROM memories o WHERE o.scope = m.scope \
             AND o.identity = $2 AND o.deleted_at IS NULL AND o.key <> m.key) AS taken FROM memories m WHERE m.key = $1",
        )
        .bind(key.0)
        .bind(identity.as_slice())
        .fetch_one(&mut *self.connection)
        .await
        .map_err(storage)?;
        let shown = memory.deleted_at.is_none();
        if shown && row.try_get("taken").map_err(storage)? {
            return Err(MemoryError::Duplicate);
        }
        sqlx::query(
            "UPDATE memories SET record = $2::jsonb, identity = $3, expires_at = $4, deleted_at = $5, version = $6 WHERE key = $1",
        )
        .bind(key.0)
        .bind(seal_json(&encode(memory)?))
        .bind(identity.as_slice())
        .bind(memory.body.expires_at.map(|t| t.micros()))
        .bind(memory.deleted_at.map(|t| t.micros()))
        .bind(memory.version)
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        if !shown {
            let gone = sqlx::query("DELETE FROM texts WHERE memory = $1").bind(key.0);
            gone.execute(&mut *self.connection).await.map_err(storage)?;
            return Ok(());
        }
        let scope = ScopeKey(row.try_get("scope").map_err(storage)?);
        let terms = self.terms(scope, memory).await?;
        lexical::put(self.connection, self.writer.tenant.as_str(), key, scope, terms).await
    }

    async fn revector(&mut self, key: Key, vector: Option<&StoredVector>) -> Result<(), MemoryError> {
        let gone = sqlx::query("DELETE FROM vectors WHERE memory = $1").bind(key.0);
        gone.execute(&mut *self.connection).await.map_err(storage)?;
        self.put_vector(key, vector).await
    }

    async fn purge(&mut self, key: Key, memory: &Memory) -> Result<(), MemoryError> {
        // Terms and vectors go with the memory.
        sqlx::query(
            "WITH gone AS (DELETE FROM memories WHERE key = $1), past AS (DELETE FROM history WHERE memory = $2) \
             DELETE FROM requests WHERE tenant = $3 AND memory = $4",
        )
        .bind(key.0)
        .bind(memory.id.as_bytes().as_slice())
        .bind(self.writer.tenant.as_str())
        .bind(memory.id.to_string())
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(())
    }

    async fn history(&mut self, version: &Version) -> Result<(), MemoryError> {
        sqlx::query(
            "INSERT INTO history (memory, version, tenant, kind, changed_at, changed_by, record) \
             VALUES ($1, $2, $3, $4, $5, $6, $7::jsonb)",
        )
        .bind(version.memory.id.as_bytes().as_slice())
        .bind(version.memory.version)
        .bind(self.writer.tenant.as_str())
        .bind(version.kind.name())
        .bind(version.changed_at.micros())
        .bind(seal(&version.changed_by))
        .bind(seal_json(&encode(&version.memory)?))
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(())
    }

    async fn event(&mut self, key: Key, memory: &Memory, kind: Kind) -> Result<Sequence, MemoryError> {
        let sequence = self.places.take()?;
        sqlx::query(
            "INSERT INTO outbox (sequence, tenant, memory, kind, version, committed_at, id, scope) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, (SELECT scope FROM memories WHERE key = $3))",
        )
        .bind(sequence.0)
        .bind(self.writer.tenant.as_str())
        .bind(key.0)
        .bind(kind.name())
        .bind(memory.version)
        .bind(self.writer.now.micros())
        .bind(memory.id.as_bytes().as_slice())
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(sequence)
    }

    async fn mention(&mut self, key: Key, memory: &Memory) -> Result<Sequence, MemoryError> {
        // No watcher is told of such a change.
        self.event(key, memory, Kind::Embedded).await
    }

    async fn resource_event(
        &mut self,
        scope: Option<ScopeKey>,
        resource: Resource<'_>,
        version: i64,
        kind: Kind,
    ) -> Result<Sequence, MemoryError> {
        let sequence = self.places.take()?;
        sqlx::query(
            "INSERT INTO outbox (sequence, tenant, memory, kind, version, committed_at, scope, resource) \
             VALUES ($1, $2, 0, $3, $4, $5, $6, $7)",
        )
        .bind(sequence.0)
        .bind(self.writer.tenant.as_str())
        .bind(kind.name())
        .bind(version)
        .bind(self.writer.now.micros())
        .bind(scope.map(|scope| scope.0))
        .bind(resource.name())
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(sequence)
    }

    async fn document(&mut self, scope: ScopeKey, path: &str) -> Result<Option<(i64, Document)>, MemoryError> {
        let row = sqlx::query(
            "SELECT key, record, age(xmin) < 0 AS later FROM documents WHERE path = $1 AND scope = $2 FOR UPDATE",
        )
        .bind(path)
        .bind(scope.0)
        .fetch_optional(&mut *self.connection)
        .await
        .map_err(storage)?;
        let Some(row) = row else { return Ok(None) };
        in_turn(&row)?;
        let document = record(&row, "record", "document")?;
        Ok(Some((row.try_get("key").map_err(storage)?, document)))
    }

    async fn document_text(&mut self, document: i64, version: i64) -> Result<Option<Text>, MemoryError> {
        let row = sqlx::query("SELECT record, content FROM document_versions WHERE document = $1 AND version = $2")
            .bind(document)
            .bind(version)
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        row.map(|row| super::documents::whole(&row).map(|document| document.text))
            .transpose()
    }

    async fn put_document(
        &mut self,
        existing: Option<i64>,
        scope: ScopeKey,
        document: &Document,
    ) -> Result<i64, MemoryError> {
        let record = seal_json(&encode(document)?);
        let query = match existing {
            Some(key) => sqlx::query_scalar(
                "UPDATE documents SET version = $1, record = $2, deleted_at = $3 WHERE key = $4 RETURNING key",
            )
            .bind(document.version)
            .bind(&record)
            .bind(document.deleted_at.map(|time| time.micros()))
            .bind(key),
            None => sqlx::query_scalar(
                "INSERT INTO documents (version, record, tenant, scope, path) VALUES ($1, $2, $3, $4, $5) RETURNING key",
            )
            .bind(document.version)
            .bind(&record)
            .bind(self.writer.tenant.as_str())
            .bind(scope.0)
            .bind(&document.path),
        };
        let key: i64 = query.fetch_one(&mut *self.connection).await.map_err(storage)?;
        sqlx::query(
            "INSERT INTO document_versions (document, version, tenant, record, content) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(key)
        .bind(document.version)
        .bind(self.writer.tenant.as_str())
        .bind(&record)
        .bind(seal(&document.text.content))
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(key)
    }

    async fn policy(&mut self, name: &str) -> Result<Option<Policy>, MemoryError> {
        let row = sqlx::query(
            "SELECT record, age(xmin) < 0 AS later FROM policies WHERE tenant = $1 AND name = $2 FOR UPDATE",
        )
        .bind(self.writer.tenant.as_str())
        .bind(name)
        .fetch_optional(&mut *self.connection)
        .await
        .map_err(storage)?;
        row.as_ref().map(in_turn).transpose()?;
        row.as_ref().map(|row| record(row, "record", "policy")).transpose()
    }

    async fn put_policy(&mut self, policy: &Policy) -> Result<(), MemoryError> {
        // A policy that somebody else made since it was looked up is refused by the key, and all of it begins again.
        let query = match policy.version {
            1 => "INSERT INTO policies (tenant, name, record) VALUES ($1, $2, $3)",
            _ => "UPDATE policies SET record = $3 WHERE tenant = $1 AND name = $2",
        };
        sqlx::query(query)
            .bind(self.writer.tenant.as_str())
            .bind(&policy.name)
            .bind(seal_json(&encode(policy)?))
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(())
    }

    async fn drop_policy(&mut self, name: &str) -> Result<(), MemoryError> {
        sqlx::query("DELETE FROM policies WHERE tenant = $1 AND name = $2")
            .bind(self.writer.tenant.as_str())
            .bind(name)
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(())
    }

    async fn put_progress(&mut self, id: &str, progress: &Progress) -> Result<(), MemoryError> {
        sqlx::query(
            "INSERT INTO imports (tenant, subject, id, items, digest, at, refused) VALUES ($1, $2, $3, $4, $5, $6, $7) \
             ON CONFLICT (tenant, subject, id) DO UPDATE SET items = $4, digest = $5, at = $6, refused = $7",
        )
        .bind(self.writer.tenant.as_str())
        .bind(&self.writer.subject)
        .bind(id)
        .bind(progress.items)
        .bind(progress.digest.as_slice())
        .bind(self.writer.now.micros())
        .bind(encode(&progress.refused)?)
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(())
    }
}

/// The answer that is kept under a request id.
pub async fn answer(
    connection: &mut PgConnection,
    writer: &Writer,
    idempotency: &Idempotency,
) -> Result<Option<(Vec<u8>, String)>, MemoryError> {
    let query = "SELECT digest, answer FROM requests WHERE tenant = $1 AND subject = $2 AND request_id = $3";
    let row = sqlx::query(query)
        .bind(writer.tenant.as_str())
        .bind(&writer.subject)
        .bind(idempotency.request_id.as_str())
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    let Some(row) = row else { return Ok(None) };
    let answer: &str = row.try_get("answer").map_err(storage)?;
    Ok(Some((
        row.try_get("digest").map_err(storage)?,
        unseal_json(answer).into_owned(),
    )))
}

async fn put_vector(
    connection: &mut PgConnection,
    tenant: &str,
    key: Key,
    vector: &StoredVector,
) -> Result<(), MemoryError> {
    let put = "INSERT INTO vectors (model, memory, tenant, code) SELECT key, $2, $3, $4 FROM models WHERE identity = $1 \
               ON CONFLICT (model, memory) DO UPDATE SET code = excluded.code";
    loop {
        let stored = sqlx::query(put)
            .bind(&vector.model)
            .bind(key.0)
            .bind(tenant)
            .bind(vector.code.as_bytes())
            .execute(&mut *connection)
            .await
            .map_err(storage)?;
        if stored.rows_affected() > 0 {
            return Ok(());
        }
        // The first vector of a model.
        let add = sqlx::query("INSERT INTO models (identity) VALUES ($1)").bind(&vector.model);
        add.execute(&mut *connection).await.map_err(storage)?;
    }
}

/// Forgets some of the vectors that a model has made, and the model with the last ones; true when nothing is left.
pub async fn forget_some(connection: &mut PgConnection, identity: &str) -> Result<bool, MemoryError> {
    const SOME: i64 = 5_000;
    let gone = sqlx::query(
        "DELETE FROM vectors v USING (SELECT v.model, v.memory FROM vectors v JOIN models k ON k.key = v.model \
         WHERE k.identity = $1 LIMIT $2) part WHERE v.model = part.model AND v.memory = part.memory",
    )
    .bind(identity)
    .bind(SOME)
    .execute(&mut *connection)
    .await
    .map_err(storage)?;
    if gone.rows_affected() > 0 {
        return Ok(false);
    }
    let model = sqlx::query("DELETE FROM models WHERE identity = $1").bind(identity);
    model.execute(connection).await.map_err(storage)?;
    Ok(true)
}

/// Stores vectors that were pending, with an event for each; the memory says then which model has it. A memory that was
/// changed since it was read has another text, and gets its vector another time.
pub async fn put_codes(
    connection: &mut PgConnection,
    places: &mut Places,
    model: &str,
    codes: &[(Key, i64, Code)],
    now: Timestamp,
) -> Result<usize, MemoryError> {
    let mut count = 0;
    for (key, version, code) in codes {
        let marked = sqlx::query(
            "UPDATE memories SET record = jsonb_set(record, '{embedding_model}', to_jsonb($1::text)) \
             WHERE key = $2 AND version = $3 AND deleted_at IS NULL RETURNING key, tenant, record::text",
        )
        .bind(model)
        .bind(key.0)
        .bind(version)
        .fetch_optional(&mut *connection)
        .await
        .map_err(storage)?;
        let Some(marked) = marked else { continue };
        let vector = StoredVector {
            model: model.into(),
            code: code.clone(),
        };
        let tenant: &str = marked.try_get("tenant").map_err(storage)?;
        put_vector(connection, tenant, *key, &vector).await?;
        let (_, memory) = keyed(&marked)?;
        let writer = system(tenant, now)?;
        let mut ledger = PostgresLedger::new(connection, &writer, places);
        ledger.event(*key, &memory, Kind::Embedded).await?;
        count += 1;
    }
    Ok(count)
}

/// Deletes what has expired, as a write of the system's own; another program at the same work takes others.
pub async fn reap(
    session: &mut Session,
    places: &mut Places,
    now: Timestamp,
    limit: usize,
) -> Result<usize, MemoryError> {
    let rows = sqlx::query(
        "SELECT key, tenant, record::text FROM memories WHERE expires_at <= $1 AND deleted_at IS NULL AND age(xmin) >= 0 \
         ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED",
    )
    .bind(now.micros())
    .bind(super::read::limit(limit))
    .fetch_all(&mut **session)
    .await
    .map_err(storage)?;
    for row in &rows {
        let (key, memory) = keyed(row)?;
        let writer = system(row.try_get("tenant").map_err(storage)?, now)?;
        let mut ledger = PostgresLedger::new(session, &writer, places);
        ledger::expire(&mut ledger, key, memory).await?;
    }
    Ok(rows.len())
}

/// Makes places in the outbox go on after those that are there, when the database was moved to a cluster that is younger than the
/// one it comes from.
pub async fn keep_ascending(connection: &mut PgConnection) -> Result<(), MemoryError> {
    // No place of this cluster is as large as that of the next transaction. (The horizon is of no use: what committed after a
    // transaction that is still under way is above it.)
    let query = "UPDATE meta SET value = (value::bigint + behind.by)::text FROM (SELECT max(sequence) - (SELECT value::bigint \
                 FROM meta WHERE name = 'base') - (pg_snapshot_xmax(pg_current_snapshot())::text::bigint << 20) + (1 << 20) AS by \
                 FROM outbox) behind WHERE name = 'base' AND behind.by >= (1 << 20)";
    let moved = sqlx::query(query).execute(connection).await.map_err(storage)?;
    if moved.rows_affected() > 0 {
        tracing::warn!(
            "the database comes from another cluster; places in the outbox go on after those that are there"
        );
    }
    Ok(())
}
