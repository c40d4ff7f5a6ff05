//! Wire types to domain types and back; refusals name the field.

mod change;
mod knowledge;
mod policy;
mod search;
mod transfer;
mod value;

use aeterna_error::{Error, Reason, Violations};
use aeterna_proto::common::v1 as common;
use aeterna_proto::errors::v1::ItemError;
use aeterna_proto::memory::v1 as wire;
use aeterna_types::{Layer, MemoryId, PageToken, Scope, TenantId, Timestamp, fingerprint, hexadecimal};
use prost::Message as _;

pub use change::{
    batch_delete_request, batch_delete_response, delete_request, delete_response, history_request, history_response,
    news, stats_request, stats_response, told, watch_request,
};
pub use knowledge::{
    delete_document_request, diff_request, diff_response, document, get_document_request, list_documents_request,
    list_documents_response, put_document_request, restore_request, versions_request, versions_response,
    written_document,
};
pub use policy::{
    effective_request, effective_response, list_policies_request, list_policies_response, policy, policy_name,
    put_policy_request,
};
pub use search::{search_request, search_response};
pub use transfer::{export_request, import_id, import_items, import_response, sent};

use crate::app::{GetQuery, Kept, ListQuery, NewMemory, Page, Patch};
use crate::domain::{Body, DEFAULT_IMPORTANCE, Idempotency, MAX_TAGS, Memory, Outcome, Sequence, Source};
use crate::filter::Filter;
use value::{from_struct, time, timestamp, to_struct};

const MAX_CONTENT_BYTES: usize = 65_536;
const MAX_BATCH: usize = 1000;
const MAX_PAGE: i32 = 1000;
/// What an answer says of a memory beyond what its writer sent, at most, in bytes.
const ECHO_BYTES: usize = 512;

/// Notes every layer whose identifier is malformed.
pub(super) fn scope(violations: &mut Violations, field: &str, message: Option<common::Scope>) -> Option<Scope> {
    let message = message?;
    let mut scope = Scope::default();
    let ids = [
        message.company,
        message.org,
        message.team,
        message.project,
        message.user,
        message.session,
        message.agent,
    ];
    for (layer, id) in Layer::ALL.into_iter().zip(ids) {
        if !id.is_empty() {
            violations.check(&format!("{field}.{layer}"), scope.set(layer, &id));
        }
    }
    Some(scope)
}

pub(super) fn layers(violations: &mut Violations, field: &str, numbers: &[i32]) -> Vec<Layer> {
    let mut layers = Vec::new();
    for (index, number) in numbers.iter().take(64).enumerate() {
        match Layer::from_number(*number) {
            Some(layer) => layers.push(layer),
            None => violations.add(&format!("{field}[{index}]"), format!("is {number}, which is no layer")),
        }
    }
    if numbers.len() > 64 {
        violations.add(field, "has more than 64 items; there are 7 layers");
    }
    layers
}

pub(super) fn id(violations: &mut Violations, field: &str, text: &str) -> Option<MemoryId> {
    violations.check(field, text.parse())
}

pub(super) fn filter(violations: &mut Violations, text: &str) -> Option<Filter> {
    violations.check("filter", crate::filter::parse(text)).flatten()
}

/// A time in the past.
pub(super) fn past(
    violations: &mut Violations,
    message: Option<prost_types::Timestamp>,
    now: Timestamp,
) -> Option<Timestamp> {
    let time = time(violations, "as_of", message)?;
    if time > now {
        violations.add(
            "as_of",
            "lies in the future; send a time that has passed, or leave it out",
        );
    }
    Some(time)
}

fn chars(violations: &mut Violations, field: &str, text: &str, most: usize) {
    let count = text.chars().take(most + 1).count();
    if count > most {
        violations.add(field, format!("has more than {most} characters"));
    }
}

/// Tags, sorted and without duplicates.
fn tags(violations: &mut Violations, field: &str, mut tags: Vec<String>) -> Vec<String> {
    if tags.len() > MAX_TAGS {
        violations.add(field, format!("has {} tags; send at most 64", tags.len()));
    }
    for (index, tag) in tags.iter().take(MAX_TAGS).enumerate() {
        if tag.is_empty() || tag.chars().take(65).count() > 64 {
            violations.add(&format!("{field}[{index}]"), "must have 1 to 64 characters");
        }
    }
    tags.sort();
    tags.dedup();
    tags
}

