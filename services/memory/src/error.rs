//! What can go wrong, by what a caller can do about it.

use aeterna_error::{Error, Reason};

/// An error of the memory service.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// There is no such memory, or the caller can't see it.
    #[error("there is no memory `{0}` in the scopes that the token allows")]
    NotFound(String),
    /// The etag is not the current one.
    #[error("the memory was changed since; read it again and send its etag")]
    EtagMismatch,
    /// The request id was used with another body.
    #[error("`request_id` was used before with another body; use a new one")]
    RequestIdReused,
    /// The memory is deleted.
    #[error("the memory is deleted and can't be changed")]
    Deleted,
    /// Another memory of the scope has this content already.
    #[error("another memory of this scope has the same content and source")]
    Duplicate,
    /// A dependency failed.
    #[error(transparent)]
    Other(#[from] Error),
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        let reason = match error {
            MemoryError::NotFound(_) => Reason::NotFound,
            MemoryError::EtagMismatch => Reason::EtagMismatch,
            MemoryError::RequestIdReused => Reason::RequestIdReused,
            MemoryError::Deleted | MemoryError::Duplicate => Reason::InvalidState,
            MemoryError::Other(error) => return error,
        };
        Self::new(reason, error.to_string())
    }
}
