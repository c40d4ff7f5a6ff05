//! Policies.

use aeterna_types::{MemoryId, Scope, TenantId, Timestamp};
use async_trait::async_trait;
use sqlx::{PgConnection, Row as _};

use super::read::{get, limit};
use super::{PostgresStore, SYSTEM, damaged, reading, record, storage, writing};
use crate::domain::{Idempotency, Policy, ScopeKey, Writer};
use crate::error::MemoryError;
use crate::store::{Policies, Relational as _, ledger};

async fn all(connection: &mut PgConnection, tenant: &TenantId) -> Result<Vec<Policy>, MemoryError> {
    let found = sqlx::query("SELECT record FROM policies WHERE tenant = $1 ORDER BY name COLLATE \"C\"")
        .bind(tenant.as_str())
        .fetch_all(connection)
        .await
        .map_err(storage)?;
    found.iter().map(|row| record(row, "record", "policy")).collect()
}

#[async_trait]
impl Policies for PostgresStore {
    async fn policies(&self, tenant: &TenantId) -> Result<Vec<Policy>, MemoryError> {
        // A standby may lack what another copy has acknowledged.
        reading!(by read_primary, self, tenant.as_str(), session => all(session, tenant))
    }

    async fn put_policy(
        &self,
        writer: &Writer,
        policy: Policy,
        seen: Option<String>,
        etag: Option<String>,
        idempotency: Option<Idempotency>,
    ) -> Result<Policy, MemoryError> {
        let (expected, idempotency) = ((seen.as_deref(), etag.as_deref()), idempotency.as_ref());
        writing!(self, writer, idempotency.is_some(), ledger =>
            ledger::put_policy(&mut ledger, policy.clone(), expected, idempotency))
    }

    async fn delete_policy(&self, writer: &Writer, name: &str, etag: Option<String>) -> Result<(), MemoryError> {
        let etag = etag.as_deref();
        writing!(self, writer, false, ledger => ledger::delete_policy(&mut ledger, name, etag))
    }

    async fn purge_deleted(
        &self,
        scope: ScopeKey,
        before: Timestamp,
        now: Timestamp,
        most: usize,
    ) -> Result<usize, MemoryError> {
        let due: Vec<(Vec<u8>, String)> = reading!(self, SYSTEM, session => async {
            sqlx::query_as("SELECT id, tenant FROM memories WHERE scope = $1 AND deleted_at <= $2 LIMIT $3")
                .bind(scope.0)
                .bind(before.micros())
                .bind(limit(most))
                .fetch_all(&mut **session)
                .await
                .map_err(storage)
        })?;
        let Some((_, tenant)) = due.first() else { return Ok(0) };
        let writer = ledger::system(tenant, now)?;
        let item = |(id, _): &(Vec<u8>, String)| {
            let id = id.as_slice().try_into().map_err(|_| damaged("id"))?;
            Ok(ledger::purge(MemoryId::from_bytes(id)))
        };
        let items: Result<Vec<_>, MemoryError> = due.iter().map(item).collect();
        let purged = self.change(&writer, items?).await?;
        Ok(purged.iter().filter(|purged| purged.is_ok()).count())
    }

    async fn governed(&self) -> Result<Vec<(TenantId, Vec<(ScopeKey, Scope)>)>, MemoryError> {
        let found: Vec<(TenantId, (ScopeKey, Scope))> = reading!(self, SYSTEM, session => async {
            let found = sqlx::query(
                "SELECT s.tenant, s.key, s.path FROM scopes s WHERE s.tenant IN (SELECT tenant FROM policies) \
                 AND EXISTS (SELECT 1 FROM memories m WHERE m.scope = s.key AND m.deleted_at IS NOT NULL) ORDER BY s.tenant",
            )
            .fetch_all(&mut **session)
            .await
            .map_err(storage)?;
            let one = |row: &sqlx::postgres::PgRow| {
                let tenant: &str = row.try_get("tenant").map_err(storage)?;
                let scope = (ScopeKey(get(row, "key")?), record(row, "path", "scope")?);
                Ok((tenant.parse().map_err(|_| damaged("tenant"))?, scope))
            };
            found.iter().map(one).collect()
        })?;
        Ok(ledger::by_tenant(found))
    }
}
