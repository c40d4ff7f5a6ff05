//! Integration tests: one crate, one binary. Every call is made both in process and over the network.

#![allow(clippy::unwrap_used)] // helpers of tests are tests, which clippy.toml does not see

mod access;
mod cli;
mod clock;
mod crash;
mod docs;
mod embedding;
mod faults;
mod foreign;
mod hostile;
mod knowledge;
mod lab;
mod memory;
mod notes;
mod openai;
mod past;
mod policies;
mod postgres;
mod promises;
mod qdrant;
mod ranking;
mod readme;
mod reembed;
mod rerank;
mod rotation;
mod sandbox;
mod tenants;
mod tidy;
mod traces;
mod transfer;
mod watch;
