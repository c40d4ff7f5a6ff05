//! Reading one memory.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::{MemoryId, Scope};

use super::App;
use crate::domain::{Memory, View};
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

impl App {
    /// One memory that the caller sees.
    ///
    /// # Errors
    /// NOT_FOUND when there is none, whatever the reason.
    pub async fn get(
        &self,
        context: &RequestContext,
        id: MemoryId,
        scope: Option<&Scope>,
        show_deleted: bool,
    ) -> Result<Memory, Error> {
        let view = view(context, scope)?;
        let memory = self.find(context, id, &view).await?.memory;
        if show_deleted || memory.is_live(self.clock.now()) {
            Ok(memory)
        } else {
            Err(MemoryError::NotFound(id.to_string()).into())
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
