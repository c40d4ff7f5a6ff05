//! Policies.

use aeterna_storage::rusqlite::{Connection, params};
use aeterna_types::{MemoryId, Scope, TenantId, Timestamp};
use async_trait::async_trait;
use sqlx::Row as _;

use super::read::{get, limit, rows, text};
use super::write::{self, Resource};
use super::{SqliteStore, damaged, encode, parsed, storage};
use crate::domain::{Idempotency, Kind, Policy, ScopeKey, Writer};
use crate::error::MemoryError;
use crate::store::{Change, ChangeItem, Policies, Relational as _};

const FIND: &str = "SELECT record FROM policies WHERE tenant = ? AND name = ?";

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
        mut policy: Policy,
        etag: Option<String>,
        idempotency: Option<Idempotency>,
    ) -> Result<Policy, MemoryError> {
        let mut transaction = self.database.begin().await?;
        if let Some(idempotency) = &idempotency
            && let Some(earlier) = write::replay(&mut transaction, writer, idempotency).await?
        {
            return Ok(earlier);
        }
        let existing = find(&mut transaction, writer, &policy.name).await?;
        check_etag(existing.as_ref(), etag)?;
        policy.version = existing.as_ref().map_or(1, |existing| existing.version + 1);
        policy.updated_at = writer.now;
        policy.updated_by.clone_from(&writer.subject);
        sqlx::query("INSERT OR REPLACE INTO policies (tenant, name, record) VALUES (?, ?, ?)")
            .bind(writer.tenant.as_str())
            .bind(&policy.name)
            .bind(encode(&policy)?)
            .execute(&mut *transaction)
            .await
            .map_err(storage)?;
        let kind = if existing.is_some() { Kind::Updated } else { Kind::Added };
        let resource = Resource::Policy(&policy.name);
        write::resource_event(&mut transaction, writer, None, resource, policy.version, kind).await?;
        write::remember(&mut transaction, writer, idempotency.as_ref(), &policy).await?;
        transaction.commit().await.map_err(storage)?;
        Ok(policy)
    }

    async fn delete_policy(&self, writer: &Writer, name: &str, etag: Option<String>) -> Result<(), MemoryError> {
        let mut transaction = self.database.begin().await?;
        let existing = find(&mut transaction, writer, name).await?;
        let existing = existing.ok_or_else(|| MemoryError::NoPolicy(name.into()))?;
        check_etag(Some(&existing), etag)?;
        sqlx::query("DELETE FROM policies WHERE tenant = ? AND name = ?")
            .bind(writer.tenant.as_str())
            .bind(name)
            .execute(&mut *transaction)
            .await
            .map_err(storage)?;
        let (resource, version) = (Resource::Policy(name), existing.version + 1);
        write::resource_event(&mut transaction, writer, None, resource, version, Kind::Deleted).await?;
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
        let writer = write::system(tenant, now)?;
        let item = |(id, _): &(MemoryId, String)| ChangeItem {
            id: *id,
            etag: None,
            change: Change::Purge,
            idempotency: None,
        };
        self.change(&writer, due.iter().map(item).collect()).await?;
        Ok(due.len())
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
        let mut tenants: Vec<(TenantId, Vec<(ScopeKey, Scope)>)> = Vec::new();
        for (tenant, scope) in self.read(all).await? {
            match tenants.last_mut() {
                Some((last, scopes)) if *last == tenant => scopes.push(scope),
                _ => tenants.push((tenant, vec![scope])),
            }
        }
        Ok(tenants)
    }
}

async fn find(
    connection: &mut sqlx::SqliteConnection,
    writer: &Writer,
    name: &str,
) -> Result<Option<Policy>, MemoryError> {
    let row = sqlx::query(FIND)
        .bind(writer.tenant.as_str())
        .bind(name)
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    let record = row
        .as_ref()
        .map(|row| row.try_get::<&str, _>("record").map_err(storage))
        .transpose()?;
    record.map(|record| parsed(record, "policy")).transpose()
}

fn check_etag(existing: Option<&Policy>, etag: Option<String>) -> Result<(), MemoryError> {
    match etag {
        Some(etag) if existing.is_none_or(|policy| policy.etag() != etag) => Err(MemoryError::EtagMismatch),
        _ => Ok(()),
    }
}
