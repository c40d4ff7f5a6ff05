//! Reads.

use std::time::Instant;

use aeterna_types::{Layer, MemoryId, Scope, TenantId, Timestamp};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Postgres, QueryBuilder, Row as _};

use super::lexical::Cache;
use super::{damaged, encode, filter, keyed, past, record, storage};
use crate::domain::{Change, Key, Kind, Memory, ScopeKey, Sequence, Subject, Version, View};
use crate::error::MemoryError;
use crate::filter::Filter;
use crate::store::code::{Code, Query};
use crate::store::{Counts, IndexEvent, IndexState, Listing, Rescoring, Scored, Scoring, Seen, Sight, Stored};

pub(super) fn limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

pub(super) fn numbers(keys: &[Key]) -> Vec<i64> {
    keys.iter().map(|key| key.0).collect()
}

pub(super) fn scope_numbers(scopes: &[ScopeKey]) -> Vec<i64> {
    scopes.iter().map(|scope| scope.0).collect()
}

/// A column that is there.
pub(super) fn get<'r, T>(row: &'r PgRow, column: &str) -> Result<T, MemoryError>
where
    T: sqlx::Decode<'r, Postgres> + sqlx::Type<Postgres>,
{
    row.try_get(column).map_err(storage)
}

/// Key and record.
pub(super) fn stored(row: &PgRow) -> Result<Stored, MemoryError> {
    keyed(row).map(|(key, memory)| Stored { key, memory })
}

pub(super) fn key(row: &PgRow) -> Result<Key, MemoryError> {
    get(row, "key").map(Key)
}

/// All rows of a query that is put together.
pub(super) async fn rows<T>(
    connection: &mut PgConnection,
    query: &mut QueryBuilder<Postgres>,
    row: impl Fn(&PgRow) -> Result<T, MemoryError>,
) -> Result<Vec<T>, MemoryError> {
    // Of the many forms that filters give it, none is worth keeping prepared.
    let found = query.build().persistent(false).fetch_all(connection).await;
    found.map_err(storage)?.iter().map(row).collect()
}

pub async fn known(
    connection: &mut PgConnection,
    tenant: &TenantId,
    places: &[(Scope, [u8; 32])],
) -> Result<Vec<bool>, MemoryError> {
    let paths = places.iter().map(|(scope, _)| encode(scope));
    let paths: Vec<String> = paths.collect::<Result<_, _>>()?;
    let identities: Vec<&[u8]> = places.iter().map(|(_, identity)| identity.as_slice()).collect();
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT 1 FROM memories m JOIN scopes s ON s.key = m.scope WHERE s.tenant = $1 AND s.path = p.path \
         AND m.identity = p.identity AND m.deleted_at IS NULL) \
         FROM unnest($2::text[], $3::bytea[]) WITH ORDINALITY AS p (path, identity, place) ORDER BY p.place",
    )
    .bind(tenant.as_str())
    .bind(paths)
    .bind(identities)
    .fetch_all(connection)
    .await
    .map_err(storage)
}

pub async fn memory(
    connection: &mut PgConnection,
    tenant: &TenantId,
    id: MemoryId,
) -> Result<Option<Stored>, MemoryError> {
    let row = sqlx::query("SELECT key, record::text FROM memories WHERE id = $1 AND tenant = $2")
        .bind(id.as_bytes().as_slice())
        .bind(tenant.as_str())
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    row.as_ref().map(stored).transpose()
}

pub async fn visible(
    connection: &mut PgConnection,
    tenant: &TenantId,
    view: &View,
    layers: &[Layer],
) -> Result<Vec<ScopeKey>, MemoryError> {
    let mut query = QueryBuilder::new("SELECT key FROM scopes WHERE tenant = ");
    query.push_bind(tenant.as_str().to_owned());
    // A fixed identifier shows its own value and what names none; an open layer shows everything, or only what names none.
    for layer in Layer::ALL {
        let name = layer.name();
        match (view.scope.get(layer), view.exact) {
            (Some(id), _) => query
                .push(format_args!(" AND (\"{name}\" IS NULL OR \"{name}\" = "))
                .push_bind(id.to_owned())
                .push(")"),
            (None, true) => query.push(format_args!(" AND \"{name}\" IS NULL")),
            (None, false) => continue,
        };
    }
    if !layers.is_empty() {
        let layers: Vec<i32> = layers.iter().map(|layer| layer.number()).collect();
        query.push(" AND layer = ANY(").push_bind(layers).push(")");
    }
    rows(connection, &mut query, |row| get(row, "key").map(ScopeKey)).await
}

