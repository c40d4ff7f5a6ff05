//! Files that can be imported: exports, JSON lines of memories, dumps of mem0, and LoCoMo-form conversations.

mod jsonl;
mod locomo;
mod mem0;

use std::path::Path;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::Memory;
use anyhow::Context as _;

pub use jsonl::Lines;
pub use locomo::{Conversation, Question, conversations};

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

/// Opens a file. A memory that names no scope gets `scope`.
///
/// # Errors
/// When the file can't be read or is not of the format.
pub fn open(path: &Path, format: Format, scope: Option<&Scope>) -> anyhow::Result<Source> {
    let context = || format!("read `{}`", path.display());
    let format = match format {
        Format::Auto => guess(path).with_context(context)?,
        format => format,
    };
    let source = match format {
        Format::Locomo => locomo::source(path, scope),
        Format::Mem0 => mem0::source(path, scope),
        Format::Auto | Format::Export | Format::Jsonl => jsonl::source(path, scope),
    };
    source.with_context(context)
}

/// What a file is, by its beginning.
///
/// # Errors
/// When it can't be read.
pub fn guess(path: &Path) -> anyhow::Result<Format> {
    use std::io::Read as _;
    let mut head = Vec::new();
    std::fs::File::open(path)?.take(1 << 20).read_to_end(&mut head)?;
    let head = head.trim_ascii_start();
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let parsed = serde_json::from_slice::<serde_json::Value>(line).unwrap_or_default();
    let text = |key: &str| parsed.get(key).is_some_and(serde_json::Value::is_string);
    let has = |words: &[&str]| {
        words
            .iter()
            .any(|word| head.windows(word.len()).any(|part| part == word.as_bytes()))
    };
    Ok(
        if parsed.get("memory").is_some_and(serde_json::Value::is_object) || parsed.get("summary").is_some() {
            Format::Export
        } else if text("memory")
            || (has(&["\"memory\":"]) && !head.starts_with(b"{\"content\"") && has(&["\"user_id\"", "\"results\""]))
        {
            Format::Mem0
        } else if head.first() == Some(&b'[') {
            Format::Locomo
        } else {
            Format::Jsonl
        },
    )
}
