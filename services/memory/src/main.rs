//! The memory service as a process of its own.

use aeterna_memory::{Config, Deps, SERVICES, SETTINGS, build};
use aeterna_rpc::{AnyChannel, Command, Parts};

fn main() -> std::process::ExitCode {
    let command = Command::new("aeterna-memory").about("The memory service: remember and find");
    aeterna_rpc::run(command, &[SETTINGS], SERVICES, Config::read, async |config, host| {
        let embedder = AnyChannel::remote(&config.embedding)?;
        let service = build(config, Deps::of(host, embedder)).await?;
        Ok(Parts {
            routers: vec![host.stack.wrap(service.routes)],
            background: vec![service.background],
        })
    })
}