fn body(violations: &mut Violations, message: wire::Memory) -> Body {
    if message.content.is_empty() {
        violations.add("memory.content", "is empty; send 1 to 65,536 bytes");
    } else if message.content.len() > MAX_CONTENT_BYTES {
        let bytes = message.content.len();
        violations.add("memory.content", format!("has {bytes} bytes; send at most 65,536"));
    }
    let metadata = message
        .metadata
        .and_then(|metadata| from_struct(violations, "memory.metadata", metadata));
    let tags = tags(violations, "memory.tags", message.tags);
    let importance = message.importance.unwrap_or(DEFAULT_IMPORTANCE);
    if !(0.0..=1.0).contains(&importance) {
        violations.add("memory.importance", format!("is {importance}; send 0 to 1"));
    }
    let source = message.source.unwrap_or_default();
    for (name, text, most) in [
        ("conversation", &source.conversation, 256),
        ("speaker", &source.speaker, 256),
        ("caption", &source.caption, 4096),
        ("reference", &source.reference, 256),
    ] {
        chars(violations, &format!("memory.source.{name}"), text, most);
    }
    if source
        .sequence
        .is_some_and(|sequence| !(0..=i64::MAX / 2).contains(&sequence))
    {
        violations.add("memory.source.sequence", "must be 0 or more, and less than 2^62");
    }
    let event_at = time(violations, "memory.event_at", message.event_at);
    let valid_at = time(violations, "memory.valid_at", message.valid_at);
    let invalid_at = time(violations, "memory.invalid_at", message.invalid_at);
    let expires_at = time(violations, "memory.expires_at", message.expires_at);
    if valid_at.zip(invalid_at).is_some_and(|(from, to)| to <= from) {
        violations.add("memory.invalid_at", "is not after `valid_at`");
    }
    let superseded_by = match message.superseded_by.as_str() {
        "" => None,
        text => id(violations, "memory.superseded_by", text),
    };
    Body {
        content: message.content,
        metadata: metadata.unwrap_or_default(),
        tags,
        importance,
        source: Source {
            conversation: source.conversation,
            sequence: source.sequence,
            speaker: source.speaker,
            caption: source.caption,
            reference: source.reference,
        },
        event_at,
        valid_at,
        invalid_at,
        expires_at,
        superseded_by,
    }
}

/// The request id with a digest of the RPC and everything else in the request.
fn idempotency(violations: &mut Violations, rpc: &str, request_id: &str, rest: &[u8]) -> Option<Idempotency> {
    if request_id.is_empty() {
        return None;
    }
    let request_id = violations.check("request_id", request_id.parse())?;
    Some(Idempotency {
        request_id,
        digest: fingerprint([rpc.as_bytes(), rest]),
    })
}

/// One memory to add; `prefix` is the path of the request in a batch.
pub fn add_request(mut request: wire::AddRequest, prefix: &str) -> Result<NewMemory, Error> {
    let mut violations = Violations::below(prefix);
    let request_id = std::mem::take(&mut request.request_id);
    let idempotency = idempotency(&mut violations, "Add", &request_id, &request.encode_to_vec());
    let Some(mut memory) = request.memory else {
        violations.add("memory", "is missing; send at least its scope and content");
        return violations.finish(None);
    };
    let place = scope(&mut violations, "memory.scope", memory.scope.take()).unwrap_or_default();
    if place.is_empty() && violations.is_empty() {
        violations.add(
            "memory.scope",
            "is empty; name at least one layer, for instance `{\"user\": \"ann\"}`",
        );
    }
    let body = body(&mut violations, memory);
    violations.finish(Some(NewMemory {
        scope: place,
        body,
        idempotency,
    }))
}

/// Refuses a batch without items, or with too many.
pub(super) fn batch_size(items: usize) -> Result<(), Error> {
    let mut violations = Violations::default();
    if items == 0 || items > MAX_BATCH {
        violations.add("requests", format!("has {items} items; send 1 to 1000"));
    }
    violations.into_result()
}

