//! Pools, migrations and the classification of driver errors, for every service that keeps something.

mod error;
pub mod live;
mod lock;
mod migrations;
pub mod postgres;
mod readers;
mod sqlite;

pub use error::{StorageError, classify};
pub use live::{Live, MemoryLive, RedisLive, RedisOptions};
pub use lock::DirectoryLock;
pub use postgres::{Attempts, Postgres, PostgresOptions, Session};
pub use readers::Readers;
pub use rusqlite;
pub use sqlite::{Sqlite, SqliteOptions};
