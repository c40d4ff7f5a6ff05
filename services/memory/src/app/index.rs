//! The background work: keeping the vector index in step with the outbox, making vectors (`vectors`), learning a rotation
//! (`learn`), reaping what has expired, and telling watchers. Each is a task of its own; only the first one writes the index
//! that serves, so changes are applied in order. What copies of the service need not do each, they do in turns (`turns`).

mod learn;
mod turns;
mod vectors;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aeterna_error::Error;
use aeterna_rpc::{Dependency, Health};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{App, Serving};
use crate::domain::{Key, Sequence};
use crate::store::locks::lock;
use crate::store::{Care, Changes, Condition, Entry};
pub use turns::Turns;

/// Changes applied at a time.
const BATCH: usize = 500;
/// Memories reaped at a time.
const REAPED: usize = 500;
/// How long the index may follow what was written last when the process ends; the next start does the rest.
const LAST: Duration = Duration::from_secs(10);
/// How often a task looks when nobody wakes it, and tries again after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause before a model that refuses too much is tried again.
const LONGEST: Duration = Duration::from_secs(60);
/// How often the index is looked after. So long may changes of it wait to survive a loss of power; the outbox still has them.
const FLUSH: Duration = Duration::from_secs(5);
/// How often progress is told.
const TOLD: Duration = Duration::from_secs(10);
/// How often policies are asked about what was deleted.
const FORGET: Duration = Duration::from_secs(10);
/// Under which name the model is remembered that took over last.
const TAKEN_OVER: &str = "taken_over";
/// Nothing is pending.
const NOTHING: i64 = i64::MAX;

/// The background work of an app.
#[derive(Clone)]
pub struct Background {
    app: Arc<App>,
    health: Health,
    service: &'static str,
    /// How long other copies may go on answering by a model that this one has left.
    grace: Duration,
    /// What need not be done by every copy; `None`: there is no live server, or no other copy.
    turns: Option<Arc<Turns>>,
    pending: Arc<Pending>,
}

/// Where pending vectors may be.
struct Pending {
    /// No memory with a smaller number is pending.
    from: AtomicI64,
    /// There is something.
    some: Notify,
    /// Every memory has a vector by the next model.
    switch: AtomicBool,
    /// The index of which model has everything that there was when it was looked at, or can be brought it.
    whole: Mutex<Option<Whole>>,
    /// An index that is to take over from the one of the same model; it has everything up to its watermark.
    ready: Mutex<Option<Serving>>,
    /// Why the index that serves can't follow.
    behind: Mutex<Option<String>>,
    /// When it had everything last.
    followed: Mutex<Instant>,
    /// There may be files of an index that serves no longer.
    unsettled: AtomicBool,
}

/// An index of which it is known how far it is.
struct Whole {
    /// Of which model.
    model: String,
    /// Up to where this copy brings everything itself, whatever others have brought; `None`: it is to be found out.
    alone: Option<Sequence>,
}

impl App {
    /// Removes the vectors and the index of a model that nothing is answered by.
    pub(crate) async fn forget_model(&self, identity: &str) -> Result<(), Error> {
        self.store.forget_model(identity).await?;
        let removed = self.indexes.remove(identity).await;
        removed.map_err(|error| Error::unavailable("an old index can't be removed").caused_by(error))
    }
}

impl Background {
    /// For an app, whose state it reports as that of a service. What a model before has left stays for the `grace` that other
    /// copies have to leave it as well.
    pub fn new(app: Arc<App>, health: Health, service: &'static str, grace: Duration, turns: Option<Turns>) -> Self {
        let pending = Arc::new(Pending {
            from: AtomicI64::new(0),
            some: Notify::new(),
            switch: AtomicBool::new(false),
            whole: Mutex::new(None),
            ready: Mutex::new(None),
            behind: Mutex::new(None),
            followed: Mutex::new(Instant::now()),
            unsettled: AtomicBool::new(true),
        });
        Self {
            app,
            health,
            service,
            grace,
            turns: turns.map(Arc::new),
            pending,
        }
    }

    /// The turns at an index, when the copies share it.
    fn turns_at(&self, serving: &Serving) -> Option<&Turns> {
        self.turns.as_deref().filter(|_| serving.index.is_shared())
    }

    /// Fills an empty index from the stored vectors; no model is called.
    ///
    /// # Errors
    /// When the store or the index fails.
    pub async fn rebuild(&self, serving: &Serving) -> Result<usize, Error> {
        let count = self.fill(serving, &CancellationToken::new()).await?;
        tend(serving).await?;
        Ok(count)
    }