/// The items of a batch, each with its own verdict.
pub fn batch_request(
    request: wire::BatchAddRequest,
    message_bytes: usize,
) -> Result<Vec<Result<NewMemory, Error>>, Error> {
    // The answer repeats every memory, with what the server adds to it; what could not be answered is not begun.
    let answer = request.encoded_len() + request.requests.len() * ECHO_BYTES;
    if answer > message_bytes {
        let message =
            format!("the answer to these `requests` would be larger than {message_bytes} bytes; send fewer at once");
        return Err(Error::new(Reason::MessageTooLarge, message).with("limit", message_bytes));
    }
    batch_size(request.requests.len())?;
    let item = |(index, item)| add_request(item, &format!("requests[{index}]."));
    Ok(request.requests.into_iter().enumerate().map(item).collect())
}

/// A token that a read can pass to see a write.
pub fn consistency_token(sequence: Sequence) -> String {
    if sequence == Sequence::default() {
        String::new()
    } else {
        format!("1.{}", sequence.0)
    }
}

/// The place that a token stands for.
fn sequence(token: &str) -> Option<Sequence> {
    let number = token.strip_prefix("1.")?.parse().ok()?;
    (number >= 0).then_some(Sequence(number))
}

/// The write that a token stands for: reads wait for it.
pub(super) fn check_token(violations: &mut Violations, token: &str) -> Sequence {
    let sequence = sequence(token);
    if sequence.is_none() && !token.is_empty() {
        violations.add("consistency_token", "is none; send it as a write answered it");
    }
    sequence.unwrap_or_default()
}

/// The answer to Add.
pub fn add_response(Kept { written, near }: Kept) -> wire::AddResponse {
    let outcome = match written.outcome {
        Outcome::Created => wire::AddOutcome::Created,
        Outcome::Merged => wire::AddOutcome::Merged,
    };
    wire::AddResponse {
        consistency_token: consistency_token(written.sequence),
        memory: Some(memory(written.memory)),
        outcome: outcome.into(),
        near_duplicates: near_duplicates(near),
    }
}

fn near_duplicates(near: Vec<(MemoryId, f64)>) -> Vec<wire::NearDuplicate> {
    let told = |(id, similarity): (MemoryId, f64)| wire::NearDuplicate {
        id: id.to_string(),
        similarity,
    };
    near.into_iter().map(told).collect()
}

/// The answer to Update.
pub fn update_response(Kept { written, near }: Kept) -> wire::UpdateResponse {
    wire::UpdateResponse {
        consistency_token: consistency_token(written.sequence),
        memory: Some(memory(written.memory)),
        near_duplicates: near_duplicates(near),
    }
}

/// The answer to BatchAdd.
pub fn batch_response(
    results: Vec<Result<Kept, Error>>,
    refused: impl Fn(&Error) -> ItemError,
) -> wire::BatchAddResponse {
    use wire::batch_add_result::Result as Item;
    let last = results
        .iter()
        .flatten()
        .map(|added| added.written.sequence)
        .max()
        .unwrap_or_default();
    let item = |result| match result {
        Ok(added) => Item::Added(add_response(added)),
        Err(error) => Item::Error(refused(&error)),
    };
    let results = results
        .into_iter()
        .map(|result| wire::BatchAddResult {
            result: Some(item(result)),
        })
        .collect();
    wire::BatchAddResponse {
        results,
        consistency_token: consistency_token(last),
    }
}

/// Leaves out what memories say, in an answer that would be too large: all of it is done, and each result must be told.
pub fn shorten_additions(answer: &mut wire::BatchAddResponse) {
    use wire::batch_add_result::Result as Item;
    for result in &mut answer.results {
        if let Some(Item::Added(added)) = &mut result.result {
            shorten(added.memory.as_mut());
        }
    }
}

/// The same for deletions.
pub fn shorten_deletions(answer: &mut wire::BatchDeleteResponse) {
    use wire::batch_delete_result::Result as Item;
    for result in &mut answer.results {
        if let Some(Item::Deleted(deleted)) = &mut result.result {
            shorten(deleted.memory.as_mut());
        }
    }
}

