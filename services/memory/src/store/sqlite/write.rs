//! Writes: row, history, outbox event, lexical text, vector and request id in one transaction.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use aeterna_types::{Layer, MemoryId, Scope, Timestamp};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::{AssertSqlSafe, Row as _, SqliteConnection};

use super::{SqliteStore, damaged, encode, lexical, parsed, read, storage, stored};
use crate::domain::{
    Body, Idempotency, Key, Kind, MAX_TAGS, Memory, Outcome, ScopeKey, Sequence, Version, Writer, Written,
};
use crate::error::MemoryError;
use crate::store::code::Code;
use crate::store::{Addition, Change, ChangeItem, Stored, StoredVector};

pub async fn add(
    store: &SqliteStore,
    writer: &Writer,
    items: Vec<Addition>,
) -> Result<Vec<Result<Written, MemoryError>>, MemoryError> {
    let mut transaction = store.database.begin().await?;
    let (mut results, mut rooms) = (Vec::with_capacity(items.len()), Rooms::default());
    for item in items {
        results.push(verdict(add_one(&mut transaction, writer, &mut rooms, item).await)?);
    }
    transaction.commit().await.map_err(storage)?;
    Ok(results)
}

/// What becomes of one item of a batch: a refusal stays with it, and when the store itself failed nothing of the batch is
/// kept.
pub fn verdict<T>(result: Result<T, MemoryError>) -> Result<Result<T, MemoryError>, MemoryError> {
    match result {
        Err(error @ MemoryError::Other(_)) => Err(error),
        result => Ok(result),
    }
}

async fn add_one(
    connection: &mut SqliteConnection,
    writer: &Writer,
    rooms: &mut Rooms,
    item: Addition,
) -> Result<Written, MemoryError> {
    if let Some(idempotency) = &item.idempotency
        && let Some(earlier) = replay(connection, writer, idempotency).await?
    {
        return Ok(earlier);
    }
    let written = match place(connection, writer, &item.scope, &item.body).await? {
        Place::Taken(key, existing) => merge(connection, writer, key, *existing, item.body).await?,
        Place::Free(scope) => {
            if let Some((most, policy)) = &item.most {
                rooms.take(connection, scope, *most, policy).await?;
            }
            let memory = Memory {
                id: MemoryId::new(writer.now),
                scope: item.scope,
                body: item.body,
                created_at: writer.now,
                updated_at: writer.now,
                deleted_at: None,
                version: 1,
                embedding_model: item.vector.as_ref().map(|v| v.model.clone()).unwrap_or_default(),
            };
            let key = insert(connection, writer, scope, &memory).await?;
            put_vector(connection, key, item.vector.as_ref()).await?;
            let sequence = record(connection, writer, key, &memory, Kind::Added).await?;
            Written {
                memory,
                outcome: Outcome::Created,
                sequence,
            }
        }
    };
    remember(connection, writer, item.idempotency.as_ref(), &written).await?;
    Ok(written)
}

/// Where a memory is to be written.
pub enum Place {
    /// In this scope, where nothing says the same.
    Free(ScopeKey),
    /// There, a memory says the same.
    Taken(Key, Box<Memory>),
}

/// Where a body belongs in a scope.
pub async fn place(
    connection: &mut SqliteConnection,
    writer: &Writer,
    scope: &Scope,
    body: &Body,
) -> Result<Place, MemoryError> {
    let scope = scope_key(connection, writer, scope).await?;
    let there = sqlx::query("SELECT key, record FROM memories WHERE scope = ? AND identity = ? AND deleted_at IS NULL")
        .bind(scope.0)
        .bind(body.identity().as_slice())
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    Ok(match there.as_ref().map(stored).transpose()? {
        Some(existing) => Place::Taken(existing.key, Box::new(existing.memory)),
        None => Place::Free(scope),
    })
}

/// How many memories scopes hold, counted once a transaction.
#[derive(Debug, Default)]
pub struct Rooms(HashMap<ScopeKey, i64>);

