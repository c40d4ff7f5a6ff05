//! What one copy of the service tells the others, and whoever listens: that something was committed, and what.
//!
//! One copy at a time, the holder of a lease, appends the changes of the outbox to live streams, one for each tenant. Entries
//! carry their places in the outbox, and the streams say how far they have come, so that a copy that dies, an answer that is
//! lost or a failover that forgets leaves neither a hole nor an entry twice. Without the live server everything else goes on,
//! and other copies notice a change when they look by themselves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aeterna_error::Error;
use aeterna_rpc::{Dependency, Health};
use aeterna_storage::live::{Appended, Batch, Entry, Live};
use aeterna_types::Timestamp;
use tokio_util::sync::CancellationToken;

use super::App;
use crate::domain::{Change, Sequence};
use crate::store::Relational;

/// What the log of a relational store is called, and its lease, and the channel on which copies are woken: several stores may
/// share a server.
pub fn log_of(store: &str) -> String {
    format!("memory:{store}")
}

/// How long a copy that does not answer keeps the lease.
const TERM: Duration = Duration::from_millis(1500);
/// How often the lease is renewed, and what failed is tried again.
const PAUSE: Duration = Duration::from_millis(500);
/// The least time between two wake-ups.
const BETWEEN: Duration = Duration::from_millis(5);
/// Changes appended at a time.
const PAGE: usize = 256;
/// Entries that the stream of a tenant keeps. Whoever is further behind reads the store.
const KEEP: usize = 1_000;

/// Appends what is new in the outbox to the live streams.
pub(crate) struct Relay {
    store: Arc<dyn Relational>,
    live: Arc<dyn Live>,
    log: String,
    /// Names this copy.
    me: String,
    encode: fn(&Change) -> Vec<u8>,
    /// How far it has come as the holder of the lease.
    position: Option<Sequence>,
    /// When the oldest change was committed that it knows of and has not appended.
    oldest: Option<Timestamp>,
}

impl Relay {
    /// One step: true when there may be more, false when everything was relayed or somebody else holds the lease.
    async fn step(&mut self) -> Result<bool, Error> {
        if !self.live.hold(&self.log, &self.me, TERM).await? {
            (self.position, self.oldest) = (None, None);
            return Ok(false);
        }
        let from = match self.position {
            Some(position) => position,
            None => Sequence(self.live.begin(&self.log, self.store.last_sequence().await?.0).await?),
        };
        let page = self.store.changes(None, from, PAGE).await?;
        // Asked afterwards: a node that took over meanwhile may lack it, and have gone on since.
        if !self.store.has(from).await? {
            tracing::warn!(
                "the live streams are ahead of the store, which was put back to an earlier time; they begin anew"
            );
            self.position = None;
            self.live.forget(&self.log).await?;
            return Ok(true);
        }
        self.oldest = page.first().map(|change| change.committed_at);
        let to = page.last().map_or(from, |change| change.sequence);
        let entry = |change: &Change| Entry {
            stream: change.tenant.to_string(),
            place: change.sequence.0,
            payload: (self.encode)(change),
        };
        // Without changes, too: a failover may have forgotten what was appended before.
        let batch = Batch {
            log: &self.log,
            holder: &self.me,
            from: from.0,
            to: to.0,
            entries: page.iter().map(entry).collect(),
            keep: KEEP,
        };
        // Until it is known what became of it.
        self.position = None;
        let appended = self.live.append(&batch).await?;
        self.position = match appended {
            Appended::Done => {
                self.oldest = None;
                Some(to)
            }
            Appended::At(stands) => stands.map(Sequence),
            Appended::NotHeld => None,
        };
        Ok(appended != Appended::Done || to > from)
    }
}

/// The tasks around a live server.
pub struct LiveWork {
    app: Arc<App>,
    live: Arc<dyn Live>,
    log: String,
    me: String,
    encode: fn(&Change) -> Vec<u8>,
    health: Health,
    service: &'static str,
}

impl LiveWork {
    /// For an app; `log` is what its log is called, and `encode` says what an entry is in the contract.
    pub fn new(
        app: Arc<App>,
        live: Arc<dyn Live>,
        log: String,
        encode: fn(&Change) -> Vec<u8>,
        health: Health,
        service: &'static str,
    ) -> Self {
        Self {
            app,
            live,
            log,
            me: uuid::Uuid::now_v7().to_string(),
            encode,
            health,
            service,
        }
    }

    /// Does everything until it is told to stop.
    pub async fn run(self, stop: CancellationToken) {
        tokio::join!(self.relay(&stop), self.tell(&stop), self.hear(&stop));
    }

