//! Reads.

use aeterna_types::{Layer, MemoryId, Scope, TenantId, Timestamp};
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{AssertSqlSafe, Row as _};

use super::filter::Sql;
use super::{SqliteStore, damaged, encode, marks, storage, stored};
use crate::domain::{Change, Key, Kind, Memory, ScopeKey, Sequence, Version, View};
use crate::error::MemoryError;
use crate::filter::Filter;
use crate::store::code::Code;
use crate::store::{Counts, IndexEvent, IndexState, Listing, Stored};

/// Bindings per statement; SQLite allows 32,766.
const CHUNK: usize = 10_000;

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, SqliteArguments>;

/// A query whose text is ours and whose values are all bound.
pub(super) fn sql<'q>(text: String) -> Query<'q> {
    sqlx::query(AssertSqlSafe(text))
}

/// Runs a query once per chunk of keys; `text` gets the question marks of its `IN (…)`.
async fn by_keys(
    store: &SqliteStore,
    keys: &[Key],
    text: impl Fn(&str) -> String,
    first: Option<&str>,
) -> Result<Vec<SqliteRow>, MemoryError> {
    let mut rows = Vec::new();
    for chunk in keys.chunks(CHUNK) {
        let mut query = sql(text(&marks(chunk.len())));
        if let Some(first) = first {
            query = query.bind(first.to_owned());
        }
        for key in chunk {
            query = query.bind(key.0);
        }
        rows.extend(query.fetch_all(store.0.readers()).await.map_err(storage)?);
    }
    Ok(rows)
}

/// A column that the query has filled with JSON.
pub(super) fn from_json<T: serde::de::DeserializeOwned>(row: &SqliteRow, column: &str) -> Result<T, MemoryError> {
    let text: &str = row.try_get(column).map_err(storage)?;
    serde_json::from_str(text).map_err(|_| damaged("answer"))
}

fn key(row: &SqliteRow, column: &str) -> Result<Key, MemoryError> {
    row.try_get(column).map(Key).map_err(storage)
}

fn code(bytes: Vec<u8>) -> Result<Code, MemoryError> {
    Code::from_bytes(bytes).ok_or_else(|| damaged("vector"))
}

pub async fn known(
    store: &SqliteStore,
    tenant: &TenantId,
    places: &[(Scope, [u8; 32])],
) -> Result<Vec<bool>, MemoryError> {
    let mut connection = store.0.readers().acquire().await.map_err(storage)?;
    let mut known = Vec::with_capacity(places.len());
    for (scope, identity) in places {
        let found = sqlx::query(
            "SELECT 1 FROM memories m JOIN scopes s ON s.key = m.scope \
             WHERE s.tenant = ? AND s.path = ? AND m.identity = ? AND m.deleted_at IS NULL",
        )
        .bind(tenant.as_str())
        .bind(encode(scope)?)
        .bind(identity.as_slice())
        .fetch_optional(&mut *connection)
        .await
        .map_err(storage)?;
        known.push(found.is_some());
    }
    Ok(known)
}

pub async fn get(store: &SqliteStore, tenant: &TenantId, id: MemoryId) -> Result<Option<Stored>, MemoryError> {
    let row = sqlx::query("SELECT key, record FROM memories WHERE id = ? AND tenant = ?")
        .bind(id.as_bytes().as_slice())
        .bind(tenant.as_str())
        .fetch_optional(store.0.readers())
        .await
        .map_err(storage)?;
    row.as_ref().map(stored).transpose()
}

pub async fn visible(
    store: &SqliteStore,
    tenant: &TenantId,
    view: &View,
    layers: &[Layer],
) -> Result<Vec<ScopeKey>, MemoryError> {
    let mut text = String::from("SELECT key FROM scopes WHERE tenant = ?");
    // A fixed identifier shows its own value and what names none; an open layer shows everything, or only what names none.
    let rule = |layer: &Layer| match (view.scope.get(*layer), view.exact) {
        (Some(_), _) => format!(" AND ({0} IS NULL OR {0} = ?)", layer.name()),
        (None, true) => format!(" AND {} IS NULL", layer.name()),
        (None, false) => String::new(),
    };
    Layer::ALL.iter().for_each(|layer| text.push_str(&rule(layer)));
    if !layers.is_empty() {
        text.push_str(&format!(" AND layer IN ({})", marks(layers.len())));
    }
    let mut query = sql(text).bind(tenant.as_str().to_owned());
    for (_, id) in view.scope.layers() {
        query = query.bind(id.to_owned());
    }
    for layer in layers {
        query = query.bind(layer.number());
    }
    let rows = query.fetch_all(store.0.readers()).await.map_err(storage)?;
    rows.iter()
        .map(|row| row.try_get("key").map(ScopeKey).map_err(storage))
        .collect()
}

