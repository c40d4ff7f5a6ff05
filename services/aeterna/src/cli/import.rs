//! `aeterna import`.

mod exported;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::errors::v1::ItemError;
use aeterna_proto::memory::v1::batch_add_result::Result as ItemResult;
use aeterna_proto::memory::v1::{AddOutcome, AddRequest, BatchAddRequest, BatchAddResponse};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use tonic::Code;

use super::client::{Client, Patience, Remote, unless_stopped};
use super::{output, scope};
use crate::import::{Format, Input, Item, guess, open};

/// Memories in one call at most.
const BATCH_ITEMS: usize = 100;
/// Bytes in one call at most, well below what a server takes by default.
const BATCH_BYTES: usize = 2 << 20;
/// Time that one call may take.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Refusals that are printed one by one.
const SHOWN: u64 = 20;

/// What `import` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file, or `-` for standard input: what `export` wrote, one memory a line as JSON, a dump of mem0, or LoCoMo-form
    /// conversations
    file: PathBuf,
    /// How the file is laid out
    #[arg(long, value_enum, default_value = "auto")]
    format: Format,
    /// Where memories live that name no scope; conversations become sessions within it
    #[arg(long, value_name = "LAYER=ID,…", value_parser = scope::parse)]
    scope: Option<Scope>,
    #[command(flatten)]
    remote: Remote,
}

/// What became of the items so far.
#[derive(Debug, Default)]
struct Tally {
    created: u64,
    merged: u64,
    refused: u64,
}

pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let client = args.remote.client()?;
    let context = || format!("read `{}`", args.file.display());
    let input = Input::of(&args.file).with_context(context)?;
    let format = match args.format {
        Format::Auto => guess(input.path()).with_context(context)?,
        format => format,
    };
    if format == Format::Export {
        return exported::run(&client, input.path(), &args.file).await;
    }
    let source = open(input.path(), format, args.scope.as_ref()).with_context(context)?;
    let bar = ProgressBar::new(source.total);
    bar.set_style(ProgressStyle::with_template(
        "{bar:40} {percent:>3} %  {msg}  {elapsed}, {eta} to go",
    )?);
    let mut tally = Tally::default();
    let imported = unless_stopped(import(&client, source.items, &bar, &mut tally)).await;
    bar.finish_and_clear();
    let name = args.file.display();
    output::line(format!(
        "{name}: {} new, {} there already, {} refused",
        tally.created, tally.merged, tally.refused
    ));
    if let Err(error) = imported {
        output::note("run the same command again to continue: what is there already is not added twice");
        return Err(error);
    }
    Ok(if tally.refused == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn import(
    client: &Client,
    items: Box<dyn Iterator<Item = anyhow::Result<Item>> + Send>,
    bar: &ProgressBar,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let mut batch: Vec<(Item, AddRequest)> = Vec::new();
    let mut bytes = 0;
    for item in items {
        let item = item?;
        match &item.memory {
            Err(why) => {
                refuse(bar, tally, &item.place, why);
                bar.inc(item.weight);
            }
            Ok(memory) => {
                let request = AddRequest {
                    memory: Some(memory.clone()),
                    request_id: String::new(),
                };
                let size = request.encoded_len();
                let full = batch.len() >= BATCH_ITEMS || bytes + size > BATCH_BYTES;
                if full && !batch.is_empty() {
                    send(client, std::mem::take(&mut batch), bar, tally).await?;
                    bytes = 0;
                }
                bytes += size;
                batch.push((item, request));
            }
        }
    }
    if !batch.is_empty() {
        send(client, batch, bar, tally).await?;
    }
    Ok(())
}

async fn send(
    client: &Client,
    batch: Vec<(Item, AddRequest)>,
    bar: &ProgressBar,
    tally: &mut Tally,
) -> anyhow::Result<()> {
    let (items, requests): (Vec<Item>, Vec<AddRequest>) = batch.into_iter().unzip();
    let answer = patiently(
        client,
        &BatchAddRequest {
            requests,
            ..Default::default()
        },
        bar,
    )
    .await?;
    for (item, result) in items.iter().zip(answer.results) {
        match result.result {
            Some(ItemResult::Added(added)) if added.outcome() == AddOutcome::Merged => tally.merged += 1,
            Some(ItemResult::Added(_)) => tally.created += 1,
            Some(ItemResult::Error(error)) => refuse(bar, tally, &item.place, &explain(&error)),
            None => refuse(bar, tally, &item.place, "the server did not say what became of it"),
        }
        bar.inc(item.weight);
    }
    bar.set_message(format!("{} memories", tally.created + tally.merged));
    Ok(())
}

/// Sends a batch; while the server is away or busy, again. That is safe: what it stored already is merged.
async fn patiently(client: &Client, batch: &BatchAddRequest, bar: &ProgressBar) -> anyhow::Result<BatchAddResponse> {
    let mut patience = Patience::new();
    loop {
        let status = match client
            .memory()
            .batch_add(client.request_within(batch.clone(), TIMEOUT))
            .await
        {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => status,
        };
        let full = aeterna_error::from_status(&status).reason() == aeterna_error::Reason::StorageFull;
        let busy = matches!(
            status.code(),
            Code::Unavailable | Code::ResourceExhausted | Code::DeadlineExceeded
        ) && !full;
        let passing = busy || !aeterna_error::is_answer(&status);
        if !passing || !patience.wait(bar).await {
            return Err(status.into());
        }
    }
}

fn explain(error: &ItemError) -> String {
    // A violation's field begins with the item's place in the batch, which says nothing here.
    let field = |field: &str| field.split_once("].").map_or(field, |(_, rest)| rest).to_owned();
    match &error.violations[..] {
        [] => error.message.clone(),
        violations => {
            let listed = violations
                .iter()
                .map(|v| format!("`{}` {}", field(&v.field), v.description));
            listed.collect::<Vec<_>>().join("; ")
        }
    }
}

fn refuse(bar: &ProgressBar, tally: &mut Tally, place: &str, why: &str) {
    tally.refused += 1;
    let text = match tally.refused {
        n if n <= SHOWN => format!("refused: {}: {}", output::clean(place), output::clean(why)),
        n if n == SHOWN + 1 => "refused: and more".to_owned(),
        _ => return,
    };
    bar.suspend(|| output::note(text));
}
