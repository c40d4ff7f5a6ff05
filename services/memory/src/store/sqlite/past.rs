//! Reads of the past, from the history.

use aeterna_storage::rusqlite::types::Value;
use aeterna_storage::rusqlite::{Connection, params, params_from_iter};
use aeterna_types::{MemoryId, TenantId, Timestamp};

use super::filter::Sql;
use super::parsed;
use super::read::{get, limit, rows, scopes_json, stored, text};
use crate::domain::{Key, Memory, ScopeKey};
use crate::error::MemoryError;
use crate::filter::Filter;
use crate::store::{AsOf, Earlier, Listing, Stored};

/// Memories as they were at a time, which is bound once, in the place of the table of memories; `now` is what they are.
const PAST: &str = "(SELECT m.key, m.id, m.tenant, m.scope, m.conversation, m.sequence, h.record, h.version, \
                    m.record AS now, \
                    json_extract(h.record, '$.body.expires_at') AS expires_at, \
                    json_extract(h.record, '$.deleted_at') AS deleted_at FROM memories m JOIN history h ON h.memory = m.id \
                    WHERE h.version = (SELECT max(p.version) FROM history p WHERE p.memory = m.id AND p.changed_at <= ?))";

pub fn memory(
    connection: &Connection,
    tenant: &TenantId,
    id: MemoryId,
    at: Timestamp,
) -> Result<Option<Memory>, MemoryError> {
    let query = "SELECT h.record FROM history h JOIN memories m ON m.id = h.memory \
                 WHERE h.memory = ? AND m.tenant = ? AND h.changed_at <= ? ORDER BY h.version DESC LIMIT 1";
    let bound = params![id.as_bytes().as_slice(), tenant.as_str(), at.micros()];
    let found = rows(connection, query, bound, |row| parsed(text(row, 0)?, "version"))?;
    Ok(found.into_iter().next())
}

pub fn list(connection: &Connection, listing: &Listing, at: Timestamp) -> Result<Vec<Stored>, MemoryError> {
    let filter = Sql::of(listing.filter.as_ref());
    let mut query = format!(
        "SELECT m.key, m.record FROM {PAST} m JOIN scopes s ON s.key = m.scope \
         WHERE m.scope IN (SELECT value FROM json_each(?)) AND {}",
        filter.text
    );
    let mut bound = vec![Value::from(at.micros()), scopes_json(&listing.scopes).into()];
    bound.extend(filter.binds());
    if let Some(before) = listing.before {
        query.push_str(" AND m.id < ?");
        bound.push(before.as_bytes().to_vec().into());
    }
    if !listing.show_deleted {
        query.push_str(" AND m.deleted_at IS NULL AND coalesce(m.expires_at > ?, 1)");
        bound.push(at.micros().into());
    }
    query.push_str(" ORDER BY m.id DESC LIMIT ?");
    bound.push(limit(listing.limit).into());
    rows(connection, &query, params_from_iter(bound), stored)
}

pub fn as_of(
    connection: &Connection,
    scopes: &[ScopeKey],
    filter: Option<&Filter>,
    at: Timestamp,
    most: usize,
) -> Result<AsOf, MemoryError> {
    let filter = Sql::of(filter);
    let (scopes, at) = (Value::from(scopes_json(scopes)), Value::from(at.micros()));
    let shown = format!(
        "m.scope IN (SELECT value FROM json_each(?)) AND m.deleted_at IS NULL AND coalesce(m.expires_at > ?, 1) \
         AND coalesce(json_extract(m.record, '$.body.valid_at') <= ?, 1) \
         AND coalesce(json_extract(m.record, '$.body.invalid_at') > ?, 1) AND {}",
        filter.text
    );
    let condition = || {
        [scopes.clone(), at.clone(), at.clone(), at.clone()]
            .into_iter()
            .chain(filter.binds())
    };
    let query = format!(
        "SELECT m.key FROM memories m JOIN scopes s ON s.key = m.scope \
         WHERE {shown} AND json_extract(m.record, '$.updated_at') <= ?"
    );
    let bound = condition().chain([at.clone()]);
    let unchanged = rows(connection, &query, params_from_iter(bound), |row| get(row, 0).map(Key))?;
    let query = format!(
        "SELECT m.key, m.record, m.now FROM {PAST} m JOIN scopes s ON s.key = m.scope \
         WHERE {shown} AND json_extract(m.now, '$.updated_at') > ? ORDER BY json_extract(m.now, '$.updated_at') DESC LIMIT ?"
    );
    let bound = [at.clone()]
        .into_iter()
        .chain(condition())
        .chain([at.clone(), limit(most).into()]);
    let changed = rows(connection, &query, params_from_iter(bound), |row| {
        let (memory, now): (Memory, Memory) = (parsed(text(row, 1)?, "version")?, parsed(text(row, 2)?, "memory")?);
        let reworded = memory.body.dense_text() != now.body.dense_text();
        Ok(Earlier {
            key: Key(get(row, 0)?),
            memory,
            reworded,
        })
    })?;
    Ok(AsOf { unchanged, changed })
}
