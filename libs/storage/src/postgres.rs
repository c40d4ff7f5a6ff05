//! PostgreSQL on several nodes: always the writable one for writes, any one that is recent enough for reads.
//!
//! A task looks at all nodes several times a second (`nodes`). Each primary has a pool of its own, which is dropped whole when
//! another node takes over. A connection that had any error is closed, never lent again. What a commit leaves open is said as
//! [`StorageError::Unknown`]: a connection lost at that moment, or a commit that PostgreSQL reports with a warning, as it does
//! when the wait for the synchronous standby was cancelled (`notice`).

mod nodes;
mod notice;
mod options;
mod session;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::migrate::MigrateError;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use tokio::task::JoinHandle;

use crate::StorageError;
use crate::migrations::migrator;
use nodes::Nodes;
pub use nodes::{Condition, Node};
pub use options::PostgresOptions;
pub use session::Session;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(2);
/// How long before what failed is tried again.
const AGAIN: Duration = Duration::from_millis(50);
/// How long a migration waits for a table, and how long it tries in all.
const LOCK: Duration = Duration::from_secs(1);
const LOCKS: Duration = Duration::from_secs(60);
/// How often a transaction is repeated that others got in the way of.
const COLLISIONS: u32 = 10;

/// A database on one or more nodes.
#[derive(Clone, Debug)]
pub struct Postgres {
    nodes: Arc<Nodes>,
    /// What was acknowledged or read here of late; no read goes back behind it.
    floor: Arc<Mutex<Floor>>,
    /// Says whether a node has all of some places, its first parameter.
    has_all: &'static str,
    watching: Arc<JoinHandle<()>>,
    patience: Duration,
}

impl Postgres {
    /// Begins to watch the nodes; `has_all` is a query for whether a node has all of some places, its first parameter.
    pub fn open(options: &PostgresOptions, has_all: &'static str) -> Self {
        let nodes = Arc::new(Nodes::new(options));
        let watching = tokio::spawn(nodes::watch(Arc::clone(&nodes)));
        Self {
            nodes,
            // Each node is asked once at least: it may not have the schema yet.
            floor: Arc::new(Mutex::new(Floor {
                count: 1,
                ..Floor::default()
            })),
            has_all,
            watching: Arc::new(watching),
            patience: options.patience,
        }
    }

    /// Begins a transaction on the primary, with these settings in it.
    ///
    /// # Errors
    /// When there is no primary, or none of its connections comes free in time.
    pub async fn write(&self, settings: &[(&str, &str)]) -> Result<Session, StorageError> {
        let epoch = self.nodes.primary(self.patience).await?;
        // The pool would go on trying to connect to a node that is gone, while another one takes over.
        tokio::select! {
            begun = Session::begin(epoch.pool(), "BEGIN", settings, epoch.node()) => begun,
            () = epoch.node().lost() => Err(StorageError::Unavailable("the primary is away".into())),
            () = self.nodes.succeeded(&epoch) => Err(StorageError::Unavailable("another node is the primary".into())),
        }
    }

