//! The memory service as a process of its own.

use aeterna_memory::{Config, Deps, SERVICE, SETTINGS, build};
use aeterna_rpc::AnyChannel;

fn main() -> std::process::ExitCode {
    aeterna_rpc::run(&[SETTINGS], &[SERVICE], Config::read, async |config, host| {
        let embedder = AnyChannel::remote(&config.embedding)?;
        let service = build(config, Deps::of(host, embedder)).await?;
        Ok(vec![host.stack.wrap(service.routes)])
    })
}
