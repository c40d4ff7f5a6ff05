//! What is told at once: wake-ups for whoever listens, streams of what changed of late, and leases.
//!
//! None of it is a source of truth. A stream is filled from a log in the relational store, and its entries carry their places
//! in that log: after a failover that lost some of them they are appended again under the same places, and whoever reads knows
//! what he has had.

mod memory;
mod redis;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

use crate::StorageError;
pub use memory::MemoryLive;
pub use redis::RedisLive;

/// One thing to append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Which stream it belongs to.
    pub stream: String,
    /// Its place in the log, above 0.
    pub place: i64,
    /// What it says.
    pub payload: Vec<u8>,
}

/// A piece of a log, to be appended to its streams in one step.
#[derive(Clone, Debug)]
pub struct Batch<'a> {
    /// The log.
    pub log: &'a str,
    /// Who holds the lease of the same name.
    pub holder: &'a str,
    /// Where the log stood before.
    pub from: i64,
    /// Where it stands then.
    pub to: i64,
    /// What lies between, in order.
    pub entries: Vec<Entry>,
    /// About how many entries each stream keeps.
    pub keep: usize,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It was appended.
    Done,
    /// Somebody else holds the lease, or nobody.
    NotHeld,
    /// The log stands elsewhere, or was never begun: a failover has lost something, or somebody else has gone on.
    At(Option<i64>),
}

/// What a stream has after a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    /// The next entries, oldest first.
    Entries(Vec<(i64, Vec<u8>)>),
    /// Something may be missing between: read the relational store instead.
    Gap,
}

/// Hears what is said on a channel.
#[async_trait]
pub trait Listener: Send {
    /// The next message; `None` when the connection is lost: listen again, and look at what was missed.
    async fn next(&mut self) -> Option<String>;
}

/// The port.
#[async_trait]
pub trait Live: fmt::Debug + Send + Sync {
    /// Says something to all who listen at this moment.
    ///
    /// # Errors
    /// When the server is away.
    async fn publish(&self, channel: &str, message: &str) -> Result<(), StorageError>;

    /// Listens to a channel from now on.
    ///
    /// # Errors
    /// When the server is away.
    async fn listen(&self, channel: &str) -> Result<Box<dyn Listener>, StorageError>;

    /// Takes a lease that is free, or keeps one that is held, for a while; false when somebody else holds it.
    ///
    /// # Errors
    /// When the server is away.
    async fn hold(&self, lease: &str, holder: &str, term: Duration) -> Result<bool, StorageError>;

    /// Gives up a lease; nothing happens when somebody else holds it.
    ///
    /// # Errors
    /// When the server is away.
    async fn release(&self, lease: &str, holder: &str) -> Result<(), StorageError>;

    /// Where a log stands, which begins at a place when it has none yet: its streams know of nothing before.
    ///
    /// # Errors
    /// When the server is away.
    async fn begin(&self, log: &str, at: i64) -> Result<i64, StorageError>;

    /// Appends a piece of a log, all of it or nothing.
    ///
    /// # Errors
    /// When the server is away; it may or may not have been done, and [`Live::begin`] says which.
    async fn append(&self, batch: &Batch<'_>) -> Result<Appended, StorageError>;

    /// Reads a stream of a log after a place.
    ///
    /// # Errors
    /// When the server is away.
    async fn read(&self, log: &str, stream: &str, after: i64, limit: usize) -> Result<Page, StorageError>;

    /// Where a log stands; `None`: it was never begun.
    ///
    /// # Errors
    /// When the server is away.
    async fn stands(&self, log: &str) -> Result<Option<i64>, StorageError>;

    /// The place after which a stream has everything; `None`: its log was never begun.
    ///
    /// # Errors
    /// When the server is away.
    async fn since(&self, log: &str, stream: &str) -> Result<Option<i64>, StorageError>;

    /// Forgets where a log began and stands, and what its streams have: its holder begins it anew.
    ///
    /// # Errors
    /// When the server is away.
    async fn forget(&self, log: &str) -> Result<(), StorageError>;
}

#[cfg(test)]
mod conformance;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Instant;

    use aeterna_testkit::lab::{Extent, Lab, Part, Scratch, Setup, secrets};

    use super::*;
    use crate::{RedisCache, RedisOptions};

    /// A caller who repeats what the server could not take just then: with a master that takes nothing while its replicas lag
    /// by two seconds, a busy machine is enough.
    #[derive(Debug)]
    struct Patient<L>(L);

    macro_rules! repeated {
        ($call:expr) => {{
            let began = Instant::now();
            loop {
                match $call.await {
                    Err(StorageError::Unavailable(_)) if began.elapsed() < Duration::from_secs(30) => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    done => return done,
                }
            }
        }};
    }

