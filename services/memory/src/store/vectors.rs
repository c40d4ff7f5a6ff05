//! The port of the vector index.

use std::sync::Arc;

use aeterna_types::TenantId;
use async_trait::async_trait;
use rustc_hash::FxHashSet;

use super::code::Code;
use super::{Condition, IndexState, StorageError};
use crate::domain::{Key, ScopeKey, Sequence};

/// One memory on its way into the index.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The memory.
    pub key: Key,
    /// Whose it is.
    pub tenant: TenantId,
    /// Its scope.
    pub scope: ScopeKey,
    /// Its vector; `None`: there is none yet.
    pub code: Option<Code>,
    /// The text that is found by its words.
    pub text: String,
}

impl From<&IndexState> for Entry {
    fn from(state: &IndexState) -> Self {
        Self {
            key: state.key,
            tenant: state.tenant.clone(),
            scope: state.scope,
            code: state.code.clone(),
            text: state.lexical.clone(),
        }
    }
}

/// Memories on their way into the index, and those that are there no more.
#[derive(Clone, Debug)]
pub struct Changes {
    /// Those that are there.
    pub upserts: Vec<Entry>,
    /// Those that are gone or deleted.
    pub removals: Vec<Key>,
    /// The change in the outbox that all of it is at least as new as.
    pub at: Sequence,
}

/// How an index is.
#[derive(Clone, Debug)]
pub struct Care {
    /// What stands to serve it.
    pub condition: Condition,
    /// How it is not as the settings say, and works all the same.
    pub differs: Option<String>,
    /// Changes after this one are to be applied once more, for a part of the index may have missed some of them.
    pub again: Option<Sequence>,
}

/// Vectors that an index learns from.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Of all.
    pub all: Vec<Vec<f32>>,
    /// Of tenants that have many of them, each its own.
    pub own: Vec<(TenantId, Vec<Vec<f32>>)>,
}

/// Which vectors a search may find. All of it is exact. Sets of numbers that the store gives itself need no hash against malice.
#[derive(Clone, Debug)]
pub struct Among {
    /// Whose they are.
    pub tenant: TenantId,
    /// Those of these scopes.
    pub scopes: FxHashSet<ScopeKey>,
    /// Only these, when a filter has chosen them.
    pub only: Option<FxHashSet<Key>>,
    /// Not these.
    pub exclude: FxHashSet<Key>,
}

/// The vector index, which is made from the relational store alone.
#[async_trait]
pub trait VectorIndex: Send + Sync {
    /// Applies changes, any of them once more as well; what the index has from a later change stays.
    ///
    /// # Errors
    /// When the index is away or can't be written; nothing or some of it was applied.
    async fn apply(&self, changes: Changes) -> Result<(), StorageError>;

    /// Everything up to this change is in, of an index that was whole; of one that is to be filled it says nothing.
    fn advance(&self, watermark: Sequence);

    /// The change up to which everything is in; `None`: it is not known, or the index must be filled first.
    fn watermark(&self) -> Option<Sequence>;

    /// All copies of the service have this one, so that one of them is enough to write it.
    fn is_shared(&self) -> bool {
        false
    }

    /// How far it was filled when that was interrupted: memories up to this one are in, as of this change.
    fn filled(&self) -> Option<(Key, Sequence)> {
        None
    }

    /// While it is filled: memories from one, which were in, up to another one are in, as of this change.
    ///
    /// # Errors
    /// When the index is away, or what was filled of it is not there any more.
    async fn fill_to(&self, _from: Key, _upto: Key, _at: Sequence) -> Result<(), StorageError> {
        Ok(())
    }

    /// It is filled up to the last memory: everything up to this change is in.
    fn fill_all(&self, _last: Key, at: Sequence) {
        self.advance(at);
    }

    /// The nearest vectors by the quantized prefix, best first: candidates for rescoring.
    ///
    /// # Errors
    /// When the index is away.
    async fn search(&self, query: Code, among: Arc<Among>, limit: usize) -> Result<Vec<(Key, f32)>, StorageError>;

    /// It finds memories by their words, too.
    fn keeps_texts(&self) -> bool {
        false
    }

    /// The memories that have the best of some analysed terms, best first by an approximate BM25: candidates for ranking.
    ///
    /// # Errors
    /// When the index is away.
    async fn lexical(&self, _terms: Vec<String>, _among: Arc<Among>, _limit: usize) -> Result<Vec<Key>, StorageError> {
        Ok(Vec::new())
    }

    /// Vectors in it, as counted by the last [`VectorIndex::tend`] when it is elsewhere.
    fn len(&self) -> usize;

    /// True when there is no vector.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of its vectors, of old ones as many as of new ones, at most `count`: of all scopes, or of these. None when it learns
    /// nothing from them.
    fn some(&self, _count: usize, _scopes: Option<&FxHashSet<ScopeKey>>) -> Vec<Key> {
        Vec::new()
    }

    /// Vectors that there were when the rotation of its first pass was learned; 0: there is none.
    fn learned(&self) -> usize {
        0
    }

    /// Bytes that it takes, as far as it is known here.
    fn bytes(&self) -> u64;

    /// Looks after it, every few seconds: makes what was applied survive a loss of power, and finds out how it is.
    ///
    /// # Errors
    /// When the index is away or the disk refuses.
    async fn tend(&self) -> Result<Care, StorageError>;

    /// What [`Care::again`] asked for is done, up to this change.
    fn repaired(&self, _upto: Sequence) {}

    /// Which of some memories it does not have as they are.
    ///
    /// # Errors
    /// When the index is away.
    async fn unlike(&self, entries: Vec<Entry>) -> Result<Vec<Key>, StorageError>;

    /// Which of some memories it has.
    ///
    /// # Errors
    /// When the index is away.
    async fn present(&self, keys: Vec<Key>) -> Result<Vec<Key>, StorageError>;

    /// The memories after a number that it has, in order.
    ///
    /// # Errors
    /// When the index is away.
    async fn keys(&self, after: Key, limit: usize) -> Result<Vec<Key>, StorageError>;

    /// Removes everything: it follows a store that was put back to an earlier time. It is to be filled anew.
    ///
    /// # Errors
    /// When the index is away.
    async fn clear(&self) -> Result<(), StorageError>;
}

/// What an index of a model may be called where only letters, digits and few signs are taken.
pub fn plain_name(identity: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-@.".contains(c);
    identity.chars().map(|c| if plain(c) { c } else { '_' }).collect()
}
