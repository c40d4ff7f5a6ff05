//! The lexical tables: one a tenant, so that no tenant's words count in another's scores.

use std::sync::{Arc, Mutex, PoisonError};

use aeterna_storage::rusqlite::types::Value;
use aeterna_storage::rusqlite::{Connection, OptionalExtension as _, params_from_iter};
use aeterna_types::TenantId;
use sqlx::{AssertSqlSafe, Row as _, SqliteConnection};

use super::filter::Sql;
use super::read::{limit, rows};
use super::{SqliteStore, failed, parsed, storage};
use crate::domain::{Key, Memory, ScopeKey};
use crate::error::MemoryError;
use crate::store::bm25::{Counts, RANKED, rarest};
use crate::store::{Frequencies, LexicalSearch};

/// The name of a tenant's table.
pub fn table(tenant: i64) -> String {
    format!("lexical_{tenant}")
}

/// The number of a tenant that is known.
pub async fn known(connection: &mut SqliteConnection, tenant: &TenantId) -> Result<Option<i64>, MemoryError> {
    sqlx::query_scalar("SELECT key FROM tenants WHERE name = ?")
        .bind(tenant.as_str())
        .fetch_optional(connection)
        .await
        .map_err(storage)
}

/// The number of a tenant; its table is made when it is new.
pub async fn tenant(connection: &mut SqliteConnection, tenant: &TenantId) -> Result<i64, MemoryError> {
    if let Some(key) = known(connection, tenant).await? {
        return Ok(key);
    }
    let added = sqlx::query("INSERT INTO tenants (name) VALUES (?)")
        .bind(tenant.as_str())
        .execute(&mut *connection)
        .await
        .map_err(storage)?;
    let key = added.last_insert_rowid();
    create(connection, key).await?;
    Ok(key)
}

async fn create(connection: &mut SqliteConnection, tenant: i64) -> Result<(), MemoryError> {
    // The text is analysed by the program; the tokenizer only splits it at spaces again.
    let text = format!(
        "CREATE VIRTUAL TABLE {} USING fts5 (scope, body, content = '', contentless_delete = 1, tokenize = 'ascii')",
        table(tenant)
    );
    execute(connection, text).await?;
    let table = table(tenant);
    let text = format!("CREATE VIRTUAL TABLE {table}_terms USING fts5vocab ({table}, 'col')");
    execute(connection, text).await
}

async fn execute(connection: &mut SqliteConnection, text: String) -> Result<(), MemoryError> {
    let done = sqlx::query(AssertSqlSafe(text)).execute(connection).await;
    done.map(|_| ()).map_err(storage)
}

/// Indexes a memory.
pub async fn put(
    connection: &mut SqliteConnection,
    tenant: i64,
    key: Key,
    scope: ScopeKey,
    memory: &Memory,
) -> Result<(), MemoryError> {
    let text = format!("INSERT INTO {} (rowid, scope, body) VALUES (?, ?, ?)", table(tenant));
    sqlx::query(AssertSqlSafe(text))
        .bind(key.0)
        .bind(scope_mark(&scope))
        .bind(aeterna_text::analyse(&memory.body.lexical_text()).join(" "))
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(())
}

/// Takes a memory out.
pub async fn remove(connection: &mut SqliteConnection, tenant: i64, key: Key) -> Result<(), MemoryError> {
    let text = format!("DELETE FROM {} WHERE rowid = ?", table(tenant));
    let removed = sqlx::query(AssertSqlSafe(text)).bind(key.0).execute(connection).await;
    removed.map(|_| ()).map_err(storage)
}

/// How many documents have a term, as it was not long ago.
#[derive(Clone, Debug, Default)]
pub struct Cache(Arc<Mutex<Counts<Counted, i64>>>);

