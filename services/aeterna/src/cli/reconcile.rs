//! `aeterna reconcile`.

use std::process::ExitCode;

use aeterna_config::Sources;
use aeterna_memory::{Reconciled, Step};
use indicatif::{ProgressBar, ProgressStyle};

use super::output;
use crate::compose;

/// What `reconcile` takes; every setting is a flag too.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "With the settings of the memory service, on any machine that reaches its stores; services may run meanwhile, but not on
an embedded store. It may be interrupted and run again. It exits with 1 when something is not as it should be and was not mended:
  aeterna reconcile --memory.store postgres://aeterna@db1,db2,db3/aeterna --memory.index qdrant://q1,q2,q3/aeterna"
)]
pub struct Args {
    /// Only compare
    #[arg(long)]
    dry_run: bool,
}

pub async fn run(args: Args, sources: &Sources) -> anyhow::Result<ExitCode> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}")?);
    let tell = |step: Step, found: &Reconciled| {
        bar.set_message(match step {
            Step::Vectors => format!("{} memories compared with the index", found.memories),
            Step::Strays => format!(
                "{} memories compared; now what the index has beside them",
                found.memories
            ),
            Step::Mending => format!("{} differ", found.unlike + found.stray),
            Step::Streams => format!("{} entries of live streams compared", found.entries),
        });
        bar.tick();
    };
    let found = compose::reconcile(sources, args.dry_run, tell).await;
    bar.finish_and_clear();
    let found = found?;
    output::line(format!(
        "{} memories: {} were missing or different in the index, {} were there and in no store\n\
         {} entries of live streams: {} were missing or no changes",
        found.memories, found.unlike, found.stray, found.entries, found.untrue
    ));
    if found.left > 0 {
        let advice = if args.dry_run {
            "run it without --dry-run"
        } else {
            "run it again"
        };
        output::line(format!("{} are so still: {advice}", found.left));
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}
