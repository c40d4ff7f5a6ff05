//! Changing one memory.

use std::time::Duration;

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::MemoryId;

use super::add::half_time;
use super::get::view;
use super::{App, Kept};
use crate::domain::{Body, Idempotency, Writer, Written};
use crate::error::MemoryError;
use crate::store::{Change, ChangeItem};

/// A change as its writer sends it.
#[derive(Clone, Debug)]
pub struct Patch {
    /// The memory.
    pub id: MemoryId,
    /// Only on this version.
    pub etag: Option<String>,
    /// The new values.
    pub values: Body,
    /// The fields to take from them, out of [`FIELDS`].
    pub fields: Vec<String>,
    /// Makes a retry safe.
    pub idempotency: Option<Idempotency>,
}

/// Copies one field from one body to another.
type Copy = fn(&mut Body, &Body);

/// The fields that an update may name.
pub const FIELDS: &[(&str, Copy)] = &[
    ("content", |to, from| to.content.clone_from(&from.content)),
    ("metadata", |to, from| to.metadata.clone_from(&from.metadata)),
    ("tags", |to, from| to.tags.clone_from(&from.tags)),
    ("importance", |to, from| to.importance = from.importance),
    ("source.speaker", |to, from| {
        to.source.speaker.clone_from(&from.source.speaker)
    }),
    ("source.caption", |to, from| {
        to.source.caption.clone_from(&from.source.caption)
    }),
    ("source.reference", |to, from| {
        to.source.reference.clone_from(&from.source.reference)
    }),
    ("event_at", |to, from| to.event_at = from.event_at),
    ("valid_at", |to, from| to.valid_at = from.valid_at),
    ("invalid_at", |to, from| to.invalid_at = from.invalid_at),
    ("expires_at", |to, from| to.expires_at = from.expires_at),
    ("superseded_by", |to, from| to.superseded_by = from.superseded_by),
];

/// The pause before what was behind is read again.
const AGAIN: Duration = Duration::from_millis(5);

impl App {
    /// Applies a patch to what is there. It is repeated when somebody else was faster, or what was read was behind, so that no
    /// update is lost.
    ///
    /// # Errors
    /// NOT_FOUND, ABORTED when the etag does not fit, FAILED_PRECONDITION when the memory is deleted.
    pub async fn update(&self, context: &RequestContext, patch: Patch) -> Result<Kept, Error> {
        let writer = self.writer(context);
        if let Some(idempotency) = &patch.idempotency
            && let Some(earlier) = self.store.replay(&writer, idempotency).await?
        {
            return Ok(earlier.into());
        }
        let view = view(context, None)?;
        let law = self.law(&writer.tenant).await?;
        loop {
            let current = self.find_newest(context, patch.id, &view).await?.memory;
            context.principal().may_change(&current.scope)?;
            let mut body = current.body.clone();
            let named = FIELDS
                .iter()
                .filter(|(name, _)| patch.fields.iter().any(|field| field == name));
            named.for_each(|(_, copy)| copy(&mut body, &patch.values));
            check_validity(&body)?;
            law.may_change(context.principal(), (&current, &body), writer.now)?;
            let reindex = body.dense_text() != current.body.dense_text();
            let vector = if reindex {
                let codes = self.codes(context, vec![body.dense_text()]).await;
                codes.and_then(|mut codes| codes.pop().flatten())
            } else {
                None
            };
            let change = Change::Replace {
                body: Box::new(body),
                vector,
                reindex,
            };
            let item = ChangeItem {
                id: patch.id,
                etag: patch.etag.clone(),
                made_of: Some(current.etag()),
                change,
                idempotency: patch.idempotency.clone(),
            };
            match self.change_one(&writer, item).await {
                Err(MemoryError::Stale) => {
                    // Reads see at least this from now on.
                    self.store.last_sequence().await?;
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(error.into()),
                Ok(written) => {
                    self.await_index(written.sequence).await;
                    return Ok(match reindex {
                        true => self.with_near(&writer.tenant, written, half_time(context)).await,
                        false => written.into(),
                    });
                }
            }
        }
    }

    /// One change, with its own verdict.
    async fn change_one(&self, writer: &Writer, item: ChangeItem) -> Result<Written, MemoryError> {
        let results = self.store.change(writer, vec![item]).await?;
        let only = results.into_iter().next();
        only.unwrap_or_else(|| Err(Error::internal("a change has no result").into()))
    }
}

/// The two ends of a validity must fit, also when only one of them was changed.
fn check_validity(body: &Body) -> Result<(), Error> {
    let mut violations = aeterna_error::Violations::default();
    if body.valid_at.zip(body.invalid_at).is_some_and(|(from, to)| to <= from) {
        violations.add("memory.invalid_at", "is not after `valid_at`");
    }
    violations.into_result()
}
