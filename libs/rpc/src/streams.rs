//! Streams that answer: each counts until it ends, however long its caller takes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use aeterna_error::{Error, Reason};
use aeterna_types::TenantId;
use axum::body::{Body, Bytes};
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::{Share, Shares};

/// The streams of one process.
#[derive(Debug)]
pub(crate) struct Streams {
    all: usize,
    /// What it is the limit of.
    what: &'static str,
    permits: Arc<Semaphore>,
    shares: Arc<Shares>,
}

/// One stream, until it is dropped.
#[derive(Debug)]
pub(crate) struct Open {
    _permit: OwnedSemaphorePermit,
    _share: Option<Share>,
}

impl Streams {
    /// So many at once, by what sets the limit.
    pub(crate) fn new(all: usize, what: &'static str) -> Self {
        Self {
            all,
            what,
            permits: Arc::new(Semaphore::new(all)),
            shares: Arc::new(Shares::new(all)),
        }
    }

    /// One more, of a tenant that must not have them all.
    ///
    /// # Errors
    /// RATE_LIMITED, with the limit.
    pub(crate) fn open(&self, tenant: Option<&TenantId>) -> Result<Open, Error> {
        let many = |message: String| Error::new(Reason::RateLimited, message).retry_after(Duration::from_secs(10));
        let share = tenant.map(|tenant| self.shares.take(tenant)).transpose();
        let share = share.map_err(|most| {
            let what = self.what;
            many(format!(
                "{most} streams of this tenant are open, which is its share of {what}"
            ))
        })?;
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        let permit = permit.map_err(|_| {
            let (all, what) = (self.all, self.what);
            many(format!("{all} streams are open, which is the limit of {what}"))
        })?;
        Ok(Open {
            _permit: permit,
            _share: share,
        })
    }
}

impl Open {
    /// Counts an answer until its last part is sent, or given up.
    pub(crate) fn count(self, answer: Response) -> Response {
        answer.map(|body| Body::new(Counted { body, _open: self }))
    }
}

struct Counted {
    body: Body,
    _open: Open,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
