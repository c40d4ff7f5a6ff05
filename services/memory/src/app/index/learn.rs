//! Learning a rotation for the index that serves, and handing over to an index that has it.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use aeterna_error::Error;
use aeterna_types::{Scope, TenantId};
use tokio_util::sync::CancellationToken;

use super::{Background, LONGEST, PAUSE, lock, tend};
use crate::app::Serving;
use crate::domain::{Key, ScopeKey, View};
use crate::store::{Sample, StorageError};

/// Vectors from which on a rotation is learned.
const FIRST: usize = 2_000;
/// How many times as many there are when it is learned again.
const GROWN: usize = 8;
/// Vectors that a rotation is learned from and tried with, at most, and numbers of all of them together.
const SAMPLE: usize = 8_192;
const NUMBERS: usize = 6 << 20;

/// Vectors a dimension from which on a tenant may have a rotation of its own: that takes 2 % of them as float32, at most.
const OWN: usize = 25;
/// Tenants that may have one, the largest.
const OWNERS: usize = 16;
/// Memories that are read at once.
const PAGE: usize = 500;

/// What is said when the disk refuses.
fn unchanged(error: StorageError) -> Error {
    Error::unavailable("the files of an index can't be changed").caused_by(error)
}

/// Some memories of an index, of all scopes or of these.
async fn some(serving: &Serving, count: usize, scopes: Option<Vec<ScopeKey>>) -> Result<Vec<Key>, Error> {
    let index = Arc::clone(&serving.index);
    let some = tokio::task::spawn_blocking(move || {
        let scopes = scopes.map(|scopes| scopes.into_iter().collect());
        index.some(count, scopes.as_ref())
    });
    some.await.map_err(Error::internal)
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
        let Some(sample) = self.sample(&serving, stop).await? else {
            return Ok(());
        };
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

    /// Vectors to learn from: some of all, and of the tenants that have many some of their own. Where there is but one, all are its
    /// own. `None`: it is told to stop.
    async fn sample(&self, serving: &Serving, stop: &CancellationToken) -> Result<Option<Sample>, Error> {
        let (app, model) = (&self.app, &serving.model);
        let most = (NUMBERS / model.dimension).clamp(FIRST, SAMPLE);
        let mut seen: HashMap<TenantId, usize> = HashMap::new();
        let mut all = Vec::with_capacity(most);
        for keys in some(serving, most, None).await?.chunks(PAGE) {
            for state in app.store.states(&model.identity, keys).await? {
                let Some(code) = state.code else { continue };
                *seen.entry(state.tenant).or_default() += 1;
                all.push(code.decode());
            }
            if stop.is_cancelled() {
                return Ok(None);
            }
        }
        let (found, count) = (all.len(), serving.index.len());
        let many = |seen: usize| seen < found && seen * count >= OWN * model.dimension * found;
        let mut large: Vec<(TenantId, usize)> = seen.into_iter().filter(|(_, seen)| many(*seen)).collect();
        large.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.as_str().cmp(b.0.as_str())));
        large.truncate(OWNERS);
        let everything = View {
            scope: Scope::default(),
            exact: false,
        };
        let mut own = Vec::with_capacity(large.len());
        for (tenant, _) in large {
            let scopes = app.store.visible(&tenant, &everything, &[]).await?;
            let keys = some(serving, (most / 2).max(FIRST), Some(scopes)).await?;
            let vectors = app.store.vectors(Some(&tenant), &model.identity, &keys).await?;
            own.push((tenant, vectors.into_iter().map(|(_, vector)| vector).collect()));
            if stop.is_cancelled() {
                return Ok(None);
            }
        }
        Ok(Some(Sample { all, own }))
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
