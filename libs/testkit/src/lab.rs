//! The highly-available stores and our services as plain processes on loopback, to be broken.
//!
//! Three etcd, three PostgreSQL under Patroni, HAProxy, three Redis and three Sentinels, three Qdrant when there is one to run,
//! Envoy, and two copies of each service. Everything lies in one directory with the ports in `lab.json`, so that one program can
//! start a lab and another one look at it, break it and stop it.

mod look;
mod members;
pub(crate) mod process;

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use aeterna_rpc::AnyChannel;
use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::postgres::{ACCOUNT, is_root, psql};
pub use look::{Member, PostgresNode};
pub use members::{Replicas, Timings};
use process::Place;

/// How long one member may take to start, or the cluster to be whole.
const START: Duration = Duration::from_secs(120);
/// How often something is looked at that is waited for.
const LOOK: Duration = Duration::from_millis(100);
/// The nodes of each store.
pub(crate) const NODES: [u8; 3] = [1, 2, 3];
/// Stores, of which there are three each.
pub(crate) const STORES: [&str; 5] = ["etcd", "pg", "redis", "sentinel", QDRANT];
/// The nodes of the vector index.
pub(crate) const QDRANT: &str = "qdrant";
/// The services, and how many copies each has.
pub(crate) const SERVICES: [&str; 2] = ["embedding", "memory"];
pub(crate) const COPIES: [u8; 2] = [1, 2];

/// What the stores ask for. They listen on loopback only; it is there so that every way of proving who one is is in use.
pub mod secrets {
    /// Of the account `aeterna` on the Redis servers.
    pub const REDIS: &str = "lab-redis";
    /// Of the Sentinels.
    pub const SENTINELS: &str = "lab-sentinels";
    /// Of the Qdrant nodes.
    pub const QDRANT: &str = "lab-qdrant";
}

/// A part of a PostgreSQL node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All its processes.
    All,
    /// The server.
    Postgres,
    /// The process that watches over the server.
    Patroni,
}

/// What a lab consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Extent {
    /// Everything.
    All,
    /// Redis and its Sentinels.
    Redis,
    /// Qdrant.
    Qdrant,
}

/// How a lab is set up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// What it consists of.
    pub extent: Extent,
    /// How soon a silent member is taken for dead.
    pub timings: Timings,
    /// How often Qdrant has each vector.
    pub replicas: Replicas,
    /// The paths of `envoy`, of the Python directory of `patroni`, of each service's own program, and of `qdrant` when there
    /// is one; without it each memory service keeps an index of its own.
    pub programs: BTreeMap<String, PathBuf>,
}

