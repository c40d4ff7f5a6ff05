//! `aeterna search`.

use aeterna_proto::memory::v1::{Fusion, ScoreBreakdown, SearchMode, SearchRequest, SearchResponse, SearchWeights};

use super::client::Answered;
use super::scope::Standing;
use super::{output, scope};
use crate::json;

/// Which arms a search uses.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Mode {
    /// Embeddings and words, fused
    Hybrid,
    /// Words only (BM25)
    Lexical,
    /// Embeddings only
    Dense,
}

/// How the arms are brought together.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Fuse {
    /// Weighted sum of scaled scores
    Convex,
    /// Reciprocal ranks
    Rrf,
}

/// What `search` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to look for
    query: String,
    #[command(flatten)]
    standing: Standing,
    /// Results wanted
    #[arg(short = 'k', long, default_value_t = 10)]
    top_k: i32,
    /// Which arms to use
    #[arg(long, value_enum, default_value = "hybrid")]
    mode: Mode,
    /// How to bring them together
    #[arg(long, value_enum, default_value = "convex")]
    fusion: Fuse,
    /// Only memories that satisfy it, for instance `tags:travel AND importance >= 0.5`
    #[arg(long, default_value = "")]
    filter: String,
    /// Leave out results with a lower score
    #[arg(long)]
    threshold: Option<f64>,
    /// Search what was current and true at that time: `2023-05-08T13:56:00Z` or `2023-05-08`
    #[arg(long, value_name = "TIME", value_parser = scope::parse_time)]
    as_of: Option<prost_types::Timestamp>,
    /// Have the cross-encoder read the best results (`embedding.reranker_dir`)
    #[arg(long)]
    rerank: bool,
    /// Variety: 1 is relevance alone, less puts what says the same again further down
    #[arg(long, value_name = "0..1")]
    mmr: Option<f64>,
    /// Compare this many dimensions of the vectors: 256, 384, 768 or 1536; 0 is all that there are
    #[arg(long, default_value_t = 0, conflicts_with = "latency_budget_ms")]
    dimension: i32,
    /// Compare as many dimensions as fit into this many milliseconds, by how long searches took of late
    #[arg(long, default_value_t = 0)]
    latency_budget_ms: i32,
    /// Show how each score came about
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    answered: Answered,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = args.answered.client()?;
    let mode = match args.mode {
        Mode::Hybrid => SearchMode::Hybrid,
        Mode::Lexical => SearchMode::Lexical,
        Mode::Dense => SearchMode::Dense,
    };
    let fusion = match args.fusion {
        Fuse::Convex => Fusion::Convex,
        Fuse::Rrf => Fusion::Rrf,
    };
    let request = SearchRequest {
        scope: args.standing.scope,
        query: args.query,
        top_k: args.top_k,
        filter: args.filter,
        mode: mode.into(),
        fusion: fusion.into(),
        threshold: args.threshold,
        as_of: args.as_of,
        rerank: args.rerank,
        dimension: args.dimension,
        latency_budget_ms: args.latency_budget_ms,
        weights: args.mmr.map(|lambda| SearchWeights {
            mmr_lambda: Some(lambda),
            ..Default::default()
        }),
        explain: args.explain,
        ..Default::default()
    };
    let answer = client.memory().search(client.request(request)).await?.into_inner();
    if args.answered.json {
        output::line(json::to_json("aeterna.memory.v1.SearchResponse", &answer)?);
        return Ok(());
    }
    print(&answer);
    Ok(())
}

fn print(answer: &SearchResponse) {
    for reason in &answer.degraded_reasons {
        output::note(format!("degraded: {reason}"));
    }
    if answer.results.is_empty() {
        output::note("nothing found");
        return;
    }
    let explained = answer.results.iter().any(|result| result.breakdown.is_some());
    let mut head = vec!["score", "memory", "day", "scope"];
    head.push(if explained { "why" } else { "id" });
    let mut table = output::table(&head);
    for result in &answer.results {
        let memory = result.memory.clone().unwrap_or_default();
        let last = match &result.breakdown {
            Some(parts) => why(parts),
            None => memory.id.clone(),
        };
        table.add_row([
            format!("{:.3}", result.score),
            output::said(&memory),
            output::day(&memory),
            output::place(&memory),
            last,
        ]);
    }
    output::align_right(&mut table, 0);
    output::line(table);
    if let Some(stats) = &answer.stats {
        output::line(format!(
            "terms: {} · model: {} · {:.1} ms (embedding {:.1}, dense {:.1}, lexical {:.1})",
            output::clean(&stats.terms.join(" ")),
            if answer.model.is_empty() { "none" } else { &answer.model },
            stats.total_ms,
            stats.embed_ms,
            stats.dense_ms,
            stats.lexical_ms
        ));
    }
}

/// The parts of a score that are not zero, and the words that matched.
fn why(parts: &ScoreBreakdown) -> String {
    let named = [
        ("dense", parts.dense_part),
        ("lexical", parts.lexical_part),
        ("neighbour", parts.neighbour_part),
        ("recency", parts.recency_part),
        ("importance", parts.importance_part),
        ("confidence", parts.confidence_part),
        ("layer", parts.layer_part),
    ];
    let shown = named.iter().filter(|(_, part)| *part != 0.0);
    let mut text = shown
        .map(|(name, part)| format!("{name} {part:.3}"))
        .collect::<Vec<_>>()
        .join(" + ");
    if !parts.matched_terms.is_empty() {
        text.push_str(&format!("; words: {}", output::clean(&parts.matched_terms.join(" "))));
    }
    text
}
