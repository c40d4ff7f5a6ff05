//! `aeterna export`.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aeterna_proto::memory::v1::{ExportRequest, StreamSummary};
use aeterna_types::chain;
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use tonic::Code;

use super::client::{Client, Patience, Remote};
use super::output;
use super::scope::Standing;
use crate::json;

/// Time that one stream may take; the resume token carries on after it.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// What `export` takes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file to write: one memory a line as JSON, and the number of memories with their digest in the last line
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
        resume_token: String::new(),
    };
    // Whole or not at all: a half file would look like a small export.
    let draft = args.file.with_added_extension("part");
    let written = write(&client, request, &draft).await;
    let context = || format!("write `{}`", args.file.display());
    match written {
        Ok(summary) => {
            std::fs::rename(&draft, &args.file).with_context(context)?;
            output::line(format!("{}: {} memories", args.file.display(), summary.count));
            Ok(())
        }
        Err(error) => {
            let _ = std::fs::remove_file(&draft);
            Err(error).with_context(context)
        }
    }
}

async fn write(client: &Client, mut request: ExportRequest, path: &Path) -> anyhow::Result<StreamSummary> {
    let mut file = BufWriter::new(File::create(path)?);
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}")?);
    let (mut count, mut digest) = (0i64, [0u8; 32]);
    let mut patience = Patience::new();
    let summary = loop {
        let status = match stream(client, &mut request, &mut file, &mut count, &mut digest, &bar).await? {
            Ok(summary) => break summary,
            Err(status) => status,
        };
        let passing = matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded);
        if !passing || !patience.wait(&bar).await {
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
    file.into_inner()
        .map_err(std::io::IntoInnerError::into_error)?
        .sync_all()?;
    Ok(summary)
}

/// Writes what one stream brings, and remembers where the next one would go on.
async fn stream(
    client: &Client,
    request: &mut ExportRequest,
    file: &mut BufWriter<File>,
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
