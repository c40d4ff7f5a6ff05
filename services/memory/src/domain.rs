//! What the service is about, without wire or storage.

mod document;
mod policy;

use aeterna_types::{Layer, MemoryId, RequestId, Scope, TenantId, Timestamp, fingerprint, mark};
use serde::{Deserialize, Serialize};

pub use document::{Document, DocumentChange, Edit, Text};
pub use policy::{Effective, Policy, Rules, Writers};

/// Importance of a memory whose writer did not say.
pub const DEFAULT_IMPORTANCE: f64 = 0.5;

/// Tags of a memory or a document, at most.
pub const MAX_TAGS: usize = 64;

/// The number under which the store knows a memory; smaller than its id, and never shown to a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub i64);

/// The number under which the store knows a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScopeKey(pub i64);

/// Position of a change in the outbox; later changes have higher ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Sequence(pub i64);

/// Where a memory came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Conversation or document.
    pub conversation: String,
    /// Position in it.
    pub sequence: Option<i64>,
    /// Who said it.
    pub speaker: String,
    /// Caption of an attachment.
    pub caption: String,
    /// The caller's own identifier.
    pub reference: String,
}

/// What a writer says about a memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Body {
    /// The text, verbatim.
    pub content: String,
    /// Anything the caller keeps with it; an object.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Sorted, without duplicates.
    pub tags: Vec<String>,
    /// 0 to 1.
    pub importance: f64,
    /// Where it came from.
    pub source: Source,
    /// When what it tells of happened.
    pub event_at: Option<Timestamp>,
    /// From when on it is true.
    pub valid_at: Option<Timestamp>,
    /// From when on it is no longer true.
    pub invalid_at: Option<Timestamp>,
    /// When it stops being shown.
    pub expires_at: Option<Timestamp>,
    /// The memory that replaces it.
    pub superseded_by: Option<MemoryId>,
}

impl Body {
    /// A body that says this and nothing else.
    pub fn of(content: String) -> Self {
        Self {
            content,
            metadata: serde_json::Map::new(),
            tags: Vec::new(),
            importance: DEFAULT_IMPORTANCE,
            source: Source::default(),
            event_at: None,
            valid_at: None,
            invalid_at: None,
            expires_at: None,
            superseded_by: None,
        }
    }

    /// How much speaks for its being right at a time, 0 to 1: 1, halved when something replaces it, halved when it was not
    /// true yet or is not any more.
    pub fn confidence(&self, at: Timestamp) -> f64 {
        let half = |doubtful: bool| if doubtful { 0.5 } else { 1.0 };
        half(self.superseded_by.is_some()) * half(!self.is_true(at))
    }

    /// True when a time lies within its validity.
    pub fn is_true(&self, at: Timestamp) -> bool {
        self.valid_at.is_none_or(|from| from <= at) && self.invalid_at.is_none_or(|to| to > at)
    }

    /// BLAKE3 of the content.
    pub fn content_hash(&self) -> [u8; 32] {
        *blake3::hash(self.content.as_bytes()).as_bytes()
    }

    /// What makes two memories of a scope the same: content and place in the source.
    pub fn identity(&self) -> [u8; 32] {
        let sequence = self.source.sequence.map(i64::to_le_bytes);
        fingerprint([
            self.content.as_bytes(),
            self.source.conversation.as_bytes(),
            sequence.as_ref().map_or(&[][..], |s| s.as_slice()),
            self.source.speaker.as_bytes(),
            self.source.caption.as_bytes(),
            self.source.reference.as_bytes(),
        ])
    }

    /// The text that the lexical arm indexes: date, speaker, content and caption.
    pub fn lexical_text(&self) -> String {
        let date = self.event_at.map(spoken_date).unwrap_or_default();
        format!("{date} {}", self.dense_text())
    }

    /// The text that is embedded: speaker, content and caption.
    pub fn dense_text(&self) -> String {
        let mut text = String::new();
        if !self.source.speaker.is_empty() {
            text = format!("{}: ", self.source.speaker);
        }
        text.push_str(&self.content);
        if !self.source.caption.is_empty() {
            text = format!("{text} [{}]", self.source.caption);
        }
        text
    }
}

/// `8 May 2023`, the words that people search with.
fn spoken_date(time: Timestamp) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let text = time.to_string();
    let mut parts = text.get(..10).unwrap_or_default().split('-');
    let (year, month, day) = (parts.next(), parts.next(), parts.next());
    let month = month
        .and_then(|m| m.parse::<usize>().ok())
        .and_then(|m| MONTHS.get(m.wrapping_sub(1)));
    match (year, month, day) {
        (Some(year), Some(month), Some(day)) => format!("{} {month} {year}", day.trim_start_matches('0')),
        _ => String::new(),
    }
}

/// A stored memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Its id.
    pub id: MemoryId,
    /// Where it lives.
    pub scope: Scope,
    /// What its writer said.
    pub body: Body,
    /// When the server took it in.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
    /// When it was deleted.
    pub deleted_at: Option<Timestamp>,
    /// 1 when added, one more with each change.
    pub version: i64,
    /// The model whose vector is stored; empty while that is pending.
    pub embedding_model: String,
}

impl Memory {
    /// The layer it lives in.
    pub fn layer(&self) -> Option<Layer> {
        self.scope.layer()
    }

