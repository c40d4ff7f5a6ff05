//! What searches read most of the store, kept in memory: words, once somebody has looked for some, and the vectors that were
//! compared.
//!
//! It follows the outbox. Every read of the database sees one state of it, whose last change it names: whoever searches first
//! applies the changes that came since, so that nothing is ever older here than in the state that is read. What can't be had
//! here, because there is too much of it or because it is not there yet, is read from the database as ever.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock, TryLockError};

use aeterna_storage::StorageError;
use aeterna_storage::rusqlite::{Connection, params};
use aeterna_types::TenantId;
use rustc_hash::FxHashMap;

use super::read::{self, get, limit, rows, text};
use super::words::Words;
use super::{SqliteStore, parsed};
use crate::domain::{Key, Kind, Memory, ScopeKey, Sequence};
use crate::error::MemoryError;
use crate::store::code::{Code, Query, prefetch};
use crate::store::locks::{lock, reading, writing};
use crate::store::{LexicalSearch, Rescoring};

/// Changes that are applied at a time. Who is further behind does not wait for them.
const CHANGES: usize = 500;
/// Memories whose words are read at a time.
const PAGE: usize = 500;
/// Bytes that a vector takes beside its code, about.
const ENTRY: usize = 72;

/// Words and vectors in memory.
#[derive(Debug)]
pub struct Resident {
    /// Bytes that it may take; 0: nothing is kept.
    limit: usize,
    /// Nobody has asked for words yet.
    cold: AtomicBool,
    /// Held by whoever applies changes or reads words; taken before `inner`.
    following: Mutex<()>,
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Everything up to this change is in; words may be newer.
    at: Sequence,
    words: Lexicon,
    /// About how many bytes the words take.
    words_bytes: usize,
    /// By the model's identity.
    vectors: HashMap<String, Vectors>,
    /// About how many bytes the vectors take.
    vectors_bytes: usize,
}

/// The words of all tenants.
#[derive(Clone, Debug, Default)]
enum Lexicon {
    /// None are kept: nobody has asked for any, they take too much, or can't be read.
    #[default]
    Off,
    /// Those of some memories are there. Those that have changed meanwhile are not to be read once more.
    Filling(Tenants, Arc<Mutex<HashSet<Key>>>),
    /// All are there.
    Whole(Tenants),
}

/// By the tenant's name. Each has a lock of its own, so that none waits for the work on another's.
type Tenants = Arc<RwLock<HashMap<String, Arc<RwLock<Words>>>>>;

/// Vectors of one model.
#[derive(Debug, Default)]
struct Vectors {
    codes: FxHashMap<Key, Box<[u8]>>,
    /// The keys, and some that are there no more, in no order.
    order: Vec<Key>,
}

/// What has changed of a memory.
#[derive(Default)]
struct Changed {
    tenant: String,
    /// More than its vectors.
    reworded: bool,
    /// Its scope and terms, when it is there and was reworded.
    words: Option<(ScopeKey, Vec<String>)>,
    /// Its codes, by model, when it is there.
    codes: Vec<(String, Box<[u8]>)>,
}

impl Resident {
    /// Of a store whose last change is `at`; it takes about so many bytes at most.
    pub fn new(limit: u64, at: Sequence) -> Self {
        let inner = Inner { at, ..Inner::default() };
        Self {
            limit: usize::try_from(limit).unwrap_or(usize::MAX),
            cold: AtomicBool::new(limit > 0),
            following: Mutex::default(),
            inner: RwLock::new(inner),
        }
    }

    /// Applies what has changed up to the state that `connection` reads, or a part of it; false when there is more, and what is
    /// here is not to be used.
    pub fn follow(&self, connection: &Connection) -> bool {
        self.limit > 0
            && self.try_follow(connection).unwrap_or_else(|error| {
                tracing::debug!(%error, "what is kept in memory can't follow the store");
                false
            })
    }

