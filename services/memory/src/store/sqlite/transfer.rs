//! Export and import.

use std::collections::HashMap;

use aeterna_storage::rusqlite::types::Value;
use aeterna_storage::rusqlite::{Connection, params, params_from_iter};
use aeterna_types::{MemoryId, RequestId};

use super::filter::Sql;
use super::read::{self, get, limit, rows, scopes_json, stored, text};
use super::{failed, parsed};
use crate::domain::{Key, Writer};
use crate::error::MemoryError;
use crate::store::ledger::versions_fit;
use crate::store::{ExportPage, Exported, Progress, StoredVector};

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
    versions_fit(*id, bytes, limit)
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
