//! The vector index in a Qdrant cluster, one collection a model.
//!
//! Any copy of the service writes it, what the outbox tells, and points carry the change that they were written with, so it does
//! not matter who comes first (`requests`). With two replicas a change counts once one of them has it: a node that is
//! away stops nobody. Up to which change everything is in is remembered only while every replica is well, and when one was not,
//! all changes since then are applied once more after it is back (`VectorIndex::tend`).

mod nodes;
mod options;
mod requests;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aeterna_rpc::Breaker;
use async_trait::async_trait;
use qdrant_client::qdrant::{
    CollectionConfig, Distance, Modifier, QueryPoints, ReplicaState, RetrievedPoint, ScoredPoint, Value, vectors_config,
};
use qdrant_client::{Qdrant, QdrantError};
use uuid::Uuid;

use super::{Among, Care, Changes, Condition, Entry, StorageError, VectorIndex, plain_name};
use crate::domain::{Key, Sequence};
use crate::store::code::Code;
use nodes::{Failed, Nodes};
pub use options::QdrantOptions;

/// How long a search may take: with the wait for the index to follow, under two seconds when a node does not answer.
const SEARCH: Duration = Duration::from_secs(1);
/// How long a write, or a question about the collection, may take.
const WRITE: Duration = Duration::from_secs(10);
/// How long making a collection may take.
const CREATE: Duration = Duration::from_secs(60);
/// Points in one request.
const POINTS: usize = 500;
/// The oldest server that has what is used here: upserts with a filter.
const OLDEST: (u32, u32) = (1, 16);
/// How long a point is remembered that lost its vector: longer than any writer may be delayed.
const BURIED: Duration = Duration::from_secs(3600);
/// How often such points are looked for.
const BURY: Duration = Duration::from_secs(60);
/// Vectors that are counted whenever the index is looked after.
const FEW: usize = 100_000;
/// How often more of them are counted.
const COUNTED: Duration = Duration::from_secs(60);

/// The collections of one relational store in a cluster.
#[derive(Debug)]
pub struct Cluster {
    nodes: Nodes,
    /// In front of all of them, for searches.
    breaker: Breaker,
    options: QdrantOptions,
    /// The relational store that they follow.
    store: String,
}

impl Cluster {
    /// Nothing is connected before it is used.
    ///
    /// # Errors
    /// What is wrong with an endpoint.
    pub fn new(options: QdrantOptions, store: String) -> Result<Self, StorageError> {
        Ok(Self {
            nodes: Nodes::new(&options)?,
            breaker: Breaker::default(),
            options,
            store,
        })
    }

    /// What the collection of a model's vectors is called.
    fn name(&self, identity: &str) -> String {
        let store: String = self
            .store
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .take(12)
            .collect();
        let model: String = plain_name(identity).chars().take(120).collect();
        // What was cut or replaced must not make two models one.
        let digest = &blake3::hash(identity.as_bytes()).to_hex()[..8];
        format!("{}-{store}-{model}-{digest}", self.options.prefix)
    }

    /// The index of a model, whose first pass compares so many dimensions; nothing is asked yet.
    pub fn index(self: &Arc<Self>, identity: &str, prefix: usize) -> QdrantIndex {
        QdrantIndex {
            name: self.name(identity),
            cluster: Arc::clone(self),
            prefix,
            state: Mutex::new(State::default()),
            count: AtomicU64::new(0),
        }
    }

    /// Removes the index of a model.
    ///
    /// # Errors
    /// When the cluster is away.
    pub async fn remove(&self, identity: &str) -> Result<(), StorageError> {
        self.delete(&self.name(identity)).await
    }

    async fn delete(&self, name: &str) -> Result<(), StorageError> {
        let removed = self.nodes.call(CREATE, async |node| node.delete_collection(name).await);
        match removed.await {
            Ok(_) | Err(Failed::Missing) => Ok(()),
            Err(failed) => Err(failed.into()),
        }
    }
}

/// The index of one model.
#[derive(Debug)]
pub struct QdrantIndex {
    cluster: Arc<Cluster>,
    name: String,
    /// Dimensions of its vectors.
    prefix: usize,
    state: Mutex<State>,
    /// Vectors, as counted last.
    count: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// The collection is there and as it should be.
    ready: bool,
    /// Everything up to this change is in.
    watermark: Option<Sequence>,
    /// Names the making of the collection.
    made: Option<String>,
    /// How it is not as the settings say.
    differs: Vec<String>,
    /// How far it is filled, while that is all.
    filled: Option<(Key, Sequence)>,
    /// The same as the watermark at a time when every replica was well; changes after it are applied once more when `missed`.
    safe: Sequence,
    /// What the collection remembers.
    marked: Sequence,
    /// A replica was not well since `safe`.
    missed: bool,
    /// When points without a vector were looked for.
    buried: Option<Instant>,
    /// When vectors were counted.
    counted: Option<Instant>,
}

