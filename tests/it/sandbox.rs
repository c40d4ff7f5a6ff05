//! A process's worth of services on a handed-over listener, without a process.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use aeterna_config::Sources;
use aeterna_rpc::{AnyChannel, Host, Router};
use aeterna_telemetry::Telemetry;
use aeterna_types::{Clock, SystemClock};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Running services; they are drained by [`Sandbox::stop`].
pub struct Sandbox {
    pub address: SocketAddr,
    router: Router,
    stop: CancellationToken,
    served: JoinHandle<()>,
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
    pub async fn start_in(data: &Path, flags: &[(&str, &str)]) -> Self {
        Self::start_at(data, flags, Arc::new(SystemClock)).await
    }

    /// The same at the time of a clock of the caller's.
    pub async fn start_at(data: &Path, flags: &[(&str, &str)], clock: Arc<dyn Clock>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let mut flags: Vec<_> = flags
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect();
        flags.push(("server.data_dir".into(), data.display().to_string()));
        let sources = Sources {
            flags,
            ..Default::default()
        };
        let (_, config, services) = aeterna::load(&sources, &aeterna::Role::ALL).expect("the settings are valid");
        let verifier = config.verifier().expect("the settings of `auth` are good");
        let telemetry = Telemetry::local().expect("metrics need nothing");
        let mut host = Host::on(listener, verifier, config, telemetry, &services.names()).expect("the host starts");
        host.clock = clock;
        let parts = aeterna::build(services, &host).await.expect("the services start");
        let routers = parts.routers.iter().cloned();
        let router = routers
            .reduce(|all, one| all.reset_fallback().merge(one.reset_fallback()))
            .expect("there are services");
        let (address, stop) = (host.address(), host.stop.clone());
        Self {
            address,
            router,
            stop,
            served: tokio::spawn(host.serve(parts)),
            _data: None,
        }
    }

    /// The two ways to reach the services, which must behave alike.
    pub fn ways(&self) -> [(&'static str, AnyChannel); 2] {
        let remote = AnyChannel::remote(&format!("http://{}", self.address)).expect("the address is a URL");
        [("local", AnyChannel::Local(self.router.clone())), ("loopback", remote)]
    }

    /// Drains and waits until the port is free and the stores are closed.
    pub async fn stop(self) {
        self.stop.cancel();
        self.served.await.expect("serving does not panic");
    }
}
