//! Reading one memory.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::{MemoryId, Scope, Timestamp};

use super::App;
use crate::domain::{Memory, Sequence, View};
use crate::error::MemoryError;
use crate::store::Stored;

/// What a caller sees: from the scope it names, or from all that its token allows.
///
/// # Errors
/// SCOPE_DENIED when the scope lies outside of the token's.
pub fn view(context: &RequestContext, scope: Option<&Scope>) -> Result<View, Error> {
    let named = scope.filter(|scope| !scope.is_empty());
    let scope = context.principal().stand_in(named.unwrap_or(&Scope::default()))?;
    Ok(View {
        scope,
        exact: named.is_some(),
    })
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct GetQuery {
    /// The memory.
    pub id: MemoryId,
    /// Where the caller stands.
    pub scope: Option<Scope>,
    /// Also when it is deleted or expired.
    pub show_deleted: bool,
    /// As it was then; `None`: as it is.
    pub as_of: Option<Timestamp>,
    /// Not as it was before this change.
    pub after: Sequence,
}

impl App {
    /// One memory that the caller sees.
    ///
    /// # Errors
    /// NOT_FOUND when there is none, whatever the reason.
    pub async fn get(&self, context: &RequestContext, query: GetQuery) -> Result<Memory, Error> {
        let view = view(context, query.scope.as_ref())?;
        self.store.reach(query.after).await?;
        let memory = self.find(context, query.id, &view).await?.memory;
        let tenant = &context.principal().tenant;
        let (memory, at) = match query.as_of {
            Some(at) => (self.store.past(tenant, query.id, at).await?, at),
            None => (Some(memory), self.clock.now()),
        };
        let shown = memory.filter(|memory| query.show_deleted || memory.is_live(at));
        shown.ok_or_else(|| MemoryError::NotFound(query.id.to_string()).into())
    }

    /// The same for whoever changes it, or has no token of its last change: one that is not there may only be unknown yet to the
    /// node that was asked.
    pub(super) async fn find_newest(
        &self,
        context: &RequestContext,
        id: MemoryId,
        view: &View,
    ) -> Result<Stored, MemoryError> {
        match self.find(context, id, view).await {
            Err(MemoryError::NotFound(_)) => {
                // Reads see at least this from now on.
                self.store.last_sequence().await?;
                self.find(context, id, view).await
            }
            found => found,
        }
    }

    /// One memory within a view, deleted ones included.
    pub(super) async fn find(
        &self,
        context: &RequestContext,
        id: MemoryId,
        view: &View,
    ) -> Result<Stored, MemoryError> {
        let found = self.store.get(&context.principal().tenant, id).await?;
        let found = found.filter(|stored| view.sees(&stored.memory.scope));
        found.ok_or_else(|| MemoryError::NotFound(id.to_string()))
    }
}