fn scopes_json(scopes: &[ScopeKey]) -> String {
    serde_json::to_string(&scopes.iter().map(|scope| scope.0).collect::<Vec<_>>()).unwrap_or_default()
}

/// Where filters are applied; `m` and `s` are their names in conditions.
const FILTERED: &str = "memories m JOIN scopes s ON s.key = m.scope";

pub async fn list(store: &SqliteStore, listing: &Listing) -> Result<Vec<Stored>, MemoryError> {
    let filter = Sql::of(listing.filter.as_ref());
    let mut text = format!(
        "SELECT m.key, m.record FROM {FILTERED} WHERE m.scope IN (SELECT value FROM json_each(?)) AND {}",
        filter.text
    );
    if listing.before.is_some() {
        text.push_str(" AND m.id < ?");
    }
    if !listing.show_deleted {
        text.push_str(" AND m.deleted_at IS NULL AND (m.expires_at IS NULL OR m.expires_at > ?)");
    }
    text.push_str(" ORDER BY m.id DESC LIMIT ?");
    let mut query = filter.bind(sql(text).bind(scopes_json(&listing.scopes)));
    if let Some(before) = listing.before {
        query = query.bind(before.as_bytes().to_vec());
    }
    if !listing.show_deleted {
        query = query.bind(listing.now.micros());
    }
    let rows = query
        .bind(i64::try_from(listing.limit).unwrap_or(i64::MAX))
        .fetch_all(store.0.readers())
        .await
        .map_err(storage)?;
    rows.iter().map(stored).collect()
}

pub async fn matching(store: &SqliteStore, scopes: &[ScopeKey], filter: &Filter) -> Result<Vec<Key>, MemoryError> {
    let filter = Sql::of(Some(filter));
    // One row: reading each key as a row of its own costs more than finding it.
    let text = format!(
        "SELECT json_group_array(m.key) AS keys FROM {FILTERED} \
         WHERE m.scope IN (SELECT value FROM json_each(?)) AND m.deleted_at IS NULL AND {}",
        filter.text
    );
    let row = filter.bind(sql(text).bind(scopes_json(scopes)));
    let row = row.fetch_one(store.0.readers()).await.map_err(storage)?;
    let keys: Vec<i64> = from_json(&row, "keys")?;
    Ok(keys.into_iter().map(Key).collect())
}

pub async fn history(
    store: &SqliteStore,
    tenant: &TenantId,
    id: MemoryId,
    before: Option<i64>,
    limit: usize,
) -> Result<Vec<Version>, MemoryError> {
    let rows = sqlx::query(
        "SELECT h.kind, h.changed_at, h.changed_by, h.record FROM history h JOIN memories m ON m.id = h.memory \
         WHERE h.memory = ? AND m.tenant = ? AND h.version < ? ORDER BY h.version DESC LIMIT ?",
    )
    .bind(id.as_bytes().as_slice())
    .bind(tenant.as_str())
    .bind(before.unwrap_or(i64::MAX))
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(store.0.readers())
    .await
    .map_err(storage)?;
    let version = |row: &SqliteRow| {
        let (kind, record): (&str, &str) = (
            row.try_get("kind").map_err(storage)?,
            row.try_get("record").map_err(storage)?,
        );
        let changed_at = row.try_get("changed_at").map_err(storage)?;
        Ok(Version {
            memory: serde_json::from_str(record).map_err(|_| damaged("version"))?,
            kind: Kind::from_name(kind).ok_or_else(|| damaged("kind of change"))?,
            changed_at: Timestamp::from_micros(changed_at).ok_or_else(|| damaged("time"))?,
            changed_by: row.try_get("changed_by").map_err(storage)?,
        })
    };
    rows.iter().map(version).collect()
}

