//! Export and import on the wire.

use aeterna_error::{Error, Reason, Violations, item_error};
use aeterna_proto::memory::v1 as wire;
use aeterna_types::{MemoryId, PageToken, RequestId, TenantId, Timestamp, chain};
use prost::Message as _;

use super::{body, change, check_token, consistency_token, cursor, filter, memory, scope, value};
use crate::app::{ExportQuery, Item, Taken};
use crate::domain::{Key, Kind, Memory, Version};
use crate::store::code::Code;
use crate::store::{Exported, Imported, StoredVector};

const MAX_MEMORIES: usize = 1000;
/// The largest version that every reader of JSON keeps exactly, and with room for more.
const MAX_VERSION: i64 = 1 << 53;
/// Bytes of a chunk beside its memories.
const ECHO: usize = 1024;
/// Vectors of a memory that are looked at.
const MAX_EMBEDDINGS: usize = 16;

/// How far an export has come, and what its resume tokens are bound to.
#[derive(Clone, Debug)]
pub struct Exporting {
    binding: Vec<u8>,
    count: i64,
    digest: [u8; 32],
    budget: usize,
    message_bytes: usize,
}

/// What Export asks for; a chunk ends when it has `budget` bytes, and none has more than `message_bytes`.
pub fn export_request(
    mut request: wire::ExportRequest,
    tenant: &TenantId,
    (budget, message_bytes): (usize, usize),
) -> Result<(ExportQuery, Exporting), Error> {
    let mut violations = Violations::default();
    let token = std::mem::take(&mut request.resume_token);
    let must_see = check_token(&mut violations, &std::mem::take(&mut request.consistency_token));
    let binding = [b"export", tenant.as_str().as_bytes(), &[0], &request.encode_to_vec()].concat();
    let scope = scope(&mut violations, "scope", request.scope);
    let filter = filter(&mut violations, &request.filter);
    let mut exporting = Exporting {
        binding,
        count: 0,
        digest: [0; 32],
        budget,
        message_bytes,
    };
    let mut after = Key(0);
    match cursor::<48>(&token, &exporting.binding) {
        Ok(None) => {}
        Ok(Some(place)) => {
            let number = |at: usize| i64::from_le_bytes(std::array::from_fn(|i| place[at + i]));
            after = Key(number(0));
            exporting.count = number(8);
            exporting.digest = std::array::from_fn(|i| place[16 + i]);
        }
        Err(_) => violations.add("resume_token", "does not belong to this export; begin without it"),
    }
    violations.into_result()?;
    let query = ExportQuery {
        scope,
        filter,
        history: request.include_history,
        vectors: request.include_embeddings,
        after,
        must_see,
    };
    Ok((query, exporting))
}

impl Exporting {
    /// The chunks of a page; it ends with the error when a memory does not fit a message, after those before it.
    pub fn chunks(&mut self, page: Vec<Exported>) -> Vec<Result<wire::ExportResponse, Error>> {
        let mut chunks = Vec::new();
        let (mut chunk, mut bytes) = (wire::ExportResponse::default(), 0);
        for one in page {
            let key = one.key;
            let item = exported(one);
            let encoded = item.encode_to_vec();
            let message_bytes = self.message_bytes;
            if encoded.len() + ECHO > message_bytes {
                let id = item.memory.map(|memory| memory.id).unwrap_or_default();
                let message = format!(
                    "the memory {id} with its versions has {} bytes, and `limits.message_bytes` is {message_bytes}; \
                     export without history, or raise the limit",
                    encoded.len()
                );
                if !chunk.memories.is_empty() {
                    chunks.push(Ok(chunk));
                }
                chunks.push(Err(
                    Error::new(Reason::MessageTooLarge, message).with("limit", message_bytes)
                ));
                return chunks;
            }
            if bytes + encoded.len() > self.budget && !chunk.memories.is_empty() {
                chunks.push(Ok(std::mem::take(&mut chunk)));
                bytes = 0;
            }
            bytes += encoded.len();
            self.count += 1;
            self.digest = chain(self.digest, &encoded);
            chunk.memories.push(item);
            chunk.resume_token = self.token(key);
        }
        if !chunk.memories.is_empty() {
            chunks.push(Ok(chunk));
        }
        chunks
    }

    fn token(&self, key: Key) -> String {
        let place = [&key.0.to_le_bytes()[..], &self.count.to_le_bytes(), &self.digest].concat();
        PageToken::encode(&place, &self.binding)
    }

    /// The last chunk.
    pub fn end(&self) -> wire::ExportResponse {
        wire::ExportResponse {
            summary: Some(summary(self.count, self.digest)),
            ..Default::default()
        }
    }
}

fn summary(count: i64, digest: [u8; 32]) -> wire::StreamSummary {
    wire::StreamSummary {
        count,
        digest: blake3::Hash::from_bytes(digest).to_hex().to_string(),
    }
}

fn exported(one: Exported) -> wire::ExportedMemory {
    let code = |vector: StoredVector| wire::EmbeddingCode {
        dimension: i32::try_from(vector.code.dimension()).unwrap_or(0),
        code: vector.code.as_bytes().to_vec(),
        model: vector.model,
    };
    wire::ExportedMemory {
        memory: Some(memory(one.memory)),
        versions: one.versions.into_iter().map(change::version).collect(),
        embeddings: one.vectors.into_iter().map(code).collect(),
    }
}

/// The id of an import.
pub fn import_id(id: &str) -> Result<RequestId, Error> {
    let mut violations = Violations::default();
    let id = violations.check("import_id", id.parse());
    violations.finish(id)
}

