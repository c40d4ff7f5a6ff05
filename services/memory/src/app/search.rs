//! Finding memories: dense and lexical arms, fusion, neighbours in the conversation, layer tie-break.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::{Layer, MemoryId, Scope};

use super::App;
use super::get::view;
use crate::domain::{Key, Memory, Sequence};
use crate::filter::Filter;
use crate::store::code::Code;
use crate::store::{Among, LexicalSearch, Stored};

/// Candidates that each arm brings, at least.
const CANDIDATES: usize = 200;

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

/// How the arms are brought together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fusion {
    /// Weighted sum of min-max normalised scores.
    Convex,
    /// Reciprocal rank fusion (Cormack et al. 2009), scaled so that two first places make 1.
    Rrf,
}

/// Weights of a search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// Share of the dense arm, 0 to 1.
    pub dense: f64,
    /// The k of reciprocal rank fusion.
    pub rrf_k: f64,
    /// Part of its best neighbour's score that a turn receives.
    pub neighbour: f64,
    /// Weight of recency.
    pub recency: f64,
    /// Weight of importance.
    pub importance: f64,
    /// Width of the band within which scores count as tied.
    pub tie_band: f64,
}

impl Weights {
    /// The highest sum that the parts of a score can reach.
    fn ceiling(&self) -> f64 {
        1.0 + self.neighbour + self.recency + self.importance + self.tie_band
    }
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            dense: 0.5,
            rrf_k: 60.0,
            neighbour: 0.3,
            recency: 0.0,
            importance: 0.0,
            tie_band: 0.01,
        }
    }
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
    /// Also say which terms matched.
    pub explain: bool,
}

/// How a score came about; the parts add up to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Breakdown {
    /// Cosine with the query, when the dense arm found it.
    pub cosine: Option<f64>,
    /// BM25, when the lexical arm found it.
    pub bm25: Option<f64>,
    /// Rank in the dense arm, from 1; 0: not found.
    pub dense_rank: usize,
    /// Rank in the lexical arm, from 1; 0: not found.
    pub lexical_rank: usize,
    /// From the dense arm.
    pub dense_part: f64,
    /// From the lexical arm.
    pub lexical_part: f64,
    /// From the best neighbour.
    pub neighbour_part: f64,
    /// From recency.
    pub recency_part: f64,
    /// From importance.
    pub importance_part: f64,
    /// From the layer.
    pub layer_part: f64,
    /// Terms of the query found in it; only when they were asked for.
    pub matched_terms: Vec<String>,
}

impl Breakdown {
    /// Every part multiplied by the same.
    fn scale(&mut self, factor: f64) {
        for part in [
            &mut self.dense_part,
            &mut self.lexical_part,
            &mut self.neighbour_part,
            &mut self.recency_part,
            &mut self.importance_part,
            &mut self.layer_part,
        ] {
            *part *= factor;
        }
    }

    fn fused(&self) -> f64 {
        self.dense_part + self.lexical_part
    }

    fn total(&self) -> f64 {
        self.fused() + self.neighbour_part + self.recency_part + self.importance_part + self.layer_part
    }
}

