//! What every service shares around its RPCs: the layer stack, channels to peers, health, reflection, serving, drain.
//!
//! The same stack stands in front of a service whether a call arrives over the network or from the same process.

mod breaker;
mod channel;
mod context;
mod credentials;
mod expiry;
mod flags;
mod health;
mod host;
mod layers;
mod limits;
mod serve;
mod streams;

pub use breaker::Breaker;
pub use channel::AnyChannel;
pub use context::RequestContext;
pub use credentials::Credentials;
pub use flags::{sources, with_settings};
pub use health::{Dependency, Health};
pub use host::{Front, Host, HostConfig, Parts, SETTINGS as HOST_SETTINGS, load, run, serve, stop_on_signal};
pub use layers::{Stack, grpc_status};
pub use limits::{Limits, SETTINGS as LIMIT_SETTINGS};
pub use serve::{Server, http_routes, infrastructure};

/// Reads a process's settings.
pub use aeterna_config::Reader;
/// A router with services mounted and the stack in front.
pub use axum::Router;
/// A process's command line.
pub use clap::Command;

/// The allocator of every process that has services: a search allocates some hundred times on several threads, and the system's
/// allocator took an eighth of its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