/// The items of a chunk of Import, each with its own verdict.
pub fn import_items(memories: Vec<wire::ExportedMemory>, now: Timestamp) -> Result<Vec<Item>, Error> {
    let mut violations = Violations::default();
    if memories.len() > MAX_MEMORIES {
        violations.add(
            "memories",
            format!("has {} items; send at most 1000 in a chunk", memories.len()),
        );
    }
    violations.into_result()?;
    let item = |(index, memory): (usize, wire::ExportedMemory)| Item {
        bytes: memory.encode_to_vec(),
        item: imported(memory, &format!("memories[{index}]."), now),
    };
    Ok(memories.into_iter().enumerate().map(item).collect())
}

fn imported(message: wire::ExportedMemory, prefix: &str, now: Timestamp) -> Result<Imported, Error> {
    let mut violations = Violations::below(prefix);
    let Some(memory) = message.memory else {
        violations.add("memory", "is missing; send at least its scope and content");
        return violations.finish(None);
    };
    let named = !memory.id.is_empty();
    let memory = whole(&mut violations, memory, now);
    if memory.as_ref().is_some_and(|memory| memory.scope.is_empty()) {
        violations.add(
            "memory.scope",
            "is empty; name at least one layer, for instance `{\"user\": \"ann\"}`",
        );
    }
    let newest = memory.as_ref().map_or(0, |memory| memory.version);
    let mut versions: Vec<Version> = Vec::new();
    for (index, version) in message.versions.into_iter().enumerate() {
        let at = format!("versions[{index}]");
        let kind = match wire::ChangeKind::try_from(version.kind) {
            Ok(wire::ChangeKind::Added) => Kind::Added,
            Ok(wire::ChangeKind::Updated) => Kind::Updated,
            Ok(wire::ChangeKind::Deleted) => Kind::Deleted,
            Ok(wire::ChangeKind::Expired) => Kind::Expired,
            _ => {
                violations.add(&format!("{at}.kind"), "is no change that leaves a version");
                Kind::Added
            }
        };
        let mut inner = Violations::default();
        let of = version.memory.and_then(|memory| whole(&mut inner, memory, now));
        let changed_at = value::time(&mut inner, "changed_at", version.changed_at);
        let sound = inner.into_result();
        for problem in sound.as_ref().err().into_iter().flat_map(Error::violations) {
            violations.add(&format!("{at}.{}", problem.field), problem.description.clone());
        }
        let (Ok(()), Some(of), Some(changed_at)) = (&sound, of, changed_at) else {
            if sound.is_ok() {
                violations.add(&at, "is not whole: it needs a memory and the time of the change");
            }
            continue;
        };
        let follows = versions.last().is_none_or(|last| last.memory.version < of.version);
        if !follows || of.version > newest {
            violations.add(&at, "is out of order: versions ascend up to that of the memory");
        }
        versions.push(Version {
            memory: of,
            kind,
            changed_at,
            changed_by: version.changed_by.chars().take(256).collect(),
        });
    }
    let mut vectors = Vec::new();
    for (index, embedding) in message.embeddings.into_iter().take(MAX_EMBEDDINGS).enumerate() {
        match Code::from_bytes(embedding.code) {
            Some(code) => vectors.push(StoredVector {
                model: embedding.model,
                code,
            }),
            None => violations.add(
                &format!("embeddings[{index}].code"),
                "is damaged, or of another version",
            ),
        }
    }
    violations.finish(memory.map(|memory| Imported {
        memory,
        named,
        versions,
        vectors,
        most: None,
    }))
}

/// A memory with what the server gave it, as it was.
fn whole(violations: &mut Violations, mut message: wire::Memory, now: Timestamp) -> Option<Memory> {
    let id = match message.id.as_str() {
        "" => Some(MemoryId::new(now)),
        id => super::id(violations, "memory.id", id),
    };
    let created_at = value::time(violations, "memory.created_at", message.created_at).unwrap_or(now);
    let updated_at = value::time(violations, "memory.updated_at", message.updated_at).unwrap_or(created_at);
    let deleted_at = value::time(violations, "memory.deleted_at", message.deleted_at);
    if message.version > MAX_VERSION {
        violations.add(
            "memory.version",
            format!("is {}; send at most {MAX_VERSION}", message.version),
        );
    }
    let version = message.version.clamp(1, MAX_VERSION);
    let embedding_model = message.embedding_model.chars().take(128).collect();
    let place = scope(violations, "memory.scope", message.scope.take()).unwrap_or_default();
    let body = body(violations, message);
    Some(Memory {
        id: id?,
        scope: place,
        body,
        created_at,
        updated_at,
        deleted_at,
        version,
        embedding_model,
    })
}

/// What the sender of an import says that it sent.
pub fn sent(summary: Option<wire::StreamSummary>) -> Result<Option<(i64, [u8; 32])>, Error> {
    let Some(summary) = summary else { return Ok(None) };
    let mut violations = Violations::default();
    let digest = blake3::Hash::from_hex(&summary.digest).ok();
    if digest.is_none() {
        violations.add("summary.digest", "is no BLAKE3 digest in hexadecimal");
    }
    violations.finish(digest.map(|digest| Some((summary.count, *digest.as_bytes()))))
}

/// The answer to Import.
pub fn import_response(taken: Taken) -> wire::ImportResponse {
    wire::ImportResponse {
        created: taken.created,
        merged: taken.merged,
        errors: taken
            .errors
            .iter()
            .map(|(place, error)| {
                let mut told = item_error(error);
                told.index = *place;
                told
            })
            .collect(),
        summary: Some(summary(taken.arrived.0, taken.arrived.1)),
        refused: taken.refused,
        consistency_token: consistency_token(taken.last),
    }
}
