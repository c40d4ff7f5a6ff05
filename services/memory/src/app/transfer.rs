//! Memories on their way out of a store and into another one, as they were.

use std::sync::Arc;

use aeterna_error::{Error, Reason};
use aeterna_rpc::RequestContext;
use aeterna_types::{RequestId, Scope, chain};

use super::App;
use super::get::view;
use super::policy::Law;
use crate::domain::{Key, Outcome, ScopeKey, Sequence};
use crate::filter::Filter;
use crate::store::{ExportPage, Exported, Imported, Progress};

/// Memories read at a time, and with all their versions.
const PAGE: usize = 100;
const PAGE_WITH_VERSIONS: usize = 10;

/// What is exported.
#[derive(Clone, Debug)]
pub struct ExportQuery {
    /// Where the caller stands.
    pub scope: Option<Scope>,
    /// Only memories that satisfy it.
    pub filter: Option<Filter>,
    /// Also deleted ones, and the versions of all.
    pub history: bool,
    /// Also vectors.
    pub vectors: bool,
    /// After this one.
    pub after: Key,
}

/// An export under way.
pub struct Export {
    app: Arc<App>,
    scopes: Vec<ScopeKey>,
    query: ExportQuery,
}

impl App {
    /// Begins to export what the caller sees.
    ///
    /// # Errors
    /// SCOPE_DENIED, or when the store fails.
    pub async fn export(self: &Arc<Self>, context: &RequestContext, query: ExportQuery) -> Result<Export, Error> {
        let view = view(context, query.scope.as_ref())?;
        let scopes = self.store.visible(&context.principal().tenant, &view, &[]).await?;
        Ok(Export {
            app: Arc::clone(self),
            scopes,
            query,
        })
    }

    /// Begins an import, or goes on with the one of that id.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn import(self: &Arc<Self>, context: &RequestContext, id: RequestId) -> Result<Import, Error> {
        let writer = self.writer(context);
        let done = self.store.import_progress(&writer, &id).await?;
        Ok(Import {
            app: Arc::clone(self),
            context: context.clone(),
            law: self.law(&writer.tenant).await?,
            id,
            seen: 0,
            digest: [0; 32],
            done: done.unwrap_or_default(),
            created: 0,
            merged: 0,
            refused: Vec::new(),
            last: Sequence::default(),
        })
    }
}

impl Export {
    /// The next memories; none: that was all.
    ///
    /// # Errors
    /// DRAINING, or when the store fails.
    pub async fn next(&mut self) -> Result<Vec<Exported>, Error> {
        if self.app.stop.is_cancelled() {
            let message = "the server is draining; export again with the last resume token";
            return Err(Error::new(Reason::Draining, message));
        }
        let page = ExportPage {
            scopes: self.scopes.clone(),
            filter: self.query.filter.clone(),
            after: self.query.after,
            limit: if self.query.history { PAGE_WITH_VERSIONS } else { PAGE },
            history: self.query.history,
            vectors: self.query.vectors,
            now: self.app.clock.now(),
        };
        let found = self.app.store.export(&page).await?;
        if let Some(last) = found.last() {
            self.query.after = last.key;
        }
        Ok(found)
    }
}

/// An import under way.
pub struct Import {
    app: Arc<App>,
    context: RequestContext,
    law: Law,
    id: RequestId,
    /// Items of the stream so far.
    seen: i64,
    /// Digest of the stream so far.
    digest: [u8; 32],
    /// What is stored.
    done: Progress,
    created: i64,
    merged: i64,
    /// Items that were refused, with their places.
    refused: Vec<(i64, Error)>,
    last: Sequence,
}

/// An item of an import with its bytes, or what is wrong with it.
pub struct Item {
    /// As it was sent.
    pub bytes: Vec<u8>,
    /// What it says.
    pub item: Result<Imported, Error>,
}

