//! What the members say of themselves.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::{LOOK, Lab, NODES, Part, QDRANT, SERVICES, START, secrets};

/// How long a member may take to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// A PostgreSQL node as Patroni sees it.
#[derive(Clone, Debug, Deserialize)]
pub struct PostgresNode {
    /// Its name in the lab.
    pub name: String,
    /// `leader`, `sync_standby` or `replica`.
    pub role: String,
    /// `running`, `streaming` and what else it may be.
    pub state: String,
    /// How often another node has taken over, plus one.
    #[serde(default)]
    pub timeline: Option<u64>,
    /// How far it is behind the leader, in bytes, or `unknown`.
    #[serde(default)]
    pub lag: Value,
}

impl PostgresNode {
    /// It takes part.
    pub fn is_well(&self) -> bool {
        matches!(self.state.as_str(), "running" | "streaming")
    }
}

/// A line of the lab's state.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// What it is at the moment.
    pub role: String,
    /// Whether it answers.
    pub well: bool,
    /// What else there is to say.
    pub remark: String,
    /// Where it listens.
    pub port: u16,
    /// Its process, while it runs.
    pub pid: Option<u32>,
}

fn client() -> &'static reqwest::Client {
    static CLIENT: OnceLock<reqwest::Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let client = reqwest::Client::builder().timeout(ANSWER).no_proxy();
        // A member may end at any moment: no connection is kept.
        let client = client.pool_max_idle_per_host(0).build();
        client.expect("the client has no settings that could fail")
    })
}

/// What follows a key at the beginning of a line of Redis.
fn field<'i>(info: &'i str, key: &str) -> &'i str {
    let value = info.lines().find_map(|line| line.strip_prefix(key));
    value.unwrap_or("").trim()
}

impl Lab {
    async fn get(&self, port: &str, path: &str) -> Option<reqwest::Response> {
        let url = format!("http://127.0.0.1:{}{path}", self.port(port));
        let answer = client().get(url).header("api-key", secrets::QDRANT).send().await.ok()?;
        answer.status().is_success().then_some(answer)
    }

    pub(super) async fn answers(&self, member: &str) -> bool {
        match Self::kind(member) {
            "etcd" => self.get(member, "/health").await.is_some(),
            "pg" => self.get(&format!("{member}.api"), "/readiness").await.is_some(),
            "envoy" => self.get("envoy.admin", "/ready").await.is_some(),
            QDRANT => self.get(&format!("{member}.http"), "/readyz").await.is_some(),
            "redis" | "sentinel" => self.redis_says(member, &["PING"]).await.is_some(),
            "haproxy" => {
                let address = ("127.0.0.1", self.port(member));
                tokio::net::TcpStream::connect(address).await.is_ok()
            }
            _ => self.get(member, "/readyz").await.is_some(),
        }
    }

    /// The PostgreSQL nodes, as any Patroni that answers sees them.
    pub async fn postgres(&self) -> Vec<PostgresNode> {
        #[derive(Deserialize)]
        struct Cluster {
            members: Vec<PostgresNode>,
        }
        for number in NODES {
            let member = format!("pg{number}");
            // One that has been stopped does not answer, and need not be waited for.
            if self.pids(&member, Part::Patroni).is_empty() {
                continue;
            }
            if let Some(answer) = self.get(&format!("{member}.api"), "/cluster").await
                && let Ok(cluster) = answer.json::<Cluster>().await
            {
                return cluster.members;
            }
        }
        Vec::new()
    }

    /// The name of the one node that says it is the primary.
    pub async fn primary(&self) -> Option<String> {
        let mut found = None;
        for number in NODES {
            let member = format!("pg{number}");
            if self.get(&format!("{member}.api"), "/primary").await.is_some() {
                found = Some(member);
            }
        }
        found
    }

    /// The standby whose word a commit waits for.
    pub async fn synchronous_standby(&self) -> Option<String> {
        let nodes = self.postgres().await;
        let synchronous = nodes
            .into_iter()
            .find(|node| node.role == "sync_standby" && node.is_well());
        synchronous.map(|node| node.name)
    }

