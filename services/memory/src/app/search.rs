//! Finding memories: dense and lexical arms, fusion, neighbours in the conversation, what speaks for a memory itself,
//! reranking, variety.

mod candidates;
mod dimensions;
mod diverse;
mod past;
mod score;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use aeterna_error::{Error, Reason};
use aeterna_rpc::RequestContext;
use aeterna_types::{Layer, MemoryId, Scope, TenantId, Timestamp};

use super::{App, Model, Serving};
use crate::domain::{Key, Memory, Sequence};
use crate::filter::Filter;
use crate::store::code::Code;
use crate::store::{Among, Stored};

use candidates::Run;
pub use dimensions::Dimensions;
use past::Past;
pub use score::{Breakdown, Fusion, Weights};

/// Results that the cross-encoder reads and that variety chooses from, at least.
const RERANKED: usize = 50;

/// Which arms are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arms {
    /// Both.
    Hybrid,
    /// BM25 only.
    Lexical,
    /// Embeddings only.
    Dense,
}

/// What is looked for.
#[derive(Clone, Debug)]
pub struct SearchQuery {
    /// Where the caller stands.
    pub scope: Option<Scope>,
    /// The query.
    pub text: String,
    /// Results wanted.
    pub top_k: usize,
    /// Only these layers; empty: any.
    pub layers: Vec<Layer>,
    /// Which arms.
    pub arms: Arms,
    /// How to fuse them.
    pub fusion: Fusion,
    /// Weights.
    pub weights: Weights,
    /// Lowest score.
    pub threshold: Option<f64>,
    /// Memories to leave out.
    pub exclude: Vec<MemoryId>,
    /// Only memories that satisfy it.
    pub filter: Option<Filter>,
    /// A write that must be seen.
    pub after: Sequence,
    /// What was true and current then; `None`: what is current.
    pub as_of: Option<Timestamp>,
    /// Ask the cross-encoder.
    pub rerank: bool,
    /// Who chooses the dimensions that are compared.
    pub dimensions: Dimensions,
    /// Milliseconds that the search may take, to choose by; `None`: no limit.
    pub budget_ms: Option<u32>,
    /// Also say which terms matched.
    pub explain: bool,
}

/// One memory found.
#[derive(Clone, Debug)]
pub struct Hit {
    /// Its number.
    key: Key,
    /// The memory.
    pub memory: Memory,
    /// Its score.
    pub score: f64,
    /// How it came about.
    pub breakdown: Breakdown,
}

/// What a search did.
#[derive(Clone, Debug, Default)]
pub struct SearchStats {
    /// Candidates of the dense arm.
    pub dense_candidates: usize,
    /// Candidates of the lexical arm.
    pub lexical_candidates: usize,
    /// Vectors scanned.
    pub scanned: usize,
    /// Milliseconds for the query's embedding.
    pub embed_ms: f64,
    /// Milliseconds in the dense arm.
    pub dense_ms: f64,
    /// Milliseconds in the lexical arm.
    pub lexical_ms: f64,
    /// Milliseconds in all.
    pub total_ms: f64,
    /// The query's terms.
    pub terms: Vec<String>,
    /// Which rule chose the dimensions; empty when the dense arm was not used.
    pub rule: &'static str,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Best first.
    pub hits: Vec<Hit>,
    /// What was away.
    pub degraded: Vec<String>,
    /// The model of the dense arm; empty when it was not used.
    pub model: String,
    /// Dimensions that the dense arm compared; 0 when it was not used.
    pub dimension: usize,
    /// What the search did.
    pub stats: SearchStats,
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

impl App {
    /// Finds the best memories that the caller sees.
    ///
    /// # Errors
    /// SCOPE_DENIED, or when the store fails. A model that is away only degrades the search.
    pub async fn search(&self, context: &RequestContext, query: SearchQuery) -> Result<Found, Error> {
        let started = Instant::now();
        let tenant = &context.principal().tenant;
        let mut run = Run::new(self, context, &query);
        let bounds = run.bounds().await?;
        let candidates = run.candidates(&bounds).await;
        let fused = run.fuse(&bounds, candidates).await?;
        let (mut degraded, mut stats, model) = (run.degraded, run.stats, &run.serving.model);
        let mut hits = self.rank(tenant, fused.scores, &query, bounds.past).await?;
        // What something was away for says nothing of the dimensions.
        if let Some(measuring) = run.measuring {
            measuring.end(degraded.is_empty());
        }
        if query.rerank
            && let Err(error) = self.rerank(context, &mut hits, &query).await
        {
            // Without a cross-encoder it was asked for in vain, which only the caller can mend.
            if matches!(error.reason(), Reason::NotConfigured | Reason::InvalidField) {
                return Err(error);
            }
            tracing::warn!(error = %error.chain(), "a search goes without its reranking");
            degraded.push(format!("not reranked: {error}"));
        }
        hits.retain(|hit| query.threshold.is_none_or(|threshold| hit.score >= threshold));
        self.vary(tenant, model, &mut hits, &query).await?;
        hits.truncate(query.top_k);
        if query.explain {
            mark(&mut hits, &stats.terms);
        }
        if !degraded.is_empty() {
            self.metrics.degraded.add(1, &[]);
        }
        stats.total_ms = ms(started);
        Ok(Found {
            hits,
            degraded,
            dimension: fused.dimension.unwrap_or_default(),
            model: fused.dimension.map(|_| model.name.clone()).unwrap_or_default(),
            stats,
        })
    }

