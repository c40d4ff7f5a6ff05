//! Documents by path, with versions.

use aeterna_types::{Scope, Timestamp, mark};
use serde::{Deserialize, Serialize};

use super::Idempotency;

/// What a writer says of a document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Text {
    /// For a person.
    pub title: String,
    /// The text; empty where a document is listed.
    #[serde(skip)]
    pub content: String,
    /// IANA media type.
    pub media_type: String,
    /// Anything the caller keeps with it; an object.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Sorted, without duplicates.
    pub tags: Vec<String>,
    /// What the writer says about the change.
    pub comment: String,
}

/// One version of a document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Where it lives.
    pub scope: Scope,
    /// Its path there.
    pub path: String,
    /// What its writer said.
    pub text: Text,
    /// 1 for the first, one more with each write.
    pub version: i64,
    /// When the document was first written.
    pub created_at: Timestamp,
    /// When this version was written.
    pub updated_at: Timestamp,
    /// By whom.
    pub updated_by: String,
    /// When it was deleted.
    pub deleted_at: Option<Timestamp>,
}

impl Document {
    /// Opaque mark of this version.
    pub fn etag(&self) -> String {
        let times = [self.version, self.created_at.micros(), self.updated_at.micros()].map(i64::to_le_bytes);
        mark([self.path.as_bytes(), times.as_flattened()])
    }
}

/// What is to be done with a document.
#[derive(Clone, Debug)]
pub enum Edit {
    /// Write a version.
    Put(Box<Text>),
    /// Make an old version the newest one.
    Restore(i64),
    /// Hide it.
    Delete,
}

/// A change of one document, with what makes it safe.
#[derive(Clone, Debug)]
pub struct DocumentChange {
    /// Where it lives.
    pub scope: Scope,
    /// Its path.
    pub path: String,
    /// Only on this version.
    pub etag: Option<String>,
    /// What to do.
    pub edit: Edit,
    /// Makes a retry safe.
    pub idempotency: Option<Idempotency>,
}
