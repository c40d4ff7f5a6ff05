//! Documents and their versions.

use aeterna_storage::rusqlite::types::Value;
use aeterna_storage::rusqlite::{Connection, Row, params, params_from_iter};
use aeterna_types::{Scope, TenantId};
use async_trait::async_trait;

use super::read::{self, get, limit, rows, scopes_json, text};
use super::{SqliteStore, encode, parsed, storage, write};
use crate::domain::{Document, DocumentChange, Idempotency, Sequence, Writer};
use crate::error::MemoryError;
use crate::store::ledger::{self, DocumentAnswer};
use crate::store::{DocumentListing, Documents};

#[async_trait]
impl Documents for SqliteStore {
    async fn change_document(
        &self,
        writer: &Writer,
        change: DocumentChange,
    ) -> Result<(Document, Sequence), MemoryError> {
        let mut transaction = self.database.begin().await?;
        let answer = ledger::change_document(&mut write(&mut transaction, writer), change).await?;
        transaction.commit().await.map_err(storage)?;
        Ok(answer)
    }

    async fn document_replays(&self, writer: &Writer, idempotency: &Idempotency) -> Result<bool, MemoryError> {
        let (writer, idempotency) = (writer.clone(), idempotency.clone());
        let answer = move |connection: &Connection| read::replay::<DocumentAnswer>(connection, &writer, &idempotency);
        Ok(self.read(answer).await?.is_some())
    }

    async fn document(
        &self,
        tenant: &TenantId,
        scope: &Scope,
        path: &str,
        version: Option<i64>,
    ) -> Result<Option<Document>, MemoryError> {
        let (tenant, scope, path) = (tenant.clone(), encode(scope)?, path.to_owned());
        let found = move |connection: &Connection| {
            let query = "SELECT v.record, v.content FROM documents d JOIN scopes s ON s.key = d.scope \
                         JOIN document_versions v ON v.document = d.key AND v.version = coalesce(?, d.version) \
                         WHERE s.tenant = ? AND s.path = ? AND d.path = ?";
            rows(
                connection,
                query,
                params![version, tenant.as_str(), scope, path],
                |row| {
                    let mut document = document(row, 0)?;
                    document.text.content = text(row, 1)?.to_owned();
                    Ok(document)
                },
            )
        };
        Ok(self.read(found).await?.pop())
    }

    async fn documents(&self, listing: &DocumentListing) -> Result<Vec<(i64, Document)>, MemoryError> {
        let listing = listing.clone();
        let list = move |connection: &Connection| {
            let mut query = String::from(
                "SELECT d.record, d.key FROM documents d WHERE d.scope IN (SELECT value FROM json_each(?))",
            );
            let mut bound = vec![Value::from(scopes_json(&listing.scopes))];
            if !listing.prefix.is_empty() {
                // `0` is the character after `/`.
                query.push_str(" AND (d.path = ? OR (d.path > ? AND d.path < ?))");
                let prefix = listing.prefix;
                bound.extend([
                    prefix.clone().into(),
                    format!("{prefix}/").into(),
                    format!("{prefix}0").into(),
                ]);
            }
            if let Some((path, key)) = listing.after {
                query.push_str(" AND (d.path, d.key) > (?, ?)");
                bound.extend([path.into(), key.into()]);
            }
            if !listing.show_deleted {
                query.push_str(" AND d.deleted_at IS NULL");
            }
            query.push_str(" ORDER BY d.path, d.key LIMIT ?");
            bound.push(limit(listing.limit).into());
            rows(connection, &query, params_from_iter(bound), |row| {
                Ok((get(row, 1)?, document(row, 0)?))
            })
        };
        self.read(list).await
    }

    async fn document_versions(
        &self,
        tenant: &TenantId,
        scope: &Scope,
        path: &str,
        before: Option<i64>,
        most: usize,
    ) -> Result<Vec<Document>, MemoryError> {
        let (tenant, scope, path) = (tenant.clone(), encode(scope)?, path.to_owned());
        let list = move |connection: &Connection| {
            let query = "SELECT v.record FROM documents d JOIN scopes s ON s.key = d.scope \
                         JOIN document_versions v ON v.document = d.key \
                         WHERE s.tenant = ? AND s.path = ? AND d.path = ? AND v.version < ? ORDER BY v.version DESC LIMIT ?";
            let before = before.unwrap_or(i64::MAX);
            let bound = params![tenant.as_str(), scope, path, before, limit(most)];
            rows(connection, query, bound, |row| document(row, 0))
        };
        self.read(list).await
    }
}

fn document(row: &Row<'_>, column: usize) -> Result<Document, MemoryError> {
    parsed(text(row, column)?, "document")
}