    /// The nearest vectors by the index, to be rescored.
    pub(super) async fn candidates(
        &self,
        serving: &Serving,
        code: Code,
        among: Arc<Among>,
        limit: usize,
    ) -> Result<Vec<Key>, Error> {
        let found = serving.index.search(code, among, limit).await.map_err(|error| {
            let message = "the vector index is away";
            Error::unavailable(message).caused_by(error)
        })?;
        Ok(found.into_iter().map(|(key, _)| key).collect())
    }

    /// Reads the candidates, adds what depends on the memory itself, and orders them; those that can't reach the top are left
    /// out.
    async fn rank(
        &self,
        tenant: &TenantId,
        scores: HashMap<Key, Breakdown>,
        query: &SearchQuery,
        past: Option<Past>,
    ) -> Result<Vec<Hit>, Error> {
        let now = query.as_of.unwrap_or_else(|| self.clock.now());
        let weights = query.weights;
        let mut order: Vec<(Key, Breakdown)> = scores.into_iter().collect();
        order.sort_unstable_by(|a, b| b.1.total().total_cmp(&a.1.total()).then(b.0.cmp(&a.0)));
        // What depends on the memory itself adds a bounded amount: what can't reach the top any more need not be read.
        let reach = |count: usize| {
            let floor = order
                .get(count.saturating_sub(1))
                .map(|(_, best)| best.total() - weights.bonus());
            floor.map_or(order.len(), |floor| {
                order.partition_point(|(_, other)| other.total() >= floor)
            })
        };
        let mut memories = past.map(|past| past.changed).unwrap_or_default();
        let mut read = 0;
        // More than the best ones only when some of them are there no more.
        for count in [query.least(), query.looked_at()] {
            let reached = reach(count).max(read);
            if reached == read {
                break;
            }
            let keys = order[read..reached].iter().map(|(key, _)| *key);
            let keys: Vec<Key> = keys.filter(|key| !memories.contains_key(key)).collect();
            let fetched = self.store.fetch(tenant, &keys, now).await?;
            memories.extend(fetched.into_iter().map(|Stored { key, memory }| (key, memory)));
            read = reached;
            if order[..count.min(read)]
                .iter()
                .all(|(key, _)| memories.contains_key(key))
            {
                break;
            }
        }
        order.truncate(read);
        let hit = |(key, mut breakdown): (Key, Breakdown)| {
            let memory = memories.remove(&key)?;
            let told = memory.body.event_at.unwrap_or(memory.created_at);
            let days = now.seconds_since(told).max(0.0) / 86_400.0;
            breakdown.recency_part = weights.recency * 0.5f64.powf(days / 30.0);
            breakdown.importance_part = weights.importance * memory.body.importance;
            breakdown.confidence_part = weights.confidence * memory.body.confidence(now);
            breakdown.layer_part = weights.tie_band * memory.layer().map_or(0.0, Layer::specificity);
            breakdown.scale(1.0 / weights.ceiling());
            Some(Hit {
                key,
                score: breakdown.total(),
                memory,
                breakdown,
            })
        };
        let mut hits: Vec<Hit> = order.into_iter().filter_map(hit).collect();
        sort(&mut hits);
        hits.truncate(query.looked_at());
        Ok(hits)
    }

