//! Reads of the past, from the history.

use aeterna_types::{MemoryId, TenantId, Timestamp};
use sqlx::{PgConnection, Postgres, QueryBuilder};

use super::read::{FILTERED, key, limit, rows, scope_numbers};
use super::{filter, record, storage};
use crate::domain::{Memory, ScopeKey};
use crate::error::MemoryError;
use crate::filter::Filter;
use crate::store::{AsOf, Earlier};

/// Begins a query with memories as they were at a time, `m`, in the place of the table of memories; `now` is what they are.
pub(super) fn begin(select: &str, at: Timestamp) -> QueryBuilder<Postgres> {
    let mut query = QueryBuilder::new(select);
    query
        .push(
            "(SELECT m.key, m.id, m.scope, m.conversation, m.sequence, h.record, h.version, m.record AS now, \
             (h.record #>> '{body,expires_at}')::bigint AS expires_at, (h.record ->> 'deleted_at')::bigint AS deleted_at \
             FROM memories m JOIN history h ON h.memory = m.id \
             WHERE h.version = (SELECT max(p.version) FROM history p WHERE p.memory = m.id AND p.changed_at <= ",
        )
        .push_bind(at.micros())
        .push(")) m");
    query
}

/// Writes the condition that a memory was true at a time.
pub(super) fn true_at(query: &mut QueryBuilder<Postgres>, at: Timestamp) {
    query.push(" AND coalesce((m.record #>> '{body,valid_at}')::bigint <= ");
    query.push_bind(at.micros());
    query.push(", true) AND coalesce((m.record #>> '{body,invalid_at}')::bigint > ");
    query.push_bind(at.micros()).push(", true)");
}

pub async fn memory(
    connection: &mut PgConnection,
    tenant: &TenantId,
    id: MemoryId,
    at: Timestamp,
) -> Result<Option<Memory>, MemoryError> {
    let row = sqlx::query(
        "SELECT record::text FROM history WHERE memory = $1 AND tenant = $2 AND changed_at <= $3 \
         ORDER BY version DESC LIMIT 1",
    )
    .bind(id.as_bytes().as_slice())
    .bind(tenant.as_str())
    .bind(at.micros())
    .fetch_optional(connection)
    .await
    .map_err(storage)?;
    row.as_ref().map(|row| record(row, "record", "version")).transpose()
}

pub async fn as_of(
    connection: &mut PgConnection,
    scopes: &[ScopeKey],
    filter: Option<&Filter>,
    at: Timestamp,
    most: usize,
) -> Result<AsOf, MemoryError> {
    let shown = |query: &mut QueryBuilder<Postgres>| {
        query.push(" WHERE m.scope = ANY(").push_bind(scope_numbers(scopes));
        query.push(") AND m.deleted_at IS NULL AND coalesce(m.expires_at > ");
        query.push_bind(at.micros()).push(", true)");
        true_at(query, at);
        query.push(" AND ");
        filter::push(query, filter);
    };
    let mut query = QueryBuilder::new(format!("SELECT m.key FROM {FILTERED}"));
    shown(&mut query);
    query
        .push(" AND (m.record ->> 'updated_at')::bigint <= ")
        .push_bind(at.micros());
    let unchanged = rows(connection, &mut query, key).await?;
    let mut query = begin("SELECT m.key, m.record::text, m.now::text FROM ", at);
    query.push(" JOIN scopes s ON s.key = m.scope");
    shown(&mut query);
    query
        .push(" AND (m.now ->> 'updated_at')::bigint > ")
        .push_bind(at.micros());
    query
        .push(" ORDER BY (m.now ->> 'updated_at')::bigint DESC LIMIT ")
        .push_bind(limit(most));
    let changed = rows(connection, &mut query, |row| {
        let (memory, now): (Memory, Memory) = (record(row, "record", "version")?, record(row, "now", "memory")?);
        let reworded = memory.body.dense_text() != now.body.dense_text();
        Ok(Earlier {
            key: key(row)?,
            memory,
            reworded,
        })
    })
    .await?;
    Ok(AsOf { unchanged, changed })
}
