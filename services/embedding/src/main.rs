//! The embedding service as a process of its own.

use aeterna_embedding::{Config, Deps, SERVICE, SETTINGS, build};

fn main() -> std::process::ExitCode {
    aeterna_rpc::run(&[SETTINGS], &[SERVICE], Config::read, async |config, host| {
        let deps = Deps::of(host);
        Ok(vec![host.stack.wrap(build(config, deps).await?)])
    })
}
