//! Streams that end with the caller's token: they may go on for longer than whoever began them is let in. Other calls are
//! answered, since what they did is done.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::SystemTime;

use aeterna_error::{Error, Reason};
use aeterna_proto::Method;
use axum::body::{Body, Bytes};
use axum::response::Response;
use http::HeaderMap;
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tonic::Status;

use crate::layers::refuse;

/// The answer to a call of a method; a stream in either direction ends with TOKEN_INVALID when the token does.
pub(crate) async fn bounded(
    method: &Method,
    until: Option<SystemTime>,
    answer: impl Future<Output = Response>,
) -> Response {
    let streaming = method.client_streaming || method.server_streaming;
    let left = until
        .filter(|_| streaming)
        .map(|until| until.duration_since(SystemTime::now()).unwrap_or_default());
    let Some(at) = left.and_then(|left| Instant::now().checked_add(left)) else {
        return answer.await;
    };
    let answer = match method.client_streaming {
        true => timeout_at(at, answer).await.unwrap_or_else(|_| refuse(expired())),
        false => answer.await,
    };
    match method.server_streaming {
        true => answer.map(|body| Body::new(Bounded::new(body, at))),
        false => answer,
    }
}

fn expired() -> Error {
    Error::new(
        Reason::TokenInvalid,
        "the token has expired meanwhile; go on with a new one",
    )
}

struct Bounded {
    body: Body,
    at: Instant,
    timer: Pin<Box<Sleep>>,
    over: bool,
}

impl Bounded {
    fn new(body: Body, at: Instant) -> Self {
        Self {
            body,
            at,
            timer: Box::pin(sleep_until(at)),
            over: false,
        }
    }
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
        let mut trailers = HeaderMap::new();
        let told = Status::from(expired()).add_header(&mut trailers);
        Poll::Ready(told.is_ok().then_some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
