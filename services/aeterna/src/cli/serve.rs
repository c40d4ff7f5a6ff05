//! `aeterna serve`.

use aeterna_config::Sources;

use crate::compose::{self, Role};

/// What `serve` takes; every setting is a flag too.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The services to run in this process; all of them when it is left out
    #[arg(long, value_delimiter = ',', value_enum)]
    roles: Vec<Role>,
}

pub async fn run(args: Args, sources: &Sources) -> anyhow::Result<()> {
    let roles = match &args.roles[..] {
        [] => &Role::ALL,
        roles => roles,
    };
    let (_, host, services) = compose::load(sources, roles)?;
    let names = services.names();
    aeterna_rpc::serve(host, services, &names, compose::build)
        .await
        .map_err(anyhow::Error::msg)
}
