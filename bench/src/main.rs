//! Benchmarks. Each takes its data and sizes by argument, measures real processes, and ends with one JSON object.

#![allow(clippy::print_stdout, clippy::print_stderr)] // this is a command line

mod memory;
mod retrieval;
mod search;
mod stats;

use clap::Parser;

/// Benchmarks of Aeterna; each ends with one JSON object on the last line.
#[derive(Debug, Parser)]
enum Bench {
    /// Evidence recall on LoCoMo-form conversations, through the public API of a fresh process
    Retrieval(retrieval::Args),
    /// Vector search: the funnel beside exact scans and a public HNSW library, on the same vectors
    Search(search::Args),
    /// Add and search end to end: throughput, latency, memory, growth
    Memory(memory::Args),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let report = match Bench::parse() {
        Bench::Retrieval(args) => retrieval::run(args).await?,
        Bench::Search(args) => search::run(args).await?,
        Bench::Memory(args) => memory::run(args).await?,
    };
    println!("{report}");
    Ok(())
}