impl Setup {
    /// What a test needs, with short time-outs and the usual replicas.
    pub fn of(extent: Extent, programs: BTreeMap<String, PathBuf>) -> Self {
        Self {
            extent,
            timings: Timings::Tuned,
            replicas: Replicas::Usual,
            programs,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Plan {
    #[serde(flatten)]
    setup: Setup,
    /// By member, with the use after a point where a member has several.
    ports: BTreeMap<String, u16>,
}

/// A lab.
#[derive(Debug)]
pub struct Lab {
    directory: PathBuf,
    plan: Plan,
}

impl Lab {
    /// Starts one in a directory that is empty or not there; `say` is told of each step.
    ///
    /// # Errors
    /// When a program is missing or a member does not start; what has been started goes on, for a look at its logs.
    pub async fn up(directory: &Path, setup: Setup, say: impl Fn(&str)) -> anyhow::Result<Self> {
        let there = directory.join("lab.json").exists();
        ensure!(
            !there,
            "there is a lab in {}: `make lab-down` stops it",
            directory.display()
        );
        std::fs::create_dir_all(directory)?;
        // Others than root have to pass through.
        std::fs::set_permissions(directory, Permissions::from_mode(0o755))?;
        let directory = directory.canonicalize()?;
        let extent = setup.extent;
        let plan = Plan {
            setup,
            ports: free_ports()?,
        };
        std::fs::write(directory.join("lab.json"), serde_json::to_string_pretty(&plan)?)?;
        let lab = Self { directory, plan };
        for member in lab.members() {
            lab.prepare(&member)?;
        }
        if extent == Extent::All {
            lab.copy_patroni()?;
        }
        let (stores, rest): (Vec<String>, Vec<String>) = lab
            .members()
            .into_iter()
            .partition(|member| STORES.contains(&Self::kind(member)));
        say("the stores …");
        lab.start_all(&stores).await?;
        lab.vectors_whole(START).await?;
        if extent == Extent::All {
            lab.whole(START).await?;
            let primary = lab.primary().await.context("there is no primary")?;
            for statement in [
                "CREATE ROLE owner LOGIN; CREATE ROLE service LOGIN",
                "CREATE DATABASE aeterna OWNER owner",
            ] {
                lab.sql(&primary, "postgres", statement)?;
            }
            say("the services …");
            lab.start_all(&rest).await?;
            lab.served(START).await?;
            lab.vectors_whole(START).await?;
        }
        if extent != Extent::Qdrant {
            lab.live_whole(START).await?;
        }
        Ok(lab)
    }

    async fn start_all(&self, members: &[String]) -> anyhow::Result<()> {
        for member in members {
            self.start(member)?;
            // One after the other: a node joins its cluster by a peer that is there.
            if member.starts_with(QDRANT) {
                self.ready(member, START).await?;
            }
        }
        for member in members {
            self.ready(member, START).await?;
        }
        Ok(())
    }

    /// One that was started by another program.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        let file = directory.join("lab.json");
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("there is no lab in {}: `make lab-up` starts one", directory.display()))?;
        let plan = serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display()))?;
        let directory = directory.canonicalize()?;
        Ok(Self { directory, plan })
    }

    /// Kills everything and removes the directory.
    ///
    /// # Errors
    /// When something can't be killed or removed.
    pub fn down(&self) -> anyhow::Result<()> {
        self.kill_all();
        let running = self.running();
        ensure!(running.is_empty(), "these processes can't be killed: {running:?}");
        std::fs::remove_dir_all(&self.directory)?;
        Ok(())
    }

    /// Kills everything, and waits until it is gone.
    pub fn kill_all(&self) {
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(10) {
            // Patroni may have started another server meanwhile.
            let running = self.running();
            if running.is_empty() || process::signal(&running, "KILL").is_err() {
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn running(&self) -> Vec<u32> {
        let members = self.members();
        members.iter().flat_map(|member| self.pids(member, Part::All)).collect()
    }

    /// Where it has its files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// How long failing over may take.
    pub fn timings(&self) -> Timings {
        self.plan.setup.timings
    }

    /// How often Qdrant has each vector; `None` when there is no Qdrant.
    pub fn replicas(&self) -> Option<Replicas> {
        let there = self.plan.setup.programs.contains_key(QDRANT);
        there.then_some(self.plan.setup.replicas)
    }

    /// The names of all members, in the order of a start.
    pub fn members(&self) -> Vec<String> {
        let each = |kinds: &[&str], numbers: &[u8]| {
            let of_kind = |kind: &&str| {
                numbers
                    .iter()
                    .map(move |number| format!("{kind}{number}"))
                    .collect::<Vec<_>>()
            };
            kinds.iter().flat_map(of_kind).collect::<Vec<_>>()
        };
        match self.plan.setup.extent {
            Extent::Redis => each(&["redis", "sentinel"], &NODES),
            Extent::Qdrant => each(&[QDRANT], &NODES),
            Extent::All => {
                let mut members = each(&STORES, &NODES);
                members.retain(|member| self.replicas().is_some() || !member.starts_with(QDRANT));
                members.extend(["haproxy".into(), "envoy".into()]);
                members.extend(each(&SERVICES, &COPIES));
                members
            }
        }
    }

    /// Whether a member is a copy of one of our services.
    pub fn is_service(&self, member: &str) -> bool {
        SERVICES.iter().any(|service| member.starts_with(service))
    }

    fn place(&self, member: &str) -> Place {
        Place::new(&self.directory, member)
    }

    fn port(&self, name: &str) -> u16 {
        self.plan.ports[name]
    }

    /// Makes the directory of a member, which belongs to the account that it runs as.
    fn prepare(&self, member: &str) -> anyhow::Result<()> {
        let directory = self.directory.join(member);
        std::fs::create_dir_all(&directory)?;
        self.write_configuration(member)?;
        if members::is_ours(member) || !is_root() {
            return Ok(());
        }
        let owned = Command::new("chown").arg("-R").arg(ACCOUNT).arg(&directory).status()?;
        ensure!(
            owned.success(),
            "there is no account `{ACCOUNT}`: install Debian's postgresql"
        );
        Ok(())
    }

    fn copy_patroni(&self) -> anyhow::Result<()> {
        let from = self
            .plan
            .setup
            .programs
            .get("patroni")
            .context("the lab was made without `patroni`")?;
        let copied = Command::new("cp")
            .arg("-r")
            .arg(from)
            .arg(self.directory.join(members::PYTHON))
            .status()?;
        ensure!(copied.success(), "Patroni can't be copied from {}", from.display());
        Ok(())
    }

    /// Starts a member that does not run.
    ///
    /// # Errors
    /// When it runs, or can't be started.
    pub fn start(&self, member: &str) -> anyhow::Result<()> {
        self.place(member).spawn(self.command(member)?)
    }

    /// Waits until a member answers.
    ///
    /// # Errors
    /// When it has ended or does not answer in time; with the end of its log.
    pub async fn ready(&self, member: &str, within: Duration) -> anyhow::Result<()> {
        let since = Instant::now();
        while !self.answers(member).await {
            let place = self.place(member);
            if place.pid().is_none() {
                bail!("{member} has ended:\n{}", place.tail());
            }
            ensure!(since.elapsed() < within, "{member} does not answer:\n{}", place.tail());
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The processes of a member that run.
    pub fn pids(&self, member: &str, part: Part) -> Vec<u32> {
        let mut pids = Vec::new();
        let place = self.place(member);
        if part != Part::Postgres {
            pids.extend(place.pid());
        }
        if member.starts_with("pg") && part != Part::Patroni {
            let file = std::fs::read_to_string(place.path("data/postmaster.pid")).unwrap_or_default();
            let server = file.lines().next().and_then(|pid| pid.trim().parse().ok());
            // The file may be older than the process that has the number now.
            let ours = |pid: &u32| {
                let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&*place.path("data").to_string_lossy())
            };
            if let Some(server) = server.filter(ours) {
                pids.push(server);
                pids.extend(process::children(server));
            }
        }
        pids
    }

    /// Sends a signal, such as `KILL` or `STOP`, to all processes of a member or of a part of it.
    ///
    /// # Errors
    /// When it can't be sent.
    pub fn signal(&self, member: &str, part: Part, name: &str) -> anyhow::Result<()> {
        process::signal(&self.pids(member, part), name)
    }

    /// Kills a member, as the loss of its machine does.
    ///
    /// # Errors
    /// When it can't be killed.
    pub async fn kill(&self, member: &str, part: Part) -> anyhow::Result<()> {
        let pids = self.pids(member, part);
        ensure!(!pids.is_empty(), "{member} does not run");
        process::signal(&pids, "KILL")?;
        process::ended(&pids, Duration::from_secs(10)).await
    }

    /// Asks a member to stop, and waits until it has.
    ///
    /// # Errors
    /// When it does not.
    pub async fn stop(&self, member: &str) -> anyhow::Result<()> {
        let pids = self.pids(member, Part::All);
        process::signal(&Vec::from_iter(self.place(member).pid()), "TERM")?;
        process::ended(&pids, Duration::from_secs(60)).await
    }

    /// Runs statements on a PostgreSQL node as its superuser; their output.
    ///
    /// # Errors
    /// When they fail.
    pub fn sql(&self, node: &str, database: &str, statements: &str) -> anyhow::Result<String> {
        let output = psql(self.port(node), database, statements)
            .env("PGCONNECT_TIMEOUT", "2")
            .output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "`{statements}` failed on {node}: {error}");
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// A channel to the services through Envoy.
    ///
    /// # Errors
    /// Never: the address is one.
    pub fn channel(&self) -> anyhow::Result<AnyChannel> {
        Ok(AnyChannel::remote(&self.address())?)
    }

    /// Where Envoy listens.
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port("envoy"))
    }
}

/// A directory for the lab of a test; the lab is stopped when this is dropped, however far it got.
#[derive(Debug)]
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// A new one.
    ///
    /// # Panics
    /// When it can't be made.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Self {
        Self(tempfile::tempdir_in("/tmp").expect("a directory can be made"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Ok(lab) = Lab::open(self.path()) {
            lab.kill_all();
        }
    }
}

/// A port for every use, all free at once.
fn free_ports() -> anyhow::Result<BTreeMap<String, u16>> {
    let mut names = Vec::new();
    for number in NODES {
        names.extend(["", ".peer"].map(|port| format!("etcd{number}{port}")));
        names.extend(["", ".api"].map(|port| format!("pg{number}{port}")));
        names.extend(["redis", "sentinel"].map(|kind| format!("{kind}{number}")));
        names.extend(["", ".http", ".peer"].map(|port| format!("{QDRANT}{number}{port}")));
    }
    names.extend(["haproxy", "haproxy.standbys", "envoy", "envoy.admin"].map(String::from));
    for service in SERVICES {
        names.extend(COPIES.map(|number| format!("{service}{number}")));
    }
    let mut held = Vec::new();
    for name in names {
        held.push((name, TcpListener::bind("127.0.0.1:0")?));
    }
    let port = |(name, listener): (String, TcpListener)| Ok((name, listener.local_addr()?.port()));
    held.into_iter().map(port).collect()
}
