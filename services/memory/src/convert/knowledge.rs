//! Documents on the wire.

use aeterna_error::{Error, Violations};
use aeterna_proto::common::v1 as common;
use aeterna_proto::memory::v1 as wire;
use aeterna_types::{PageToken, Scope, TenantId};
use prost::Message as _;

use super::{
    chars, check_token, consistency_token, cursor, cursor_text, idempotency, page_limit, scope, scope_message,
};
use super::{tags, value};
use crate::app::{Diff, DocumentPage, DocumentQuery, OneDocument};
use crate::domain::{Document, DocumentChange, Edit, Sequence, Text};

const MAX_PATH: usize = 1024;
const MAX_SEGMENT: usize = 128;
const MAX_CONTENT_BYTES: usize = 1 << 20;

fn check_path(violations: &mut Violations, field: &str, path: &str) {
    let sound = |segment: &str| {
        let characters = segment.chars().take(MAX_SEGMENT + 1).count();
        (1..=MAX_SEGMENT).contains(&characters)
            && segment != "."
            && segment != ".."
            && !segment.chars().any(char::is_control)
    };
    if path.chars().take(MAX_PATH + 1).count() > MAX_PATH || !path.split('/').all(sound) {
        let advice = "must be segments of 1 to 128 characters joined by `/`, at most 1024 in all, for instance `runbooks/failover.md`";
        violations.add(field, advice);
    }
}

fn place(violations: &mut Violations, prefix: &str, message: Option<common::Scope>) -> Scope {
    let field = format!("{prefix}scope");
    let place = scope(violations, &field, message).unwrap_or_default();
    if place.is_empty() {
        violations.add(
            &field,
            "is empty; name at least one layer, for instance `{\"team\": \"core\"}`",
        );
    }
    place
}

fn version(violations: &mut Violations, field: &str, number: i64, least: i64) -> Option<i64> {
    if number < least {
        violations.add(field, format!("is {number}; versions begin at 1"));
    }
    (number > 0).then_some(number)
}

/// What PutDocument asks for.
pub fn put_document_request(mut request: wire::PutDocumentRequest) -> Result<DocumentChange, Error> {
    let mut violations = Violations::default();
    let request_id = std::mem::take(&mut request.request_id);
    let idempotency = idempotency(&mut violations, "PutDocument", &request_id, &request.encode_to_vec());
    let Some(document) = request.document else {
        violations.add("document", "is missing; send at least its scope, path and content");
        return violations.finish(None);
    };
    let scope = place(&mut violations, "document.", document.scope);
    check_path(&mut violations, "document.path", &document.path);
    let bytes = document.content.len();
    if bytes > MAX_CONTENT_BYTES {
        violations.add("document.content", format!("has {bytes} bytes; send at most 1 MiB"));
    }
    chars(&mut violations, "document.title", &document.title, 256);
    chars(&mut violations, "document.media_type", &document.media_type, 128);
    chars(&mut violations, "document.comment", &document.comment, 1024);
    let metadata = document
        .metadata
        .and_then(|metadata| value::from_struct(&mut violations, "document.metadata", metadata));
    let media_type = match document.media_type.as_str() {
        "" => "text/markdown".to_owned(),
        _ => document.media_type,
    };
    let text = Text {
        title: document.title,
        content: document.content,
        media_type,
        metadata: metadata.unwrap_or_default(),
        tags: tags(&mut violations, "document.tags", document.tags),
        comment: document.comment,
    };
    violations.finish(Some(DocumentChange {
        scope,
        path: document.path,
        etag: Some(document.etag).filter(|etag| !etag.is_empty()),
        edit: Edit::Put(Box::new(text)),
        idempotency,
    }))
}

/// What RestoreDocument asks for.
pub fn restore_request(mut request: wire::RestoreDocumentRequest) -> Result<DocumentChange, Error> {
    let mut violations = Violations::default();
    let request_id = std::mem::take(&mut request.request_id);
    let idempotency = idempotency(
        &mut violations,
        "RestoreDocument",
        &request_id,
        &request.encode_to_vec(),
    );
    let scope = place(&mut violations, "", request.scope);
    check_path(&mut violations, "path", &request.path);
    let version = version(&mut violations, "version", request.version, 1);
    violations.finish(version.map(|version| DocumentChange {
        scope,
        path: request.path,
        etag: None,
        edit: Edit::Restore(version),
        idempotency,
    }))
}

/// What DeleteDocument asks for.
pub fn delete_document_request(mut request: wire::DeleteDocumentRequest) -> Result<DocumentChange, Error> {
    let mut violations = Violations::default();
    let request_id = std::mem::take(&mut request.request_id);
    let idempotency = idempotency(&mut violations, "DeleteDocument", &request_id, &request.encode_to_vec());
    let scope = place(&mut violations, "", request.scope);
    check_path(&mut violations, "path", &request.path);
    violations.finish(Some(DocumentChange {
        scope,
        path: request.path,
        etag: Some(request.etag).filter(|etag| !etag.is_empty()),
        edit: Edit::Delete,
        idempotency,
    }))
}

/// What GetDocument asks for.
pub fn get_document_request(request: wire::GetDocumentRequest) -> Result<OneDocument, Error> {
    let mut violations = Violations::default();
    let scope = place(&mut violations, "", request.scope);
    check_path(&mut violations, "path", &request.path);
    let version = version(&mut violations, "version", request.version, 0);
    let after = check_token(&mut violations, &request.consistency_token);
    violations.into_result()?;
    Ok(OneDocument {
        scope,
        path: request.path,
        version,
        after,
    })
}

