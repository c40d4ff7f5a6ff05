//! The command line: `serve`, and what a person does with a running server.

mod client;
mod config;
mod delete;
mod export;
mod get;
mod history;
mod import;
mod list;
mod migrate;
mod models;
mod output;
mod reconcile;
mod scope;
mod search;
mod serve;
mod stats;
mod token;
mod watch;
mod write;

use std::process::ExitCode;

use aeterna_config::Sources;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::compose::tables;

/// Shared long-term memory for AI agents and the teams around them.
#[derive(Debug, Parser)]
#[command(name = "aeterna", version, arg_required_else_help = true, after_help = AFTER)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const AFTER: &str = "Begin with `aeterna serve`, then in another terminal:
  aeterna add \"Ann adopted a grey cat\" --scope user=ann
  aeterna search \"who has a pet?\" --scope user=ann";

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the services, all of them in one process or only some
    Serve(serve::Args),
    /// Remember something
    Add(write::Args),
    /// Find what answers a query best
    Search(search::Args),
    /// Show one memory
    Get(get::Args),
    /// List memories, newest first
    List(list::Args),
    /// Delete memories by id; they stay readable with `get --deleted`
    Delete(delete::Args),
    /// Show the versions of one memory, newest first
    History(history::Args),
    /// Show changes as they happen
    Watch(watch::Args),
    /// Count what there is
    Stats(stats::Args),
    /// Write memories to a file that `import` takes
    Export(export::Args),
    /// Take in a file of memories or conversations; run it again to continue where it stopped
    Import(import::Args),
    /// Move everything from a SQLite file into the store of the settings, as it was
    Migrate(migrate::Args),
    /// Compare the vector index and the live streams with the store, and mend them
    Reconcile(reconcile::Args),
    /// Embedding models: list the server's, or install one
    #[command(subcommand)]
    Models(models::Verb),
    /// Check the configuration, or print what is in force and where it came from
    #[command(subcommand)]
    Config(config::Verb),
    /// Sign a token for a caller, with the secret that the server uses
    Token(token::Args),
}

/// The subcommands that read settings, and so have a flag for each.
const WITH_SETTINGS: [&[&str]; 7] = [
    &["serve"],
    &["migrate"],
    &["reconcile"],
    &["config", "check"],
    &["config", "dump"],
    &["models", "fetch"],
    &["token"],
];

fn command() -> clap::Command {
    WITH_SETTINGS
        .iter()
        .fold(Cli::command(), |command, path| with_settings(command, path))
}

fn with_settings(command: clap::Command, path: &[&str]) -> clap::Command {
    match path.split_first() {
        Some((first, rest)) => command.mut_subcommand(first, |inner| with_settings(inner, rest)),
        None => aeterna_rpc::with_settings(command, &tables()),
    }
}

/// The settings' sources from the innermost subcommand.
fn sources(matches: &ArgMatches) -> Sources {
    match matches.subcommand() {
        Some((_, inner)) => sources(inner),
        None => aeterna_rpc::sources(matches, &tables()),
    }
}

/// Runs what the command line says.
pub fn run() -> ExitCode {
    let matches = command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(dispatch(cli.verb, &matches)));
    outcome.unwrap_or_else(|error| {
        output::error(&error);
        ExitCode::FAILURE
    })
}

async fn dispatch(verb: Verb, matches: &ArgMatches) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Serve(args) => serve::run(args, &sources(matches)).await?,
        Verb::Add(args) => write::run(args).await?,
        Verb::Search(args) => search::run(args).await?,
        Verb::Get(args) => get::run(args).await?,
        Verb::List(args) => list::run(args).await?,
        Verb::Delete(args) => return delete::run(args).await,
        Verb::History(args) => history::run(args).await?,
        Verb::Watch(args) => watch::run(args).await?,
        Verb::Stats(args) => stats::run(args).await?,
        Verb::Export(args) => export::run(args).await?,
        Verb::Import(args) => return import::run(args).await,
        Verb::Migrate(args) => migrate::run(args, &sources(matches)).await?,
        Verb::Reconcile(args) => return reconcile::run(args, &sources(matches)).await,
        Verb::Models(models::Verb::List(args)) => models::list(args).await?,
        Verb::Models(models::Verb::Fetch(args)) => models::fetch(&args, &sources(matches))?,
        Verb::Config(verb) => config::run(&verb, &sources(matches))?,
        Verb::Token(args) => token::run(&args, &sources(matches))?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn settings_are_flags_where_they_are_read() {
        let line = [
            "aeterna",
            "serve",
            "--roles",
            "memory",
            "--listen",
            "127.0.0.1:1",
            "--memory.readers=2",
        ];
        let matches = command().try_get_matches_from(line).unwrap();
        let flags = sources(&matches).flags;
        assert!(
            flags.contains(&("server.listen".into(), "127.0.0.1:1".into())),
            "{flags:?}"
        );
        assert!(flags.contains(&("memory.readers".into(), "2".into())), "{flags:?}");
    }
}
