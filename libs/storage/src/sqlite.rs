//! SQLite: one writer connection, several readers, WAL, embedded migrations.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Connection as _, SqliteConnection};

use crate::migrations::migrator;
use crate::{Readers, StorageError};

/// How a database is opened.
#[derive(Clone, Debug)]
pub struct SqliteOptions {
    /// The database file.
    pub path: PathBuf,
    /// How long a statement waits for a lock that another process holds.
    pub busy_timeout: Duration,
    /// Connections for reading.
    pub readers: u32,
}

/// An open database.
///
/// Writes go through one connection, so that they wait in a queue of ours and never meet SQLITE_BUSY among themselves;
/// readers see the last committed state and are never blocked. A commit is on disk before it returns
/// (`synchronous = FULL`).
#[derive(Clone, Debug)]
pub struct Sqlite {
    writer: SqlitePool,
    readers: Readers,
}

impl Sqlite {
    /// Opens the file, creating it when it is missing, and migrates it.
    ///
    /// # Errors
    /// When it can't be opened or migrated, or was written by a newer version.
    pub async fn open(
        options: &SqliteOptions,
        migrations: &'static [(&'static str, &'static str)],
    ) -> Result<Self, StorageError> {
        let connect = SqliteConnectOptions::new()
            .filename(&options.path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(options.busy_timeout)
            .foreign_keys(true)
            .pragma("cache_size", "-65536")
            // What is removed for good is overwritten in the pages that are written anyway.
            .pragma("secure_delete", "fast")
            .pragma("temp_store", "memory");
        let acquire = options.busy_timeout + Duration::from_secs(5);
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(acquire)
            .max_lifetime(None)
            .before_acquire(|connection, _| Box::pin(is_usable(connection)))
            .connect_with(connect)
            .await?;
        migrate(&writer, migrations).await?;
        let readers = Readers::open(&options.path, options.readers.max(1), options.busy_timeout)?;
        Ok(Self { writer, readers })
    }

    /// The connections for reading.
    pub fn readers(&self) -> &Readers {
        &self.readers
    }

    /// Begins a write; it has the database's write lock from the start, so that it can't fail half-way for want of it.
    ///
    /// # Errors
    /// When another process holds the lock for longer than the busy time-out.
    pub async fn begin(&self) -> Result<sqlx::Transaction<'static, sqlx::Sqlite>, StorageError> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// Closes all connections; the write-ahead log is merged into the file.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// Makes a whole copy of the database at `path`, while it is in use.
    ///
    /// # Errors
    /// When the copy can't be written.
    pub async fn copy_to(&self, path: &Path) -> Result<(), StorageError> {
        let path = path.to_string_lossy().into_owned();
        sqlx::query("VACUUM INTO ?").bind(path).execute(&self.writer).await?;
        Ok(())
    }
}

/// False for a connection that believes itself in a transaction: when the disk is full SQLite ends the transaction by itself,
/// and the driver goes on counting it. Such a connection is replaced.
async fn is_usable(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    if connection.is_in_transaction() {
        // A transaction that was dropped may still wait for its end.
        connection.ping().await?;
    }
    Ok(!connection.is_in_transaction())
}

/// Runs the migrations that are missing.
async fn migrate(pool: &SqlitePool, migrations: &'static [(&'static str, &'static str)]) -> Result<(), StorageError> {
    let known = migrations.len() as i64;
    let table = sqlx::query("SELECT 1 FROM sqlite_master WHERE name = '_sqlx_migrations'")
        .fetch_optional(pool)
        .await?;
    if table.is_some() {
        let found: Option<i64> = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations")
            .fetch_one(pool)
            .await?;
        if let Some(found) = found.filter(|found| *found > known) {
            return Err(StorageError::SchemaTooNew { found, known });
        }
    }
    migrator(migrations)
        .run(pool)
        .await
        .map_err(|error| StorageError::Broken(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &[(&str, &str)] = &[("a table", "CREATE TABLE t (x INTEGER NOT NULL UNIQUE) STRICT")];
    const TWO: &[(&str, &str)] = &[ONE[0], ("another", "CREATE TABLE u (x INTEGER NOT NULL) STRICT")];

    fn options(name: &str) -> SqliteOptions {
        let path = std::env::temp_dir().join(format!("aeterna-sqlite-{name}-{}.db", std::process::id()));
        SqliteOptions {
            path,
            busy_timeout: Duration::from_millis(200),
            readers: 2,
        }
    }

    fn remove(options: &SqliteOptions) {
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(format!("{}{suffix}", options.path.display()));
        }
    }

    #[tokio::test]
    async fn an_older_program_refuses_a_newer_schema() {
        let options = options("newer");
        Sqlite::open(&options, TWO).await.unwrap().close().await;
        let error = Sqlite::open(&options, ONE).await.unwrap_err();
        assert!(
            matches!(error, StorageError::SchemaTooNew { found: 2, known: 1 }),
            "{error:?}"
        );
        remove(&options);
    }

    #[tokio::test]
    async fn readers_can_not_write_and_conflicts_are_told_apart() {
        let options = options("kinds");
        let store = Sqlite::open(&options, ONE).await.unwrap();
        let mut write = store.begin().await.unwrap();
        sqlx::query("INSERT INTO t VALUES (1)")
            .execute(&mut *write)
            .await
            .unwrap();
        let twice = sqlx::query("INSERT INTO t VALUES (1)")
            .execute(&mut *write)
            .await
            .unwrap_err();
        assert!(matches!(StorageError::from(twice), StorageError::Conflict(_)));
        write.commit().await.unwrap();
        let refused = store.readers().read(|connection| {
            connection
                .execute("INSERT INTO t VALUES (2)", [])
                .map_err(StorageError::from)
        });
        assert!(matches!(refused.await.unwrap_err(), StorageError::Broken(_)));
        store.close().await;
        remove(&options);
    }
}
