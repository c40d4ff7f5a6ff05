//! Export, and how far an import has come.

use std::collections::HashMap;

use aeterna_types::RequestId;
use sqlx::{PgConnection, QueryBuilder};

use super::read::{self, FILTERED, get, limit, scope_numbers, stored};
use super::{filter, record, storage};
use crate::domain::{Key, Version, Writer};
use crate::error::MemoryError;
use crate::store::ledger::versions_fit;
use crate::store::{ExportPage, Exported, Progress, StoredVector};

pub async fn export(connection: &mut PgConnection, page: &ExportPage) -> Result<Vec<Exported>, MemoryError> {
    let mut query = QueryBuilder::new(format!("SELECT m.key, m.record::text FROM {FILTERED} WHERE m.key > "));
    query.push_bind(page.after.0).push(" AND m.scope = ANY(");
    query.push_bind(scope_numbers(&page.scopes)).push(") AND ");
    filter::push(&mut query, page.filter.as_ref());
    if !page.history {
        query.push(" AND m.deleted_at IS NULL AND coalesce(m.expires_at > ");
        query.push_bind(page.now.micros()).push(", true)");
    }
    query.push(" ORDER BY m.key LIMIT ").push_bind(limit(page.limit));
    let found = read::rows(connection, &mut query, stored).await?;
    let mut vectors: HashMap<Key, Vec<StoredVector>> = HashMap::new();
    if page.vectors {
        let keys: Vec<Key> = found.iter().map(|one| one.key).collect();
        for model in read::models(connection).await? {
            read::codes(connection, &model, &keys, |key, code| {
                vectors.entry(key).or_default().push(StoredVector {
                    model: model.clone(),
                    code: code.to_owned(),
                });
            })
            .await?;
        }
    }
    let mut exported = Vec::with_capacity(found.len());
    for one in found {
        let versions = match page.history {
            true => versions(connection, &one, page.most).await?,
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

/// All versions of a memory; refused, before they are read, when they would not fit a message.
async fn versions(
    connection: &mut PgConnection,
    of: &crate::store::Stored,
    limit: usize,
) -> Result<Vec<Version>, MemoryError> {
    let id = of.memory.id;
    let query = "SELECT coalesce(sum(octet_length(record::text)), 0)::bigint FROM history WHERE memory = $1";
    let bytes: i64 = sqlx::query_scalar(query)
        .bind(id.as_bytes().as_slice())
        .fetch_one(&mut *connection)
        .await
        .map_err(storage)?;
    versions_fit(id, bytes, limit)?;
    let query = "SELECT record::text, kind, changed_at, changed_by FROM history WHERE memory = $1 ORDER BY version";
    let found = sqlx::query(query)
        .bind(id.as_bytes().as_slice())
        .fetch_all(connection)
        .await
        .map_err(storage)?;
    found.iter().map(read::version).collect()
}

pub async fn progress(
    connection: &mut PgConnection,
    writer: &Writer,
    id: &RequestId,
) -> Result<Option<Progress>, MemoryError> {
    let query = "SELECT items, digest, refused FROM imports WHERE tenant = $1 AND subject = $2 AND id = $3";
    let row = sqlx::query(query)
        .bind(writer.tenant.as_str())
        .bind(&writer.subject)
        .bind(id.as_str())
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    let progress = |row| {
        Ok(Progress {
            items: get(&row, "items")?,
            digest: get(&row, "digest")?,
            refused: record(&row, "refused", "list of refusals")?,
        })
    };
    row.map(progress).transpose()
}

pub async fn end(connection: &mut PgConnection, writer: &Writer, id: &RequestId) -> Result<(), MemoryError> {
    sqlx::query("DELETE FROM imports WHERE tenant = $1 AND subject = $2 AND id = $3")
        .bind(writer.tenant.as_str())
        .bind(&writer.subject)
        .bind(id.as_str())
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(())
}
