//! What is broken, and how it is mended.

use std::time::Duration;

use aeterna_testkit::lab::{Lab, Part, Timings};
use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;

use crate::history::Kind;
use crate::load::Load;

/// How long a fault lasts at least, once the load goes on in spite of it.
const LASTS: Duration = Duration::from_secs(5);
/// How long the load may take to go on.
const RESUME: Duration = Duration::from_secs(120);
/// How long a copy may take to start.
const START: Duration = Duration::from_secs(60);

/// Something to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Drill {
    /// kill -9 of the primary and its Patroni
    PrimaryKilled,
    /// kill -9 of the primary; its Patroni lives
    PostgresKilled,
    /// kill -9 of the primary's Patroni; PostgreSQL runs on
    PatroniKilled,
    /// The primary and its Patroni stand still, and go on later
    PrimaryFrozen,
    /// kill -9 of the synchronous standby and its Patroni
    StandbyKilled,
    /// The standby takes over as planned
    Switchover,
    /// kill -9 of the etcd that leads
    EtcdLeaderKilled,
    /// kill -9 of two of three etcd, back after a minute
    EtcdQuorumLost,
    /// kill -9 of the Redis master
    RedisMasterKilled,
    /// kill -9 of two of three Sentinels, back after half a minute; the Redis master dies in between
    SentinelsLost,
    /// kill -9 of a Qdrant node
    QdrantNodeKilled,
    /// A Qdrant node stands still, and goes on later
    QdrantNodeFrozen,
    /// All Qdrant nodes are away for half a minute
    QdrantLost,
    /// kill -9 of one copy of every service
    ServiceKilled,
    /// Everything is restarted, one after the other
    RollingRestart,
}

/// What a drill aims at, in seconds; reads never stop for longer than two in any of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Goals {
    /// Writes stop for less.
    pub writes_s: Option<f64>,
    /// The live streams stop for less.
    pub fan_out_s: Option<f64>,
}

impl Drill {
    /// What it aims at.
    pub fn goals(self, timings: Timings) -> Goals {
        let tuned = timings == Timings::Tuned;
        let writes_s = match self {
            Self::PrimaryKilled => Some(if tuned { 20.0 } else { 30.0 }),
            Self::PostgresKilled => Some(10.0),
            Self::Switchover => Some(3.0),
            _ => None,
        };
        let fan_out_s = match self {
            Self::RedisMasterKilled => Some(if tuned { 3.0 } else { 10.0 }),
            _ => None,
        };
        Goals { writes_s, fan_out_s }
    }

    /// Its name on the command line.
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// It breaks Qdrant, which a lab may be without.
    pub fn needs_qdrant(self) -> bool {
        matches!(self, Self::QdrantNodeKilled | Self::QdrantNodeFrozen | Self::QdrantLost)
    }