    /// Finds out up to which change an index has everything, and fills one that has nothing.
    async fn complete(&self, serving: &Serving, stop: &CancellationToken) -> Result<(), Error> {
        let model = &serving.model.identity;
        let whole = lock(&self.pending.whole)
            .as_ref()
            .is_some_and(|whole| whole.model == *model);
        if whole && serving.index.watermark().is_some() {
            return Ok(());
        }
        *lock(&self.pending.whole) = None;
        tend(serving).await?;
        let filled = serving.index.filled().map(|(_, at)| at);
        if let Some(turns) = self.turns_at(serving)
            && let Some(brought) = turns.place(model).await
            && !self.app.store.has(brought).await?
        {
            turns.forget(model).await;
        }
        if let Some(known) = serving.index.watermark().max(filled)
            && !self.app.store.has(known).await?
        {
            tracing::warn!(
                "the vector index is ahead of the store, which was put back to an earlier time; it is filled anew"
            );
            let cleared = serving.index.clear().await;
            cleared.map_err(|error| Error::unavailable("the vector index can't be cleared").caused_by(error))?;
            tend(serving).await?;
        }
        if serving.index.watermark().is_none() {
            let count = self.fill(serving, stop).await?;
            tracing::info!(vectors = count, "filled the vector index from the relational store");
        }
        *lock(&self.pending.whole) = Some(Whole {
            model: model.clone(),
            alone: None,
        });
        Ok(())
    }

    /// Up to which change this copy brings everything to an index itself, since others may have brought it when it was not as
    /// it is now, or to fewer replicas; `None` while nobody says how far they are.
    async fn alone(&self, turns: &Turns, serving: &Serving) -> Result<Option<Sequence>, Error> {
        let known = lock(&self.pending.whole).as_ref().and_then(|whole| whole.alone);
        if known.is_some() {
            return Ok(known);
        }
        let Some(place) = turns.place(&serving.model.identity).await else {
            return Ok(None);
        };
        let alone = Some(place.max(self.app.store.last_sequence().await?));
        if let Some(whole) = lock(&self.pending.whole).as_mut() {
            whole.alone = alone;
        }
        Ok(alone)
    }

    /// Puts the stored vectors into an index, until it is told to stop; how many there were. It goes on where it was interrupted.
    async fn fill(&self, serving: &Serving, stop: &CancellationToken) -> Result<usize, Error> {
        let app = &self.app;
        let (mut after, end) = match serving.index.filled() {
            Some((after, end)) => {
                tracing::info!(after = after.0, "going on with filling the vector index");
                // What comes after it is read from the outbox: no node may be asked that does not have it.
                app.store.reach(end).await?;
                (after, end)
            }
            None => (Key(0), app.store.last_sequence().await?),
        };
        let (mut count, mut told) = (0, Instant::now());
        while !stop.is_cancelled() {
            let states = app.store.scan(&serving.model.identity, after, 2000, false).await?;
            let Some(last) = states.last() else { break };
            let (from, upto) = (after, last.key);
            after = upto;
            let upserts: Vec<Entry> = states.iter().map(Entry::from).collect();
            count += upserts.iter().filter(|entry| entry.code.is_some()).count();
            let changes = Changes {
                upserts,
                removals: Vec::new(),
                at: end,
            };
            serving.apply(changes).await?;
            let noted = serving.index.fill_to(from, upto, end).await;
            noted.map_err(|error| Error::unavailable("the vector index can't be written").caused_by(error))?;
            if told.elapsed() > TOLD {
                tracing::info!(vectors = count, "filling the vector index");
                told = Instant::now();
            }
        }
        if !stop.is_cancelled() {
            serving.index.fill_all(after, end);
        }
        Ok(count)
    }

    /// Does everything until it is told to stop, and leaves the index flushed.
    pub async fn run(self, stop: CancellationToken) {
        tokio::join!(
            self.follow(&stop),
            self.look_after(&stop),
            self.make_up(&stop),
            self.embed_anew(&stop),
            self.learn(&stop),
            self.reap(&stop),
            self.look_at_store(&stop),
            self.app.publish(&stop)
        );
    }

