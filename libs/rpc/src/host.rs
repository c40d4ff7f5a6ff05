//! A process around services: configuration, telemetry, authentication, one listener, drain.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use aeterna_auth::{Expected, JwksFile, Verifier};
use aeterna_config::{Problems, Reader, Secret, Setting, Settings, Sources};
use aeterna_error::{Error, Reason};
use aeterna_telemetry::{LogFormat, Telemetry};
use aeterna_types::{Clock, SystemClock};
use axum::Router;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::credentials::Credentials;
use crate::flags::{sources, with_settings};
use crate::health::Health;
use crate::layers::Stack;
use crate::limits::Limits;
use crate::serve::{Server, http_routes, infrastructure};

/// The settings of every process.
pub const SETTINGS: &[Setting] = &[
    Setting::new(
        "server.listen",
        "127.0.0.1:7700",
        "Address of gRPC, gRPC-Web, /metrics, /healthz and /readyz.",
    ),
    Setting::new(
        "server.data_dir",
        ".aeterna",
        "Directory of the embedded stores and models.",
    ),
    Setting::new("server.drain", "10s", "How long open calls may go on after SIGTERM."),
    Setting::new(
        "auth.mode",
        "auto",
        "`auto`, `hs256`, `rs256`, `jwks` or `none`; `auto` takes what is configured below, and `none` is for loopback only.",
    ),
    Setting::secret(
        "auth.hs256_secret",
        "auth.hs256_secret_file",
        "Shared secret of at least 32 bytes; `auth.hs256_secret_file` reads it from a file.",
    ),
    Setting::new("auth.rs256_public_key_file", "", "RSA public key in PEM."),
    Setting::new("auth.jwks_file", "", "JWKS file; it is read again when it changes."),
    Setting::new("auth.issuer", "", "Issuer that tokens must name; empty: any."),
    Setting::new("auth.audience", "", "Audience that tokens must name; empty: any."),
    Setting::secret(
        "auth.service_token",
        "auth.service_token_file",
        "Token that this process presents to peers in its own background work; with `auth.hs256_secret` it signs its own.",
    ),
    Setting::new(
        "log.filter",
        "info",
        "What is logged, as `tracing` directives, for instance `info,aeterna_memory=debug`.",
    ),
    Setting::new("log.format", "pretty", "`pretty` or `json`."),
];

/// How a process is set up.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where it keeps things.
    pub data_dir: PathBuf,
    /// How long open calls may go on after SIGTERM.
    pub drain: Duration,
    /// What is logged.
    pub log_filter: String,
    /// How it is logged.
    pub log_format: LogFormat,
    /// Limits on callers.
    pub limits: Limits,
    auth: AuthConfig,
}

#[derive(Clone, Debug)]
struct AuthConfig {
    mode: String,
    secret: Option<Secret>,
    public_key: String,
    jwks: String,
    service_token: Option<Secret>,
    expected: Expected,
}

impl HostConfig {
    /// Reads the settings; `None` after noting problems.
    pub fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let listen = reader.get("server.listen");
        let data_dir = reader.text("server.data_dir");
        let drain = reader.duration("server.drain");
        let log_filter = reader.text("log.filter");
        let log_format = reader.get("log.format");
        let limits = Limits::read(reader);
        let auth = AuthConfig::read(reader);
        Some(Self {
            listen: listen?,
            data_dir: data_dir?.into(),
            drain: drain?,
            log_filter: log_filter?,
            log_format: log_format?,
            limits: limits?,
            auth: auth?,
        })
    }

    /// The verifier that the settings ask for.
    ///
    /// # Errors
    /// When keys can't be used, or nothing is configured and the address is not loopback.
    pub fn verifier(&self) -> Result<Verifier, Error> {
        let auth = &self.auth;
        let mode = match auth.mode.as_str() {
            "auto" if auth.secret.is_some() => "hs256",
            "auto" if !auth.public_key.is_empty() => "rs256",
            "auto" if !auth.jwks.is_empty() => "jwks",
            "auto" => "none",
            mode => mode,
        };
        let refuse = |message: String| Error::new(Reason::NotConfigured, message);
        let expected = auth.expected.clone();
        let verifier = match mode {
            "hs256" => Verifier::secret(auth.secret.as_ref().map_or("", Secret::expose), expected),
            "rs256" => {
                let pem = std::fs::read_to_string(&auth.public_key)
                    .map_err(|error| refuse(format!("can't read `auth.rs256_public_key_file`: {error}")))?;
                Verifier::public_key(&pem, expected)
            }
            "jwks" => JwksFile::open(Path::new(&auth.jwks)).map(|file| Verifier::Jwks(file, expected)),
            _ if self.listen.ip().is_loopback() => return Ok(Verifier::Open),
            _ => {
                return Err(refuse(format!(
                    "`server.listen` is {}, which others can reach, and no authentication is configured; set \
                     `auth.hs256_secret_file`, `auth.rs256_public_key_file` or `auth.jwks_file`, or listen on 127.0.0.1",
                    self.listen
                )));
            }
        };
        verifier.map_err(|error| refuse(format!("authentication can't be set up: {error}")))
    }

    /// What tokens must name.
    pub fn expected(&self) -> &Expected {
        &self.auth.expected
    }

    /// The shared secret, for signing tokens on the command line.
    pub fn secret(&self) -> Option<&Secret> {
        self.auth.secret.as_ref()
    }
}

