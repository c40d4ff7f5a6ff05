//! A process's worth of services on a handed-over listener, without a process.

use std::net::SocketAddr;

use aeterna_auth::{Expected, Verifier};
use aeterna_rpc::{AnyChannel, Host, HostConfig, Router};
use aeterna_telemetry::Telemetry;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use {aeterna_embedding as embedding, aeterna_memory as memory};

/// A secret for tests.
pub const SECRET: &str = "a-secret-for-tests-of-32-bytes-or-more";

/// Running services; they are drained by [`Sandbox::stop`].
pub struct Sandbox {
    pub address: SocketAddr,
    router: Router,
    stop: CancellationToken,
    served: JoinHandle<()>,
    background: JoinHandle<()>,
    _data: Option<tempfile::TempDir>,
}

impl Sandbox {
    /// Everything on the defaults, with flags laid over them.
    pub async fn start(flags: &[(&str, &str)]) -> Self {
        let data = tempfile::tempdir().expect("the temporary directory is writable");
        let mut sandbox = Self::start_in(data.path(), flags).await;
        sandbox._data = Some(data);
        sandbox
    }

    /// The same on a data directory of the caller's.
    pub async fn start_in(data: &std::path::Path, flags: &[(&str, &str)]) -> Self {
        let mut flags: Vec<_> = flags
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect();
        flags.push(("server.data_dir".into(), data.display().to_string()));
        let sources = aeterna_config::Sources {
            flags,
            ..Default::default()
        };
        let settings = aeterna_rpc::load(&[embedding::SETTINGS, memory::SETTINGS], &sources);
        let settings = settings.expect("the flags are settings");
        let mut reader = settings.reader();
        let config = HostConfig::read(&mut reader);
        let config = config
            .zip(embedding::Config::read(&mut reader))
            .zip(memory::Config::read(&mut reader));
        let ((host_config, embed), remember) = reader.finish(config).expect("the settings are valid");
        let verifier = match host_config.secret() {
            Some(secret) => Verifier::secret(secret.expose(), Expected::default()).expect("the secret is long enough"),
            None => Verifier::Open,
        };
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let telemetry = Telemetry::local().expect("metrics need nothing");
        let services = [embedding::SERVICE, memory::SERVICE];
        let host = Host::on(listener, verifier, host_config, telemetry, &services).expect("the host starts");
        let routes = embedding::build(embed, embedding::Deps::of(&host))
            .await
            .expect("the embedding service starts");
        let embedder = host.stack.wrap(routes);
        let deps = memory::Deps::of(&host, AnyChannel::Local(embedder.clone()));
        let service = memory::build(remember, deps).await.expect("the memory service starts");
        let memories = host.stack.wrap(service.routes);
        let router = embedder
            .clone()
            .reset_fallback()
            .merge(memories.clone().reset_fallback());
        let (address, stop) = (host.address().expect("the socket is bound"), host.stop.clone());
        let served = tokio::spawn(host.serve([embedder, memories]));
        Self {
            address,
            router,
            stop,
            served,
            background: service.background,
            _data: None,
        }
    }

    /// The two ways to reach the services, which must behave alike.
    pub fn ways(&self) -> [(&'static str, AnyChannel); 2] {
        let remote = AnyChannel::remote(&format!("http://{}", self.address)).expect("the address is a URL");
        [("local", AnyChannel::Local(self.router.clone())), ("loopback", remote)]
    }

    /// Drains and waits until the port is free again.
    pub async fn stop(self) {
        self.stop.cancel();
        self.served.await.expect("serving does not panic");
        self.background.await.expect("the indexer does not panic");
    }
}

/// The reason in a status's ErrorInfo and the fields in its BadRequest.
pub fn refusal(status: &tonic::Status) -> (String, Vec<String>) {
    use tonic_types::StatusExt as _;
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    let fields = details
        .bad_request()
        .map(|bad| bad.field_violations.iter().map(|v| v.field.clone()).collect());
    (reason, fields.unwrap_or_default())
}
