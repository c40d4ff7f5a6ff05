//! Writes: the steps of a write on SQLite, all in one transaction.

use aeterna_types::{Layer, MemoryId, Scope, Timestamp};
use async_trait::async_trait;
use sqlx::{AssertSqlSafe, Row as _, SqliteConnection};

use super::{SqliteStore, lexical, read, storage, stored};
use crate::domain::{Document, Idempotency, Key, Kind, Memory, Policy, ScopeKey, Sequence, Text, Version, Writer};
use crate::error::MemoryError;
use crate::store::code::Code;
use crate::store::ledger::{self, Ledger, Owner, Resource, encode, parsed, system};
use crate::store::{Progress, Stored, StoredVector};

/// A write under way.
pub struct SqliteLedger<'t> {
    /// The transaction.
    pub connection: &'t mut SqliteConnection,
    /// Who writes.
    pub writer: &'t Writer,
}

/// Finds the answer to a request id.
pub const REPLAY: &str = "SELECT digest, answer FROM requests WHERE tenant = ? AND subject = ? AND request_id = ?";

#[async_trait]
impl Ledger for SqliteLedger<'_> {
    fn writer(&self) -> &Writer {
        self.writer
    }

    async fn answer(&mut self, idempotency: &Idempotency) -> Result<Option<(Vec<u8>, String)>, MemoryError> {
        let row = sqlx::query(REPLAY)
            .bind(self.writer.tenant.as_str())
            .bind(&self.writer.subject)
            .bind(idempotency.request_id.as_str())
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        let Some(row) = row else { return Ok(None) };
        let digest = row.try_get("digest").map_err(storage)?;
        Ok(Some((digest, row.try_get("answer").map_err(storage)?)))
    }

    async fn keep(&mut self, idempotency: &Idempotency, answer: String) -> Result<(), MemoryError> {
        sqlx::query("INSERT INTO requests (tenant, subject, request_id, digest, answer, at) VALUES (?, ?, ?, ?, ?, ?)")
            .bind(self.writer.tenant.as_str())
            .bind(&self.writer.subject)
            .bind(idempotency.request_id.as_str())
            .bind(idempotency.digest.as_slice())
            .bind(answer)
            .bind(self.writer.now.micros())
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(())
    }

    async fn scope(&mut self, scope: &Scope) -> Result<ScopeKey, MemoryError> {
        let path = encode(scope)?;
        let find = "SELECT key FROM scopes WHERE tenant = ? AND path = ?";
        let found: Option<i64> = sqlx::query_scalar(find)
            .bind(self.writer.tenant.as_str())
            .bind(&path)
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        if let Some(key) = found {
            return Ok(ScopeKey(key));
        }
        let mut query = sqlx::query(
            "INSERT INTO scopes (tenant, path, layer, company, org, team, project, user, session, agent) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(self.writer.tenant.as_str().to_owned())
        .bind(path)
        .bind(scope.layer().map_or(0, Layer::number));
        for layer in Layer::ALL {
            query = query.bind(scope.get(layer).map(str::to_owned));
        }
        let added = query.execute(&mut *self.connection).await.map_err(storage)?;
        Ok(ScopeKey(added.last_insert_rowid()))
    }

    async fn twin(&mut self, scope: ScopeKey, identity: [u8; 32]) -> Result<Option<(Key, Memory)>, MemoryError> {
        let query = "SELECT key, record FROM memories WHERE scope = ? AND identity = ? AND deleted_at IS NULL";
        let there = sqlx::query(query)
            .bind(scope.0)
            .bind(identity.as_slice())
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        there.as_ref().map(keyed).transpose()
    }

    async fn live(&mut self, scope: ScopeKey) -> Result<i64, MemoryError> {
        let query = "SELECT count(*) FROM memories WHERE scope = ? AND deleted_at IS NULL";
        let count = sqlx::query_scalar(query).bind(scope.0).fetch_one(&mut *self.connection);
        count.await.map_err(storage)
    }

    async fn find(&mut self, id: MemoryId) -> Result<Option<(Key, Memory)>, MemoryError> {
        let row = sqlx::query("SELECT key, record FROM memories WHERE id = ? AND tenant = ?")
            .bind(id.as_bytes().as_slice())
            .bind(self.writer.tenant.as_str())
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        row.as_ref().map(keyed).transpose()
    }

    async fn owner(&mut self, id: MemoryId) -> Result<Owner, MemoryError> {
        let tenant: Option<String> = sqlx::query_scalar("SELECT tenant FROM memories WHERE id = ?")
            .bind(id.as_bytes().as_slice())
            .fetch_optional(&mut *self.connection)
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
        let inserted = sqlx::query(
            "INSERT INTO memories \
             (key, id, tenant, scope, identity, record, conversation, sequence, expires_at, deleted_at, version) \
             VALUES (1 + max((SELECT coalesce(max(key), 0) FROM memories), \
             (SELECT coalesce(max(CAST(value AS INTEGER)), 0) FROM meta WHERE name = 'last_key')), \
             ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(memory.id.as_bytes().as_slice())
        .bind(self.writer.tenant.as_str())
        .bind(scope.0)
        .bind(memory.body.identity().as_slice())
        .bind(encode(memory)?)
        .bind((!source.conversation.is_empty()).then_some(source.conversation.as_str()))
        .bind(source.sequence)
        .bind(memory.body.expires_at.map(|t| t.micros()))
        .bind(memory.deleted_at.map(|t| t.micros()))
        .bind(memory.version)
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        let key = Key(inserted.last_insert_rowid());
        let tenant = lexical::tenant(self.connection, &self.writer.tenant).await?;
        if memory.deleted_at.is_none() {
            lexical::put(self.connection, tenant, key, scope, memory).await?;
        }
        put_vector(self.connection, key, vector).await?;
        Ok(key)
    }

    async fn update(&mut self, key: Key, memory: &Memory) -> Result<(), MemoryError> {
        let updated = sqlx::query(
            "UPDATE memories SET record = ?, identity = ?, expires_at = ?, deleted_at = ?, version = ? WHERE key = ? \
             RETURNING scope",
        )
        .bind(encode(memory)?)
        .bind(memory.body.identity().as_slice())
        .bind(memory.body.expires_at.map(|t| t.micros()))
        .bind(memory.deleted_at.map(|t| t.micros()))
        .bind(memory.version)
        .bind(key.0)
        .fetch_one(&mut *self.connection)
        .await
        .map_err(
            |error| match error.as_database_error().is_some_and(|e| e.is_unique_violation()) {
                true => MemoryError::Duplicate,
                false => storage(error),
            },
        )?;
        let scope = ScopeKey(updated.try_get("scope").map_err(storage)?);
        let tenant = lexical::tenant(self.connection, &self.writer.tenant).await?;
        lexical::remove(self.connection, tenant, key).await?;
        if memory.deleted_at.is_none() {
            lexical::put(self.connection, tenant, key, scope, memory).await?;
        }
        Ok(())
    }

    async fn revector(&mut self, key: Key, vector: Option<&StoredVector>) -> Result<(), MemoryError> {
        drop_vectors(self.connection, key).await?;
        put_vector(self.connection, key, vector).await
    }

    async fn purge(&mut self, key: Key, memory: &Memory) -> Result<(), MemoryError> {
        let tenant = lexical::tenant(self.connection, &self.writer.tenant).await?;
        lexical::remove(self.connection, tenant, key).await?;
        // Nobody else gets its number: an index that has not followed yet would show his memory for this one.
        sqlx::query(
            "INSERT INTO meta (name, value) VALUES ('last_key', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value \
             WHERE CAST(excluded.value AS INTEGER) > CAST(value AS INTEGER)",
        )
        .bind(key.0.to_string())
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        sqlx::query("DELETE FROM memories WHERE key = ?")
            .bind(key.0)
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        sqlx::query("DELETE FROM history WHERE memory = ?")
            .bind(memory.id.as_bytes().as_slice())
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        sqlx::query("DELETE FROM requests WHERE tenant = ? AND json_extract(answer, '$.memory.id') = ?")
            .bind(self.writer.tenant.as_str())
            .bind(memory.id.to_string())
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(())
    }

    async fn history(&mut self, version: &Version) -> Result<(), MemoryError> {
        sqlx::query(
            "INSERT INTO history (memory, version, kind, changed_at, changed_by, record) VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(version.memory.id.as_bytes().as_slice())
        .bind(version.memory.version)
        .bind(version.kind.name())
        .bind(version.changed_at.micros())
        .bind(&version.changed_by)
        .bind(encode(&version.memory)?)
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(())
    }

    async fn event(&mut self, key: Key, memory: &Memory, kind: Kind) -> Result<Sequence, MemoryError> {
        let event = sqlx::query(
            "INSERT INTO outbox (tenant, memory, kind, version, committed_at, id, scope) \
             VALUES (?, ?, ?, ?, ?, ?, (SELECT scope FROM memories WHERE key = ?))",
        )
        .bind(self.writer.tenant.as_str())
        .bind(key.0)
        .bind(kind.name())
        .bind(memory.version)
        .bind(self.writer.now.micros())
        .bind(memory.id.as_bytes().as_slice())
        .bind(key.0)
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(Sequence(event.last_insert_rowid()))
    }

    async fn resource_event(
        &mut self,
        scope: Option<ScopeKey>,
        resource: Resource<'_>,
        version: i64,
        kind: Kind,
    ) -> Result<Sequence, MemoryError> {
        let event = sqlx::query(
            "INSERT INTO outbox (tenant, memory, kind, version, committed_at, scope, resource) VALUES (?, 0, ?, ?, ?, ?, ?)",
        )
        .bind(self.writer.tenant.as_str())
        .bind(kind.name())
        .bind(version)
        .bind(self.writer.now.micros())
        .bind(scope.map(|scope| scope.0))
        .bind(resource.name())
        .execute(&mut *self.connection)
        .await
        .map_err(storage)?;
        Ok(Sequence(event.last_insert_rowid()))
    }

    async fn document(&mut self, scope: ScopeKey, path: &str) -> Result<Option<(i64, Document)>, MemoryError> {
        let row = sqlx::query("SELECT key, record FROM documents WHERE path = ? AND scope = ?")
            .bind(path)
            .bind(scope.0)
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        let Some(row) = row else { return Ok(None) };
        let record: &str = row.try_get("record").map_err(storage)?;
        let document = parsed(record, "document")?;
        Ok(Some((row.try_get("key").map_err(storage)?, document)))
    }

    async fn document_text(&mut self, document: i64, version: i64) -> Result<Option<Text>, MemoryError> {
        let row = sqlx::query("SELECT record, content FROM document_versions WHERE document = ? AND version = ?")
            .bind(document)
            .bind(version)
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        let Some(row) = row else { return Ok(None) };
        let record: &str = row.try_get("record").map_err(storage)?;
        let mut text = parsed::<Document>(record, "document")?.text;
        text.content = row.try_get("content").map_err(storage)?;
        Ok(Some(text))
    }

    async fn put_document(
        &mut self,
        existing: Option<i64>,
        scope: ScopeKey,
        document: &Document,
    ) -> Result<i64, MemoryError> {
        let record = encode(document)?;
        let query = match existing {
            Some(key) => {
                sqlx::query("UPDATE documents SET version = ?, record = ?, deleted_at = ? WHERE key = ? RETURNING key")
                    .bind(document.version)
                    .bind(&record)
                    .bind(document.deleted_at.map(|time| time.micros()))
                    .bind(key)
            }
            None => {
                sqlx::query("INSERT INTO documents (version, record, scope, path) VALUES (?, ?, ?, ?) RETURNING key")
                    .bind(document.version)
                    .bind(&record)
                    .bind(scope.0)
                    .bind(&document.path)
            }
        };
        let row = query.fetch_one(&mut *self.connection).await.map_err(storage)?;
        let key: i64 = row.try_get("key").map_err(storage)?;
        sqlx::query("INSERT INTO document_versions (document, version, record, content) VALUES (?, ?, ?, ?)")
            .bind(key)
            .bind(document.version)
            .bind(&record)
            .bind(&document.text.content)
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(key)
    }

    async fn policy(&mut self, name: &str) -> Result<Option<Policy>, MemoryError> {
        let record: Option<String> = sqlx::query_scalar("SELECT record FROM policies WHERE tenant = ? AND name = ?")
            .bind(self.writer.tenant.as_str())
            .bind(name)
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(storage)?;
        record.map(|record| parsed(&record, "policy")).transpose()
    }

    async fn put_policy(&mut self, policy: &Policy) -> Result<(), MemoryError> {
        sqlx::query("INSERT OR REPLACE INTO policies (tenant, name, record) VALUES (?, ?, ?)")
            .bind(self.writer.tenant.as_str())
            .bind(&policy.name)
            .bind(encode(policy)?)
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(())
    }

    async fn drop_policy(&mut self, name: &str) -> Result<(), MemoryError> {
        sqlx::query("DELETE FROM policies WHERE tenant = ? AND name = ?")
            .bind(self.writer.tenant.as_str())
            .bind(name)
            .execute(&mut *self.connection)
            .await
            .map_err(storage)?;
        Ok(())
    }

    async fn put_progress(&mut self, id: &str, progress: &Progress) -> Result<(), MemoryError> {
        let query = "INSERT OR REPLACE INTO imports (tenant, subject, id, items, digest, at, refused) \
                     VALUES (?, ?, ?, ?, ?, ?, ?)";
        sqlx::query(query)
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

fn keyed(row: &sqlx::sqlite::SqliteRow) -> Result<(Key, Memory), MemoryError> {
    stored(row).map(|stored| (stored.key, stored.memory))
}

/// Stores a vector; the table of its model is made when it is the first one.
async fn put_vector(
    connection: &mut SqliteConnection,
    key: Key,
    vector: Option<&StoredVector>,
) -> Result<(), MemoryError> {
    let Some(vector) = vector else { return Ok(()) };
    let find = "SELECT key FROM models WHERE identity = ?";
    let found: Option<i64> = sqlx::query_scalar(find)
        .bind(&vector.model)
        .fetch_optional(&mut *connection)
        .await
        .map_err(storage)?;
    let model = match found {
        Some(model) => model,
        None => new_model(connection, &vector.model).await?,
    };
    let text = format!("INSERT OR REPLACE INTO vectors_{model} (memory, code) VALUES (?, ?)");
    sqlx::query(AssertSqlSafe(text))
        .bind(key.0)
        .bind(vector.code.as_bytes())
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(())
}

/// A model whose first vector is to be stored.
async fn new_model(connection: &mut SqliteConnection, identity: &str) -> Result<i64, MemoryError> {
    let added = sqlx::query("INSERT INTO models (identity) VALUES (?)")
        .bind(identity)
        .execute(&mut *connection)
        .await
        .map_err(storage)?;
    let model = added.last_insert_rowid();
    let text = format!(
        "CREATE TABLE vectors_{model} (memory INTEGER PRIMARY KEY REFERENCES memories (key) ON DELETE CASCADE, \
         code BLOB NOT NULL) STRICT"
    );
    sqlx::query(AssertSqlSafe(text))
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(model)
}

/// Removes what all models have made of a memory.
async fn drop_vectors(connection: &mut SqliteConnection, key: Key) -> Result<(), MemoryError> {
    let models: Vec<i64> = sqlx::query_scalar("SELECT key FROM models")
        .fetch_all(&mut *connection)
        .await
        .map_err(storage)?;
    for model in models {
        let text = format!("DELETE FROM vectors_{model} WHERE memory = ?");
        let deleted = sqlx::query(AssertSqlSafe(text))
            .bind(key.0)
            .execute(&mut *connection)
            .await;
        deleted.map_err(storage)?;
    }
    Ok(())
}

/// Forgets all vectors that a model has made.
pub async fn forget_model(store: &SqliteStore, identity: &str) -> Result<(), MemoryError> {
    let mut transaction = store.database.begin().await?;
    let found: Option<i64> = sqlx::query_scalar("DELETE FROM models WHERE identity = ? RETURNING key")
        .bind(identity)
        .fetch_optional(&mut *transaction)
        .await
        .map_err(storage)?;
    if let Some(model) = found {
        let text = format!("DROP TABLE vectors_{model}");
        sqlx::query(AssertSqlSafe(text))
            .execute(&mut *transaction)
            .await
            .map_err(storage)?;
    }
    transaction.commit().await.map_err(storage)
}

/// Stores vectors that were pending, with an event for each; the memory says then which model has it. A memory that was
/// changed since it was read has another text, and gets its vector another time.
pub async fn put_codes(
    store: &SqliteStore,
    model: &str,
    codes: &[(MemoryId, i64, Code)],
    now: Timestamp,
) -> Result<usize, MemoryError> {
    let mut transaction = store.database.begin().await?;
    let mut count = 0;
    for (id, version, code) in codes {
        let marked = sqlx::query(
            "UPDATE memories SET record = json_set(record, '$.embedding_model', ?) \
             WHERE id = ? AND version = ? AND deleted_at IS NULL RETURNING key, tenant, record",
        )
        .bind(model)
        .bind(id.as_bytes().as_slice())
        .bind(version)
        .fetch_optional(&mut *transaction)
        .await
        .map_err(storage)?;
        let Some(marked) = marked else { continue };
        let vector = StoredVector {
            model: model.into(),
            code: code.clone(),
        };
        let tenant: &str = marked.try_get("tenant").map_err(storage)?;
        let writer = system(tenant, now)?;
        let Stored { key, memory } = stored(&marked)?;
        put_vector(&mut transaction, key, Some(&vector)).await?;
        let mut ledger = SqliteLedger {
            connection: &mut transaction,
            writer: &writer,
        };
        ledger.event(key, &memory, Kind::Embedded).await?;
        count += 1;
    }
    transaction.commit().await.map_err(storage)?;
    Ok(count)
}

/// Deletes what has expired, as a write of the system's own; the number of memories, at most `limit`.
pub async fn reap(store: &SqliteStore, now: Timestamp, limit: usize) -> Result<usize, MemoryError> {
    // Mostly there is nothing, and then nobody has to wait for the writer.
    if !store.read(move |connection| read::any_expired(connection, now)).await? {
        return Ok(0);
    }
    let mut transaction = store.database.begin().await?;
    let rows = sqlx::query(
        "SELECT key, tenant, record FROM memories WHERE expires_at <= ? AND deleted_at IS NULL ORDER BY expires_at LIMIT ?",
    )
    .bind(now.micros())
    .bind(read::limit(limit))
    .fetch_all(&mut *transaction)
    .await
    .map_err(storage)?;
    for row in &rows {
        let Stored { key, memory } = stored(row)?;
        let tenant: &str = row.try_get("tenant").map_err(storage)?;
        let writer = system(tenant, now)?;
        let mut ledger = SqliteLedger {
            connection: &mut transaction,
            writer: &writer,
        };
        ledger::expire(&mut ledger, key, memory).await?;
    }
    transaction.commit().await.map_err(storage)?;
    Ok(rows.len())
}
