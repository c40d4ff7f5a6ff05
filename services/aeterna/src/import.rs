//! Files that can be imported: exports, JSON lines of memories, dumps of mem0, and LoCoMo-form conversations.

mod jsonl;
mod locomo;
mod mem0;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::Memory;
use tempfile::NamedTempFile;

pub use jsonl::Lines;
pub use locomo::{Conversation, Question, conversations};

/// The mark that some programs put before UTF-8.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// How a file is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// By what it begins with.
    Auto,
    /// What `aeterna export` has written.
    Export,
    /// One memory a line, as JSON: `{"content": "…", "scope": {"user": "ann"}, "tags": ["…"]}`.
    Jsonl,
    /// What mem0 answers or dumps: `{"results": [{"memory": "…", "user_id": "ann"}]}`, the list alone, or one a line.
    Mem0,
    /// A JSON list of conversations with `session_1`, `session_1_date_time`, … (LoCoMo).
    Locomo,
}

/// One item of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// Where in the file it stands, for a person.
    pub place: String,
    /// How much of the file it is; see [`Source::total`].
    pub weight: u64,
    /// The memory, or what is wrong with it.
    pub memory: Result<Memory, String>,
}

/// The items of a file.
pub struct Source {
    /// The sum of all weights.
    pub total: u64,
    /// In the order of the file; an item can fail to be read.
    pub items: Box<dyn Iterator<Item = anyhow::Result<Item>> + Send>,
}

/// A file that can be read from its beginning several times.
#[derive(Debug)]
pub struct Input {
    path: PathBuf,
    /// What came through a pipe, until it is no longer needed.
    _kept: Option<NamedTempFile>,
}

impl Input {
    /// The file at a path; `-` is standard input. What is no plain file is kept aside first.
    ///
    /// # Errors
    /// When it can't be read, or there is no room for what comes.
    pub fn of(path: &Path) -> anyhow::Result<Self> {
        let piped = path == Path::new("-");
        if !piped && std::fs::metadata(path)?.is_file() {
            return Ok(Self {
                path: path.to_owned(),
                _kept: None,
            });
        }
        let mut kept = NamedTempFile::new()?;
        if piped {
            io::copy(&mut io::stdin().lock(), &mut kept)?;
        } else {
            io::copy(&mut File::open(path)?, &mut kept)?;
        }
        Ok(Self {
            path: kept.path().to_owned(),
            _kept: Some(kept),
        })
    }

    /// Where it is read.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A text without the mark that some programs put before it.
fn unmarked(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Opens a file. A memory that names no scope gets `scope`.
///
/// # Errors
/// When the file can't be read or is not of the format.
pub fn open(path: &Path, format: Format, scope: Option<&Scope>) -> anyhow::Result<Source> {
    match format {
        Format::Auto => open(path, guess(path)?, scope),
        Format::Locomo => locomo::source(path, scope),
        Format::Mem0 => mem0::source(path, scope),
        Format::Export | Format::Jsonl => jsonl::source(path, scope),
    }
}

/// What a file is, by its beginning.
///
/// # Errors
/// When it can't be read.
pub fn guess(path: &Path) -> anyhow::Result<Format> {
    use std::io::Read as _;
    let mut head = Vec::new();
    File::open(path)?.take(1 << 20).read_to_end(&mut head)?;
    let head = head.strip_prefix(BOM).unwrap_or(&head).trim_ascii_start();
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let parsed = serde_json::from_slice::<serde_json::Value>(line).unwrap_or_default();
    let text = |key: &str| parsed.get(key).is_some_and(serde_json::Value::is_string);
    let has = |word: &str| head.windows(word.len()).any(|part| part == word.as_bytes());
    // The first memory of an export may be longer than what was read.
    let begins: Vec<u8> = head
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .take(11)
        .collect();
    let is_list = head.first() == Some(&b'[');
    let of_mem0 = ["\"user_id\"", "\"agent_id\"", "\"run_id\"", "\"results\""];
    Ok(if begins == b"{\"memory\":{" || parsed.get("summary").is_some() {
        Format::Export
    } else if text("memory")
        || is_list && has("\"memory\":") && !has("\"sample_id\"")
        || !is_list && has("\"memory\":") && !head.starts_with(b"{\"content\"") && of_mem0.into_iter().any(has)
    {
        Format::Mem0
    } else if is_list {
        Format::Locomo
    } else {
        Format::Jsonl
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_apart_by_how_they_begin() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let long = format!("{{\"memory\": {{\"content\": \"{}\"}}}}", "x".repeat(2 << 20));
        for (text, format) in [
            ("{\"content\": \"a\"}", Format::Jsonl),
            ("\u{feff}{\"content\": \"a\"}", Format::Jsonl),
            ("{\"memory\":{\"content\":\"a\"}}", Format::Export),
            (long.as_str(), Format::Export),
            ("[{\"memory\": \"a\", \"agent_id\": \"b\"}]", Format::Mem0),
            ("\u{feff}{\n \"results\": [{\"memory\": \"a\"}]}", Format::Mem0),
            ("{\"memory\": \"a\", \"run_id\": \"b\"}", Format::Mem0),
            (
                "[{\"sample_id\": \"c\", \"conversation\": {\"memory\": 1}}]",
                Format::Locomo,
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(guess(&path).unwrap(), format, "{}", &text[..text.len().min(60)]);
        }
    }
}
