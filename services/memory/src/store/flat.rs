//! The embedded vector index: a Matryoshka funnel over one memory-mapped file, with exact filters.
//!
//! The file holds, per vector, its key, its scope and 3 bits a value of its prefix, under a checksum. A search narrows down in
//! stages: signs (1 bit a value, kept in memory) for many vectors, the rows of the best of them; the caller rescores what
//! remains with the full-size codes of the relational store. A small manifest says up to which change of the
//! outbox everything is in. Of a model that was not trained for being cut short, all dimensions are kept at first, and then
//! those of a learned rotation, in a directory of its own. All are rebuilt from the relational store when they are missing,
//! damaged, ahead of it, or of another store or model.

mod coarse;
mod file;
pub mod rotation;
mod scan;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use aeterna_types::TenantId;
use async_trait::async_trait;
use rayon::prelude::*;
use rustc_hash::{FxHashMap, FxHashSet};

use super::code::Code;
use super::locks::{reading, writing};
use super::{Among, Care, Changes, Condition, Entry, StorageError, VectorIndex};
use crate::domain::{Key, ScopeKey, Sequence};
use coarse::Turned;
pub use file::Layout;
use file::{BEYOND, Files, Head};
use rotation::Rotations;
use scan::{Rows, Signs};

/// The index of one model.
#[derive(Debug)]
pub struct FlatIndex {
    prefix: usize,
    dimension: usize,
    /// Vectors that there were when the rotation was learned.
    learned: usize,
    rotations: Option<Rotations>,
    /// The change up to which everything is in; [`CLEARED`] while it is to be filled. This and what follows is asked by those
    /// who must not wait for the disk.
    watermark: AtomicI64,
    /// Vectors in it.
    count: AtomicUsize,
    /// Something was applied since it was flushed; a new one has files to write.
    dirty: AtomicBool,
    inner: RwLock<Inner>,
}

/// No change at all.
const CLEARED: i64 = -1;

#[derive(Debug)]
struct Inner {
    files: Files,
    by_key: FxHashMap<Key, usize>,
    keys: Vec<Key>,
    /// Per slot, the place of its scope in `scopes`; [`FREE`] when there is no vector.
    owners: Vec<u32>,
    /// Per slot, its place in the list of its scope's slots.
    places: Vec<u32>,
    scopes: Vec<ScopeKey>,
    by_scope: FxHashMap<ScopeKey, u32>,
    /// Per scope, its slots.
    members: Vec<Vec<u32>>,
    free: Vec<usize>,
    signs: Signs,
}

/// The owner of a slot without a vector.
const FREE: u32 = u32::MAX;

/// An index that was opened, or begun anew because of what is said.
pub enum Opened {
    /// As it was left.
    Intact(FlatIndex),
    /// Empty, to be filled from the relational store.
    Fresh(FlatIndex, String),
}

impl FlatIndex {
    /// Opens the index in `directory` for vectors of a layout; `end` is the last change that the store has.
    ///
    /// # Errors
    /// When the directory can't be written.
    pub fn open(directory: &Path, layout: Layout, end: Sequence) -> io::Result<Opened> {
        match Self::load(directory, &layout, end, None) {
            Ok(index) => Ok(Opened::Intact(index)),
            Err(why) => Ok(Opened::Fresh(Self::create(directory, &layout)?, why)),
        }
    }

    /// Begins an index in `directory`.
    ///
    /// # Errors
    /// When the directory can't be written.
    pub fn create(directory: &Path, layout: &Layout) -> io::Result<Self> {
        let files = Files::create(directory, layout.clone())?;
        Ok(Self::of(layout, files, Sequence::default(), None))
    }

    /// The change up to which an index in `directory` has everything; `None` when there is none that was completed.
    pub fn watermark_in(directory: &Path) -> Option<Sequence> {
        Files::watermark(directory)
    }

