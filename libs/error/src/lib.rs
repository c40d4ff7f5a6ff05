//! What can go wrong, as callers see it, and the only mapping to gRPC status.
//!
//! The public text and the private cause are two values: the text goes to the caller, the cause only into the log.

mod reason;
mod status;

pub use aeterna_proto::errors::v1::Reason;
pub use reason::{REASONS, ReasonInfo, info};
pub use status::{DOMAIN, from_status, is_answer, item_error};

use std::time::Duration;

/// A field that holds a value that is not valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, for instance `requests[3].memory.content`.
    pub field: String,
    /// What is wrong and what to send instead.
    pub description: String,
}

/// An error on its way to a caller.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    reason: Reason,
    message: String,
    metadata: Vec<(String, String)>,
    violations: Vec<Violation>,
    retry_after: Option<Duration>,
    #[source]
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with its public text: lower case, no full stop, what to do next.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            metadata: Vec::new(),
            violations: Vec::new(),
            retry_after: None,
            cause: None,
        }
    }

    /// A defect or unknown fault: the caller gets a request id, the log gets the cause.
    pub fn internal(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::new(
            Reason::Internal,
            "internal error; the request id finds the cause in the log",
        )
        .caused_by(cause)
    }

    /// Bad input in one field; [`Violations`] collects several.
    pub fn field(field: &str, description: impl Into<String>) -> Self {
        let description = description.into();
        let mut error = Self::new(Reason::InvalidField, format!("`{field}` {description}"));
        error.violations.push(Violation {
            field: field.into(),
            description,
        });
        error
    }

    /// Adds a machine-readable detail.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.push((key.into(), value.to_string()));
        self
    }

    /// Says when a retry may succeed.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// Keeps the private cause for the log.
    #[must_use]
    pub fn caused_by(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// Why.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The public text.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The public text with every private cause behind it, for the log.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }

    /// The fields at fault, for bad input.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }
}

/// Collects everything that is wrong with an input before refusing it.
#[derive(Debug, Default)]
pub struct Violations {
    found: Vec<Violation>,
    bytes: usize,
    more: usize,
    prefix: String,
}

/// Bytes of violations listed at most. They travel in a header, of which clients take 8 to 16 KiB; the others are counted.
const MAX_BYTES: usize = 3 << 10;

impl Violations {
    /// For fields below `prefix`, for instance `requests[3].`.
    pub fn below(prefix: impl Into<String>) -> Self {
        Self {
            prefix: prefix.into(),
            ..Self::default()
        }
    }

    /// Notes that `field` is wrong.
    pub fn add(&mut self, field: &str, description: impl Into<String>) {
        let violation = Violation {
            field: format!("{}{field}", self.prefix),
            description: description.into(),
        };
        self.bytes += violation.field.len() + violation.description.len();
        if self.bytes <= MAX_BYTES || self.found.is_empty() {
            self.found.push(violation);
        } else {
            self.more += 1;
        }
    }

    /// The value, or a note that `field` is wrong.
    pub fn check<T, E: ToString>(&mut self, field: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.add(field, error.to_string())).ok()
    }

    /// True when nothing was found.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// The error that lists everything found, or nothing.
    pub fn into_result(self) -> Result<(), Error> {
        let Some(first) = self.found.first() else { return Ok(()) };
        let more = match self.found.len() - 1 + self.more {
            0 => String::new(),
            n => format!(" (and {n} more)"),
        };
        let mut error = Error::new(
            Reason::InvalidField,
            format!("`{}` {}{more}", first.field, first.description),
        );
        error.violations = self.found;
        Err(error)
    }

    /// The value when nothing is wrong. A value can only be missing when a violation was noted for it.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Error> {
        self.into_result()?;
        value.ok_or_else(|| Error::internal("a value is missing without a violation"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_violations_are_listed_with_their_paths() {
        let mut violations = Violations::below("requests[3].");
        violations.add("memory.content", "is empty; send 1 to 65,536 bytes");
        violations.add("memory.tags[0]", "is empty");
        let error = violations.into_result().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`requests[3].memory.content` is empty; send 1 to 65,536 bytes (and 1 more)"
        );
        assert_eq!(error.violations().len(), 2);
    }

    #[test]
    fn a_flood_of_violations_is_bounded() {
        let mut violations = Violations::default();
        for i in 0..10_000 {
            violations.add(&format!("f[{i}]"), "is wrong");
        }
        let error = violations.into_result().unwrap_err();
        let bytes: usize = error
            .violations()
            .iter()
            .map(|v| v.field.len() + v.description.len())
            .sum();
        assert!(bytes <= MAX_BYTES && error.violations().len() > 50);
        assert!(error.to_string().ends_with("(and 9999 more)"), "{error}");
    }
}
