//! A PostgreSQL server of a test's own.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::process;
use crate::program::free_address;

/// The account that Debian's packages make; the server refuses to run as root.
pub(crate) const ACCOUNT: &str = "postgres";
/// How long a start may take.
const START: Duration = Duration::from_secs(60);

/// A running server with the database `aeterna`, the role `owner`, who owns it, and the role `service`. It is stopped, and its
/// data removed, when it is dropped.
#[derive(Debug)]
pub struct PostgresServer {
    /// Where it listens on loopback.
    pub port: u16,
    server: Child,
    directory: tempfile::TempDir,
}

impl PostgresServer {
    /// Starts one with these settings beside the defaults.
    ///
    /// # Panics
    /// When PostgreSQL is not installed (`scripts/tools.sh postgres`) or does not start.
    pub fn start(settings: &[&str]) -> Self {
        let server = Self::begin(settings, None);
        for statement in [
            "CREATE ROLE owner LOGIN; CREATE ROLE service LOGIN",
            "CREATE DATABASE aeterna OWNER owner",
        ] {
            server.sql("postgres", statement);
        }
        server
    }

    /// Starts a standby of this one.
    ///
    /// # Panics
    /// When it does not start.
    pub fn standby(&self, settings: &[&str]) -> Self {
        Self::begin(settings, Some(self))
    }

    /// This standby follows its primary no longer.
    pub async fn leave(&self, primary: &Self) {
        let followers = || primary.sql("postgres", "SELECT count(*) FROM pg_stat_replication");
        let before = followers();
        self.sql("postgres", "ALTER SYSTEM SET primary_conninfo = ''");
        self.sql("postgres", "SELECT pg_reload_conf()");
        while followers() == before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn begin(settings: &[&str], of: Option<&Self>) -> Self {
        let bin = binaries();
        // A path of a socket is short.
        let directory = tempfile::Builder::new()
            .prefix("pg")
            .tempdir_in("/tmp")
            .expect("a directory can be made");
        let data = directory.path().join("data");
        if is_root() {
            std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).expect("it is ours");
            std::fs::create_dir(&data).expect("a directory can be made");
            std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).expect("it is ours");
            let owned = Command::new("chown")
                .arg("-R")
                .arg(ACCOUNT)
                .arg(directory.path())
                .status();
            assert!(
                owned.is_ok_and(|status| status.success()),
                "the account `{ACCOUNT}` is there"
            );
        }
        let mut make = match of {
            None => unprivileged(&bin.join("initdb")),
            Some(_) => unprivileged(&bin.join("pg_basebackup")),
        };
        match of {
            None => make.args(["--auth=trust", "--encoding=UTF8", "--locale=C", "--username=postgres"]),
            Some(primary) => make
                .args(["--host=127.0.0.1", "--username=postgres", "--write-recovery-conf"])
                .args(["--checkpoint=fast", &format!("--port={}", primary.port)]),
        };
        let made = make.args(["--no-sync", "-D"]).arg(&data).stdout(Stdio::null()).status();
        assert!(
            made.is_ok_and(|status| status.success()),
            "no data directory (see above)"
        );
        let port = free_address().port();
        let log = std::fs::File::create(directory.path().join("log")).expect("a file can be made");
        let server = unprivileged(&bin.join("postgres"))
            .arg("-D")
            .arg(&data)
            .args(["-c", "listen_addresses=127.0.0.1", "-c", &format!("port={port}")])
            .args(["-c", &format!("unix_socket_directories={}", directory.path().display())])
            .args(settings.iter().flat_map(|setting| ["-c", setting]))
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .expect("the server can be started");
        let mut server = Self {
            port,
            server,
            directory,
        };
        server.wait_until_ready();
        server
    }

    fn wait_until_ready(&mut self) {
        let began = Instant::now();
        while !self.ran("postgres", "SELECT 1") {
            let ended = self.server.try_wait().expect("a child can be asked");
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            assert!(
                ended.is_none() && began.elapsed() < START,
                "the server does not start:\n{log}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs statements as the superuser; their output.
    ///
    /// # Panics
    /// When they fail.
    pub fn sql(&self, database: &str, statements: &str) -> String {
        let output = psql(self.port, database, statements).stderr(Stdio::inherit()).output();
        let output = output.expect("psql can be started");
        assert!(output.status.success(), "psql failed at `{statements}` (see above)");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn ran(&self, database: &str, statements: &str) -> bool {
        let status = psql(self.port, database, statements)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    }

    /// What follows `postgres:` in the URI of the service's role.
    pub fn uri(&self) -> String {
        format!("//service@127.0.0.1:{}/aeterna", self.port)
    }

    /// Kills the server and all its processes at once, as `kill -9` does.
    ///
    /// # Panics
    /// When they can't be killed.
    pub fn kill(&mut self) {
        let mut processes = process::children(self.server.id());
        processes.push(self.server.id());
        process::signal(&processes, "KILL").expect("kill can be started");
        let _ = self.server.wait();
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        // At once: nobody wants its data any more. The server itself ends its own processes.
        let _ = process::signal(&[self.server.id()], "QUIT");
        let _ = self.server.wait();
    }
}

/// Statements for the superuser of a server on loopback.
pub(crate) fn psql(port: u16, database: &str, statements: &str) -> Command {
    let mut psql = Command::new(binaries().join("psql"));
    psql.args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1"]);
    psql.args(["-h", "127.0.0.1", "-U", "postgres", "-p", &port.to_string()]);
    psql.args(["-d", database, "-c", statements]);
    psql
}

/// Where the newest installed PostgreSQL has its programs.
pub(crate) fn binaries() -> PathBuf {
    let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let bins = installed.map(|version| version.path().join("bin"));
    let newest = bins.filter(|bin| bin.join("initdb").exists()).max();
    newest.expect("PostgreSQL is installed: scripts/tools.sh postgres")
}

pub(crate) fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|id| id.stdout.trim_ascii() == b"0")
}

/// A program that runs as an account that is not root's, in the same process.
pub(crate) fn unprivileged(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", ACCOUNT, "--regid", ACCOUNT, "--clear-groups"])
        .arg(program)
        .current_dir("/");
    command
}
