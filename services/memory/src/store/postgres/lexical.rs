//! The lexical arm: BM25 over our own analysis, by the tenant's own statistics.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use aeterna_types::TenantId;
use sqlx::{PgConnection, Postgres, QueryBuilder, Row as _};

use super::read::{limit, numbers};
use super::{filter, storage};
use crate::domain::{Key, Memory, ScopeKey};
use crate::error::MemoryError;
use crate::store::bm25::{Counts, RANKED, rarest, rarity};
use crate::store::{Frequencies, LexicalSearch};

/// What is stored of a memory's text.
#[derive(Debug)]
pub struct Terms {
    /// Terms, each as often as it is there, and the scope.
    pub length: i32,
    /// Each once.
    pub terms: Vec<String>,
    /// How often each is there.
    pub counts: Vec<i32>,
}

impl Terms {
    /// Of a memory in a scope.
    pub fn of(tenant: i64, scope: ScopeKey, memory: &Memory) -> Self {
        let mut counts: BTreeMap<String, i32> = BTreeMap::new();
        let terms = aeterna_text::analyse(&memory.body.lexical_text());
        // The scope counts in the length, as it does in SQLite's tables.
        let length = i32::try_from(terms.len() + 1).unwrap_or(i32::MAX);
        for text in terms {
            *counts.entry(term(tenant, &text)).or_default() += 1;
        }
        counts.insert(mark(tenant, scope), 0);
        let (terms, counts) = counts.into_iter().unzip();
        Self { length, terms, counts }
    }
}

fn term(tenant: i64, text: &str) -> String {
    format!("{tenant}:{}", super::seal(text))
}

fn mark(tenant: i64, scope: ScopeKey) -> String {
    format!("{tenant}#{}", scope.0)
}

/// The number of a tenant, which is made when it is new.
pub async fn tenant(connection: &mut PgConnection, tenant: &TenantId) -> Result<i64, MemoryError> {
    if let Some(key) = known(connection, tenant).await? {
        return Ok(key);
    }
    sqlx::query_scalar("INSERT INTO tenants (tenant) VALUES ($1) RETURNING key")
        .bind(tenant.as_str())
        .fetch_one(connection)
        .await
        .map_err(storage)
}

async fn known(connection: &mut PgConnection, tenant: &TenantId) -> Result<Option<i64>, MemoryError> {
    sqlx::query_scalar("SELECT key FROM tenants WHERE tenant = $1")
        .bind(tenant.as_str())
        .fetch_optional(connection)
        .await
        .map_err(storage)
}

/// Indexes a memory, in place of what was indexed of it.
pub async fn put(
    connection: &mut PgConnection,
    tenant: &str,
    key: Key,
    scope: ScopeKey,
    terms: Terms,
) -> Result<(), MemoryError> {
    sqlx::query(
        "INSERT INTO texts (memory, tenant, scope, length, terms, counts) VALUES ($1, $2, $3, $4, $5, $6) \
         ON CONFLICT (memory) DO UPDATE SET length = $4, terms = $5, counts = $6",
    )
    .bind(key.0)
    .bind(tenant)
    .bind(scope.0)
    .bind(terms.length)
    .bind(terms.terms)
    .bind(terms.counts)
    .execute(connection)
    .await
    .map_err(storage)?;
    Ok(())
}

/// What was counted not long ago.
#[derive(Clone, Debug, Default)]
pub struct Cache(Arc<Mutex<Remembered>>);

#[derive(Debug, Default)]
struct Remembered {
    /// Documents that have a term or a mark.
    terms: Counts<String, i64>,
    /// Documents of a tenant, and how long they are on average.
    tenants: Counts<i64, (i64, f64)>,
}

