//! Errors to gRPC status and back.

use std::collections::HashMap;
use std::time::Duration;

use aeterna_proto::errors::v1::{FieldViolation, ItemError, Reason};
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{Error, Violation, info};

/// The domain of every ErrorInfo.
pub const DOMAIN: &str = "aeterna";

impl From<Error> for Status {
    /// The last place where the private cause is known, so it is logged here; the span has the request id.
    fn from(error: Error) -> Self {
        let reason = info(error.reason);
        if error.cause.is_some() {
            let chain = error.chain();
            match error.reason {
                Reason::Internal => tracing::error!(reason = reason.name, error = chain, "a call failed"),
                _ => tracing::warn!(reason = reason.name, error = chain, "a call failed"),
            }
        }
        let mut details = ErrorDetails::new();
        let metadata: HashMap<String, String> = error.metadata.into_iter().collect();
        details.set_error_info(reason.name, DOMAIN, metadata);
        if !error.violations.is_empty() {
            let violation = |v: Violation| tonic_types::FieldViolation::new(v.field, v.description);
            details.set_bad_request(error.violations.into_iter().map(violation).collect::<Vec<_>>());
        }
        if let Some(delay) = error.retry_after {
            details.set_retry_info(Some(delay));
        }
        let mut status = Self::with_error_details(reason.code, error.message, details);
        if let Some(cause) = error.cause {
            status.set_source(cause.into());
        }
        status
    }
}

/// True for what a service of ours answered; false when the transport made the status itself, for instance because the
/// connection broke in the middle of an answer, and nobody knows what became of the call.
pub fn is_answer(status: &Status) -> bool {
    status
        .get_error_details()
        .error_info()
        .is_some_and(|info| info.domain == DOMAIN)
}

/// The error behind a status that another service answered.
pub fn from_status(status: &Status) -> Error {
    let details = status.get_error_details();
    let by_name = details
        .error_info()
        .filter(|info| info.domain == DOMAIN)
        .and_then(|info| Reason::from_str_name(&format!("REASON_{}", info.reason)));
    let reason = by_name.unwrap_or(match status.code() {
        tonic::Code::DeadlineExceeded => Reason::DeadlineExceeded,
        tonic::Code::Unavailable => Reason::DependencyUnavailable,
        // What tonic's client answers when the deadline that it was given passes on its own side.
        tonic::Code::Cancelled if status.message() == "Timeout expired" => Reason::DeadlineExceeded,
        tonic::Code::Cancelled => Reason::Cancelled,
        _ => Reason::Internal,
    });
    let mut error = Error::new(reason, status.message());
    if let Some(info) = details.error_info() {
        error.metadata = info.metadata.clone().into_iter().collect();
    }
    if let Some(bad) = details.bad_request() {
        let violation = |v: &tonic_types::FieldViolation| Violation {
            field: v.field.clone(),
            description: v.description.clone(),
        };
        error.violations = bad.field_violations.iter().map(violation).collect();
    }
    error.retry_after = details.retry_info().and_then(|retry| retry.retry_delay);
    error
}

/// The error of one item of a batch.
pub fn item_error(error: &Error) -> ItemError {
    let violation = |v: &Violation| FieldViolation {
        field: v.field.clone(),
        description: v.description.clone(),
    };
    ItemError {
        code: info(error.reason).code as i32,
        reason: error.reason.into(),
        message: error.message.clone(),
        violations: error.violations.iter().map(violation).collect(),
        index: 0,
    }
}

impl Error {
    /// A refusal because a dependency is away; a retry helps.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Reason::DependencyUnavailable, message).retry_after(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Violations;

    #[test]
    fn a_status_carries_everything_and_comes_back_the_same() {
        let mut violations = Violations::default();
        violations.add("top_k", "is 5000; send 1 to 1000");
        let error = violations
            .into_result()
            .unwrap_err()
            .with("limit", 1000)
            .retry_after(Duration::from_secs(2));
        let status = Status::from(error);
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        let back = from_status(&status);
        assert_eq!(back.reason(), Reason::InvalidField);
        assert_eq!(back.violations()[0].field, "top_k");
        assert_eq!(back.metadata, [("limit".to_string(), "1000".to_string())]);
        assert_eq!(back.retry_after, Some(Duration::from_secs(2)));
        assert!(is_answer(&status) && !is_answer(&Status::internal("h2 protocol error")));
    }

    #[test]
    fn a_cause_never_reaches_the_caller() {
        let status = Status::from(Error::internal("password=hunter2"));
        assert_eq!(status.code(), tonic::Code::Internal);
        assert!(!format!("{:?}{:?}", status.message(), status.details()).contains("hunter2"));
    }
}
