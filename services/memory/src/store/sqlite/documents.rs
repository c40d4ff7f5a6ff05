//! Documents and their versions.

use aeterna_storage::rusqlite::types::Value;
use aeterna_storage::rusqlite::{Connection, Row, params, params_from_iter};
use aeterna_types::{Scope, TenantId};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use sqlx::SqliteConnection;

use super::read::{self, get, limit, rows, scopes_json, text};
use super::write::{self, Resource};
use super::{SqliteStore, encode, parsed, storage};
use crate::domain::{Document, DocumentChange, Edit, Idempotency, Kind, ScopeKey, Sequence, Text, Writer};
use crate::error::MemoryError;
use crate::store::{DocumentListing, Documents};

/// What a write answered: the version, without its content.
#[derive(Serialize, Deserialize)]
struct Answer {
    key: i64,
    document: Document,
    sequence: Sequence,
}

#[async_trait]
impl Documents for SqliteStore {
    async fn change_document(
        &self,
        writer: &Writer,
        change: DocumentChange,
    ) -> Result<(Document, Sequence), MemoryError> {
        let mut transaction = self.database.begin().await?;
        let connection = &mut *transaction;
        if let Some(idempotency) = &change.idempotency
            && let Some(earlier) = write::replay::<Answer>(connection, writer, idempotency).await?
        {
            let mut document = earlier.document;
            document.text = version(connection, earlier.key, document.version).await?;
            return Ok((document, earlier.sequence));
        }
        let scope = write::scope_key(connection, writer, &change.scope).await?;
        let existing = newest(connection, scope, &change.path).await?;
        let fits = |etag: &String| existing.as_ref().is_some_and(|(_, document)| document.etag() == *etag);
        if change.etag.as_ref().is_some_and(|etag| !fits(etag)) {
            return Err(MemoryError::EtagMismatch);
        }
        let there = || {
            existing
                .as_ref()
                .ok_or_else(|| MemoryError::NoDocument(change.path.clone()))
        };
        let (text, deleted, kind) = match change.edit {
            Edit::Put(text) => {
                let kind = if existing.is_some() { Kind::Updated } else { Kind::Added };
                (*text, false, kind)
            }
            Edit::Restore(number) => (version(connection, there()?.0, number).await?, false, Kind::Updated),
            Edit::Delete => {
                let (key, document) = there()?;
                if document.deleted_at.is_some() {
                    return Err(MemoryError::Deleted);
                }
                (version(connection, *key, document.version).await?, true, Kind::Deleted)
            }
        };
        let document = Document {
            scope: change.scope,
            path: change.path,
            text,
            version: existing.as_ref().map_or(1, |(_, document)| document.version + 1),
            created_at: existing
                .as_ref()
                .map_or(writer.now, |(_, document)| document.created_at),
            updated_at: writer.now,
            updated_by: writer.subject.clone(),
            deleted_at: deleted.then_some(writer.now),
        };
        let key = put(connection, existing.map(|(key, _)| key), scope, &document).await?;
        let resource = Resource::Document(&document.path);
        let sequence = write::resource_event(connection, writer, Some(scope), resource, document.version, kind).await?;
        let answer = Answer {
            key,
            document,
            sequence,
        };
        write::remember(connection, writer, change.idempotency.as_ref(), &answer).await?;
        transaction.commit().await.map_err(storage)?;
        Ok((answer.document, sequence))
    }

    async fn document_replays(&self, writer: &Writer, idempotency: &Idempotency) -> Result<bool, MemoryError> {
        let (writer, idempotency) = (writer.clone(), idempotency.clone());
        let answer = move |connection: &Connection| read::replay::<Answer>(connection, &writer, &idempotency);
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

async fn newest(
    connection: &mut SqliteConnection,
    scope: ScopeKey,
    path: &str,
) -> Result<Option<(i64, Document)>, MemoryError> {
    let row = sqlx::query("SELECT key, record FROM documents WHERE path = ? AND scope = ?")
        .bind(path)
        .bind(scope.0)
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    let Some(row) = row else { return Ok(None) };
    let record: &str = row.try_get("record").map_err(storage)?;
    Ok(Some((
        row.try_get("key").map_err(storage)?,
        parsed(record, "document")?,
    )))
}

/// What was said in a version.
async fn version(connection: &mut SqliteConnection, document: i64, version: i64) -> Result<Text, MemoryError> {
    let row = sqlx::query("SELECT record, content FROM document_versions WHERE document = ? AND version = ?")
        .bind(document)
        .bind(version)
        .fetch_optional(connection)
        .await
        .map_err(storage)?;
    let row = row.ok_or(MemoryError::NoVersion(version))?;
    let record: &str = row.try_get("record").map_err(storage)?;
    let mut text = parsed::<Document>(record, "document")?.text;
    text.content = row.try_get("content").map_err(storage)?;
    Ok(text)
}

/// Writes a version, and makes it the newest one; the document's number.
async fn put(
    connection: &mut SqliteConnection,
    existing: Option<i64>,
    scope: ScopeKey,
    document: &Document,
) -> Result<i64, MemoryError> {
    let record = encode(document)?;
    let query = match existing {
        Some(key) => {
            sqlx::query("UPDATE documents SET version = ?, record = ?, deleted_at = ? WHERE key = ? RETURNING key")
                .bind(document.version)
                .bind(&record)
                .bind(document.deleted_at.map(|time| time.micros()))
                .bind(key)
        }
        None => sqlx::query("INSERT INTO documents (version, record, scope, path) VALUES (?, ?, ?, ?) RETURNING key")
            .bind(document.version)
            .bind(&record)
            .bind(scope.0)
            .bind(&document.path),
    };
    let row = query.fetch_one(&mut *connection).await.map_err(storage)?;
    let key: i64 = row.try_get("key").map_err(storage)?;
    sqlx::query("INSERT INTO document_versions (document, version, record, content) VALUES (?, ?, ?, ?)")
        .bind(key)
        .bind(document.version)
        .bind(&record)
        .bind(&document.text.content)
        .execute(connection)
        .await
        .map_err(storage)?;
    Ok(key)
}