/// Where filters are applied; `m` and `s` are their names in conditions.
pub(super) const FILTERED: &str = "memories m JOIN scopes s ON s.key = m.scope";

pub async fn list(connection: &mut PgConnection, listing: &Listing) -> Result<Vec<Stored>, MemoryError> {
    let mut query = match listing.as_of {
        Some(at) => past::begin("SELECT m.key, m.record::text FROM ", at),
        None => QueryBuilder::new("SELECT m.key, m.record::text FROM memories m"),
    };
    query.push(" JOIN scopes s ON s.key = m.scope WHERE m.scope = ANY(");
    query.push_bind(scope_numbers(&listing.scopes)).push(") AND ");
    filter::push(&mut query, listing.filter.as_ref());
    if let Some(before) = listing.before {
        query.push(" AND m.id < ").push_bind(before.as_bytes().to_vec());
    }
    if !listing.show_deleted {
        let now = listing.as_of.unwrap_or(listing.now);
        query.push(" AND m.deleted_at IS NULL AND coalesce(m.expires_at > ");
        query.push_bind(now.micros()).push(", true)");
    }
    query.push(" ORDER BY m.id DESC LIMIT ").push_bind(limit(listing.limit));
    rows(connection, &mut query, stored).await
}

pub async fn history(
    connection: &mut PgConnection,
    tenant: &TenantId,
    id: MemoryId,
    before: Option<i64>,
    count: usize,
) -> Result<Vec<Version>, MemoryError> {
    let found = sqlx::query(
        "SELECT record::text, kind, changed_at, changed_by FROM history \
         WHERE memory = $1 AND tenant = $2 AND version < $3 ORDER BY version DESC LIMIT $4",
    )
    .bind(id.as_bytes().as_slice())
    .bind(tenant.as_str())
    .bind(before.unwrap_or(i64::MAX))
    .bind(limit(count))
    .fetch_all(connection)
    .await
    .map_err(storage)?;
    found.iter().map(version).collect()
}

/// Record, kind, time and author.
pub(super) fn version(row: &PgRow) -> Result<Version, MemoryError> {
    Ok(Version {
        memory: record(row, "record", "version")?,
        kind: Kind::from_name(get(row, "kind")?).ok_or_else(|| damaged("kind of change"))?,
        changed_at: Timestamp::from_micros(get(row, "changed_at")?).ok_or_else(|| damaged("time"))?,
        changed_by: super::unseal(get(row, "changed_by")?).into_owned(),
    })
}

pub async fn counts(
    connection: &mut PgConnection,
    model: &str,
    scopes: &[ScopeKey],
    now: Timestamp,
) -> Result<Counts, MemoryError> {
    let found = sqlx::query(
        "SELECT s.layer, m.deleted_at IS NULL AS shown, count(*) AS memories, \
         sum(octet_length(m.record #>> '{body,content}'))::bigint AS bytes, count(*) FILTER (WHERE v.code IS NULL) AS pending, \
         coalesce(sum(octet_length(v.code)), 0)::bigint AS embedded FROM memories m JOIN scopes s ON s.key = m.scope \
         LEFT JOIN vectors v ON v.memory = m.key AND v.model = (SELECT key FROM models WHERE identity = $1) \
         WHERE m.scope = ANY($2) AND (m.deleted_at IS NOT NULL OR m.expires_at IS NULL OR m.expires_at > $3) \
         GROUP BY s.layer, shown ORDER BY s.layer, shown",
    )
    .bind(model)
    .bind(scope_numbers(scopes))
    .bind(now.micros())
    .fetch_all(connection)
    .await
    .map_err(storage)?;
    let mut counts = Counts::default();
    for row in &found {
        counts.embedding_bytes += get::<i64>(row, "embedded")?;
        if !get::<bool>(row, "shown")? {
            counts.deleted += get::<i64>(row, "memories")?;
            continue;
        }
        counts.pending += get::<i64>(row, "pending")?;
        let layer = Layer::from_number(get(row, "layer")?).ok_or_else(|| damaged("layer"))?;
        counts.layers.push((layer, get(row, "memories")?, get(row, "bytes")?));
    }
    Ok(counts)
}

pub async fn meta(connection: &mut PgConnection, name: &str) -> Result<Option<String>, MemoryError> {
    sqlx::query_scalar("SELECT value FROM meta WHERE name = $1")
        .bind(name)
        .fetch_optional(connection)
        .await
        .map_err(storage)
}

