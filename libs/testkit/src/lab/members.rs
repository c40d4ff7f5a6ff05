//! What each member is started with.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{COPIES, Lab, NODES, QDRANT, SERVICES, secrets};
use crate::postgres::{binaries, unprivileged};

/// How soon the cluster takes a silent primary for dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Timings {
    /// ttl 30, loop_wait 10, retry_timeout 10
    Specified,
    /// ttl 20, loop_wait 5, retry_timeout 5
    Tuned,
}

impl Timings {
    /// How often Patroni looks, and the leader renews its lease.
    pub fn round(self) -> Duration {
        match self {
            Self::Specified => Duration::from_secs(10),
            Self::Tuned => Duration::from_secs(5),
        }
    }

    fn sentinel(self) -> &'static str {
        match self {
            Self::Specified => include_str!("../../../../deploy/redis/sentinel-specified.conf"),
            Self::Tuned => include_str!("../../../../deploy/redis/sentinel-tuned.conf"),
        }
    }

    fn settings(self) -> &'static str {
        match self {
            Self::Specified => include_str!("../../../../deploy/patroni/specified.yml"),
            Self::Tuned => include_str!("../../../../deploy/patroni/tuned.yml"),
        }
    }
}

/// How often Qdrant has each vector, and how many of them must have a change before it counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Replicas {
    /// Twice, and one must have a change
    Usual,
    /// Three times, and two must have a change
    Strict,
    /// Twice, and both must have a change: writes to the index stop while a node is away
    Specified,
}

impl Replicas {
    fn parameters(self) -> &'static str {
        match self {
            Self::Usual => "replicas=2&consistency=1",
            Self::Strict => "replicas=3&consistency=2",
            Self::Specified => "replicas=2&consistency=2",
        }
    }
}

/// Where the lab keeps Patroni, for an account that can't read where it was installed.
pub(super) const PYTHON: &str = "python";
/// What the Sentinels call the master.
pub(super) const MASTER: &str = "aeterna";
/// The password by which Redis servers and Sentinels come to one another.
pub(super) const ADMIN: &str = "lab-admin";
const QDRANT_SETTINGS: &str = include_str!("../../../../deploy/qdrant/qdrant.yaml");
const HAPROXY: &str = include_str!("../../../../deploy/haproxy/haproxy.cfg");

/// It runs as whoever starts the lab; the others refuse root, or have no need of it.
pub(super) fn is_ours(member: &str) -> bool {
    member == "envoy" || member.starts_with(QDRANT) || SERVICES.iter().any(|service| member.starts_with(service))
}

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

impl Lab {
    /// What a member is, without its number.
    pub(super) fn kind(member: &str) -> &str {
        member.trim_end_matches(|last: char| last.is_ascii_digit())
    }

    pub(super) fn write_configuration(&self, member: &str) -> anyhow::Result<()> {
        let place = self.place(member);
        let write = |name: &str, text: &str| std::fs::write(place.path(name), text);
        match Self::kind(member) {
            "pg" => {
                // Patroni reads all files of a directory, one over the other. JSON is YAML.
                std::fs::create_dir_all(place.path("conf"))?;
                write("conf/10-cluster.yml", self.plan.setup.timings.settings())?;
                write("conf/20-node.yml", &self.patroni(member)?.to_string())?;
            }
            QDRANT => write("qdrant.yaml", QDRANT_SETTINGS)?,
            "haproxy" => write("haproxy.cfg", HAPROXY)?,
            "redis" => write("redis.conf", &self.redis(member))?,
            "sentinel" => write("sentinel.conf", &self.sentinel(member))?,
            "envoy" => write("envoy.json", &self.envoy().to_string())?,
            _ => {}
        }
        Ok(())
    }

    pub(super) fn command(&self, member: &str) -> anyhow::Result<Command> {
        let place = self.place(member);
        let mut command = match Self::kind(member) {
            "etcd" => self.etcd(member),
            "pg" => {
                let mut command = unprivileged(Path::new("/usr/bin/python3"));
                command.args(["-m", "patroni"]).arg(place.path("conf"));
                command.env("PYTHONPATH", self.directory().join(PYTHON));
                command
            }
            // Both rewrite their settings, when another server becomes the master.
            "redis" | "sentinel" => {
                let kind = Self::kind(member);
                let mut command = unprivileged(Path::new(&format!(
                    "/usr/bin/redis-{}",
                    kind.replace("redis", "server")
                )));
                command.arg(place.path(&format!("{kind}.conf")));
                command
            }
            QDRANT => self.qdrant(member)?,
            "haproxy" => {
                let mut command = unprivileged(Path::new("/usr/sbin/haproxy"));
                command.arg("-db").arg("-f").arg(place.path("haproxy.cfg"));
                command.env("PRIMARY", local(self.port("haproxy")));
                command.env("STANDBYS", local(self.port("haproxy.standbys")));
                for number in NODES {
                    command.env(format!("PG{number}"), local(self.port(&format!("pg{number}"))));
                    let api = self.port(&format!("pg{number}.api"));
                    command.env(format!("PG{number}_API"), api.to_string());
                }
                command
            }
            "envoy" => {
                let mut command = Command::new(self.program("envoy")?);
                command.arg("-c").arg(place.path("envoy.json"));
                // With hot restarts it would end with the program that started it.
                command.args(["--disable-hot-restart", "--concurrency", "2", "--log-level", "warning"]);
                command
            }
            service if SERVICES.contains(&service) => self.service(member, service)?,
            _ => bail!("there is no member `{member}`: {}", self.members().join(", ")),
        };
        command.current_dir("/");
        Ok(command)
    }