    /// Whether what is committed now is on two nodes: the primary waits for a standby that keeps up.
    pub async fn is_redundant(&self) -> bool {
        let Some(primary) = self.primary().await else {
            return false;
        };
        let keeps_up = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming'";
        self.sql(&primary, "postgres", keeps_up).is_ok_and(|count| count != "0")
    }

    /// Hands over from the primary to the synchronous standby, as planned, and waits until that is done.
    ///
    /// # Errors
    /// When Patroni refuses or it takes too long.
    pub async fn switch_over(&self) -> anyhow::Result<()> {
        let leader = self.primary().await.context("there is no primary")?;
        let candidate = self
            .synchronous_standby()
            .await
            .context("there is no synchronous standby")?;
        let url = format!("http://127.0.0.1:{}/switchover", self.port(&format!("{leader}.api")));
        let body = serde_json::json!({ "leader": leader, "candidate": candidate });
        // The answer comes when it is done.
        let answer = client().post(url).json(&body).timeout(START).send().await?;
        let (status, text) = (answer.status(), answer.text().await.unwrap_or_default());
        ensure!(status.is_success(), "Patroni refuses the switchover: {status} {text}");
        Ok(())
    }

    /// Waits until all PostgreSQL nodes are there and one standby is synchronous.
    ///
    /// # Errors
    /// When that takes too long; with what there is.
    pub async fn whole(&self, within: Duration) -> anyhow::Result<()> {
        let since = Instant::now();
        loop {
            let nodes = self.postgres().await;
            let well = nodes.iter().filter(|node| node.is_well()).count();
            let synchronous = nodes.iter().any(|node| node.role == "sync_standby");
            if well == NODES.len() && synchronous && self.is_redundant().await {
                return Ok(());
            }
            ensure!(
                since.elapsed() < within,
                "PostgreSQL is not whole after {within:?}: {nodes:?}\n{}",
                self.place("pg1").tail()
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until Envoy reaches every copy of every service.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn served(&self, within: Duration) -> anyhow::Result<()> {
        let since = Instant::now();
        loop {
            let clusters = match self.get("envoy.admin", "/clusters").await {
                Some(answer) => answer.text().await.unwrap_or_default(),
                None => String::new(),
            };
            let healthy = |service: &&str| {
                let line = |line: &&str| line.starts_with(*service) && line.ends_with("::health_flags::healthy");
                clusters.lines().filter(line).count() == super::COPIES.len()
            };
            if SERVICES.iter().all(healthy) {
                return Ok(());
            }
            ensure!(
                since.elapsed() < within,
                "Envoy does not reach all services:\n{clusters}"
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What a Redis server or a Sentinel answers, one value a line.
    async fn redis_says(&self, member: &str, words: &[&str]) -> Option<String> {
        let mut ask = tokio::process::Command::new("redis-cli");
        ask.args(["-h", "127.0.0.1", "-p", &self.port(member).to_string()]);
        let password = if member.starts_with("redis") {
            super::members::ADMIN
        } else {
            secrets::SENTINELS
        };
        ask.env("REDISCLI_AUTH", password);
        let asked = ask.args(words).kill_on_drop(true).output();
        let answer = tokio::time::timeout(ANSWER, asked).await.ok()?.ok()?;
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        (answer.status.success() && !text.starts_with("ERR")).then_some(text)
    }

    /// The Redis server that most Sentinels call the master.
    pub async fn redis_master(&self) -> Option<String> {
        let mut named = Vec::new();
        for number in NODES {
            let words = ["SENTINEL", "get-master-addr-by-name", super::members::MASTER];
            let Some(said) = self.redis_says(&format!("sentinel{number}"), &words).await else {
                continue;
            };
            let port: Option<u16> = said.lines().nth(1).and_then(|port| port.trim().parse().ok());
            named.extend(port);
        }
        let votes = |port: &u16| named.iter().filter(|named| *named == port).count();
        let port = named.iter().copied().max_by_key(votes)?;
        let mut servers = NODES.into_iter().map(|number| format!("redis{number}"));
        servers.find(|member| self.port(member) == port)
    }

    /// Waits until the Redis master has both replicas and every Sentinel knows these and the other Sentinels. One asks the master
    /// for its replicas every ten seconds: without knowing them, none can choose another master.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn live_whole(&self, within: Duration) -> anyhow::Result<()> {
        let since = Instant::now();
        while !self.is_live_whole().await {
            ensure!(
                since.elapsed() < within,
                "Redis is not whole after {within:?}:\n{}",
                self.place("sentinel1").tail()
            );
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    async fn is_live_whole(&self) -> bool {
        let Some(master) = self.redis_master().await else {
            return false;
        };
        let info = self.redis_info(&master).await;
        let well = info
            .lines()
            .filter(|line| line.starts_with("slave") && line.contains("state=online"));
        let (mut known, mut replicas) = (0, 0);
        for number in NODES {
            let sentinel = format!("sentinel{number}");
            let ask = async |what: &str| {
                let words = ["SENTINEL", what, super::members::MASTER];
                self.redis_says(&sentinel, &words).await.unwrap_or_default()
            };
            let others = ask("sentinels").await;
            known += others.lines().filter(|line| line.trim() == "runid").count();
            let told = ask("replicas").await;
            let told: Vec<&str> = told.lines().map(str::trim).collect();
            replicas += told
                .windows(2)
                .filter(|pair| *pair == ["master-link-status", "ok"])
                .count();
        }
        let others = NODES.len() * (NODES.len() - 1);
        info.contains("role:master") && well.count() == NODES.len() - 1 && known == others && replicas == others
    }

    /// What a Qdrant node answers.
    async fn qdrant_says(&self, member: &str, path: &str) -> Option<Value> {
        let answer = self.get(&format!("{member}.http"), path).await?;
        let mut answer: Value = answer.json().await.ok()?;
        Some(answer["result"].take())
    }

    /// Replicas that a Qdrant node has itself, and how many of all that it knows are not well; `None` when it does not answer
    /// or does not know all its peers.
    async fn replicas_of(&self, member: &str) -> Option<(usize, usize)> {
        let cluster = self.qdrant_says(member, "/cluster").await?;
        if cluster["peers"].as_object().map_or(0, serde_json::Map::len) != NODES.len() {
            return None;
        }
        let collections = self.qdrant_says(member, "/collections").await?;
        let (mut own, mut unwell) = (0, 0);
        for collection in collections["collections"].as_array()? {
            let path = format!("/collections/{}/cluster", collection["name"].as_str()?);
            let shards = self.qdrant_says(member, &path).await?;
            let of = |kind: &str| shards[kind].as_array().cloned().unwrap_or_default();
            let local = of("local_shards");
            own += local.len();
            let all = local
                .iter()
                .chain(&of("remote_shards"))
                .filter(|shard| shard["state"] != "Active")
                .count();
            unwell += all + of("shard_transfers").len();
        }
        Some((own, unwell))
    }

    /// Waits until all Qdrant nodes know one another and all replicas are well; there may be none.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn vectors_whole(&self, within: Duration) -> anyhow::Result<()> {
        let since = Instant::now();
        for member in self.members().iter().filter(|member| member.starts_with(QDRANT)) {
            loop {
                let replicas = self.replicas_of(member).await;
                if replicas.is_some_and(|(_, unwell)| unwell == 0) {
                    break;
                }
                ensure!(
                    since.elapsed() < within,
                    "Qdrant is not whole after {within:?}: {member} has {replicas:?} (own, unwell)\n{}",
                    self.place(member).tail()
                );
                tokio::time::sleep(LOOK).await;
            }
        }
        Ok(())
    }

    async fn etcd_leads(&self, member: &str) -> Option<(bool, String)> {
        let url = format!("http://127.0.0.1:{}/v3/maintenance/status", self.port(member));
        let answer = client().post(url).body("{}").send().await.ok()?;
        let status: Value = answer.json().await.ok()?;
        let leads = status["leader"].is_string() && status["leader"] == status["header"]["member_id"];
        Some((leads, format!("term {}", status["raftTerm"].as_str().unwrap_or("?"))))
    }

    /// The etcd node that leads.
    pub async fn etcd_leader(&self) -> Option<String> {
        for number in NODES {
            let member = format!("etcd{number}");
            if self.etcd_leads(&member).await.is_some_and(|(leads, _)| leads) {
                return Some(member);
            }
        }
        None
    }

    /// What a service says of itself: what is away, and how far it is behind.
    async fn service_says(&self, member: &str) -> Option<String> {
        let answer = client().get(format!("http://127.0.0.1:{}/readyz", self.port(member)));
        let state: Value = answer.send().await.ok()?.json().await.ok()?;
        let services = state["services"].as_object()?.values();
        let dependencies = services.filter_map(Value::as_object).flatten();
        let mut said: Vec<String> = dependencies
            .filter(|(_, state)| *state != "up")
            .map(|(name, state)| format!("{name} {}", state.as_str().unwrap_or_default()))
            .collect();
        said.dedup();
        let metrics = self.get(member, "/metrics").await?.text().await.ok()?;
        for what in ["index", "live"] {
            let name = format!("aeterna_memory_{what}_lag_seconds");
            let line = metrics.lines().find(|line| line.starts_with(&name));
            let lag = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            said.extend(lag.map(|lag| format!("{what} {lag:.1} s behind")));
        }
        Some(said.join(", "))
    }

    /// What a Redis server says of its replication.
    async fn redis_info(&self, member: &str) -> String {
        let info = self.redis_says(member, &["INFO", "replication"]).await;
        info.unwrap_or_default()
    }

    /// Who is who, and who is well.
    pub async fn status(&self) -> Vec<Member> {
        let nodes = self.postgres().await;
        let master = self.redis_master().await;
        let written: Option<i64> = match &master {
            Some(master) => field(&self.redis_info(master).await, "master_repl_offset:")
                .parse()
                .ok(),
            None => None,
        };
        let mut lines = Vec::new();
        for name in self.members() {
            let mut well = self.answers(&name).await;
            let (mut role, mut remark) = (String::new(), String::new());
            if name.starts_with("etcd") {
                if let Some((leads, term)) = self.etcd_leads(&name).await {
                    role = if leads { "leader" } else { "follower" }.into();
                    remark = term;
                }
            } else if let Some(node) = nodes.iter().find(|node| node.name == name) {
                well &= node.is_well();
                role = node.role.replace('_', " ");
                let timeline = node
                    .timeline
                    .map_or_else(|| "?".into(), |timeline| timeline.to_string());
                remark = format!("{}, timeline {timeline}", node.state);
                if node.role != "leader" {
                    remark += &format!(", {} bytes behind", node.lag);
                }
            }
            if name.starts_with(QDRANT) {
                let cluster = self.qdrant_says(&name, "/cluster").await.unwrap_or_default();
                role = cluster["raft_info"]["role"].as_str().unwrap_or_default().to_lowercase();
                if let Some((own, unwell)) = self.replicas_of(&name).await {
                    remark = format!("{own} replicas here, {unwell} unwell in all");
                }
            }
            if name.starts_with("redis") {
                let info = self.redis_info(&name).await;
                let value = |key: &str| field(&info, key);
                role = value("role:").replace("slave", "replica");
                remark = match role.as_str() {
                    "master" => format!("{} replicas", value("connected_slaves:")),
                    "replica" => {
                        let behind = written.zip(value("slave_repl_offset:").parse::<i64>().ok());
                        // What was written since the master was asked.
                        let behind = behind.map_or("?".into(), |(all, own)| (all - own).max(0).to_string());
                        format!("link {}, {behind} bytes behind", value("master_link_status:"))
                    }
                    _ => String::new(),
                };
            }
            if name.starts_with("sentinel") {
                role = "sentinel".into();
                remark = match &master {
                    Some(master) => format!("the master is {master}"),
                    None => "no master".into(),
                };
            }
            if self.is_service(&name) {
                role = "copy".into();
                remark = self.service_says(&name).await.unwrap_or_default();
            }
            if ["haproxy", "envoy"].contains(&name.as_str()) {
                role = "proxy".into();
            }
            lines.push(Member {
                role,
                well,
                remark,
                port: self.port(&name),
                pid: self.place(&name).pid(),
                name,
            });
        }
        lines
    }
}
