//! Processes that outlive the program that starts them, so that another one can look at them, break them and stop them.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::process::Command;

/// Where one process of the lab has its files.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

impl Place {
    pub fn new(lab: &Path, member: &str) -> Self {
        Self(lab.join(member))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn log(&self) -> PathBuf {
        self.path("log")
    }

    /// Starts it in a process group of its own, with its output in the log.
    pub fn spawn(&self, command: std::process::Command) -> anyhow::Result<()> {
        ensure!(self.pid().is_none(), "{} runs already", self.0.display());
        let log = std::fs::File::options().create(true).append(true).open(self.log())?;
        let program = command.get_program().to_owned();
        // tokio waits for it in the background when it ends, for as long as this program runs.
        let child = Command::from(command)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("{} can't be started", program.display()))?;
        let pid = child.id().context("it has ended at once")?;
        let began = began(pid).with_context(|| format!("it has ended at once: see {}", self.log().display()))?;
        std::fs::write(self.path("pid"), format!("{pid} {began}"))?;
        Ok(())
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.path("pid")).ok()?;
        let (pid, since) = text.split_once(' ')?;
        let pid = pid.parse().ok()?;
        (began(pid)? == since).then_some(pid)
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        let log = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// When a process began, in ticks since the machine did, so that another one with the same id is not taken for it; nothing when
/// it has ended.
fn began(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // Its first thread may have ended while others still hold its files and locks.
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    let ended = matches!(*fields.first()?, "Z" | "X") && threads <= 1;
    (!ended).then(|| fields.get(19).map(ToString::to_string))?
}

/// The processes that a process started.
pub fn children(pid: u32) -> Vec<u32> {
    let found = std::process::Command::new("pgrep")
        .args(["-P", &pid.to_string()])
        .output();
    let found = found.map(|output| output.stdout).unwrap_or_default();
    let found = String::from_utf8_lossy(&found).into_owned();
    found.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Sends a signal to all of them, by one command so that they have it at once.
pub fn signal(pids: &[u32], name: &str) -> anyhow::Result<()> {
    if pids.is_empty() {
        return Ok(());
    }
    let sent = std::process::Command::new("kill")
        .args(["-s", name])
        .args(pids.iter().map(ToString::to_string))
        .stderr(Stdio::null()) // one may have ended
        .status();
    sent.map(|_| ()).context("kill can't be started")
}

/// Waits until none of them runs.
pub async fn ended(pids: &[u32], within: Duration) -> anyhow::Result<()> {
    let since = Instant::now();
    while pids.iter().any(|pid| began(*pid).is_some()) {
        ensure!(since.elapsed() < within, "{pids:?} did not end within {within:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
