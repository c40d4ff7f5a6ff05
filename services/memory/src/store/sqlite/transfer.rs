//! Export and import.

use std::collections::HashMap;

use aeterna_storage::rusqlite::types::Value;
use aeterna_storage::rusqlite::{Connection, params, params_from_iter};
use aeterna_types::{MemoryId, RequestId};
use sqlx::{Row as _, SqliteConnection};

use super::filter::Sql;
use super::read::{self, get, limit, rows, scopes_json, stored, text};
use super::write::{self, Place, Rooms};
use super::{SqliteStore, encode, failed, parsed, storage};
use crate::domain::{Key, Kind, Outcome, Sequence, Version, Writer};
use crate::error::MemoryError;
use crate::store::{ExportPage, Exported, Imported, Imports, Progress, StoredVector};

pub fn export(connection: &Connection, page: &ExportPage) -> Result<Vec<Exported>, MemoryError> {
    let filter = Sql::of(page.filter.as_ref());
    let mut query = format!(
        "SELECT m.key, m.record FROM memories m JOIN scopes s ON s.key = m.scope \
         WHERE m.key > ? AND m.scope IN (SELECT value FROM json_each(?)) AND {}",
        filter.text
    );
    let mut bound = vec![Value::from(page.after.0), scopes_json(&page.scopes).into()];
    bound.extend(filter.binds());
    if !page.history {
        query.push_str(" AND m.deleted_at IS NULL AND coalesce(m.expires_at > ?, 1)");
        bound.push(page.now.micros().into());
    }
    query.push_str(" ORDER BY m.key LIMIT ?");
    bound.push(limit(page.limit).into());
    let found = rows(connection, &query, params_from_iter(bound), stored)?;
    let mut vectors: HashMap<Key, Vec<StoredVector>> = HashMap::new();
    if page.vectors {
        let keys: Vec<Key> = found.iter().map(|one| one.key).collect();
        for model in read::models(connection)? {
            read::codes(connection, &model, &keys, |key, code| {
                vectors.entry(key).or_default().push(StoredVector {
                    model: model.clone(),
                    code: code.to_owned(),
                });
            })?;
        }
    }
    let mut exported = Vec::with_capacity(found.len());
    for one in found {
        let versions = match page.history {
            true => {
                fits(connection, &one.memory.id, page.most)?;
                let query =
                    "SELECT record, kind, changed_at, changed_by FROM history WHERE memory = ? ORDER BY version";
                rows(connection, query, [one.memory.id.as_bytes().as_slice()], read::version)?
            }
            false => Vec::new(),
        };
        exported.push(Exported {
            key: one.key,
            memory: one.memory,
            versions,
            vectors: vectors.remove(&one.key).unwrap_or_default(),
        });
    }
    Ok(exported)
}

/// Refuses a memory whose versions would not fit a message, before they are read.
fn fits(connection: &Connection, id: &MemoryId, limit: usize) -> Result<(), MemoryError> {
    let query = "SELECT coalesce(sum(length(CAST(record AS BLOB))), 0) FROM history WHERE memory = ?";
    let bytes: i64 = connection
        .query_row(query, [id.as_bytes().as_slice()], |row| row.get(0))
        .map_err(failed)?;
    // A record has names that a message does not have.
    if usize::try_from(bytes).is_ok_and(|bytes| bytes / 2 <= limit) {
        return Ok(());
    }
    Err(MemoryError::TooManyVersions {
        id: id.to_string(),
        bytes,
        limit,
    })
}

pub fn progress(connection: &Connection, writer: &Writer, id: &RequestId) -> Result<Option<Progress>, MemoryError> {
    let query = "SELECT items, digest, refused FROM imports WHERE tenant = ? AND subject = ? AND id = ?";
    let bound = params![writer.tenant.as_str(), writer.subject, id.as_str()];
    let found = rows(connection, query, bound, |row| {
        Ok(Progress {
            items: get(row, 0)?,
            digest: get(row, 1)?,
            refused: parsed(text(row, 2)?, "list of refusals")?,
        })
    })?;
    Ok(found.into_iter().next())
}

