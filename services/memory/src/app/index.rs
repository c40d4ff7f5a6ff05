//! Keeping the vector index in step with the outbox, and making up vectors that are pending.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aeterna_error::Error;
use tokio_util::sync::CancellationToken;

use super::App;
use crate::domain::{Key, Sequence};
use crate::store::code::Code;
use crate::store::{Entry, IndexState};

/// Changes applied at a time.
const BATCH: usize = 500;
/// Texts embedded at a time in the background.
const PENDING: usize = 64;

/// The task that follows the outbox. It alone writes the index, so changes are applied in order.
pub struct Indexer {
    app: Arc<App>,
    /// Where to look for pending vectors next.
    sweep: Key,
}

impl Indexer {
    /// For an app.
    pub fn new(app: Arc<App>) -> Self {
        Self { app, sweep: Key(0) }
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

    /// Follows the outbox until it is told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut flushed = Instant::now();
        let mut dirty = false;
        loop {
            match self.catch_up().await {
                Ok(changed) => dirty |= changed,
                Err(error) => tracing::warn!(%error, "the index can't follow; trying again"),
            }
            match self.make_up().await {
                Ok(true) => {
                    dirty = true;
                    continue;
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "pending vectors can't be made; trying again"),
            }
            if dirty && flushed.elapsed() > Duration::from_secs(5) {
                dirty = self
                    .flush()
                    .await
                    .inspect_err(|error| tracing::warn!(%error, "can't flush the index"))
                    .is_err();
                flushed = Instant::now();
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.app.written.notified() => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
        if let Err(error) = self.flush().await {
            tracing::warn!(%error, "can't flush the index");
        }
    }

    /// Applies what is new in the outbox.
    async fn catch_up(&mut self) -> Result<bool, Error> {
        let app = Arc::clone(&self.app);
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
            if let Some(pending) = states
                .iter()
                .filter(|state| state.code.is_none())
                .map(|state| state.key)
                .min()
            {
                self.sweep = self.sweep.min(Key(pending.0 - 1));
            }
            self.apply(entries, gone, last.sequence).await?;
            changed = true;
        }
        app.indexed.send_replace(app.index.watermark());
        let end = app.store.last_sequence().await?;
        app.metrics
            .index_lag
            .record(u64::try_from(end.0 - app.index.watermark().0).unwrap_or(0), &[]);
        Ok(changed)
    }

    /// Embeds some memories whose vectors are pending; true when there may be more.
    async fn make_up(&mut self) -> Result<bool, Error> {
        let app = Arc::clone(&self.app);
        let states = app.store.scan(&app.model.identity, self.sweep, PENDING, true).await?;
        let Some(last) = states.last().map(|state| state.key) else {
            return Ok(false);
        };
        let Some(tenant) = states.first().map(|state| state.tenant.clone()) else {
            return Ok(false);
        };
        let texts = states.iter().map(|state| state.text.clone()).collect();
        let vectors = app.embed(&App::background(tenant), texts, false).await?;
        let codes: Vec<(IndexState, Code)> = states
            .into_iter()
            .zip(&vectors)
            .filter_map(|(state, vector)| Code::encode(vector).map(|code| (state, code)))
            .collect();
        let stored: Vec<(Key, Code)> = codes.iter().map(|(state, code)| (state.key, code.clone())).collect();
        app.store.put_codes(&app.model.identity, &stored).await?;
        let entries = codes.into_iter().map(|(state, code)| Entry {
            key: state.key,
            scope: state.scope,
            code,
        });
        self.apply(entries.collect(), Vec::new(), Sequence::default()).await?;
        tracing::info!(memories = stored.len(), "made up vectors that were pending");
        self.sweep = last;
        Ok(true)
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
}

fn entry(state: &IndexState) -> Option<Entry> {
    let code = state.code.clone()?;
    Some(Entry {
        key: state.key,
        scope: state.scope,
        code,
    })
}
