//! Integration tests: one crate, one binary. Every call is made both in process and over the network.

#![allow(clippy::unwrap_used)] // helpers of tests are tests, which clippy.toml does not see

mod access;
mod docs;
mod embedding;
mod memory;
mod sandbox;
mod tidy;