    /// Breaks something and mends it, while the load runs. `broken` is called at the moment of the fault.
    pub(crate) async fn carry_out(self, lab: &Lab, load: &Load, broken: impl Fn()) -> anyhow::Result<()> {
        match self {
            Self::PrimaryKilled => {
                let primary = primary(lab).await?;
                broken();
                die_and_return(lab, load, &[&primary]).await?;
            }
            Self::PostgresKilled => {
                let primary = primary(lab).await?;
                broken();
                lab.kill(&primary, Part::Postgres).await?;
                goes_on(load).await?;
            }
            Self::PatroniKilled => {
                let primary = primary(lab).await?;
                broken();
                lab.kill(&primary, Part::Patroni).await?;
                // Its lease ends, and another node takes over while it still runs.
                succeeded(&primary, async || lab.primary().await).await?;
                goes_on(load).await?;
                lab.start(&primary)?;
            }
            Self::PrimaryFrozen => {
                let primary = primary(lab).await?;
                broken();
                lab.signal(&primary, Part::All, "STOP")?;
                let goes_on = goes_on(load).await;
                lab.signal(&primary, Part::All, "CONT")?;
                goes_on?;
            }
            Self::StandbyKilled => {
                let standby = lab.synchronous_standby().await;
                let standby = standby.context("there is no synchronous standby")?;
                broken();
                die_and_return(lab, load, &[&standby]).await?;
            }
            Self::Switchover => {
                broken();
                lab.switch_over().await?;
                goes_on(load).await?;
            }
            Self::EtcdLeaderKilled => {
                let leader = lab.etcd_leader().await.context("no etcd leads")?;
                broken();
                die_and_return(lab, load, &[&leader]).await?;
            }
            Self::EtcdQuorumLost => {
                broken();
                for etcd in ["etcd1", "etcd2"] {
                    lab.kill(etcd, Part::All).await?;
                }
                // Longer than any lease.
                tokio::time::sleep(Duration::from_secs(60)).await;
                for etcd in ["etcd1", "etcd2"] {
                    lab.start(etcd)?;
                }
                goes_on(load).await?;
            }
            Self::RedisMasterKilled => {
                let master = lab.redis_master().await.context("there is no Redis master")?;
                broken();
                lab.kill(&master, Part::All).await?;
                // One that is back before it was taken for dead would be in the way of the other one.
                succeeded(&master, async || lab.redis_master().await).await?;
                goes_on(load).await?;
                lab.start(&master)?;
            }
            Self::SentinelsLost => {
                let master = lab.redis_master().await.context("there is no Redis master")?;
                broken();
                for sentinel in ["sentinel1", "sentinel2"] {
                    lab.kill(sentinel, Part::All).await?;
                }
                tokio::time::sleep(LASTS).await;
                // One Sentinel alone may not choose another one: everything goes on without.
                lab.kill(&master, Part::All).await?;
                goes_on(load).await?;
                tokio::time::sleep(Duration::from_secs(20)).await;
                for member in ["sentinel1", "sentinel2", &master] {
                    lab.start(member)?;
                }
            }
            Self::QdrantNodeKilled => {
                broken();
                die_and_return(lab, load, &["qdrant2"]).await?;
            }
            Self::QdrantNodeFrozen => {
                broken();
                lab.signal("qdrant2", Part::All, "STOP")?;
                let goes_on = goes_on(load).await;
                lab.signal("qdrant2", Part::All, "CONT")?;
                goes_on?;
            }
            Self::QdrantLost => {
                let nodes = ["qdrant1", "qdrant2", "qdrant3"];
                broken();
                for node in nodes {
                    lab.kill(node, Part::All).await?;
                }
                goes_on(load).await?;
                tokio::time::sleep(Duration::from_secs(30)).await;
                for node in nodes {
                    lab.start(node)?;
                }
                near_again(load).await?;
            }
            Self::ServiceKilled => {
                // Any of them: one holds the lease of the live streams.
                let memory = if rand::random() { "memory1" } else { "memory2" };
                broken();
                die_and_return(lab, load, &[memory, "embedding1"]).await?;
                lab.served(START).await?;
            }
            Self::RollingRestart => {
                broken();
                rolling_restart(lab).await?;
                goes_on(load).await?;
            }
        }
        Ok(())
    }
}

/// Waits until searches have their dense arm.
async fn near_again(load: &Load) -> anyhow::Result<()> {
    load.resumed(&[Kind::Near], load.history.now(), RESUME).await
}

async fn primary(lab: &Lab) -> anyhow::Result<String> {
    lab.primary().await.context("there is no primary")
}

/// Waits until somebody else leads than before.
async fn succeeded(before: &str, leader: impl AsyncFn() -> Option<String>) -> anyhow::Result<()> {
    let other = async {
        while leader().await.is_none_or(|now| now == before) {
            tokio::time::sleep(LASTS / 10).await;
        }
    };
    tokio::time::timeout(RESUME, other).await.context("nobody took over")
}

/// Kills members, and starts them again once the load goes on without.
async fn die_and_return(lab: &Lab, load: &Load, members: &[&str]) -> anyhow::Result<()> {
    for member in members {
        lab.kill(member, Part::All).await?;
    }
    goes_on(load).await?;
    for member in members {
        lab.start(member)?;
    }
    Ok(())
}

/// Waits until the load goes on in spite of the fault, and a moment more.
async fn goes_on(load: &Load) -> anyhow::Result<()> {
    let since = load.history.now();
    load.resumed(&[Kind::Add, Kind::Count], since, RESUME).await?;
    load.resumed(&[Kind::Read], since, RESUME).await?;
    load.resumed(&[Kind::Search], since, RESUME).await?;
    load.resumed(&[Kind::Hear], since, RESUME).await?;
    tokio::time::sleep(LASTS).await;
    Ok(())
}

async fn rolling_restart(lab: &Lab) -> anyhow::Result<()> {
    let restart = async |member: &str| {
        lab.stop(member).await?;
        lab.start(member)?;
        lab.ready(member, START).await
    };
    for member in lab.members() {
        let is_node = member.starts_with("pg");
        // As an operator would: hand over first, and wait until the node keeps up again.
        if is_node && lab.primary().await.as_ref() == Some(&member) {
            lab.switch_over().await?;
        }
        restart(&member).await?;
        if is_node {
            lab.whole(RESUME).await?;
        }
        if lab.is_service(&member) {
            lab.served(START).await?;
        }
        // The next one must not go before this one has what it missed.
        lab.vectors_whole(RESUME).await?;
    }
    Ok(())
}
