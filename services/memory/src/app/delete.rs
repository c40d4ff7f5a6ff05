//! Deleting one memory.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::MemoryId;

use super::App;
use super::get::view;
use crate::domain::{Idempotency, Written};
use crate::store::Change;

impl App {
    /// Hides a memory; it stays readable with `show_deleted`.
    ///
    /// # Errors
    /// NOT_FOUND, ABORTED when the etag does not fit, FAILED_PRECONDITION when it is deleted already.
    pub async fn delete(
        &self,
        context: &RequestContext,
        id: MemoryId,
        etag: Option<&str>,
        idempotency: Option<Idempotency>,
    ) -> Result<Written, Error> {
        let writer = self.writer(context);
        if let Some(idempotency) = &idempotency
            && let Some(earlier) = self.store.replay(&writer, idempotency).await?
        {
            return Ok(earlier);
        }
        let memory = self.find(context, id, &view(context, None)?).await?.memory;
        context.principal().may_change(&memory.scope)?;
        let written = self
            .store
            .change(&writer, id, etag, Change::Delete, idempotency)
            .await?;
        self.await_index(written.sequence).await;
        Ok(written)
    }
}
