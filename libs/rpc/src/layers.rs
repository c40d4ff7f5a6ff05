//! The layer stack in front of every service, outermost first: observe → catch panics → limit → authenticate → count streams →
//! deadline and, for streams, the end of the token.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aeterna_auth::{Verifier, authorize};
use aeterna_error::{Error, Reason};
use aeterna_proto::Method;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use futures::FutureExt as _;
use http::{HeaderMap, HeaderValue};
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, Meter, UpDownCounter};
use tokio::sync::Semaphore;
use tonic::service::Routes;
use tonic::{Code, Status};
use tracing::Instrument as _;

use crate::context::{InProcess, REQUEST_ID, RequestContext};
use crate::expiry;
use crate::limits::{Limits, RateLimiter, Shares};
use crate::streams::Streams;

/// The stack of one process.
#[derive(Clone)]
pub struct Stack(Arc<Inner>);

struct Inner {
    verifier: Verifier,
    limits: Limits,
    permits: Semaphore,
    shares: Arc<Shares>,
    streams: Streams,
    /// Answers to those who need no token.
    public: Streams,
    rates: RateLimiter,
    requests: Counter<u64>,
    duration: Histogram<f64>,
    in_flight: UpDownCounter<i64>,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack")
            .field("verifier", &self.0.verifier)
            .field("limits", &self.0.limits)
            .finish()
    }
}

/// Paths that need no token: health checks and the contracts themselves.
const PUBLIC: [&str; 3] = [
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.",
    "/grpc.reflection.v1alpha.",
];

/// Answers to them at once.
const PUBLIC_STREAMS: usize = 1024;

impl Stack {
    /// A stack with its verifier, limits and instruments.
    pub fn new(verifier: Verifier, limits: Limits, meter: &Meter) -> Self {
        Self(Arc::new(Inner {
            verifier,
            limits,
            permits: Semaphore::new(limits.concurrent_requests),
            shares: Arc::new(Shares::new(limits.concurrent_requests)),
            streams: Streams::new(limits.streams, "`limits.streams`"),
            public: Streams::new(PUBLIC_STREAMS, "health checks and reflection"),
            rates: RateLimiter::new(limits.requests_per_second),
            requests: meter
                .u64_counter("aeterna_rpc_requests")
                .with_description("RPCs answered, by method and gRPC code.")
                .build(),
            duration: meter
                .f64_histogram("aeterna_rpc_duration_seconds")
                .with_description("Time from the request's head to the response's head.")
                .with_boundaries(vec![
                    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                ])
                .build(),
            in_flight: meter
                .i64_up_down_counter("aeterna_rpc_in_flight")
                .with_description("RPCs under way.")
                .build(),
        }))
    }

    /// The limits in force.
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    /// Puts the stack in front of services.
    pub fn wrap(&self, routes: Routes) -> Router {
        routes
            .into_axum_router()
            .layer(from_fn_with_state(self.clone(), enforce))
            .layer(from_fn_with_state(self.clone(), observe))
    }
}

/// The gRPC code that a response carries in its head; OK when it carries none.
pub fn grpc_status<B>(response: &http::Response<B>) -> Code {
    response
        .headers()
        .get("grpc-status")
        .map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

pub(crate) fn refuse(error: Error) -> Response {
    Status::from(error).into_http::<Body>()
}

/// Request id, span, metrics; catches panics and completes errors that the framework made without our details.
async fn observe(State(stack): State<Stack>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let path = request.uri().path();
    let known = aeterna_proto::method(path);
    // Unknown paths share one label: a scanner must not fill the metrics.
    let label = known.map_or_else(
        || if is_public(path) { "infrastructure" } else { "unknown" },
        |method| method.path,
    );
    let request_id = request_id(request.headers());
    // Of the highest level, so that whatever is logged has the request id.
    let span = tracing::error_span!("rpc", otel.name = label, rpc.method = label, request_id = &*request_id);
    aeterna_telemetry::trace::continue_trace(&span, request.headers());
    request.extensions_mut().insert(Arc::clone(&request_id));

    let inner = &stack.0;
    let method = KeyValue::new("method", label);
    let under_way = UnderWay::new(inner, &method);
    let answer = AssertUnwindSafe(next.run(request).instrument(span.clone()))
        .catch_unwind()
        .await;
    let mut response = span.in_scope(|| complete(answer.unwrap_or_else(|_| refuse(Error::internal("a panic")))));
    let code = grpc_status(&response);
    let elapsed = started.elapsed();
    inner
        .requests
        .add(1, &[method.clone(), KeyValue::new("code", format!("{code:?}"))]);
    inner
        .duration
        .record(elapsed.as_secs_f64(), std::slice::from_ref(&method));
    under_way.answered();
    let ms = elapsed.as_secs_f64() * 1e3;
    span.in_scope(|| match code {
        Code::Unauthenticated | Code::PermissionDenied => tracing::info!(?code, ms, "refused"),
        _ => tracing::debug!(?code, ms, "answered"),
    });
    if let Ok(id) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// Counts a call as under way until it is answered, or given up by a caller that does not wait: then as `Cancelled`.
struct UnderWay<'a> {
    inner: &'a Inner,
    method: KeyValue,
    answered: bool,
}

impl<'a> UnderWay<'a> {
    fn new(inner: &'a Inner, method: &KeyValue) -> Self {
        inner.in_flight.add(1, std::slice::from_ref(method));
        Self {
            inner,
            method: method.clone(),
            answered: false,
        }
    }

    fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.inner.in_flight.add(-1, std::slice::from_ref(&self.method));
        if !self.answered {
            let code = KeyValue::new("code", format!("{:?}", Code::Cancelled));
            self.inner.requests.add(1, &[self.method.clone(), code]);
        }
    }
}

