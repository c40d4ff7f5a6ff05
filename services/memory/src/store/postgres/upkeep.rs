//! What the service does by itself: vectors that were pending, what has expired, what a model before has left.

use aeterna_storage::Session;
use aeterna_types::{MemoryId, Timestamp};
use sqlx::{PgConnection, Row as _};

use super::write::{Places, PostgresLedger, newer, put_vector};
use super::{keyed, storage};
use crate::domain::Kind;
use crate::error::MemoryError;
use crate::store::StoredVector;
use crate::store::code::Code;
use crate::store::ledger::{self, Ledger as _, system};

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
    codes: &[(MemoryId, i64, Code)],
    now: Timestamp,
) -> Result<usize, MemoryError> {
    let mut count = 0;
    for (id, version, code) in codes {
        let marked = sqlx::query(
            "UPDATE memories SET record = jsonb_set(record, '{embedding_model}', to_jsonb($1::text)) \
             WHERE id = $2 AND version = $3 AND deleted_at IS NULL RETURNING key, tenant, record::text",
        )
        .bind(model)
        .bind(id.as_bytes().as_slice())
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
        let (key, memory) = keyed(&marked)?;
        put_vector(connection, tenant, key, &vector).await?;
        let writer = system(tenant, now)?;
        let mut ledger = PostgresLedger::new(connection, &writer, places);
        ledger.event(key, &memory, Kind::Embedded).await?;
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
        concat!(
            "SELECT key, tenant, record::text, ",
            newer!(),
            " FROM memories WHERE expires_at <= $1 AND deleted_at IS NULL ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED"
        ),
    )
    .bind(now.micros())
    .bind(super::read::limit(limit))
    .fetch_all(&mut **session)
    .await
    .map_err(storage)?;
    let count = rows.len();
    for row in rows {
        let writer = system(row.try_get("tenant").map_err(storage)?, now)?;
        let mut ledger = PostgresLedger::new(session, &writer, places);
        if let Some((key, memory)) = ledger.locked(Some(row)).await? {
            ledger::expire(&mut ledger, key, memory).await?;
        }
    }
    Ok(count)
}

/// Makes places in the outbox go on after those that are there, when the database was moved to a cluster that is younger than the
/// one it comes from.
pub async fn keep_ascending(connection: &mut PgConnection) -> Result<(), MemoryError> {
    // No place of this cluster is as large as that of the next transaction. (The horizon is of no use: what committed after a
    // transaction that is still under way is above it.) As far above as in a new timeline: what was undone must not come again.
    let query = "UPDATE meta SET value = (value::bigint + behind.by + (1::bigint << 40))::text FROM (SELECT max(sequence) - (SELECT value::bigint \
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