pub async fn put_meta(connection: &mut PgConnection, name: &str, value: &str) -> Result<(), MemoryError> {
    sqlx::query("INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = $2")
        .bind(name)
        .bind(value)
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(())
}

pub async fn fetch(connection: &mut PgConnection, keys: &[Key], now: Timestamp) -> Result<Vec<Stored>, MemoryError> {
    let found = sqlx::query("SELECT key, record::text FROM memories WHERE key = ANY($1)")
        .bind(numbers(keys))
        .fetch_all(connection)
        .await
        .map_err(storage)?;
    let mut all: Vec<Stored> = found.iter().map(stored).collect::<Result<_, _>>()?;
    all.retain(|stored| stored.memory.is_live(now));
    Ok(all)
}

pub async fn models(connection: &mut PgConnection) -> Result<Vec<String>, MemoryError> {
    let query = sqlx::query_scalar("SELECT identity FROM models ORDER BY key");
    query.fetch_all(connection).await.map_err(storage)
}

pub async fn vectors_by(connection: &mut PgConnection, model: &str) -> Result<i64, MemoryError> {
    let query = "SELECT count(*) FROM vectors v JOIN models k ON k.key = v.model JOIN memories m ON m.key = v.memory \
                 WHERE k.identity = $1 AND m.deleted_at IS NULL";
    let counted = sqlx::query_scalar(query).bind(model).fetch_one(connection).await;
    counted.map_err(storage)
}

/// Hands the code of each memory to `take`.
pub async fn codes(
    connection: &mut PgConnection,
    model: &str,
    keys: &[Key],
    mut take: impl FnMut(Key, &Code<&[u8]>),
) -> Result<(), MemoryError> {
    let found = sqlx::query(
        "SELECT v.memory AS key, v.code FROM vectors v WHERE v.model = (SELECT key FROM models WHERE identity = $1) \
         AND v.memory = ANY($2)",
    )
    .bind(model)
    .bind(numbers(keys))
    .fetch_all(connection)
    .await
    .map_err(storage)?;
    for row in &found {
        let code = Code::from_bytes(get::<&[u8]>(row, "code")?).ok_or_else(|| damaged("vector"))?;
        take(key(row)?, &code);
    }
    Ok(())
}

pub async fn cosines(connection: &mut PgConnection, rescoring: &Rescoring) -> Result<Vec<(Key, f32)>, MemoryError> {
    let query = Query::new(&rescoring.vector);
    let mut cosines = Vec::with_capacity(rescoring.keys.len());
    codes(connection, &rescoring.model, &rescoring.keys, |key, code| {
        if code.dimension() >= query.dimension() {
            cosines.push((key, code.cosine(&query)));
        }
    })
    .await?;
    Ok(cosines)
}

pub async fn events(
    connection: &mut PgConnection,
    after: Sequence,
    count: usize,
) -> Result<Vec<IndexEvent>, MemoryError> {
    let found = sqlx::query(
        "SELECT sequence, memory FROM outbox WHERE sequence > $1 AND sequence < horizon() ORDER BY sequence LIMIT $2",
    )
    .bind(after.0)
    .bind(limit(count))
    .fetch_all(connection)
    .await
    .map_err(storage)?;
    let event = |row: &PgRow| {
        Ok(IndexEvent {
            sequence: Sequence(get(row, "sequence")?),
            key: Key(get(row, "memory")?),
        })
    };
    found.iter().map(event).collect()
}

pub async fn changes(
    connection: &mut PgConnection,
    tenant: Option<&TenantId>,
    after: Sequence,
    count: usize,
) -> Result<Vec<Change>, MemoryError> {
    // A change whose version is gone is told by the removal that follows it.
    let found = sqlx::query(
        "SELECT o.sequence, o.tenant, o.kind, o.committed_at, s.path, o.id, h.record::text, o.resource, \
         v.record AS document, p.record AS policy FROM outbox o LEFT JOIN scopes s ON s.key = o.scope \
         LEFT JOIN history h ON h.memory = o.id AND h.version = o.version \
         LEFT JOIN documents d ON o.resource LIKE 'document:%' AND d.path = substr(o.resource, 10) AND d.scope = o.scope \
         LEFT JOIN document_versions v ON v.document = d.key AND v.version = o.version \
         LEFT JOIN policies p ON o.resource LIKE 'policy:%' AND p.tenant = o.tenant AND p.name = substr(o.resource, 8) \
         WHERE o.sequence > $1 AND o.sequence < horizon() AND ($2::text IS NULL OR o.tenant = $2) AND o.kind <> 'embedded' \
         AND (o.kind = 'purged' OR o.resource IS NOT NULL OR h.record IS NOT NULL) ORDER BY o.sequence LIMIT $3",
    )
    .bind(after.0)
    .bind(tenant.map(TenantId::as_str))
    .bind(limit(count))
    .fetch_all(connection)
    .await
    .map_err(storage)?;
    found.iter().map(change).collect()
}

