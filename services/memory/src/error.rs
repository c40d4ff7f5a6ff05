//! What can go wrong, by what a caller can do about it.

use aeterna_error::{Error, Reason};

use crate::store::StorageError;

/// An error of the memory service.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// There is no such memory, or the caller can't see it.
    #[error("there is no memory `{0}` in the scopes that the token allows")]
    NotFound(String),
    /// There is no such document, or the caller can't see it.
    #[error("there is no document `{0}` in this scope")]
    NoDocument(String),
    /// A document has no such version.
    #[error("the document has no version {0}; ListDocumentVersions has the numbers")]
    NoVersion(i64),
    /// There is no such policy.
    #[error("there is no policy `{0}`; ListPolicies has the names")]
    NoPolicy(String),
    /// A policy forbids it.
    #[error("the policy `{policy}` forbids this: {why}")]
    Forbidden {
        /// Its name.
        policy: String,
        /// What it says.
        why: String,
    },
    /// The etag is not the current one.
    #[error("it was changed since; read it again and send its etag")]
    EtagMismatch,
    /// What the change was made of is not the current version, since it was read where that is not known yet.
    #[error("it was changed since it was read; try again")]
    Stale,
    /// The request id was used with another body.
    #[error("`request_id` was used before with another body; use a new one")]
    RequestIdReused,
    /// The memory is deleted.
    #[error("it is deleted and can't be changed")]
    Deleted,
    /// Another memory of the scope has this content already.
    #[error("another memory of this scope has the same content and source")]
    Duplicate,
    /// The versions of a memory are more than a message takes.
    #[error(
        "the versions of the memory {id} have {bytes} bytes, and `limits.message_bytes` is {limit}; export without history, or \
         raise the limit"
    )]
    TooManyVersions {
        /// The memory.
        id: String,
        /// What they have.
        bytes: i64,
        /// What they may have.
        limit: usize,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StorageError),
    /// A dependency failed.
    #[error(transparent)]
    Other(#[from] Error),
}

impl MemoryError {
    /// True when something failed, and the caller was not merely refused.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Store(_) | Self::Other(_))
    }
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        let reason = match error {
            MemoryError::NotFound(_)
            | MemoryError::NoDocument(_)
            | MemoryError::NoVersion(_)
            | MemoryError::NoPolicy(_) => Reason::NotFound,
            MemoryError::Forbidden { ref policy, .. } => {
                return Self::new(Reason::PolicyDenied, error.to_string()).with("policy", policy);
            }
            MemoryError::TooManyVersions { limit, .. } => {
                return Self::new(Reason::MessageTooLarge, error.to_string()).with("limit", limit);
            }
            MemoryError::EtagMismatch | MemoryError::Stale => Reason::EtagMismatch,
            MemoryError::RequestIdReused => Reason::RequestIdReused,
            MemoryError::Deleted | MemoryError::Duplicate => Reason::InvalidState,
            MemoryError::Store(error) => return error.into(),
            MemoryError::Other(error) => return error,
        };
        Self::new(reason, error.to_string())
    }
}
