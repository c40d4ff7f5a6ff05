//! The background work: keeping the vector index in step with the outbox, making up vectors that are pending, reaping what
//! has expired, and telling watchers. Each is a task of its own; only the first one writes the index, so changes are applied in order.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use aeterna_error::{Error, Reason};
use aeterna_rpc::{Dependency, Health};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::App;
use crate::domain::{Key, Sequence};
use crate::store::code::Code;
use crate::store::{Entry, IndexState};

/// Changes applied at a time.
const BATCH: usize = 500;
/// Texts embedded at a time in the background.
const PENDING: usize = 64;
/// Memories reaped at a time.
const REAPED: usize = 500;
/// How often a task looks when nobody wakes it, and tries again after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How long changes of the index may wait to survive a loss of power; the outbox still has them.
const FLUSH: Duration = Duration::from_secs(5);
/// How often policies are asked about what was deleted.
const FORGET: Duration = Duration::from_secs(10);
/// Nothing is pending.
const NOTHING: i64 = i64::MAX;

/// The background work of an app.
#[derive(Clone)]
pub struct Background {
    app: Arc<App>,
    health: Health,
    service: &'static str,
    pending: Arc<Pending>,
}

/// Where pending vectors may be.
struct Pending {
    /// No memory with a smaller number is pending.
    from: AtomicI64,
    /// There is something.
    some: Notify,
}

impl Background {
    /// For an app, whose state it reports as that of a service.
    pub fn new(app: Arc<App>, health: Health, service: &'static str) -> Self {
        let pending = Arc::new(Pending {
            from: AtomicI64::new(0),
            some: Notify::new(),
        });
        Self {
            app,
            health,
            service,
            pending,
        }
    }

    /// Fills an empty index from the stored vectors; no model is called.
    ///
    /// # Errors
    /// When the store or the disk fails.
    pub async fn rebuild(&self) -> Result<usize, Error> {
        let app = &self.app;
        let end = app.store.last_sequence().await?;
        let (mut after, mut count) = (Key(0), 0);
        loop {
            let states = app.store.scan(&app.model.identity, after, 2000, false).await?;
            let Some(last) = states.last() else { break };
            after = last.key;
            let entries: Vec<Entry> = states.iter().filter_map(entry).collect();
            count += entries.len();
            self.apply(entries, Vec::new(), Sequence::default()).await?;
        }
        self.apply(Vec::new(), Vec::new(), end).await?;
        self.flush().await?;
        Ok(count)
    }

    /// Does everything until it is told to stop, and leaves the index flushed.
    pub async fn run(self, stop: CancellationToken) {
        tokio::join!(
            self.follow(&stop),
            self.make_up(&stop),
            self.reap(&stop),
            self.app.publish(&stop)
        );
    }

    /// Follows the outbox.
    async fn follow(&self, stop: &CancellationToken) {
        let mut committed = self.app.committed.subscribe();
        let mut flushed = Instant::now();
        let mut dirty = false;
        loop {
            match self.catch_up().await {
                Ok(changed) => {
                    dirty |= changed;
                    self.report("index", Dependency::Up).await;
                }
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "the index can't follow; trying again");
                    self.report("index", Dependency::Degraded(error.to_string())).await;
                }
            }
            if dirty && flushed.elapsed() > FLUSH {
                dirty = self.try_flush().await.is_err();
                flushed = Instant::now();
            }
            tokio::select! {
                () = stop.cancelled() => break,
                _ = committed.changed() => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
        // What was written until the last call was answered.
        if let Err(error) = self.catch_up().await {
            tracing::warn!(error = %error.chain(), "the index is left behind; it catches up at the next start");
        }
        let _ = self.try_flush().await;
    }

    async fn report(&self, dependency: &'static str, state: Dependency) {
        self.health.report(self.service, dependency, state).await;
    }

    /// Applies what is new in the outbox.
    async fn catch_up(&self) -> Result<bool, Error> {
        let app = &self.app;
        let mut changed = false;
        loop {
            let events = app.store.events(app.index.watermark(), BATCH).await?;
            let Some(last) = events.last() else { break };
            let keys: HashSet<Key> = events.iter().map(|event| event.key).collect();
            let keys: Vec<Key> = keys.into_iter().collect();
            let states = app.store.states(&app.model.identity, &keys).await?;
            let entries: Vec<Entry> = states.iter().filter_map(entry).collect();
            let present: HashSet<Key> = entries.iter().map(|entry| entry.key).collect();
            let gone = keys.into_iter().filter(|key| !present.contains(key)).collect();
            let pending = states.iter().filter(|state| state.code.is_none());
            if let Some(first) = pending.map(|state| state.key.0).min() {
                self.pending.from.fetch_min(first, Ordering::SeqCst);
                self.pending.some.notify_one();
            }
            self.apply(entries, gone, last.sequence).await?;
            changed = true;
            app.indexed.send_replace(app.index.watermark());
        }
        let end = app.store.last_sequence().await?;
        let lag = u64::try_from(end.0 - app.index.watermark().0).unwrap_or(0);
        app.metrics.index_lag.record(lag, &[]);
        Ok(changed)
    }