impl Rooms {
    /// Takes the place of a new memory, which is written next; refuses one more than the scope may hold.
    pub async fn take(
        &mut self,
        connection: &mut SqliteConnection,
        scope: ScopeKey,
        most: i64,
        policy: &str,
    ) -> Result<(), MemoryError> {
        let there = match self.0.entry(scope) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let query = "SELECT count(*) FROM memories WHERE scope = ? AND deleted_at IS NULL";
                let count = sqlx::query_scalar(query).bind(scope.0).fetch_one(connection).await;
                unknown.insert(count.map_err(storage)?)
            }
        };
        if *there < most {
            *there += 1;
            return Ok(());
        }
        Err(MemoryError::Forbidden {
            policy: policy.to_owned(),
            why: format!("the scope holds {there} memories, and `max_memories` is {most}; delete some first"),
        })
    }
}

/// Unites the tags, as far as a memory takes them, and keeps the higher importance.
pub async fn merge(
    connection: &mut SqliteConnection,
    writer: &Writer,
    key: Key,
    mut memory: Memory,
    body: Body,
) -> Result<Written, MemoryError> {
    let mut tags = memory.body.tags.clone();
    let new = body.tags.into_iter().filter(|tag| !memory.body.tags.contains(tag));
    tags.extend(new.take(MAX_TAGS.saturating_sub(memory.body.tags.len())));
    tags.sort();
    let importance = memory.body.importance.max(body.importance);
    // What is said again lives as long as the longer-lived of the two; without an expiry that is for good.
    let expires_at = memory
        .body
        .expires_at
        .zip(body.expires_at)
        .map(|(old, new)| old.max(new));
    let changed =
        tags != memory.body.tags || importance > memory.body.importance || expires_at != memory.body.expires_at;
    if changed {
        memory.body.tags = tags;
        memory.body.importance = importance;
        memory.body.expires_at = expires_at;
        memory.version += 1;
        memory.updated_at = writer.now;
        update(connection, writer, key, &memory).await?;
        let sequence = record(connection, writer, key, &memory, Kind::Updated).await?;
        return Ok(Written {
            memory,
            outcome: Outcome::Merged,
            sequence,
        });
    }
    Ok(Written {
        memory,
        outcome: Outcome::Merged,
        sequence: Sequence::default(),
    })
}

pub async fn change(
    store: &SqliteStore,
    writer: &Writer,
    items: Vec<ChangeItem>,
) -> Result<Vec<Result<Written, MemoryError>>, MemoryError> {
    let mut transaction = store.database.begin().await?;
    let mut results = Vec::with_capacity(items.len());
    for item in items {
        results.push(verdict(change_one(&mut transaction, writer, item).await)?);
    }
    transaction.commit().await.map_err(storage)?;
    Ok(results)
}

async fn change_one(
    connection: &mut SqliteConnection,
    writer: &Writer,
    item: ChangeItem,
) -> Result<Written, MemoryError> {
    if let Some(idempotency) = &item.idempotency
        && let Some(earlier) = replay(connection, writer, idempotency).await?
    {
        return Ok(earlier);
    }
    let row = sqlx::query("SELECT key, record FROM memories WHERE id = ? AND tenant = ?")
        .bind(item.id.as_bytes().as_slice())
        .bind(writer.tenant.as_str())
        .fetch_optional(&mut *connection)
        .await
        .map_err(storage)?;
    let existing = row
        .as_ref()
        .map(stored)
        .transpose()?
        .ok_or_else(|| MemoryError::NotFound(item.id.to_string()))?;
    let (key, mut memory) = (existing.key, existing.memory);
    if item.etag.is_some_and(|etag| etag != memory.etag()) {
        return Err(MemoryError::EtagMismatch);
    }
    if memory.deleted_at.is_some() && !matches!(item.change, Change::Purge) {
        return Err(MemoryError::Deleted);
    }
    memory.version += 1;
    memory.updated_at = writer.now;
    let sequence = match item.change {
        Change::Purge => {
            let sequence = event(connection, writer, key, &memory, Kind::Purged).await?;
            purge(connection, writer, key, &memory).await?;
            memory = memory.redacted();
            sequence
        }
        Change::Delete => {
            memory.deleted_at = Some(writer.now);
            update(connection, writer, key, &memory).await?;
            record(connection, writer, key, &memory, Kind::Deleted).await?
        }
        Change::Replace { body, vector, reindex } => {
            memory.body = *body;
            if reindex {
                memory.embedding_model = vector.as_ref().map(|v| v.model.clone()).unwrap_or_default();
            }
            // First, since it may refuse: then the vector stays as it is.
            update(connection, writer, key, &memory).await?;
            if reindex {
                drop_vectors(connection, key).await?;
                put_vector(connection, key, vector.as_ref()).await?;
            }
            record(connection, writer, key, &memory, Kind::Updated).await?
        }
    };
    let written = Written {
        memory,
        outcome: Outcome::Merged,
        sequence,
    };
    remember(connection, writer, item.idempotency.as_ref(), &written).await?;
    Ok(written)
}

