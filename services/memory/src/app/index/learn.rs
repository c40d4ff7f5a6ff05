//! Learning a rotation for the index that serves, and handing over to an index that has it.

use std::collections::HashMap;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use aeterna_error::Error;
use aeterna_types::TenantId;
use rustc_hash::FxHashSet;
use tokio_util::sync::CancellationToken;

use super::{Background, LONGEST, PAUSE, lock, tend};
use crate::app::Serving;
use crate::domain::ScopeKey;
use crate::store::{Sample, StorageError};

/// Vectors from which on a rotation is learned.
const FIRST: usize = 2_000;
/// How many times as many there are when it is learned again.
const GROWN: usize = 8;
/// Vectors that a rotation is learned from and tried with, at most, and numbers of all of them together.
const SAMPLE: usize = 8_192;
const NUMBERS: usize = 6 << 20;

/// Vectors a dimension from which on a tenant has a rotation of its own: that takes 2 % of what they take themselves, at most.
const OWN: usize = 25;

/// What is said when the disk refuses.
fn unchanged(error: StorageError) -> Error {
    Error::unavailable("the files of an index can't be changed").caused_by(error)
}

/// Of which model, and among how many vectors, a rotation was looked for the last time.
type Tried = (String, usize);

impl Background {
    /// Learns a rotation when there are enough vectors, and again when there are many more, while searches go on by the index
    /// before; and removes the files of indexes that serve no longer.
    pub(super) async fn learn(&self, stop: &CancellationToken) {
        let mut tried = Tried::default();
        while !stop.is_cancelled() {
            // To the end: what is begun writes files, which nobody may do once the directory is given up.
            let learned = match self.settle().await {
                Ok(()) => self.learn_some(&mut tried, stop).await,
                Err(error) => Err(error),
            };
            let pause = match learned {
                Ok(()) => PAUSE,
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "a rotation can't be learned; trying again");
                    self.pending.unsettled.store(true, Ordering::SeqCst);
                    LONGEST
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn learn_some(&self, tried: &mut Tried, stop: &CancellationToken) -> Result<(), Error> {
        let app = &self.app;
        let serving = app.serving();
        let (model, count) = (&serving.model, serving.index.len());
        let before = match tried.0 == model.identity {
            true => tried.1.max(serving.index.learned()),
            false => serving.index.learned(),
        };
        if !app.indexes.learns(model) || count < FIRST.max(before * GROWN) || self.ready().is_some() {
            return Ok(());
        }
        let sample = self.sample(&serving).await?;
        let learned = app.indexes.learn(&serving, sample, count, stop).await;
        let Some(index) = learned.map_err(unchanged)? else {
            if !stop.is_cancelled() {
                *tried = (model.identity.clone(), count);
            }
            return Ok(());
        };
        let next = Serving::new(model.clone(), index);
        self.fill(&next, stop).await?;
        if stop.is_cancelled() {
            return Ok(());
        }
        // What was written meanwhile, so that little is left for the moment of taking over.
        self.apply_new(&next, |_| (), stop).await?;
        if stop.is_cancelled() {
            return Ok(());
        }
        *tried = (model.identity.clone(), count);
        *self.ready() = Some(next);
        app.committed.somewhere();
        Ok(())
    }

    /// Vectors to learn from: some of all, and of each tenant that seems to have many some of its own. Where there is but one, all
    /// are its own.
    async fn sample(&self, serving: &Serving) -> Result<Sample, Error> {
        let (app, model, index) = (&self.app, &serving.model, &serving.index);
        let most = (NUMBERS / model.dimension).clamp(FIRST, SAMPLE);
        let states = app.store.states(&model.identity, &index.some(most, None)).await?;
        let mut scopes: HashMap<TenantId, (usize, FxHashSet<ScopeKey>)> = HashMap::new();
        let mut all = Vec::with_capacity(states.len());
        for state in states {
            let Some(code) = state.code else { continue };
            let (seen, scopes) = scopes.entry(state.tenant).or_default();
            *seen += 1;
            scopes.insert(state.scope);
            all.push(code.decode());
        }
        let many = |seen: usize| seen * index.len() >= OWN * model.dimension * all.len();
        scopes.retain(|_, (seen, _)| many(*seen));
        let mut own = Vec::new();
        // Where nobody else is, those of all are its own.
        for (tenant, (_, scopes)) in scopes.into_iter().filter(|(_, (seen, _))| *seen < all.len()) {
            let some = index.some(most, Some(&scopes));
            let vectors = app.store.vectors(Some(&tenant), &model.identity, &some).await?;
            own.push((tenant, vectors.into_iter().map(|(_, vector)| vector).collect()));
        }
        Ok(Sample { all, own })
    }

    fn ready(&self) -> MutexGuard<'_, Option<Serving>> {
        lock(&self.pending.ready)
    }

    /// Answers searches by the index that is ready, if one is. Called by the writer of the index, so that no change is missed.
    pub(super) async fn hand_over(&self, stop: &CancellationToken) -> Result<(), Error> {
        let app = &self.app;
        let Some(next) = self.ready().take() else {
            return Ok(());
        };
        if next.model.identity != app.serving().model.identity {
            return app.indexes.remove(&next.model.identity).await.map_err(unchanged);
        }
        let complete = match self.apply_new(&next, |_| (), stop).await {
            // From here on it is the one that the next start opens.
            Ok(()) => tend(&next).await,
            Err(error) => Err(error),
        };
        if let Err(error) = complete {
            // Of a store that was put back to an earlier time, it would never be complete.
            let undone = match next.index.watermark() {
                Some(watermark) => app.store.has(watermark).await.is_ok_and(|there| !there),
                None => true,
            };
            if undone {
                self.pending.unsettled.store(true, Ordering::SeqCst);
                return Ok(());
            }
            *self.ready() = Some(next);
            return Err(error);
        }
        let (model, learned) = (next.model.name.clone(), next.index.learned());
        app.serve(next);
        app.indexed
            .send_replace(app.serving().index.watermark().unwrap_or_default());
        self.pending.unsettled.store(true, Ordering::SeqCst);
        tracing::info!(model, learned, "searches are answered by another index of the model");
        Ok(())
    }

    /// Removes what other indexes of the model have left.
    async fn settle(&self) -> Result<(), Error> {
        // One that is ready has files, too.
        if self.ready().is_some() || !self.pending.unsettled.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let serving = self.app.serving();
        self.app.indexes.settle(&serving).await.map_err(unchanged)
    }
}
