//! Vector search on synthetic vectors: the funnel as the memory service runs it, beside exact scans, a scan of 256 dimensions
//! and a public HNSW library, all in one run on the same vectors and queries.
//!
//! A vector is the sum of the centre of one of 64 topics, the centre of one of its clusters (about 50 vectors each) and noise,
//! each normal with a variance a dimension that falls as a power law, and scaled to length 1. The power is chosen so that the
//! first 256 of 1536 dimensions carry 79 % of the energy (`mid`) or 46 % (`hard`). Noise is as strong as the cluster, so that
//! clusters overlap and neighbours come from several of them. `untrained` vectors are `mid` ones after a rotation that spreads the
//! energy evenly: the funnel scans all their dimensions, or what a rotation of its own, learned from them, keeps. Queries are
//! made like vectors and are not among them. The store of the funnel has as many codes in memory as it has room for, which are
//! counted; the others it reads.

mod data;
mod engines;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::stats::percentile;
use aeterna_memory::store::flat::rotation::kept;
use data::Data;
use engines::{Engine, Exact, First, Funnel};

/// What `search` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Vectors
    #[arg(long, default_value_t = 100_000)]
    n: usize,
    /// The largest number of vectors of the growth measurement; it begins at 10,000
    #[arg(long, default_value_t = 1_000_000)]
    growth: usize,
    /// How the energy falls with the dimension: `mid` or `hard`; `untrained`: as `mid`, turned so that no dimension tells more
    /// than another
    #[arg(long, default_value = "mid", value_parser = ["mid", "hard", "untrained"])]
    spectrum: String,
    /// Dimensions of the vectors, a multiple of 64
    #[arg(long, default_value_t = data::MOST, value_parser = dimensions)]
    dimensions: usize,
    /// Queries per measurement
    #[arg(long, default_value_t = 200)]
    queries: usize,
    /// Seed of vectors and queries
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn dimensions(text: &str) -> Result<usize, String> {
    let dimensions = text.parse().map_err(|_| "not a number".to_owned())?;
    let fits = (128..=data::MOST).contains(&dimensions) && dimensions.is_multiple_of(64);
    fits.then_some(dimensions)
        .ok_or_else(|| format!("must be a multiple of 64, from 128 to {}", data::MOST))
}

/// Results per query.
pub const K: usize = 10;
/// Vectors are spread over so many scopes; a filter is a number of them.
pub const SCOPES: usize = 1000;

/// Parts of the vectors that a filter lets through, in scopes.
const FILTERS: [(&str, usize); 4] = [("all", SCOPES), ("10%", 100), ("1%", 10), ("0.1%", 1)];

pub async fn run(args: Args) -> anyhow::Result<Value> {
    let data = Data::new(&args, args.n, args.queries);
    eprintln!(
        "{} vectors, {:.0} % of their energy in 256 dimensions",
        args.n,
        100.0 * data.energy()
    );
    let truths: Vec<Vec<Vec<usize>>> = FILTERS.iter().map(|(_, scopes)| data.truth(*scopes)).collect();
    let mut engines = Vec::new();
    let funnels: &[First] = match args.spectrum.as_str() {
        "untrained" if kept(args.dimensions).is_none() => &[First::All],
        "untrained" => &[First::All, First::Learned],
        _ => &[First::Dimensions],
    };
    for first in funnels {
        engines.push(measure(&Funnel::build(&data, *first).await?, &data, &truths).await?);
    }
    let exact = [("exact-full", args.dimensions), ("only-256", 256)];
    for (name, dimensions) in exact.into_iter().filter(|(_, size)| *size <= args.dimensions) {
        engines.push(measure(&Exact::build(name, &data, dimensions), &data, &truths).await?);
    }
    #[cfg(feature = "hnsw")]
    engines.push(measure(&engines::Hnsw::build(&data, &truths[0])?, &data, &truths).await?);
    drop(data);

    let mut growth = Vec::new();
    let mut n = 10_000;
    while n <= args.growth {
        let data = Data::new(&args, n, args.queries.min(100));
        let truth = [data.truth(SCOPES)];
        let funnel = Funnel::build(&data, funnels[funnels.len() - 1]).await?;
        growth.push(measure(&funnel, &data, &truth).await?);
        n *= 10;
    }
    let report = json!({
        "bench": "search", "n": args.n, "dimensions": args.dimensions, "spectrum": args.spectrum, "seed": args.seed,
        "engines": engines, "growth": growth,
    });
    Ok(report)
}

/// One engine without a filter, and with each.
async fn measure<E: Engine>(engine: &E, data: &Data, truths: &[Vec<Vec<usize>>]) -> anyhow::Result<Value> {
    let mut report = json!({
        "name": engine.name(), "n": data.len(),
        "insert_per_s": (data.len() as f64 / engine.built().as_secs_f64()).round(),
        "disk_bytes": engine.disk_bytes(),
        "disk_share_of_float32": round(engine.disk_bytes() as f64 / (data.len() * data.dimensions * 4) as f64),
    });
    engine.warm().await?;
    let mut filtered = Vec::new();
    for ((name, scopes), truth) in FILTERS.iter().zip(truths) {
        let mut latencies = Vec::with_capacity(data.queries());
        let mut found = Vec::with_capacity(data.queries());
        engine.search(data.query(0), *scopes).await?; // so that nobody pays for the first time
        let before = cpu()?;
        for query in 0..data.queries() {
            let began = Instant::now();
            found.push(engine.search(data.query(query), *scopes).await?);
            latencies.push(began.elapsed().as_secs_f64() * 1e3);
        }
        let cpu = (cpu()? - before).as_secs_f64() * 1e3 / data.queries() as f64;
        let numbers = json!({
            "recall_at_10": round(recall(&found, truth)),
            "p50_ms": percentile(&latencies, 50), "p99_ms": percentile(&latencies, 99),
            "cpu_ms_per_query": round(cpu),
        });
        eprintln!("{} {name}: {numbers}", engine.name());
        match (*scopes, report.as_object_mut(), numbers) {
            (SCOPES, Some(report), Value::Object(numbers)) => report.extend(numbers),
            (_, _, mut numbers) => {
                numbers["filter"] = (*name).into();
                filtered.push(numbers);
            }
        }
    }
    report["filtered"] = filtered.into();
    report["rss_bytes"] = engine.memory_bytes().into();
    Ok(report)
}

fn round(number: f64) -> f64 {
    (number * 1e4).round() / 1e4
}

/// The part of the true nearest ones that was found.
pub fn recall(found: &[Vec<usize>], truth: &[Vec<usize>]) -> f64 {
    let hits: usize = found
        .iter()
        .zip(truth)
        .map(|(found, truth)| truth.iter().filter(|id| found.contains(id)).count())
        .sum();
    hits as f64 / truth.iter().map(Vec::len).sum::<usize>().max(1) as f64
}

/// Processor time of this process, all threads.
fn cpu() -> anyhow::Result<Duration> {
    let mut total = 0u64;
    for task in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        total += text
            .split(' ')
            .next()
            .and_then(|ns| ns.parse::<u64>().ok())
            .unwrap_or(0);
    }
    Ok(Duration::from_nanos(total))
}
