//! Search on the wire.

use aeterna_error::{Error, Violations};
use aeterna_proto::memory::v1 as wire;
use aeterna_types::Timestamp;
use aeterna_types::dimension::SIZES;

use super::{check_token, filter, id, layers, memory, past, scope};
use crate::app::{Arms, Breakdown, Dimensions, Found, Fusion, SearchQuery, SearchStats, Weights};

const MAX_QUERY_BYTES: usize = 8192;
const MAX_RESULTS: i32 = 1000;
const MAX_BUDGET_MS: i32 = 60_000;
const MAX_EXCLUDED: usize = 10_000;

/// What Search asks for.
pub fn search_request(request: wire::SearchRequest, now: Timestamp) -> Result<SearchQuery, Error> {
    let mut violations = Violations::default();
    if request.query.trim().is_empty() || request.query.len() > MAX_QUERY_BYTES {
        violations.add(
            "query",
            format!("has {} bytes; send 1 to 8192, not only blanks", request.query.len()),
        );
    }
    if !(0..=MAX_RESULTS).contains(&request.top_k) {
        violations.add("top_k", format!("is {}; send 1 to 1000, or 0 for 10", request.top_k));
    }
    let (dimensions, budget_ms) = dimensions(&mut violations, &request);
    let scope = scope(&mut violations, "scope", request.scope);
    let layers = layers(&mut violations, "layers", &request.layers);
    let arms = match wire::SearchMode::try_from(request.mode) {
        Ok(wire::SearchMode::Unspecified | wire::SearchMode::Hybrid) => Arms::Hybrid,
        Ok(wire::SearchMode::Lexical) => Arms::Lexical,
        Ok(wire::SearchMode::Dense) => Arms::Dense,
        Err(_) => {
            violations.add("mode", format!("is {}, which is no mode", request.mode));
            Arms::Hybrid
        }
    };
    let fusion = match wire::Fusion::try_from(request.fusion) {
        Ok(wire::Fusion::Unspecified | wire::Fusion::Convex) => Fusion::Convex,
        Ok(wire::Fusion::Rrf) => Fusion::Rrf,
        Err(_) => {
            violations.add("fusion", format!("is {}, which is no fusion", request.fusion));
            Fusion::Convex
        }
    };
    let asked = request.weights.unwrap_or_default();
    let weights = weights(&mut violations, &asked);
    if let Some(threshold) = request.threshold.filter(|threshold| !(0.0..=1.0).contains(threshold)) {
        violations.add("threshold", format!("is {threshold}; scores lie between 0 and 1"));
    }
    if request.exclude_ids.len() > MAX_EXCLUDED {
        let count = request.exclude_ids.len();
        violations.add("exclude_ids", format!("has {count} ids; send at most 10,000"));
    }
    let excluded = request.exclude_ids.iter().take(MAX_EXCLUDED).enumerate();
    let exclude = excluded
        .filter_map(|(i, text)| id(&mut violations, &format!("exclude_ids[{i}]"), text))
        .collect();
    let after = check_token(&mut violations, &request.consistency_token);
    let filter = filter(&mut violations, &request.filter);
    let as_of = past(&mut violations, request.as_of, now);
    violations.into_result()?;
    let top_k = if request.top_k == 0 {
        10
    } else {
        usize::try_from(request.top_k).unwrap_or(10)
    };
    let query = SearchQuery {
        scope,
        text: request.query,
        top_k,
        layers,
        arms,
        fusion,
        weights,
        threshold: request.threshold,
        exclude,
        filter,
        after,
        as_of,
        rerank: request.rerank,
        dimensions,
        budget_ms,
        explain: request.explain,
    };
    Ok(query)
}