    async fn relay(&self, stop: &CancellationToken) {
        let mut relay = Relay {
            store: Arc::clone(&self.app.store),
            live: Arc::clone(&self.live),
            log: self.log.clone(),
            me: self.me.clone(),
            encode: self.encode,
            position: None,
            oldest: None,
        };
        let mut committed = self.app.committed.subscribe();
        let mut well = Instant::now();
        while !stop.is_cancelled() {
            let stepped = relay.step().await;
            let now = self.app.clock.now();
            let mut lag = relay.oldest.map_or(0.0, |oldest| now.seconds_since(oldest).max(0.0));
            match &stepped {
                Ok(_) => well = Instant::now(),
                // Nobody knows what is missing while the server is away.
                Err(_) => lag = lag.max(well.elapsed().as_secs_f64()),
            }
            self.app.metrics.live_lag.record(lag, &[]);
            self.report(&stepped).await;
            let pause = match stepped {
                Ok(true) => continue,
                Ok(false) => PAUSE,
                Err(_) => PAUSE / 10,
            };
            tokio::select! {
                () = stop.cancelled() => {}
                // A server that is away is not asked at every write.
                _ = committed.changed(), if stepped.is_ok() => tokio::time::sleep(BETWEEN).await,
                () = tokio::time::sleep(pause) => {}
            }
        }
        // The next copy need not wait for the end of the term.
        if let Err(error) = self.live.release(&self.log, &self.me).await {
            tracing::debug!(%error, "the lease ends by itself");
        }
    }

    async fn report(&self, stepped: &Result<bool, Error>) {
        let state = match stepped {
            Ok(_) => Dependency::Up,
            Err(error) => Dependency::Degraded(format!("{error}; other copies hear of a change a second later")),
        };
        self.health.report(self.service, "live", state).await;
    }

