//! A channel to a peer, in this process or over the network.

use std::pin::Pin;
use std::task::{Context, Poll};

use aeterna_error::Error;
use axum::Router;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tower::ServiceExt as _;

/// Where a generated client sends its requests. `local` and a URL behave alike, the layer stack included.
#[derive(Clone, Debug)]
pub enum AnyChannel {
    /// To routes in the same process.
    Local(Router),
    /// To another process.
    Remote(Channel),
}

impl AnyChannel {
    /// A channel to `url`, connected on first use and again after a failure.
    ///
    /// # Errors
    /// NOT_CONFIGURED when `url` is not `http://host:port`.
    pub fn remote(url: &str) -> Result<Self, Error> {
        let refuse = |why: &dyn std::fmt::Display| {
            Error::new(
                aeterna_error::Reason::NotConfigured,
                format!("`{url}` is no address of a peer: {why}"),
            )
        };
        if !url.starts_with("http://") {
            return Err(refuse(
                &"write `http://host:port`; TLS between services is the mesh's or the gateway's work",
            ));
        }
        let endpoint = Endpoint::from_shared(url.to_string()).map_err(|error| refuse(&error))?;
        let seconds = std::time::Duration::from_secs;
        let endpoint = endpoint
            .connect_timeout(seconds(3))
            .http2_keep_alive_interval(seconds(20))
            .keep_alive_timeout(seconds(10))
            .keep_alive_while_idle(true);
        Ok(Self::Remote(endpoint.connect_lazy()))
    }
}

/// A connection that breaks during a call is UNAVAILABLE, as a peer is that can't be reached; tonic would say UNKNOWN.
fn broken(error: tonic::transport::Error) -> Status {
    let status = Status::from_error(error.into());
    match status.code() {
        Code::Unknown => {
            let mut unavailable = Status::unavailable("the connection broke");
            unavailable.set_source(std::sync::Arc::new(status));
            unavailable
        }
        _ => status,
    }
}

/// What a channel's transport can fail with.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl tower::Service<http::Request<Body>> for AnyChannel {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self {
            Self::Local(_) => Poll::Ready(Ok(())),
            Self::Remote(channel) => channel.poll_ready(context).map_err(Into::into),
        }
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match self {
            Self::Local(router) => {
                let answer = router.clone().oneshot(request);
                Box::pin(async move {
                    let response = answer.await.unwrap_or_else(|never| match never {});
                    Ok(response.map(Body::new))
                })
            }
            Self::Remote(channel) => {
                let answer = channel.call(request);
                Box::pin(async move { answer.await.map_err(|error| broken(error).into()) })
            }
        }
    }
}
