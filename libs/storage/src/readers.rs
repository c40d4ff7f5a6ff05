//! Connections for reading, used directly on a thread that may block: no row is handed from one thread to another.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use tokio::sync::Semaphore;

use crate::StorageError;

/// Statements that each connection keeps prepared.
const STATEMENTS: usize = 128;

/// Steps of SQLite's machine between two looks at whether somebody still waits.
const STEPS: i32 = 50_000;

/// KiB of pages that all connections keep together, unless each would have less than 2 MiB.
const CACHE: i64 = 65_536;

/// Connections that can't write, each used by one caller at a time.
#[derive(Clone, Debug)]
pub struct Readers {
    idle: Arc<Mutex<Vec<Connection>>>,
    permits: Arc<Semaphore>,
    count: u32,
    patience: Duration,
}

impl Readers {
    /// Opens `count` connections to a database that is there.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open(path: &Path, count: u32, busy_timeout: Duration) -> Result<Self, StorageError> {
        let connect = || {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(path, flags)?;
            connection.busy_timeout(busy_timeout)?;
            connection.pragma_update(None, "cache_size", -(CACHE / i64::from(count.max(1))).max(2_048))?;
            connection.pragma_update(None, "temp_store", "memory")?;
            connection.set_prepared_statement_cache_capacity(STATEMENTS);
            Ok(connection)
        };
        let connections: Result<Vec<_>, rusqlite::Error> = (0..count).map(|_| connect()).collect();
        Ok(Self {
            idle: Arc::new(Mutex::new(connections?)),
            permits: Arc::new(Semaphore::new(count as usize)),
            count,
            patience: busy_timeout + Duration::from_secs(5),
        })
    }

    /// Runs `work` with a connection, off the async threads. All of it sees one state of the database. Its statements are ended
    /// when nobody waits for it any more.
    ///
    /// # Errors
    /// What `work` says, or that no connection came free in time.
    pub async fn read<T, E, W>(&self, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StorageError> + Send + 'static,
        W: FnOnce(&Connection) -> Result<T, E> + Send + 'static,
    {
        let away = |why: &str| StorageError::Unavailable(why.into());
        let permit = tokio::time::timeout(self.patience, Arc::clone(&self.permits).acquire_owned()).await;
        let permit = permit
            .map_err(|_| away("no connection for reading came free in time"))?
            .map_err(|_| away("the store is closed"))?;
        let idle = Arc::clone(&self.idle);
        let waiting = Waiting::default();
        let gone = Arc::clone(&waiting.0);
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let connection = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = connection.ok_or_else(|| away("the store is closed"))?;
            let lent = Lent(idle, Some(connection));
            let connection = lent.1.as_ref().ok_or_else(|| away("the store is closed"))?;
            // One state of the database for all of it, and its locks are taken once.
            let transaction = connection.unchecked_transaction().map_err(StorageError::from)?;
            let _watched = Watched::begin(connection, gone).map_err(StorageError::from)?;
            work(&transaction)
        });
        let done = done.await;
        drop(waiting);
        done.map_err(|error| StorageError::Other(Box::new(error)))?
    }

    /// Waits for the readers under way, and closes all connections.
    pub async fn close(&self) {
        let all = self.permits.acquire_many(self.count).await;
        self.permits.close();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        drop(all);
    }
}

/// Somebody waits for what is read, until it is dropped.
#[derive(Default)]
struct Waiting(Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Until it is dropped, statements of a connection end soon after nobody waits for them any more.
struct Watched<'c>(&'c Connection);

impl<'c> Watched<'c> {
    fn begin(connection: &'c Connection, gone: Arc<AtomicBool>) -> rusqlite::Result<Self> {
        connection.progress_handler(STEPS, Some(move || gone.load(Ordering::Relaxed)))?;
        Ok(Self(connection))
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        // It fails only for connections that are another's.
        let _ = self.0.progress_handler(0, None::<fn() -> bool>);
    }
}

/// A connection that comes back, whatever becomes of the work.
struct Lent(Arc<Mutex<Vec<Connection>>>, Option<Connection>);

impl Drop for Lent {
    fn drop(&mut self) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        idle.extend(self.1.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_nobody_waits_for_is_ended_and_keeps_no_connection() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("some.db");
        Connection::open(&path)
            .unwrap()
            .execute_batch("CREATE TABLE t (x)")
            .unwrap();
        let readers = Readers::open(&path, 1, Duration::ZERO).unwrap();
        let ask = async |text: &'static str| {
            let one = move |connection: &Connection| -> Result<i64, StorageError> {
                Ok(connection.query_row(text, [], |row| row.get(0))?)
            };
            readers.read(one).await
        };
        let for_ever = "WITH RECURSIVE c(x) AS (VALUES(1) UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c";
        for _ in 0..3 {
            let left = tokio::time::timeout(Duration::from_millis(50), ask(for_ever)).await;
            assert!(left.is_err(), "{left:?}");
            assert_eq!(ask("SELECT 7").await.unwrap(), 7);
        }
        // One that left while it waited for the connection asks nothing.
        let (first, second) = (ask(for_ever), ask(for_ever));
        let both = async { tokio::join!(first, second) };
        assert!(tokio::time::timeout(Duration::from_millis(50), both).await.is_err());
        assert_eq!(ask("SELECT 8").await.unwrap(), 8);
        readers.close().await;
        assert!(ask("SELECT 9").await.is_err());
    }
}
