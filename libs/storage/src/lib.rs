//! Pools, migrations and the classification of driver errors, for every service that keeps something.

pub mod cache;
mod error;
pub mod live;
mod lock;
mod migrations;
pub mod postgres;
mod readers;
mod redis;
mod sqlite;

pub use cache::{Cache, RedisCache};
pub use error::{StorageError, classify};
pub use live::{Live, MemoryLive, RedisLive};
pub use lock::DirectoryLock;
pub use postgres::{Attempts, Postgres, PostgresOptions, Session};
pub use readers::Readers;
pub use redis::RedisOptions;
pub use rusqlite;
pub use sqlite::{Sqlite, SqliteOptions};
