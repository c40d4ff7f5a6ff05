//! The versions of one memory.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::MemoryId;

use super::App;
use super::get::view;
use crate::domain::{Sequence, Version};
use crate::error::MemoryError;

/// A page of versions and where the next one begins.
#[derive(Clone, Debug)]
pub struct Versions {
    /// Newest first.
    pub versions: Vec<Version>,
    /// Continue before this version; `None`: this is the last page.
    pub next: Option<i64>,
}

impl App {
    /// Versions of a memory that the caller sees, newest first, also when it is deleted; after a purge there are none.
    ///
    /// # Errors
    /// NOT_FOUND when there is no such memory, whatever the reason.
    pub async fn history(
        &self,
        context: &RequestContext,
        id: MemoryId,
        (before, limit): (Option<i64>, usize),
        must_see: Sequence,
    ) -> Result<Versions, Error> {
        let view = view(context, None)?;
        self.store.reach(must_see).await?;
        match self.find_newest(context, id, &view).await {
            // While there is no primary, what other nodes have counts.
            Err(MemoryError::Store(_)) => self.find(context, id, &view).await?,
            found => found?,
        };
        let tenant = &context.principal().tenant;
        let mut versions = self.store.history(tenant, id, before, limit + 1).await?;
        let more = versions.len() > limit;
        versions.truncate(limit);
        let next = versions.last().filter(|_| more).map(|version| version.memory.version);
        Ok(Versions { versions, next })
    }
}
