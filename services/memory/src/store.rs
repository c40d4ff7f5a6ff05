//! The ports: the relational store, which is the only source of truth, and the vector index, which is rebuilt from it.

pub mod code;
pub mod flat;
pub mod sqlite;

use std::collections::HashSet;

use aeterna_types::{Layer, MemoryId, Scope, TenantId, Timestamp};
use async_trait::async_trait;

use crate::domain::{Body, Idempotency, Key, Memory, ScopeKey, Sequence, View, Writer, Written};
use crate::error::MemoryError;
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
}

/// What List asks for.
#[derive(Clone, Debug)]
pub struct Listing {
    /// The scopes that are visible.
    pub scopes: Vec<ScopeKey>,
    /// Only what comes after this id, newest first.
    pub before: Option<MemoryId>,
    /// At most so many.
    pub limit: usize,
    /// Also deleted and expired ones.
    pub show_deleted: bool,
    /// The time of the call.
    pub now: Timestamp,
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
    /// Its scope.
    pub scope: ScopeKey,
    /// Its tenant.
    pub tenant: TenantId,
    /// Its vector by the model asked for; `None`: pending.
    pub code: Option<Code>,
    /// The text to embed when it is pending.
    pub text: String,
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
pub trait Relational: Send + Sync {
    /// Adds memories in one transaction; an item that is refused does not touch the others.
    async fn add(
        &self,
        writer: &Writer,
        items: Vec<Addition>,
    ) -> Result<Vec<Result<Written, MemoryError>>, MemoryError>;

    /// Changes one memory, when the etag fits.
    async fn change(
        &self,
        writer: &Writer,
        id: MemoryId,
        etag: Option<&str>,
        change: Change,
        idempotency: Option<Idempotency>,
    ) -> Result<Written, MemoryError>;

    /// What an earlier write with this request id answered.
    async fn replay(&self, writer: &Writer, idempotency: &Idempotency) -> Result<Option<Written>, MemoryError>;

    /// One memory of the tenant, deleted ones included.
    async fn get(&self, tenant: &TenantId, id: MemoryId) -> Result<Option<Stored>, MemoryError>;

    /// The scopes of a tenant that a view shows, only in `layers` when some are named.
    async fn visible(&self, tenant: &TenantId, view: &View, layers: &[Layer]) -> Result<Vec<ScopeKey>, MemoryError>;

    /// Memories, newest first.
    async fn list(&self, listing: &Listing) -> Result<Vec<Stored>, MemoryError>;

    /// The best memories by BM25 over any of the terms, best first; scores are positive.
    async fn lexical(
        &self,
        scopes: &[ScopeKey],
        terms: &[String],
        limit: usize,
    ) -> Result<Vec<(Key, f64)>, MemoryError>;

    /// Live memories by number, in any order; the others are left out.
    async fn fetch(&self, keys: &[Key], now: Timestamp) -> Result<Vec<Stored>, MemoryError>;

    /// For turns of conversations, the turns directly before and after them: `(turn, neighbour)`.
    async fn neighbours(&self, keys: &[Key]) -> Result<Vec<(Key, Key)>, MemoryError>;

    /// Vectors by number.
    async fn codes(&self, model: &str, keys: &[Key]) -> Result<Vec<(Key, Code)>, MemoryError>;

    /// Changes after a place in the outbox, in order.
    async fn events(&self, after: Sequence, limit: usize) -> Result<Vec<IndexEvent>, MemoryError>;

    /// The last place in the outbox.
    async fn last_sequence(&self) -> Result<Sequence, MemoryError>;

    /// The state of memories for the index; those that are gone or deleted are left out.
    async fn states(&self, model: &str, keys: &[Key]) -> Result<Vec<IndexState>, MemoryError>;

    /// The states of all memories after a number, in order; `pending` only those without a vector.
    async fn scan(&self, model: &str, after: Key, limit: usize, pending: bool) -> Result<Vec<IndexState>, MemoryError>;

    /// Stores vectors that were pending.
    async fn put_codes(&self, model: &str, codes: &[(Key, Code)]) -> Result<(), MemoryError>;

    /// Closes the store.
    async fn close(&self);
}

/// One vector on its way into the index.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The memory.
    pub key: Key,
    /// Its scope.
    pub scope: ScopeKey,
    /// The vector.
    pub code: Code,
}

/// The vector index. Its calls block; they are made off the async threads.
pub trait VectorIndex: Send + Sync {
    /// Applies changes and remembers that everything up to `watermark` is in.
    ///
    /// # Errors
    /// When the index can't be written; it is then rebuilt on the next start.
    fn apply(&self, upserts: &[Entry], removals: &[Key], watermark: Sequence) -> std::io::Result<()>;

    /// The change up to which everything is in.
    fn watermark(&self) -> Sequence;

    /// The nearest vectors among the scopes by the quantized prefix, best first: candidates for rescoring.
    fn search(&self, query: &Code, scopes: &HashSet<ScopeKey>, exclude: &HashSet<Key>, limit: usize)
    -> Vec<(Key, f32)>;

    /// Vectors in it.
    fn len(&self) -> usize;

    /// Makes everything applied so far survive a loss of power.
    ///
    /// # Errors
    /// When the disk refuses.
    fn flush(&self) -> std::io::Result<()>;
}
