//! What a driver's error means for a caller.

use aeterna_error::{Error, Reason};
use sqlx::postgres::PgDatabaseError;

/// What went wrong in a store.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// Locked, out of connections or away: a retry may succeed.
    #[error("the store is busy or away")]
    Unavailable(#[source] Cause),
    /// A commit may or may not have happened.
    #[error("the outcome of the commit is unknown")]
    Unknown(#[source] Cause),
    /// Others were in the way, and nothing was done.
    #[error("other writers were in the way")]
    Collision(#[source] Cause),
    /// A unique index refused a row.
    #[error("a row with this key exists")]
    Conflict(#[source] Cause),
    /// The disk or a quota is full.
    #[error("the disk is full")]
    Full(#[source] Cause),
    /// The file is read-only, damaged, or no database.
    #[error("the store can't be used: {0}")]
    Broken(#[source] Cause),
    /// The store was written by a newer version.
    #[error("the store has schema {found}; this program knows {known}")]
    SchemaTooNew {
        /// Version in the store.
        found: i64,
        /// Newest version that this program knows.
        known: i64,
    },
    /// The store was not brought up to date yet.
    #[error("the store has schema {found}; this program needs {known}")]
    SchemaTooOld {
        /// Version in the store.
        found: i64,
        /// Version that this program needs.
        known: i64,
    },
    /// Anything else: a defect.
    #[error("the store failed")]
    Other(#[source] Cause),
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Sorts a driver's error by what a caller can do about it.
pub fn classify(error: sqlx::Error) -> StorageError {
    let code = error.as_database_error().and_then(|e| e.code());
    let postgres = error
        .as_database_error()
        .is_some_and(|e| e.try_downcast_ref::<PgDatabaseError>().is_some());
    let unique = error.as_database_error().is_some_and(|e| e.is_unique_violation());
    let kind = match &error {
        _ if unique => StorageError::Conflict,
        _ if postgres => of_state(code.as_deref().unwrap_or_default()),
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => StorageError::Unavailable,
        // What is broken on the way to a server is a connection; SQLite says with a code of its own what is wrong with a file.
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => StorageError::Unavailable,
        _ => of_code(code.and_then(|code| code.parse().ok())),
    };
    kind(Box::new(error))
}

/// What a state of PostgreSQL means: https://www.postgresql.org/docs/current/errcodes-appendix.html. 08 is about connections,
/// 25006 a node that turned read-only, 40 a transaction that had to give way, 53 resources, 55P03 a lock, 57 a server that goes
/// away or a time-out; 28, 3D and 42501 are matters of configuration.
fn of_state(code: &str) -> fn(Cause) -> StorageError {
    match code {
        "53100" => StorageError::Full,
        "40001" | "40P01" => StorageError::Collision,
        "25006" | "55P03" => StorageError::Unavailable,
        "42501" => StorageError::Broken,
        _ if ["08", "53", "57"].iter().any(|class| code.starts_with(class)) => StorageError::Unavailable,
        _ if ["28", "3D"].iter().any(|class| code.starts_with(class)) => StorageError::Broken,
        _ => StorageError::Other,
    }
}

/// What a result code of SQLite means. The primary code is the low byte: 5 BUSY, 6 LOCKED, 8 READONLY, 10 IOERR, 11 CORRUPT,
/// 13 FULL, 14 CANTOPEN, 26 NOTADB.
fn of_code(code: Option<u32>) -> fn(Cause) -> StorageError {
    match code.map(|code| code & 0xff) {
        Some(5 | 6) => StorageError::Unavailable,
        Some(13) => StorageError::Full,
        Some(8 | 10 | 11 | 14 | 26) => StorageError::Broken,
        _ => StorageError::Other,
    }
}

impl From<sqlx::Error> for StorageError {
    fn from(error: sqlx::Error) -> Self {
        classify(error)
    }
}

impl From<rusqlite::Error> for StorageError {
    fn from(error: rusqlite::Error) -> Self {
        let code = error.sqlite_error().map(|error| error.extended_code as u32);
        of_code(code)(Box::new(error))
    }
}

impl From<std::io::Error> for StorageError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::Full(Box::new(error)),
            _ => Self::Broken(Box::new(error)),
        }
    }
}

impl From<StorageError> for Error {
    fn from(error: StorageError) -> Self {
        let full = "the disk is full; free space and repeat the call, nothing of it was kept";
        match error {
            StorageError::Unavailable(_) => Self::unavailable("the store is busy; try again").caused_by(error),
            StorageError::Unknown(_) => Self::unavailable(
                "the store was lost while it committed: the write may or may not be there; repeat it with the same request_id, \
                 or look first",
            )
            .caused_by(error),
            StorageError::Collision(_) => Self::unavailable("too many writers at once; try again").caused_by(error),
            StorageError::Full(_) => Self::new(Reason::StorageFull, full).caused_by(error),
            StorageError::Broken(_) => Self::unavailable("the store can't be used; see the log").caused_by(error),
            StorageError::SchemaTooNew { .. } => {
                Self::new(Reason::SchemaTooNew, format!("{error}; run the newer version")).caused_by(error)
            }
            StorageError::SchemaTooOld { .. } => {
                let message = format!("{error}; set `memory.store_owner`, so that it is brought up to date");
                Self::new(Reason::NotConfigured, message).caused_by(error)
            }
            StorageError::Conflict(_) | StorageError::Other(_) => Self::internal(error),
        }
    }
}
