//! The relational port on SQLite.

mod documents;
mod filter;
mod lexical;
mod moving;
mod past;
mod policies;
mod read;
mod resident;
mod search;
mod transfer;
mod words;
mod write;

use std::sync::Arc;
use std::time::Duration;

use aeterna_storage::rusqlite::Connection;
use aeterna_storage::{Sqlite, SqliteOptions, StorageError};
use aeterna_types::{Layer, MemoryId, RequestId, Scope, TenantId, Timestamp};
use async_trait::async_trait;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, SqliteConnection};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::code::Code;
use super::ledger::{self, damaged, encode, parsed};
use super::{
    Addition, AsOf, ChangeItem, Condition, Counts, ExportPage, Exported, Frequencies, Imported, Imports, IndexEvent,
    IndexState, Listing, Progress, Relational, Rescoring, Scored, Scoring, Seen, Sight, Stored,
};
use crate::domain::{self, Idempotency, Key, Memory, ScopeKey, Sequence, Version, View, Writer, Written};
use crate::error::MemoryError;
use crate::filter::Filter;
use resident::Resident;
use write::SqliteLedger;

/// The migrations, oldest first. Those that landed never change.
pub const MIGRATIONS: &[(&str, &str)] = &[
    ("memories", include_str!("sqlite/schema.sql")),
    ("a lexical table a tenant", include_str!("sqlite/schema_2.sql")),
    ("changes that outlive their memory", include_str!("sqlite/schema_3.sql")),
    (
        "vectors in the pages of their rows",
        include_str!("sqlite/schema_4.sql"),
    ),
    ("policies, documents, imports", include_str!("sqlite/schema_5.sql")),
    (
        "answers by memory, refusals of imports",
        include_str!("sqlite/schema_6.sql"),
    ),
    ("changes by tenant", include_str!("sqlite/schema_7.sql")),
];

/// The store.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    database: Sqlite,
    frequencies: lexical::Cache,
    resident: Arc<Resident>,
    /// Searches read much: they leave half of the connections to what is quickly read.
    searches: Arc<Semaphore>,
    /// How long a search waits for its turn.
    patience: Duration,
}

impl SqliteStore {
    /// Opens the database, and brings its schema and its lexical tables up to date. About `cache` bytes of what searches read
    /// most are kept in memory, beside the database's own pages.
    ///
    /// # Errors
    /// When it can't be opened, or was written by a newer version.
    pub async fn open(options: &SqliteOptions, cache: u64) -> Result<Self, MemoryError> {
        let database = Sqlite::open(options, MIGRATIONS).await?;
        let last = database.readers().read(read::last_sequence).await?;
        let store = Self {
            database,
            resident: Arc::new(Resident::new(cache, last)),
            frequencies: lexical::Cache::default(),
            searches: Arc::new(Semaphore::new(options.readers.div_ceil(2) as usize)),
            patience: options.busy_timeout + Duration::from_secs(5),
        };
        lexical::analyse_again(&store).await?;
        Ok(store)
    }

    /// About how many bytes of what searches read most are in memory.
    pub fn cached_bytes(&self) -> usize {
        self.resident.bytes()
    }

    /// The right to read much; it is held until the reading is done, even when nobody waits for it any more.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, MemoryError> {
        let turn = tokio::time::timeout(self.patience, Arc::clone(&self.searches).acquire_owned()).await;
        let away = |why: &str| MemoryError::from(StorageError::Unavailable(why.into()));
        turn.map_err(|_| away("too much is read at once; try again later"))?
            .map_err(|_| away("the store is closed"))
    }

    /// The same for what reads much.
    async fn read_much<T, W>(&self, work: W) -> Result<T, MemoryError>
    where
        T: Send + 'static,
        W: FnOnce(&Connection) -> Result<T, MemoryError> + Send + 'static,
    {
        self.read_in_turn(true, work).await
    }

    /// The same for what may read much or not.
    async fn read_in_turn<T, W>(&self, much: bool, work: W) -> Result<T, MemoryError>
    where
        T: Send + 'static,
        W: FnOnce(&Connection) -> Result<T, MemoryError> + Send + 'static,
    {
        let turn = if much { Some(self.turn().await?) } else { None };
        let work = move |connection: &Connection| {
            let _turn = turn;
            work(connection)
        };
        self.read(work).await
    }

    async fn read<T, W>(&self, work: W) -> Result<T, MemoryError>
    where
        T: Send + 'static,
        W: FnOnce(&Connection) -> Result<T, MemoryError> + Send + 'static,
    {
        self.database.readers().read(work).await
    }
}

