//! Moving to another store.

use aeterna_types::TenantId;
use async_trait::async_trait;

use super::{PostgresStore, SYSTEM, damaged, reading, storage, writing};
use crate::domain::{Document, Policy, Writer};
use crate::error::MemoryError;
use crate::store::{Moving, ledger};

#[async_trait]
impl Moving for PostgresStore {
    async fn tenants(&self) -> Result<Vec<TenantId>, MemoryError> {
        reading!(self, SYSTEM, session => async {
            let found: Vec<String> = sqlx::query_scalar("SELECT tenant FROM scopes UNION SELECT tenant FROM policies")
                .fetch_all(&mut **session)
                .await
                .map_err(storage)?;
            found.iter().map(|tenant| tenant.parse().map_err(|_| damaged("tenant"))).collect()
        })
    }

    async fn take_document(&self, writer: &Writer, versions: Vec<Document>) -> Result<bool, MemoryError> {
        // Whoever repeats it finds the place taken.
        writing!(self, writer, true, versions.len(), ledger => ledger::take_document(&mut ledger, &versions))
    }

    async fn take_policy(&self, writer: &Writer, policy: Policy) -> Result<bool, MemoryError> {
        writing!(self, writer, true, ledger => ledger::take_policy(&mut ledger, &policy))
    }
}
