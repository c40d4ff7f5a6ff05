//! What a search reads: where it looks, what it scores.

use std::time::Instant;

use aeterna_storage::rusqlite::types::Value;
use aeterna_storage::rusqlite::{Connection, params, params_from_iter};
use aeterna_types::{MemoryId, TenantId, Timestamp};

use super::failed;
use super::filter::Sql;
use super::lexical::{self, Cache};
use super::read::{self, FILTERED, get, keys_json, rows, scopes_json};
use super::resident::Resident;
use crate::domain::{Key, ScopeKey};
use crate::error::MemoryError;
use crate::filter::Filter;
use crate::store::{Scored, Scoring, Seen, Sight};

pub fn seen(connection: &Connection, sight: &Sight) -> Result<Seen, MemoryError> {
    let scopes = read::visible(connection, &sight.tenant, &sight.view, &sight.layers)?;
    let mut hidden = match sight.now {
        Some(now) => expired(connection, &scopes, now)?,
        None => Vec::new(),
    };
    hidden.extend(numbered(connection, &sight.tenant, &sight.exclude)?);
    let matching = sight
        .filter
        .as_ref()
        .map(|filter| matching(connection, &scopes, filter));
    Ok(Seen {
        matching: matching.transpose()?,
        scopes,
        hidden,
    })
}

/// The numbers of memories.
fn numbered(connection: &Connection, tenant: &TenantId, ids: &[MemoryId]) -> Result<Vec<Key>, MemoryError> {
    let mut keys = Vec::with_capacity(ids.len());
    for id in ids {
        let text = "SELECT key FROM memories WHERE id = ? AND tenant = ?";
        let bound = params![id.as_bytes().as_slice(), tenant.as_str()];
        keys.extend(rows(connection, text, bound, |row| get(row, 0).map(Key))?);
    }
    Ok(keys)
}

fn matching(connection: &Connection, scopes: &[ScopeKey], filter: &Filter) -> Result<Vec<Key>, MemoryError> {
    let filter = Sql::of(Some(filter));
    let text = format!(
        "SELECT m.key FROM {FILTERED} \
         WHERE m.scope IN (SELECT value FROM json_each(?)) AND m.deleted_at IS NULL AND {}",
        filter.text
    );
    let bound = std::iter::once(Value::from(scopes_json(scopes))).chain(filter.binds());
    rows(connection, &text, params_from_iter(bound), |row| get(row, 0).map(Key))
}

fn expired(connection: &Connection, scopes: &[ScopeKey], now: Timestamp) -> Result<Vec<Key>, MemoryError> {
    // Without statistics SQLite would rather read the whole scope.
    let text = "SELECT key FROM memories INDEXED BY memories_by_expiry WHERE expires_at <= ? AND deleted_at IS NULL \
                AND scope IN (SELECT value FROM json_each(?))";
    let bound = params![now.micros(), scopes_json(scopes)];
    rows(connection, text, bound, |row| get(row, 0).map(Key))
}

/// Scores what is to be scored, from memory what is there.
pub fn scored(
    connection: &Connection,
    (cache, resident): (&Cache, &Resident),
    scoring: &Scoring,
) -> Result<Scored, MemoryError> {
    let follows = resident.follow(connection);
    let began = Instant::now();
    let mut dense = match &scoring.dense {
        Some(rescoring) => resident.cosines(connection, rescoring, follows),
        None => Ok(Vec::new()),
    };
    let dense_ms = milliseconds(began);
    let began = Instant::now();
    let lexical = match &scoring.lexical {
        Some(search) => match follows.then(|| resident.lexical(&scoring.tenant, search)).flatten() {
            Some(found) => found,
            None => lexical::search(connection, cache, &scoring.tenant, search)?,
        },
        None => Vec::new(),
    };
    let lexical_ms = milliseconds(began);
    if let (Ok(cosines), Some(rescoring)) = (&mut dense, scoring.also_dense(&lexical)) {
        match resident.cosines(connection, &rescoring, follows) {
            Ok(more) => cosines.extend(more),
            Err(error) => dense = Err(error),
        }
    }
    let neighbours = match scoring.turns(&lexical, dense.as_deref().unwrap_or_default()) {
        Some(turns) => neighbours(connection, &turns)?,
        None => Vec::new(),
    };
    Ok(Scored {
        lexical,
        dense,
        neighbours,
        lexical_ms,
        dense_ms,
    })
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn neighbours(connection: &Connection, keys: &[Key]) -> Result<Vec<(Key, Key)>, MemoryError> {
    // Many stores have no conversations, which the index tells at once.
    let mut statement = connection
        .prepare_cached("SELECT 1 FROM memories INDEXED BY memories_by_turn WHERE conversation IS NOT NULL LIMIT 1")
        .map_err(failed)?;
    if !statement.exists([]).map_err(failed)? {
        return Ok(Vec::new());
    }
    let text = "SELECT a.key, b.key FROM memories a JOIN memories b \
                ON b.scope = a.scope AND b.conversation = a.conversation AND b.sequence IN (a.sequence - 1, a.sequence + 1) \
                WHERE a.key IN (SELECT value FROM json_each(?)) AND b.deleted_at IS NULL";
    rows(connection, text, [keys_json(keys)], |row| {
        Ok((Key(get(row, 0)?), Key(get(row, 1)?)))
    })
}
