//! The ports: the relational store, which is the only source of truth, and the vector index, which is rebuilt from it.

pub mod bm25;
pub mod code;
#[cfg(test)]
pub mod conformance;
pub mod flat;
pub mod ledger;
pub(crate) mod locks;
mod moving;
pub mod postgres;
pub mod qdrant;
pub mod sqlite;
mod vectors;

use std::collections::BTreeSet;
use std::sync::Arc;

pub use aeterna_storage::StorageError;
use aeterna_types::{Layer, MemoryId, RequestId, Scope, TenantId, Timestamp};
use async_trait::async_trait;
pub use moving::Moving;
use rustc_hash::FxHashSet;
pub use vectors::{Among, Care, Changes, Entry, Sample, VectorIndex, plain_name};

use crate::domain::{
    self, Body, Document, DocumentChange, Idempotency, Key, Memory, Policy, ScopeKey, Sequence, Version, View, Writer,
    Written,
};
use crate::error::MemoryError;
use crate::filter::Filter;
use code::Code;

/// One memory to add, with its vector when there is one already.
#[derive(Clone, Debug)]
pub struct Addition {
    /// Where it lives; at least one layer is set.
    pub scope: Scope,
    /// What it says.
    pub body: Body,
    /// Its vector.
    pub vector: Option<StoredVector>,
    /// Only while its scope holds fewer memories, by the policy of that name.
    pub most: Option<(i64, String)>,
    /// Makes a retry safe.
    pub idempotency: Option<Idempotency>,
}

/// A vector in its compact code, and the model that made it.
#[derive(Clone, Debug)]
pub struct StoredVector {
    /// Name and revision of the model.
    pub model: String,
    /// The vector.
    pub code: Code,
}

/// A change of one memory: a new body, or its deletion.
#[derive(Clone, Debug)]
pub enum Change {
    /// The body as it should be; with the vector when the indexed text changed.
    Replace {
        /// The body.
        body: Box<Body>,
        /// Its vector; `None` with `reindex` means pending.
        vector: Option<StoredVector>,
        /// The embedded text changed, so that the old vector is void.
        reindex: bool,
    },
    /// Hide it.
    Delete,
    /// Remove it for good, with its history and what writes have answered of it.
    Purge,
}

/// A change of one memory, with what makes it safe.
#[derive(Clone, Debug)]
pub struct ChangeItem {
    /// The memory.
    pub id: MemoryId,
    /// Only on this version.
    pub etag: Option<String>,
    /// The version that the change was made of, which a node may have shown that was behind: on another one it is `Stale`.
    pub made_of: Option<String>,
    /// What to do.
    pub change: Change,
    /// Makes a retry safe.
    pub idempotency: Option<Idempotency>,
}

/// Counts of what some scopes hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Per layer, memories that are shown and bytes of their content; layers without any are left out.
    pub layers: Vec<(Layer, i64, i64)>,
    /// Memories deleted and not yet removed.
    pub deleted: i64,
    /// Memories that are shown and have no vector by the model.
    pub pending: i64,
    /// Bytes of the vectors.
    pub embedding_bytes: i64,
}

/// What List asks for.
#[derive(Clone, Debug)]
pub struct Listing {
    /// The tenant.
    pub tenant: TenantId,
    /// The scopes that are visible.
    pub scopes: Vec<ScopeKey>,
    /// Only what comes after this id, newest first.
    pub before: Option<MemoryId>,
    /// At most so many.
    pub limit: usize,
    /// Only those that satisfy it.
    pub filter: Option<Filter>,
    /// Also deleted and expired ones.
    pub show_deleted: bool,
    /// The time of the call.
    pub now: Timestamp,
    /// As it was then, and what was shown then.
    pub as_of: Option<Timestamp>,
}

/// What some scopes held at a time.
#[derive(Clone, Debug, Default)]
pub struct AsOf {
    /// Memories that are still as they were.
    pub unchanged: Vec<Key>,
    /// Memories that have changed since.
    pub changed: Vec<Earlier>,
}

/// A memory as it was.
#[derive(Clone, Debug)]
pub struct Earlier {
    /// Its number.
    pub key: Key,
    /// The memory as of then.
    pub memory: Memory,
    /// It has another text now.
    pub reworded: bool,
}

/// In how many documents of a tenant terms are.
#[derive(Clone, Debug, Default)]
pub struct Frequencies {
    /// Documents in all.
    pub documents: i64,
    /// Documents with each term.
    pub with: Vec<i64>,
}

/// A change that the index has to follow.
#[derive(Clone, Debug)]
pub struct IndexEvent {
    /// Its place in the outbox.
    pub sequence: Sequence,
    /// The memory.
    pub key: Key,
}