pub async fn counts(
    store: &SqliteStore,
    model: &str,
    scopes: &[ScopeKey],
    now: Timestamp,
) -> Result<Counts, MemoryError> {
    let rows = sqlx::query(
        "SELECT s.layer, m.deleted_at IS NULL AS shown, count(*) AS memories, \
         sum(length(CAST(json_extract(m.record, '$.body.content') AS BLOB))) AS bytes, \
         sum(e.code IS NULL) AS pending, coalesce(sum(length(e.code)), 0) AS embedding_bytes \
         FROM memories m JOIN scopes s ON s.key = m.scope LEFT JOIN embeddings e ON e.memory = m.key AND e.model = ? \
         WHERE m.scope IN (SELECT value FROM json_each(?)) \
         AND (m.deleted_at IS NOT NULL OR m.expires_at IS NULL OR m.expires_at > ?) GROUP BY s.layer, shown",
    )
    .bind(model)
    .bind(scopes_json(scopes))
    .bind(now.micros())
    .fetch_all(store.0.readers())
    .await
    .map_err(storage)?;
    let mut counts = Counts::default();
    for row in &rows {
        let number = |column: &str| row.try_get::<i64, _>(column).map_err(storage);
        counts.embedding_bytes += number("embedding_bytes")?;
        if number("shown")? == 0 {
            counts.deleted += number("memories")?;
            continue;
        }
        counts.pending += number("pending")?;
        let layer = row.try_get("layer").map_err(storage)?;
        let layer = Layer::from_number(layer).ok_or_else(|| damaged("layer"))?;
        counts.layers.push((layer, number("memories")?, number("bytes")?));
    }
    Ok(counts)
}

pub async fn expired(store: &SqliteStore, scopes: &[ScopeKey], now: Timestamp) -> Result<Vec<Key>, MemoryError> {
    let rows = sqlx::query(
        // Without statistics SQLite would rather read the whole scope.
        "SELECT key FROM memories INDEXED BY memories_by_expiry WHERE expires_at <= ? AND deleted_at IS NULL \
         AND scope IN (SELECT value FROM json_each(?))",
    )
    .bind(now.micros())
    .bind(scopes_json(scopes))
    .fetch_all(store.0.readers())
    .await
    .map_err(storage)?;
    rows.iter().map(|row| key(row, "key")).collect()
}

pub async fn identity(store: &SqliteStore) -> Result<String, MemoryError> {
    sqlx::query_scalar("SELECT value FROM meta WHERE name = 'store'")
        .fetch_one(store.0.readers())
        .await
        .map_err(storage)
}

pub async fn fetch(store: &SqliteStore, keys: &[Key], now: Timestamp) -> Result<Vec<Stored>, MemoryError> {
    let text = |marks: &str| format!("SELECT key, record FROM memories WHERE key IN ({marks})");
    let rows = by_keys(store, keys, text, None).await?;
    let all: Result<Vec<_>, _> = rows.iter().map(stored).collect();
    Ok(all?.into_iter().filter(|stored| stored.memory.is_live(now)).collect())
}

pub async fn neighbours(store: &SqliteStore, keys: &[Key]) -> Result<Vec<(Key, Key)>, MemoryError> {
    let text = |marks: &str| {
        format!(
            "SELECT json_group_array(json_array(a.key, b.key)) AS pairs FROM memories a JOIN memories b \
             ON b.scope = a.scope AND b.conversation = a.conversation AND b.sequence IN (a.sequence - 1, a.sequence + 1) \
             WHERE a.key IN ({marks}) AND b.deleted_at IS NULL"
        )
    };
    let rows = by_keys(store, keys, text, None).await?;
    let mut pairs = Vec::new();
    for row in &rows {
        let found: Vec<(i64, i64)> = from_json(row, "pairs")?;
        pairs.extend(found.into_iter().map(|(turn, neighbour)| (Key(turn), Key(neighbour))));
    }
    Ok(pairs)
}

pub async fn codes(store: &SqliteStore, model: &str, keys: &[Key]) -> Result<Vec<(Key, Code)>, MemoryError> {
    let text = |marks: &str| format!("SELECT memory, code FROM embeddings WHERE model = ? AND memory IN ({marks})");
    let rows = by_keys(store, keys, text, Some(model)).await?;
    rows.iter()
        .map(|row| Ok((key(row, "memory")?, code(row.try_get("code").map_err(storage)?)?)))
        .collect()
}

pub async fn events(store: &SqliteStore, after: Sequence, limit: usize) -> Result<Vec<IndexEvent>, MemoryError> {
    let rows = sqlx::query("SELECT sequence, memory FROM outbox WHERE sequence > ? ORDER BY sequence LIMIT ?")
        .bind(after.0)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(store.0.readers())
        .await
        .map_err(storage)?;
    let event = |row: &SqliteRow| {
        let sequence = row.try_get("sequence").map(Sequence).map_err(storage)?;
        Ok(IndexEvent {
            sequence,
            key: key(row, "memory")?,
        })
    };
    rows.iter().map(event).collect()
}

