//! Files that can be imported: JSON lines of memories, and LoCoMo-form conversations.

mod jsonl;
mod locomo;

use std::path::Path;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::Memory;
use anyhow::Context as _;

pub use locomo::{Conversation, Question, conversations};

/// How a file is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// By its first character: `[` begins conversations, anything else JSON lines.
    Auto,
    /// One memory a line, as JSON: `{"content": "…", "scope": {"user": "ann"}, "tags": ["…"]}`.
    Jsonl,
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
        Format::Auto | Format::Jsonl => jsonl::source(path, scope),
    };
    source.with_context(context)
}

fn guess(path: &Path) -> anyhow::Result<Format> {
    use std::io::Read as _;
    let mut head = Vec::new();
    std::fs::File::open(path)?.take(64).read_to_end(&mut head)?;
    let first = head.iter().find(|byte| !byte.is_ascii_whitespace());
    Ok(if first == Some(&b'[') {
        Format::Locomo
    } else {
        Format::Jsonl
    })
}