impl QdrantIndex {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The collection is not there any more: it is made anew, and filled.
    fn failed(&self, failed: Failed) -> StorageError {
        if matches!(failed, Failed::Missing) {
            let mut state = self.state();
            if std::mem::take(&mut *state).ready {
                tracing::warn!(collection = self.name, "the collection is gone; it is made anew");
            }
        }
        failed.into()
    }

    /// Asks for something of the collection.
    async fn ask<T, F>(&self, patience: Duration, work: impl Fn(Qdrant) -> F) -> Result<T, StorageError>
    where
        F: Future<Output = Result<T, QdrantError>>,
    {
        let asked = self.cluster.nodes.call(patience, work).await;
        asked.map_err(|failed| self.failed(failed))
    }

    /// Makes the collection when it is not there, looks whether it is as the settings say, and finds out how far it is.
    async fn prepare(&self) -> Result<(), StorageError> {
        if self.state().ready {
            return Ok(());
        }
        let Cluster { nodes, options, .. } = &*self.cluster;
        let name = self.name.as_str();
        let mut differs = Vec::new();
        match nodes.call(WRITE, async |node| node.collection_info(name).await).await {
            Ok(info) => {
                let config = info.result.and_then(|info| info.config);
                differs = self.compare(config.unwrap_or_default())?;
                if !differs.is_empty() {
                    let differs = differs.join(", ");
                    tracing::warn!(
                        collection = name,
                        differs,
                        "the collection is not as `memory.index` says, and stays so; delete it, and it is made and filled anew"
                    );
                }
            }
            Err(Failed::Missing) => {
                let collection = requests::collection(name, self.prefix, options);
                let created = nodes.call(CREATE, async |node| node.create_collection(collection.clone()).await);
                match created.await {
                    Ok(_) => tracing::info!(collection = name, "made a collection"),
                    Err(Failed::Exists) => {}
                    // Another copy was faster, says a server that calls it an invalid argument; or it is refused, and missing.
                    Err(failed) => {
                        let there = nodes.call(WRITE, async |node| node.collection_exists(name).await);
                        if !there.await.unwrap_or(false) {
                            return Err(failed.into());
                        }
                    }
                }
            }
            Err(failed) => return Err(failed.into()),
        }
        let (marked, before) = self.marked().await?;
        let hasty = requests::hasty(name);
        self.ask(WRITE, async |node| node.update_collection(hasty.clone()).await)
            .await?;
        for field in requests::fields(name) {
            self.ask(CREATE, async |node| node.create_field_index(field.clone()).await)
                .await?;
        }
        let watermark = requests::watermark(&marked);
        let mut state = self.state();
        // Somebody else who did the same may have gone on already.
        if state.ready {
            return Ok(());
        }
        *state = State {
            ready: true,
            watermark,
            filled: requests::filled(&marked),
            made: requests::made(&marked),
            differs,
            safe: before.or(watermark).unwrap_or_default(),
            marked: watermark.unwrap_or_default(),
            missed: before.is_some(),
            ..State::default()
        };
        Ok(())
    }

    /// What the collection says of itself; one that is new begins to, and one whose texts were analysed by another version
    /// begins anew: it may lack changes since the place that is told beside.
    async fn marked(&self) -> Result<(HashMap<String, Value>, Option<Sequence>), StorageError> {
        let gone = || StorageError::Unavailable("a Qdrant node has not heard of the collection's mark".into());
        let made = Uuid::now_v7().to_string();
        let Some(marked) = self.mark().await? else {
            let begin = requests::begin(&self.name, &made);
            self.ask(WRITE, async |node| node.upsert_points(begin.clone()).await)
                .await?;
            return Ok((self.mark().await?.ok_or_else(gone)?, None));
        };
        if requests::is_analysed(&marked) {
            return Ok((marked, None));
        }
        tracing::info!(
            collection = self.name,
            "texts are analysed in another way than before: the collection is filled anew"
        );
        let begin = requests::begin_again(&self.name, requests::made(&marked).as_deref(), &made);
        self.ask(WRITE, async |node| node.overwrite_payload(begin.clone()).await)
            .await?;
        let anew = self.mark().await?.filter(requests::is_analysed);
        Ok((anew.ok_or_else(gone)?, requests::watermark(&marked)))
    }