/// What the index has to know of a memory that is there.
#[derive(Clone, Debug)]
pub struct IndexState {
    /// The memory.
    pub key: Key,
    /// Its id.
    pub id: MemoryId,
    /// Its scope.
    pub scope: ScopeKey,
    /// Its tenant.
    pub tenant: TenantId,
    /// Its version.
    pub version: i64,
    /// Its vector by the model asked for; `None`: pending.
    pub code: Option<Code>,
    /// The text to embed when it is pending.
    pub text: String,
    /// The text that is found by its words.
    pub lexical: String,
}

/// What the lexical arm looks for.
#[derive(Clone, Debug)]
pub struct LexicalSearch {
    /// Scopes of the tenant.
    pub scopes: Vec<ScopeKey>,
    /// Analysed terms; one of them is enough.
    pub terms: Vec<String>,
    /// Only those that satisfy it.
    pub filter: Option<Filter>,
    /// Only those that have not changed since.
    pub as_of: Option<Timestamp>,
    /// Where it looks, when what the filter and the time choose was looked up already.
    pub among: Option<Arc<Among>>,
    /// Those that an index has found by their terms; a store that finds them as fast by itself looks at all.
    pub candidates: Option<Vec<Key>>,
    /// At most so many.
    pub limit: usize,
}

/// Where a search looks.
#[derive(Clone, Debug)]
pub struct Sight {
    /// The tenant.
    pub tenant: TenantId,
    /// What the caller sees.
    pub view: View,
    /// Only these layers; empty: any.
    pub layers: Vec<Layer>,
    /// Only memories that satisfy it.
    pub filter: Option<Filter>,
    /// Memories of the tenant to leave out.
    pub exclude: Vec<MemoryId>,
    /// What has expired by then is left out, too.
    pub now: Option<Timestamp>,
}

/// What a search looks at.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The scopes that are visible, only in the layers that were named.
    pub scopes: Vec<ScopeKey>,
    /// Memories to leave out.
    pub hidden: Vec<Key>,
    /// Of the scopes, those that satisfy the filter, in any order; `None` without a filter.
    pub matching: Option<Vec<Key>>,
}

/// Candidates of the index, to be compared at full size.
#[derive(Clone, Debug)]
pub struct Rescoring {
    /// The model's identity.
    pub model: String,
    /// The candidates.
    pub keys: Vec<Key>,
    /// What they are compared with, over as many dimensions as it has.
    pub vector: Vec<f32>,
}

/// What is to be scored for a search.
#[derive(Clone, Debug)]
pub struct Scoring {
    /// The tenant.
    pub tenant: TenantId,
    /// Memories that have some words.
    pub lexical: Option<LexicalSearch>,
    /// Memories that an index of vectors has found.
    pub dense: Option<Rescoring>,
    /// Also find the neighbours of the candidates, and of these.
    pub neighbours: Option<Vec<Key>>,
}

impl Scoring {
    /// The turns whose neighbours are wanted, by what the arms brought: each once.
    fn turns(&self, lexical: &[(Key, f64)], dense: &[(Key, f32)]) -> Option<Vec<Key>> {
        let mut keys = self.neighbours.clone()?;
        keys.extend(lexical.iter().map(|(key, _)| *key));
        keys.extend(dense.iter().map(|(key, _)| *key));
        keys.sort_unstable();
        keys.dedup();
        Some(keys)
    }

    /// What the lexical arm has found and the index has not: a memory that both arms judge is told from one that one of them
    /// has not seen.
    fn also_dense(&self, lexical: &[(Key, f64)]) -> Option<Rescoring> {
        let dense = self.dense.as_ref()?;
        let known: FxHashSet<Key> = dense.keys.iter().copied().collect();
        let keys = lexical.iter().map(|(key, _)| *key);
        let keys: Vec<Key> = keys.filter(|key| !known.contains(key)).collect();
        (!keys.is_empty()).then(|| Rescoring {
            model: dense.model.clone(),
            keys,
            vector: dense.vector.clone(),
        })
    }

    /// Nothing yet.
    pub fn of(tenant: &TenantId) -> Self {
        Self {
            tenant: tenant.clone(),
            lexical: None,
            dense: None,
            neighbours: None,
        }
    }
}

