//! Documents by path.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::Scope;
use similar::{ChangeTag, TextDiff};

use super::App;
use super::get::view;
use crate::domain::{Document, DocumentChange, Sequence, View};
use crate::error::MemoryError;
use crate::store::DocumentListing;

/// Which documents are asked for.
#[derive(Clone, Debug)]
pub struct DocumentQuery {
    /// Where the caller stands.
    pub scope: Option<Scope>,
    /// Only at or below this path; empty: all.
    pub prefix: String,
    /// Continue after this place.
    pub after: Option<(String, i64)>,
    /// At most so many.
    pub limit: usize,
    /// Also deleted ones.
    pub show_deleted: bool,
    /// A write that must be seen.
    pub must_see: Sequence,
}

/// One document.
#[derive(Clone, Debug)]
pub struct OneDocument {
    /// Where it lives.
    pub scope: Scope,
    /// Its path.
    pub path: String,
    /// Which version; `None`: the newest.
    pub version: Option<i64>,
    /// Not as it was before this change.
    pub after: Sequence,
}

/// How two versions differ.
#[derive(Clone, Debug)]
pub struct Diff {
    /// In the unified format, with three lines around each change.
    pub unified: String,
    /// Lines that are new.
    pub added: usize,
    /// Lines that are gone.
    pub removed: usize,
}

/// A page of documents and where the next one begins.
#[derive(Clone, Debug)]
pub struct DocumentPage {
    /// Without their content.
    pub documents: Vec<Document>,
    /// Pass it as `after`; `None`: this is the last page.
    pub next: Option<(String, i64)>,
}

impl App {
    /// Writes, restores or deletes a document.
    ///
    /// # Errors
    /// SCOPE_DENIED, POLICY_DENIED, NOT_FOUND, or ABORTED when the etag does not fit.
    pub async fn change_document(
        &self,
        context: &RequestContext,
        change: DocumentChange,
    ) -> Result<(Document, Sequence), Error> {
        let writer = self.writer(context);
        // A document has the place that is named, for writes as for reads.
        context.principal().may_change(&change.scope)?;
        let allowed = self.law(&writer.tenant).await?.may_edit(context.principal(), &change);
        if let Err(error) = allowed {
            // A retry is answered as before, whatever the rules are by now.
            match &change.idempotency {
                Some(idempotency) if self.store.document_replays(&writer, idempotency).await? => {}
                _ => return Err(error.into()),
            }
        }
        let written = self.store.change_document(&writer, change).await?;
        self.committed.here();
        Ok(written)
    }

    /// One version of a document that the caller sees, the newest without a number.
    ///
    /// # Errors
    /// NOT_FOUND when there is none, or the newest one is deleted and no version was asked for.
    pub async fn document(&self, context: &RequestContext, wanted: OneDocument) -> Result<Document, Error> {
        let OneDocument {
            scope,
            path,
            version,
            after,
        } = wanted;
        self.sees(context, &scope)?;
        self.store.reach(after).await?;
        let tenant = &context.principal().tenant;
        let found = self.store.document(tenant, &scope, &path, version).await?;
        let shown = found.filter(|document| version.is_some() || document.deleted_at.is_none());
        if let (None, Some(version)) = (&shown, version)
            && self.store.document(tenant, &scope, &path, None).await?.is_some()
        {
            return Err(MemoryError::NoVersion(version).into());
        }
        shown.ok_or_else(|| MemoryError::NoDocument(path).into())
    }

    /// A page of the documents that the caller sees, by path.
    ///
    /// # Errors
    /// SCOPE_DENIED, or when the store fails.
    pub async fn documents(&self, context: &RequestContext, query: DocumentQuery) -> Result<DocumentPage, Error> {
        let view = view(context, query.scope.as_ref())?;
        self.store.reach(query.must_see).await?;
        let listing = DocumentListing {
            tenant: context.principal().tenant.clone(),
            scopes: self.store.visible(&context.principal().tenant, &view, &[]).await?,
            prefix: query.prefix,
            after: query.after,
            limit: query.limit + 1,
            show_deleted: query.show_deleted,
        };
        let mut found = self.store.documents(&listing).await?;
        let more = found.len() > query.limit;
        found.truncate(query.limit);
        let next = found
            .last()
            .filter(|_| more)
            .map(|(key, document)| (document.path.clone(), *key));
        let documents = found.into_iter().map(|(_, document)| document).collect();
        Ok(DocumentPage { documents, next })
    }

    /// The versions of a document that the caller sees, newest first; true when there are more.
    ///
    /// # Errors
    /// NOT_FOUND when there is none.
    pub async fn document_versions(
        &self,
        context: &RequestContext,
        scope: &Scope,
        path: &str,
        (before, limit): (Option<i64>, usize),
        must_see: Sequence,
    ) -> Result<(Vec<Document>, bool), Error> {
        self.sees(context, scope)?;
        self.store.reach(must_see).await?;
        let tenant = &context.principal().tenant;
        let mut versions = self
            .store
            .document_versions(tenant, scope, path, before, limit + 1)
            .await?;
        if versions.is_empty() && before.is_none() {
            return Err(MemoryError::NoDocument(path.to_owned()).into());
        }
        let more = versions.len() > limit;
        versions.truncate(limit);
        Ok((versions, more))
    }

    /// How two versions of a document differ, the older one first.
    ///
    /// # Errors
    /// NOT_FOUND when one of them is not there.
    pub async fn diff_document(
        &self,
        context: &RequestContext,
        [older, newer]: [OneDocument; 2],
    ) -> Result<Diff, Error> {
        let older = self.document(context, older).await?;
        let newer = self.document(context, newer).await?;
        let compared = tokio::task::spawn_blocking(move || diff(&older, &newer)).await;
        compared.map_err(Error::internal)
    }

    /// Refuses a scope that the token does not see.
    fn sees(&self, context: &RequestContext, scope: &Scope) -> Result<(), Error> {
        let principal = context.principal();
        let denied = principal.stand_in(scope).map(|_| ());
        let within = View {
            scope: principal.within.clone(),
            exact: false,
        };
        if within.sees(scope) { Ok(()) } else { denied }
    }
}

fn diff(older: &Document, newer: &Document) -> Diff {
    let lines = TextDiff::configure()
        // A pair of texts that has nothing in common must not take minutes.
        .timeout(std::time::Duration::from_secs(2))
        .diff_lines(&older.text.content, &newer.text.content);
    let count = |tag| lines.iter_all_changes().filter(|change| change.tag() == tag).count();
    let name = |document: &Document| format!("{} (version {})", document.path, document.version);
    Diff {
        unified: lines
            .unified_diff()
            .context_radius(3)
            .header(&name(older), &name(newer))
            .to_string(),
        added: count(ChangeTag::Insert),
        removed: count(ChangeTag::Delete),
    }
}
