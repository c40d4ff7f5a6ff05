//! Scores: weights, fusion of the arms, and how a score came about.

use std::collections::HashMap;

use crate::domain::Key;

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
    /// Weight of confidence.
    pub confidence: f64,
    /// Width of the band within which scores count as tied.
    pub tie_band: f64,
    /// Share of the cross-encoder, when it is asked.
    pub rerank: f64,
    /// Relevance against variety; `None`: variety does not count.
    pub mmr_lambda: Option<f64>,
}

impl Weights {
    /// The highest sum that the parts of a score can reach.
    pub fn ceiling(&self) -> f64 {
        1.0 + self.neighbour + self.bonus()
    }

    /// The highest sum of the parts that depend on the memory itself.
    pub fn bonus(&self) -> f64 {
        self.recency + self.importance + self.confidence + self.tie_band
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
            confidence: 0.0,
            tie_band: 0.01,
            rerank: 0.5,
            mmr_lambda: None,
        }
    }
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
    /// From confidence.
    pub confidence_part: f64,
    /// From the layer.
    pub layer_part: f64,
    /// Score of the cross-encoder, when it was asked.
    pub rerank: Option<f64>,
    /// From the cross-encoder.
    pub rerank_part: f64,
    /// Terms of the query found in it; only when they were asked for.
    pub matched_terms: Vec<String>,
}

impl Breakdown {
    /// Every part multiplied by the same.
    pub fn scale(&mut self, factor: f64) {
        for part in [
            &mut self.dense_part,
            &mut self.lexical_part,
            &mut self.neighbour_part,
            &mut self.recency_part,
            &mut self.importance_part,
            &mut self.confidence_part,
            &mut self.layer_part,
        ] {
            *part *= factor;
        }
    }

    /// What the arms give.
    pub fn fused(&self) -> f64 {
        self.dense_part + self.lexical_part
    }

    /// The score.
    pub fn total(&self) -> f64 {
        let own = self.recency_part + self.importance_part + self.confidence_part + self.layer_part;
        self.fused() + self.neighbour_part + own + self.rerank_part
    }
}

/// Brings two ranked lists together; `share` is the dense arm's weight.
pub fn fuse(
    dense: &[(Key, f64)],
    lexical: &[(Key, f64)],
    fusion: Fusion,
    share: f64,
    k: f64,
) -> HashMap<Key, Breakdown> {
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