/// The driver's errors on their way out.
fn storage(error: sqlx::Error) -> MemoryError {
    StorageError::from(error).into()
}

/// The reading driver's errors on their way out.
fn failed(error: aeterna_storage::rusqlite::Error) -> MemoryError {
    StorageError::from(error).into()
}

/// A write under way.
fn write<'t>(connection: &'t mut SqliteConnection, writer: &'t Writer) -> SqliteLedger<'t> {
    SqliteLedger { connection, writer }
}

fn stored(row: &SqliteRow) -> Result<Stored, MemoryError> {
    let record: &str = row.try_get("record").map_err(storage)?;
    let memory = parsed(record, "memory")?;
    Ok(Stored {
        key: Key(row.try_get("key").map_err(storage)?),
        memory,
    })
}

#[async_trait]
impl Relational for SqliteStore {
    async fn add(
        &self,
        writer: &Writer,
        items: Vec<Addition>,
    ) -> Result<Vec<Result<Written, MemoryError>>, MemoryError> {
        let mut transaction = self.database.begin().await?;
        let results = ledger::add(&mut write(&mut transaction, writer), items).await?;
        transaction.commit().await.map_err(storage)?;
        Ok(results)
    }

    async fn change(
        &self,
        writer: &Writer,
        items: Vec<ChangeItem>,
    ) -> Result<Vec<Result<Written, MemoryError>>, MemoryError> {
        let mut transaction = self.database.begin().await?;
        let results = ledger::change(&mut write(&mut transaction, writer), items).await?;
        transaction.commit().await.map_err(storage)?;
        Ok(results)
    }

