//! Runs a drill under load, and reports.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use aeterna_testkit::lab::{Lab, Replicas, Timings};
use anyhow::Context as _;
use serde::Serialize;

use crate::check::{Verdict, check};
use crate::drills::{Drill, Goals};
use crate::fan::Fan;
use crate::history::{self, Kind, Operation, Outcome};
use crate::load::Load;

/// How long the load runs before and after the fault.
const CALM: Duration = Duration::from_secs(5);
/// Reads never stop for longer, in seconds.
const READS: f64 = 2.0;
/// How long the stores may take to be whole, before and after.
const WHOLE: Duration = Duration::from_secs(180);

/// What a drill showed.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub drill: String,
    /// Patroni's timings.
    pub timings: Timings,
    /// How often Qdrant has each vector; none without Qdrant.
    pub replicas: Option<Replicas>,
    /// The longest time, from the fault on, in which no write was acknowledged, in seconds.
    pub writes_stopped_s: f64,
    /// The same for reads by holders of a token.
    pub reads_stopped_s: f64,
    /// The same for searches.
    pub searches_stopped_s: f64,
    /// The same for searches by vectors alone.
    pub vectors_stopped_s: f64,
    /// The longest time in which no watcher was told of anything.
    pub live_stopped_s: f64,
    /// The longest time in which the live streams had nothing new.
    pub fan_out_stopped_s: f64,
    /// The longest time from the first attempt of an Add to a watcher's being told.
    pub live_slowest_s: f64,
    /// What the history says.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// Failed attempts, by code. Each call was repeated as its error told until it succeeded: none failed.
    pub errors: BTreeMap<String, u64>,
    /// What is aimed at.
    pub goals: Goals,
    /// The time from the fault until all nodes took part again and each commit was on two of them, in seconds.
    pub redundant_again_s: f64,
}

impl Report {
    /// The goals that it missed. They are told, and decide nothing: a machine that is busy is no defect.
    pub fn missed(&self) -> Vec<String> {
        let goals = [
            ("writes", self.writes_stopped_s, self.goals.writes_s),
            ("fan-out", self.fan_out_stopped_s, self.goals.fan_out_s),
            ("reads", self.reads_stopped_s, Some(READS)),
        ];
        let missed = goals
            .into_iter()
            .filter(|(_, took, goal)| goal.is_some_and(|goal| *took >= goal));
        missed
            .map(|(what, _, goal)| format!("{what} < {} s", goal.unwrap_or_default()))
            .collect()
    }
}

/// Runs one on a lab that is whole. The history is left in the lab's directory.
///
/// # Errors
/// When the lab is not whole, before or after, or a call is refused that should only be delayed.
pub async fn run(lab: &Lab, drill: Drill, say: impl Fn(&str)) -> anyhow::Result<Report> {
    anyhow::ensure!(
        !drill.needs_qdrant() || lab.replicas().is_some(),
        "the lab has no Qdrant: start it with QDRANT_BIN, the path of one"
    );
    whole(lab).await?;
    lab.served(WHOLE).await?;
    let name = drill.name();
    let run = format!("{name}-{:08x}", rand::random::<u32>());
    let load = Load::start(lab.channel()?, Fan::new(lab, &run).await?, &run).await?;
    // At any moment of Patroni's rounds: how long a lease goes on depends on it.
    tokio::time::sleep(CALM + lab.timings().round().mul_f64(rand::random())).await;
    say(&format!("{name}: under load, now it is broken …"));
    let fault = Mutex::new((load.history.now(), Instant::now()));
    let broken = || *fault.lock().unwrap_or_else(PoisonError::into_inner) = (load.history.now(), Instant::now());
    drill
        .carry_out(lab, &load, broken)
        .await
        .with_context(|| format!("the drill {name}"))?;
    whole(lab).await?;
    let (from, instant) = *fault.lock().unwrap_or_else(PoisonError::into_inner);
    let redundant = instant.elapsed();
    say(&format!("{name}: whole again, the history is checked …"));
    tokio::time::sleep(CALM).await;
    let end = load.history.now();
    let (operations, stored) = load.end().await?;
    history::write(&operations, &lab.directory().join(format!("history-{name}.jsonl")))?;
    let stopped = |kinds: &[Kind]| seconds(history::longest_stop(&operations, kinds, from, end));
    Ok(Report {
        drill: name,
        timings: lab.timings(),
        replicas: lab.replicas(),
        writes_stopped_s: stopped(&[Kind::Add, Kind::Count]),
        reads_stopped_s: stopped(&[Kind::Read]),
        searches_stopped_s: stopped(&[Kind::Search]),
        vectors_stopped_s: stopped(&[Kind::Near]),
        live_stopped_s: stopped(&[Kind::Hear]),
        fan_out_stopped_s: stopped(&[Kind::Fan]),
        live_slowest_s: seconds(slowest(&operations, from)),
        verdict: check(&operations, &stored),
        goals: drill.goals(lab.timings()),
        errors: errors(&operations),
        redundant_again_s: seconds(redundant),
    })
}

async fn whole(lab: &Lab) -> anyhow::Result<()> {
    lab.whole(WHOLE).await?;
    lab.live_whole(WHOLE).await?;
    lab.vectors_whole(WHOLE).await
}

fn slowest(operations: &[Operation], from: Duration) -> Duration {
    let heard = operations
        .iter()
        .filter(|heard| heard.kind == Kind::Hear && heard.at > from);
    heard.map(|heard| heard.took).max().unwrap_or_default()
}

/// Seconds with two digits.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100.0).round() / 100.0
}

fn errors(operations: &[Operation]) -> BTreeMap<String, u64> {
    let mut errors = BTreeMap::new();
    for operation in operations {
        if let Outcome::Failed(code) = &operation.outcome {
            *errors.entry(code.clone()).or_default() += 1;
        }
    }
    errors
}