/// The caller's request id when it is a plausible one, otherwise a new one.
fn request_id(headers: &HeaderMap) -> Arc<str> {
    let plausible = |id: &&str| !id.is_empty() && id.len() <= 128 && id.bytes().all(|b| b.is_ascii_graphic());
    match headers
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .filter(plausible)
    {
        Some(id) => Arc::from(id),
        None => {
            Arc::from(aeterna_types::MemoryId::new(aeterna_types::Clock::now(&aeterna_types::SystemClock)).to_string())
        }
    }
}

/// Gives our reason to a refusal that the framework made itself.
fn complete(response: Response) -> Response {
    let code = grpc_status(&response);
    if code == Code::Ok || response.headers().contains_key("grpc-status-details-bin") {
        return response;
    }
    let message = Status::from_header_map(response.headers())
        .map(|s| s.message().to_string())
        .unwrap_or_default();
    let error = match code {
        Code::OutOfRange if message.contains("message length too large") => {
            Error::new(Reason::MessageTooLarge, format!("{message}; send less at once"))
        }
        Code::Unimplemented => Error::new(
            Reason::NotServed,
            "this RPC is not served here; see `docs/` for what is",
        ),
        Code::Internal
            if message.contains("decode") || message.contains("Protobuf") || message.contains("compress") =>
        {
            Error::field("(message)", format!("can't be decoded: {message}"))
        }
        Code::Cancelled | Code::DeadlineExceeded => Error::new(Reason::DeadlineExceeded, "the deadline has passed"),
        _ => return response,
    };
    refuse(error)
}

fn is_public(path: &str) -> bool {
    PUBLIC.iter().any(|prefix| path.starts_with(prefix))
}

/// Concurrency, authentication, permission, rate, deadline.
async fn enforce(State(stack): State<Stack>, mut request: Request, next: Next) -> Response {
    let inner = &stack.0;
    if is_public(request.uri().path()) {
        return match inner.public.open(None) {
            Ok(open) => open.count(next.run(request).await),
            Err(error) => refuse(error),
        };
    }
    // A call that another service of this process makes is a part of one that was let in already.
    let inside = request.extensions().get::<InProcess>().is_some();
    let permit = if inside { None } else { inner.permits.try_acquire().ok() };
    if permit.is_none() && !inside {
        let message = format!(
            "{} requests are under way, which is the limit",
            inner.limits.concurrent_requests
        );
        return refuse(Error::new(Reason::RateLimited, message).retry_after(Duration::from_secs(1)));
    }
    let (method, context) = match admit(inner, &request) {
        Ok(admitted) => admitted,
        Err(error) => return refuse(error),
    };
    let principal = context.principal();
    let (deadline, until) = (context.deadline(), principal.until);
    let checked = !inside && !matches!(inner.verifier, Verifier::Open);
    let tenant = checked.then_some(&principal.tenant);
    let _share = match tenant.map(|tenant| inner.shares.take(tenant)).transpose() {
        Ok(share) => share,
        Err(most) => {
            let message = format!("{most} requests of this tenant are under way, which is its share");
            return refuse(Error::new(Reason::RateLimited, message).retry_after(Duration::from_secs(1)));
        }
    };
    let counts = method.server_streaming && !inside;
    let open = match counts.then(|| inner.streams.open(tenant)).transpose() {
        Ok(open) => open,
        Err(error) => return refuse(error),
    };
    request.extensions_mut().insert(context);
    let answer = async {
        let answer = expiry::bounded(method, until, next.run(request)).await;
        match open {
            Some(open) => open.count(answer),
            None => answer,
        }
    };
    let Some(deadline) = deadline else { return answer.await };
    // A handler that never yields can't be timed out; its answer is late all the same.
    match tokio::time::timeout_at(deadline.into(), answer).await {
        Ok(response) if Instant::now() < deadline => response,
        _ => refuse(Error::new(
            Reason::DeadlineExceeded,
            "the deadline has passed; allow more time",
        )),
    }
}