/// One memory found.
#[derive(Clone, Debug)]
pub struct Hit {
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
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Best first.
    pub hits: Vec<Hit>,
    /// What was away.
    pub degraded: Vec<String>,
    /// The dense arm was used.
    pub dense_used: bool,
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
        let view = view(context, query.scope.as_ref())?;
        let tenant = &context.principal().tenant;
        let scopes = self.store.visible(tenant, &view, &query.layers).await?;
        let mut degraded = Vec::new();
        if query.after > Sequence::default() && query.arms != Arms::Lexical && !self.reached(query.after).await {
            degraded.push("the vector index has not followed the write of `consistency_token` yet".to_owned());
        }
        // What has expired and is not reaped yet must not take the place of what lives.
        let mut exclude: HashSet<Key> = self
            .store
            .expired(&scopes, self.clock.now())
            .await?
            .into_iter()
            .collect();
        for id in &query.exclude {
            exclude.extend(self.store.get(tenant, *id).await?.map(|stored| stored.key));
        }
        let only = match &query.filter {
            Some(filter) => Some(self.store.matching(&scopes, filter).await?.into_iter().collect()),
            None => None,
        };
        let among = Among {
            scopes: scopes.iter().copied().collect(),
            only,
            exclude,
        };
        let depth = CANDIDATES.max(4 * query.top_k);
        let mut stats = SearchStats {
            terms: aeterna_text::analyse(&query.text),
            ..SearchStats::default()
        };
        let mut dense = Vec::new();
        let mut dense_used = false;
        if query.arms != Arms::Lexical {
            match self.dense(context, &query.text, &among, depth, &mut stats).await {
                Ok(found) => {
                    dense = found;
                    dense_used = true;
                }
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "a search goes without its dense arm");
                    degraded.push(format!("no dense arm: {error}"));
                }
            }
        }
        let mut lexical = Vec::new();
        if query.arms != Arms::Dense || !dense_used {
            let began = Instant::now();
            let mut terms = stats.terms.clone();
            terms.sort();
            terms.dedup();
            let depth = depth + among.exclude.len();
            let lexical_search = LexicalSearch {
                tenant: tenant.clone(),
                scopes,
                terms,
                filter: query.filter.clone(),
                limit: depth,
            };
            lexical = self.store.lexical(&lexical_search).await?;
            lexical.retain(|(key, _)| !among.exclude.contains(key));
            stats.lexical_ms = ms(began);
        }
        (stats.dense_candidates, stats.lexical_candidates) = (dense.len(), lexical.len());

        let share = match (dense_used, query.arms) {
            (_, Arms::Lexical) | (false, _) => 0.0,
            (_, Arms::Dense) => 1.0,
            (true, Arms::Hybrid) => query.weights.dense,
        };
        let mut scores = fuse(&dense, &lexical, query.fusion, share, query.weights.rrf_k);
        self.spread(&mut scores, query.weights.neighbour, &among).await?;
        let hits = self.rank(scores, &query, &stats.terms).await?;
        if !degraded.is_empty() {
            self.metrics.degraded.add(1, &[]);
        }
        stats.total_ms = ms(started);
        Ok(Found {
            hits,
            degraded,
            dense_used,
            stats,
        })
    }

    /// Scans the prefixes and rescores the best candidates with the vectors that the relational store holds.
    async fn dense(
        &self,
        context: &RequestContext,
        text: &str,
        among: &Among,
        depth: usize,
        stats: &mut SearchStats,
    ) -> Result<Vec<(Key, f64)>, Error> {
        let began = Instant::now();
        let vector = self
            .embed(context, vec![text.to_owned()], true)
            .await?
            .pop()
            .unwrap_or_default();
        stats.embed_ms = ms(began);
        let began = Instant::now();
        let Some(code) = Code::encode(&vector) else {
            return Ok(Vec::new());
        };
        let (index, among) = (Arc::clone(&self.index), among.clone());
        stats.scanned = index.len();
        let candidates = tokio::task::spawn_blocking(move || index.search(&code, &among, depth)).await;
        let keys: Vec<Key> = candidates
            .map_err(Error::internal)?
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        let cosines = self.store.cosines(&self.model.identity, &keys, &vector).await?;
        let mut scored: Vec<(Key, f64)> = cosines
            .into_iter()
            .map(|(key, cosine)| (key, f64::from(cosine)))
            .collect();
        scored.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
        stats.dense_ms = ms(began);
        Ok(scored)
    }

    /// Gives each turn of a conversation a part of its best neighbour's score; neighbours become candidates themselves.
    async fn spread(&self, scores: &mut HashMap<Key, Breakdown>, part: f64, among: &Among) -> Result<(), Error> {
        if part == 0.0 {
            return Ok(());
        }
        let keys: Vec<Key> = scores.keys().copied().collect();
        let fused: HashMap<Key, f64> = scores
            .iter()
            .map(|(key, breakdown)| (*key, breakdown.fused()))
            .collect();
        for (turn, neighbour) in self.store.neighbours(&keys).await? {
            let chosen = among.only.as_ref().is_none_or(|only| only.contains(&neighbour));
            if !chosen || among.exclude.contains(&neighbour) {
                continue;
            }
            let gift = part * fused.get(&turn).copied().unwrap_or(0.0);
            let breakdown = scores.entry(neighbour).or_default();
            breakdown.neighbour_part = breakdown.neighbour_part.max(gift);
        }
        Ok(())
    }

    /// Reads the candidates, adds what depends on the memory itself, and orders them.
    async fn rank(
        &self,
        scores: HashMap<Key, Breakdown>,
        query: &SearchQuery,
        terms: &[String],
    ) -> Result<Vec<Hit>, Error> {
        let now = self.clock.now();
        let weights = query.weights;
        // Recency, importance and layer add a bounded amount: what can't reach the top any more need not be read.
        let bonus = weights.recency + weights.importance + weights.tie_band;
        let mut order: Vec<(Key, Breakdown)> = scores.into_iter().collect();
        order.sort_unstable_by(|a, b| b.1.total().total_cmp(&a.1.total()).then(b.0.cmp(&a.0)));
        let floor = order
            .get(2 * query.top_k)
            .map_or(f64::NEG_INFINITY, |(_, b)| b.total() - bonus);
        order.retain(|(_, breakdown)| breakdown.total() >= floor);
        let keys: Vec<Key> = order.iter().map(|(key, _)| *key).collect();
        let mut memories: HashMap<Key, Memory> = self
            .store
            .fetch(&keys, now)
            .await?
            .into_iter()
            .map(|Stored { key, memory }| (key, memory))
            .collect();
        let wanted: HashSet<&String> = terms.iter().collect();
        let mut hits: Vec<Hit> = order
            .into_iter()
            .filter_map(|(key, mut breakdown)| {
                let memory = memories.remove(&key)?;
                let told = memory.body.event_at.unwrap_or(memory.created_at);
                let days = now.seconds_since(told).max(0.0) / 86_400.0;
                breakdown.recency_part = weights.recency * 0.5f64.powf(days / 30.0);
                breakdown.importance_part = weights.importance * memory.body.importance;
                breakdown.layer_part = weights.tie_band * memory.layer().map_or(0.0, Layer::specificity);
                breakdown.scale(1.0 / weights.ceiling());
                let score = breakdown.total();
                Some(Hit {
                    memory,
                    score,
                    breakdown,
                })
            })
            .filter(|hit| query.threshold.is_none_or(|threshold| hit.score >= threshold))
            .collect();
        hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.memory.id.cmp(&a.memory.id)));
        hits.truncate(query.top_k);
        for hit in hits.iter_mut().filter(|_| query.explain) {
            let mut matched = aeterna_text::analyse(&hit.memory.body.lexical_text());
            matched.retain(|term| wanted.contains(term));
            matched.sort();
            matched.dedup();
            hit.breakdown.matched_terms = matched;
        }
        Ok(hits)
    }
}

