//! Pools, migrations and the classification of driver errors, for every service that keeps something.

mod error;
mod lock;
mod readers;
mod sqlite;

pub use error::{StorageError, classify};
pub use lock::DirectoryLock;
pub use readers::Readers;
pub use rusqlite;
pub use sqlite::{Sqlite, SqliteOptions};
