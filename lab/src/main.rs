//! The lab's command line.

#![allow(clippy::print_stdout, clippy::print_stderr)] // this is a command line

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use aeterna_lab::{Drill, Report};
use aeterna_testkit::lab::{Extent, Lab, Replicas, Setup, Timings};
use anyhow::{Context as _, bail};
use clap::{Parser, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;

/// The highly-available stores and two copies of each service on this machine, and drills that break them
#[derive(Debug, Parser)]
struct Arguments {
    /// Where everything lies
    #[arg(long, default_value = "/tmp/aeterna-lab")]
    directory: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Parser)]
enum Command {
    /// Start everything
    Up(Up),
    /// Show who is who, lag and health
    Status,
    /// Kill everything and remove the directory
    Down,
    /// Break something under load, and check that nothing was lost; without a lab, one is started and stopped
    Drill {
        /// Its name, or `all`; without one, they are listed
        name: Option<String>,
        /// Where the table of several drills is written
        #[arg(long)]
        table: Option<PathBuf>,
        #[command(flatten)]
        up: Up,
    },
}

#[derive(Debug, clap::Args)]
struct Up {
    /// How soon Patroni takes a silent primary for dead
    #[arg(long, value_enum, default_value = "tuned")]
    timings: Timings,
    /// Where `aeterna-memory` and `aeterna-embedding` are; by default, beside this program
    #[arg(long)]
    programs: Option<PathBuf>,
    /// The Python directory of Patroni
    #[arg(long)]
    patroni: PathBuf,
    /// The gateway's program
    #[arg(long, default_value = "envoy")]
    envoy: PathBuf,
    /// The Qdrant server; without one, each memory service keeps an index of its own
    #[arg(long)]
    qdrant: Option<PathBuf>,
    /// How often Qdrant has each vector
    #[arg(long, value_enum, default_value = "usual")]
    replicas: Replicas,
}

impl Up {
    async fn start(&self, directory: &Path) -> anyhow::Result<Lab> {
        let own = std::env::current_exe()?;
        let beside = self
            .programs
            .as_deref()
            .or(own.parent())
            .context("say where the programs are")?;
        let envoy = std::process::Command::new(&self.envoy).arg("--version").output();
        if !envoy.is_ok_and(|envoy| envoy.status.success()) {
            bail!(
                "`{}` can't be run: `scripts/tools.sh envoy` installs it",
                self.envoy.display()
            );
        }
        let mut programs = BTreeMap::from([
            ("envoy".to_owned(), self.envoy.clone()),
            ("patroni".to_owned(), self.patroni.clone()),
        ]);
        for service in ["embedding", "memory"] {
            let path = beside.join(format!("aeterna-{service}"));
            if !path.exists() {
                bail!("{} is not there: `make lab-up` builds it", path.display());
            }
            programs.insert(service.into(), path);
        }
        if let Some(qdrant) = &self.qdrant {
            programs.insert("qdrant".into(), qdrant.clone());
        }
        let setup = Setup {
            extent: Extent::All,
            timings: self.timings,
            replicas: self.replicas,
            programs,
        };
        Lab::up(directory, setup, |step| eprintln!("{step}")).await
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(Arguments { directory, command }: Arguments) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(up) => {
            let lab = up.start(&directory).await?;
            show(&lab).await;
            match lab.replicas() {
                Some(_) => eprintln!("vectors: {}", lab.vectors()),
                None => eprintln!("vectors: each memory service keeps an index of its own, fed by the outbox"),
            }
            eprintln!("the gateway is {}: `aeterna add --url {0} …`", lab.address());
        }
        Command::Status => show(&Lab::open(&directory)?).await,
        Command::Down => Lab::open(&directory)?.down()?,
        Command::Drill { name: None, .. } => {
            for drill in Drill::value_variants() {
                let about = drill.to_possible_value();
                let about = about.and_then(|value| Some(value.get_help()?.to_string()));
                println!("{:<20} {}", drill.name(), about.unwrap_or_default());
            }
        }
        Command::Drill {
            name: Some(name),
            table,
            up,
        } => return drill(&directory, &name, table.as_deref(), &up).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn show(lab: &Lab) {
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_header(["member", "role", "health", "port", "process", ""]);
    for member in lab.status().await {
        let pid = member.pid.map_or_else(|| "ended".into(), |pid| pid.to_string());
        let health = if member.well { "well" } else { "AWAY" };
        table.add_row([
            member.name,
            member.role,
            health.into(),
            member.port.to_string(),
            pid,
            member.remark,
        ]);
    }
    println!("{table}");
}

async fn drill(directory: &Path, name: &str, file: Option<&Path>, up: &Up) -> anyhow::Result<ExitCode> {
    let drills = match name {
        "all" => Drill::value_variants().to_vec(),
        one => match Drill::from_str(one, false) {
            Ok(drill) => vec![drill],
            Err(_) => bail!("there is no drill `{name}`; `make lab-drill` lists them"),
        },
    };
    let running = directory.join("lab.json").exists();
    let lab = if running {
        Lab::open(directory)?
    } else {
        up.start(directory).await?
    };
    let mut drills = drills;
    if name == "all" && lab.replicas().is_none() {
        drills.retain(|drill| !drill.needs_qdrant());
        eprintln!("there is no Qdrant (QDRANT_BIN): its drills are left out");
    }
    let mut reports = Vec::new();
    let mut failure = None;
    for drill in drills {
        match aeterna_lab::run(&lab, drill, |step| eprintln!("{step}")).await {
            Ok(report) => {
                println!("{}", serde_json::to_string(&report)?);
                reports.push(report);
            }
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    if reports.len() > 1 {
        let table = table(&reports).to_string();
        eprintln!("{table}");
        if let Some(file) = file {
            std::fs::write(file, table + "\n").with_context(|| format!("write {}", file.display()))?;
        }
    }
    if let Some(error) = failure {
        // Left as it is, for a look at the logs.
        return Err(error.context(format!("the lab is left in {}", directory.display())));
    }
    let clean = reports.iter().all(|report| report.verdict.is_clean());
    if !running && clean {
        lab.down()?;
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn table(reports: &[Report]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header([
        "drill",
        "writes stopped",
        "reads",
        "searches",
        "vectors",
        "live",
        "fan-out",
        "redundant again",
        "acknowledged",
        "lost",
        "twice",
        "phantom",
        "goals",
    ]);
    for report in reports {
        let verdict = report.verdict;
        let missed = match report.missed() {
            missed if missed.is_empty() => "met".into(),
            missed => format!("MISSED: {}", missed.join(", ")),
        };
        let seconds = |value: f64| format!("{value:.1} s");
        table.add_row([
            report.drill.clone(),
            seconds(report.writes_stopped_s),
            seconds(report.reads_stopped_s),
            seconds(report.searches_stopped_s),
            seconds(report.vectors_stopped_s),
            seconds(report.live_stopped_s),
            seconds(report.fan_out_stopped_s),
            seconds(report.redundant_again_s),
            verdict.acknowledged.to_string(),
            verdict.lost.to_string(),
            verdict.duplicated.to_string(),
            (verdict.phantom + verdict.went_back + verdict.untold).to_string(),
            missed,
        ]);
    }
    table
}