    fn program(&self, name: &str) -> anyhow::Result<&Path> {
        let path = self.plan.setup.programs.get(name);
        path.map(AsRef::as_ref)
            .with_context(|| format!("the lab was made without `{name}`"))
    }

    fn etcd(&self, member: &str) -> Command {
        let client = format!("http://{}", local(self.port(member)));
        let peer = format!("http://{}", local(self.port(&format!("{member}.peer"))));
        let peers = NODES.map(|number| {
            let port = self.port(&format!("etcd{number}.peer"));
            format!("etcd{number}=http://{}", local(port))
        });
        let mut command = unprivileged(Path::new("etcd"));
        command
            .args(["--name", member, "--data-dir"])
            .arg(self.place(member).path("data"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &peers.join(","), "--log-level", "warn"]);
        command
    }

    fn qdrant(&self, member: &str) -> anyhow::Result<Command> {
        let place = self.place(member);
        let peer = |member: &str| self.port(&format!("{member}.peer"));
        let uri = |member: &str| format!("http://{}", local(peer(member)));
        let mut command = Command::new(self.program(QDRANT)?);
        command.arg("--config-path").arg(place.path("qdrant.yaml"));
        command.args(["--uri", &uri(member), "--bootstrap", &uri("qdrant1")]);
        command.env("QDRANT_INIT_FILE_PATH", place.path("initialized"));
        command.env("QDRANT__SERVICE__API_KEY", secrets::QDRANT);
        for (name, path) in [("STORAGE", "data"), ("SNAPSHOTS", "snapshots")] {
            command.env(format!("QDRANT__STORAGE__{name}_PATH"), place.path(path));
        }
        let http = self.port(&format!("{member}.http"));
        for (name, port) in [
            ("SERVICE__GRPC_PORT", self.port(member)),
            ("SERVICE__HTTP_PORT", http),
            ("CLUSTER__P2P__PORT", peer(member)),
        ] {
            command.env(format!("QDRANT__{name}"), port.to_string());
        }
        Ok(command)
    }

    /// The URI of Qdrant.
    pub fn vectors(&self) -> String {
        let hosts = NODES.map(|number| local(self.port(&format!("{QDRANT}{number}"))));
        let parameters = self.plan.setup.replicas.parameters();
        format!("qdrant://{}/lab?{parameters}", hosts.join(","))
    }

    fn redis(&self, member: &str) -> String {
        let directory = self.place(member).path("");
        let mut text = format!(
            "bind 127.0.0.1\nport {}\ndir {}\n",
            self.port(member),
            directory.display()
        );
        if member != "redis1" {
            let _ = writeln!(text, "replicaof 127.0.0.1 {}", self.port("redis1"));
        }
        let _ = writeln!(text, "requirepass {ADMIN}\nmasterauth {ADMIN}");
        let user = include_str!("../../../../deploy/redis/service.acl");
        let _ = writeln!(text, "{} on >{}", user.trim_end(), secrets::REDIS);
        text + include_str!("../../../../deploy/redis/redis.conf")
    }

    fn sentinel(&self, member: &str) -> String {
        let directory = self.place(member).path("");
        let (port, master) = (self.port(member), self.port("redis1"));
        let mut text = format!("bind 127.0.0.1\nport {port}\ndir {}\n", directory.display());
        let _ = writeln!(text, "sentinel monitor {MASTER} 127.0.0.1 {master} 2");
        let _ = writeln!(
            text,
            "sentinel auth-pass {MASTER} {ADMIN}\nrequirepass {}",
            secrets::SENTINELS
        );
        text + self.plan.setup.timings.sentinel()
    }

