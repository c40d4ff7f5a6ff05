//! Which node is the primary, and which ones answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions as _, PgConnection, PgPool};
use tokio::sync::{Mutex, watch};

use super::PostgresOptions;
use super::options::NodeOptions;
use crate::StorageError;

/// How often all nodes are asked.
const EVERY: Duration = Duration::from_millis(300);
/// The same while there is no primary, which writes wait for.
const SOON: Duration = Duration::from_millis(100);
/// How long a node may take to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// What a node was when it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    /// It answers.
    alive: bool,
    /// It may be written to, in this timeline; 0: it is a standby.
    timeline: u32,
}

/// How the nodes are at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Nodes that answer.
    pub alive: usize,
    /// Nodes in all.
    pub nodes: usize,
    /// The primary is one of them, and takes writes.
    pub primary: bool,
}

/// How long a server goes on reading: so many milliseconds, and less for somebody who has left.
pub(super) fn limits(statement: &str) -> [(&'static str, &str); 2] {
    [
        ("statement_timeout", statement),
        ("client_connection_check_interval", "500ms"),
    ]
}

/// One node.
#[derive(Debug)]
pub struct Node {
    options: NodeOptions,
    pool: PgPool,
    state: watch::Sender<State>,
    /// So many of the places that reads must not go behind were found there.
    seen: AtomicI64,
    probe: Mutex<Option<PgConnection>>,
}

impl Node {
    fn new(node: &NodeOptions, options: &PostgresOptions) -> Self {
        let limit = options.statement.as_millis().to_string();
        let pool = pool(options).connect_lazy_with(node.connect.clone().options(limits(&limit)));
        Self {
            options: node.clone(),
            pool,
            state: watch::Sender::new(State::default()),
            seen: AtomicI64::new(0),
            probe: Mutex::new(None),
        }
    }

    /// How it is reached.
    pub(super) fn connect(&self) -> &PgConnectOptions {
        &self.options.connect
    }

    /// Its connections for reading.
    pub(super) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// So many of the places that reads must not go behind were found there.
    pub(super) fn seen(&self) -> i64 {
        self.seen.load(Ordering::SeqCst)
    }

    pub(super) fn saw(&self, count: i64) {
        self.seen.fetch_max(count, Ordering::SeqCst);
    }

    /// Waits until the node answers no more.
    pub async fn lost(&self) {
        let mut state = self.state.subscribe();
        // An end of the watching is no loss.
        if state.wait_for(|state| !state.alive).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Does something there for as long as it answers: a pool would go on trying to connect to a node that is gone.
    pub(super) async fn while_it_answers<T>(
        &self,
        work: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        tokio::select! {
            worked = work => worked,
            () = self.lost() => Err(StorageError::Unavailable("the node is away".into())),
        }
    }

    /// Asks the node what it is.
    async fn look(&self, http: &reqwest::Client) -> (State, bool) {
        let state = tokio::time::timeout(ANSWER, self.ask());
        let leads = async {
            let Some(url) = &self.options.patroni else { return false };
            let asked = http.request(reqwest::Method::OPTIONS, url).send().await;
            asked.is_ok_and(|answer| answer.status() == reqwest::StatusCode::OK)
        };
        let (state, leads) = tokio::join!(state, leads);
        let state = state.unwrap_or_else(|_| Err(StorageError::Unavailable("no answer".into())));
        let state = state.unwrap_or_default();
        if !state.alive {
            // The connection may be the reason.
            *self.probe.lock().await = None;
            // One that starts anew may show less at first than it did before.
            self.seen.store(0, Ordering::SeqCst);
        }
        self.state
            .send_if_modified(|before| std::mem::replace(before, state) != state);
        (state, leads)
    }

    async fn ask(&self) -> Result<State, StorageError> {
        const QUERY: &str =
            "SELECT CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_walfile_name(pg_current_wal_lsn()) END";
        let mut probe = self.probe.lock().await;
        let mut connection = match probe.take() {
            Some(connection) => connection,
            None => self.options.connect.connect().await?,
        };
        let file: Option<String> = sqlx::query_scalar(QUERY).fetch_one(&mut connection).await?;
        *probe = Some(connection);
        // The name of a WAL file begins with its timeline.
        let timeline = file.and_then(|file| u32::from_str_radix(file.get(..8)?, 16).ok());
        Ok(State {
            alive: true,
            timeline: timeline.unwrap_or(0),
        })
    }
}

fn pool(options: &PostgresOptions) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(options.connections.max(1))
        .acquire_timeout(super::CONNECT)
        .test_before_acquire(false)
}

/// The time during which one node is the primary.
#[derive(Debug)]
pub struct Epoch {
    node: Arc<Node>,
    pool: PgPool,
}

impl Epoch {
    /// The primary.
    pub(super) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Its connections for writing.
    pub(super) fn pool(&self) -> &PgPool {
        &self.pool
    }
}

/// All nodes.
#[derive(Debug)]
pub struct Nodes {
    all: Vec<Arc<Node>>,
    primary: watch::Sender<Option<Arc<Epoch>>>,
    /// How often the primary was looked at and still was it.
    confirmed: AtomicU64,
    /// Counts reads that are spread.
    turn: AtomicUsize,
    options: PostgresOptions,
}

impl Nodes {
    pub(super) fn new(options: &PostgresOptions) -> Self {
        let node = |node| Arc::new(Node::new(node, options));
        Self {
            all: options.nodes.iter().map(node).collect(),
            primary: watch::Sender::new(None),
            confirmed: AtomicU64::new(0),
            turn: AtomicUsize::new(0),
            options: options.clone(),
        }
    }

    /// How long a statement may take that only reads.
    pub(super) fn statement(&self) -> Duration {
        self.options.statement
    }

    /// The primary, once there is one that answers.
    pub(super) async fn primary(&self, patience: Duration) -> Result<Arc<Epoch>, StorageError> {
        let mut primary = self.primary.subscribe();
        let known = tokio::time::timeout(patience, primary.wait_for(Option::is_some)).await;
        let known = known.ok().and_then(|known| known.ok()?.clone());
        known.ok_or_else(|| StorageError::Unavailable("no node is the primary".into()))
    }

    /// Waits until another node is the primary.
    pub(super) async fn succeeded(&self, epoch: &Arc<Epoch>) {
        let mut primary = self.primary.subscribe();
        let other = |now: &Option<Arc<Epoch>>| now.as_ref().is_some_and(|now| !Arc::ptr_eq(now, epoch));
        // An end of the watching is no succession.
        if primary.wait_for(other).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Those that answer, in the order in which a read asks them: the primary first, or another one each time.
    pub(super) fn in_order(&self) -> Vec<&Arc<Node>> {
        let mut alive: Vec<&Arc<Node>> = self.all.iter().filter(|node| node.state.borrow().alive).collect();
        if self.options.spread {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % alive.len().max(1);
            alive.rotate_left(turn);
        } else {
            let epoch = self.primary.borrow().clone();
            let is_primary = |node: &Arc<Node>| epoch.as_ref().is_some_and(|epoch| Arc::ptr_eq(&epoch.node, node));
            alive.sort_by_key(|node| !is_primary(node));
        }
        alive
    }

    /// How often this node was looked at and still was the primary; `None`: it is not.
    pub(super) fn confirmed(&self, node: &Node) -> Option<u64> {
        let confirmed = self.confirmed.load(Ordering::SeqCst);
        let epoch = self.primary.borrow().clone();
        epoch
            .is_some_and(|epoch| std::ptr::eq(&*epoch.node, node))
            .then_some(confirmed)
    }

    /// How many nodes answer, of how many, and whether the primary is one of them.
    pub(super) fn condition(&self) -> Condition {
        let epoch = self.primary.borrow().clone();
        let alive = self.all.iter().filter(|node| node.state.borrow().alive).count();
        Condition {
            alive,
            nodes: self.all.len(),
            primary: epoch.is_some_and(|epoch| epoch.node.state.borrow().timeline > 0),
        }
    }

    /// Takes over what was seen of all nodes.
    fn decide(&self, seen: &[(State, bool)]) {
        let current = self.primary.borrow().clone();
        let by_patroni = self.all.iter().any(|node| node.options.patroni.is_some());
        let chosen = match by_patroni {
            true => {
                let mut leaders = seen.iter().zip(&self.all).filter(|((_, leads), _)| *leads);
                // Two that say so are one too many: wait until they agree.
                leaders.next().filter(|_| leaders.next().is_none())
            }
            // Whoever was promoted last. One that was cut off may not know of it yet.
            false => {
                let writable = seen.iter().zip(&self.all).filter(|((state, _), _)| state.timeline > 0);
                writable.max_by_key(|((state, _), _)| state.timeline)
            }
        };
        let Some(((state, _), node)) = chosen else { return };
        if state.timeline == 0 {
            return;
        }
        if current.as_ref().is_some_and(|epoch| Arc::ptr_eq(&epoch.node, node)) {
            self.confirmed.fetch_add(1, Ordering::SeqCst);
            return;
        }
        tracing::info!(node = node.options.name, "this node is the primary");
        let epoch = Epoch {
            node: Arc::clone(node),
            pool: self.writers(node),
        };
        self.primary.send_replace(Some(Arc::new(epoch)));
        if let Some(before) = current {
            tokio::spawn(async move { before.pool.close().await });
        }
    }

    /// Connections for writing; one that turns out to be read-only is none.
    fn writers(&self, node: &Node) -> PgPool {
        // A time-out of statements would also end the wait for the synchronous standby, and report success; and whatever the role
        // or the database is set to, that wait is part of every commit.
        let limits = [
            ("lock_timeout", "5s"),
            ("idle_in_transaction_session_timeout", "30s"),
            ("statement_timeout", "0"),
            ("synchronous_commit", "on"),
        ];
        pool(&self.options)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    let read_only: String = sqlx::query_scalar("SHOW transaction_read_only")
                        .fetch_one(connection)
                        .await?;
                    match read_only.as_str() {
                        "off" => Ok(()),
                        _ => Err(sqlx::Error::Io(std::io::Error::other("the node is read-only"))),
                    }
                })
            })
            .connect_lazy_with(node.options.connect.clone().options(limits))
    }

    pub(super) async fn close(&self) {
        if let Some(epoch) = self.primary.send_replace(None) {
            epoch.pool.close().await;
        }
        for node in &self.all {
            node.pool.close().await;
            *node.probe.lock().await = None;
        }
    }
}

/// Looks at all nodes for as long as it is let.
pub(super) async fn watch(nodes: Arc<Nodes>) {
    let client = reqwest::Client::builder().timeout(ANSWER).no_proxy().build();
    let http = match client {
        Ok(client) => client,
        Err(error) => return tracing::error!(%error, "Patroni can't be asked"),
    };
    loop {
        let looks = nodes.all.iter().map(|node| {
            let (node, http) = (Arc::clone(node), http.clone());
            tokio::spawn(async move { node.look(&http).await })
        });
        let mut seen = Vec::with_capacity(nodes.all.len());
        for look in looks.collect::<Vec<_>>() {
            seen.push(look.await.unwrap_or_default());
        }
        nodes.decide(&seen);
        let pause = if nodes.condition().primary { EVERY } else { SOON };
        tokio::time::sleep(pause).await;
    }
}