/// Removes a memory with its history, its vectors, its terms, and the answers that earlier writes of it were given.
async fn purge(
    connection: &mut SqliteConnection,
    writer: &Writer,
    key: Key,
    memory: &Memory,
) -> Result<(), MemoryError> {
    let tenant = lexical::tenant(connection, &writer.tenant).await?;
    lexical::remove(connection, tenant, key).await?;
    sqlx::query("DELETE FROM memories WHERE key = ?")
        .bind(key.0)
        .execute(&mut *connection)
        .await
        .map_err(storage)?;
    sqlx::query("DELETE FROM history WHERE memory = ?")
        .bind(memory.id.as_bytes().as_slice())
        .execute(&mut *connection)
        .await
        .map_err(storage)?;
    sqlx::query("DELETE FROM requests WHERE tenant = ? AND json_extract(answer, '$.memory.id') = ?")
        .bind(writer.tenant.as_str())
        .bind(memory.id.to_string())
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(())
}

/// What an earlier write with this request id answered.
pub async fn replay<T: DeserializeOwned>(
    connection: &mut SqliteConnection,
    writer: &Writer,
    idempotency: &Idempotency,
) -> Result<Option<T>, MemoryError> {
    let row = sqlx::query(REPLAY)
        .bind(writer.tenant.as_str())
        .bind(&writer.subject)
        .bind(idempotency.request_id.as_str())
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    let Some(row) = row else { return Ok(None) };
    let (digest, answer): (&[u8], &str) = (
        row.try_get("digest").map_err(storage)?,
        row.try_get("answer").map_err(storage)?,
    );
    answered(idempotency, digest, answer).map(Some)
}

/// The answer that is kept, when it was given to the same call.
pub fn answered<T: DeserializeOwned>(idempotency: &Idempotency, digest: &[u8], answer: &str) -> Result<T, MemoryError> {
    if digest != idempotency.digest {
        return Err(MemoryError::RequestIdReused);
    }
    parsed(answer, "answer")
}

/// Finds the answer to a request id.
pub const REPLAY: &str = "SELECT digest, answer FROM requests WHERE tenant = ? AND subject = ? AND request_id = ?";

/// Keeps the answer to a request id.
pub async fn remember<T: Serialize>(
    connection: &mut SqliteConnection,
    writer: &Writer,
    idempotency: Option<&Idempotency>,
    written: &T,
) -> Result<(), MemoryError> {
    let Some(idempotency) = idempotency else { return Ok(()) };
    sqlx::query("INSERT INTO requests (tenant, subject, request_id, digest, answer, at) VALUES (?, ?, ?, ?, ?, ?)")
        .bind(writer.tenant.as_str())
        .bind(&writer.subject)
        .bind(idempotency.request_id.as_str())
        .bind(idempotency.digest.as_slice())
        .bind(encode(written)?)
        .bind(writer.now.micros())
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(())
}

