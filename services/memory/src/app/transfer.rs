//! Memories on their way out of a store and into another one, as they were.

use std::sync::Arc;

use aeterna_error::{Error, Reason};
use aeterna_rpc::RequestContext;
use aeterna_types::{RequestId, Scope, TenantId, chain};

use super::get::view;
use super::policy::Law;
use super::{App, whole};
use crate::domain::{Key, Outcome, ScopeKey, Sequence};
use crate::filter::Filter;
use crate::store::code::Code;
use crate::store::{ExportPage, Exported, Imported, Progress, StoredVector};

/// Memories read at a time, and with all their versions.
const PAGE: usize = 100;
const PAGE_WITH_VERSIONS: usize = 10;
/// Items that an import may have refused before it is given up, and those whose errors are told.
const REFUSED: usize = 100_000;
const TOLD: usize = 1000;

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
    /// A write that must be seen.
    pub must_see: Sequence,
}

/// An export under way.
pub struct Export {
    app: Arc<App>,
    tenant: TenantId,
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
        self.store.reach(query.must_see).await?;
        let tenant = context.principal().tenant.clone();
        let scopes = self.store.visible(&tenant, &view, &[]).await?;
        Ok(Export {
            app: Arc::clone(self),
            tenant,
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
            id,
            seen: 0,
            digest: [0; 32],
            done: done.unwrap_or_default(),
            created: 0,
            merged: 0,
            refused: 0,
            errors: Vec::new(),
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
            tenant: self.tenant.clone(),
            scopes: self.scopes.clone(),
            filter: self.query.filter.clone(),
            after: self.query.after,
            limit: if self.query.history { PAGE_WITH_VERSIONS } else { PAGE },
            history: self.query.history,
            vectors: self.query.vectors,
            most: self.app.message_bytes,
            now: self.app.clock.now(),
        };
        let app = Arc::clone(&self.app);
        let found = whole(async move { app.store.export(&page).await }).await??;
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
    id: RequestId,
    /// Items of the stream so far.
    seen: i64,
    /// Digest of the stream so far.
    digest: [u8; 32],
    /// What is stored.
    done: Progress,
    created: i64,
    merged: i64,
    refused: i64,
    /// The first refusals, with their places.
    errors: Vec<(i64, Error)>,
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
    /// Items that were refused.
    pub refused: i64,
    /// The first of them, with their places.
    pub errors: Vec<(i64, Error)>,
    /// A change that is at least as new as all that was stored.
    pub last: Sequence,
}

impl Import {
    /// Takes a chunk in, in one transaction. What the import has stored before is passed over; what it has refused is looked
    /// at again.
    ///
    /// # Errors
    /// INVALID_STATE when the stream is another one than that of this id before or too much of it was refused, or when the
    /// store fails: then nothing of the chunk is kept.
    pub async fn take(&mut self, items: Vec<Item>) -> Result<(), Error> {
        let writer = self.app.writer(&self.context);
        let law = self.app.law(&writer.tenant).await?;
        let mut fresh = Vec::with_capacity(items.len());
        let mut refused = Vec::new();
        for Item { bytes, item } in items {
            let place = self.seen;
            self.seen += 1;
            self.digest = chain(self.digest, &bytes);
            if self.seen == self.done.items && self.digest != self.done.digest {
                let message = "`import_id` was used for another stream; use a new one";
                return Err(Error::new(Reason::InvalidState, message));
            }
            if place < self.done.items && !self.done.refused.contains(&place) {
                self.merged += 1;
                continue;
            }
            match item.and_then(|item| self.admitted(&law, item)) {
                Ok(item) => fresh.push((place, item)),
                Err(error) => refused.push((place, error)),
            }
        }
        if self.seen <= self.done.items && fresh.is_empty() {
            self.refuse(refused);
            return Ok(());
        }
        let mut progress = self.done.clone();
        if self.seen > progress.items {
            (progress.items, progress.digest) = (self.seen, self.digest);
        }
        progress.refused.extend(refused.iter().map(|(place, _)| *place));
        if progress.refused.len() > REFUSED {
            let first = self.errors.first().or(refused.first());
            let first = first.map_or_else(String::new, |(place, error)| {
                format!("; the first one is item {place}: {error}")
            });
            let message =
                format!("more than {REFUSED} items are refused; mend the stream, and give it a new `import_id`{first}");
            return Err(Error::new(Reason::InvalidState, message));
        }
        self.refuse(refused);
        let places: Vec<i64> = fresh.iter().map(|(place, _)| *place).collect();
        let results = self.app.store.import(&writer, &self.id, fresh, &mut progress).await?;
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
                Err(error) => self.refuse([(place, error.into())]),
            }
        }
        self.app.committed.here();
        Ok(())
    }

    fn refuse(&mut self, items: impl IntoIterator<Item = (i64, Error)>) {
        for item in items {
            self.refused += 1;
            if self.errors.len() < TOLD {
                self.errors.push(item);
            }
        }
    }

    /// Ends it; `sent` is what the sender says that the stream was.
    ///
    /// # Errors
    /// INVALID_STATE when something else has arrived, or less than this id has stored before.
    pub async fn finish(self, sent: Option<(i64, [u8; 32])>) -> Result<Taken, Error> {
        if sent.is_some_and(|(count, digest)| (count, digest) != (self.seen, self.digest)) {
            let message = format!(
                "{} memories have arrived, which are not those of `summary`; send the same stream again",
                self.seen
            );
            return Err(Error::new(Reason::InvalidState, message));
        }
        if self.seen < self.done.items {
            let message = format!(
                "`import_id` was used for a stream of {} memories or more, and {} have arrived; send the same stream, or use a new one",
                self.done.items, self.seen
            );
            return Err(Error::new(Reason::InvalidState, message));
        }
        // It is complete: when the same stream comes again, what was removed for good since is taken in anew.
        if sent.is_some()
            && self.refused == 0
            && let Err(error) = self
                .app
                .store
                .end_import(&self.app.writer(&self.context), &self.id)
                .await
        {
            tracing::warn!(%error, "a complete import is remembered as one under way");
        }
        let mut last = self.last;
        if last > Sequence::default() {
            self.app.await_index(last).await;
        } else {
            // All of it was stored before.
            last = self.app.store.last_sequence().await?;
        }
        Ok(Taken {
            created: self.created,
            merged: self.merged,
            arrived: (self.seen, self.digest),
            refused: self.refused,
            errors: self.errors,
            last,
        })
    }

    /// Puts an item where its writer may write, by the rules that hold there.
    fn admitted(&self, law: &Law, mut item: Imported) -> Result<Imported, Error> {
        let principal = self.context.principal();
        if !item.versions.is_empty() {
            // A history says who did what: only an admin is believed.
            principal.administers()?;
        }
        item.memory.scope = principal.stand_in(&item.memory.scope)?;
        let now = self.app.clock.now();
        // A deleted one is shown to nobody, whenever it would have expired.
        let deleted = item.memory.deleted_at.is_some();
        let kept = item.memory.body.expires_at.take_if(|_| deleted);
        item.most = law.admit(principal, &item.memory.scope, &mut item.memory.body, now)?;
        if deleted {
            item.memory.body.expires_at = kept;
        }
        let serving = self.app.serving();
        let own = &serving.model;
        // What another model has made is of no use here, nor is what is no unit vector; the own one makes it anew.
        let fits = |vector: &StoredVector| vector.model == own.identity && vector.code.dimension() == own.dimension;
        item.vectors.retain(|vector| fits(vector) && is_unit(&vector.code));
        Ok(item)
    }
}

/// Whether what somebody else has encoded is a vector of about unit length.
fn is_unit(code: &Code) -> bool {
    let norm = code.decode().iter().map(|x| x * x).sum::<f32>().sqrt();
    (0.9..=1.1).contains(&norm)
}
