//! Reads.

use aeterna_storage::rusqlite::types::Value;
use aeterna_storage::rusqlite::{Connection, OptionalExtension as _, Params, Row, params, params_from_iter};
use aeterna_types::{Layer, MemoryId, Scope, TenantId, Timestamp};

use super::filter::Sql;
use super::write::REPLAY;
use super::{damaged, encode, failed, parsed, past};
use crate::domain::{Change, Idempotency, Key, Kind, Memory, ScopeKey, Sequence, Subject, Version, View, Writer};
use crate::error::MemoryError;
use crate::store::code::Code;
use crate::store::ledger::answered;
use crate::store::{Counts, IndexEvent, IndexState, Listing, Stored};

/// All rows of a query, each read by `row`.
pub(super) fn rows<T>(
    connection: &Connection,
    text: &str,
    params: impl Params,
    mut row: impl FnMut(&Row<'_>) -> Result<T, MemoryError>,
) -> Result<Vec<T>, MemoryError> {
    let mut statement = connection.prepare_cached(text).map_err(failed)?;
    let mut found = statement.query(params).map_err(failed)?;
    let mut all = Vec::new();
    while let Some(next) = found.next().map_err(failed)? {
        all.push(row(next)?);
    }
    Ok(all)
}

/// A column that is there.
pub(super) fn get<T: aeterna_storage::rusqlite::types::FromSql>(
    row: &Row<'_>,
    column: usize,
) -> Result<T, MemoryError> {
    row.get(column).map_err(failed)
}

/// A text, read where it lies.
pub(super) fn text<'r>(row: &'r Row<'_>, column: usize) -> Result<&'r str, MemoryError> {
    let value = row.get_ref(column).map_err(failed)?;
    value.as_str().map_err(|_| damaged("text"))
}

fn blob<'r>(row: &'r Row<'_>, column: usize) -> Result<&'r [u8], MemoryError> {
    let value = row.get_ref(column).map_err(failed)?;
    value.as_blob().map_err(|_| damaged("value"))
}

/// Key and record in the first two columns.
pub(super) fn stored(row: &Row<'_>) -> Result<Stored, MemoryError> {
    Ok(Stored {
        key: Key(get(row, 0)?),
        memory: parsed(text(row, 1)?, "memory")?,
    })
}

pub(super) fn limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

/// Numbers for `IN (SELECT value FROM json_each(?))`, so that the same statement serves any number of them.
pub(super) fn numbers(numbers: impl Iterator<Item = i64>) -> String {
    let mut json = String::from("[");
    for (index, number) in numbers.enumerate() {
        if index > 0 {
            json.push(',');
        }
        json.push_str(&number.to_string());
    }
    json.push(']');
    json
}

pub(super) fn keys_json(keys: &[Key]) -> String {
    numbers(keys.iter().map(|key| key.0))
}

pub(super) fn scopes_json(scopes: &[ScopeKey]) -> String {
    numbers(scopes.iter().map(|scope| scope.0))
}

pub fn known(
    connection: &Connection,
    tenant: &TenantId,
    places: &[(Scope, [u8; 32])],
) -> Result<Vec<bool>, MemoryError> {
    let mut statement = connection
        .prepare_cached(
            "SELECT 1 FROM memories m JOIN scopes s ON s.key = m.scope \
             WHERE s.tenant = ? AND s.path = ? AND m.identity = ? AND m.deleted_at IS NULL",
        )
        .map_err(failed)?;
    let known = |(scope, identity): &(Scope, [u8; 32])| {
        let bound = params![tenant.as_str(), encode(scope)?, identity.as_slice()];
        statement.exists(bound).map_err(failed)
    };
    places.iter().map(known).collect()
}

pub fn memory(connection: &Connection, tenant: &TenantId, id: MemoryId) -> Result<Option<Stored>, MemoryError> {
    let text = "SELECT key, record FROM memories WHERE id = ? AND tenant = ?";
    let bound = params![id.as_bytes().as_slice(), tenant.as_str()];
    Ok(rows(connection, text, bound, stored)?.pop())
}

pub fn visible(
    connection: &Connection,
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
    text.push_str(" AND (? = '[]' OR layer IN (SELECT value FROM json_each(?)))");
    let mut bound = vec![tenant.as_str().to_owned()];
    bound.extend(view.scope.layers().map(|(_, id)| id.to_owned()));
    let layers = numbers(layers.iter().map(|layer| i64::from(layer.number())));
    bound.extend([layers.clone(), layers]);
    rows(connection, &text, params_from_iter(bound), |row| {
        get(row, 0).map(ScopeKey)
    })
}

/// Where filters are applied; `m` and `s` are their names in conditions.
pub(super) const FILTERED: &str = "memories m JOIN scopes s ON s.key = m.scope";

pub fn list(connection: &Connection, listing: &Listing) -> Result<Vec<Stored>, MemoryError> {
    if let Some(at) = listing.as_of {
        return past::list(connection, listing, at);
    }
    let filter = Sql::of(listing.filter.as_ref());
    let mut text = format!(
        "SELECT m.key, m.record FROM {FILTERED} WHERE m.scope IN (SELECT value FROM json_each(?)) AND {}",
        filter.text
    );
    let mut bound = vec![Value::from(scopes_json(&listing.scopes))];
    bound.extend(filter.binds());
    if let Some(before) = listing.before {
        text.push_str(" AND m.id < ?");
        bound.push(before.as_bytes().to_vec().into());
    }
    if !listing.show_deleted {
        text.push_str(" AND m.deleted_at IS NULL AND (m.expires_at IS NULL OR m.expires_at > ?)");
        bound.push(listing.now.micros().into());
    }
    text.push_str(" ORDER BY m.id DESC LIMIT ?");
    bound.push(limit(listing.limit).into());
    rows(connection, &text, params_from_iter(bound), stored)
}

pub fn history(
    connection: &Connection,
    tenant: &TenantId,
    id: MemoryId,
    before: Option<i64>,
    count: usize,
) -> Result<Vec<Version>, MemoryError> {
    let query = "SELECT h.record, h.kind, h.changed_at, h.changed_by FROM history h JOIN memories m ON m.id = h.memory \
                 WHERE h.memory = ? AND m.tenant = ? AND h.version < ? ORDER BY h.version DESC LIMIT ?";
    let bound = params![
        id.as_bytes().as_slice(),
        tenant.as_str(),
        before.unwrap_or(i64::MAX),
        limit(count)
    ];
    rows(connection, query, bound, version)
}

/// Record, kind, time and author in the first four columns.
pub fn version(row: &Row<'_>) -> Result<Version, MemoryError> {
    Ok(Version {
        memory: parsed(text(row, 0)?, "version")?,
        kind: Kind::from_name(text(row, 1)?).ok_or_else(|| damaged("kind of change"))?,
        changed_at: Timestamp::from_micros(get(row, 2)?).ok_or_else(|| damaged("time"))?,
        changed_by: get(row, 3)?,
    })
}

pub fn counts(
    connection: &Connection,
    model: &str,
    scopes: &[ScopeKey],
    now: Timestamp,
) -> Result<Counts, MemoryError> {
    let vectors = vectors(connection, model)?;
    let text = format!(
        "SELECT s.layer, m.deleted_at IS NULL AS shown, count(*), \
         sum(length(CAST(json_extract(m.record, '$.body.content') AS BLOB))), \
         sum(v.code IS NULL), coalesce(sum(length(v.code)), 0) \
         FROM memories m JOIN scopes s ON s.key = m.scope LEFT JOIN {vectors} v ON v.memory = m.key \
         WHERE m.scope IN (SELECT value FROM json_each(?)) \
         AND (m.deleted_at IS NOT NULL OR m.expires_at IS NULL OR m.expires_at > ?) GROUP BY s.layer, shown"
    );
    let mut counts = Counts::default();
    let bound = params![scopes_json(scopes), now.micros()];
    rows(connection, &text, bound, |row| {
        counts.embedding_bytes += get::<i64>(row, 5)?;
        if !get::<bool>(row, 1)? {
            counts.deleted += get::<i64>(row, 2)?;
            return Ok(());
        }
        counts.pending += get::<i64>(row, 4)?;
        let layer = Layer::from_number(get(row, 0)?).ok_or_else(|| damaged("layer"))?;
        counts.layers.push((layer, get(row, 2)?, get(row, 3)?));
        Ok(())
    })?;
    Ok(counts)
}

pub fn any_expired(connection: &Connection, now: Timestamp) -> Result<bool, MemoryError> {
    let mut statement = connection
        .prepare_cached("SELECT 1 FROM memories WHERE expires_at <= ? AND deleted_at IS NULL LIMIT 1")
        .map_err(failed)?;
    statement.exists([now.micros()]).map_err(failed)
}

pub fn replay<T: serde::de::DeserializeOwned>(
    connection: &Connection,
    writer: &Writer,
    idempotency: &Idempotency,
) -> Result<Option<T>, MemoryError> {
    let bound = [writer.tenant.as_str(), &writer.subject, idempotency.request_id.as_str()];
    let mut answers = rows(connection, REPLAY, bound, |row| {
        answered(idempotency, blob(row, 0)?, text(row, 1)?)
    })?;
    Ok(answers.pop())
}

pub fn meta(connection: &Connection, name: &str) -> Result<Option<String>, MemoryError> {
    let text = "SELECT value FROM meta WHERE name = ?";
    Ok(rows(connection, text, [name], |row| get(row, 0))?.pop())
}

pub fn identity(connection: &Connection) -> Result<String, MemoryError> {
    let text = "SELECT value FROM meta WHERE name = 'store'";
    connection.query_row(text, [], |row| row.get(0)).map_err(failed)
}

pub fn fetch(
    connection: &Connection,
    tenant: &TenantId,
    keys: &[Key],
    now: Timestamp,
) -> Result<Vec<Stored>, MemoryError> {
    let text = "SELECT key, record FROM memories WHERE key IN (SELECT value FROM json_each(?)) AND tenant = ?";
    let mut all = rows(connection, text, params![keys_json(keys), tenant.as_str()], stored)?;
    all.retain(|stored| stored.memory.is_live(now));
    Ok(all)
}

/// The models that have made vectors.
pub fn models(connection: &Connection) -> Result<Vec<String>, MemoryError> {
    rows(connection, "SELECT identity FROM models ORDER BY key", [], |row| {
        get(row, 0)
    })
}

/// How many vectors a model has made.
pub fn vectors_by(connection: &Connection, model: &str) -> Result<i64, MemoryError> {
    let query = format!(
        "SELECT count(*) FROM {} v JOIN memories m ON m.key = v.memory WHERE m.deleted_at IS NULL",
        vectors(connection, model)?
    );
    connection.query_row(&query, [], |row| row.get(0)).map_err(failed)
}

/// The table of a model's vectors; an empty one when nothing was stored by it.
fn vectors(connection: &Connection, model: &str) -> Result<String, MemoryError> {
    let mut statement = connection
        .prepare_cached("SELECT key FROM models WHERE identity = ?")
        .map_err(failed)?;
    let found: Option<i64> = statement
        .query_row([model], |row| row.get(0))
        .optional()
        .map_err(failed)?;
    Ok(match found {
        Some(model) => format!("vectors_{model}"),
        None => "(SELECT 0 AS memory, NULL AS code WHERE 0)".to_owned(),
    })
}

/// Hands the code of each memory to `take`, where it lies in its page.
pub fn codes(
    connection: &Connection,
    model: &str,
    keys: &[Key],
    mut take: impl FnMut(Key, &Code<&[u8]>),
) -> Result<(), MemoryError> {
    let table = vectors(connection, model)?;
    let mut statement = connection
        .prepare_cached(&format!("SELECT code FROM {table} WHERE memory = ?"))
        .map_err(failed)?;
    // In the order in which they lie.
    let mut keys = keys.to_vec();
    keys.sort_unstable();
    for key in &keys {
        let mut found = statement.query([key.0]).map_err(failed)?;
        if let Some(row) = found.next().map_err(failed)? {
            let code = Code::from_bytes(blob(row, 0)?).ok_or_else(|| damaged("vector"))?;
            take(*key, &code);
        }
    }
    Ok(())
}

pub fn events(connection: &Connection, after: Sequence, count: usize) -> Result<Vec<IndexEvent>, MemoryError> {
    let text = "SELECT sequence, memory FROM outbox WHERE sequence > ? ORDER BY sequence LIMIT ?";
    rows(connection, text, [after.0, limit(count)], |row| {
        Ok(IndexEvent {
            sequence: Sequence(get(row, 0)?),
            key: Key(get(row, 1)?),
        })
    })
}

pub fn changes(
    connection: &Connection,
    tenant: Option<&TenantId>,
    after: Sequence,
    count: usize,
) -> Result<Vec<Change>, MemoryError> {
    // A change whose version is gone is told by the removal that follows it.
    let whose = tenant.map_or("", |_| "o.tenant = ?2 AND");
    let text = format!(
        "SELECT o.sequence, o.tenant, o.kind, o.committed_at, s.path, o.id, h.record, o.resource, v.record, p.record \
                FROM outbox o LEFT JOIN scopes s ON s.key = o.scope \
                LEFT JOIN history h ON h.memory = o.id AND h.version = o.version \
                LEFT JOIN documents d ON o.resource LIKE 'document:%' AND d.path = substr(o.resource, 10) AND d.scope = o.scope \
                LEFT JOIN document_versions v ON v.document = d.key AND v.version = o.version \
                LEFT JOIN policies p ON o.resource LIKE 'policy:%' AND p.tenant = o.tenant AND p.name = substr(o.resource, 8) \
                WHERE {whose} o.sequence > ?1 AND o.kind <> 'embedded' \
                AND (o.kind = 'purged' OR o.resource IS NOT NULL OR h.record IS NOT NULL) ORDER BY o.sequence LIMIT ?3"
    );
    let bound = params![after.0, tenant.map(TenantId::as_str), limit(count)];
    rows(connection, &text, bound, change)
}

/// A JSON column that may be empty.
fn optional<T: serde::de::DeserializeOwned>(
    row: &Row<'_>,
    column: usize,
    what: &str,
) -> Result<Option<T>, MemoryError> {
    let value = row.get_ref(column).map_err(failed)?;
    let record = value.as_str_or_null().map_err(|_| damaged(what))?;
    record.map(|record| parsed(record, what)).transpose()
}

fn change(row: &Row<'_>) -> Result<Change, MemoryError> {
    let resource: Option<String> = get(row, 7)?;
    let subject = match resource.as_deref().and_then(|resource| resource.split_once(':')) {
        Some(("policy", name)) => Subject::Policy(name.to_owned(), optional(row, 9, "policy")?),
        Some(_) => Subject::Document(optional(row, 8, "document")?.ok_or_else(|| damaged("document"))?),
        None => {
            let id = blob(row, 5)?.try_into().map_err(|_| damaged("id"))?;
            Subject::Memory(MemoryId::from_bytes(id), optional(row, 6, "version")?)
        }
    };
    Ok(Change {
        sequence: Sequence(get(row, 0)?),
        tenant: text(row, 1)?.parse().map_err(|_| damaged("tenant"))?,
        kind: Kind::from_name(text(row, 2)?).ok_or_else(|| damaged("kind of change"))?,
        committed_at: Timestamp::from_micros(get(row, 3)?).ok_or_else(|| damaged("time"))?,
        scope: optional(row, 4, "scope")?.unwrap_or_default(),
        subject,
    })
}

pub fn has(connection: &Connection, place: Sequence) -> Result<bool, MemoryError> {
    let mut statement = connection
        .prepare_cached("SELECT 1 FROM outbox WHERE sequence = ?")
        .map_err(failed)?;
    Ok(place <= Sequence::default() || statement.exists([place.0]).map_err(failed)?)
}

pub fn last_sequence(connection: &Connection) -> Result<Sequence, MemoryError> {
    let mut statement = connection
        .prepare_cached("SELECT coalesce(max(sequence), 0) FROM outbox")
        .map_err(failed)?;
    statement.query_row([], |row| row.get(0)).map(Sequence).map_err(failed)
}

/// Memories that are there, with their vectors by a model.
fn state_query(connection: &Connection, model: &str) -> Result<String, MemoryError> {
    let vectors = vectors(connection, model)?;
    Ok(format!(
        "SELECT m.key, m.scope, m.tenant, m.version, m.record, v.code FROM memories m \
         LEFT JOIN {vectors} v ON v.memory = m.key WHERE m.deleted_at IS NULL"
    ))
}

fn state(row: &Row<'_>) -> Result<IndexState, MemoryError> {
    let memory: Memory = parsed(text(row, 4)?, "memory")?;
    let code = row.get_ref(5).map_err(failed)?;
    let code = code.as_blob_or_null().map_err(|_| damaged("vector"))?;
    let code = code.map(|bytes| Code::from_bytes(bytes.to_vec()).ok_or_else(|| damaged("vector")));
    Ok(IndexState {
        key: Key(get(row, 0)?),
        id: memory.id,
        scope: ScopeKey(get(row, 1)?),
        tenant: text(row, 2)?.parse().map_err(|_| damaged("tenant"))?,
        version: get(row, 3)?,
        code: code.transpose()?,
        text: memory.body.dense_text(),
        lexical: memory.body.lexical_text(),
    })
}

pub fn states(connection: &Connection, model: &str, keys: &[Key]) -> Result<Vec<IndexState>, MemoryError> {
    let query = state_query(connection, model)?;
    let text = format!("{query} AND m.key IN (SELECT value FROM json_each(?))");
    rows(connection, &text, [keys_json(keys)], state)
}

pub fn memory_state(
    connection: &Connection,
    tenant: &TenantId,
    id: MemoryId,
    model: &str,
) -> Result<Option<IndexState>, MemoryError> {
    let text = format!("{} AND m.id = ? AND m.tenant = ?", state_query(connection, model)?);
    let bound = params![id.as_bytes().as_slice(), tenant.as_str()];
    Ok(rows(connection, &text, bound, state)?.pop())
}

pub fn scan(
    connection: &Connection,
    model: &str,
    after: Key,
    count: usize,
    pending: bool,
) -> Result<Vec<IndexState>, MemoryError> {
    let only = if pending { " AND v.code IS NULL" } else { "" };
    let query = state_query(connection, model)?;
    let text = format!("{query}{only} AND m.key > ? ORDER BY m.key LIMIT ?");
    rows(connection, &text, [after.0, limit(count)], state)
}
