//! Policies.

use aeterna_storage::rusqlite::{Connection, params};
use aeterna_types::{MemoryId, Scope, TenantId, Timestamp};
use async_trait::async_trait;

use super::read::{get, limit, rows, text};
use super::{SqliteStore, damaged, parsed, storage, write};
use crate::domain::{Idempotency, Policy, ScopeKey, Writer};
use crate::error::MemoryError;
use crate::store::{Policies, Relational as _, ledger};

#[async_trait]
impl Policies for SqliteStore {
    async fn policies(&self, tenant: &TenantId) -> Result<Vec<Policy>, MemoryError> {
        let tenant = tenant.clone();
        let all = move |connection: &Connection| {
            let query = "SELECT record FROM policies WHERE tenant = ? ORDER BY name";
            rows(connection, query, [tenant.as_str()], |row| {
                parsed(text(row, 0)?, "policy")
            })
        };
        self.read(all).await
    }

    async fn put_policy(
        &self,
        writer: &Writer,
        policy: Policy,
        seen: Option<String>,
        etag: Option<String>,
        idempotency: Option<Idempotency>,
    ) -> Result<Policy, MemoryError> {
        let mut transaction = self.database.begin().await?;
        let mut ledger = write(&mut transaction, writer);
        let expected = (seen.as_deref(), etag.as_deref());
        let policy = ledger::put_policy(&mut ledger, policy, expected, idempotency.as_ref()).await?;
        transaction.commit().await.map_err(storage)?;
        Ok(policy)
    }

    async fn delete_policy(&self, writer: &Writer, name: &str, etag: Option<String>) -> Result<(), MemoryError> {
        let mut transaction = self.database.begin().await?;
        ledger::delete_policy(&mut write(&mut transaction, writer), name, etag.as_deref()).await?;
        transaction.commit().await.map_err(storage)
    }

    async fn purge_deleted(
        &self,
        scope: ScopeKey,
        before: Timestamp,
        now: Timestamp,
        most: usize,
    ) -> Result<usize, MemoryError> {
        let due = move |connection: &Connection| {
            let query = "SELECT m.id, s.tenant FROM memories m JOIN scopes s ON s.key = m.scope \
                         WHERE m.scope = ? AND m.deleted_at <= ? LIMIT ?";
            rows(
                connection,
                query,
                params![scope.0, before.micros(), limit(most)],
                |row| {
                    let id: [u8; 16] = get(row, 0)?;
                    Ok((MemoryId::from_bytes(id), text(row, 1)?.to_owned()))
                },
            )
        };
        let due = self.read(due).await?;
        let Some((_, tenant)) = due.first() else { return Ok(0) };
        let writer = ledger::system(tenant, now)?;
        let items = due.iter().map(|(id, _)| ledger::purge(*id)).collect();
        let purged = self.change(&writer, items).await?;
        Ok(purged.iter().filter(|purged| purged.is_ok()).count())
    }

    async fn governed(&self) -> Result<Vec<(TenantId, Vec<(ScopeKey, Scope)>)>, MemoryError> {
        let all = |connection: &Connection| {
            let query = "SELECT s.tenant, s.key, s.path FROM scopes s \
                         WHERE s.tenant IN (SELECT tenant FROM policies) AND EXISTS (SELECT 1 FROM memories m \
                         WHERE m.scope = s.key AND m.deleted_at IS NOT NULL) ORDER BY s.tenant";
            rows(connection, query, [], |row| {
                let tenant: TenantId = text(row, 0)?.parse().map_err(|_| damaged("tenant"))?;
                Ok((tenant, (ScopeKey(get(row, 1)?), parsed(text(row, 2)?, "scope")?)))
            })
        };
        Ok(ledger::by_tenant(self.read(all).await?))
    }
}
