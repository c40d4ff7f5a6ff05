//! The relational port on SQLite.

mod read;
mod write;

use aeterna_error::Error;
use aeterna_storage::{Sqlite, StorageError};
use aeterna_types::{Layer, MemoryId, TenantId, Timestamp};
use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::code::Code;
use super::{Addition, Change, IndexEvent, IndexState, Listing, Relational, Stored};
use crate::domain::{Idempotency, Key, Memory, ScopeKey, Sequence, View, Writer, Written};
use crate::error::MemoryError;

/// The migrations, oldest first. Those that landed never change.
pub const MIGRATIONS: &[(&str, &str)] = &[("memories", include_str!("sqlite/schema.sql"))];

/// The store.
#[derive(Clone, Debug)]
pub struct SqliteStore(pub Sqlite);

impl From<StorageError> for MemoryError {
    fn from(error: StorageError) -> Self {
        Self::Other(error.into())
    }
}

/// The driver's errors on their way out.
fn storage(error: sqlx::Error) -> MemoryError {
    MemoryError::Other(Error::from(StorageError::from(error)))
}

fn damaged(what: &str) -> MemoryError {
    MemoryError::Other(Error::internal(format!("a stored {what} can't be decoded")))
}

fn encode<T: serde::Serialize>(value: &T) -> Result<String, MemoryError> {
    serde_json::to_string(value).map_err(|error| MemoryError::Other(Error::internal(error)))
}

fn stored(row: &SqliteRow) -> Result<Stored, MemoryError> {
    let record: &str = row.try_get("record").map_err(storage)?;
    let memory: Memory = serde_json::from_str(record).map_err(|_| damaged("memory"))?;
    Ok(Stored {
        key: Key(row.try_get("key").map_err(storage)?),
        memory,
    })
}

/// `?, ?, ?` for a list of bindings.
fn marks(count: usize) -> String {
    vec!["?"; count].join(",")
}

#[async_trait]
impl Relational for SqliteStore {
    async fn add(
        &self,
        writer: &Writer,
        items: Vec<Addition>,
    ) -> Result<Vec<Result<Written, MemoryError>>, MemoryError> {
        write::add(self, writer, items).await
    }

    async fn change(
        &self,
        writer: &Writer,
        id: MemoryId,
        etag: Option<&str>,
        change: Change,
        idempotency: Option<Idempotency>,
    ) -> Result<Written, MemoryError> {
        write::change(self, writer, id, etag, change, idempotency).await
    }

    async fn replay(&self, writer: &Writer, idempotency: &Idempotency) -> Result<Option<Written>, MemoryError> {
        let mut connection = self.0.readers().acquire().await.map_err(storage)?;
        write::replay(&mut connection, writer, idempotency).await
    }

    async fn get(&self, tenant: &TenantId, id: MemoryId) -> Result<Option<Stored>, MemoryError> {
        read::get(self, tenant, id).await
    }

    async fn visible(&self, tenant: &TenantId, view: &View, layers: &[Layer]) -> Result<Vec<ScopeKey>, MemoryError> {
        read::visible(self, tenant, view, layers).await
    }

    async fn list(&self, listing: &Listing) -> Result<Vec<Stored>, MemoryError> {
        read::list(self, listing).await
    }

    async fn lexical(
        &self,
        scopes: &[ScopeKey],
        terms: &[String],
        limit: usize,
    ) -> Result<Vec<(Key, f64)>, MemoryError> {
        read::lexical(self, scopes, terms, limit).await
    }

    async fn fetch(&self, keys: &[Key], now: Timestamp) -> Result<Vec<Stored>, MemoryError> {
        read::fetch(self, keys, now).await
    }

    async fn neighbours(&self, keys: &[Key]) -> Result<Vec<(Key, Key)>, MemoryError> {
        read::neighbours(self, keys).await
    }

    async fn codes(&self, model: &str, keys: &[Key]) -> Result<Vec<(Key, Code)>, MemoryError> {
        read::codes(self, model, keys).await
    }

    async fn events(&self, after: Sequence, limit: usize) -> Result<Vec<IndexEvent>, MemoryError> {
        read::events(self, after, limit).await
    }

    async fn last_sequence(&self) -> Result<Sequence, MemoryError> {
        read::last_sequence(self).await
    }

    async fn states(&self, model: &str, keys: &[Key]) -> Result<Vec<IndexState>, MemoryError> {
        read::states(self, model, keys).await
    }

    async fn scan(&self, model: &str, after: Key, limit: usize, pending: bool) -> Result<Vec<IndexState>, MemoryError> {
        read::scan(self, model, after, limit, pending).await
    }

    async fn put_codes(&self, model: &str, codes: &[(Key, Code)]) -> Result<(), MemoryError> {
        write::put_codes(self, model, codes).await
    }

    async fn close(&self) {
        self.0.close().await;
    }
}