    /// Says how the store is.
    async fn look_at_store(&self, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            let state = match self.app.store.condition() {
                Condition::Well => Dependency::Up,
                Condition::Weak(what) => Dependency::Degraded(what),
                Condition::Away(what) => Dependency::Down(what),
            };
            for service in crate::SERVICES {
                self.health.report(service, "store", state.clone()).await;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// Follows the outbox.
    async fn follow(&self, stop: &CancellationToken) {
        let app = &self.app;
        let mut committed = app.committed.subscribe();
        loop {
            if self.pending.switch.load(Ordering::SeqCst)
                && let Err(error) = self.switch(stop).await
            {
                tracing::warn!(error = %error.chain(), "the new model can't serve yet; trying again");
            }
            if let Err(error) = self.hand_over(stop).await {
                tracing::warn!(error = %error.chain(), "another index can't take over yet; trying again");
            }
            let serving = app.serving();
            let followed = match self.complete(&serving, stop).await {
                // What is left of it when the process should end has a time of its own below.
                Ok(()) => self.catch_up(&serving, stop).await,
                Err(error) => Err(error),
            };
            let failed = followed.is_err();
            if !failed {
                *lock(&self.pending.followed) = Instant::now();
            }
            // It is said once, and readiness goes on saying it.
            if app.index_away.swap(failed, Ordering::SeqCst) != failed {
                match &followed {
                    Err(error) => tracing::warn!(error = %error.chain(), "the index can't follow; trying again"),
                    Ok(()) if stop.is_cancelled() => {}
                    Ok(()) => tracing::info!("the index follows again"),
                }
            }
            *lock(&self.pending.behind) = followed.err().map(|error| error.to_string());
            tokio::select! {
                () = stop.cancelled() => break,
                _ = committed.changed(), if !failed => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
        // What was written until the last call was answered.
        let serving = app.serving();
        let late = CancellationToken::new();
        let mut left = tokio::select! {
            biased;
            left = self.catch_up(&serving, &late) => left,
            // To the end of what is under way: nothing is written once the directory is given up.
            () = async {
                tokio::time::sleep(LAST).await;
                late.cancel();
                std::future::pending::<()>().await;
            } => Ok(()),
        };
        if left.is_ok() && late.is_cancelled() {
            left = Err(Error::unavailable("there is much left to bring to the index"));
        }
        if left.is_ok() {
            left = tend(&serving).await.map(drop);
        }
        if let Err(error) = left {
            tracing::warn!(error = %error.chain(), "the index is left behind; it catches up at the next start");
        }
    }

    /// Looks after the index that serves, says how it is, and applies once more what a part of it may have missed.
    async fn look_after(&self, stop: &CancellationToken) {
        let (mut tended, mut condition, mut differs) = (None::<Instant>, Condition::Well, None);
        while !stop.is_cancelled() {
            if tended.is_none_or(|at| at.elapsed() > FLUSH) {
                let serving = self.app.serving();
                let cared = match tend(&serving).await {
                    Ok(care) => {
                        (condition, differs) = (care.condition, care.differs);
                        self.repair(&serving, care.again, stop).await
                    }
                    Err(error) => Err(error),
                };
                if let Err(error) = cared {
                    tracing::debug!(error = %error.chain(), "the index can't be looked after; trying again");
                    condition = Condition::Weak(error.to_string());
                }
                tended = Some(Instant::now());
            }
            let behind = lock(&self.pending.behind).clone();
            let state = match behind.as_deref().or(condition.trouble()).or(differs.as_deref()) {
                Some(what) => Dependency::Degraded(what.to_owned()),
                None => Dependency::Up,
            };
            self.report("index", state).await;
            // It is looked at once a pause at least.
            let lag = lock(&self.pending.followed).elapsed();
            let lag = if lag > 2 * PAUSE { lag.as_secs_f64() } else { 0.0 };
            self.app.metrics.index_lag.record(lag, &[]);
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// Applies the changes after one once more, up to where the index is.
    async fn repair(&self, serving: &Serving, again: Option<Sequence>, stop: &CancellationToken) -> Result<(), Error> {
        let (Some(mut after), Some(upto)) = (again, serving.index.watermark()) else {
            return Ok(());
        };
        tracing::info!(
            from = after.0,
            upto = upto.0,
            "applying to the index once more what a part of it may have missed"
        );
        while after < upto && !stop.is_cancelled() {
            match self.apply_after(serving, after).await? {
                Some(last) => after = last,
                None => break,
            }
        }
        if !stop.is_cancelled() {
            serving.index.repaired(upto);
            tracing::info!(upto = upto.0, "the index has everything again");
        }
        Ok(())
    }

    async fn report(&self, dependency: &'static str, state: Dependency) {
        self.health.report(self.service, dependency, state).await;
    }

    /// Applies what is new in the outbox to the index that serves.
    async fn catch_up(&self, serving: &Serving, stop: &CancellationToken) -> Result<(), Error> {
        let app = &self.app;
        let indexed = |watermark| {
            app.indexed.send_replace(watermark);
        };
        if let Some(watermark) = serving.index.watermark() {
            if !app.store.has(watermark).await? {
                // The store was put back to an earlier time, or a node took over that lacked it: `complete` finds out the rest.
                *lock(&self.pending.whole) = None;
                return Ok(());
            }
            indexed(watermark);
        }
        if let Some(turns) = self.turns_at(serving)
            && let Some(alone) = self.alone(turns, serving).await?
            && serving.index.watermark() >= Some(alone)
        {
            // What is brought to a shared index twice, or half, is whole again with the next time.
            return tokio::select! {
                followed = turns.follow(serving, |after| self.news(serving, after), indexed) => followed,
                () = stop.cancelled() => Ok(()),
            };
        }
        self.apply_new(serving, indexed, stop).await
    }

    /// Applies what is new in the outbox to an index, until it is told to stop, and tells how far it is.
    async fn apply_new(
        &self,
        serving: &Serving,
        applied: impl Fn(Sequence),
        stop: &CancellationToken,
    ) -> Result<(), Error> {
        while !stop.is_cancelled() {
            // One that must be filled first is not complete by what comes last.
            let Some(watermark) = serving.index.watermark() else {
                return Ok(());
            };
            let Some(last) = self.apply_after(serving, watermark).await? else {
                return Ok(());
            };
            serving.index.advance(last);
            applied(last);
        }
        Ok(())
    }

    /// Applies the next changes after one to an index; the last of them, `None` when there is none.
    async fn apply_after(&self, serving: &Serving, after: Sequence) -> Result<Option<Sequence>, Error> {
        let Some(news) = self.news(serving, after).await? else {
            return Ok(None);
        };
        let last = news.at;
        serving.apply(news).await?;
        Ok(Some(last))
    }

    /// The next changes after one, `None` when there is none. What has no vector yet is made up.
    async fn news(&self, serving: &Serving, after: Sequence) -> Result<Option<Changes>, Error> {
        let app = &self.app;
        let events = app.store.events(after, BATCH).await?;
        let Some(last) = events.last() else { return Ok(None) };
        // Asked afterwards: a node that took over meanwhile may lack what the index stands at, and have gone on since.
        if !app.store.has(after).await? {
            *lock(&self.pending.whole) = None;
            return Err(Error::unavailable("the store was put back to an earlier time"));
        }
        let keys: HashSet<Key> = events.iter().map(|event| event.key).collect();
        let keys: Vec<Key> = keys.into_iter().collect();
        let states = app.store.states(&serving.model.identity, &keys).await?;
        let pending = states.iter().filter(|state| state.code.is_none());
        if let Some(first) = pending.map(|state| state.key.0).min() {
            self.pending.from.fetch_min(first, Ordering::SeqCst);
            self.pending.some.notify_one();
        }
        let upserts: Vec<Entry> = states.iter().map(Entry::from).collect();
        let present: HashSet<Key> = upserts.iter().map(|entry| entry.key).collect();
        let removals = keys.into_iter().filter(|key| !present.contains(key)).collect();
        Ok(Some(Changes {
            upserts,
            removals,
            at: last.sequence,
        }))
    }

    /// Answers searches by the next model from now on. Called by the writer of the index, so that no change is missed.
    async fn switch(&self, stop: &CancellationToken) -> Result<(), Error> {
        let app = &self.app;
        let next = app.wanted.clone();
        let opened = app.indexes.open(&next, app.store.last_sequence().await?).await;
        let (index, fresh) =
            opened.map_err(|error| Error::unavailable("the next index can't be opened").caused_by(error))?;
        let serving = Serving::new(next, index);
        if fresh.is_some() {
            self.fill(&serving, stop).await?;
        }
        // What is not whole yet is made whole at the next start, and taken over then.
        if stop.is_cancelled() {
            return Ok(());
        }
        self.complete(&serving, stop).await?;
        self.apply_new(&serving, |_| (), stop).await?;
        if stop.is_cancelled() {
            return Ok(());
        }
        app.store.put_note(TAKEN_OVER, &serving.model.identity).await?;
        tracing::info!(model = serving.model.name, "searches are answered by the new model");
        app.serve(serving);
        self.pending.switch.store(false, Ordering::SeqCst);
        // What was written meanwhile has a vector by the model before only.
        self.pending.from.store(0, Ordering::SeqCst);
        self.pending.some.notify_one();
        Ok(())
    }

    /// Deletes what has expired, and removes for good what policies keep no longer; searches and lists have not shown it since.
    async fn reap(&self, stop: &CancellationToken) {
        let mut forgotten = None;
        loop {
            if forgotten.is_none_or(|at: Instant| at.elapsed() > FORGET) {
                match self.app.forget(stop).await {
                    Ok(0) => {}
                    Ok(_) => {
                        self.app.committed.here();
                    }
                    Err(error) => tracing::warn!(%error, "what was deleted long ago can't be removed; trying again"),
                }
                forgotten = Some(Instant::now());
            }
            match self.app.store.reap(self.app.clock.now(), REAPED).await {
                Ok(REAPED) if !stop.is_cancelled() => continue,
                Ok(0) => {}
                Ok(_) => {
                    self.app.committed.here();
                }
                Err(error) => tracing::warn!(%error, "what has expired can't be reaped; trying again"),
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }
}

async fn tend(serving: &Serving) -> Result<Care, Error> {
    let tended = serving.index.tend().await;
    tended.map_err(|error| Error::unavailable("the vector index can't be looked after").caused_by(error))
}