    /// Has the cross-encoder read the best of them with the query, and orders them by what it says and what they had before.
    async fn rerank(&self, context: &RequestContext, hits: &mut [Hit], query: &SearchQuery) -> Result<(), Error> {
        if hits.is_empty() {
            return Ok(());
        }
        let count = hits.len().min(RERANKED.max(query.top_k));
        let (read, _) = hits.split_at_mut(count);
        let texts = read.iter().map(|hit| hit.memory.body.dense_text()).collect();
        let scores = self.cross_encode(context, &query.text, texts).await?;
        let share = query.weights.rerank;
        for (hit, score) in read.iter_mut().zip(scores) {
            hit.breakdown.rerank = Some(score);
            hit.breakdown.rerank_part = share * score;
        }
        for hit in hits.iter_mut() {
            let part = hit.breakdown.rerank_part;
            hit.breakdown.scale(1.0 - share);
            hit.breakdown.rerank_part = part;
            hit.score = hit.breakdown.total();
        }
        sort(hits);
        Ok(())
    }

    /// Puts what says something else before what says the same again.
    async fn vary(
        &self,
        tenant: &TenantId,
        model: &Model,
        hits: &mut Vec<Hit>,
        query: &SearchQuery,
    ) -> Result<(), Error> {
        let Some(lambda) = query.weights.mmr_lambda else {
            return Ok(());
        };
        let keys: Vec<Key> = hits.iter().map(|hit| hit.key).collect();
        let vectors = self.store.vectors(Some(tenant), &model.identity, &keys).await?;
        let mut vectors: HashMap<Key, Vec<f32>> = vectors.into_iter().collect();
        let vectors: Vec<Option<Vec<f32>>> = keys.iter().map(|key| vectors.remove(key)).collect();
        let relevance: Vec<f64> = hits.iter().map(|hit| hit.score).collect();
        let limit = query.top_k;
        // Of a thousand results it takes a second, in which nothing else must wait.
        let ordered = tokio::task::spawn_blocking(move || diverse::order(&relevance, &vectors, lambda, limit)).await;
        let order = ordered.map_err(Error::internal)?;
        let mut all: Vec<Option<Hit>> = std::mem::take(hits).into_iter().map(Some).collect();
        hits.extend(order.into_iter().filter_map(|place| all[place].take()));
        Ok(())
    }
}

impl SearchQuery {
    /// How many of the best are looked at, for the sake of the best `top_k`.
    fn looked_at(&self) -> usize {
        if self.chooses() {
            RERANKED.max(2 * self.top_k)
        } else {
            2 * self.top_k
        }
    }

    /// How many of the best are looked at when all of them are there.
    fn least(&self) -> usize {
        if self.chooses() { self.looked_at() } else { self.top_k }
    }

    /// Whether more is read than is told, to choose from.
    fn chooses(&self) -> bool {
        self.rerank || self.weights.mmr_lambda.is_some()
    }
}

fn sort(hits: &mut [Hit]) {
    hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.memory.id.cmp(&a.memory.id)));
}

/// Says which terms of the query each has.
fn mark(hits: &mut [Hit], terms: &[String]) {
    let wanted: HashSet<&String> = terms.iter().collect();
    for hit in hits {
        let mut matched = aeterna_text::analyse(&hit.memory.body.lexical_text());
        matched.retain(|term| wanted.contains(term));
        matched.sort();
        matched.dedup();
        hit.breakdown.matched_terms = matched;
    }
}
