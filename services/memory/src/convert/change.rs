//! Deletion, history, watching and counts on the wire.

use std::sync::Arc;

use aeterna_error::{Error, Violations};
use aeterna_proto::errors::v1::ItemError;
use aeterna_proto::memory::v1 as wire;
use aeterna_types::{MemoryId, PageToken, Scope, TenantId};
use prost::Message as _;

use super::{
    batch_size, check_token, consistency_token, cursor, filter, id, idempotency, layers, memory, page_limit, scope,
    sequence, value,
};
use crate::app::{Deletion, News, Stats, Versions, WatchQuery};
use crate::domain::{Change, Kind, Sequence, Subject, Version, Written};

/// One memory to delete; `prefix` is the path of the request in a batch.
pub fn delete_request(mut request: wire::DeleteRequest, prefix: &str) -> Result<Deletion, Error> {
    let mut violations = Violations::below(prefix);
    let request_id = std::mem::take(&mut request.request_id);
    let idempotency = idempotency(&mut violations, "Delete", &request_id, &request.encode_to_vec());
    let id = id(&mut violations, "id", &request.id);
    violations.finish(id.map(|id| Deletion {
        id,
        etag: Some(request.etag).filter(|etag| !etag.is_empty()),
        purge: request.purge,
        idempotency,
    }))
}

/// The answer to Delete; what was removed for good is not repeated.
pub fn delete_response(written: Written) -> wire::DeleteResponse {
    let purged = written.memory.body.content.is_empty();
    wire::DeleteResponse {
        consistency_token: consistency_token(written.sequence),
        memory: (!purged).then(|| memory(written.memory)),
    }
}

/// The items of a batch, each with its own verdict.
pub fn batch_delete_request(request: wire::BatchDeleteRequest) -> Result<Vec<Result<Deletion, Error>>, Error> {
    batch_size(request.requests.len())?;
    let item = |(index, item)| delete_request(item, &format!("requests[{index}]."));
    Ok(request.requests.into_iter().enumerate().map(item).collect())
}

/// The answer to BatchDelete.
pub fn batch_delete_response(
    results: Vec<Result<Written, Error>>,
    refused: impl Fn(&Error) -> ItemError,
) -> wire::BatchDeleteResponse {
    use wire::batch_delete_result::Result as Item;
    let last = results.iter().flatten().map(|written| written.sequence).max();
    let item = |result| wire::BatchDeleteResult {
        result: Some(match result {
            Ok(written) => Item::Deleted(delete_response(written)),
            Err(error) => Item::Error(refused(&error)),
        }),
    };
    wire::BatchDeleteResponse {
        results: results.into_iter().map(item).collect(),
        consistency_token: consistency_token(last.unwrap_or_default()),
    }
}

/// What History asks for.
#[derive(Clone, Debug)]
pub struct HistoryQuery {
    /// The memory.
    pub id: MemoryId,
    /// Versions before this one.
    pub before: Option<i64>,
    /// At most so many.
    pub limit: usize,
    /// A write that must be seen.
    pub must_see: Sequence,
    /// What page tokens are bound to.
    pub binding: Vec<u8>,
}

/// What History asks for.
pub fn history_request(request: wire::HistoryRequest, tenant: &TenantId) -> Result<HistoryQuery, Error> {
    let mut violations = Violations::default();
    let id = id(&mut violations, "id", &request.id);
    let limit = page_limit(&mut violations, request.page_size);
    let must_see = check_token(&mut violations, &request.consistency_token);
    let id = violations.finish(id)?;
    let binding = [b"history".as_slice(), tenant.as_str().as_bytes(), &[0], id.as_bytes()].concat();
    let before = cursor(&request.page_token, &binding)?.map(i64::from_le_bytes);
    Ok(HistoryQuery {
        id,
        before,
        limit,
        must_see,
        binding,
    })
}

/// The answer to History; a page ends early when it has so many bytes, and never before its first version.
pub fn history_response(page: Versions, binding: &[u8], budget: usize) -> wire::HistoryResponse {
    let (mut versions, mut bytes, mut next, mut last) = (Vec::new(), 0, page.next, None);
    for one in page.versions {
        let number = one.memory.version;
        let message = version(one);
        bytes += message.encoded_len();
        if bytes > budget && last.is_some() {
            next = last;
            break;
        }
        last = Some(number);
        versions.push(message);
    }
    let next = next.map(|version| PageToken::encode(&version.to_le_bytes(), binding));
    wire::HistoryResponse {
        versions,
        next_page_token: next.unwrap_or_default(),
    }
}