    #[async_trait]
    impl<L: Live> Live for Patient<L> {
        async fn publish(&self, channel: &str, message: &str) -> Result<(), StorageError> {
            repeated!(self.0.publish(channel, message))
        }

        async fn listen(&self, channel: &str) -> Result<Box<dyn Listener>, StorageError> {
            repeated!(self.0.listen(channel))
        }

        async fn hold(&self, lease: &str, holder: &str, term: Duration) -> Result<bool, StorageError> {
            repeated!(self.0.hold(lease, holder, term))
        }

        async fn release(&self, lease: &str, holder: &str) -> Result<(), StorageError> {
            repeated!(self.0.release(lease, holder))
        }

        async fn begin(&self, log: &str, at: i64) -> Result<i64, StorageError> {
            repeated!(self.0.begin(log, at))
        }

        async fn append(&self, batch: &Batch<'_>) -> Result<Appended, StorageError> {
            repeated!(self.0.append(batch))
        }

        async fn read(&self, log: &str, stream: &str, after: i64, limit: usize) -> Result<Page, StorageError> {
            repeated!(self.0.read(log, stream, after, limit))
        }

        async fn stands(&self, log: &str) -> Result<Option<i64>, StorageError> {
            repeated!(self.0.stands(log))
        }

        async fn since(&self, log: &str, stream: &str) -> Result<Option<i64>, StorageError> {
            repeated!(self.0.since(log, stream))
        }

        async fn forget(&self, log: &str) -> Result<(), StorageError> {
            repeated!(self.0.forget(log))
        }
    }

    #[tokio::test]
    async fn one_process_conforms() {
        conformance::conforms(&MemoryLive::default()).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn redis_conforms_and_follows_its_sentinels() {
        let place = Scratch::new();
        let setup = Setup::of(Extent::Redis, BTreeMap::new());
        let lab = Lab::up(place.path(), setup, |_| ()).await.unwrap();
        let uri = lab.live();
        let (scheme, rest) = uri.split_once(':').unwrap();
        let options = RedisOptions::parse(scheme, rest).unwrap();
        let [server, sentinels] = [secrets::REDIS, secrets::SENTINELS].map(|secret| Some(secret.to_owned()));
        // Whoever proves nothing is told so, and nothing is shown.
        for [server, sentinels] in [[None, None], [server.clone(), None], [None, sentinels.clone()]] {
            let stranger = RedisLive::new(options.clone().with_passwords(server, sentinels)).unwrap();
            let said = stranger.publish("a", "x").await.unwrap_err().to_string();
            assert!(!said.contains("lab-"), "{said}");
        }
        let options = options.with_passwords(server, sentinels);
        let live = Patient(RedisLive::new(options.clone()).unwrap());
        conformance::conforms(&live).await;
        let cache = RedisCache::new(options).unwrap();
        conformance::caches(&cache).await;

        // The master is killed: a listener is told, and everything goes on at the next one without a new start.
        let mut ear = live.listen("a").await.unwrap();
        let killed = lab.redis_master().await.unwrap();
        lab.kill(&killed, Part::All).await.unwrap();
        let told = tokio::time::timeout(Duration::from_secs(20), ear.next()).await;
        assert_eq!(told.unwrap(), None);
        assert!(live.hold("log", "x", Duration::from_secs(60)).await.unwrap());
        let mut ear = live.listen("a").await.unwrap();
        live.publish("a", "again").await.unwrap();
        assert_eq!(ear.next().await.as_deref(), Some("again"));
        // What the new master has of the log is a beginning of it, and it is gone on with from there.
        let stands = live.begin("log", 1).await.unwrap();
        let next = Batch {
            log: "log",
            holder: "x",
            from: stands,
            to: stands + 1,
            entries: vec![Entry {
                stream: "s".into(),
                place: stands + 1,
                payload: b"next".to_vec(),
            }],
            keep: 1000,
        };
        assert_eq!(live.append(&next).await.unwrap(), Appended::Done);
        let page = live.read("log", "s", stands, 10).await.unwrap();
        assert_eq!(page, Page::Entries(vec![(stands + 1, b"next".to_vec())]));

        // A master that stands still is left as well.
        lab.start(&killed).unwrap();
        lab.live_whole(Duration::from_secs(60)).await.unwrap();
        let master = lab.redis_master().await.unwrap();
        lab.signal(&master, Part::All, "STOP").unwrap();
        live.publish("a", "still").await.unwrap();
        // What the failovers left of the cache is a value or none, and it takes new ones.
        conformance::caches(&cache).await;
        lab.signal(&master, Part::All, "CONT").unwrap();
    }
}
