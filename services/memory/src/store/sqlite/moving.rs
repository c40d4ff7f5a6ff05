//! Moving to another store.

use aeterna_storage::rusqlite::Connection;
use aeterna_types::TenantId;
use async_trait::async_trait;

use super::read::{rows, text};
use super::{SqliteStore, damaged, storage, write};
use crate::domain::{Document, Policy, Writer};
use crate::error::MemoryError;
use crate::store::{Moving, ledger};

#[async_trait]
impl Moving for SqliteStore {
    async fn tenants(&self) -> Result<Vec<TenantId>, MemoryError> {
        let all = |connection: &Connection| {
            let query = "SELECT tenant FROM scopes UNION SELECT tenant FROM policies";
            rows(connection, query, [], |row| {
                text(row, 0)?.parse().map_err(|_| damaged("tenant"))
            })
        };
        self.read(all).await
    }

    async fn take_document(&self, writer: &Writer, versions: Vec<Document>) -> Result<bool, MemoryError> {
        let mut transaction = self.database.begin().await?;
        let taken = ledger::take_document(&mut write(&mut transaction, writer), &versions).await?;
        transaction.commit().await.map_err(storage)?;
        Ok(taken)
    }

    async fn take_policy(&self, writer: &Writer, policy: Policy) -> Result<bool, MemoryError> {
        let mut transaction = self.database.begin().await?;
        let taken = ledger::take_policy(&mut write(&mut transaction, writer), &policy).await?;
        transaction.commit().await.map_err(storage)?;
        Ok(taken)
    }
}