    fn try_follow(&self, connection: &Connection) -> Result<bool, MemoryError> {
        let last = read::last_sequence(connection)?;
        let at = reading(&self.inner).at;
        if at >= last {
            return Ok(true);
        }
        // What one is at, the others need not do as well; of much, they do not wait for the end.
        let _following = if last.0 - at.0 < CHANGES as i64 {
            lock(&self.following)
        } else {
            match self.following.try_lock() {
                Ok(following) => following,
                Err(TryLockError::Poisoned(following)) => following.into_inner(),
                Err(TryLockError::WouldBlock) => return Ok(false),
            }
        };
        let (from, models, words) = {
            let inner = reading(&self.inner);
            if inner.at >= last {
                return Ok(true);
            }
            let models: Vec<String> = inner.vectors.keys().cloned().collect();
            (inner.at, models, inner.words.clone())
        };
        if models.is_empty() && matches!(words, Lexicon::Off) {
            let mut inner = writing(&self.inner);
            // Somebody may have begun to keep vectors since, as of this state or of one before.
            if inner.vectors.is_empty() {
                inner.at = last;
            }
            return Ok(inner.at >= last);
        }
        let (mut changed, upto) = changes(connection, from)?;
        for (key, change) in &mut changed {
            change.read(connection, *key, &models, !matches!(words, Lexicon::Off))?;
        }
        let grown = words.apply(&mut changed);
        let mut inner = writing(&self.inner);
        for (key, change) in changed {
            inner.forget(key);
            for (model, code) in change.codes {
                inner.keep(&model, key, code, self.limit);
            }
        }
        inner.at = upto;
        inner.words_bytes = inner.words_bytes.saturating_add_signed(grown);
        let too_many = inner.make_room(self.limit);
        drop(inner);
        drop(too_many);
        Ok(upto >= last)
    }

    /// The best memories by their words, as of the state that was followed; `None` when they are not here, or too many.
    pub fn lexical(&self, tenant: &TenantId, search: &LexicalSearch) -> Option<Vec<(Key, f64)>> {
        let only = search.among.as_ref().and_then(|among| among.only.as_ref());
        if (search.filter.is_some() || search.as_of.is_some()) && only.is_none() {
            return None;
        }
        let Lexicon::Whole(tenants) = reading(&self.inner).words.clone() else {
            return None;
        };
        let Some(words) = reading(&tenants).get(tenant.as_str()).cloned() else {
            return Some(Vec::new());
        };
        reading(&words).search(&search.terms, &search.scopes, only, search.limit)
    }

    /// Cosines of memories that have a vector. When the state that is read was followed, they come from here; those that are
    /// not here yet are read, and kept for the next time.
    ///
    /// # Errors
    /// When the store can't be read.
    pub fn cosines(
        &self,
        connection: &Connection,
        rescoring: &Rescoring,
        follows: bool,
    ) -> Result<Vec<(Key, f32)>, MemoryError> {
        let query = Query::new(&rescoring.vector);
        let mut cosines = Vec::with_capacity(rescoring.keys.len());
        let mut compare = |key: Key, code: &Code<&[u8]>| {
            if code.dimension() >= query.dimension() {
                cosines.push((key, code.cosine(&query)));
            }
        };
        let mut missing = Vec::new();
        match reading(&self.inner).vectors.get(&rescoring.model).filter(|_| follows) {
            Some(vectors) => {
                let mut found: Vec<(Key, &[u8])> = Vec::with_capacity(rescoring.keys.len());
                for key in &rescoring.keys {
                    match vectors.codes.get(key) {
                        Some(code) => found.push((*key, code)),
                        None => missing.push(*key),
                    }
                }
                for (place, (key, code)) in found.iter().enumerate() {
                    if let Some((_, next)) = found.get(place + 2) {
                        prefetch(next);
                    }
                    // They were read as codes before they were kept.
                    if let Some(code) = Code::from_bytes(*code) {
                        compare(*key, &code);
                    }
                }
            }
            None => missing.clone_from(&rescoring.keys),
        }
        let mut fresh: Vec<(Key, Box<[u8]>)> = Vec::new();
        read::codes(connection, &rescoring.model, &missing, |key, code| {
            compare(key, code);
            if follows {
                fresh.push((key, code.as_bytes().into()));
            }
        })?;
        if !fresh.is_empty() {
            let last = read::last_sequence(connection)?;
            let mut inner = writing(&self.inner);
            // What has changed since they were read is not known here.
            if inner.at == last {
                for (key, code) in fresh {
                    inner.keep(&rescoring.model, key, code, self.limit);
                }
            }
        }
        Ok(cosines)
    }

    /// About how many bytes it takes.
    pub fn bytes(&self) -> usize {
        let inner = reading(&self.inner);
        inner.words_bytes + inner.vectors_bytes
    }

    /// Forgets the vectors of a model.
    pub fn forget_model(&self, model: &str) {
        let mut inner = writing(&self.inner);
        let vectors = inner.vectors.remove(model);
        let bytes = vectors.iter().flat_map(|vectors| vectors.codes.values());
        inner.vectors_bytes -= bytes.map(|code| code.len() + ENTRY).sum::<usize>();
        drop(inner);
        drop(vectors);
    }