/// Who chooses the dimensions, and the milliseconds that the search may take.
fn dimensions(violations: &mut Violations, request: &wire::SearchRequest) -> (Dimensions, Option<u32>) {
    let (sent, budget) = (request.dimension, request.latency_budget_ms);
    if !(0..=MAX_BUDGET_MS).contains(&budget) {
        violations.add(
            "latency_budget_ms",
            format!("is {budget}; send 1 to 60,000, or 0 for no limit"),
        );
    }
    let budget_ms = u32::try_from(budget).ok().filter(|ms| *ms > 0);
    let choice = match wire::DimensionChoice::try_from(request.dimension_choice) {
        Ok(wire::DimensionChoice::Unspecified) if budget_ms.is_none() => Dimensions::All,
        Ok(wire::DimensionChoice::Unspecified | wire::DimensionChoice::Auto) => Dimensions::Fitting,
        Ok(wire::DimensionChoice::Table) => Dimensions::Table,
        Err(_) => {
            let number = request.dimension_choice;
            violations.add("dimension_choice", format!("is {number}, which is no choice"));
            Dimensions::All
        }
    };
    match usize::try_from(sent).ok().filter(|size| SIZES.contains(size)) {
        _ if sent == 0 => return (choice, budget_ms),
        Some(size) if choice == Dimensions::All => return (Dimensions::Only(size), None),
        Some(_) => violations.add(
            "dimension",
            format!(
                "is {sent}, so nothing is left to choose; send either it, or `dimension_choice` and `latency_budget_ms`"
            ),
        ),
        None => violations.add(
            "dimension",
            format!("is {sent}; send 256, 384, 768 or 1536, or 0 for all that there are"),
        ),
    }
    (Dimensions::All, None)
}

fn weights(violations: &mut Violations, asked: &wire::SearchWeights) -> Weights {
    let default = Weights::default();
    let mut within = |name: &str, value: Option<f64>, default: f64, low: f64, high: f64| match value {
        None => default,
        Some(value) if (low..=high).contains(&value) => value,
        Some(value) => {
            violations.add(&format!("weights.{name}"), format!("is {value}; send {low} to {high}"));
            default
        }
    };
    let mmr = within("mmr_lambda", asked.mmr_lambda, 1.0, 0.0, 1.0);
    Weights {
        confidence: within("confidence", asked.confidence, default.confidence, 0.0, 1.0),
        rerank: within("rerank", asked.rerank, default.rerank, 0.0, 1.0),
        mmr_lambda: asked.mmr_lambda.map(|_| mmr),
        dense: within("dense", asked.dense, default.dense, 0.0, 1.0),
        rrf_k: within("rrf_k", asked.rrf_k, default.rrf_k, 1.0, 1000.0),
        neighbour: within("neighbour", asked.neighbour, default.neighbour, 0.0, 1.0),
        recency: within("recency", asked.recency, default.recency, 0.0, 1.0),
        importance: within("importance", asked.importance, default.importance, 0.0, 1.0),
        tie_band: within("tie_band", asked.tie_band, default.tie_band, 0.0, 0.1),
    }
}

fn int(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The answer to Search.
pub fn search_response(found: Found, explain: bool) -> wire::SearchResponse {
    let results = found.hits.into_iter().map(|hit| wire::SearchResult {
        score: hit.score,
        breakdown: explain.then(|| breakdown(hit.breakdown)),
        memory: Some(memory(hit.memory)),
    });
    wire::SearchResponse {
        results: results.collect(),
        degraded: !found.degraded.is_empty(),
        degraded_reasons: found.degraded,
        model: found.model,
        dimension: int(found.dimension),
        stats: explain.then(|| stats(found.stats)),
    }
}

fn breakdown(parts: Breakdown) -> wire::ScoreBreakdown {
    wire::ScoreBreakdown {
        cosine: parts.cosine,
        bm25: parts.bm25,
        dense_rank: int(parts.dense_rank),
        lexical_rank: int(parts.lexical_rank),
        dense_part: parts.dense_part,
        lexical_part: parts.lexical_part,
        neighbour_part: parts.neighbour_part,
        recency_part: parts.recency_part,
        importance_part: parts.importance_part,
        confidence_part: parts.confidence_part,
        layer_part: parts.layer_part,
        rerank: parts.rerank,
        rerank_part: parts.rerank_part,
        matched_terms: parts.matched_terms,
    }
}

fn stats(stats: SearchStats) -> wire::SearchStats {
    wire::SearchStats {
        dense_candidates: int(stats.dense_candidates),
        lexical_candidates: int(stats.lexical_candidates),
        vectors_scanned: i64::try_from(stats.scanned).unwrap_or(i64::MAX),
        embed_ms: stats.embed_ms,
        dense_ms: stats.dense_ms,
        lexical_ms: stats.lexical_ms,
        total_ms: stats.total_ms,
        terms: stats.terms,
        dimension_rule: stats.rule.into(),
    }
}