    /// Begins a transaction that only reads, all as of one moment that is not before what was acknowledged or read here: on the
    /// primary, or on a standby when it is away or reads are spread.
    ///
    /// # Errors
    /// When no node answers that has everything.
    pub async fn read(&self, settings: &[(&str, &str)]) -> Result<Session, StorageError> {
        let mut last = StorageError::Unavailable("no node answers".into());
        for node in self.nodes.in_order() {
            match self.read_on(node, node.pool(), settings).await {
                Ok(session) => return Ok(session),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The same on the primary alone, which shows nothing that waits for a standby yet.
    ///
    /// # Errors
    /// When there is no primary that answers.
    pub async fn read_primary(&self, settings: &[(&str, &str)]) -> Result<Session, StorageError> {
        let epoch = self.nodes.primary(self.patience).await?;
        let limit = self.nodes.statement().as_millis().to_string();
        let settings = [settings, &nodes::limits(&limit)].concat();
        // Connections for writing end when the node is the primary no longer, whoever has noticed.
        tokio::select! {
            read = self.read_on(epoch.node(), epoch.pool(), &settings) => read,
            () = self.nodes.succeeded(&epoch) => Err(StorageError::Unavailable("another node is the primary".into())),
        }
    }

    async fn read_on(
        &self,
        node: &Arc<Node>,
        pool: &PgPool,
        settings: &[(&str, &str)],
    ) -> Result<Session, StorageError> {
        const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        let recent = async {
            let mut session = Session::begin(pool, BEGIN, settings, node).await?;
            if self.is_recent(&mut session).await? {
                return Ok(session);
            }
            session.finish().await?;
            Err(StorageError::Unavailable("the node is behind".into()))
        };
        node.while_it_answers(recent).await
    }

    /// Waits until reads see what was committed with a place of which somebody else has told, and everything before it. Only a
    /// place that some node has counts: one that is nowhere is waited for until the primary was confirmed without it, and holds
    /// up nobody else.
    ///
    /// # Errors
    /// When no node that has it answers in time.
    pub async fn reached(&self, place: i64) -> Result<(), StorageError> {
        let until = Instant::now() + self.patience;
        let mut lacked = None;
        while !self.floor().knows(place) {
            let mut last = StorageError::Unavailable("no node answers".into());
            for node in self.nodes.in_order() {
                match node.while_it_answers(self.look_for(place, node)).await {
                    Ok(true) => return Ok(()),
                    Ok(false) => last = StorageError::Unavailable("no node has what the token stands for".into()),
                    Err(error) => {
                        last = error;
                        continue;
                    }
                }
                // The look under way may have begun before.
                if let Some(confirmed) = self.nodes.confirmed(node)
                    && confirmed >= *lacked.get_or_insert(confirmed) + 2
                {
                    return Ok(());
                }
            }
            if Instant::now() >= until {
                return Err(last);
            }
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }

    /// Whether a node has a place, which reads go by from then on.
    async fn look_for(&self, place: i64, node: &Arc<Node>) -> Result<bool, StorageError> {
        let mut session = Session::begin(node.pool(), "BEGIN READ ONLY", &[], node).await?;
        let found = self.has_all(&mut session, &[place]).await?;
        session.finish().await?;
        if found {
            self.saw(node, place, Origin::Elsewhere);
        }
        Ok(found)
    }

    /// Takes over that a node has a place, which was committed here or of which somebody else has told.
    fn saw(&self, node: &Node, place: i64, origin: Origin) {
        let mut floor = self.floor();
        let had_all = node.seen() >= floor.count;
        floor.add(place, origin);
        if had_all {
            node.saw(floor.count);
        }
    }

    async fn is_recent(&self, session: &mut Session) -> Result<bool, StorageError> {
        let (count, places) = {
            let floor = self.floor();
            if session.node().seen() >= floor.count {
                return Ok(true);
            }
            (floor.count, floor.places())
        };
        if self.has_all(session, &places).await? {
            session.node().saw(count);
            self.floor().lacked.clear();
            return Ok(true);
        }
        let gone = self.are_gone(session, &places).await?;
        if gone {
            session.node().saw(count);
        }
        Ok(gone)
    }

    async fn has_all(&self, session: &mut Session, places: &[i64]) -> Result<bool, StorageError> {
        let text = AssertSqlSafe(self.has_all);
        Ok(sqlx::query_scalar(text).bind(places).fetch_one(&mut **session).await?)
    }

    /// Whether places that a node lacks are nowhere any more. A primary that dies may show, at its end, commits that its standby
    /// never had and nobody was acknowledged. Who has read them must not wait for them for ever: what a primary lacks that has
    /// been confirmed as one since is gone.
    async fn are_gone(&self, session: &mut Session, places: &[i64]) -> Result<bool, StorageError> {
        let Some(confirmed) = self.nodes.confirmed(session.node()) else {
            return Ok(false);
        };
        // Once for each time that it is confirmed.
        if self.floor().asked.replace(confirmed) == Some(confirmed) {
            return Ok(false);
        }
        let mut lacking = Vec::new();
        for place in places {
            if !self.has_all(session, &[*place]).await? {
                lacking.push(*place);
            }
        }
        let gone = self.floor().lacks(&lacking, confirmed);
        if gone {
            tracing::warn!(places = ?lacking, "changes that were read of a primary at its end are gone; none of them was acknowledged");
        }
        Ok(gone)
    }

    fn floor(&self) -> MutexGuard<'_, Floor> {
        self.floor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from now on see at least what was read with a place, and before it.
    pub fn reach(&self, place: i64) {
        self.floor().add(place, Origin::Elsewhere);
    }

    /// Commits a write whose last change has a place; 0: it has none.
    ///
    /// # Errors
    /// [`StorageError::Unknown`] when it may or may not be there.
    pub async fn commit(&self, session: Session, place: i64) -> Result<(), StorageError> {
        let node = Arc::clone(session.node());
        session.commit().await?;
        self.saw(&node, place, Origin::Here);
        Ok(())
    }

    /// Repeats what failed for a while; `safe` when it may be repeated although it may have been done.
    pub fn attempts(&self, safe: bool) -> Attempts {
        Attempts {
            until: Instant::now() + self.patience,
            collisions: COLLISIONS,
            safe,
        }
    }

    /// How the nodes are at the moment, as far as the last look at them tells.
    pub fn condition(&self) -> Condition {
        self.nodes.condition()
    }

    /// Waits until there is a primary.
    ///
    /// # Errors
    /// When there is none in time.
    pub async fn ready(&self, patience: Duration) -> Result<(), StorageError> {
        self.nodes.primary(patience).await.map(|_| ())
    }

    /// Stops watching and closes all connections.
    pub async fn close(&self) {
        self.watching.abort();
        self.nodes.close().await;
    }
}

/// Where a place comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It was committed by this process.
    Here,
    /// It was read, or told by a token.
    Elsewhere,
}

/// Places that were acknowledged or read last. A standby replays in the order of commits, so that one that has the latest has
/// those before; some are kept, since those of a moment are acknowledged in any order. What was read, or told by a token, may be
/// long ago, and must not push out what was acknowledged just now.
#[derive(Debug, Default)]
struct Floor {
    here: VecDeque<i64>,
    elsewhere: VecDeque<i64>,
    /// Places so far.
    count: i64,
    /// Places that are nowhere any more; whoever has read them may name them again.
    gone: BTreeSet<i64>,
    /// Places that the primary lacks, and how often it had been confirmed when that was seen first.
    lacked: BTreeMap<i64, u64>,
    /// How often it had been confirmed when it was asked which ones it lacks.
    asked: Option<u64>,
}

impl Floor {
    /// Nothing has to be found out about a place.
    fn knows(&self, place: i64) -> bool {
        place <= 0 || self.here.contains(&place) || self.elsewhere.contains(&place) || self.gone.contains(&place)
    }

    fn places(&self) -> Vec<i64> {
        self.here.iter().chain(&self.elsewhere).copied().collect()
    }

    fn add(&mut self, place: i64, origin: Origin) {
        const KEPT: usize = 128;
        if self.knows(place) {
            return;
        }
        let latest = match origin {
            Origin::Here => &mut self.here,
            Origin::Elsewhere => &mut self.elsewhere,
        };
        if latest.len() == KEPT {
            // Mostly a node that has the others has the oldest of them. But one that was named just now may be older than all
            // of them, of a transaction that took long.
            let oldest = latest
                .iter()
                .take(KEPT / 2)
                .enumerate()
                .min_by_key(|(_, place)| **place);
            oldest.map(|(at, _)| at).and_then(|at| latest.remove(at));
        }
        latest.push_back(place);
        self.count += 1;
    }

    /// Takes over which places the primary lacks; true when all of them are gone: it has been confirmed twice since each of them
    /// was seen to be lacking, for the look under way may have begun before. One that was only just heard of may be on a node
    /// that has taken over, which is not known here yet.
    fn lacks(&mut self, lacking: &[i64], confirmed: u64) -> bool {
        self.lacked.retain(|place, _| lacking.contains(place));
        for place in lacking {
            self.lacked.entry(*place).or_insert(confirmed);
        }
        if self.lacked.values().any(|since| confirmed < since + 2) {
            return false;
        }
        self.here.retain(|place| !lacking.contains(place));
        self.elsewhere.retain(|place| !lacking.contains(place));
        self.gone.extend(lacking);
        self.lacked.clear();
        true
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if Arc::strong_count(&self.watching) == 1 {
            self.watching.abort();
        }
    }
}

/// How long and how often something is repeated.
#[derive(Debug)]
pub struct Attempts {
    until: Instant,
    collisions: u32,
    safe: bool,
}

impl Attempts {
    /// Waits a moment when it is worth another attempt.
    ///
    /// # Errors
    /// The same error, when it is not.
    pub async fn again(&mut self, error: StorageError) -> Result<(), StorageError> {
        let worth = match error {
            StorageError::Unavailable(_) => Instant::now() < self.until,
            StorageError::Unknown(_) => self.safe && Instant::now() < self.until,
            // Others wrote the same at the same time; on a second look it is there.
            StorageError::Conflict(_) | StorageError::Collision(_) => {
                self.collisions = self.collisions.saturating_sub(1);
                self.collisions > 0
            }
            _ => false,
        };
        if !worth {
            if let StorageError::Unavailable(cause) | StorageError::Unknown(cause) | StorageError::Collision(cause) =
                &error
            {
                tracing::warn!(%error, cause = &**cause as &dyn std::error::Error, "given up");
            }
            return Err(error);
        }
        tracing::debug!(%error, "trying again");
        tokio::time::sleep(AGAIN).await;
        Ok(())
    }
}

/// Runs the migrations that are missing as the owner of the schema, one program at a time; each `(description, sql)` has its
/// position plus one as its version. `grants` follow.
///
/// # Errors
/// When there is no primary, one fails, or the schema was written by a newer version.
pub async fn migrate(
    options: &PostgresOptions,
    migrations: &'static [(&'static str, &'static str)],
    grants: &str,
) -> Result<(), StorageError> {
    let postgres = Postgres::open(options, "SELECT true");
    let migrated = async {
        // By the way, so that the primary is known.
        let session = postgres.write(&[]).await?;
        let connect = session.node().connect().clone();
        session.finish().await?;
        let mut connection = PgConnection::connect_with(&connect).await?;
        // One program at a time, what is granted included; the lock ends with the connection.
        sqlx::query("SELECT pg_advisory_lock(hashtext('aeterna migrations'))")
            .execute(&mut connection)
            .await?;
        check_schema(&mut connection, migrations.len() as i64, true).await?;
        // What waits for a lock on a table keeps everybody else from the table: it gives way, and tries again.
        let limit = format!("SET lock_timeout = '{}ms'", LOCK.as_millis());
        sqlx::raw_sql(AssertSqlSafe(limit)).execute(&mut connection).await?;
        let since = Instant::now();
        while let Err(error) = migrator(migrations).run(&mut connection).await {
            if !waited_for_lock(&error) || since.elapsed() > LOCKS {
                return Err(StorageError::Broken(Box::new(error)));
            }
            tracing::info!("a table of the schema is in use; it is changed when that ends");
            tokio::time::sleep(LOCK).await;
        }
        let grants = format!("RESET lock_timeout; {grants}");
        sqlx::raw_sql(AssertSqlSafe(grants)).execute(&mut connection).await?;
        connection.close().await?;
        Ok(())
    };
    let migrated = migrated.await;
    postgres.close().await;
    migrated
}

fn waited_for_lock(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return false;
    };
    // lock_not_available: https://www.postgresql.org/docs/current/errcodes-appendix.html
    error.as_database_error().and_then(|error| error.code()).as_deref() == Some("55P03")
}

/// Refuses a schema that a newer version wrote, and one that is not up to date unless it is about to be brought there.
///
/// # Errors
/// `SchemaTooNew` or `SchemaTooOld`.
pub async fn check_schema(connection: &mut PgConnection, known: i64, migrating: bool) -> Result<(), StorageError> {
    let table: Option<String> = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations')::text")
        .fetch_one(&mut *connection)
        .await?;
    let found: Option<i64> = match table {
        Some(_) => {
            sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success")
                .fetch_one(connection)
                .await?
        }
        None => None,
    };
    let found = found.unwrap_or(0);
    if found > known {
        return Err(StorageError::SchemaTooNew { found, known });
    }
    if found < known && !migrating {
        return Err(StorageError::SchemaTooOld { found, known });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_gone_only_after_the_primary_was_confirmed_twice_without_it() {
        let mut floor = Floor::default();
        for place in [1, 2, 3] {
            floor.add(place, Origin::Elsewhere);
        }
        assert!(!floor.lacks(&[2], 7) && !floor.lacks(&[2], 8));
        // Another one, of which a token told just now, has waits of its own; and one that is found is not lacking any more.
        assert!(!floor.lacks(&[2, 3], 9));
        assert!(!floor.lacks(&[3], 10));
        assert!(!floor.lacks(&[2, 3], 11), "the second is lacking anew");
        assert!(!floor.lacks(&[2, 3], 12));
        assert!(floor.lacks(&[2, 3], 13));
        assert_eq!(floor.places(), [1]);
        floor.add(2, Origin::Elsewhere);
        assert_eq!(floor.places(), [1], "who has read it may name it again");
    }

    #[test]
    fn a_new_place_stays_however_many_old_ones_are_named_after_it_and_an_old_one_for_a_while() {
        let mut floor = Floor::default();
        for place in (1_001..=1_128).chain([1_000_000]).chain(2_000..3_000) {
            floor.add(place, Origin::Elsewhere);
        }
        assert!(floor.knows(1_000_000) && floor.knows(2_999) && !floor.knows(1_001));
        floor.add(1, Origin::Elsewhere);
        for place in 3_000..3_060 {
            floor.add(place, Origin::Elsewhere);
        }
        assert!(floor.knows(1));
    }

    #[test]
    fn what_was_acknowledged_here_stays_however_much_is_read() {
        let mut floor = Floor::default();
        floor.add(1_000_000, Origin::Here);
        for place in 1..1_000 {
            floor.add(place, Origin::Elsewhere);
        }
        assert!(floor.knows(1_000_000) && floor.knows(999) && !floor.knows(1));
    }
}
