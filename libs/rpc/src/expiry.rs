//! Answers that end with the caller's token: a stream may go on for longer than whoever asked for it is let in.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::SystemTime;

use aeterna_error::{Error, Reason};
use axum::body::{Body, Bytes};
use axum::response::Response;
use http::HeaderMap;
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;

/// An answer that ends with TOKEN_INVALID when the token does.
pub(crate) fn ends(answer: Response, end: SystemTime) -> Response {
    let left = end.duration_since(SystemTime::now()).unwrap_or_default();
    let Some(at) = Instant::now().checked_add(left) else {
        return answer;
    };
    answer.map(|body| {
        Body::new(Bounded {
            body,
            at,
            timer: Box::pin(sleep_until(at)),
            over: false,
        })
    })
}

struct Bounded {
    body: Body,
    at: Instant,
    timer: Pin<Box<Sleep>>,
    over: bool,
}

impl http_body::Body for Bounded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        if self.over {
            return Poll::Ready(None);
        }
        // A body that always has something to tell ends as well.
        if Instant::now() < self.at {
            let told = Pin::new(&mut self.body).poll_frame(context);
            if told.is_ready() || self.timer.as_mut().poll(context).is_pending() {
                return told;
            }
        }
        (self.over, self.body) = (true, Body::empty());
        let message = "the token has expired meanwhile; go on with a new one";
        let mut trailers = HeaderMap::new();
        let told = Status::from(Error::new(Reason::TokenInvalid, message)).add_header(&mut trailers);
        Poll::Ready(told.is_ok().then_some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