/// Decides whether a request may run, and as whom.
fn admit(inner: &Inner, request: &Request) -> Result<(&'static Method, RequestContext), Error> {
    let method = aeterna_proto::method(request.uri().path());
    let method = method.ok_or_else(|| {
        Error::new(
            Reason::NotServed,
            "there is no such RPC; list them with `grpcurl -plaintext HOST:PORT list`",
        )
    })?;
    let headers = request.headers();
    let principal = match request.extensions().get::<InProcess>() {
        Some(InProcess(principal)) => Arc::clone(principal),
        None => {
            if matches!(inner.verifier, Verifier::Open) {
                refuse_rebinding(request)?;
            }
            let authorization = headers.get(http::header::AUTHORIZATION);
            let authorization = authorization.map(|value| value.to_str().unwrap_or(""));
            Arc::new(inner.verifier.verify(authorization)?)
        }
    };
    authorize(&principal, method.permission)?;
    let now = Instant::now();
    let who = format!("{}\0{}", principal.tenant, principal.subject);
    if request.extensions().get::<InProcess>().is_none() {
        inner.rates.take(&who, now).map_err(|wait| {
            let message = format!("more than {} requests per second", inner.limits.requests_per_second);
            Error::new(Reason::RateLimited, message).retry_after(wait)
        })?;
    }
    let timeout = match headers.get("grpc-timeout") {
        None => inner.limits.default_timeout,
        Some(value) => value.to_str().ok().and_then(parse_timeout).ok_or_else(|| {
            Error::field(
                "grpc-timeout",
                "is not 1 to 8 digits with a unit out of H, M, S, m, u, n",
            )
        })?,
    };
    let deadline = now + timeout.min(inner.limits.max_timeout);
    let request_id = request
        .extensions()
        .get::<Arc<str>>()
        .cloned()
        .unwrap_or_else(|| Arc::from(""));
    let carried = ["authorization", "traceparent", "tracestate"];
    let carried = carried
        .iter()
        .filter_map(|name| Some((http::HeaderName::from_static(name), headers.get(*name)?.clone())));
    let context = RequestContext::new(principal, request_id, Some(deadline), carried.collect());
    Ok((method, context))
}

/// Without tokens, loopback is the only wall, and a web page whose name was rebound to loopback stands behind it: it is
/// told by the name that it calls.
fn refuse_rebinding(request: &Request) -> Result<(), Error> {
    let header = request
        .headers()
        .get(http::header::HOST)
        .and_then(|host| host.to_str().ok());
    let Some(authority) = request.uri().authority().map(http::uri::Authority::as_str).or(header) else {
        return Ok(());
    };
    let host = authority.parse::<http::uri::Authority>();
    let host = host.as_ref().map_or("", |authority| authority.host());
    let address = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<std::net::IpAddr>();
    if host == "localhost" || address.is_ok_and(|address| address.is_loopback()) {
        return Ok(());
    }
    let message =
        "without tokens only calls to localhost, 127.0.0.1 or [::1] are answered; set up authentication for others";
    Err(Error::new(Reason::PermissionDenied, message).with("host", host))
}

/// The value of `grpc-timeout`, as the gRPC over HTTP/2 protocol defines it.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.is_empty() || number.len() > 8 || !number.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_follow_the_protocol() {
        assert_eq!(parse_timeout("100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "-1S", "123456789S", "1s", "1 S", "１S", "1é"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_hostile_request_id_is_replaced() {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, HeaderValue::from_static("mine-1"));
        assert_eq!(&*request_id(&headers), "mine-1");
        headers.insert(REQUEST_ID, HeaderValue::from_str(&"x".repeat(129)).unwrap());
        assert_eq!(request_id(&headers).len(), 36);
    }
}
