//! Deleting memories.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::MemoryId;

use super::App;
use super::get::view;
use super::policy::Law;
use crate::domain::{Idempotency, Sequence, Written};
use crate::store::{Change, ChangeItem};

/// One memory to delete.
#[derive(Clone, Debug)]
pub struct Deletion {
    /// The memory.
    pub id: MemoryId,
    /// Only on this version.
    pub etag: Option<String>,
    /// Remove it for good.
    pub purge: bool,
    /// Makes a retry safe.
    pub idempotency: Option<Idempotency>,
}

impl App {
    /// Hides memories, or removes them for good; each has its own result. What is hidden stays readable with
    /// `show_deleted`.
    ///
    /// # Errors
    /// When the store fails; then nothing of the batch is done. An item is refused with NOT_FOUND, SCOPE_DENIED,
    /// PERMISSION_DENIED, ABORTED when the etag does not fit, or FAILED_PRECONDITION when it is deleted already.
    pub async fn delete(
        &self,
        context: &RequestContext,
        items: Vec<Result<Deletion, Error>>,
    ) -> Result<Vec<Result<Written, Error>>, Error> {
        let writer = self.writer(context);
        let mut results: Vec<Option<Result<Written, Error>>> = Vec::with_capacity(items.len());
        let mut changes = Vec::new();
        let law = self.law(&writer.tenant).await?;
        for item in items {
            match self.deletable(context, item, &law).await {
                Ok(Checked::Change(item)) => {
                    changes.push(item);
                    results.push(None);
                }
                Ok(Checked::Done(written)) => results.push(Some(Ok(*written))),
                Err(error) => results.push(Some(Err(error))),
            }
        }
        let mut changed = Vec::new().into_iter();
        if !changes.is_empty() {
            changed = self.store.change(&writer, changes).await?.into_iter();
        }
        let results: Vec<Result<Written, Error>> = results
            .into_iter()
            .filter_map(|done| done.or_else(|| changed.next().map(|result| result.map_err(Error::from))))
            .collect();
        let last = results.iter().flatten().map(|written| written.sequence).max();
        if let Some(last) = last.filter(|last| *last > Sequence::default()) {
            self.await_index(last).await;
        }
        Ok(results)
    }

    async fn deletable(
        &self,
        context: &RequestContext,
        item: Result<Deletion, Error>,
        law: &Law,
    ) -> Result<Checked, Error> {
        let item = item?;
        if item.purge {
            context.principal().administers()?;
        }
        if let Some(idempotency) = &item.idempotency
            && let Some(earlier) = self.store.replay(&self.writer(context), idempotency).await?
        {
            return Ok(Checked::Done(Box::new(earlier)));
        }
        let memory = self.find_newest(context, item.id, &view(context, None)?).await?.memory;
        context.principal().may_change(&memory.scope)?;
        law.may_write(context.principal(), &memory.scope)?;
        Ok(Checked::Change(ChangeItem {
            id: item.id,
            etag: item.etag,
            made_of: None,
            change: if item.purge { Change::Purge } else { Change::Delete },
            idempotency: item.idempotency,
        }))
    }
}

/// What is to be done about one item.
enum Checked {
    /// It was done before.
    Done(Box<Written>),
    /// It may be done.
    Change(ChangeItem),
}
