//! `aeterna config`.

use aeterna_config::Sources;

use super::output;
use crate::compose::{self, Role};

/// What can be done with a configuration.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Say everything that is wrong with it, or that nothing is
    Check,
    /// Print what is in force, with where each value came from; secrets print as stars
    Dump,
}

pub fn run(verb: &Verb, sources: &Sources) -> anyhow::Result<()> {
    let (settings, host, _) = compose::load(sources, &Role::ALL)?;
    match verb {
        Verb::Check => {
            host.verifier()?;
            output::line("the configuration is valid");
        }
        Verb::Dump => output::line(settings.dump().trim_end()),
    }
    Ok(())
}