    async fn mark(&self) -> Result<Option<HashMap<String, Value>>, StorageError> {
        let request = requests::marked(&self.name);
        let marked = self.ask(WRITE, async |node| node.get_points(request.clone()).await);
        Ok(marked.await?.result.into_iter().next().map(|point| point.payload))
    }

    /// Looks whether the collection is the one that was there before, and how far others have come in filling it.
    async fn recognize(&self) -> Result<(), StorageError> {
        // A replica that lags may have none.
        let Some(mark) = self.mark().await? else { return Ok(()) };
        let mut state = self.state();
        if state.made != requests::made(&mark) {
            tracing::warn!(collection = self.name, "the collection was made anew by another copy");
            *state = State::default();
        } else if !requests::is_analysed(&mark) {
            tracing::warn!(
                collection = self.name,
                "an older version of the program has written the collection's mark"
            );
            *state = State::default();
        } else if state.watermark.is_none() {
            state.filled = state.filled.max(requests::filled(&mark));
            if let Some(watermark) = requests::watermark(&mark) {
                state.watermark = Some(watermark);
                (state.safe, state.marked) = (watermark, watermark);
            }
        }
        Ok(())
    }

    /// How a collection differs from the settings.
    ///
    /// # Errors
    /// When it can't be used as it is.
    fn compare(&self, config: CollectionConfig) -> Result<Vec<String>, StorageError> {
        let (name, options) = (&self.name, &self.cluster.options);
        let useless = |why: String| {
            let message = format!("the collection `{name}` {why}; delete it, and it is made and filled anew");
            StorageError::Broken(message.into())
        };
        let params = config.params.unwrap_or_default();
        let dense = match params.vectors_config.and_then(|vectors| vectors.config) {
            Some(vectors_config::Config::ParamsMap(mut named)) => named.map.remove(requests::DENSE),
            _ => None,
        };
        let dense = dense.unwrap_or_default();
        if dense.size != self.prefix as u64 {
            let (size, prefix) = (dense.size, self.prefix);
            return Err(useless(format!("has vectors of {size} dimensions and not {prefix}")));
        }
        if dense.distance() != Distance::Cosine {
            let distance = dense.distance().as_str_name();
            return Err(useless(format!("compares vectors by {distance} and not by Cosine")));
        }
        let mut texts = params.sparse_vectors_config.unwrap_or_default();
        let Some(texts) = texts.map.remove(requests::LEXICAL) else {
            return Err(useless("keeps no texts".into()));
        };
        let mut differs = Vec::new();
        if texts.modifier() != Modifier::Idf {
            differs.push("words are not weighed by how rare they are (the modifier `idf`)".to_owned());
        }
        if dense.quantization_config.is_none() {
            differs.push("vectors are not quantized".to_owned());
        }
        if dense
            .hnsw_config
            .and_then(|graph| graph.payload_m)
            .is_none_or(|m| m == 0)
        {
            differs.push("tenants have no graphs of their own (`payload_m`)".to_owned());
        }
        for (what, found, wanted) in [
            ("shards", Some(params.shard_number), options.shards),
            ("replicas", params.replication_factor, options.replicas),
            ("consistency", params.write_consistency_factor, options.consistency),
        ] {
            let found = found.unwrap_or(1);
            if found != wanted {
                differs.push(format!("`{what}` is {found} and not {wanted}"));
            }
        }
        Ok(differs)
    }

    /// What is wrong with the replicas.
    async fn unwell(&self) -> Result<Option<String>, StorageError> {
        let name = self.name.as_str();
        let info = self.ask(WRITE, async |node| node.collection_cluster_info(name).await);
        let info = info.await?;
        let local = info.local_shards.iter().map(|shard| shard.state);
        let remote = info.remote_shards.iter().map(|shard| shard.state);
        let states: Vec<i32> = local.chain(remote).collect();
        let unwell = states
            .iter()
            .filter(|state| **state != ReplicaState::Active as i32)
            .count();
        if unwell > 0 || !info.shard_transfers.is_empty() {
            let all = states.len();
            return Ok(Some(format!(
                "{unwell} of {all} replicas of the vector index are not well"
            )));
        }
        Ok(None)
    }

