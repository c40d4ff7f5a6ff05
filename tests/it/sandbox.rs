//! A process's worth of services on a handed-over listener, without a process.

use std::net::SocketAddr;

use aeterna_auth::{Expected, Verifier};
use aeterna_embedding::{Config, Deps};
use aeterna_rpc::{AnyChannel, Host, HostConfig, Router};
use aeterna_telemetry::Telemetry;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A secret for tests.
pub const SECRET: &str = "a-secret-for-tests-of-32-bytes-or-more";

/// Running services; they are drained by [`Sandbox::stop`].
pub struct Sandbox {
    pub address: SocketAddr,
    router: Router,
    stop: CancellationToken,
    served: JoinHandle<()>,
}

impl Sandbox {
    /// Everything on the defaults, with flags laid over them.
    pub async fn start(flags: &[(&str, &str)]) -> Self {
        let flags = flags
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect();
        let sources = aeterna_config::Sources {
            flags,
            ..Default::default()
        };
        let settings = aeterna_rpc::load(&[aeterna_embedding::SETTINGS], &sources).expect("the flags are settings");
        let mut reader = settings.reader();
        let config = HostConfig::read(&mut reader).zip(Config::read(&mut reader));
        let (host_config, config) = reader.finish(config).expect("the settings are valid");
        let verifier = match host_config.secret() {
            Some(secret) => Verifier::secret(secret.expose(), Expected::default()).expect("the secret is long enough"),
            None => Verifier::Open,
        };
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let telemetry = Telemetry::local().expect("metrics need nothing");
        let services = [aeterna_embedding::SERVICE];
        let host = Host::on(listener, verifier, host_config, telemetry, &services).expect("the host starts");
        let routes = aeterna_embedding::build(config, Deps::of(&host))
            .await
            .expect("the service starts");
        let router = host.stack.wrap(routes);
        let (address, stop) = (host.address().expect("the socket is bound"), host.stop.clone());
        let served = tokio::spawn(host.serve([router.clone()]));
        Self {
            address,
            router,
            stop,
            served,
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
