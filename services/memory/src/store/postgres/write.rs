//! Writes: the steps of a write on PostgreSQL, all in one transaction.

use std::collections::HashMap;

use aeterna_storage::StorageError;
use aeterna_types::{Layer, MemoryId, Scope};
use async_trait::async_trait;
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, PgConnection, Row as _};

use super::lexical::{self, Terms};
use super::{keyed, record, seal, seal_json, storage, unseal_json};
use crate::domain::{Document, Idempotency, Key, Kind, Memory, Policy, ScopeKey, Sequence, Text, Version, Writer};
use crate::error::MemoryError;
use crate::store::ledger::{Ledger, Owner, Resource, encode};
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
    /// That of the answers that change nothing.
    mention: Option<Sequence>,
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
        Ok((same == Some(true)).then_some(Self {
            first,
            taken: 0,
            mention: None,
        }))
    }

    fn take(&mut self) -> Result<Sequence, MemoryError> {
        if self.taken >> CHANGES != 0 {
            return Err(aeterna_error::Error::internal("a transaction brings too many changes").into());
        }
        self.taken += 1;
        Ok(Sequence(self.first + self.taken - 1))
    }

    /// The last one that there can be.
    fn end(&self) -> i64 {
        self.first + (1 << CHANGES) - 1
    }

    /// The last one; 0: none was taken.
    pub fn last(&self) -> i64 {
        match self.taken {
            0 => 0,
            taken => self.first + taken - 1,
        }
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

/// What a write is about.
pub(super) enum Changed<'a> {
    Memory(MemoryId),
    Resource(Resource<'a>),
}

/// Whether a later transaction may have written a row. Of one that was written very long ago the answer is wrong at times, since
/// numbers of transactions begin again; whoever has to know it asks the outbox.
macro_rules! newer {
    () => {
        "age(xmin) < 0 AS newer"
    };
}
pub(super) use newer;

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

    /// Refuses to change what a later transaction has changed, which then was quicker: this change would be told of before that.
    /// All of it begins again, with later places. It is asked once the row's lock is held, or there is no row any more.
    pub(super) async fn in_turn(&mut self, what: Changed<'_>) -> Result<(), MemoryError> {
        const LATER: &str = "SELECT EXISTS (SELECT 1 FROM outbox WHERE tenant = $1 AND sequence > $2 AND kind <> 'embedded' \
                             AND (id = $3 OR resource = $4))";
        let (id, resource) = match what {
            Changed::Memory(id) => (Some(id.as_bytes().to_vec()), None),
            Changed::Resource(resource) => (None, Some(resource.name())),
        };
        let later = sqlx::query_scalar(LATER)
            .bind(self.writer.tenant.as_str())
            .bind(self.places.end())
            .bind(id)
            .bind(resource)
            .fetch_one(&mut *self.connection)
            .await
            .map_err(storage)?;
        match later {
            true => Err(StorageError::Collision("a later transaction was quicker".into()).into()),
            false => Ok(()),
        }
    }

    /// The memory of a row that may have been changed by a later transaction.
    pub(super) async fn locked(&mut self, row: Option<PgRow>) -> Result<Option<(Key, Memory)>, MemoryError> {
        let Some(row) = row else { return Ok(None) };
        let (key, memory) = keyed(&row)?;
        if row.try_get("newer").map_err(storage)? {
            self.in_turn(Changed::Memory(memory.id)).await?;
        }
        Ok(Some((key, memory)))
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

    async fn hold(&mut self, ids: &[MemoryId]) -> Result<(), MemoryError> {
        let ids: Vec<&[u8]> = ids.iter().map(|id| id.as_bytes().as_slice()).collect();
        sqlx::query("SELECT key FROM memories WHERE tenant = $1 AND id = ANY($2) ORDER BY key FOR UPDATE")
            .bind(self.writer.tenant.as_str())
            .bind(ids)
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(())
    }

    async fn hold_twins(&mut self, places: &[(&Scope, [u8; 32])]) -> Result<(), MemoryError> {
        let paths = places.iter().map(|(scope, _)| encode(*scope));
        let paths: Vec<String> = paths.collect::<Result<_, _>>()?;
        let identities: Vec<&[u8]> = places.iter().map(|(_, identity)| identity.as_slice()).collect();
        sqlx::query(
            "SELECT m.key FROM memories m JOIN scopes s ON s.key = m.scope \
             JOIN unnest($2::text[], $3::bytea[]) p (path, identity) ON s.path = p.path AND m.identity = p.identity \
             WHERE s.tenant = $1 AND m.deleted_at IS NULL ORDER BY m.key FOR UPDATE OF m",
        )
        .bind(self.writer.tenant.as_str())
        .bind(paths)
        .bind(identities)
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(())
    }

    async fn twin(&mut self, scope: ScopeKey, identity: [u8; 32]) -> Result<Option<(Key, Memory)>, MemoryError> {
        let row = sqlx::query(concat!(
            "SELECT key, record::text, ",
            newer!(),
            " FROM memories WHERE scope = $1 AND identity = $2 AND deleted_at IS NULL FOR UPDATE"
        ))
        .bind(scope.0)
        .bind(identity.as_slice())
        .fetch_optional(&mut *self.connection)
        .await
        .map_err(storage)?;
        self.locked(row).await
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
        let row = sqlx::query(concat!(
            "SELECT key, record::text, ",
            newer!(),
            " FROM memories WHERE id = $1 AND tenant = $2 FOR UPDATE"
        ))
        .bind(id.as_bytes().as_slice())
        .bind(self.writer.tenant.as_str())
        .fetch_optional(&mut *self.connection)
        .await
        .map_err(storage)?;
        self.locked(row).await
    }

    async fn owner(&mut self, id: MemoryId) -> Result<Owner, MemoryError> {
        let tenant: Option<String> = sqlx::query_scalar("SELECT owner_of($1)")
            .bind(id.as_bytes().as_slice())
            .fetch_one(&mut *self.connection)
            .await
            .map_err(storage)?;
        if tenant.is_none() {
            // It may have been removed by then.
            self.in_turn(Changed::Memory(id)).await?;
        }
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
        // One does for all of them, since all is committed at once. No watcher is told of it.
        if let Some(mention) = self.places.mention {
            return Ok(mention);
        }
        let mention = self.event(key, memory, Kind::Embedded).await?;
        self.places.mention = Some(mention);
        Ok(mention)
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
        let row = sqlx::query(concat!(
            "SELECT key, record, ",
            newer!(),
            " FROM documents WHERE path = $1 AND scope = $2 FOR UPDATE"
        ))
        .bind(path)
        .bind(scope.0)
        .fetch_optional(&mut *self.connection)
        .await
        .map_err(storage)?;
        let Some(row) = row else { return Ok(None) };
        if row.try_get("newer").map_err(storage)? {
            self.in_turn(Changed::Resource(Resource::Document(path))).await?;
        }
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
        let row = sqlx::query(concat!(
            "SELECT record, ",
            newer!(),
            " FROM policies WHERE tenant = $1 AND name = $2 FOR UPDATE"
        ))
        .bind(self.writer.tenant.as_str())
        .bind(name)
        .fetch_optional(&mut *self.connection)
        .await
        .map_err(storage)?;
        // It may have been removed by then.
        if row.as_ref().is_none_or(|row| row.try_get("newer").unwrap_or(true)) {
            self.in_turn(Changed::Resource(Resource::Policy(name))).await?;
        }
        row.as_ref().map(|row| record(row, "record", "policy")).transpose()
    }

    async fn put_policy(&mut self, policy: &Policy) -> Result<(), MemoryError> {
        // A policy that somebody else made since it was looked up is refused by the key, and all of it begins again.
        let query = match policy.version {
            1 => "INSERT INTO policies (tenant, name, record) VALUES ($1, $2, $3)",
            _ => {
                "INSERT INTO policies (tenant, name, record) VALUES ($1, $2, $3) \
                 ON CONFLICT (tenant, name) DO UPDATE SET record = $3"
            }
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

pub(super) async fn put_vector(
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
