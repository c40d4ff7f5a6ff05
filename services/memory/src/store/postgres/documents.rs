//! Documents and their versions.

use aeterna_types::{Scope, TenantId};
use async_trait::async_trait;
use sqlx::postgres::PgRow;
use sqlx::{QueryBuilder, Row as _};

use super::read::{self, get, limit, scope_numbers};
use super::{PostgresStore, encode, reading, record, storage, unseal, writing};
use crate::domain::{Document, DocumentChange, Idempotency, Sequence, Writer};
use crate::error::MemoryError;
use crate::store::ledger::{self, DocumentAnswer};
use crate::store::{DocumentListing, Documents};

#[async_trait]
impl Documents for PostgresStore {
    async fn change_document(
        &self,
        writer: &Writer,
        change: DocumentChange,
    ) -> Result<(Document, Sequence), MemoryError> {
        let safe = change.idempotency.is_some();
        let answer = writing!(self, writer, safe, ledger => ledger::change_document(&mut ledger, change.clone()))?;
        self.answered_with(std::iter::once(answer.1));
        Ok(answer)
    }

    async fn document_replays(&self, writer: &Writer, idempotency: &Idempotency) -> Result<bool, MemoryError> {
        Ok(self.replayed::<DocumentAnswer>(writer, idempotency).await?.is_some())
    }

    async fn document(
        &self,
        tenant: &TenantId,
        scope: &Scope,
        path: &str,
        version: Option<i64>,
    ) -> Result<Option<Document>, MemoryError> {
        let scope = encode(scope)?;
        reading!(self, tenant.as_str(), session => async {
            let row = sqlx::query(
                "SELECT v.record, v.content FROM documents d JOIN scopes s ON s.key = d.scope \
                 JOIN document_versions v ON v.document = d.key AND v.version = coalesce($1, d.version) \
                 WHERE s.tenant = $2 AND s.path = $3 AND d.path = $4",
            )
            .bind(version)
            .bind(tenant.as_str())
            .bind(&scope)
            .bind(path)
            .fetch_optional(&mut **session)
            .await
            .map_err(storage)?;
            row.as_ref().map(whole).transpose()
        })
    }

    async fn documents(&self, listing: &DocumentListing) -> Result<Vec<(i64, Document)>, MemoryError> {
        reading!(self, listing.tenant.as_str(), session => async {
            let mut query = QueryBuilder::new("SELECT d.record, d.key FROM documents d WHERE d.scope = ANY(");
            query.push_bind(scope_numbers(&listing.scopes)).push(")");
            if !listing.prefix.is_empty() {
                // `0` is the character after `/`.
                let prefix = &listing.prefix;
                query.push(" AND (d.path = ").push_bind(prefix.clone());
                query.push(" OR (d.path > ").push_bind(format!("{prefix}/"));
                query.push(" AND d.path < ").push_bind(format!("{prefix}0")).push("))");
            }
            if let Some((path, key)) = &listing.after {
                query.push(" AND (d.path, d.key) > (").push_bind(path.clone());
                query.push(", ").push_bind(*key).push(")");
            }
            if !listing.show_deleted {
                query.push(" AND d.deleted_at IS NULL");
            }
            query.push(" ORDER BY d.path, d.key LIMIT ").push_bind(limit(listing.limit));
            read::rows(session, &mut query, |row| Ok((get(row, "key")?, document(row)?))).await
        })
    }

    async fn document_versions(
        &self,
        tenant: &TenantId,
        scope: &Scope,
        path: &str,
        before: Option<i64>,
        most: usize,
    ) -> Result<Vec<Document>, MemoryError> {
        let scope = encode(scope)?;
        reading!(self, tenant.as_str(), session => async {
            let found = sqlx::query(
                "SELECT v.record FROM documents d JOIN scopes s ON s.key = d.scope \
                 JOIN document_versions v ON v.document = d.key \
                 WHERE s.tenant = $1 AND s.path = $2 AND d.path = $3 AND v.version < $4 ORDER BY v.version DESC LIMIT $5",
            )
            .bind(tenant.as_str())
            .bind(&scope)
            .bind(path)
            .bind(before.unwrap_or(i64::MAX))
            .bind(limit(most))
            .fetch_all(&mut **session)
            .await
            .map_err(storage)?;
            found.iter().map(document).collect()
        })
    }
}

fn document(row: &PgRow) -> Result<Document, MemoryError> {
    record(row, "record", "document")
}

/// A version with its content.
pub(super) fn whole(row: &PgRow) -> Result<Document, MemoryError> {
    let mut document = document(row)?;
    let content: &str = row.try_get("content").map_err(storage)?;
    document.text.content = unseal(content).into_owned();
    Ok(document)
}