fn kind(kind: Kind) -> i32 {
    let kind = match kind {
        Kind::Added => wire::ChangeKind::Added,
        Kind::Updated => wire::ChangeKind::Updated,
        Kind::Deleted => wire::ChangeKind::Deleted,
        Kind::Purged => wire::ChangeKind::Purged,
        Kind::Expired => wire::ChangeKind::Expired,
        Kind::Embedded => wire::ChangeKind::Unspecified,
    };
    kind.into()
}

/// One version.
pub fn version(version: Version) -> wire::MemoryVersion {
    wire::MemoryVersion {
        memory: Some(memory(version.memory)),
        kind: kind(version.kind),
        changed_at: Some(value::timestamp(version.changed_at)),
        changed_by: version.changed_by,
    }
}

/// What Stats asks for.
pub fn stats_request(request: wire::StatsRequest) -> Result<(Option<Scope>, Sequence), Error> {
    let mut violations = Violations::default();
    let scope = scope(&mut violations, "scope", request.scope);
    let must_see = check_token(&mut violations, &request.consistency_token);
    violations.into_result()?;
    Ok((scope, must_see))
}

/// The answer to Stats.
pub fn stats_response(stats: Stats) -> wire::StatsResponse {
    let layers = stats
        .counts
        .layers
        .into_iter()
        .map(|(layer, memories, content_bytes)| wire::LayerStats {
            layer: layer.number(),
            memories,
            content_bytes,
        });
    wire::StatsResponse {
        layers: layers.collect(),
        deleted: stats.counts.deleted,
        pending_embeddings: stats.counts.pending,
        index_lag: stats.index_lag,
        embedding_bytes: stats.counts.embedding_bytes,
        index_bytes: i64::try_from(stats.index_bytes).unwrap_or(i64::MAX),
        embedding_model: stats.model,
        reembedding_left: stats.reembedding.as_ref().map_or(0, |(_, left)| *left),
        reembedding_model: stats.reembedding.map(|(model, _)| model).unwrap_or_default(),
    }
}

/// What Watch asks for.
pub fn watch_request(request: wire::WatchRequest) -> Result<WatchQuery, Error> {
    let mut violations = Violations::default();
    let scope = scope(&mut violations, "scope", request.scope);
    let layers = layers(&mut violations, "layers", &request.layers);
    let filter = filter(&mut violations, &request.filter);
    let after = sequence(&request.resume_token);
    if after.is_none() && !request.resume_token.is_empty() {
        violations.add(
            "resume_token",
            "is none; send it as an event carried it, or leave it out",
        );
    }
    violations.into_result()?;
    Ok(WatchQuery {
        scope,
        layers,
        filter,
        documents: request.documents,
        policies: request.policies,
        after,
    })
}

/// A change as the live streams have it: an event of Watch with names only. What it says, the store tells to whoever may see it,
/// for as long as it is there; a stream would go on saying what was purged.
pub fn told(change: &Change) -> Vec<u8> {
    let mut told = news(News::Change(Arc::new(change.clone())));
    told.memory = told.memory.map(|memory| wire::Memory {
        id: memory.id,
        scope: memory.scope,
        layer: memory.layer,
        version: memory.version,
        ..Default::default()
    });
    told.document = told.document.map(|document| wire::Document {
        scope: document.scope,
        path: document.path,
        version: document.version,
        ..Default::default()
    });
    told.policy = told.policy.map(|policy| wire::Policy {
        name: policy.name,
        ..Default::default()
    });
    told.encode_to_vec()
}

/// One event of Watch.
pub fn news(news: News) -> wire::WatchResponse {
    match news {
        News::Heartbeat(position, now) => wire::WatchResponse {
            resume_token: resume_token(position),
            committed_at: Some(value::timestamp(now)),
            heartbeat: true,
            ..Default::default()
        },
        News::Change(change) => {
            let mut told = wire::WatchResponse {
                kind: kind(change.kind),
                resume_token: resume_token(change.sequence),
                committed_at: Some(value::timestamp(change.committed_at)),
                ..Default::default()
            };
            match change.subject.clone() {
                Subject::Memory(_, Some(after)) => told.memory = Some(memory(*after)),
                Subject::Memory(id, None) => {
                    told.memory = Some(wire::Memory {
                        id: id.to_string(),
                        ..Default::default()
                    });
                }
                Subject::Document(after) => told.document = Some(super::document(*after)),
                Subject::Policy(_, Some(after)) => told.policy = Some(super::policy(*after)),
                Subject::Policy(name, None) => {
                    told.policy = Some(wire::Policy {
                        name,
                        ..Default::default()
                    });
                }
            }
            told
        }
    }
}

/// Also for the beginning, where a consistency token would be empty.
fn resume_token(position: Sequence) -> String {
    format!("1.{}", position.0)
}