    async fn history(
        &self,
        tenant: &TenantId,
        id: MemoryId,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Version>, MemoryError> {
        let tenant = tenant.clone();
        self.read(move |connection| read::history(connection, &tenant, id, before, limit))
            .await
    }

    async fn counts(
        &self,
        _: &TenantId,
        model: &str,
        scopes: &[ScopeKey],
        now: Timestamp,
    ) -> Result<Counts, MemoryError> {
        let (model, scopes) = (model.to_owned(), scopes.to_vec());
        self.read_much(move |connection| read::counts(connection, &model, &scopes, now))
            .await
    }

    async fn replay(&self, writer: &Writer, idempotency: &Idempotency) -> Result<Option<Written>, MemoryError> {
        let (writer, idempotency) = (writer.clone(), idempotency.clone());
        self.read(move |connection| read::replay(connection, &writer, &idempotency))
            .await
    }

    async fn known(&self, tenant: &TenantId, places: &[(Scope, [u8; 32])]) -> Result<Vec<bool>, MemoryError> {
        let (tenant, places) = (tenant.clone(), places.to_vec());
        self.read(move |connection| read::known(connection, &tenant, &places))
            .await
    }

    async fn get(&self, tenant: &TenantId, id: MemoryId) -> Result<Option<Stored>, MemoryError> {
        let tenant = tenant.clone();
        self.read(move |connection| read::memory(connection, &tenant, id)).await
    }

    async fn past(&self, tenant: &TenantId, id: MemoryId, at: Timestamp) -> Result<Option<Memory>, MemoryError> {
        let tenant = tenant.clone();
        self.read(move |connection| past::memory(connection, &tenant, id, at))
            .await
    }

    async fn as_of(
        &self,
        _: &TenantId,
        scopes: &[ScopeKey],
        filter: Option<&Filter>,
        at: Timestamp,
        limit: usize,
    ) -> Result<AsOf, MemoryError> {
        let (scopes, filter) = (scopes.to_vec(), filter.cloned());
        self.read_much(move |connection| past::as_of(connection, &scopes, filter.as_ref(), at, limit))
            .await
    }

    async fn frequencies(&self, tenant: &TenantId, terms: &[String]) -> Result<Frequencies, MemoryError> {
        let (tenant, terms, cache) = (tenant.clone(), terms.to_vec(), self.frequencies.clone());
        self.read(move |connection| lexical::frequencies(connection, &cache, &tenant, &terms))
            .await
    }

    async fn visible(&self, tenant: &TenantId, view: &View, layers: &[Layer]) -> Result<Vec<ScopeKey>, MemoryError> {
        let (tenant, view, layers) = (tenant.clone(), view.clone(), layers.to_vec());
        self.read(move |connection| read::visible(connection, &tenant, &view, &layers))
            .await
    }

    async fn list(&self, listing: &Listing) -> Result<Vec<Stored>, MemoryError> {
        let listing = listing.clone();
        let much = listing.filter.is_some() || listing.as_of.is_some();
        let list = move |connection: &Connection| read::list(connection, &listing);
        self.read_in_turn(much, list).await
    }

    async fn seen(&self, sight: &Sight) -> Result<Seen, MemoryError> {
        let sight = sight.clone();
        // What a filter chooses may take long to read; the rest does not.
        let filtered = sight.filter.is_some();
        let seen = move |connection: &Connection| search::seen(connection, &sight);
        self.read_in_turn(filtered, seen).await
    }

    async fn scored(&self, scoring: &Scoring) -> Result<Scored, MemoryError> {
        if scoring.lexical.is_some() && self.resident.begins() {
            tokio::spawn(Resident::fill(self.clone()));
        }
        let (scoring, frequencies) = (scoring.clone(), self.frequencies.clone());
        let resident = Arc::clone(&self.resident);
        self.read_much(move |connection| search::scored(connection, (&frequencies, &resident), &scoring))
            .await
    }

    async fn fetch(&self, tenant: &TenantId, keys: &[Key], now: Timestamp) -> Result<Vec<Stored>, MemoryError> {
        let (tenant, keys) = (tenant.clone(), keys.to_vec());
        self.read(move |connection| read::fetch(connection, &tenant, &keys, now))
            .await
    }

    async fn cosines(&self, _: &TenantId, rescoring: &Rescoring) -> Result<Vec<(Key, f32)>, MemoryError> {
        let (rescoring, resident) = (rescoring.clone(), Arc::clone(&self.resident));
        let cosines = move |connection: &Connection| {
            let follows = resident.follow(connection);
            resident.cosines(connection, &rescoring, follows)
        };
        self.read(cosines).await
    }

    async fn vectors(
        &self,
        _: Option<&TenantId>,
        model: &str,
        keys: &[Key],
    ) -> Result<Vec<(Key, Vec<f32>)>, MemoryError> {
        let (model, keys) = (model.to_owned(), keys.to_vec());
        let vectors = move |connection: &Connection| {
            let mut vectors = Vec::with_capacity(keys.len());
            read::codes(connection, &model, &keys, |key, code| {
                vectors.push((key, code.decode()))
            })?;
            Ok(vectors)
        };
        self.read(vectors).await
    }

    async fn events(&self, after: Sequence, limit: usize) -> Result<Vec<IndexEvent>, MemoryError> {
        let resident = Arc::clone(&self.resident);
        let events = move |connection: &Connection| {
            // Whoever follows the outbox saves the searches the work.
            resident.follow(connection);
            read::events(connection, after, limit)
        };
        self.read(events).await
    }

    async fn changes(
        &self,
        tenant: Option<&TenantId>,
        after: Sequence,
        limit: usize,
    ) -> Result<Vec<domain::Change>, MemoryError> {
        let tenant = tenant.cloned();
        self.read(move |connection| read::changes(connection, tenant.as_ref(), after, limit))
            .await
    }

    async fn has(&self, place: Sequence) -> Result<bool, MemoryError> {
        self.read(move |connection| read::has(connection, place)).await
    }

    async fn last_sequence(&self) -> Result<Sequence, MemoryError> {
        self.read(read::last_sequence).await
    }

    /// A read sees the last committed state.
    async fn reach(&self, _: Sequence) -> Result<(), MemoryError> {
        Ok(())
    }

    async fn states(&self, model: &str, keys: &[Key]) -> Result<Vec<IndexState>, MemoryError> {
        let (model, keys) = (model.to_owned(), keys.to_vec());
        self.read(move |connection| read::states(connection, &model, &keys))
            .await
    }

    async fn state(&self, tenant: &TenantId, id: MemoryId, model: &str) -> Result<Option<IndexState>, MemoryError> {
        let (tenant, model) = (tenant.clone(), model.to_owned());
        self.read(move |connection| read::memory_state(connection, &tenant, id, &model))
            .await
    }

    async fn scan(&self, model: &str, after: Key, limit: usize, pending: bool) -> Result<Vec<IndexState>, MemoryError> {
        let model = model.to_owned();
        self.read(move |connection| read::scan(connection, &model, after, limit, pending))
            .await
    }

    async fn put_codes(
        &self,
        model: &str,
        codes: &[(MemoryId, i64, Code)],
        now: Timestamp,
    ) -> Result<usize, MemoryError> {
        write::put_codes(self, model, codes, now).await
    }

    async fn export(&self, page: &ExportPage) -> Result<Vec<Exported>, MemoryError> {
        let page = page.clone();
        self.read_much(move |connection| transfer::export(connection, &page))
            .await
    }

    async fn import(
        &self,
        writer: &Writer,
        id: &RequestId,
        items: Vec<(i64, Imported)>,
        progress: &mut Progress,
    ) -> Result<Imports, MemoryError> {
        let mut transaction = self.database.begin().await?;
        let results = ledger::import(&mut write(&mut transaction, writer), id.as_str(), items, progress).await?;
        transaction.commit().await.map_err(storage)?;
        Ok(results)
    }

    async fn import_progress(&self, writer: &Writer, id: &RequestId) -> Result<Option<Progress>, MemoryError> {
        let (writer, id) = (writer.clone(), id.clone());
        self.read(move |connection| transfer::progress(connection, &writer, &id))
            .await
    }

    async fn end_import(&self, writer: &Writer, id: &RequestId) -> Result<(), MemoryError> {
        let mut transaction = self.database.begin().await?;
        sqlx::query("DELETE FROM imports WHERE tenant = ? AND subject = ? AND id = ?")
            .bind(writer.tenant.as_str())
            .bind(&writer.subject)
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await
            .map_err(storage)?;
        transaction.commit().await.map_err(storage)
    }

    async fn models(&self) -> Result<Vec<String>, MemoryError> {
        self.read(read::models).await
    }

    async fn vectors_by(&self, model: &str) -> Result<i64, MemoryError> {
        let model = model.to_owned();
        self.read(move |connection| read::vectors_by(connection, &model)).await
    }

    async fn forget_model(&self, model: &str) -> Result<(), MemoryError> {
        write::forget_model(self, model).await?;
        let (resident, model) = (Arc::clone(&self.resident), model.to_owned());
        let forgotten = tokio::task::spawn_blocking(move || resident.forget_model(&model)).await;
        forgotten.map_err(|error| StorageError::Other(Box::new(error)).into())
    }

    async fn reap(&self, now: Timestamp, limit: usize) -> Result<usize, MemoryError> {
        write::reap(self, now, limit).await
    }

    async fn identity(&self) -> Result<String, MemoryError> {
        self.read(read::identity).await
    }

    async fn note(&self, name: &str) -> Result<Option<String>, MemoryError> {
        let name = format!("note:{name}");
        self.read(move |connection| read::meta(connection, &name)).await
    }

    async fn put_note(&self, name: &str, value: &str) -> Result<(), MemoryError> {
        let mut transaction = self.database.begin().await?;
        sqlx::query("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)")
            .bind(format!("note:{name}"))
            .bind(value)
            .execute(&mut *transaction)
            .await
            .map_err(storage)?;
        transaction.commit().await.map_err(storage)
    }

    fn condition(&self) -> Condition {
        Condition::Well
    }

    async fn close(&self) {
        self.database.close().await;
    }
}

#[cfg(test)]
mod tests {
    use aeterna_storage::SqliteOptions;

