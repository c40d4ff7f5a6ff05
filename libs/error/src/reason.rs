//! The reasons with what a person needs to know about each; docs/errors.md is made from this table.

use aeterna_proto::errors::v1::Reason;
use tonic::Code;

/// What there is to know about a reason.
#[derive(Clone, Copy, Debug)]
pub struct ReasonInfo {
    /// The reason.
    pub reason: Reason,
    /// Its name in ErrorInfo.
    pub name: &'static str,
    /// The canonical code it comes with.
    pub code: Code,
    /// What happened.
    pub meaning: &'static str,
    /// What a caller can do.
    pub remedy: &'static str,
    /// An example.
    pub example: &'static str,
}

/// Every reason, in the order of its number; the first stands at index 0 and has number 1.
pub const REASONS: &[ReasonInfo] = &[
    ReasonInfo {
        reason: Reason::InvalidField,
        name: "INVALID_FIELD",
        code: Code::InvalidArgument,
        meaning: "one or more fields hold a value that is never valid",
        remedy: "correct the fields that BadRequest lists",
        example: "`top_k` is 5000 and the limit is 1000",
    },
    ReasonInfo {
        reason: Reason::InvalidPageToken,
        name: "INVALID_PAGE_TOKEN",
        code: Code::InvalidArgument,
        meaning: "the page token was changed, or belongs to another request",
        remedy: "send it with the same fields as the page before, or start again without it",
        example: "a token of List with `layers: [USER]` sent with `layers: [TEAM]`",
    },
    ReasonInfo {
        reason: Reason::NotFound,
        name: "NOT_FOUND",
        code: Code::NotFound,
        meaning: "there is no such resource, or the caller can't see it; the two are not told apart",
        remedy: "check the id and the scope that the token allows",
        example: "Get of an id that another tenant owns",
    },
    ReasonInfo {
        reason: Reason::EtagMismatch,
        name: "ETAG_MISMATCH",
        code: Code::Aborted,
        meaning: "somebody else changed the resource",
        remedy: "read it again, apply the change to what it is now, and send its etag",
        example: "Update with the etag of version 3 when version 4 is current",
    },
    ReasonInfo {
        reason: Reason::RequestIdReused,
        name: "REQUEST_ID_REUSED",
        code: Code::AlreadyExists,
        meaning: "the request_id was used before with another body",
        remedy: "use a new request_id for a new request",
        example: "Add with request_id `r-1` and other content than the first time",
    },
    ReasonInfo {
        reason: Reason::TokenMissing,
        name: "TOKEN_MISSING",
        code: Code::Unauthenticated,
        meaning: "no token was sent and this listener wants one",
        remedy: "send `authorization: Bearer <token>`; `aeterna token` makes one",
        example: "a call without `authorization` to a listener that is not standalone loopback",
    },
    ReasonInfo {
        reason: Reason::TokenInvalid,
        name: "TOKEN_INVALID",
        code: Code::Unauthenticated,
        meaning: "the token is malformed, expired, not yet valid, or signed by an unknown key; a stream ends with its token",
        remedy: "get a new token",
        example: "a token whose `exp` has passed",
    },
    ReasonInfo {
        reason: Reason::PermissionDenied,
        name: "PERMISSION_DENIED",
        code: Code::PermissionDenied,
        meaning: "the caller's role does not grant what the RPC needs",
        remedy: "use a token with the role that the message names",
        example: "a reader calls Add",
    },
    ReasonInfo {
        reason: Reason::ScopeDenied,
        name: "SCOPE_DENIED",
        code: Code::PermissionDenied,
        meaning: "the scope lies outside of what the caller's token is bound to",
        remedy: "name a scope within the token's, or leave the layer out",
        example: "a token bound to user `ann` asks for scope `user: bob`",
    },
    ReasonInfo {
        reason: Reason::RateLimited,
        name: "RATE_LIMITED",
        code: Code::ResourceExhausted,
        meaning: "too many requests at once or per second",
        remedy: "wait as long as RetryInfo says, then try again",
        example: "more concurrent requests than `limits.concurrent_requests`",
    },
    ReasonInfo {
        reason: Reason::MessageTooLarge,
        name: "MESSAGE_TOO_LARGE",
        code: Code::ResourceExhausted,
        meaning: "the message is larger than the limit",
        remedy: "send less at once",
        example: "a request of 9 MiB where `limits.message_bytes` is 8 MiB",
    },
    ReasonInfo {
        reason: Reason::DeadlineExceeded,
        name: "DEADLINE_EXCEEDED",
        code: Code::DeadlineExceeded,
        meaning: "the caller's deadline passed before the answer was ready",
        remedy: "allow more time; a write may have happened, so repeat it with the same request_id",
        example: "Search with a `grpc-timeout` of one millisecond",
    },
    ReasonInfo {
        reason: Reason::DependencyUnavailable,
        name: "DEPENDENCY_UNAVAILABLE",
        code: Code::Unavailable,
        meaning: "a dependency is away and the call has no degraded mode",
        remedy: "try again after the delay in RetryInfo, with the same request_id",
        example: "the relational store can't be opened",
    },
    ReasonInfo {
        reason: Reason::Draining,
        name: "DRAINING",
        code: Code::Unavailable,
        meaning: "the server is draining; another replica will answer",
        remedy: "try again at once",
        example: "a call that arrives after SIGTERM",
    },
    ReasonInfo {
        reason: Reason::NotConfigured,
        name: "NOT_CONFIGURED",
        code: Code::FailedPrecondition,
        meaning: "something must be configured first",
        remedy: "set what the message names",
        example: "Search with `rerank` and no `embedding.reranker_dir`",
    },
    ReasonInfo {
        reason: Reason::InvalidState,
        name: "INVALID_STATE",
        code: Code::FailedPrecondition,
        meaning: "the resource is in a state that does not allow the call",
        remedy: "read it again and see the message",
        example: "Update of a memory that is deleted",
    },
    ReasonInfo {
        reason: Reason::NotServed,
        name: "NOT_SERVED",
        code: Code::Unimplemented,
        meaning: "the option or RPC is part of the contract and not served by this version",
        remedy: "leave the option out, or use a newer version",
        example: "a call to ReasoningService",
    },
    ReasonInfo {
        reason: Reason::ModelNotFound,
        name: "MODEL_NOT_FOUND",
        code: Code::NotFound,
        meaning: "no embedding model of that name is loaded",
        remedy: "use one that the metadata lists",
        example: "Embed with `model: \"ada\"`",
    },
    ReasonInfo {
        reason: Reason::SchemaTooNew,
        name: "SCHEMA_TOO_NEW",
        code: Code::FailedPrecondition,
        meaning: "the store was written by a newer version",
        remedy: "run that version or a later one",
        example: "a schema of version 9 opened by a program that knows version 7",
    },
    ReasonInfo {
        reason: Reason::BudgetExhausted,
        name: "BUDGET_EXHAUSTED",
        code: Code::ResourceExhausted,
        meaning: "a budget of time, tokens, queries or money is used up",
        remedy: "raise the budget that the message names",
        example: "none yet: no RPC of this version has a budget",
    },
    ReasonInfo {
        reason: Reason::ResumeTooOld,
        name: "RESUME_TOO_OLD",
        code: Code::OutOfRange,
        meaning: "a resume token or offset is older than what is kept",
        remedy: "start again from the beginning",
        example: "none yet: this version keeps all changes",
    },
    ReasonInfo {
        reason: Reason::Internal,
        name: "INTERNAL",
        code: Code::Internal,
        meaning: "a defect or an unknown fault",
        remedy: "report it with the request id, which finds the cause in the log",
        example: "a row that can't be decoded",
    },
    ReasonInfo {
        reason: Reason::StorageFull,
        name: "STORAGE_FULL",
        code: Code::ResourceExhausted,
        meaning: "the disk or a quota is full; nothing of the call was kept",
        remedy: "free space, then repeat the call",
        example: "SQLite answers SQLITE_FULL",
    },
    ReasonInfo {
        reason: Reason::PolicyDenied,
        name: "POLICY_DENIED",
        code: Code::PermissionDenied,
        meaning: "a policy of the scope forbids the call",
        remedy: "see the policy that the metadata names",
        example: "a write rule that lets only admins write to the company layer",
    },
    ReasonInfo {
        reason: Reason::Cancelled,
        name: "CANCELLED",
        code: Code::Cancelled,
        meaning: "the caller or an operator cancelled the work",
        remedy: "start it again if it is still wanted",
        example: "a call that its caller gave up while another service worked on it",
    },
    ReasonInfo {
        reason: Reason::FellBehind,
        name: "FELL_BEHIND",
        code: Code::Aborted,
        meaning: "a reader of a stream was too slow for what is kept for it; nothing is lost",
        remedy: "begin again with the last resume token",
        example: "a Watch whose caller has not read for thousands of changes",
    },
];

/// What there is to know about a reason; an unknown one is internal.
pub fn info(reason: Reason) -> &'static ReasonInfo {
    let index = usize::try_from(reason as i32 - 1).unwrap_or(usize::MAX);
    REASONS.get(index).unwrap_or(&REASONS[Reason::Internal as usize - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_every_reason_of_the_contract_in_order() {
        for (index, row) in REASONS.iter().enumerate() {
            assert_eq!(row.reason as usize, index + 1, "{}", row.name);
            assert_eq!(row.reason.as_str_name(), format!("REASON_{}", row.name));
            assert_eq!(info(row.reason).name, row.name);
        }
        assert!(
            Reason::try_from(REASONS.len() as i32 + 1).is_err(),
            "a reason of the contract is not in the table"
        );
    }
}
