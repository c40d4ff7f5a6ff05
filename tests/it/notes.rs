//! Memories as tests write them.

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::{AddRequest, BatchAddRequest, Memory};

/// The place of a user.
pub fn user(name: &str) -> Option<Scope> {
    Some(Scope {
        user: name.into(),
        ..Default::default()
    })
}

/// A memory of a user, to be added.
pub fn item(name: &str, content: &str) -> AddRequest {
    AddRequest {
        memory: Some(Memory {
            scope: user(name),
            content: content.into(),
            ..Default::default()
        }),
        request_id: String::new(),
    }
}

/// Memories to be added at once.
pub fn together(requests: Vec<AddRequest>) -> BatchAddRequest {
    BatchAddRequest {
        requests,
        ..Default::default()
    }
}