impl AuthConfig {
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let mode = reader.text("auth.mode");
        if !matches!(
            mode.as_deref(),
            None | Some("auto" | "hs256" | "rs256" | "jwks" | "none")
        ) {
            reader.problem("auth.mode", "write `auto`, `hs256`, `rs256`, `jwks` or `none`");
        }
        let secret = reader.secret("auth.hs256_secret");
        let public_key = reader.text("auth.rs256_public_key_file");
        let jwks = reader.text("auth.jwks_file");
        let service_token = reader.secret("auth.service_token");
        let issuer = reader.optional("auth.issuer");
        let audience = reader.optional("auth.audience");
        let expected = Expected {
            issuer: issuer?,
            audience: audience?,
        };
        Some(Self {
            mode: mode?,
            secret: secret?,
            public_key: public_key?,
            jwks: jwks?,
            service_token: service_token?,
            expected,
        })
    }

    fn credentials(&self) -> Credentials {
        match (&self.service_token, &self.secret) {
            (Some(token), _) => Credentials::Token(token.clone()),
            (None, Some(secret)) => Credentials::Signed {
                secret: secret.clone(),
                expected: self.expected.clone(),
            },
            (None, None) => Credentials::None,
        }
    }
}

/// Everything around the services of one process.
#[derive(Debug)]
pub struct Host {
    /// Its setup.
    pub config: HostConfig,
    /// Metrics and traces.
    pub telemetry: Telemetry,
    /// The layers in front of services.
    pub stack: Stack,
    /// Health of the services.
    pub health: Health,
    /// Where the time of its services comes from.
    pub clock: Arc<dyn Clock>,
    /// Cancelled when the process should end: calls under way are still answered.
    pub stop: CancellationToken,
    /// Cancelled when the last call was answered: background work ends and stores close.
    pub drained: CancellationToken,
    address: SocketAddr,
    /// Until it is served.
    listener: Option<TcpListener>,
    infrastructure: Routes,
}

impl Host {
    /// Binds the listener, before any heavy work begins.
    ///
    /// # Errors
    /// When authentication can't be set up or the address is taken.
    pub async fn bind(config: HostConfig, telemetry: Telemetry, services: &[&str]) -> Result<Self, Error> {
        let verifier = config.verifier()?;
        let listener = TcpListener::bind(config.listen).await.map_err(|error| {
            let message = format!("can't listen on {} (`server.listen`): {error}", config.listen);
            Error::new(Reason::NotConfigured, message)
        })?;
        let host = Self::on(listener, verifier, config, telemetry, services)?;
        host.health.tell_all().await;
        Ok(host)
    }

    /// The same on a listener that is handed over.
    ///
    /// # Errors
    /// When reflection can't be set up.
    pub fn on(
        listener: TcpListener,
        verifier: Verifier,
        config: HostConfig,
        telemetry: Telemetry,
        services: &[&str],
    ) -> Result<Self, Error> {
        let stack = Stack::new(verifier, config.limits, &telemetry.meter("aeterna_rpc"));
        let (infrastructure, health) = infrastructure(services)?;
        let address = listener.local_addr().map_err(Error::internal)?;
        Ok(Self {
            address,
            config,
            telemetry,
            stack,
            health,
            clock: Arc::new(SystemClock),
            stop: CancellationToken::new(),
            drained: CancellationToken::new(),
            listener: Some(listener),
            infrastructure,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What this process presents to peers in its own background work.
    pub fn credentials(&self) -> Credentials {
        self.config.auth.credentials()
    }

    /// Begins to serve, before there are services: health, readiness, reflection and metrics answer at once, everything else
    /// is UNAVAILABLE.
    pub fn open(&mut self) -> Front {
        let (health, stop, announced) = (self.health.clone(), self.stop.clone(), CancellationToken::new());
        let announce = announced.clone();
        tokio::spawn(async move {
            stop.cancelled().await;
            health.drain().await;
            announce.cancel();
        });
        let starting = Router::new().fallback(|| async {
            let error = Error::unavailable("the services are starting; try again");
            tonic::Status::from(error).into_http::<axum::body::Body>()
        });
        let front = Front {
            router: Arc::new(RwLock::new(self.front(Vec::new(), starting))),
            served: None,
        };
        let Some(listener) = self.listener.take() else {
            return front;
        };
        let server = Server {
            listener,
            router: Arc::clone(&front.router),
            connections: self.config.limits.connections,
            drain: self.config.drain,
        };
        Front {
            served: Some(tokio::spawn(server.run(announced))),
            ..front
        }
    }

    /// All routes on one port; what nobody answers for goes to `rest`.
    fn front(&self, services: Vec<Router>, rest: Router) -> Router {
        let infrastructure = self.stack.wrap(self.infrastructure.clone());
        // Each service's router answers for its own paths only.
        services
            .into_iter()
            .fold(infrastructure, |all, one| all.merge(one.reset_fallback()))
            .reset_fallback()
            // In front of RPCs only: it turns plain HTTP/1.1 requests away.
            .layer(tonic_web::GrpcWebLayer::new())
            .merge(http_routes(self.health.clone(), self.telemetry.clone()))
            .fallback_service(rest)
    }

    /// Serves services until `stop` is cancelled, drains, and waits for the background work to end.
    pub async fn serve(mut self, parts: Parts) {
        let front = self.open();
        self.finish(front, parts).await;
    }

    /// Puts services behind a front that is open, and does the rest of [`Host::serve`].
    async fn finish(self, front: Front, parts: Parts) {
        let unknown = self.stack.wrap(Routes::default());
        let router = self.front(parts.routers, unknown);
        *front.router.write().unwrap_or_else(PoisonError::into_inner) = router;
        self.health.start().await;
        if let Some(served) = front.served
            && let Err(error) = served.await
        {
            tracing::error!(%error, "the server ended badly");
        }
        self.drained.cancel();
        for task in parts.background {
            if let Err(error) = task.await {
                tracing::error!(%error, "background work ended badly");
            }
        }
        self.telemetry.shutdown();
    }
}

/// A port that is served while the services behind it start.
#[derive(Debug)]
pub struct Front {
    router: Arc<RwLock<Router>>,
    served: Option<JoinHandle<()>>,
}

/// What the services of a process bring.
#[derive(Debug, Default)]
pub struct Parts {
    /// Their routes, each with the stack in front.
    pub routers: Vec<Router>,
    /// Their background work, which ends when the process has drained.
    pub background: Vec<JoinHandle<()>>,
}

/// Cancels `stop` on SIGTERM or SIGINT, and ends the process at once on another one.
///
/// # Errors
/// When the signals can't be listened to.
pub fn stop_on_signal(stop: &CancellationToken) -> std::io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
        }
        stop.cancel();
        // One wish may come as several signals: to the process, and to its group.
        tokio::time::sleep(Duration::from_secs(1)).await;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("told to stop once more: ending at once; what was acknowledged is stored");
        std::process::exit(1);
    });
    Ok(())
}

