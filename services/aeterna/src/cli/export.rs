//! `aeterna export`.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aeterna_proto::memory::v1::{ExportRequest, StreamSummary};
use aeterna_types::chain;
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;

use super::client::{Client, Patience, Remote, is_passing, unless_stopped};
use super::output;
use super::scope::Standing;
use crate::json;

/// Time that one stream may take; the resume token carries on after it.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// What `export` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file to write, or `-` for standard output: one memory a line as JSON, and the number of memories with their digest in
    /// the last line
    file: PathBuf,
    #[command(flatten)]
    standing: Standing,
    /// Only memories that satisfy it, for instance `tags:travel AND importance >= 0.5`
    #[arg(long, default_value = "")]
    filter: String,
    /// Also deleted memories, and the versions of all
    #[arg(long)]
    history: bool,
    /// Also embeddings, so that an import into a server with the same model calls none
    #[arg(long)]
    embeddings: bool,
    #[command(flatten)]
    remote: Remote,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = args.remote.client()?;
    let request = ExportRequest {
        scope: args.standing.scope,
        filter: args.filter,
        include_history: args.history,
        include_embeddings: args.embeddings,
        ..Default::default()
    };
    let context = || format!("write `{}`", args.file.display());
    if args.file == Path::new("-") {
        let summary = write(&client, request, &mut std::io::stdout())
            .await
            .with_context(context)?;
        output::note(format!("{} memories", summary.count));
        return Ok(());
    }
    // Whole or not at all: a half file would look like a small export.
    let place = match args.file.parent() {
        Some(place) if place != Path::new("") => place,
        _ => Path::new("."),
    };
    let permissions = std::fs::Permissions::from_mode(0o666);
    let draft = tempfile::Builder::new()
        .prefix(".export-")
        .permissions(permissions)
        .tempfile_in(place);
    let mut draft = draft.with_context(context)?;
    let written = unless_stopped(write(&client, request, draft.as_file_mut())).await;
    let summary = written.with_context(context)?;
    draft.as_file().sync_all().with_context(context)?;
    draft.persist(&args.file).with_context(context)?;
    File::open(place)
        .and_then(|place| place.sync_all())
        .with_context(context)?;
    output::line(format!("{}: {} memories", args.file.display(), summary.count));
    Ok(())
}

async fn write(
    client: &Client,
    mut request: ExportRequest,
    to: &mut (dyn Write + Send),
) -> anyhow::Result<StreamSummary> {
    let mut file = BufWriter::new(to);
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}")?);
    let (mut count, mut digest) = (0i64, [0u8; 32]);
    let mut patience = Patience::new();
    let summary = loop {
        let before = count;
        let status = match stream(client, &mut request, &mut file, &mut count, &mut digest, &bar).await? {
            Ok(summary) => break summary,
            Err(status) => status,
        };
        if count > before {
            patience.progress();
        }
        if !is_passing(&status) || !patience.wait(&bar).await {
            return Err(status.into());
        }
    };
    bar.finish_and_clear();
    let arrived = blake3::Hash::from_bytes(digest).to_hex().to_string();
    anyhow::ensure!(
        (summary.count, summary.digest.as_str()) == (count, arrived.as_str()),
        "what has arrived is not what the server has sent; export again"
    );
    let end = json::to_line("aeterna.memory.v1.StreamSummary", &summary)?;
    writeln!(file, "{{\"summary\": {end}}}")?;
    file.flush()?;
    Ok(summary)
}

/// Writes what one stream brings, and remembers where the next one would go on.
async fn stream(
    client: &Client,
    request: &mut ExportRequest,
    file: &mut (dyn Write + Send),
    count: &mut i64,
    digest: &mut [u8; 32],
    bar: &ProgressBar,
) -> anyhow::Result<Result<StreamSummary, tonic::Status>> {
    let mut chunks = match client
        .memory()
        .export(client.request_within(request.clone(), TIMEOUT))
        .await
    {
        Ok(chunks) => chunks.into_inner(),
        Err(status) => return Ok(Err(status)),
    };
    loop {
        let chunk = match chunks.message().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return Ok(Err(tonic::Status::unavailable("the stream ended before its summary"))),
            Err(status) => return Ok(Err(status)),
        };
        for memory in &chunk.memories {
            writeln!(file, "{}", json::to_line("aeterna.memory.v1.ExportedMemory", memory)?)?;
            *digest = chain(*digest, &memory.encode_to_vec());
            *count += 1;
        }
        bar.set_message(format!("{count} memories"));
        if let Some(summary) = chunk.summary {
            return Ok(Ok(summary));
        }
        request.resume_token = chunk.resume_token;
    }
}