    /// What a query finds, best first.
    async fn found(&self, request: Option<QueryPoints>) -> Result<Vec<(Key, f32)>, StorageError> {
        let Some(request) = request else { return Ok(Vec::new()) };
        let request = requests::read(request, self.cluster.options.read);
        if !self.cluster.breaker.admits() {
            let message = "no Qdrant node answered of late, and they are left alone for a moment";
            return Err(StorageError::Unavailable(message.into()));
        }
        let Cluster { nodes, breaker, .. } = &*self.cluster;
        let found = nodes.call(SEARCH, async |node| node.query(request.clone()).await);
        let found = found.await;
        // A refusal is an answer, and so is that there is no such collection.
        breaker.tell(!matches!(found, Err(Failed::Away(_))));
        let found = found.map_err(|failed| self.failed(failed))?.result;
        let key = |point: &ScoredPoint| requests::key(point.id.as_ref());
        Ok(found
            .iter()
            .filter_map(|point| Some((key(point)?, point.score)))
            .collect())
    }

    /// The points of memories.
    async fn points(&self, keys: &[Key]) -> Result<HashMap<Key, RetrievedPoint>, StorageError> {
        let mut points = HashMap::new();
        for part in keys.chunks(POINTS) {
            let request = requests::points(&self.name, part);
            let held = self.ask(WRITE, async |node| node.get_points(request.clone()).await);
            let held = held.await?.result;
            points.extend(
                held.into_iter()
                    .filter_map(|point| Some((requests::key(point.id.as_ref())?, point))),
            );
        }
        Ok(points)
    }

    /// Remembers how far the index was, in this making of the collection, when all of it is well.
    async fn remember(
        &self,
        watermark: Option<Sequence>,
        made: Option<String>,
        well: bool,
    ) -> Result<Option<Sequence>, StorageError> {
        let (again, mark) = {
            let mut state = self.state();
            if state.made != made {
                return Ok(None);
            }
            state.missed |= !well && state.watermark.is_some();
            if let Some(watermark) = watermark.filter(|_| !state.missed) {
                state.safe = state.safe.max(watermark);
            }
            let again = (state.missed && well).then_some(state.safe);
            let whole = state.watermark.is_some();
            (again, Some(state.safe).filter(|safe| whole && *safe > state.marked))
        };
        if let Some(mark) = mark {
            let request = requests::mark(&self.name, made.as_deref(), mark);
            self.ask(WRITE, async |node| node.overwrite_payload(request.clone()).await)
                .await?;
            let mut state = self.state();
            if state.made == made {
                state.marked = mark;
            }
        }
        Ok(again)
    }