/// The number of a scope, which is made when it is new.
pub async fn scope_key(
    connection: &mut SqliteConnection,
    writer: &Writer,
    scope: &Scope,
) -> Result<ScopeKey, MemoryError> {
    let path = encode(scope)?;
    let find = "SELECT key FROM scopes WHERE tenant = ? AND path = ?";
    let found: Option<i64> = sqlx::query_scalar(find)
        .bind(writer.tenant.as_str())
        .bind(&path)
        .fetch_optional(&mut *connection)
        .await
        .map_err(storage)?;
    if let Some(key) = found {
        return Ok(ScopeKey(key));
    }
    let mut query = sqlx::query(
        "INSERT INTO scopes (tenant, path, layer, company, org, team, project, user, session, agent) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(writer.tenant.as_str().to_owned())
    .bind(path)
    .bind(scope.layer().map_or(0, Layer::number));
    for layer in Layer::ALL {
        query = query.bind(scope.get(layer).map(str::to_owned));
    }
    Ok(ScopeKey(
        query.execute(connection).await.map_err(storage)?.last_insert_rowid(),
    ))
}

/// Writes a new row, with its terms unless it is deleted.
pub async fn insert(
    connection: &mut SqliteConnection,
    writer: &Writer,
    scope: ScopeKey,
    memory: &Memory,
) -> Result<Key, MemoryError> {
    let source = &memory.body.source;
    let inserted = sqlx::query(
        "INSERT INTO memories (id, tenant, scope, identity, record, conversation, sequence, expires_at, deleted_at, version) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(memory.id.as_bytes().as_slice())
    .bind(writer.tenant.as_str())
    .bind(scope.0)
    .bind(memory.body.identity().as_slice())
    .bind(encode(memory)?)
    .bind((!source.conversation.is_empty()).then_some(source.conversation.as_str()))
    .bind(source.sequence)
    .bind(memory.body.expires_at.map(|t| t.micros()))
    .bind(memory.deleted_at.map(|t| t.micros()))
    .bind(memory.version)
    .execute(&mut *connection)
    .await
    .map_err(storage)?;
    let key = Key(inserted.last_insert_rowid());
    let tenant = lexical::tenant(connection, &writer.tenant).await?;
    if memory.deleted_at.is_none() {
        lexical::put(connection, tenant, key, scope, memory).await?;
    }
    Ok(key)
}

async fn update(
    connection: &mut SqliteConnection,
    writer: &Writer,
    key: Key,
    memory: &Memory,
) -> Result<(), MemoryError> {
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
    .fetch_one(&mut *connection)
    .await
    .map_err(
        |error| match error.as_database_error().is_some_and(|e| e.is_unique_violation()) {
            true => MemoryError::Duplicate,
            false => storage(error),
        },
    )?;
    let scope = ScopeKey(updated.try_get("scope").map_err(storage)?);
    let tenant = lexical::tenant(connection, &writer.tenant).await?;
    lexical::remove(connection, tenant, key).await?;
    if memory.deleted_at.is_none() {
        lexical::put(connection, tenant, key, scope, memory).await?;
    }
    Ok(())
}

/// Stores a vector; the table of its model is made when it is the first one.
pub async fn put_vector(
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
    codes: &[(Key, i64, Code)],
    now: Timestamp,
) -> Result<usize, MemoryError> {
    let mut transaction = store.database.begin().await?;
    let mut stored = 0;
    for (key, version, code) in codes {
        let marked = sqlx::query(
            "UPDATE memories SET record = json_set(record, '$.embedding_model', ?) \
             WHERE key = ? AND version = ? AND deleted_at IS NULL RETURNING key, tenant, record",
        )
        .bind(model)
        .bind(key.0)
        .bind(version)
        .fetch_optional(&mut *transaction)
        .await
        .map_err(storage)?;
        let Some(marked) = marked else { continue };
        let vector = StoredVector {
            model: model.into(),
            code: code.clone(),
        };
        put_vector(&mut transaction, *key, Some(&vector)).await?;
        let tenant: &str = marked.try_get("tenant").map_err(storage)?;
        let system = system(tenant, now)?;
        let memory = super::stored(&marked)?.memory;
        event(&mut transaction, &system, *key, &memory, Kind::Embedded).await?;
        stored += 1;
    }
    transaction.commit().await.map_err(storage)?;
    Ok(stored)
}

/// The service itself, where it writes on its own.
pub fn system(tenant: &str, now: Timestamp) -> Result<Writer, MemoryError> {
    Ok(Writer {
        tenant: tenant.parse().map_err(|_| damaged("tenant"))?,
        subject: "system".into(),
        now,
    })
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
        let Stored { key, mut memory } = stored(row)?;
        let tenant: &str = row.try_get("tenant").map_err(storage)?;
        let writer = system(tenant, now)?;
        memory.deleted_at = Some(now);
        memory.updated_at = now;
        memory.version += 1;
        update(&mut transaction, &writer, key, &memory).await?;
        record(&mut transaction, &writer, key, &memory, Kind::Expired).await?;
    }
    transaction.commit().await.map_err(storage)?;
    Ok(rows.len())
}

/// History and outbox; the outbox row's number orders all changes.
async fn record(
    connection: &mut SqliteConnection,
    writer: &Writer,
    key: Key,
    memory: &Memory,
    kind: Kind,
) -> Result<Sequence, MemoryError> {
    let version = Version {
        memory: memory.clone(),
        kind,
        changed_at: writer.now,
        changed_by: writer.subject.clone(),
    };
    history(connection, &version).await?;
    event(connection, writer, key, memory, kind).await
}

/// One version in the history.
pub async fn history(connection: &mut SqliteConnection, version: &Version) -> Result<(), MemoryError> {
    sqlx::query(
        "INSERT INTO history (memory, version, kind, changed_at, changed_by, record) VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(version.memory.id.as_bytes().as_slice())
    .bind(version.memory.version)
    .bind(version.kind.name())
    .bind(version.changed_at.micros())
    .bind(&version.changed_by)
    .bind(encode(&version.memory)?)
    .execute(connection)
    .await
    .map_err(storage)?;
    Ok(())
}

/// A row of the outbox, with what watchers are told when the memory itself is gone; it is there still.
pub async fn event(
    connection: &mut SqliteConnection,
    writer: &Writer,
    key: Key,
    memory: &Memory,
    kind: Kind,
) -> Result<Sequence, MemoryError> {
    let event = sqlx::query(
        "INSERT INTO outbox (tenant, memory, kind, version, committed_at, id, scope) \
         VALUES (?, ?, ?, ?, ?, ?, (SELECT scope FROM memories WHERE key = ?))",
    )
    .bind(writer.tenant.as_str())
    .bind(key.0)
    .bind(kind.name())
    .bind(memory.version)
    .bind(writer.now.micros())
    .bind(memory.id.as_bytes().as_slice())
    .bind(key.0)
    .execute(connection)
    .await
    .map_err(storage)?;
    Ok(Sequence(event.last_insert_rowid()))
}

/// What stands in the outbox beside memories.
#[derive(Clone, Copy, Debug)]
pub enum Resource<'a> {
    /// A document, by its path.
    Document(&'a str),
    /// A policy, by its name.
    Policy(&'a str),
}

/// A row of the outbox for something else than a memory.
pub async fn resource_event(
    connection: &mut SqliteConnection,
    writer: &Writer,
    scope: Option<ScopeKey>,
    resource: Resource<'_>,
    version: i64,
    kind: Kind,
) -> Result<Sequence, MemoryError> {
    let resource = match resource {
        Resource::Document(path) => format!("document:{path}"),
        Resource::Policy(name) => format!("policy:{name}"),
    };
    let event = sqlx::query(
        "INSERT INTO outbox (tenant, memory, kind, version, committed_at, scope, resource) VALUES (?, 0, ?, ?, ?, ?, ?)",
    )
    .bind(writer.tenant.as_str())
    .bind(kind.name())
    .bind(version)
    .bind(writer.now.micros())
    .bind(scope.map(|scope| scope.0))
    .bind(resource)
    .execute(connection)
    .await
    .map_err(storage)?;
    Ok(Sequence(event.last_insert_rowid()))
}