impl Cache {
    fn with<T>(&self, work: impl FnOnce(&mut Remembered) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// In how many documents terms or marks are.
    async fn of(&self, connection: &mut PgConnection, terms: &[String], newest: i64) -> Result<Vec<i64>, MemoryError> {
        let known: Vec<Option<i64>> =
            self.with(|counts| terms.iter().map(|term| counts.terms.get(term, newest)).collect());
        let unknown = terms.iter().zip(&known).filter(|(_, count)| count.is_none());
        let missing: Vec<&String> = unknown.map(|(term, _)| term).collect();
        let mut found = HashMap::new();
        if !missing.is_empty() {
            let counted: Vec<(String, i64)> = sqlx::query_as("SELECT term, documents FROM documents_with($1)")
                .bind(&missing)
                .fetch_all(connection)
                .await
                .map_err(storage)?;
            found.extend(counted.iter().cloned());
            self.with(|counts| counts.terms.keep(counted, newest));
        }
        let count = |(term, known): (&String, Option<i64>)| known.or_else(|| found.get(term).copied()).unwrap_or(0);
        Ok(terms.iter().zip(known).map(count).collect())
    }

    /// Documents of a tenant, and how long they are on average.
    async fn all(
        &self,
        connection: &mut PgConnection,
        tenant: &TenantId,
        key: i64,
        newest: i64,
    ) -> Result<(i64, f64), MemoryError> {
        let known = self.with(|counts| counts.tenants.get(&key, newest));
        if let Some(known) = known {
            return Ok(known);
        }
        let value: (i64, f64) =
            sqlx::query_as("SELECT count(*), coalesce(avg(length), 1)::float8 FROM texts WHERE tenant = $1")
                .bind(tenant.as_str())
                .fetch_one(connection)
                .await
                .map_err(storage)?;
        self.with(|counts| counts.tenants.keep([(key, value)], newest));
        Ok(value)
    }
}

async fn newest(connection: &mut PgConnection) -> Result<i64, MemoryError> {
    let query = sqlx::query_scalar("SELECT newest_memory()");
    query.fetch_one(connection).await.map_err(storage)
}

/// BM25 over the visible documents. Where there are many, only as many terms count, rarest first, as bring a bounded number
/// of documents: a term that is in most of them tells little, and costs the most.
pub async fn search(
    connection: &mut PgConnection,
    cache: &Cache,
    tenant: &TenantId,
    search: &LexicalSearch,
) -> Result<Vec<(Key, f64)>, MemoryError> {
    let row = sqlx::query(
        "SELECT key, (SELECT count(*) FROM scopes WHERE tenant = $1) AS scopes, newest_memory() AS newest \
         FROM tenants WHERE tenant = $1",
    )
    .bind(tenant.as_str())
    .fetch_optional(&mut *connection)
    .await
    .map_err(storage)?;
    let (Some(row), false, false) = (row, search.scopes.is_empty(), search.terms.is_empty()) else {
        return Ok(Vec::new());
    };
    let key: i64 = row.try_get("key").map_err(storage)?;
    let (scopes, newest): (i64, i64) = (
        row.try_get("scopes").map_err(storage)?,
        row.try_get("newest").map_err(storage)?,
    );
    let (documents, average) = cache.all(connection, tenant, key, newest).await?;
    let mut visible = documents;
    let mut marks: Option<Vec<String>> = None;
    if i64::try_from(search.scopes.len()) != Ok(scopes) {
        let all: Vec<String> = search.scopes.iter().map(|scope| mark(key, *scope)).collect();
        visible = cache.of(connection, &all, newest).await?.into_iter().sum();
        marks = Some(all);
    }
    let terms: Vec<String> = search.terms.iter().map(|text| term(key, text)).collect();
    let counts = cache.of(connection, &terms, newest).await?;
    let mut counted: Vec<(i64, String)> = counts.into_iter().zip(terms).collect();
    if visible > RANKED && search.candidates.is_none() {
        counted = rarest(counted);
    }
    let weighed = counted
        .into_iter()
        .map(|(count, term)| (term, rarity(documents, count)));
    let (terms, weights): (Vec<String>, Vec<f64>) = weighed.unzip();
    let narrowed = search.filter.is_some() || search.as_of.is_some();
    let mut query: QueryBuilder<Postgres> = QueryBuilder::new("SELECT r.memory, r.score FROM ");
    query.push(if search.candidates.is_some() {
        "ranked_of("
    } else {
        "ranked("
    });
    query.push_bind(terms).push(", ").push_bind(weights);
    query.push(", ").push_bind(average).push(", ").push_bind(marks);
    query.push(", ");
    match &search.candidates {
        Some(candidates) => query.push_bind(numbers(candidates)),
        None => query.push_bind(if narrowed { i64::MAX } else { RANKED }),
    };
    query.push(") r");
    if narrowed {
        query.push(" JOIN memories m ON m.key = r.memory JOIN scopes s ON s.key = m.scope WHERE ");
        filter::push(&mut query, search.filter.as_ref());
    }
    if let Some(at) = search.as_of {
        query
            .push(" AND (m.record ->> 'updated_at')::bigint <= ")
            .push_bind(at.micros());
        super::past::true_at(&mut query, at);
    }
    query.push(" ORDER BY r.score DESC, r.memory DESC LIMIT ");
    query.push_bind(limit(search.limit));
    let found: Vec<(i64, f64)> = query
        .build_query_as()
        .persistent(false)
        .fetch_all(connection)
        .await
        .map_err(storage)?;
    Ok(found.into_iter().map(|(key, score)| (Key(key), score)).collect())
}

/// In how many of a tenant's documents terms are.
pub async fn frequencies(
    connection: &mut PgConnection,
    cache: &Cache,
    tenant: &TenantId,
    terms: &[String],
) -> Result<Frequencies, MemoryError> {
    let Some(key) = known(connection, tenant).await? else {
        return Ok(Frequencies::default());
    };
    let newest = newest(connection).await?;
    let (documents, _) = cache.all(connection, tenant, key, newest).await?;
    let terms: Vec<String> = terms.iter().map(|text| term(key, text)).collect();
    let with = cache.of(connection, &terms, newest).await?;
    Ok(Frequencies { documents, with })
}

/// Analyses the texts of some memories again, in the order of their numbers; the last of them, or none when that was all.
pub async fn analyse_some(connection: &mut PgConnection, after: i64) -> Result<Option<i64>, MemoryError> {
    let rows = sqlx::query(
        "SELECT m.key, m.scope, m.tenant, t.key AS number, m.record::text FROM memories m JOIN tenants t ON t.tenant = m.tenant \
         WHERE m.key > $1 AND m.deleted_at IS NULL ORDER BY m.key LIMIT 1000 FOR UPDATE OF m",
    )
    .bind(after)
    .fetch_all(&mut *connection)
    .await
    .map_err(storage)?;
    let mut last = None;
    for row in &rows {
        let (key, memory) = super::keyed(row)?;
        let scope = ScopeKey(row.try_get("scope").map_err(storage)?);
        let terms = Terms::of(row.try_get("number").map_err(storage)?, scope, &memory);
        put(connection, row.try_get("tenant").map_err(storage)?, key, scope, terms).await?;
        last = Some(key.0);
    }
    Ok(last)
}