/// What the arms of a search brought.
#[derive(Debug)]
pub struct Scored {
    /// The best memories by BM25 over any of the terms, best first; scores are positive, and made from the tenant's own
    /// texts alone.
    pub lexical: Vec<(Key, f64)>,
    /// Cosines of the candidates of both arms that have a vector, or why there are none.
    pub dense: Result<Vec<(Key, f32)>, MemoryError>,
    /// For turns of conversations, the turns directly before and after them: `(turn, neighbour)`.
    pub neighbours: Vec<(Key, Key)>,
    /// Milliseconds in the lexical arm.
    pub lexical_ms: f64,
    /// Milliseconds in the dense arm.
    pub dense_ms: f64,
}

/// A memory with the numbers that a search needs.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its number.
    pub key: Key,
    /// The memory.
    pub memory: Memory,
}

/// The relational store.
#[async_trait]
pub trait Relational: Policies + Documents + Moving {
    /// Adds memories in one transaction; an item that is refused does not touch the others.
    async fn add(
        &self,
        writer: &Writer,
        items: Vec<Addition>,
    ) -> Result<Vec<Result<Written, MemoryError>>, MemoryError>;

    /// Changes memories in one transaction, each when its etag fits; an item that is refused does not touch the others.
    async fn change(
        &self,
        writer: &Writer,
        items: Vec<ChangeItem>,
    ) -> Result<Vec<Result<Written, MemoryError>>, MemoryError>;

