//! The embedding service as a process of its own.

use aeterna_embedding::{Config, Deps, SERVICE, SETTINGS, build};
use aeterna_rpc::{Command, Parts};

fn main() -> std::process::ExitCode {
    let command = Command::new("aeterna-embedding").about("The embedding service: text to vectors");
    aeterna_rpc::run(command, &[SETTINGS], &[SERVICE], Config::read, async |config, host| {
        let routes = build(config, Deps::of(host)).await?;
        Ok(Parts {
            routers: vec![host.stack.wrap(routes)],
            background: Vec::new(),
        })
    })
}
