//! One listener for gRPC, gRPC-Web and plain HTTP; drained on request.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use aeterna_error::Error;
use aeterna_telemetry::Telemetry;
use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::ServiceExt as _;

use crate::health::Health;

/// Health and reflection, v1 and v1alpha, for the services named; only what is mounted is listed.
///
/// # Errors
/// INTERNAL when the descriptor set can't be read.
pub fn infrastructure(services: &[&str]) -> Result<(Routes, Health), Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let builder = || {
        services.iter().chain(&["grpc.health.v1.Health"]).fold(
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(aeterna_proto::DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET),
            |builder, service| builder.with_service_name(*service),
        )
    };
    let routes = Routes::new(health)
        .add_service(builder().build_v1().map_err(Error::internal)?)
        .add_service(builder().build_v1alpha().map_err(Error::internal)?);
    Ok((routes, Health::new(reporter)))
}

/// `/healthz` (the process lives), `/readyz` (it can do its work, by dependency) and `/metrics`.
pub fn http_routes(health: Health, telemetry: Telemetry) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready).with_state(health))
        .route("/metrics", get(metrics).with_state(telemetry))
}

async fn ready(State(health): State<Health>) -> Response {
    let status = if health.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (
        status,
        [(header::CONTENT_TYPE, "application/json")],
        format!("{}\n", health.to_json()),
    )
        .into_response()
}

async fn metrics(State(telemetry): State<Telemetry>) -> Response {
    match telemetry.prometheus() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "can't encode the metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Calls under way on one connection.
const STREAMS: u32 = 1000;
/// Bytes that a connection, and a call on it, may send before they are read.
const CONNECTION_WINDOW: u32 = 2 << 20;
const STREAM_WINDOW: u32 = 512 << 10;

/// How long a connection may take to say which HTTP it speaks, and then for the head of a request.
const GREETING: Duration = Duration::from_secs(10);
/// What HTTP/2 begins with (RFC 9113, §3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A listener with everything mounted on it.
#[derive(Debug)]
pub struct Server {
    /// Bound before any heavy work began.
    pub listener: TcpListener,
    /// gRPC services behind the stack, and the plain HTTP routes; each new request takes the router that is there then.
    pub router: Arc<RwLock<Router>>,
    /// Connections open at once.
    pub connections: usize,
    /// How long open calls may go on after the drain began.
    pub drain: Duration,
}

impl Server {
    /// Serves until `stop` is cancelled, then lets open calls end within the drain time.
    pub async fn run(self, stop: CancellationToken) {
        let mut builder = Builder::new(TokioExecutor::new());
        builder
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(GREETING)
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            // Not adaptive: that begins with 64 KiB, and of small messages in flight h2 takes no more than fit into half of it.
            // From a connection on which 150 calls begin at once it would turn away (ENHANCE_YOUR_CALM).
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .keep_alive_interval(Some(Duration::from_secs(30)))
            .keep_alive_timeout(Duration::from_secs(20));
        let connections = Arc::new(Semaphore::new(self.connections));
        let graceful = GracefulShutdown::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = accept(&self.listener, &connections) => accepted,
            };
            let Some((stream, permit)) = accepted else { continue };
            let router = Arc::clone(&self.router);
            let service = tower::service_fn(move |request: http::Request<Incoming>| {
                let current = router.read().unwrap_or_else(PoisonError::into_inner).clone();
                current.oneshot(request)
            });
            let service = TowerToHyperService::new(service);
            let (builder, watcher, stop) = (builder.clone(), graceful.watcher(), stop.clone());
            tokio::spawn(async move {
                let _permit = permit;
                tokio::select! {
                    biased;
                    greets = greets(&stream) => if !greets { return },
                    () = stop.cancelled() => return,
                }
                let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
                if let Err(error) = watcher.watch(connection.into_owned()).await {
                    tracing::debug!(%error, "a connection ended early");
                }
            });
        }
        drop(self.listener);
        if tokio::time::timeout(self.drain, graceful.shutdown()).await.is_err() {
            tracing::warn!(
                seconds = self.drain.as_secs(),
                "calls were still open at the end of the drain time"
            );
        }
    }
}

/// Waits for what a connection begins with, as far as it takes to tell HTTP/1 from HTTP/2; false when that does not come.
async fn greets(stream: &TcpStream) -> bool {
    let greets = async {
        let mut bytes = [0; PREFACE.len()];
        loop {
            match stream.peek(&mut bytes).await {
                Ok(0) | Err(_) => return false,
                Ok(read) if read == PREFACE.len() || bytes[..read] != PREFACE[..read] => return true,
                // While there is something, it is told again at once.
                Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    };
    tokio::time::timeout(GREETING, greets).await.unwrap_or(false)
}

async fn accept(listener: &TcpListener, connections: &Arc<Semaphore>) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let permit = Arc::clone(connections).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "can't set TCP_NODELAY");
            }
            Some((stream, permit))
        }
        Err(error) => {
            // Usually out of file descriptors: waiting lets some close.
            tracing::warn!(%error, "can't accept a connection");
            tokio::time::sleep(Duration::from_millis(100)).await;
            None
        }
    }
}