    /// Counts the vectors, and forgets what lost its vector long ago.
    async fn tidy(&self) -> Result<(), StorageError> {
        let name = self.name.as_str();
        // Every node reads all of its points for it, which only takes long where there are many.
        let seldom = self.len() > FEW && self.state().counted.is_some_and(|at| at.elapsed() < COUNTED);
        if !seldom {
            let counted = self.ask(WRITE, async |node| node.count(requests::count(name)).await);
            let counted = counted.await?;
            self.count
                .store(counted.result.map_or(0, |result| result.count), Ordering::Relaxed);
            self.state().counted = Some(Instant::now());
        }
        if self.state().buried.is_some_and(|at| at.elapsed() < BURY) {
            return Ok(());
        }
        let before = now() - BURIED.as_secs() as i64;
        self.ask(WRITE, async |node| {
            node.delete_points(requests::bury(name, before)).await
        })
        .await?;
        self.state().buried = Some(Instant::now());
        Ok(())
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// The version in `1.18.3`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[async_trait]
impl VectorIndex for QdrantIndex {
    async fn apply(&self, changes: Changes) -> Result<(), StorageError> {
        self.prepare().await?;
        let Changes { upserts, removals, at } = changes;
        let now = now();
        let upserts = upserts.chunks(POINTS);
        let upserts = upserts.map(|part| requests::upsert(&self.name, self.prefix, part, at));
        let removals = removals.chunks(POINTS);
        let removals = removals.map(|part| requests::remove(&self.name, part, at, now));
        for request in upserts.chain(removals) {
            self.ask(WRITE, async |node| node.upsert_points(request.clone()).await)
                .await?;
        }
        Ok(())
    }

    fn advance(&self, watermark: Sequence) {
        let mut state = self.state();
        // What was applied to a collection that is gone counts no longer.
        if state.watermark.is_some() {
            state.watermark = state.watermark.max(Some(watermark));
        }
    }

    fn watermark(&self) -> Option<Sequence> {
        self.state().watermark
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn filled(&self) -> Option<(Key, Sequence)> {
        self.state().filled
    }

    async fn fill_to(&self, from: Key, upto: Key, at: Sequence) -> Result<(), StorageError> {
        // What was filled of a collection that is gone counts no longer.
        let gone = || StorageError::Unavailable("the collection was made anew; it is filled from the beginning".into());
        let goes_on = |state: &State| state.ready && state.filled.map_or(Key(0), |(filled, _)| filled) == from;
        let made = {
            let state = self.state();
            if !goes_on(&state) {
                return Err(gone());
            }
            state.made.clone()
        };
        let request = requests::fill_to(&self.name, made.as_deref(), upto, at);
        self.ask(WRITE, async |node| node.overwrite_payload(request.clone()).await)
            .await?;
        let mut state = self.state();
        if state.made != made || !goes_on(&state) {
            return Err(gone());
        }
        state.filled = Some((upto, at));
        Ok(())
    }

    fn fill_all(&self, last: Key, at: Sequence) {
        let mut state = self.state();
        if state.ready && state.filled.map_or(Key(0), |(filled, _)| filled) == last {
            state.watermark = state.watermark.max(Some(at));
        }
    }

    fn keeps_texts(&self) -> bool {
        true
    }

    async fn lexical(&self, terms: Vec<String>, among: Arc<Among>, limit: usize) -> Result<Vec<Key>, StorageError> {
        let request = requests::lexical(&self.name, &terms, &among, limit);
        Ok(self.found(request).await?.into_iter().map(|(key, _)| key).collect())
    }

    async fn search(&self, query: Code, among: Arc<Among>, limit: usize) -> Result<Vec<(Key, f32)>, StorageError> {
        self.found(requests::nearest(&self.name, self.prefix, &query, &among, limit))
            .await
    }

    fn len(&self) -> usize {
        usize::try_from(self.count.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    /// Not known here.
    fn bytes(&self) -> u64 {
        0
    }

    async fn tend(&self) -> Result<Care, StorageError> {
        let (versions, away) = self.cluster.nodes.look().await;
        if versions.is_empty() {
            return Err(StorageError::Unavailable("no Qdrant node answers".into()));
        }
        if let Some(old) = versions
            .iter()
            .find(|found| version(found).is_some_and(|found| found < OLDEST))
        {
            let message = format!("Qdrant {old} is too old; {}.{} or later is needed", OLDEST.0, OLDEST.1);
            return Err(StorageError::Broken(message.into()));
        }
        self.prepare().await?;
        self.recognize().await?;
        self.prepare().await?;
        // What is applied after this moment may be missing where the replicas were looked at before.
        let (watermark, made) = {
            let state = self.state();
            (state.watermark, state.made.clone())
        };
        let mut unwell = self.unwell().await?;
        if !away.is_empty() {
            let all = versions.len() + away.len();
            unwell = Some(format!("{} of {all} Qdrant nodes answer", versions.len()));
        }
        if unwell.is_none() {
            self.cluster.nodes.trust();
        }
        let again = self.remember(watermark, made, unwell.is_none()).await?;
        self.tidy().await?;
        let differs = self.state().differs.join(", ");
        Ok(Care {
            condition: unwell.map_or(Condition::Well, Condition::Weak),
            differs: (!differs.is_empty()).then(|| format!("the collection is not as `memory.index` says: {differs}")),
            again,
        })
    }

    fn repaired(&self, upto: Sequence) {
        let mut state = self.state();
        if state.watermark.is_some() {
            state.safe = state.safe.max(upto);
            state.missed = false;
        }
    }

    async fn unlike(&self, entries: Vec<Entry>) -> Result<Vec<Key>, StorageError> {
        let keys: Vec<Key> = entries.iter().map(|entry| entry.key).collect();
        let held = self.points(&keys).await?;
        let has = |entry: &&Entry| {
            let point = held.get(&entry.key);
            point.is_some_and(|point| requests::is_like(point, self.prefix, entry))
        };
        let unlike = entries.iter().filter(|entry| !has(entry));
        Ok(unlike.map(|entry| entry.key).collect())
    }

    async fn present(&self, keys: Vec<Key>) -> Result<Vec<Key>, StorageError> {
        let held = self.points(&keys).await?;
        let there = held.iter().filter(|(_, point)| requests::is_there(point));
        Ok(there.map(|(key, _)| *key).collect())
    }

    async fn keys(&self, after: Key, limit: usize) -> Result<Vec<Key>, StorageError> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let request = requests::after(&self.name, after, limit);
        let page = self.ask(WRITE, async |node| node.scroll(request.clone()).await);
        let page = page.await?.result;
        Ok(page
            .iter()
            .filter_map(|point| requests::key(point.id.as_ref()))
            .collect())
    }

    async fn clear(&self) -> Result<(), StorageError> {
        self.cluster.delete(&self.name).await?;
        *self.state() = State::default();
        Ok(())
    }
}