/// A JSON column that may be empty.
fn optional<T: serde::de::DeserializeOwned>(row: &PgRow, column: &str, what: &str) -> Result<Option<T>, MemoryError> {
    match get::<Option<&str>>(row, column)? {
        Some(_) => record(row, column, what).map(Some),
        None => Ok(None),
    }
}

fn change(row: &PgRow) -> Result<Change, MemoryError> {
    let resource: Option<&str> = get(row, "resource")?;
    let subject = match resource.and_then(|resource| resource.split_once(':')) {
        Some(("policy", name)) => Subject::Policy(name.to_owned(), optional(row, "policy", "policy")?),
        Some(_) => Subject::Document(optional(row, "document", "document")?.ok_or_else(|| damaged("document"))?),
        None => {
            let id = get::<&[u8]>(row, "id")?.try_into().map_err(|_| damaged("id"))?;
            Subject::Memory(MemoryId::from_bytes(id), optional(row, "record", "version")?)
        }
    };
    Ok(Change {
        sequence: Sequence(get(row, "sequence")?),
        tenant: get::<&str>(row, "tenant")?.parse().map_err(|_| damaged("tenant"))?,
        kind: Kind::from_name(get(row, "kind")?).ok_or_else(|| damaged("kind of change"))?,
        committed_at: Timestamp::from_micros(get(row, "committed_at")?).ok_or_else(|| damaged("time"))?,
        scope: optional(row, "path", "scope")?.unwrap_or_default(),
        subject,
    })
}

pub async fn has(connection: &mut PgConnection, place: Sequence) -> Result<bool, MemoryError> {
    let query = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM outbox WHERE sequence = $1)").bind(place.0);
    query.fetch_one(connection).await.map_err(storage)
}

pub async fn last_sequence(connection: &mut PgConnection) -> Result<Sequence, MemoryError> {
    let last = sqlx::query_scalar("SELECT last_sequence()").fetch_one(connection).await;
    last.map(Sequence).map_err(storage)
}

/// Memories that are there, with their vectors by a model.
fn state_query(model: &str) -> QueryBuilder<Postgres> {
    let mut query = QueryBuilder::new(
        "SELECT m.key, m.scope, m.tenant, m.version, m.record::text, v.code FROM memories m \
         LEFT JOIN vectors v ON v.memory = m.key AND v.model = (SELECT key FROM models WHERE identity = ",
    );
    query
        .push_bind(model.to_owned())
        .push(") WHERE m.deleted_at IS NULL AND ");
    query
}

fn state(row: &PgRow) -> Result<IndexState, MemoryError> {
    let memory: Memory = record(row, "record", "memory")?;
    let code: Option<&[u8]> = get(row, "code")?;
    let code = code.map(|bytes| Code::from_bytes(bytes.to_vec()).ok_or_else(|| damaged("vector")));
    Ok(IndexState {
        key: key(row)?,
        id: memory.id,
        scope: ScopeKey(get(row, "scope")?),
        tenant: get::<&str>(row, "tenant")?.parse().map_err(|_| damaged("tenant"))?,
        version: get(row, "version")?,
        code: code.transpose()?,
        text: memory.body.dense_text(),
        lexical: memory.body.lexical_text(),
    })
}

pub async fn states(connection: &mut PgConnection, model: &str, keys: &[Key]) -> Result<Vec<IndexState>, MemoryError> {
    let mut query = state_query(model);
    query.push("m.key = ANY(").push_bind(numbers(keys)).push(")");
    rows(connection, &mut query, state).await
}

pub async fn memory_state(
    connection: &mut PgConnection,
    tenant: &TenantId,
    id: MemoryId,
    model: &str,
) -> Result<Option<IndexState>, MemoryError> {
    let mut query = state_query(model);
    query.push("m.id = ").push_bind(id.as_bytes().to_vec());
    query.push(" AND m.tenant = ").push_bind(tenant.as_str().to_owned());
    Ok(rows(connection, &mut query, state).await?.pop())
}