/// Loads settings for a process that runs the services whose tables are given.
///
/// # Errors
/// Every problem found.
pub fn load(tables: &[&[Setting]], sources: &Sources) -> Result<Settings, Problems> {
    let own = [SETTINGS, crate::LIMIT_SETTINGS];
    let tables: Vec<&[Setting]> = own.into_iter().chain(tables.iter().copied()).collect();
    Settings::load(&tables, sources)
}

/// Runs a process of one service: loads its settings from the command line and environment, builds its services, serves
/// until it is told to stop. Problems go to standard error.
pub fn run<C>(
    command: clap::Command,
    tables: &[&[Setting]],
    services: &[&'static str],
    read: impl Fn(&mut Reader<'_>) -> Option<C>,
    build: impl AsyncFnOnce(C, &Host) -> Result<Parts, Error>,
) -> std::process::ExitCode {
    let own = [SETTINGS, crate::LIMIT_SETTINGS];
    let all: Vec<&[Setting]> = own.into_iter().chain(tables.iter().copied()).collect();
    let matches = with_settings(command, &all).get_matches();
    let config = load(tables, &sources(&matches, &all)).and_then(|settings| {
        let mut reader = settings.reader();
        let both = (HostConfig::read(&mut reader), read(&mut reader));
        reader.finish(both.0.zip(both.1))
    });
    let outcome = config
        .map_err(|problems| problems.to_string())
        .and_then(|(host, config)| {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
            let runtime = runtime.map_err(|error| format!("can't start the runtime: {error}"))?;
            runtime.block_on(serve(host, config, services, build))
        });
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(message) => {
            // The log may not be set up yet, and a person is reading.
            #[allow(clippy::print_stderr)]
            {
                eprintln!("error: {message}");
            }
            std::process::ExitCode::FAILURE
        }
    }
}

/// Binds, builds and serves; errors are complete sentences for a person.
///
/// # Errors
/// Whatever keeps the process from serving.
pub async fn serve<C>(
    config: HostConfig,
    services_config: C,
    services: &[&'static str],
    build: impl AsyncFnOnce(C, &Host) -> Result<Parts, Error>,
) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let telemetry = Telemetry::from_environment("aeterna").map_err(|error| text(&error))?;
    telemetry
        .init_logs(&config.log_filter, config.log_format)
        .map_err(|error| text(&error))?;
    let mut host = Host::bind(config, telemetry, services)
        .await
        .map_err(|error| text(&error))?;
    stop_on_signal(&host.stop).map_err(|error| text(&error))?;
    let front = host.open();
    let address = host.address();
    // A signal ends a start that waits for a peer, too.
    let stopped = host.stop.clone();
    let parts = tokio::select! {
        parts = build(services_config, &host) => parts.map_err(|error| error.chain())?,
        () = stopped.cancelled() => return Ok(()),
    };
    tracing::info!(%address, services = services.join(" "), "serving");
    host.finish(front, parts).await;
    tracing::info!("stopped");
    Ok(())
}