/// What became of an import.
#[derive(Debug)]
pub struct Taken {
    /// Memories that are new.
    pub created: i64,
    /// Memories that were there, those among them that this import has stored before.
    pub merged: i64,
    /// How many items have arrived, and their digest.
    pub arrived: (i64, [u8; 32]),
    /// Items that were refused, with their places.
    pub refused: Vec<(i64, Error)>,
}

impl Import {
    /// Takes a chunk in, in one transaction. What the import has stored before is passed over.
    ///
    /// # Errors
    /// INVALID_STATE when the stream is another one than that of this id before, or when the store fails: then nothing of the
    /// chunk is kept.
    pub async fn take(&mut self, items: Vec<Item>) -> Result<(), Error> {
        let mut fresh = Vec::with_capacity(items.len());
        for Item { bytes, item } in items {
            let place = self.seen;
            self.seen += 1;
            self.digest = chain(self.digest, &bytes);
            if self.seen == self.done.items && self.digest != self.done.digest {
                let message = "`import_id` was used for another stream; use a new one";
                return Err(Error::new(Reason::InvalidState, message));
            }
            if place < self.done.items {
                self.merged += 1;
                continue;
            }
            match item.and_then(|item| self.admitted(item)) {
                Ok(item) => fresh.push((place, item)),
                Err(error) => self.refused.push((place, error)),
            }
        }
        if self.seen <= self.done.items {
            return Ok(());
        }
        let (places, fresh): (Vec<i64>, Vec<Imported>) = fresh.into_iter().unzip();
        let writer = self.app.writer(&self.context);
        let progress = Progress {
            items: self.seen,
            digest: self.digest,
        };
        let results = self.app.store.import(&writer, &self.id, fresh, &progress).await?;
        self.done = progress;
        self.app.metrics.added.add(results.iter().flatten().count() as u64, &[]);
        for (place, result) in places.into_iter().zip(results) {
            match result {
                Ok((outcome, sequence)) => {
                    self.last = self.last.max(sequence);
                    match outcome {
                        Outcome::Created => self.created += 1,
                        Outcome::Merged => self.merged += 1,
                    }
                }
                Err(error) => self.refused.push((place, error.into())),
            }
        }
        self.app.committed.send_replace(());
        Ok(())
    }

    /// Ends it; `sent` is what the sender says that the stream was.
    ///
    /// # Errors
    /// INVALID_STATE when something else has arrived.
    pub async fn finish(self, sent: Option<(i64, [u8; 32])>) -> Result<Taken, Error> {
        if sent.is_some_and(|(count, digest)| (count, digest) != (self.seen, self.digest)) {
            let message = format!(
                "{} memories have arrived, which are not those of `summary`; send the same stream again",
                self.seen
            );
            return Err(Error::new(Reason::InvalidState, message));
        }
        if self.last > Sequence::default() {
            self.app.await_index(self.last).await;
        }
        Ok(Taken {
            created: self.created,
            merged: self.merged,
            arrived: (self.seen, self.digest),
            refused: self.refused,
        })
    }

    /// Puts an item where its writer may write, by the rules that hold there.
    fn admitted(&self, mut item: Imported) -> Result<Imported, Error> {
        let principal = self.context.principal();
        if !item.versions.is_empty() {
            // A history says who did what: only an admin is believed.
            principal.administers()?;
        }
        item.memory.scope = principal.stand_in(&item.memory.scope)?;
        let now = self.app.clock.now();
        let kept = item.memory.body.expires_at;
        item.most = self
            .law
            .admit(principal, &item.memory.scope, &mut item.memory.body, now)?;
        if item.memory.deleted_at.is_some() {
            item.memory.body.expires_at = kept;
        }
        let serving = self.app.serving();
        let own = &serving.model;
        let fits = |vector: &crate::store::StoredVector| {
            vector.model == own.identity && vector.code.dimension() == own.dimension
        };
        // What another model has made is of no use here; the own one makes it anew.
        item.vector = item.vector.filter(fits);
        Ok(item)
    }
}