    /// Opens the index in `directory` whose rotation was learned.
    ///
    /// # Errors
    /// Why it can't be used.
    pub fn open_learned(directory: &Path, layout: &Layout, end: Sequence) -> Result<Self, String> {
        let rotations = Rotations::read(directory, layout.dimension, layout.prefix);
        Self::load(
            directory,
            layout,
            end,
            Some(rotations.ok_or("its rotation is damaged")?),
        )
    }

    /// Begins an index in `directory` with rotations that were learned.
    ///
    /// # Errors
    /// When the directory can't be written.
    pub fn create_learned(directory: &Path, layout: &Layout, rotations: Rotations) -> io::Result<Self> {
        let files = Files::create(directory, layout.clone())?;
        rotations.write(directory)?;
        Ok(Self::of(layout, files, Sequence::default(), Some(rotations)))
    }

    /// Removes the index that lies in `directory` itself.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(directory: &Path) -> io::Result<()> {
        Files::remove(directory)
    }

    fn of(layout: &Layout, files: Files, watermark: Sequence, rotations: Option<Rotations>) -> Self {
        Self {
            prefix: layout.prefix,
            dimension: layout.dimension,
            learned: layout.learned,
            rotations,
            watermark: AtomicI64::new(watermark.0),
            count: AtomicUsize::new(0),
            dirty: AtomicBool::new(true),
            inner: RwLock::new(Inner::new(files, layout.prefix)),
        }
    }

    fn load(directory: &Path, layout: &Layout, end: Sequence, rotations: Option<Rotations>) -> Result<Self, String> {
        let (files, watermark) = Files::open(directory, layout, end)?;
        let index = Self::of(layout, files, watermark, rotations);
        let mut inner = index.write();
        inner.load(layout.prefix)?;
        index.count.store(inner.by_key.len(), Ordering::SeqCst);
        drop(inner);
        Ok(index)
    }

    /// What is looked at of a tenant's vector.
    fn shorten(&self, tenant: &TenantId, code: &Code) -> Turned {
        Turned::new(match &self.rotations {
            Some(rotations) => rotations.of(tenant).apply(&code.decode()),
            None => code.first(self.prefix),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        reading(&self.inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        writing(&self.inner)
    }
}

impl Inner {
    fn new(files: Files, prefix: usize) -> Self {
        Self {
            files,
            by_key: FxHashMap::default(),
            keys: Vec::new(),
            owners: Vec::new(),
            places: Vec::new(),
            scopes: Vec::new(),
            by_scope: FxHashMap::default(),
            members: Vec::new(),
            free: Vec::new(),
            signs: Signs::new(prefix),
        }
    }

    /// Reads what the file holds.
    fn load(&mut self, prefix: usize) -> Result<(), String> {
        for slot in 0..self.files.slots() {
            let head = self
                .files
                .head(slot)
                .ok_or_else(|| format!("the checksum of vector {slot} does not fit"))?;
            self.keys.push(head.key);
            self.owners.push(FREE);
            self.places.push(0);
            if !head.live {
                self.free.push(slot);
            } else if self.by_key.insert(head.key, slot).is_some() {
                return Err(format!("vector {slot} is there twice"));
            } else {
                self.own(slot, Some(head.scope));
            }
        }
        self.signs
            .refresh(&Rows::new(self.files.rows(), prefix), self.keys.len());
        Ok(())
    }

    /// Gives a slot to a scope, or to nobody.
    fn own(&mut self, slot: usize, scope: Option<ScopeKey>) {
        let before = self.owners[slot] as usize;
        if let Some(members) = self.members.get_mut(before) {
            let place = self.places[slot] as usize;
            members.swap_remove(place);
            if let Some(moved) = members.get(place) {
                self.places[*moved as usize] = self.places[slot];
            }
        }
        let Some(scope) = scope else {
            self.owners[slot] = FREE;
            return;
        };
        let next = u32::try_from(self.scopes.len()).unwrap_or(FREE - 1);
        let owner = *self.by_scope.entry(scope).or_insert(next);
        if owner == next {
            self.scopes.push(scope);
            self.members.push(Vec::new());
        }
        let members = &mut self.members[owner as usize];
        self.owners[slot] = owner;
        // Slots are counted in 32 bits: a file of so many rows would be larger than any disk.
        self.places[slot] = u32::try_from(members.len()).unwrap_or(0);
        members.extend(u32::try_from(slot));
    }

    /// A slot that is free, at the end of the file when there is no other.
    fn slot(&mut self) -> io::Result<usize> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        let slot = self.files.push()?;
        self.keys.push(Key(0));
        self.owners.push(FREE);
        self.places.push(0);
        Ok(slot)
    }

    fn remove(&mut self, key: Key) {
        if let Some(slot) = self.by_key.remove(&key) {
            let head = Head {
                live: false,
                key,
                scope: ScopeKey(0),
            };
            self.files.put(slot, &head, None);
            self.own(slot, None);
            self.free.push(slot);
        }
    }

    fn upsert(&mut self, key: Key, scope: ScopeKey, packed: &[u8], prefix: usize) -> io::Result<()> {
        let slot = match self.by_key.get(&key) {
            Some(slot) => *slot,
            None => self.slot()?,
        };
        let head = Head { live: true, key, scope };
        self.files.put(slot, &head, Some(packed));
        self.keys[slot] = key;
        self.own(slot, Some(scope));
        self.by_key.insert(key, slot);
        let rows = Rows::new(self.files.rows(), prefix);
        self.signs.put(&rows, slot, self.keys.len());
        Ok(())
    }

    /// Those that a search may find and that the signs let pass.
    fn nearest(&self, query: &Turned, among: &Among, limit: usize) -> Vec<u32> {
        let excluded: FxHashSet<u32> = among
            .exclude
            .iter()
            .filter_map(|key| u32::try_from(*self.by_key.get(key)?).ok())
            .collect();
        let kept = |slot: &u32| excluded.is_empty() || !excluded.contains(slot);
        let allowed: Vec<bool> = self.scopes.iter().map(|scope| among.scopes.contains(scope)).collect();
        let allows = |slot: usize| allowed.get(self.owners[slot] as usize).copied().unwrap_or(false);
        if let Some(only) = &among.only {
            let chosen = only.iter().filter_map(|key| self.by_key.get(key).copied());
            let chosen = chosen
                .filter(|slot| allows(*slot))
                .filter_map(|slot| u32::try_from(slot).ok());
            return self.signs.nearest(query, chosen.filter(kept).collect(), limit);
        }
        let members = || self.members.iter().zip(&allowed).filter(|(_, allowed)| **allowed);
        let count: usize = members().map(|(slots, _)| slots.len()).sum();
        if count * 4 < self.owners.len() {
            let chosen = members().flat_map(|(slots, _)| slots.iter().copied());
            return self.signs.nearest(query, chosen.filter(kept).collect(), limit);
        }
        let slots = self.owners.len();
        if count == slots && excluded.is_empty() {
            return self.signs.nearest_of_all(query, slots, |_| true, limit);
        }
        let shown = |slot: usize| allows(slot) && u32::try_from(slot).is_ok_and(|slot| kept(&slot));
        self.signs.nearest_of_all(query, slots, shown, limit)
    }
}

impl FlatIndex {
    /// Applies changes and remembers that everything up to `watermark` is in.
    ///
    /// # Errors
    /// When the index can't be written; it is then rebuilt on the next start.
    pub fn apply(&self, upserts: &[Entry], removals: &[Key], watermark: Sequence) -> io::Result<()> {
        let codes = || upserts.iter().filter_map(|entry| entry.code.as_ref());
        let refused = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if codes().any(|code| code.dimension() != self.dimension) {
            return refused("a vector has another size than the index");
        }
        let mut numbers = upserts.iter().flat_map(|entry| [entry.key.0, entry.scope.0]);
        if !numbers.all(|number| (0..BEYOND).contains(&number)) {
            return refused("the number of a memory or scope has more than 47 bits");
        }
        // Before searches have to wait.
        let packed = upserts
            .par_iter()
            .map(|entry| entry.code.as_ref().map(|code| self.shorten(&entry.tenant, code).pack()));
        let packed: Vec<Option<Vec<u8>>> = packed.collect();
        let mut inner = self.write();
        self.dirty.store(true, Ordering::SeqCst);
        removals.iter().for_each(|key| inner.remove(*key));
        let mut put = upserts.iter().zip(packed).map(|(entry, packed)| match packed {
            Some(packed) => inner.upsert(entry.key, entry.scope, &packed, self.prefix),
            None => {
                inner.remove(entry.key);
                Ok(())
            }
        });
        let applied = put.try_for_each(|put| put);
        self.count.store(inner.by_key.len(), Ordering::SeqCst);
        applied?;
        self.reach(watermark);
        Ok(())
    }

    /// Remembers that everything up to a change is in, unless the index is to be filled.
    fn reach(&self, watermark: Sequence) {
        let further = |now: i64| (now != CLEARED && now < watermark.0).then_some(watermark.0);
        let order = Ordering::SeqCst;
        if self.watermark.fetch_update(order, order, further).is_ok() {
            self.dirty.store(true, order);
        }
    }

    /// The change up to which everything is in; the beginning while it is to be filled.
    pub fn watermark(&self) -> Sequence {
        Sequence(self.watermark.load(Ordering::SeqCst).max(0))
    }

    /// The nearest vectors by what the rows keep of them, best first.
    pub fn search(&self, query: &Code, among: &Among, limit: usize) -> Vec<(Key, f32)> {
        if query.dimension() != self.dimension || limit == 0 {
            return Vec::new();
        }
        let query = &self.shorten(&among.tenant, query);
        let inner = self.read();
        let rows = Rows::new(inner.files.rows(), self.prefix);
        let slots = inner.nearest(query, among, limit);
        let best = rows.best(query, &slots, limit);
        best.into_iter()
            .map(|(slot, score)| (inner.keys[slot as usize], score))
            .collect()
    }

    /// Vectors in it.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// True when there is no vector.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn some(&self, count: usize, scopes: Option<&FxHashSet<ScopeKey>>) -> Vec<Key> {
        let inner = self.read();
        let slots = inner.scopes.iter().zip(&inner.members);
        let slots = slots.filter(|(scope, _)| scopes.is_none_or(|scopes| scopes.contains(scope)));
        let mut slots: Vec<usize> = slots
            .flat_map(|(_, slots)| slots.iter().map(|slot| *slot as usize))
            .collect();
        slots.sort_unstable();
        let step = slots.len().div_ceil(count.max(1)).max(1);
        // Another place in each part, lest all be of one tenant where tenants take turns.
        let parts = slots.chunks(step).enumerate();
        parts
            .map(|(number, part)| inner.keys[part[number % part.len()]])
            .collect()
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.read().files.bytes() + self.rotations.as_ref().map_or(0, Rotations::bytes)
    }

    /// Makes everything applied so far survive a loss of power.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn flush(&self) -> io::Result<()> {
        let order = Ordering::SeqCst;
        if self.watermark.load(order) == CLEARED || !self.dirty.load(order) {
            return Ok(());
        }
        // Most of it while searches go on.
        self.read().files.sync()?;
        let mut inner = self.write();
        self.dirty.store(false, order);
        let watermark = self.watermark.load(order);
        if watermark == CLEARED {
            return Ok(());
        }
        // All up to there was applied before it was reached.
        let flushed = inner.files.flush(Sequence(watermark));
        if flushed.is_err() {
            self.dirty.store(true, order);
        }
        flushed
    }
}

