//! Pools, migrations and the classification of driver errors, for every service that keeps something.

mod error;
mod lock;
mod migrations;
pub mod postgres;
mod readers;
mod sqlite;

pub use error::{StorageError, classify};
pub use lock::DirectoryLock;
pub use postgres::{Attempts, Postgres, PostgresOptions, Session};
pub use readers::Readers;
pub use rusqlite;
pub use sqlite::{Sqlite, SqliteOptions};
