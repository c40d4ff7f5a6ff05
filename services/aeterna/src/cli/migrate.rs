//! `aeterna migrate`.

use std::path::PathBuf;

use aeterna_config::Sources;
use aeterna_memory::{Moved, Stage};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};

use super::output;
use crate::compose;

/// What `migrate` takes; every setting is a flag too.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Stop the service first. An interrupted migration goes on when it is run again:
  aeterna migrate --from memory.db --memory.store postgres://aeterna@db1,db2,db3/aeterna --memory.store_owner aeterna_owner"
)]
pub struct Args {
    /// The SQLite file to move from, relative to the data directory
    #[arg(long, value_name = "FILE", default_value = "memory.db")]
    from: PathBuf,
}

pub async fn run(args: Args, sources: &Sources) -> anyhow::Result<()> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}")?);
    let tell = |stage: Stage, moved: &Moved| {
        let what = match stage {
            Stage::Moving => "moved",
            Stage::Comparing => "compared",
        };
        bar.set_message(format!("{} memories {what}", moved.memories));
        bar.tick();
    };
    let moved = compose::migrate(sources, &args.from, tell).await;
    bar.finish_and_clear();
    let moved = moved.with_context(|| format!("migrate `{}`", args.from.display()))?;
    let digest = aeterna_types::hexadecimal(&moved.digest);
    output::line(format!(
        "{} tenants: {} memories, {} documents, {} policies; both stores have the digest {digest}",
        moved.tenants, moved.memories, moved.documents, moved.policies
    ));
    Ok(())
}
