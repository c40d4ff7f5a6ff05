//! Every service in one process.

use aeterna_embedding::{Config, Deps, SERVICE, SETTINGS, build};

fn main() -> std::process::ExitCode {
    aeterna_rpc::run(&[SETTINGS], &[SERVICE], Config::read, async |config, host| {
        Ok(vec![host.stack.wrap(build(config, Deps::of(host)).await?)])
    })
}
