//! Listing memories.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::{Layer, MemoryId, Scope, Timestamp};

use super::App;
use super::get::view;
use crate::domain::{Memory, Sequence};
use crate::filter::Filter;
use crate::store::Listing;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct ListQuery {
    /// Where the caller stands.
    pub scope: Option<Scope>,
    /// Only these layers; empty: any.
    pub layers: Vec<Layer>,
    /// At most so many.
    pub limit: usize,
    /// Continue after this one.
    pub before: Option<MemoryId>,
    /// Only those that satisfy it.
    pub filter: Option<Filter>,
    /// Also deleted and expired ones.
    pub show_deleted: bool,
    /// As it was then; `None`: as it is.
    pub as_of: Option<Timestamp>,
    /// Not as it was before this change.
    pub after: Sequence,
}

/// A page and where the next one begins.
#[derive(Clone, Debug)]
pub struct Page {
    /// Newest first.
    pub memories: Vec<Memory>,
    /// Pass it as `before`; `None`: this is the last page.
    pub next: Option<MemoryId>,
}

impl App {
    /// A page of what the caller sees, newest first.
    ///
    /// # Errors
    /// SCOPE_DENIED, or when the store fails.
    pub async fn list(&self, context: &RequestContext, query: ListQuery) -> Result<Page, Error> {
        let view = view(context, query.scope.as_ref())?;
        self.store.reach(query.after).await?;
        let scopes = self
            .store
            .visible(&context.principal().tenant, &view, &query.layers)
            .await?;
        let listing = Listing {
            tenant: context.principal().tenant.clone(),
            scopes,
            before: query.before,
            limit: query.limit + 1,
            filter: query.filter,
            show_deleted: query.show_deleted,
            now: self.clock.now(),
            as_of: query.as_of,
        };
        let mut memories: Vec<Memory> = self.store.list(&listing).await?.into_iter().map(|s| s.memory).collect();
        let more = memories.len() > query.limit;
        memories.truncate(query.limit);
        let next = memories.last().filter(|_| more).map(|memory| memory.id);
        Ok(Page { memories, next })
    }
}