fn shorten(memory: Option<&mut wire::Memory>) {
    if let Some(memory) = memory {
        memory.content.clear();
        memory.tags.clear();
        (memory.metadata, memory.source) = (None, None);
    }
}

/// What Get asks for.
pub fn get_request(request: wire::GetRequest, now: Timestamp) -> Result<GetQuery, Error> {
    let mut violations = Violations::default();
    let id = id(&mut violations, "id", &request.id);
    let scope = scope(&mut violations, "scope", request.scope);
    let after = check_token(&mut violations, &request.consistency_token);
    let as_of = past(&mut violations, request.as_of, now);
    violations.finish(id.map(|id| GetQuery {
        id,
        scope,
        show_deleted: request.show_deleted,
        as_of,
        after,
    }))
}

/// What Update asks for.
pub fn update_request(mut request: wire::UpdateRequest) -> Result<Patch, Error> {
    let mut violations = Violations::default();
    let request_id = std::mem::take(&mut request.request_id);
    let idempotency = idempotency(&mut violations, "Update", &request_id, &request.encode_to_vec());
    let fields = request.update_mask.unwrap_or_default().paths;
    if fields.is_empty() {
        violations.add(
            "update_mask",
            "is empty; name the fields to change, for instance `content`",
        );
    }
    let known = crate::app::FIELDS;
    for field in fields
        .iter()
        .filter(|field| !known.iter().any(|(name, _)| name == field))
    {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let shown: String = field.chars().take(64).collect();
        violations.add(
            "update_mask",
            format!("names `{shown}`; it may name {}", names.join(", ")),
        );
    }
    let Some(mut memory) = request.memory else {
        violations.add("memory", "is missing; send its id and the new values");
        return violations.finish(None);
    };
    let id = id(&mut violations, "memory.id", &memory.id);
    let etag = Some(std::mem::take(&mut memory.etag)).filter(|etag| !etag.is_empty());
    let values = body(&mut violations, named(memory, &fields));
    violations.finish(id.map(|id| Patch {
        id,
        etag,
        values,
        fields,
        idempotency,
    }))
}

/// What a mask names: a value that is not to be taken need not be there, nor be sound.
fn named(memory: wire::Memory, fields: &[String]) -> wire::Memory {
    let has = |name: &str| fields.iter().any(|field| field == name);
    let source = memory.source.unwrap_or_default();
    let text = |name: &str, text: String| if has(name) { text } else { String::new() };
    wire::Memory {
        content: if has("content") { memory.content } else { "-".into() },
        metadata: memory.metadata.filter(|_| has("metadata")),
        tags: if has("tags") { memory.tags } else { Vec::new() },
        importance: memory.importance.filter(|_| has("importance")),
        source: Some(wire::Source {
            speaker: text("source.speaker", source.speaker),
            caption: text("source.caption", source.caption),
            reference: text("source.reference", source.reference),
            ..Default::default()
        }),
        event_at: memory.event_at.filter(|_| has("event_at")),
        valid_at: memory.valid_at.filter(|_| has("valid_at")),
        invalid_at: memory.invalid_at.filter(|_| has("invalid_at")),
        expires_at: memory.expires_at.filter(|_| has("expires_at")),
        superseded_by: text("superseded_by", memory.superseded_by),
        ..Default::default()
    }
}

/// Items on a page.
pub(super) fn page_limit(violations: &mut Violations, page_size: i32) -> usize {
    if !(0..=MAX_PAGE).contains(&page_size) {
        violations.add("page_size", format!("is {page_size}; send 1 to 1000, or 0 for 50"));
    }
    usize::try_from(page_size).ok().filter(|size| *size > 0).unwrap_or(50)
}

/// Where a page begins, by its token; `N` is the size of the place.
pub(super) fn cursor<const N: usize>(token: &str, binding: &[u8]) -> Result<Option<[u8; N]>, Error> {
    place(token, binding, |place| place.try_into().ok())
}

/// The same for a place that is a text.
pub(super) fn cursor_text(token: &str, binding: &[u8]) -> Result<Option<String>, Error> {
    place(token, binding, |place| String::from_utf8(place).ok())
}