    /// Whether words are to be read now, by the caller; true once.
    pub fn begins(&self) -> bool {
        self.cold.load(Ordering::Relaxed) && self.cold.swap(false, Ordering::SeqCst)
    }

    /// Reads the words of all memories.
    pub async fn fill(store: SqliteStore) {
        let mut after = Some(Key(0));
        while let Some(from) = after {
            let resident = Arc::clone(&store.resident);
            let page = store.read(move |connection| resident.fill_page(connection, from)).await;
            after = page.unwrap_or_else(|error| {
                tracing::debug!(%error, "words are not read into memory");
                let resident = Arc::clone(&store.resident);
                drop(tokio::task::spawn_blocking(move || resident.give_up(&error)));
                None
            });
        }
    }

    /// Keeps no words. When the store was too busy, somebody else begins again.
    fn give_up(&self, why: &MemoryError) {
        let following = lock(&self.following);
        let mut inner = writing(&self.inner);
        let words = std::mem::take(&mut inner.words);
        inner.words_bytes = 0;
        drop(inner);
        drop(following);
        drop(words);
        if matches!(why, MemoryError::Store(StorageError::Unavailable(_))) {
            self.cold.store(true, Ordering::SeqCst);
        }
    }

    /// Reads the words of some more memories, from the first ones on; the last of them, or `None` when that was all.
    fn fill_page(&self, connection: &Connection, after: Key) -> Result<Option<Key>, MemoryError> {
        if after == Key(0) {
            // Before anything is read: what has changed by then is read, and what changes later is applied.
            writing(&self.inner).words = Lexicon::Filling(Tenants::default(), Arc::default());
        }
        let query =
            "SELECT key, tenant, scope, record FROM memories WHERE key > ? AND deleted_at IS NULL ORDER BY key LIMIT ?";
        let page = rows(connection, query, params![after.0, limit(PAGE)], |row| {
            let terms = terms(text(row, 3)?)?;
            Ok((
                Key(get(row, 0)?),
                text(row, 1)?.to_owned(),
                ScopeKey(get(row, 2)?),
                terms,
            ))
        })?;
        let last = page.last().map(|(key, ..)| *key).filter(|_| page.len() == PAGE);
        let _following = lock(&self.following);
        let Lexicon::Filling(tenants, changed) = reading(&self.inner).words.clone() else {
            return Ok(None);
        };
        let changed = lock(&changed);
        let mut grown = 0;
        for (key, tenant, scope, terms) in page {
            if !changed.contains(&key) {
                grown += put(&tenants, &tenant, key, Some((scope, terms)));
            }
        }
        drop(changed);
        let mut inner = writing(&self.inner);
        inner.words_bytes = inner.words_bytes.saturating_add_signed(grown);
        if last.is_none() {
            inner.words = Lexicon::Whole(tenants);
        }
        let too_many = inner.make_room(self.limit);
        drop(inner);
        Ok(last.filter(|_| too_many.is_none()))
    }
}

impl Changed {
    /// Reads what is to be kept of it, if it is there.
    fn read(&mut self, connection: &Connection, key: Key, models: &[String], worded: bool) -> Result<(), MemoryError> {
        let query = "SELECT scope, record FROM memories WHERE key = ? AND deleted_at IS NULL";
        let reworded = worded && self.reworded;
        let there = rows(connection, query, [key.0], |row| {
            // A record that can't be read is found by no words.
            if reworded && let Ok(terms) = terms(text(row, 1)?) {
                self.words = Some((ScopeKey(get(row, 0)?), terms));
            }
            Ok(())
        })?;
        if there.is_empty() {
            return Ok(());
        }
        for model in models {
            let kept = read::codes(connection, model, &[key], |_, code| {
                self.codes.push((model.clone(), code.as_bytes().into()));
            });
            // Whoever compares it is told why it can't be read.
            kept.unwrap_or_else(|error| tracing::debug!(%error, "a vector is not kept in memory"));
        }
        Ok(())
    }
}

/// Puts the words of a memory in the place of those before, or takes them out; by how many bytes there are more.
fn put(tenants: &Tenants, tenant: &str, key: Key, said: Option<(ScopeKey, Vec<String>)>) -> isize {
    let known = reading(tenants).get(tenant).cloned();
    let words = known.unwrap_or_else(|| Arc::clone(writing(tenants).entry(tenant.to_owned()).or_default()));
    let mut words = writing(&words);
    let before = words.bytes();
    match said {
        Some((scope, terms)) => words.put(key, scope, terms),
        None => words.remove(key),
    }
    words.bytes() as isize - before as isize
}