    /// Opaque mark of this version.
    pub fn etag(&self) -> String {
        mark([self.id.as_bytes().as_slice(), &self.version.to_le_bytes()])
    }

    /// The memory without anything that its writers said: what may be kept of it after it was removed for good.
    pub fn redacted(&self) -> Self {
        let body = Body::of(String::new());
        Self { body, ..self.clone() }
    }

    /// Takes in what somebody else says of it: unites the tags, as far as a memory takes them, keeps the higher importance, and
    /// lives as long as the longer-lived of the two; without an expiry that is for good. True when anything has changed.
    pub fn absorb(&mut self, said: Body) -> bool {
        let body = &mut self.body;
        let mut tags = body.tags.clone();
        let new = said.tags.into_iter().filter(|tag| !body.tags.contains(tag));
        tags.extend(new.take(MAX_TAGS.saturating_sub(body.tags.len())));
        tags.sort();
        let importance = body.importance.max(said.importance);
        let expires_at = body.expires_at.zip(said.expires_at).map(|(old, new)| old.max(new));
        let changed = tags != body.tags || importance > body.importance || expires_at != body.expires_at;
        body.tags = tags;
        body.importance = importance;
        body.expires_at = expires_at;
        changed
    }

    /// True when it is shown at `now`.
    pub fn is_live(&self, now: Timestamp) -> bool {
        self.deleted_at.is_none() && self.body.expires_at.is_none_or(|expiry| expiry > now)
    }
}

/// What a caller sees: the scopes it stands in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The identifiers that are fixed.
    pub scope: Scope,
    /// A layer without an identifier shows nothing (the caller named its place), or everything (it named none, and sees
    /// all that its token allows).
    pub exact: bool,
}

impl View {
    /// True when what lives in `scope` is visible.
    pub fn sees(&self, scope: &Scope) -> bool {
        scope.layers().all(|(layer, id)| match self.scope.get(layer) {
            Some(own) => own == id,
            None => !self.exact,
        })
    }
}

/// Who writes, when, and under which request id.
#[derive(Clone, Debug)]
pub struct Writer {
    /// The tenant.
    pub tenant: TenantId,
    /// The token's subject, for history.
    pub subject: String,
    /// The time of the write.
    pub now: Timestamp,
}

/// The caller's id of a write with a digest of everything else in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idempotency {
    /// The id.
    pub request_id: RequestId,
    /// BLAKE3 of the RPC's name and body.
    pub digest: [u8; 32],
}

/// What became of an added memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It is new.
    Created,
    /// It was there.
    Merged,
}

/// What a change did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The memory was added.
    Added,
    /// It was changed.
    Updated,
    /// It was deleted.
    Deleted,
    /// It was removed for good.
    Purged,
    /// It expired.
    Expired,
    /// Its vector was made; nothing that a caller sees has changed.
    Embedded,
}

impl Kind {
    const NAMES: [(Self, &str); 6] = [
        (Self::Added, "added"),
        (Self::Updated, "updated"),
        (Self::Deleted, "deleted"),
        (Self::Purged, "purged"),
        (Self::Expired, "expired"),
        (Self::Embedded, "embedded"),
    ];

    /// Its name in stores.
    pub fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(kind, _)| *kind == self)
            .map_or("", |(_, name)| name)
    }

    /// From its name in stores.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(_, known)| *known == name)
            .map(|(kind, _)| *kind)
    }
}

/// One version of a memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Version {
    /// The memory as of then.
    pub memory: Memory,
    /// What was done.
    pub kind: Kind,
    /// When.
    pub changed_at: Timestamp,
    /// By whom: the subject of a token, or `system`.
    pub changed_by: String,
}

/// A committed change, as watchers are told of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Its place in the outbox.
    pub sequence: Sequence,
    /// Whose it is.
    pub tenant: TenantId,
    /// Where it lives, or lived.
    pub scope: Scope,
    /// What was done; never [`Kind::Embedded`].
    pub kind: Kind,
    /// When.
    pub committed_at: Timestamp,
    /// What it was done to.
    pub subject: Subject,
}

impl Change {
    /// About how many bytes it takes in memory.
    pub fn bytes(&self) -> usize {
        const REST: usize = 512;
        let said = match &self.subject {
            Subject::Memory(_, Some(memory)) => {
                let metadata = serde_json::to_string(&memory.body.metadata);
                memory.body.content.len() + metadata.map_or(0, |text| text.len())
            }
            _ => 0,
        };
        REST + said
    }
}

/// What was changed, as it was after the change.
#[derive(Clone, Debug, PartialEq)]
pub enum Subject {
    /// A memory; without itself after it was removed for good.
    Memory(MemoryId, Option<Box<Memory>>),
    /// A document, without its content.
    Document(Box<Document>),
    /// A policy; only its name after it was deleted.
    Policy(String, Option<Box<Policy>>),
}

/// What a write answered; kept with its request id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// The memory after the write.
    pub memory: Memory,
    /// For Add.
    pub outcome: Outcome,
    /// The change's place in the outbox.
    pub sequence: Sequence,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_indexed_as_people_say_them() {
        let time = Timestamp::from_micros(1_683_554_160_000_000).unwrap();
        assert_eq!(spoken_date(time), "8 May 2023");
    }
}