pub async fn changes(
    store: &SqliteStore,
    tenant: Option<&TenantId>,
    after: Sequence,
    limit: usize,
) -> Result<Vec<Change>, MemoryError> {
    // A change whose version is gone is told by the removal that follows it.
    let rows = sqlx::query(
        "SELECT o.sequence, o.tenant, o.id, o.kind, o.committed_at, s.path, h.record FROM outbox o \
         JOIN scopes s ON s.key = o.scope LEFT JOIN history h ON h.memory = o.id AND h.version = o.version \
         WHERE o.sequence > ? AND (? IS NULL OR o.tenant = ?) AND o.kind <> 'embedded' \
         AND (o.kind = 'purged' OR h.record IS NOT NULL) ORDER BY o.sequence LIMIT ?",
    )
    .bind(after.0)
    .bind(tenant.map(TenantId::as_str))
    .bind(tenant.map(TenantId::as_str))
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .fetch_all(store.0.readers())
    .await
    .map_err(storage)?;
    rows.iter().map(change).collect()
}

fn change(row: &SqliteRow) -> Result<Change, MemoryError> {
    let (tenant, kind, path): (&str, &str, &str) = (
        row.try_get("tenant").map_err(storage)?,
        row.try_get("kind").map_err(storage)?,
        row.try_get("path").map_err(storage)?,
    );
    let id: &[u8] = row.try_get("id").map_err(storage)?;
    let record: Option<&str> = row.try_get("record").map_err(storage)?;
    let memory = record.map(|record| serde_json::from_str(record).map_err(|_| damaged("version")));
    let committed_at = row.try_get("committed_at").map_err(storage)?;
    Ok(Change {
        sequence: Sequence(row.try_get("sequence").map_err(storage)?),
        tenant: tenant.parse().map_err(|_| damaged("tenant"))?,
        id: MemoryId::from_bytes(id.try_into().map_err(|_| damaged("id"))?),
        scope: serde_json::from_str(path).map_err(|_| damaged("scope"))?,
        kind: Kind::from_name(kind).ok_or_else(|| damaged("kind of change"))?,
        committed_at: Timestamp::from_micros(committed_at).ok_or_else(|| damaged("time"))?,
        memory: memory.transpose()?,
    })
}

pub async fn last_sequence(store: &SqliteStore) -> Result<Sequence, MemoryError> {
    let last: Option<i64> = sqlx::query_scalar("SELECT max(sequence) FROM outbox")
        .fetch_one(store.0.readers())
        .await
        .map_err(storage)?;
    Ok(Sequence(last.unwrap_or(0)))
}

const STATE: &str = "SELECT m.key, m.scope, m.tenant, m.version, m.record, e.code FROM memories m \
                     LEFT JOIN embeddings e ON e.memory = m.key AND e.model = ? WHERE m.deleted_at IS NULL";

fn state(row: &SqliteRow) -> Result<IndexState, MemoryError> {
    let record: &str = row.try_get("record").map_err(storage)?;
    let memory: Memory = serde_json::from_str(record).map_err(|_| damaged("memory"))?;
    let bytes: Option<Vec<u8>> = row.try_get("code").map_err(storage)?;
    let tenant: &str = row.try_get("tenant").map_err(storage)?;
    Ok(IndexState {
        key: key(row, "key")?,
        scope: row.try_get("scope").map(ScopeKey).map_err(storage)?,
        tenant: tenant.parse().map_err(|_| damaged("tenant"))?,
        version: row.try_get("version").map_err(storage)?,
        code: bytes.map(code).transpose()?,
        text: memory.body.dense_text(),
    })
}

pub async fn states(store: &SqliteStore, model: &str, keys: &[Key]) -> Result<Vec<IndexState>, MemoryError> {
    let rows = by_keys(
        store,
        keys,
        |marks| format!("{STATE} AND m.key IN ({marks})"),
        Some(model),
    )
    .await?;
    rows.iter().map(state).collect()
}

pub async fn scan(
    store: &SqliteStore,
    model: &str,
    after: Key,
    limit: usize,
    pending: bool,
) -> Result<Vec<IndexState>, MemoryError> {
    let only = if pending { " AND e.code IS NULL" } else { "" };
    let rows = sql(format!("{STATE}{only} AND m.key > ? ORDER BY m.key LIMIT ?"))
        .bind(model.to_owned())
        .bind(after.0)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(store.0.readers())
        .await
        .map_err(storage)?;
    rows.iter().map(state).collect()
}