/// What DiffDocument asks for: the two versions, the older one first.
pub fn diff_request(request: wire::DiffDocumentRequest) -> Result<[OneDocument; 2], Error> {
    let mut violations = Violations::default();
    let scope = place(&mut violations, "", request.scope);
    check_path(&mut violations, "path", &request.path);
    let from = version(&mut violations, "from_version", request.from_version, 1);
    let to = version(&mut violations, "to_version", request.to_version, 0);
    let after = check_token(&mut violations, &request.consistency_token);
    violations.into_result()?;
    let path = request.path;
    Ok([from, to].map(|version| OneDocument {
        scope: scope.clone(),
        path: path.clone(),
        version,
        after,
    }))
}

/// The answer to DiffDocument.
pub fn diff_response(diff: Diff) -> wire::DiffDocumentResponse {
    let count = |lines: usize| i32::try_from(lines).unwrap_or(i32::MAX);
    wire::DiffDocumentResponse {
        unified_diff: diff.unified,
        added_lines: count(diff.added),
        removed_lines: count(diff.removed),
    }
}

/// What ListDocuments asks for, and what its page tokens are bound to.
pub fn list_documents_request(
    mut request: wire::ListDocumentsRequest,
    tenant: &TenantId,
) -> Result<(DocumentQuery, Vec<u8>), Error> {
    let mut violations = Violations::default();
    let token = std::mem::take(&mut request.page_token);
    let page_size = std::mem::take(&mut request.page_size);
    let must_see = check_token(&mut violations, &std::mem::take(&mut request.consistency_token));
    let binding = [b"documents", tenant.as_str().as_bytes(), &[0], &request.encode_to_vec()].concat();
    let limit = page_limit(&mut violations, page_size);
    let scope = scope(&mut violations, "scope", request.scope);
    let prefix = request.path_prefix.trim_end_matches('/').to_owned();
    if !request.path_prefix.is_empty() {
        check_path(&mut violations, "path_prefix", &prefix);
    }
    violations.into_result()?;
    let after = cursor_text(&token, &binding)?.and_then(|place| {
        let (key, path) = place.split_once('/')?;
        Some((path.to_owned(), key.parse().ok()?))
    });
    let query = DocumentQuery {
        scope,
        prefix,
        after,
        limit,
        show_deleted: request.show_deleted,
        must_see,
    };
    Ok((query, binding))
}

/// The answer to ListDocuments.
pub fn list_documents_response(page: DocumentPage, binding: &[u8]) -> wire::ListDocumentsResponse {
    let next = page
        .next
        .map(|(path, key)| PageToken::encode(format!("{key}/{path}").as_bytes(), binding));
    wire::ListDocumentsResponse {
        documents: page.documents.into_iter().map(document).collect(),
        next_page_token: next.unwrap_or_default(),
    }
}

/// What ListDocumentVersions asks for.
#[derive(Clone, Debug)]
pub struct VersionsQuery {
    /// Where the document lives.
    pub scope: Scope,
    /// Its path.
    pub path: String,
    /// Versions before this one.
    pub before: Option<i64>,
    /// At most so many.
    pub limit: usize,
    /// A write that must be seen.
    pub must_see: Sequence,
    /// What page tokens are bound to.
    pub binding: Vec<u8>,
}

/// What ListDocumentVersions asks for.
pub fn versions_request(
    mut request: wire::ListDocumentVersionsRequest,
    tenant: &TenantId,
) -> Result<VersionsQuery, Error> {
    let mut violations = Violations::default();
    let token = std::mem::take(&mut request.page_token);
    let limit = page_limit(&mut violations, std::mem::take(&mut request.page_size));
    let must_see = check_token(&mut violations, &std::mem::take(&mut request.consistency_token));
    let binding = [b"versions", tenant.as_str().as_bytes(), &[0], &request.encode_to_vec()].concat();
    let scope = place(&mut violations, "", request.scope);
    check_path(&mut violations, "path", &request.path);
    violations.into_result()?;
    Ok(VersionsQuery {
        scope,
        path: request.path,
        before: cursor(&token, &binding)?.map(i64::from_le_bytes),
        limit,
        must_see,
        binding,
    })
}

/// The answer to ListDocumentVersions.
pub fn versions_response(documents: Vec<Document>, more: bool, binding: &[u8]) -> wire::ListDocumentVersionsResponse {
    let last = documents.last().filter(|_| more);
    let next = last.map(|last| PageToken::encode(&last.version.to_le_bytes(), binding));
    wire::ListDocumentVersionsResponse {
        next_page_token: next.unwrap_or_default(),
        documents: documents.into_iter().map(document).collect(),
    }
}

/// One document.
pub fn document(document: Document) -> wire::Document {
    wire::Document {
        etag: document.etag(),
        scope: Some(scope_message(&document.scope)),
        path: document.path,
        title: document.text.title,
        content: document.text.content,
        media_type: document.text.media_type,
        metadata: (!document.text.metadata.is_empty()).then(|| value::to_struct(document.text.metadata)),
        tags: document.text.tags,
        version: document.version,
        created_at: Some(value::timestamp(document.created_at)),
        updated_at: Some(value::timestamp(document.updated_at)),
        updated_by: document.updated_by,
        comment: document.text.comment,
        deleted_at: document.deleted_at.map(value::timestamp),
    }
}

/// A version and the token of its write.
pub fn written_document((written, sequence): (Document, Sequence)) -> (Option<wire::Document>, String) {
    (Some(document(written)), consistency_token(sequence))
}