    /// Versions of a memory of the tenant, newest first, older than one of them.
    async fn history(
        &self,
        tenant: &TenantId,
        id: MemoryId,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Version>, MemoryError>;

    /// Counts of what scopes hold.
    async fn counts(
        &self,
        tenant: &TenantId,
        model: &str,
        scopes: &[ScopeKey],
        now: Timestamp,
    ) -> Result<Counts, MemoryError>;

    /// What an earlier write with this request id answered.
    async fn replay(&self, writer: &Writer, idempotency: &Idempotency) -> Result<Option<Written>, MemoryError>;

    /// Which of these are there and shown: a scope with the identity of a body.
    async fn known(&self, tenant: &TenantId, places: &[(Scope, [u8; 32])]) -> Result<Vec<bool>, MemoryError>;

    /// One memory of the tenant, deleted ones included.
    async fn get(&self, tenant: &TenantId, id: MemoryId) -> Result<Option<Stored>, MemoryError>;

    /// One memory of the tenant as it was at a time; `None` when it was not there then, or was removed for good since.
    async fn past(&self, tenant: &TenantId, id: MemoryId, at: Timestamp) -> Result<Option<Memory>, MemoryError>;

    /// The memories of the scopes that were shown and true at a time and satisfied a filter then; of those that have changed
    /// since at most `limit`, the last changed first.
    async fn as_of(
        &self,
        tenant: &TenantId,
        scopes: &[ScopeKey],
        filter: Option<&Filter>,
        at: Timestamp,
        limit: usize,
    ) -> Result<AsOf, MemoryError>;

    /// In how many of the tenant's texts terms are, or were not long ago.
    async fn frequencies(&self, tenant: &TenantId, terms: &[String]) -> Result<Frequencies, MemoryError>;

    /// The scopes of a tenant that a view shows, only in `layers` when some are named.
    async fn visible(&self, tenant: &TenantId, view: &View, layers: &[Layer]) -> Result<Vec<ScopeKey>, MemoryError>;

    /// Memories, newest first.
    async fn list(&self, listing: &Listing) -> Result<Vec<Stored>, MemoryError>;

    /// What a search looks at, all as of one moment.
    async fn seen(&self, sight: &Sight) -> Result<Seen, MemoryError>;

    /// Scores the candidates of a search, all as of one moment. A dense arm that fails leaves the lexical one.
    async fn scored(&self, scoring: &Scoring) -> Result<Scored, MemoryError>;

    /// Live memories of the tenant by number, in any order; the others are left out.
    async fn fetch(&self, tenant: &TenantId, keys: &[Key], now: Timestamp) -> Result<Vec<Stored>, MemoryError>;

    /// Cosines of memories' vectors with a vector, over as many dimensions as it has; memories without a vector are left out.
    async fn cosines(&self, tenant: &TenantId, rescoring: &Rescoring) -> Result<Vec<(Key, f32)>, MemoryError>;

    /// Vectors by number, at full size: of one tenant or of all.
    async fn vectors(
        &self,
        tenant: Option<&TenantId>,
        model: &str,
        keys: &[Key],
    ) -> Result<Vec<(Key, Vec<f32>)>, MemoryError>;

    /// Changes after a place in the outbox, in order. What is told will last: where a store has several nodes, the writable one
    /// tells it.
    async fn events(&self, after: Sequence, limit: usize) -> Result<Vec<IndexEvent>, MemoryError>;

    /// How many changes there are after a place, counted up to `most`; any node may say it.
    async fn missing(&self, after: Sequence, most: usize) -> Result<usize, MemoryError> {
        Ok(self.events(after, most).await?.len())
    }

    /// Changes after a place in the outbox, in order, for watchers: of one tenant or of all. Of a change whose memory was
    /// removed for good since, only the removal is told.
    async fn changes(
        &self,
        tenant: Option<&TenantId>,
        after: Sequence,
        limit: usize,
    ) -> Result<Vec<domain::Change>, MemoryError>;

    /// The last place in the outbox; every read that begins after this sees at least what is at or before it.
    async fn last_sequence(&self) -> Result<Sequence, MemoryError>;

    /// Whether there is a change of this place; before the first one, there is. A store that was put back to an earlier time has
    /// not got what came after it, though its places may go on beyond.
    async fn has(&self, place: Sequence) -> Result<bool, MemoryError>;

    /// Waits until every read that begins after this sees at least what is at or before that place in the outbox, of which somebody
    /// else has told. A place that is nowhere holds up nobody else.
    async fn reach(&self, sequence: Sequence) -> Result<(), MemoryError>;

    /// The state of memories for the index; those that are gone or deleted are left out.
    async fn states(&self, model: &str, keys: &[Key]) -> Result<Vec<IndexState>, MemoryError>;

    /// The state of one memory of the tenant; `None` when it is gone or deleted.
    async fn state(&self, tenant: &TenantId, id: MemoryId, model: &str) -> Result<Option<IndexState>, MemoryError>;

    /// The states of all memories after a number, in order; `pending` only those without a vector.
    async fn scan(&self, model: &str, after: Key, limit: usize, pending: bool) -> Result<Vec<IndexState>, MemoryError>;

    /// Stores vectors that were pending, for the versions that they were made of, each with an event in the outbox; how many
    /// were stored.
    async fn put_codes(
        &self,
        model: &str,
        codes: &[(MemoryId, i64, Code)],
        now: Timestamp,
    ) -> Result<usize, MemoryError>;

    /// Memories with all that belongs to them, in the order in which they were stored.
    async fn export(&self, page: &ExportPage) -> Result<Vec<Exported>, MemoryError>;

    /// Takes memories with their places in the stream in as they were and remembers the progress, in one transaction; an item
    /// that is refused does not touch the others, and its place is added to those of the progress.
    async fn import(
        &self,
        writer: &Writer,
        id: &RequestId,
        items: Vec<(i64, Imported)>,
        progress: &mut Progress,
    ) -> Result<Imports, MemoryError>;

    /// How far the writer's import of that id has come.
    async fn import_progress(&self, writer: &Writer, id: &RequestId) -> Result<Option<Progress>, MemoryError>;

    /// Forgets how far it has come, once it is complete.
    async fn end_import(&self, writer: &Writer, id: &RequestId) -> Result<(), MemoryError>;

    /// The models that have made vectors.
    async fn models(&self) -> Result<Vec<String>, MemoryError>;

    /// How many vectors of memories that are not deleted a model has made. Counting reads them all.
    async fn vectors_by(&self, model: &str) -> Result<i64, MemoryError>;

    /// Forgets all vectors that a model has made.
    async fn forget_model(&self, model: &str) -> Result<(), MemoryError>;

    /// Deletes what has expired, at most `limit` memories; how many there were.
    async fn reap(&self, now: Timestamp, limit: usize) -> Result<usize, MemoryError>;

    /// What tells this store from every other one.
    async fn identity(&self) -> Result<String, MemoryError>;

    /// What was noted under a name.
    async fn note(&self, name: &str) -> Result<Option<String>, MemoryError>;

    /// Notes something under a name, in place of what was noted before.
    async fn put_note(&self, name: &str, value: &str) -> Result<(), MemoryError>;

    /// How it is at the moment.
    fn condition(&self) -> Condition;

    /// Closes the store.
    async fn close(&self);
}

/// How a store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It works.
    Well,
    /// It works with less: what is away.
    Weak(String),
    /// It can't be asked.
    Away(String),
}

impl Condition {
    /// What is wrong with it.
    pub fn trouble(&self) -> Option<&str> {
        match self {
            Self::Well => None,
            Self::Weak(what) | Self::Away(what) => Some(what),
        }
    }
}