/// A tenant, a column and a term.
type Counted = (i64, &'static str, String);

impl Cache {
    fn with<T>(&self, work: impl FnOnce(&mut Counts<Counted, i64>) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn of(
        &self,
        connection: &Connection,
        tenant: i64,
        column: &'static str,
        term: &str,
        newest: i64,
    ) -> Result<i64, MemoryError> {
        let counted = (tenant, column, term.to_owned());
        if let Some(documents) = self.with(|counts| counts.get(&counted, newest)) {
            return Ok(documents);
        }
        let text = format!("SELECT doc FROM {}_terms WHERE term = ? AND col = ?", table(tenant));
        let mut statement = connection.prepare_cached(&text).map_err(failed)?;
        let found = statement.query_row([term, column], |row| row.get(0)).optional();
        let documents = found.map_err(failed)?.unwrap_or(0);
        self.with(|counts| counts.keep([(counted, documents)], newest));
        Ok(documents)
    }
}

fn scope_mark(scope: &ScopeKey) -> String {
    format!("s{}", scope.0)
}

/// Terms are quoted, so that no text of a caller is ever read as query syntax.
fn quoted(term: &str) -> String {
    format!("\"{}\"", term.replace('"', "\"\""))
}

/// BM25 over the visible documents. Where there are many, only as many terms count, rarest first, as bring a bounded number
/// of documents: a term that is in most of them tells little, and costs the most.
pub fn search(
    connection: &Connection,
    cache: &Cache,
    tenant: &TenantId,
    search: &LexicalSearch,
) -> Result<Vec<(Key, f64)>, MemoryError> {
    let tenant = rows(
        connection,
        "SELECT key, (SELECT count(*) FROM scopes WHERE tenant = ?1), (SELECT coalesce(max(key), 0) FROM memories) \
         FROM tenants WHERE name = ?1",
        [tenant.as_str()],
        |row| row.try_into().map_err(failed),
    )?;
    let (Some((tenant, all, newest)), false, false) = (
        tenant.into_iter().next(),
        search.scopes.is_empty(),
        search.terms.is_empty(),
    ) else {
        return Ok(Vec::new());
    };
    let mut visible: i64 = newest;
    let mut words = String::new();
    // Every document of a scope has its mark, which costs as much as a word that is everywhere.
    if i64::try_from(search.scopes.len()) != Ok(all) {
        visible = 0;
        for scope in &search.scopes {
            visible += cache.of(connection, tenant, "scope", &scope_mark(scope), newest)?;
        }
        let marks: Vec<String> = search.scopes.iter().map(|scope| quoted(&scope_mark(scope))).collect();
        words = format!("scope : ({}) AND ", marks.join(" OR "));
    }
    let mut terms = search.terms.clone();
    if visible > RANKED {
        let mut counted = Vec::with_capacity(terms.len());
        for term in terms {
            counted.push((cache.of(connection, tenant, "body", &term, newest)?, term));
        }
        terms = rarest(counted).into_iter().map(|(_, term)| term).collect();
    }
    let terms: Vec<String> = terms.iter().map(|term| quoted(term)).collect();
    words.push_str(&format!("body : ({})", terms.join(" OR ")));
    ranked(connection, tenant, search, words)
}

/// In how many of a tenant's documents terms are.
pub fn frequencies(
    connection: &Connection,
    cache: &Cache,
    tenant: &TenantId,
    terms: &[String],
) -> Result<Frequencies, MemoryError> {
    let query = "SELECT key, (SELECT count(*) FROM memories m WHERE m.tenant = ?1 AND m.deleted_at IS NULL), \
                 (SELECT coalesce(max(key), 0) FROM memories) FROM tenants WHERE name = ?1";
    let found = rows(connection, query, [tenant.as_str()], |row| {
        row.try_into().map_err(failed)
    })?;
    let Some((tenant, documents, newest)) = found.into_iter().next() else {
        return Ok(Frequencies::default());
    };
    let with = terms
        .iter()
        .map(|term| cache.of(connection, tenant, "body", term, newest));
    Ok(Frequencies {
        documents,
        with: with.collect::<Result<_, _>>()?,
    })
}

fn ranked(
    connection: &Connection,
    tenant: i64,
    search: &LexicalSearch,
    words: String,
) -> Result<Vec<(Key, f64)>, MemoryError> {
    let filter = Sql::of(search.filter.as_ref());
    let table = table(tenant);
    let (mut join, mut condition) = (String::new(), String::new());
    if search.filter.is_some() || search.as_of.is_some() {
        join = format!("JOIN memories m ON m.key = {table}.rowid JOIN scopes s ON s.key = m.scope");
        condition = format!(" AND {}", filter.text);
    }
    if search.as_of.is_some() {
        condition.push_str(
            " AND json_extract(m.record, '$.updated_at') <= ? AND coalesce(json_extract(m.record, '$.body.valid_at') <= ?, 1) \
             AND coalesce(json_extract(m.record, '$.body.invalid_at') > ?, 1)",
        );
    }
    let text = format!(
        "SELECT key, score FROM (SELECT {table}.rowid AS key, -bm25({table}, 0.0, 1.0) AS score FROM {table} {join} \
         WHERE {table} MATCH ?{condition} ORDER BY {table}.rowid DESC LIMIT {RANKED}) ORDER BY score DESC, key DESC LIMIT ?"
    );
    let mut bound = vec![Value::from(words)];
    bound.extend(filter.binds());
    bound.extend(
        search
            .as_of
            .iter()
            .flat_map(|at| [Value::from(at.micros()), at.micros().into(), at.micros().into()]),
    );
    bound.push(limit(search.limit).into());
    rows(connection, &text, params_from_iter(bound), |row| {
        let (key, score): (i64, f64) = row.try_into().map_err(failed)?;
        Ok((Key(key), score))
    })
}

/// Makes all tables anew when they were made with another version of the analysis, in one transaction.
pub async fn analyse_again(store: &SqliteStore) -> Result<(), MemoryError> {
    let mut transaction = store.database.begin().await?;
    let wanted = aeterna_text::VERSION.to_string();
    let found: Option<String> = sqlx::query_scalar("SELECT value FROM meta WHERE name = 'analysis'")
        .fetch_optional(&mut *transaction)
        .await
        .map_err(storage)?;
    if found.as_ref() == Some(&wanted) {
        return Ok(());
    }
    let tenants: Vec<(i64, String)> = sqlx::query_as("SELECT key, name FROM tenants")
        .fetch_all(&mut *transaction)
        .await
        .map_err(storage)?;
    let mut count = 0;
    for (tenant, name) in tenants {
        for name in [format!("{}_terms", table(tenant)), table(tenant)] {
            execute(&mut transaction, format!("DROP TABLE IF EXISTS {name}")).await?;
        }
        create(&mut transaction, tenant).await?;
        let mut after = 0;
        loop {
            let rows = sqlx::query(
                "SELECT key, scope, record FROM memories \
                 WHERE tenant = ? AND key > ? AND deleted_at IS NULL ORDER BY key LIMIT 1000",
            )
            .bind(&name)
            .bind(after)
            .fetch_all(&mut *transaction)
            .await
            .map_err(storage)?;
            if rows.is_empty() {
                break;
            }
            for row in rows {
                after = row.try_get("key").map_err(storage)?;
                let scope = ScopeKey(row.try_get("scope").map_err(storage)?);
                let record: &str = row.try_get("record").map_err(storage)?;
                let memory: Memory = parsed(record, "memory")?;
                put(&mut transaction, tenant, Key(after), scope, &memory).await?;
                count += 1;
            }
        }
    }
    sqlx::query("INSERT OR REPLACE INTO meta (name, value) VALUES ('analysis', ?)")
        .bind(&wanted)
        .execute(&mut *transaction)
        .await
        .map_err(storage)?;
    transaction.commit().await.map_err(storage)?;
    if count > 0 {
        tracing::info!(memories = count, version = wanted, "analysed the texts again");
    }
    Ok(())
}