    /// Tells the other copies that this one has committed something.
    async fn tell(&self, stop: &CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.app.committed.told() => {}
            }
            if let Err(error) = self.live.publish(&self.log, &self.me).await {
                tracing::debug!(%error, "the other copies can't be woken");
            }
            tokio::time::sleep(BETWEEN).await;
        }
    }

    /// Hears of what other copies have committed.
    async fn hear(&self, stop: &CancellationToken) {
        let hear = async {
            loop {
                match self.live.listen(&self.log).await {
                    Ok(mut ear) => {
                        // Something may have been said before.
                        self.app.committed.somewhere();
                        while let Some(who) = ear.next().await {
                            if who != self.me {
                                self.app.committed.somewhere();
                            }
                        }
                    }
                    Err(error) => tracing::debug!(%error, "the other copies can't be heard"),
                }
                tokio::time::sleep(PAUSE / 10).await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = hear => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use aeterna_storage::live::{Listener, MemoryLive, Page};
    use aeterna_storage::{SqliteOptions, StorageError};
    use async_trait::async_trait;
    use proptest::prelude::*;

    use super::*;
    use crate::store::conformance;
    use crate::store::sqlite::SqliteStore;

    const LOG: &str = "log";

    /// What happens to a call.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Fault {
        None,
        /// It never arrives.
        Before,
        /// It is done, and the answer is lost.
        After,
        /// It is done, and then a failover forgets the last pieces, and the lease.
        Forgets,
    }

    /// Everything that was appended.
    #[derive(Clone, Debug, Default)]
    struct Done {
        began: Option<i64>,
        /// From where, to where, and what.
        pieces: Vec<(i64, i64, Vec<Entry>)>,
    }

    /// A live server to which faults happen, one for each call, in order.
    #[derive(Debug, Default)]
    struct Faulty {
        now: Mutex<Arc<MemoryLive>>,
        done: Mutex<Done>,
        faults: Mutex<Vec<Fault>>,
    }

    impl Faulty {
        fn live(&self) -> Arc<MemoryLive> {
            Arc::clone(&self.now.lock().unwrap())
        }

        fn fault(&self) -> Result<Fault, StorageError> {
            match self.faults.lock().unwrap().pop().unwrap_or(Fault::None) {
                Fault::Before => Err(StorageError::Unavailable("before".into())),
                other => Ok(other),
            }
        }

        async fn then<T>(&self, fault: Fault, answer: T) -> Result<T, StorageError> {
            match fault {
                Fault::After => Err(StorageError::Unavailable("after".into())),
                Fault::Forgets => {
                    self.forget().await;
                    Err(StorageError::Unavailable("forgets".into()))
                }
                _ => Ok(answer),
            }
        }

        /// Another server takes over, without the last piece.
        async fn forget(&self) {
            let Done { began, pieces } = {
                let mut done = self.done.lock().unwrap();
                done.pieces.pop();
                done.clone()
            };
            let next = MemoryLive::default();
            if let Some(began) = began {
                next.begin(LOG, began).await.unwrap();
                next.hold(LOG, "old", TERM).await.unwrap();
                for (from, to, entries) in pieces {
                    let batch = Batch {
                        log: LOG,
                        holder: "old",
                        from,
                        to,
                        entries,
                        keep: KEEP,
                    };
                    assert_eq!(next.append(&batch).await.unwrap(), Appended::Done);
                }
                next.release(LOG, "old").await.unwrap();
            }
            *self.now.lock().unwrap() = Arc::new(next);
        }
    }

    #[async_trait]
    impl Live for Faulty {
        async fn publish(&self, channel: &str, message: &str) -> Result<(), StorageError> {
            self.live().publish(channel, message).await
        }

        async fn listen(&self, channel: &str) -> Result<Box<dyn Listener>, StorageError> {
            self.live().listen(channel).await
        }

        async fn hold(&self, lease: &str, holder: &str, term: Duration) -> Result<bool, StorageError> {
            let fault = self.fault()?;
            let held = self.live().hold(lease, holder, term).await?;
            self.then(fault, held).await
        }

        async fn release(&self, lease: &str, holder: &str) -> Result<(), StorageError> {
            self.live().release(lease, holder).await
        }

        async fn begin(&self, log: &str, at: i64) -> Result<i64, StorageError> {
            let fault = self.fault()?;
            let stands = self.live().begin(log, at).await?;
            self.done.lock().unwrap().began.get_or_insert(at);
            self.then(fault, stands).await
        }

        async fn append(&self, batch: &Batch<'_>) -> Result<Appended, StorageError> {
            let fault = self.fault()?;
            let appended = self.live().append(batch).await?;
            if appended == Appended::Done {
                let piece = (batch.from, batch.to, batch.entries.clone());
                self.done.lock().unwrap().pieces.push(piece);
            }
            self.then(fault, appended).await
        }

        async fn read(&self, log: &str, stream: &str, after: i64, limit: usize) -> Result<Page, StorageError> {
            self.live().read(log, stream, after, limit).await
        }

        async fn stands(&self, log: &str) -> Result<Option<i64>, StorageError> {
            self.live().stands(log).await
        }

        async fn since(&self, log: &str, stream: &str) -> Result<Option<i64>, StorageError> {
            self.live().since(log, stream).await
        }

        async fn forget(&self, log: &str) -> Result<(), StorageError> {
            self.live().forget(log).await
        }
    }

    fn encode(change: &Change) -> Vec<u8> {
        change.sequence.0.to_le_bytes().to_vec()
    }

    fn copy(store: &SqliteStore, live: &Arc<Faulty>, me: &str) -> Relay {
        Relay {
            store: Arc::new(store.clone()),
            live: Arc::clone(live) as Arc<dyn Live>,
            log: LOG.into(),
            me: me.into(),
            encode,
            position: None,
            oldest: None,
        }
    }

    /// What happens at one point of the story.
    #[derive(Clone, Debug)]
    enum Event {
        /// Something is committed.
        Write,
        /// One of two copies makes a step, with what happens to its calls.
        Step(bool, Vec<Fault>),
        /// One of two copies is killed, and another one comes in its place.
        Crash(bool),
    }

    fn event() -> impl Strategy<Value = Event> {
        let fault = prop_oneof![
            6 => Just(Fault::None), 1 => Just(Fault::Before), 1 => Just(Fault::After), 1 => Just(Fault::Forgets)
        ];
        prop_oneof![
            3 => Just(Event::Write),
            6 => (any::<bool>(), prop::collection::vec(fault, 0..4)).prop_map(|(copy, faults)| Event::Step(copy, faults)),
            1 => any::<bool>().prop_map(Event::Crash),
        ]
    }

    async fn tell(story: Vec<Event>) {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().unwrap();
        let options = SqliteOptions {
            path: dir.path().join("memory.db"),
            busy_timeout: Duration::from_secs(5),
            readers: 2,
        };
        let store = SqliteStore::open(&options, 0).await.unwrap();
        let live = Arc::new(Faulty::default());
        let mut copies = [copy(&store, &live, "a"), copy(&store, &live, "b")];
        let next = || NUMBER.fetch_add(1, Ordering::SeqCst);
        for event in story {
            match event {
                Event::Write => conformance::one_memory(&store, &format!("memory {}", next())).await,
                Event::Step(which, faults) => {
                    *live.faults.lock().unwrap() = faults;
                    let _ = copies[usize::from(which)].step().await;
                    live.faults.lock().unwrap().clear();
                }
                Event::Crash(which) => {
                    // The term of its lease ends.
                    let gone = &copies[usize::from(which)].me;
                    live.live().release(LOG, gone).await.unwrap();
                    copies[usize::from(which)] = copy(&store, &live, &format!("copy {}", next()));
                }
            }
        }
        // Whatever happened: once it is quiet, everything since the beginning is there, once and in order.
        for relay in &mut copies {
            while relay.step().await.unwrap() {}
        }
        let began = live.done.lock().unwrap().began.unwrap();
        let changes = store.changes(None, Sequence(began), usize::MAX >> 1).await.unwrap();
        let expected: Vec<(i64, Vec<u8>)> = changes
            .iter()
            .map(|change| (change.sequence.0, encode(change)))
            .collect();
        let tenant = changes
            .first()
            .map_or_else(|| "default".to_owned(), |change| change.tenant.to_string());
        let page = live.read(LOG, &tenant, began, usize::MAX >> 1).await.unwrap();
        assert_eq!(page, Page::Entries(expected));
        store.close().await;
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn faults_leave_neither_a_hole_nor_an_entry_twice(story in prop::collection::vec(event(), 1..40)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(tell(story));
        }
    }
}