impl Lexicon {
    /// Applies changes; by how many bytes there are more.
    fn apply(&self, changes: &mut BTreeMap<Key, Changed>) -> isize {
        let (tenants, seen) = match self {
            Self::Off => return 0,
            Self::Filling(tenants, seen) => (tenants, Some(seen)),
            Self::Whole(tenants) => (tenants, None),
        };
        let mut grown = 0;
        for (key, change) in changes.iter_mut().filter(|(_, change)| change.reworded) {
            if let Some(seen) = seen {
                lock(seen).insert(*key);
            }
            grown += put(tenants, &change.tenant, *key, change.words.take());
        }
        grown
    }
}

impl Inner {
    /// Takes the vectors of a memory out.
    fn forget(&mut self, key: Key) {
        for vectors in self.vectors.values_mut() {
            if let Some(code) = vectors.codes.remove(&key) {
                self.vectors_bytes -= code.len() + ENTRY;
            }
        }
    }

    /// Keeps a vector, where there is no room in the place of others.
    fn keep(&mut self, model: &str, key: Key, code: Box<[u8]>, most: usize) {
        let bytes = code.len() + ENTRY;
        while self.words_bytes + self.vectors_bytes + bytes > most {
            if !self.drop_one(key) {
                return;
            }
        }
        if !self.vectors.contains_key(model) {
            self.vectors.insert(model.to_owned(), Vectors::default());
        }
        let Some(vectors) = self.vectors.get_mut(model) else {
            return;
        };
        match vectors.codes.insert(key, code) {
            Some(before) => self.vectors_bytes -= before.len() + ENTRY,
            None => vectors.order.push(key),
        }
        self.vectors_bytes += bytes;
        vectors.tidy();
    }

    /// Drops a vector that `key` picks, of the model that has most; false when there is none.
    fn drop_one(&mut self, key: Key) -> bool {
        let Some(vectors) = self.vectors.values_mut().max_by_key(|vectors| vectors.codes.len()) else {
            return false;
        };
        while !vectors.order.is_empty() {
            // As good as any other, and no generator of random numbers.
            let picked = (key.0 as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) % vectors.order.len() as u64;
            let dropped = vectors.order.swap_remove(picked as usize);
            if let Some(code) = vectors.codes.remove(&dropped) {
                self.vectors_bytes -= code.len() + ENTRY;
                return true;
            }
        }
        false
    }

    /// Drops vectors until all have room, and words only when they take more than half of it: they are freed once this is not
    /// locked any more.
    fn make_room(&mut self, most: usize) -> Option<Lexicon> {
        let mut dropped = None;
        if self.words_bytes > most / 2 {
            tracing::info!(
                bytes = self.words_bytes,
                "words take more than half of memory.cache_bytes: searches read them from disk"
            );
            dropped = Some(std::mem::take(&mut self.words));
            self.words_bytes = 0;
        }
        let mut last = Key(self.at.0);
        while self.words_bytes + self.vectors_bytes > most && self.drop_one(last) {
            last = Key(last.0.wrapping_add(1));
        }
        dropped
    }
}

impl Vectors {
    /// Clears keys away that are there no more, when they are many.
    fn tidy(&mut self) {
        if self.order.len() > 2 * self.codes.len() + 1000 {
            self.order = self.codes.keys().copied().collect();
        }
    }
}

/// Memories that have changed since, some of them, and the change up to which these are all.
fn changes(connection: &Connection, since: Sequence) -> Result<(BTreeMap<Key, Changed>, Sequence), MemoryError> {
    let query = "SELECT sequence, memory, tenant, kind FROM outbox WHERE sequence > ? ORDER BY sequence LIMIT ?";
    let mut changed: BTreeMap<Key, Changed> = BTreeMap::new();
    let places = rows(connection, query, params![since.0, limit(CHANGES)], |row| {
        let key = Key(get(row, 1)?);
        let reworded = text(row, 3)? != Kind::Embedded.name();
        // What is not of a memory has no number.
        if key.0 > 0 {
            let change = changed.entry(key).or_default();
            change.reworded |= reworded;
            text(row, 2)?.clone_into(&mut change.tenant);
        }
        Ok(Sequence(get(row, 0)?))
    })?;
    Ok((changed, places.last().copied().unwrap_or(since)))
}

/// The terms that a record is found by.
fn terms(record: &str) -> Result<Vec<String>, MemoryError> {
    let memory: Memory = parsed(record, "memory")?;
    Ok(aeterna_text::analyse(&memory.body.lexical_text()))
}

#[cfg(test)]
mod tests;