/// Works off the async threads.
///
/// # Errors
/// What the work says.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, StorageError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| StorageError::Other(Box::new(error)))??)
}

#[async_trait]
impl VectorIndex for Arc<FlatIndex> {
    async fn apply(&self, changes: Changes) -> Result<(), StorageError> {
        let index = Self::clone(self);
        let none = Sequence::default();
        blocking(move || FlatIndex::apply(&index, &changes.upserts, &changes.removals, none)).await
    }

    fn advance(&self, watermark: Sequence) {
        self.reach(watermark);
    }

    fn watermark(&self) -> Option<Sequence> {
        let watermark = self.watermark.load(Ordering::SeqCst);
        (watermark != CLEARED).then_some(Sequence(watermark))
    }

    fn fill_all(&self, _last: Key, at: Sequence) {
        self.watermark.fetch_max(at.0, Ordering::SeqCst);
        self.dirty.store(true, Ordering::SeqCst);
    }

    async fn clear(&self) -> Result<(), StorageError> {
        let index = Self::clone(self);
        blocking(move || {
            let mut inner = index.write();
            inner.files.doubt()?;
            let keys: Vec<Key> = inner.by_key.keys().copied().collect();
            keys.into_iter().for_each(|key| inner.remove(key));
            index.watermark.store(CLEARED, Ordering::SeqCst);
            index.count.store(0, Ordering::SeqCst);
            index.dirty.store(true, Ordering::SeqCst);
            Ok(())
        })
        .await
    }