/// Brings two ranked lists together; `share` is the dense arm's weight.
fn fuse(dense: &[(Key, f64)], lexical: &[(Key, f64)], fusion: Fusion, share: f64, k: f64) -> HashMap<Key, Breakdown> {
    let mut scores: HashMap<Key, Breakdown> = HashMap::new();
    // Two first places make 1, and so does one first place of the only arm.
    let both = !dense.is_empty() && !lexical.is_empty();
    let place = |rank: usize| (k + 1.0) / (k + rank as f64) * if both { 0.5 } else { 1.0 };
    let scaled = min_max(dense);
    for ((index, (key, cosine)), part) in dense.iter().enumerate().zip(scaled) {
        let breakdown = scores.entry(*key).or_default();
        breakdown.cosine = Some(*cosine);
        breakdown.dense_rank = index + 1;
        breakdown.dense_part = match fusion {
            Fusion::Convex => share * part,
            Fusion::Rrf => place(index + 1),
        };
    }
    let scaled = min_max(lexical);
    for ((index, (key, bm25)), part) in lexical.iter().enumerate().zip(scaled) {
        let breakdown = scores.entry(*key).or_default();
        breakdown.bm25 = Some(*bm25);
        breakdown.lexical_rank = index + 1;
        breakdown.lexical_part = match fusion {
            Fusion::Convex => (1.0 - share) * part,
            Fusion::Rrf => place(index + 1),
        };
    }
    scores
}

/// Scores scaled so that the best is 1 and the worst 0; all 1 when they are the same.
fn min_max(list: &[(Key, f64)]) -> Vec<f64> {
    let (low, high) = list
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (_, x)| {
            (low.min(*x), high.max(*x))
        });
    list.iter()
        .map(|(_, x)| if high > low { (x - low) / (high - low) } else { 1.0 })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn convex_fusion_weighs_distances_and_rrf_only_ranks() {
        let dense = [(Key(1), 0.9), (Key(2), 0.1)];
        let lexical = [(Key(2), 7.0), (Key(3), 6.0), (Key(1), 1.0)];
        let convex = fuse(&dense, &lexical, Fusion::Convex, 0.5, 60.0);
        assert!((convex[&Key(1)].total() - 0.5).abs() < 1e-9);
        assert!((convex[&Key(2)].total() - 0.5).abs() < 1e-9);
        assert!((convex[&Key(3)].total() - 0.5 * 5.0 / 6.0).abs() < 1e-9);
        let rrf = fuse(&dense, &lexical, Fusion::Rrf, 0.5, 60.0);
        assert!((rrf[&Key(2)].total() - 0.5 * (61.0 / 62.0 + 1.0)).abs() < 1e-9);
        assert_eq!((rrf[&Key(3)].dense_rank, rrf[&Key(3)].lexical_rank), (0, 2));
    }

    #[test]
    fn equal_scores_are_all_the_best() {
        assert_eq!(min_max(&[(Key(1), 2.0), (Key(2), 2.0)]), [1.0, 1.0]);
        assert!(min_max(&[]).is_empty());
    }
}