pub async fn scan(
    connection: &mut PgConnection,
    model: &str,
    after: Key,
    count: usize,
    pending: bool,
) -> Result<Vec<IndexState>, MemoryError> {
    let mut query = state_query(model);
    if pending {
        query.push("v.code IS NULL AND ");
    }
    query.push("m.key > ").push_bind(after.0);
    query.push(" ORDER BY m.key LIMIT ").push_bind(limit(count));
    rows(connection, &mut query, state).await
}

pub async fn seen(connection: &mut PgConnection, sight: &Sight) -> Result<Seen, MemoryError> {
    let scopes = visible(connection, &sight.tenant, &sight.view, &sight.layers).await?;
    let mut hidden = Vec::new();
    if let Some(now) = sight.now {
        let mut query = QueryBuilder::new("SELECT key FROM memories WHERE deleted_at IS NULL AND expires_at <= ");
        query.push_bind(now.micros()).push(" AND scope = ANY(");
        query.push_bind(scope_numbers(&scopes)).push(")");
        hidden = rows(connection, &mut query, key).await?;
    }
    if !sight.exclude.is_empty() {
        let ids: Vec<&[u8]> = sight.exclude.iter().map(|id| id.as_bytes().as_slice()).collect();
        let excluded: Vec<i64> = sqlx::query_scalar("SELECT key FROM memories WHERE id = ANY($1) AND tenant = $2")
            .bind(ids)
            .bind(sight.tenant.as_str())
            .fetch_all(&mut *connection)
            .await
            .map_err(storage)?;
        hidden.extend(excluded.into_iter().map(Key));
    }
    let matching = match &sight.filter {
        Some(filter) => Some(matching(connection, &scopes, filter).await?),
        None => None,
    };
    Ok(Seen {
        scopes,
        hidden,
        matching,
    })
}

async fn matching(
    connection: &mut PgConnection,
    scopes: &[ScopeKey],
    filter: &Filter,
) -> Result<Vec<Key>, MemoryError> {
    let mut query = QueryBuilder::new(format!("SELECT m.key FROM {FILTERED} WHERE m.scope = ANY("));
    query
        .push_bind(scope_numbers(scopes))
        .push(") AND m.deleted_at IS NULL AND ");
    filter::push(&mut query, Some(filter));
    rows(connection, &mut query, key).await
}

pub async fn neighbours(connection: &mut PgConnection, keys: &[Key]) -> Result<Vec<(Key, Key)>, MemoryError> {
    let found: Vec<(i64, i64)> = sqlx::query_as(
        "SELECT a.key, b.key FROM memories a JOIN memories b ON b.scope = a.scope AND b.conversation = a.conversation \
         AND b.sequence IN (a.sequence - 1, a.sequence + 1) WHERE a.key = ANY($1) AND b.deleted_at IS NULL",
    )
    .bind(numbers(keys))
    .fetch_all(connection)
    .await
    .map_err(storage)?;
    Ok(found
        .into_iter()
        .map(|(turn, beside)| (Key(turn), Key(beside)))
        .collect())
}

pub async fn any_expired(connection: &mut PgConnection, now: Timestamp) -> Result<bool, MemoryError> {
    let query = "SELECT EXISTS (SELECT 1 FROM memories WHERE expires_at <= $1 AND deleted_at IS NULL)";
    let asked = sqlx::query_scalar(query).bind(now.micros()).fetch_one(connection).await;
    asked.map_err(storage)
}

pub async fn scored(connection: &mut PgConnection, cache: &Cache, scoring: &Scoring) -> Result<Scored, MemoryError> {
    let began = Instant::now();
    let mut dense = Vec::new();
    if let Some(rescoring) = &scoring.dense {
        dense = cosines(connection, rescoring).await?;
    }
    let dense_ms = began.elapsed().as_secs_f64() * 1e3;
    let began = Instant::now();
    let mut lexical = Vec::new();
    if let Some(search) = &scoring.lexical {
        lexical = super::lexical::search(connection, cache, &scoring.tenant, search).await?;
    }
    let lexical_ms = began.elapsed().as_secs_f64() * 1e3;
    if let Some(rescoring) = scoring.also_dense(&lexical) {
        dense.extend(cosines(connection, &rescoring).await?);
    }
    let mut beside = Vec::new();
    if let Some(turns) = scoring.turns(&lexical, &dense) {
        beside = neighbours(connection, &turns).await?;
    }
    Ok(Scored {
        lexical,
        dense: Ok(dense),
        neighbours: beside,
        lexical_ms,
        dense_ms,
    })
}