    async fn search(&self, query: Code, among: Arc<Among>, limit: usize) -> Result<Vec<(Key, f32)>, StorageError> {
        let index = Self::clone(self);
        blocking(move || Ok(FlatIndex::search(&index, &query, &among, limit))).await
    }

    fn len(&self) -> usize {
        FlatIndex::len(self)
    }

    fn some(&self, count: usize, scopes: Option<&FxHashSet<ScopeKey>>) -> Vec<Key> {
        FlatIndex::some(self, count, scopes)
    }

    fn learned(&self) -> usize {
        self.learned
    }

    fn bytes(&self) -> u64 {
        FlatIndex::bytes(self)
    }

    async fn unlike(&self, entries: Vec<Entry>) -> Result<Vec<Key>, StorageError> {
        let index = Self::clone(self);
        blocking(move || {
            let inner = index.read();
            let has = |entry: &Entry| match (inner.by_key.get(&entry.key), &entry.code) {
                (Some(slot), Some(code)) => inner.files.head(*slot).is_some_and(|head| {
                    let same = head.live && head.key == entry.key && head.scope == entry.scope;
                    same && inner.files.has(*slot, &index.shorten(&entry.tenant, code).pack())
                }),
                (held, wanted) => held.is_none() && wanted.is_none(),
            };
            let unlike = entries.iter().filter(|entry| !has(entry));
            Ok(unlike.map(|entry| entry.key).collect())
        })
        .await
    }

    async fn present(&self, mut keys: Vec<Key>) -> Result<Vec<Key>, StorageError> {
        let inner = self.read();
        keys.retain(|key| inner.by_key.contains_key(key));
        Ok(keys)
    }

    async fn keys(&self, after: Key, limit: usize) -> Result<Vec<Key>, StorageError> {
        let inner = self.read();
        let mut keys: Vec<Key> = inner.by_key.keys().copied().filter(|key| *key > after).collect();
        keys.sort_unstable();
        keys.truncate(limit);
        Ok(keys)
    }

    async fn tend(&self) -> Result<Care, StorageError> {
        let index = Self::clone(self);
        blocking(move || index.flush()).await?;
        Ok(Care {
            condition: Condition::Well,
            differs: None,
            again: None,
        })
    }
}

/// Bytes of a row.
fn row_size(prefix: usize) -> usize {
    file::HEAD + coarse::size(prefix)
}

#[cfg(test)]
mod tests;