    fn patroni(&self, member: &str) -> anyhow::Result<Value> {
        let address = local(self.port(member));
        let api = local(self.port(&format!("{member}.api")));
        let etcd = NODES.map(|number| local(self.port(&format!("etcd{number}"))));
        // All is on loopback, and whoever is there may do everything.
        let trust = [
            "local all all trust",
            "host all all 127.0.0.1/32 trust",
            "host replication all 127.0.0.1/32 trust",
        ];
        Ok(json!({
            "scope": "aeterna",
            "name": member,
            "restapi": { "listen": api, "connect_address": api },
            "etcd3": { "hosts": etcd },
            "bootstrap": { "initdb": [{ "encoding": "UTF8" }, { "locale": "C" }, "data-checksums", "no-sync"] },
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": self.place(member).path("data"),
                "bin_dir": binaries(),
                "pgpass": self.place(member).path("pgpass"),
                "pg_hba": trust,
                "authentication": {
                    "superuser": { "username": "postgres" },
                    "replication": { "username": "replicator" },
                },
                // A path of a socket is short; nobody here needs one.
                "parameters": { "unix_socket_directories": "", "max_connections": 200, "shared_buffers": "64MB" },
            },
        }))
    }

    /// The URI of PostgreSQL for a program that can't ask the nodes.
    pub fn proxied_store(&self) -> String {
        format!("postgres://service@{}/aeterna", local(self.port("haproxy")))
    }

    /// The URI of Redis by its Sentinels.
    pub fn live(&self) -> String {
        let hosts = NODES.map(|number| local(self.port(&format!("sentinel{number}"))));
        format!("redis+sentinel://aeterna@{}/{MASTER}", hosts.join(","))
    }

    fn service(&self, member: &str, service: &str) -> anyhow::Result<Command> {
        let mut command = Command::new(self.program(service)?);
        command.args(["--listen", &local(self.port(member)), "--data-dir"]);
        command.arg(self.place(member).path("data"));
        let redis = if service == "memory" {
            "MEMORY_LIVE"
        } else {
            "EMBEDDING_SHARED_CACHE"
        };
        for (name, value) in [
            ("", self.live().as_str()),
            ("_PASSWORD", secrets::REDIS),
            ("_SENTINEL_PASSWORD", secrets::SENTINELS),
        ] {
            command.env(format!("AETERNA_{redis}{name}"), value);
        }
        if service == "memory" {
            let nodes = |suffix: &str| NODES.map(|number| self.port(&format!("pg{number}{suffix}")));
            let hosts = nodes("").map(local).join(",");
            let patroni = nodes(".api").map(|port| port.to_string()).join(",");
            let store = format!("postgres://service@{hosts}/aeterna?patroni={patroni}");
            command
                .env("AETERNA_MEMORY_STORE", store)
                .env("AETERNA_MEMORY_STORE_OWNER", "owner");
            command.env("AETERNA_MEMORY_EMBEDDING", self.address());
            // One copy of each kind.
            if member.ends_with('2') {
                command.env("AETERNA_MEMORY_READ_FROM", "any");
            }
            if self.replicas().is_some() {
                command.env("AETERNA_MEMORY_INDEX", self.vectors());
                command.env("AETERNA_MEMORY_INDEX_KEY", secrets::QDRANT);
            }
        }
        Ok(command)
    }

    fn envoy(&self) -> Value {
        let endpoint = |port: u16| {
            let address = json!({ "socket_address": { "address": "127.0.0.1", "port_value": port } });
            json!({ "endpoint": { "address": address } })
        };
        let cluster = |service: &&str| {
            let copies = COPIES.map(|number| endpoint(self.port(&format!("{service}{number}"))));
            json!({
                "name": service,
                "type": "STATIC",
                "connect_timeout": "1s",
                "load_assignment": { "cluster_name": service, "endpoints": [{ "lb_endpoints": copies }] },
                "health_checks": [{
                    "timeout": "1s", "interval": "1s", "unhealthy_threshold": 2, "healthy_threshold": 1,
                    "no_traffic_interval": "1s", "grpc_health_check": {},
                }],
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "explicit_http_config": { "http2_protocol_options": {
                            "connection_keepalive": { "interval": "2s", "timeout": "2s" },
                        } },
                    },
                },
            })
        };
        let route = |service: &&str| {
            json!({
                "match": { "prefix": format!("/aeterna.{service}.v1.") },
                "route": {
                    "cluster": service,
                    // The caller's deadline holds, and nothing else.
                    "timeout": "0s",
                    "max_stream_duration": { "grpc_timeout_header_max": "0s" },
                    // What never reached a copy, another one may have.
                    "retry_policy": {
                        "retry_on": "connect-failure,refused-stream",
                        "num_retries": 2,
                        "host_selection_retry_max_attempts": 5,
                        "retry_host_predicate": [{
                            "name": "envoy.retry_host_predicates.previous_hosts",
                            "typed_config": {
                                "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate",
                            },
                        }],
                    },
                },
            })
        };
        let routes: Vec<Value> = SERVICES.iter().map(route).collect();
        let manager = json!({
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "lab",
            "codec_type": "AUTO",
            "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": routes }] },
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
            }],
        });
        let filter = json!({ "name": "envoy.filters.network.http_connection_manager", "typed_config": manager });
        let listen = |port: u16| json!({ "socket_address": { "address": "127.0.0.1", "port_value": port } });
        json!({
            "admin": { "address": listen(self.port("envoy.admin")) },
            "static_resources": {
                "listeners": [{
                    "name": "grpc",
                    "address": listen(self.port("envoy")),
                    "filter_chains": [{ "filters": [filter] }],
                }],
                "clusters": SERVICES.iter().map(cluster).collect::<Vec<_>>(),
            },
        })
    }
}