fn place<T>(token: &str, binding: &[u8], read: impl Fn(Vec<u8>) -> Option<T>) -> Result<Option<T>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let place = PageToken::decode(token, binding).ok().and_then(read);
    place.map(Some).ok_or_else(|| {
        let message = "`page_token` does not belong to this request; start again without it";
        Error::new(Reason::InvalidPageToken, message)
    })
}

/// What List asks for, and what its page tokens are bound to.
pub fn list_request(
    mut request: wire::ListRequest,
    tenant: &TenantId,
    now: Timestamp,
) -> Result<(ListQuery, Vec<u8>), Error> {
    let mut violations = Violations::default();
    let token = std::mem::take(&mut request.page_token);
    let page_size = std::mem::take(&mut request.page_size);
    let consistency_token = std::mem::take(&mut request.consistency_token);
    let mut binding = tenant.as_str().as_bytes().to_vec();
    binding.push(0);
    binding.extend(request.encode_to_vec());
    let after = check_token(&mut violations, &consistency_token);
    let limit = page_limit(&mut violations, page_size);
    let scope = scope(&mut violations, "scope", request.scope);
    let layers = layers(&mut violations, "layers", &request.layers);
    let filter = filter(&mut violations, &request.filter);
    let as_of = past(&mut violations, request.as_of, now);
    violations.into_result()?;
    let before = cursor(&token, &binding)?.map(MemoryId::from_bytes);
    Ok((
        ListQuery {
            scope,
            layers,
            limit,
            before,
            filter,
            show_deleted: request.show_deleted,
            as_of,
            after,
        },
        binding,
    ))
}

/// The answer to List; a page ends early when it has so many bytes (AIP-158), and never before its first memory.
pub fn list_response(page: Page, binding: &[u8], budget: usize) -> wire::ListResponse {
    let mut next = page.next;
    let (mut memories, mut bytes) = (Vec::with_capacity(page.memories.len()), 0);
    let mut last = None;
    for one in page.memories {
        let id = one.id;
        let message = memory(one);
        bytes += message.encoded_len();
        if bytes > budget && last.is_some() {
            next = last;
            break;
        }
        last = Some(id);
        memories.push(message);
    }
    let next = next.map(|id| PageToken::encode(id.as_bytes(), binding));
    wire::ListResponse {
        memories,
        next_page_token: next.unwrap_or_default(),
    }
}

/// A scope on the wire.
pub(super) fn scope_message(scope: &Scope) -> common::Scope {
    let get = |layer| scope.get(layer).unwrap_or_default().to_owned();
    common::Scope {
        company: get(Layer::Company),
        org: get(Layer::Org),
        team: get(Layer::Team),
        project: get(Layer::Project),
        user: get(Layer::User),
        session: get(Layer::Session),
        agent: get(Layer::Agent),
    }
}

/// One memory.
pub fn memory(memory: Memory) -> wire::Memory {
    let (etag, layer) = (memory.etag(), memory.layer());
    let content_hash = hexadecimal(&memory.body.content_hash());
    let scope = scope_message(&memory.scope);
    let body = memory.body;
    let source = (body.source != Source::default()).then_some(wire::Source {
        conversation: body.source.conversation,
        sequence: body.source.sequence,
        speaker: body.source.speaker,
        caption: body.source.caption,
        reference: body.source.reference,
    });
    wire::Memory {
        id: memory.id.to_string(),
        scope: Some(scope),
        layer: layer.map_or(0, Layer::number),
        content: body.content,
        metadata: (!body.metadata.is_empty()).then(|| to_struct(body.metadata)),
        tags: body.tags,
        importance: Some(body.importance),
        source,
        created_at: Some(timestamp(memory.created_at)),
        updated_at: Some(timestamp(memory.updated_at)),
        event_at: body.event_at.map(timestamp),
        valid_at: body.valid_at.map(timestamp),
        invalid_at: body.invalid_at.map(timestamp),
        expires_at: body.expires_at.map(timestamp),
        deleted_at: memory.deleted_at.map(timestamp),
        superseded_by: body.superseded_by.map(|id| id.to_string()).unwrap_or_default(),
        version: memory.version,
        etag,
        content_hash,
        // The revision behind `@` is of no use to a caller.
        embedding_model: memory.embedding_model.split('@').next().unwrap_or_default().to_owned(),
    }
}