pub async fn import(
    store: &SqliteStore,
    writer: &Writer,
    id: &RequestId,
    items: Vec<(i64, Imported)>,
    progress: &mut Progress,
) -> Result<Imports, MemoryError> {
    let mut transaction = store.database.begin().await?;
    let mut results = Vec::with_capacity(items.len());
    let mut rooms = Rooms::default();
    for (place, item) in items {
        let result = write::verdict(import_one(&mut transaction, writer, &mut rooms, item).await)?;
        match &result {
            Ok(_) => progress.refused.remove(&place),
            Err(_) => progress.refused.insert(place),
        };
        results.push(result);
    }
    let query =
        "INSERT OR REPLACE INTO imports (tenant, subject, id, items, digest, at, refused) VALUES (?, ?, ?, ?, ?, ?, ?)";
    sqlx::query(query)
        .bind(writer.tenant.as_str())
        .bind(&writer.subject)
        .bind(id.as_str())
        .bind(progress.items)
        .bind(progress.digest.as_slice())
        .bind(writer.now.micros())
        .bind(encode(&progress.refused)?)
        .execute(&mut *transaction)
        .await
        .map_err(storage)?;
    transaction.commit().await.map_err(storage)?;
    Ok(results)
}

async fn import_one(
    connection: &mut SqliteConnection,
    writer: &Writer,
    rooms: &mut Rooms,
    item: Imported,
) -> Result<(Outcome, Sequence), MemoryError> {
    let (mut memory, mut versions) = (item.memory, item.versions);
    let owner = match item.named {
        true => owner(connection, memory.id).await?,
        false => None,
    };
    match owner {
        Some(tenant) if tenant == writer.tenant.as_str() => return Ok((Outcome::Merged, Sequence::default())),
        // A memory of another tenant has the id, of which nothing may be told.
        Some(_) => memory.id = MemoryId::new(writer.now),
        None if !item.named => memory.id = MemoryId::new(writer.now),
        None => {}
    }
    let place = match memory.deleted_at {
        Some(_) => Place::Free(write::scope_key(connection, writer, &memory.scope).await?),
        None => write::place(connection, writer, &memory.scope, &memory.body).await?,
    };
    let scope = match place {
        Place::Free(scope) => scope,
        Place::Taken(key, existing) => {
            let merged = write::merge(connection, writer, key, *existing, memory.body).await?;
            return Ok((Outcome::Merged, merged.sequence));
        }
    };
    if let Some((most, policy)) = item.most.as_ref().filter(|_| memory.deleted_at.is_none()) {
        rooms.take(connection, scope, *most, policy).await?;
    }
    let vector = item.vectors.first();
    memory.embedding_model = vector.map(|vector| vector.model.clone()).unwrap_or_default();
    let key = write::insert(connection, writer, scope, &memory).await?;
    write::put_vector(connection, key, vector).await?;
    let kind = if memory.deleted_at.is_some() {
        Kind::Deleted
    } else {
        Kind::Added
    };
    if versions.is_empty() {
        versions.push(Version {
            memory: memory.clone(),
            kind,
            changed_at: memory.updated_at,
            changed_by: writer.subject.clone(),
        });
    }
    for mut version in versions {
        version.memory.id = memory.id;
        version.memory.scope = memory.scope.clone();
        write::history(connection, &version).await?;
    }
    let sequence = write::event(connection, writer, key, &memory, kind).await?;
    Ok((Outcome::Created, sequence))
}

/// The tenant whose memory has an id.
async fn owner(connection: &mut SqliteConnection, id: MemoryId) -> Result<Option<String>, MemoryError> {
    let row = sqlx::query("SELECT tenant FROM memories WHERE id = ?")
        .bind(id.as_bytes().as_slice())
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    row.map(|row| row.try_get("tenant").map_err(storage)).transpose()
}
