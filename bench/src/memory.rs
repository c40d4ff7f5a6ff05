//! Add and search end to end over gRPC, on a real process with embedded stores and the `hash` model: throughput, latency and
//! memory, and how they grow with the number of memories.
//!
//! Texts are 8 to 40 words of a vocabulary of 50,000 whose frequencies follow Zipf's law; queries are 3 to 6 words of a text
//! that was added, so that there is something to find.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{AddRequest, BatchAddRequest, Memory, SearchRequest};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::Program;
use anyhow::Context as _;
use serde_json::{Value, json};

use crate::stats::{Rng, milliseconds, percentile};

/// What `memory` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Memories
    #[arg(long, default_value_t = 100_000)]
    n: usize,
    /// Callers at the same time
    #[arg(long, default_value_t = 16)]
    concurrency: usize,
    /// Searches per measurement
    #[arg(long, default_value_t = 2_000)]
    searches: usize,
    /// The `aeterna` binary to measure
    #[arg(long)]
    server: PathBuf,
}

/// Memories in one call.
const BATCH: usize = 200;
/// Single adds that are measured while searches run.
const SINGLE_ADDS: usize = 500;
const VOCABULARY: usize = 50_000;

/// A word by its rank; the same rank is always the same word.
fn word(rank: usize) -> String {
    const SYLLABLES: [&str; 16] = [
        "ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu", "da", "fe", "gi", "ho", "ju", "pa",
    ];
    let mut text = String::new();
    let mut rest = rank + 16;
    while rest > 0 {
        text.push_str(SYLLABLES[rest % 16]);
        rest /= 16;
    }
    text
}

/// A rank with a frequency near 1 / rank.
fn zipf(rng: &mut Rng) -> usize {
    let top = (VOCABULARY as f64).ln();
    ((rng.unit() * top).exp() as usize).clamp(1, VOCABULARY) - 1
}

/// The text of the memory with this number.
fn text(number: usize) -> String {
    let mut rng = Rng::new(number as u64);
    let length = 8 + rng.below(33);
    let words: Vec<String> = (0..length).map(|_| word(zipf(&mut rng))).collect();
    format!("{} #{number}", words.join(" "))
}

fn query(rng: &mut Rng, n: usize) -> String {
    let text = text(rng.below(n));
    let words: Vec<&str> = text.split(' ').collect();
    let start = rng.below(words.len().saturating_sub(6).max(1));
    words[start..(start + 3 + rng.below(4)).min(words.len())].join(" ")
}

fn scope() -> Option<Scope> {
    Some(Scope {
        project: "bench".into(),
        ..Default::default()
    })
}

fn item(content: String) -> AddRequest {
    AddRequest {
        memory: Some(Memory {
            scope: scope(),
            content,
            ..Default::default()
        }),
        request_id: String::new(),
    }
}

type Client = MemoryServiceClient<AnyChannel>;

pub async fn run(args: Args) -> anyhow::Result<Value> {
    let data = tempfile::tempdir()?;
    let flags = [
        "serve",
        "--embedding.model_dirs",
        "",
        "--embedding.default_model",
        "hash",
        "--log.filter",
        "error",
    ];
    let server = Program::start(&args.server, &flags, data.path()).await;
    let report = measure(&args, &server).await;
    server.stop().await;
    report
}

async fn measure(args: &Args, server: &Program) -> anyhow::Result<Value> {
    let mut growth = Vec::new();
    let mut done = 0;
    let points = [args.n / 100, args.n / 10, args.n];
    for n in points.into_iter().filter(|n| *n > 0) {
        let added = n - done;
        let took = fill(args, server, done, n).await?;
        done = n;
        let (searches, adds) = mixed(args, server, n).await?;
        let point = json!({
            "n": n,
            "add_per_s": (added as f64 / took.as_secs_f64()).round(),
            "add_p99_ms": percentile(&adds, 99),
            "search_p50_ms": percentile(&searches, 50),
            "search_p99_ms": percentile(&searches, 99),
            "rss_bytes": server.resident_memory(),
        });
        eprintln!("{point}");
        growth.push(point);
    }
    let mut report = growth.last().cloned().context("there is a measurement")?;
    report["bench"] = "memory".into();
    report["growth"] = growth.into();
    Ok(report)
}

/// Adds the memories from `from` to `to` in batches, with all callers.
async fn fill(args: &Args, server: &Program, from: usize, to: usize) -> anyhow::Result<Duration> {
    let next = Arc::new(AtomicUsize::new(from));
    let began = Instant::now();
    let callers: Vec<_> = (0..args.concurrency)
        .map(|_| {
            let (next, mut client) = (Arc::clone(&next), MemoryServiceClient::new(server.channel()));
            tokio::spawn(async move {
                loop {
                    let start = next.fetch_add(BATCH, Ordering::Relaxed);
                    if start >= to {
                        return anyhow::Ok(());
                    }
                    let requests = (start..(start + BATCH).min(to))
                        .map(|number| item(text(number)))
                        .collect();
                    client
                        .batch_add(BatchAddRequest {
                            requests,
                            ..Default::default()
                        })
                        .await?;
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await??;
    }
    Ok(began.elapsed())
}

/// Searches by all callers but one, which adds meanwhile: latencies of both, in milliseconds.
async fn mixed(args: &Args, server: &Program, n: usize) -> anyhow::Result<(Vec<f64>, Vec<f64>)> {
    let (left, ended) = (
        Arc::new(AtomicUsize::new(args.searches)),
        Arc::new(AtomicBool::new(false)),
    );
    let searchers: Vec<_> = (1..args.concurrency.max(2))
        .map(|seed| {
            let (left, client) = (Arc::clone(&left), MemoryServiceClient::new(server.channel()));
            tokio::spawn(search(client, left, n, seed as u64))
        })
        .collect();
    let adder = {
        let (ended, mut client): (_, Client) = (Arc::clone(&ended), MemoryServiceClient::new(server.channel()));
        tokio::spawn(async move {
            let mut latencies = Vec::new();
            for number in 0..SINGLE_ADDS {
                if ended.load(Ordering::Relaxed) {
                    break;
                }
                let began = Instant::now();
                client.add(item(format!("{} at {n}", text(n + number)))).await?;
                latencies.push(milliseconds(began));
            }
            anyhow::Ok(latencies)
        })
    };
    let mut latencies = Vec::new();
    for searcher in searchers {
        latencies.extend(searcher.await??);
    }
    ended.store(true, Ordering::Relaxed);
    Ok((latencies, adder.await??))
}

async fn search(mut client: Client, left: Arc<AtomicUsize>, n: usize, seed: u64) -> anyhow::Result<Vec<f64>> {
    let mut rng = Rng::new(seed << 32);
    let mut latencies = Vec::new();
    while left
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
        .is_ok()
    {
        let request = SearchRequest {
            scope: scope(),
            query: query(&mut rng, n),
            ..Default::default()
        };
        let began = Instant::now();
        let found = client.search(request).await?.into_inner();
        latencies.push(milliseconds(began));
        anyhow::ensure!(
            !found.degraded && !found.results.is_empty(),
            "a search found nothing or was degraded"
        );
    }
    Ok(latencies)
}
