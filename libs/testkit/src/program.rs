//! Our programs as real processes.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use aeterna_rpc::AnyChannel;
use tokio::process::{Child, Command};

use crate::readyz;

/// How long a start may take.
const START: Duration = Duration::from_secs(60);

/// Where a binary of the workspace is, built with the profile of the tests. All of them are built, once and with the
/// features that the whole workspace has: a package alone would have others, and cargo would build everything twice.
///
/// # Panics
/// When they can't be built or there is no such binary.
pub fn built(name: &str) -> PathBuf {
    static BUILT: OnceLock<BTreeMap<String, PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let output = std::process::Command::new(cargo)
            .args(["build", "--locked", "--workspace", "--bins", "--message-format=json"])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo can be started");
        assert!(output.status.success(), "the programs can't be built (see above)");
        let messages = String::from_utf8_lossy(&output.stdout);
        let executable = |line: &str| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            let name = message["target"]["name"].as_str()?;
            Some((name.to_owned(), message["executable"].as_str()?.into()))
        };
        messages.lines().filter_map(executable).collect()
    });
    built
        .get(name)
        .unwrap_or_else(|| panic!("there is no binary `{name}`"))
        .clone()
}

/// Where tools and models for tests are kept: `AETERNA_CACHE`, or `~/.cache/aeterna`.
///
/// # Panics
/// When there is neither that variable nor a home.
pub fn cache() -> PathBuf {
    if let Some(cache) = std::env::var_os("AETERNA_CACHE").filter(|cache| !cache.is_empty()) {
        // Relative to the repository, as make reads it; tests run in directories of their own.
        return Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(cache);
    }
    PathBuf::from(std::env::var_os("HOME").expect("a home directory or AETERNA_CACHE")).join(".cache/aeterna")
}

/// The directory of all-MiniLM-L6-v2, fetched when it is not there yet.
///
/// # Panics
/// When it can't be fetched.
pub fn minilm() -> PathBuf {
    let data = cache();
    let fetch = std::process::Command::new(built("aeterna"))
        .args(["models", "fetch", "--data-dir"])
        .arg(&data)
        .status();
    assert!(
        fetch.is_ok_and(|status| status.success()),
        "the model can't be fetched (see above)"
    );
    data.join("models/all-MiniLM-L6-v2")
}

/// An address on loopback, whose port is free until somebody else takes it in the next moment; then a start on it fails and
/// says so.
pub(crate) fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("a bound socket has an address")
}

/// A running process that serves; it is killed when it is dropped.
#[derive(Debug)]
pub struct Program {
    /// Where it listens.
    pub address: SocketAddr,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts `binary` with arguments, data directory and a free port, and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready; with its log.
    pub async fn start(binary: &Path, arguments: &[&str], data: &Path) -> Self {
        Self::start_with(binary, arguments, data, &[]).await
    }

    /// The same with variables in its environment.
    ///
    /// # Panics
    /// When it does not become ready; with its log.
    pub async fn start_with(binary: &Path, arguments: &[&str], data: &Path, environment: &[(&str, &str)]) -> Self {
        Self::start_at(free_address(), binary, arguments, data, environment).await
    }

    /// The same at an address: one that was there before, for instance.
    ///
    /// # Panics
    /// When it does not become ready; with its log.
    pub async fn start_at(
        address: SocketAddr,
        binary: &Path,
        arguments: &[&str],
        data: &Path,
        environment: &[(&str, &str)],
    ) -> Self {
        std::fs::create_dir_all(data).expect("the data directory can be made");
        let log = data.join("log.txt");
        let sink = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .expect("the log can be written");
        let child = Command::new(binary)
            .args(arguments)
            .args(["--listen", &address.to_string(), "--data-dir"])
            .arg(data)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(sink.try_clone().expect("a file can be shared"))
            .stderr(sink)
            .kill_on_drop(true)
            .spawn()
            .expect("the program can be started");
        let mut program = Self { address, child, log };
        program.wait_until_ready().await;
        program
    }

    async fn wait_until_ready(&mut self) {
        let began = Instant::now();
        loop {
            if let Ok(Ok(answer)) = tokio::time::timeout(Duration::from_secs(1), readyz(self.address)).await
                && answer.starts_with("HTTP/1.1 200")
            {
                return;
            }
            let ended = self.child.try_wait().expect("a child can be asked");
            assert!(ended.is_none(), "the program ended with {ended:?}:\n{}", self.log());
            assert!(
                began.elapsed() < START,
                "the program is not ready after {START:?}:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Everything that it and its predecessors on the same data directory have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// A channel to it.
    ///
    /// # Panics
    /// Never: the address is one.
    pub fn channel(&self) -> AnyChannel {
        AnyChannel::remote(&format!("http://{}", self.address)).expect("the address is a URL")
    }

    /// Its process id.
    ///
    /// # Panics
    /// When it has ended.
    pub fn id(&self) -> u32 {
        self.child.id().expect("the program runs")
    }

    /// Kills it at once, as `kill -9` does.
    ///
    /// # Panics
    /// When it can't be killed.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("a child can be killed");
    }

    /// Sends it a signal: `STOP` and `CONT`, for instance.
    ///
    /// # Panics
    /// When it can't be sent.
    pub async fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.id().to_string()])
            .status()
            .await;
        assert!(sent.is_ok_and(|status| status.success()), "{name} can be sent");
    }

    /// The memory that it has resident, in bytes.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn resident_memory(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most memory that it has had resident until now, in bytes.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn peak_memory(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, what: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("a process has a status");
        let size = status.lines().find_map(|line| line.strip_prefix(what));
        let number = size.and_then(|size| size.split_whitespace().next()?.parse::<u64>().ok());
        number.expect("the status says it in KiB") * 1024
    }

    /// Asks it to stop, as `kill` does, and waits for its exit code.
    ///
    /// # Panics
    /// When it does not stop within a minute.
    pub async fn stop(mut self) -> Option<i32> {
        self.signal("TERM").await;
        let ended = tokio::time::timeout(Duration::from_secs(60), self.child.wait()).await;
        let ended = ended.unwrap_or_else(|_| panic!("the program does not stop:\n{}", self.log()));
        ended.expect("a child can be waited for").code()
    }
}
