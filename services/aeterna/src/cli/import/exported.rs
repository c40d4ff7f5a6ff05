//! Importing what `aeterna export` has written, by the Import RPC: memories keep their ids, times, versions and vectors.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use aeterna_proto::memory::v1::{ExportedMemory, ImportRequest, ImportResponse, StreamSummary};
use aeterna_types::chain;
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::super::client::{Client, Patience, is_passing};
use super::super::output;
use super::explain;
use crate::import::Lines;
use crate::json;

/// Bytes of a line, at most: a memory with all its versions, as JSON.
const MAX_LINE: usize = 1 << 30;
/// Memories in one chunk, and its bytes, at most.
const CHUNK: usize = 200;
const CHUNK_BYTES: usize = 1 << 20;
/// Time that one stream may take.
const TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// A line of the file.
enum Line {
    Memory(Box<ExportedMemory>),
    Summary(StreamSummary),
}

/// `name` is what the user calls the file.
pub async fn run(client: &Client, path: &Path, name: &Path) -> anyhow::Result<ExitCode> {
    let context = || format!("import `{}`", name.display());
    let (count, summary) = check(path).with_context(context)?;
    let bar = ProgressBar::new(count);
    bar.set_style(ProgressStyle::with_template(
        "{bar:40} {percent:>3} %  {msg}  {elapsed}, {eta} to go",
    )?);
    let (mut patience, mut furthest) = (Patience::new(), 0);
    let answer = loop {
        let status = match send(client, path, &summary, &bar).await {
            Ok(answer) => break answer,
            Err(status) => status,
        };
        if bar.position() > furthest {
            furthest = bar.position();
            patience.progress();
        }
        // What was stored is passed over when the same stream is sent again; a server bounds the time of a stream, too.
        if !is_passing(&status) || !patience.wait(&bar).await {
            return Err(anyhow::Error::from(status).context("run the same command again to continue"))
                .with_context(context);
        }
    };
    bar.finish_and_clear();
    for error in answer.errors.iter().take(20) {
        output::note(format!(
            "refused: line {}: {}",
            error.index + 1,
            output::clean(&explain(error))
        ));
    }
    let (name, refused) = (name.display(), answer.refused);
    output::line(format!(
        "{name}: {} new, {} there already, {refused} refused",
        answer.created, answer.merged
    ));
    Ok(if refused == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn lines(path: &Path) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Line>> + use<>> {
    let lines = Lines::of(File::open(path)?, MAX_LINE)
        .filter(|line| !line.as_ref().is_ok_and(|(_, text)| text.trim_ascii().is_empty()));
    Ok(lines.map(|line| {
        let (number, bytes) = line?;
        let text = std::str::from_utf8(&bytes).with_context(|| format!("line {number} is not UTF-8"))?;
        let wrong = |why: String| anyhow::anyhow!("line {number}: {why}");
        if let Some(summary) = text
            .trim()
            .strip_prefix("{\"summary\":")
            .and_then(|rest| rest.strip_suffix('}'))
        {
            return json::from_json("aeterna.memory.v1.StreamSummary", summary)
                .map(Line::Summary)
                .map_err(wrong);
        }
        let memory = json::from_json("aeterna.memory.v1.ExportedMemory", text);
        memory.map(|memory| Line::Memory(Box::new(memory))).map_err(wrong)
    }))
}

/// Reads the file once: a file that was cut or changed is refused before anything is sent.
fn check(path: &Path) -> anyhow::Result<(u64, StreamSummary)> {
    let (mut count, mut digest) = (0i64, [0; 32]);
    let mut all = lines(path)?;
    while let Some(line) = all.next() {
        match line? {
            Line::Memory(memory) => {
                digest = chain(digest, &memory.encode_to_vec());
                count += 1;
            }
            Line::Summary(summary) => {
                let found = blake3::Hash::from_bytes(digest).to_hex().to_string();
                anyhow::ensure!(
                    (summary.count, summary.digest.as_str()) == (count, found.as_str()),
                    "the memories are not those of its summary: the file was changed"
                );
                anyhow::ensure!(
                    all.next().is_none(),
                    "something follows its summary: it has several exports; import each by itself"
                );
                return Ok((count.unsigned_abs(), summary));
            }
        }
    }
    anyhow::bail!("it has no summary in its last line: the file was cut off")
}

async fn send(
    client: &Client,
    path: &Path,
    summary: &StreamSummary,
    bar: &ProgressBar,
) -> Result<ImportResponse, tonic::Status> {
    let (sender, receiver) = mpsc::channel(4);
    let (path, last, progress) = (path.to_owned(), summary.clone(), bar.clone());
    progress.set_position(0);
    let reader = tokio::task::spawn_blocking(move || {
        let chunk = || ImportRequest {
            import_id: last.digest.clone(),
            ..Default::default()
        };
        let (mut under_way, mut bytes) = (chunk(), 0);
        for line in lines(&path)? {
            let Line::Memory(memory) = line? else { break };
            let size = memory.encoded_len();
            let full = under_way.memories.len() >= CHUNK || bytes + size > CHUNK_BYTES;
            if full && !under_way.memories.is_empty() {
                progress.inc(under_way.memories.len() as u64);
                // The server may have hung up; its answer says why.
                if sender
                    .blocking_send(std::mem::replace(&mut under_way, chunk()))
                    .is_err()
                {
                    return Ok(());
                }
                bytes = 0;
            }
            bytes += size;
            under_way.memories.push(*memory);
        }
        under_way.summary = Some(last.clone());
        let _ = sender.blocking_send(under_way);
        anyhow::Ok(())
    });
    let request = client.request_within(ReceiverStream::new(receiver), TIMEOUT);
    let answer = client.memory().import(request).await;
    let read = reader
        .await
        .map_err(|error| tonic::Status::internal(error.to_string()))?;
    read.map_err(|error| tonic::Status::internal(error.to_string()))?;
    Ok(answer?.into_inner())
}