/// Which memories an export reads.
#[derive(Clone, Debug)]
pub struct ExportPage {
    /// The tenant.
    pub tenant: TenantId,
    /// The scopes that are visible.
    pub scopes: Vec<ScopeKey>,
    /// Only those that satisfy it.
    pub filter: Option<Filter>,
    /// After this one, in the order in which they were stored.
    pub after: Key,
    /// At most so many.
    pub limit: usize,
    /// Also deleted ones, and the versions of all.
    pub history: bool,
    /// Also vectors.
    pub vectors: bool,
    /// Bytes that the versions of one memory may have.
    pub most: usize,
    /// The time of the call.
    pub now: Timestamp,
}

/// A memory with all that belongs to it.
#[derive(Clone, Debug)]
pub struct Exported {
    /// Its number.
    pub key: Key,
    /// The memory.
    pub memory: Memory,
    /// Its versions, oldest first.
    pub versions: Vec<Version>,
    /// Its vectors.
    pub vectors: Vec<StoredVector>,
}

/// A memory to take in as it was.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The memory; it gets a new id when it has none of its own, or another tenant has a memory of that id.
    pub memory: Memory,
    /// It brings its own id.
    pub named: bool,
    /// Its versions, oldest first; none: it begins anew.
    pub versions: Vec<Version>,
    /// Its vectors; only that of the serving model is of use.
    pub vectors: Vec<StoredVector>,
    /// Only while its scope holds fewer memories, by the policy of that name.
    pub most: Option<(i64, String)>,
}

/// How far an import has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Items of the stream that have been looked at.
    pub items: i64,
    /// Digest of the stream so far.
    pub digest: [u8; 32],
    /// Those of them that were refused, by their places: they are looked at again when the stream is.
    pub refused: BTreeSet<i64>,
}

/// What became of the items of an import, each with its place in the outbox.
pub type Imports = Vec<Result<(domain::Outcome, Sequence), MemoryError>>;

/// Where rules are kept.
#[async_trait]
pub trait Policies: Send + Sync {
    /// All policies of a tenant, by name, with all that were acknowledged by any copy of the service: rules hold at once, and
    /// whoever looks sees those that hold.
    async fn policies(&self, tenant: &TenantId) -> Result<Vec<Policy>, MemoryError>;

    /// Writes a policy; its version, time and author are given by the store. `seen` is the etag of what is replaced, as far as
    /// its writer knows: `Stale` when it is another one by now, or there is one.
    async fn put_policy(
        &self,
        writer: &Writer,
        policy: Policy,
        seen: Option<String>,
        etag: Option<String>,
        idempotency: Option<Idempotency>,
    ) -> Result<Policy, MemoryError>;

    /// Deletes a policy.
    async fn delete_policy(&self, writer: &Writer, name: &str, etag: Option<String>) -> Result<(), MemoryError>;

    /// Removes for good what was deleted in a scope before a time, at most `limit` memories; how many were removed.
    async fn purge_deleted(
        &self,
        scope: ScopeKey,
        before: Timestamp,
        now: Timestamp,
        limit: usize,
    ) -> Result<usize, MemoryError>;

    /// The scopes with deleted memories, of tenants that have policies.
    async fn governed(&self) -> Result<Vec<(TenantId, Vec<(ScopeKey, Scope)>)>, MemoryError>;
}

/// Which documents to list.
#[derive(Clone, Debug)]
pub struct DocumentListing {
    /// The tenant.
    pub tenant: TenantId,
    /// The scopes that are visible.
    pub scopes: Vec<ScopeKey>,
    /// Only at or below this path; empty: all.
    pub prefix: String,
    /// Only what comes after this place.
    pub after: Option<(String, i64)>,
    /// At most so many.
    pub limit: usize,
    /// Also deleted ones.
    pub show_deleted: bool,
}

/// Where documents are kept.
#[async_trait]
pub trait Documents: Send + Sync {
    /// Changes a document; the version written, and its place in the outbox.
    async fn change_document(
        &self,
        writer: &Writer,
        change: DocumentChange,
    ) -> Result<(Document, Sequence), MemoryError>;

    /// Whether a change with this request id is done already.
    async fn document_replays(&self, writer: &Writer, idempotency: &Idempotency) -> Result<bool, MemoryError>;

    /// One version of the document that lives in a scope, the newest without a number.
    async fn document(
        &self,
        tenant: &TenantId,
        scope: &Scope,
        path: &str,
        version: Option<i64>,
    ) -> Result<Option<Document>, MemoryError>;

    /// The newest versions without their content, by path, each with its number.
    async fn documents(&self, listing: &DocumentListing) -> Result<Vec<(i64, Document)>, MemoryError>;

    /// The versions of a document without their content, newest first, older than one of them.
    async fn document_versions(
        &self,
        tenant: &TenantId,
        scope: &Scope,
        path: &str,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Document>, MemoryError>;
}
