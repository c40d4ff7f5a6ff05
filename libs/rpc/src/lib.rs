//! What every service shares around its RPCs: the layer stack, channels to peers, health, reflection, serving, drain.
//!
//! The same stack stands in front of a service whether a call arrives over the network or from the same process.

mod channel;
mod context;
mod health;
mod host;
mod layers;
mod limits;
mod serve;

pub use channel::AnyChannel;
pub use context::RequestContext;
pub use health::{Dependency, Health};
pub use host::{Host, HostConfig, SETTINGS as HOST_SETTINGS, load, run, serve, sources, stop_on_signal};
pub use layers::{Stack, grpc_status};
pub use limits::{Limits, SETTINGS as LIMIT_SETTINGS};
pub use serve::{Server, http_routes, infrastructure};

/// Reads a process's settings.
pub use aeterna_config::Reader;
/// A router with services mounted and the stack in front.
pub use axum::Router;