    /// Embeds memories whose vectors are pending, since the embedding service was away or the model is another one now.
    async fn make_up(&self, stop: &CancellationToken) {
        loop {
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.make_up_some() => outcome,
            };
            let pause = match outcome {
                Ok(true) => continue,
                Ok(false) => {
                    self.report("embedding", Dependency::Up).await;
                    Duration::MAX
                }
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "pending vectors can't be made; trying again");
                    self.report("embedding", Dependency::Degraded(error.to_string())).await;
                    PAUSE
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.pending.some.notified(), if pause == Duration::MAX => {}
                () = tokio::time::sleep(pause), if pause != Duration::MAX => {}
            }
        }
    }

    /// Embeds some of them, and leaves it to the outbox to tell the index; true when there may be more.
    async fn make_up_some(&self) -> Result<bool, Error> {
        let app = &self.app;
        // What is written from here on lowers the mark again.
        let from = self.pending.from.swap(NOTHING, Ordering::SeqCst);
        if from == NOTHING {
            return Ok(false);
        }
        let looked = self.embed_after(Key(from.saturating_sub(1))).await;
        let next = match &looked {
            Ok(next) => *next,
            Err(_) => from,
        };
        self.pending.from.fetch_min(next, Ordering::SeqCst);
        app.committed.send_replace(());
        looked.map(|next| next != NOTHING)
    }

    /// Where to go on.
    async fn embed_after(&self, after: Key) -> Result<i64, Error> {
        let app = &self.app;
        let states = app.store.scan(&app.model.identity, after, PENDING, true).await?;
        let Some(last) = states.last().map(|state| state.key) else {
            return Ok(NOTHING);
        };
        let vectors = self.embed_states(&states).await?;
        let codes: Vec<(Key, i64, Code)> = states
            .iter()
            .zip(&vectors)
            .filter_map(|(state, vector)| Some((state.key, state.version, Code::encode(vector.as_ref()?)?)))
            .collect();
        let stored = app
            .store
            .put_codes(&app.model.identity, &codes, app.clock.now())
            .await?;
        tracing::debug!(memories = stored, "made up vectors that were pending");
        Ok(last.0 + 1)
    }

    /// The vectors of memories' texts; a text that the model refuses has none, and does not keep the others from theirs.
    async fn embed_states(&self, states: &[IndexState]) -> Result<Vec<Option<Vec<f32>>>, Error> {
        let app = &self.app;
        let Some(tenant) = states.first().map(|state| state.tenant.clone()) else {
            return Ok(Vec::new());
        };
        let context = app.background(tenant);
        let texts = states.iter().map(|state| state.text.clone()).collect();
        match app.embed(&context, texts, false).await {
            Ok(vectors) => return Ok(vectors.into_iter().map(Some).collect()),
            Err(error) if error.reason() == Reason::DependencyUnavailable => return Err(error),
            Err(_) => {}
        }
        let mut vectors = Vec::with_capacity(states.len());
        for state in states {
            match app.embed(&context, vec![state.text.clone()], false).await {
                Ok(mut one) => vectors.push(one.pop()),
                Err(error) if error.reason() == Reason::DependencyUnavailable => return Err(error),
                Err(error) => {
                    tracing::warn!(key = state.key.0, error = %error.chain(), "a memory has no vector until the next start");
                    vectors.push(None);
                }
            }
        }
        Ok(vectors)
    }

    /// Deletes what has expired, and removes for good what policies keep no longer; searches and lists have not shown it since.
    async fn reap(&self, stop: &CancellationToken) {
        let mut forgotten = None;
        loop {
            if forgotten.is_none_or(|at: Instant| at.elapsed() > FORGET) {
                match self.app.forget().await {
                    Ok(0) => {}
                    Ok(_) => {
                        self.app.committed.send_replace(());
                    }
                    Err(error) => tracing::warn!(%error, "what was deleted long ago can't be removed; trying again"),
                }
                forgotten = Some(Instant::now());
            }
            match self.app.store.reap(self.app.clock.now(), REAPED).await {
                Ok(REAPED) => continue,
                Ok(0) => {}
                Ok(_) => {
                    self.app.committed.send_replace(());
                }
                Err(error) => tracing::warn!(%error, "what has expired can't be reaped; trying again"),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    async fn apply(&self, upserts: Vec<Entry>, removals: Vec<Key>, watermark: Sequence) -> Result<(), Error> {
        let index = Arc::clone(&self.app.index);
        let applied = tokio::task::spawn_blocking(move || index.apply(&upserts, &removals, watermark)).await;
        applied
            .map_err(Error::internal)?
            .map_err(|error| Error::unavailable("the index can't be written").caused_by(error))
    }

    async fn flush(&self) -> Result<(), Error> {
        let index = Arc::clone(&self.app.index);
        let flushed = tokio::task::spawn_blocking(move || index.flush()).await;
        flushed
            .map_err(Error::internal)?
            .map_err(|error| Error::unavailable("the index can't be flushed").caused_by(error))
    }

    async fn try_flush(&self) -> Result<(), Error> {
        let flushed = self.flush().await;
        flushed.inspect_err(|error| tracing::warn!(error = %error.chain(), "can't flush the index"))
    }
}

fn entry(state: &IndexState) -> Option<Entry> {
    let code = state.code.clone()?;
    Some(Entry {
        key: state.key,
        scope: state.scope,
        code,
    })
}