    use super::*;

    /// Bytes kept in memory.
    const CACHE: u64 = 1 << 24;

    fn options(dir: &tempfile::TempDir) -> SqliteOptions {
        SqliteOptions {
            path: dir.path().join("memory.db"),
            busy_timeout: Duration::from_secs(5),
            readers: 2,
        }
    }

    #[tokio::test]
    async fn conforms() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir);
        let store = SqliteStore::open(&options, CACHE).await.unwrap();
        super::super::conformance::relational(Arc::new(store.clone())).await;
        store.close().await;
    }

    #[tokio::test]
    async fn texts_are_analysed_again_when_the_analysis_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(&dir);
        // With nothing kept in memory: the tables themselves are asked.
        let store = SqliteStore::open(&options, 0).await.unwrap();
        super::super::conformance::one_memory(&store, "the cat sat").await;
        let mut write = store.database.begin().await.unwrap();
        for text in [
            "DELETE FROM lexical_1",
            "UPDATE meta SET value = '0' WHERE name = 'analysis'",
        ] {
            sqlx::query(text).execute(&mut *write).await.unwrap();
        }
        write.commit().await.unwrap();
        assert_eq!(super::super::conformance::words_found(&store, "cat").await, 0);
        store.close().await;
        let store = SqliteStore::open(&options, 0).await.unwrap();
        assert_eq!(super::super::conformance::words_found(&store, "cat").await, 1);
        store.close().await;
    }
}
