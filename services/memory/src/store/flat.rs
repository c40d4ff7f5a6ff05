//! The embedded vector index: an exact scan of int8 prefixes in a memory-mapped file.
//!
//! The file is an array of fixed-size records; each carries a checksum. A small file beside it says up to which change of
//! the outbox everything is in and how many records that were. Both are rebuilt from the relational store when they are
//! missing, damaged or made for another model.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use memmap2::MmapMut;
use serde::{Deserialize, Serialize};
use simsimd::SpatialSimilarity as _;

use super::code::{BLOCK, Code};
use super::{Entry, VectorIndex};
use crate::domain::{Key, ScopeKey, Sequence};

/// Layout of the files.
const VERSION: u32 = 1;
/// Checksum, state, key, scope.
const HEAD: usize = 4 + 4 + 8 + 8;
const LIVE: u32 = 1;
const GROW: usize = 4096;

/// What the small file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    model: String,
    dimension: usize,
    prefix: usize,
    slots: usize,
    watermark: Sequence,
}

/// The index of one model.
#[derive(Debug)]
pub struct FlatIndex {
    directory: PathBuf,
    prefix: usize,
    inner: RwLock<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    map: MmapMut,
    slots: usize,
    by_key: HashMap<Key, usize>,
    free: Vec<usize>,
    manifest: Manifest,
}

/// An index that was opened, or begun anew because of what is said.
pub enum Opened {
    /// As it was left.
    Intact(FlatIndex),
    /// Empty, to be filled from the relational store.
    Fresh(FlatIndex, String),
}

impl FlatIndex {
    /// Opens the index in `directory` for a model's vectors, of which the first `prefix` values are scanned.
    ///
    /// # Errors
    /// When the directory can't be written.
    pub fn open(directory: &Path, model: &str, dimension: usize, prefix: usize) -> io::Result<Opened> {
        let wanted = Manifest {
            version: VERSION,
            model: model.into(),
            dimension,
            prefix,
            slots: 0,
            watermark: Sequence::default(),
        };
        match Self::load(directory, &wanted) {
            Ok(index) => Ok(Opened::Intact(index)),
            Err(why) => Self::create(directory, wanted).map(|index| Opened::Fresh(index, why)),
        }
    }

    fn load(directory: &Path, wanted: &Manifest) -> Result<Self, String> {
        let text = fs::read(directory.join("manifest.json")).map_err(|_| "there was none".to_string())?;
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|_| "its manifest is damaged".to_string())?;
        let same = Manifest {
            slots: manifest.slots,
            watermark: manifest.watermark,
            ..wanted.clone()
        };
        if manifest != same {
            return Err(format!(
                "it was made for the model {} or by another version",
                manifest.model
            ));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(directory.join("vectors.bin"));
        let file = file.map_err(|error| format!("its vectors can't be read: {error}"))?;
        let map = map(&file).map_err(|error| format!("its vectors can't be mapped: {error}"))?;
        let size = record_size(manifest.prefix);
        if map.len() < manifest.slots * size {
            return Err("its vectors are cut off".into());
        }
        let mut inner = Inner {
            file,
            map,
            slots: manifest.slots,
            by_key: HashMap::new(),
            free: Vec::new(),
            manifest,
        };
        for slot in 0..inner.slots {
            let record = inner.record(slot, size);
            if u32_at(record, 0) != crc32fast::hash(&record[4..]) {
                return Err(format!("the checksum of vector {slot} does not fit"));
            }
            let key = Key(i64_at(record, 8));
            if u32_at(record, 4) != LIVE {
                inner.free.push(slot);
            } else if inner.by_key.insert(key, slot).is_some() {
                return Err(format!("vector {slot} is there twice"));
            }
        }
        Ok(Self {
            directory: directory.into(),
            prefix: wanted.prefix,
            inner: RwLock::new(inner),
        })
    }

    fn create(directory: &Path, manifest: Manifest) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let _ = fs::remove_file(directory.join("manifest.json"));
        let path = directory.join("vectors.bin");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.set_len((GROW * record_size(manifest.prefix)) as u64)?;
        let map = map(&file)?;
        let prefix = manifest.prefix;
        let inner = Inner {
            file,
            map,
            slots: 0,
            by_key: HashMap::new(),
            free: Vec::new(),
            manifest,
        };
        Ok(Self {
            directory: directory.into(),
            prefix,
            inner: RwLock::new(inner),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record_size(prefix: usize) -> usize {
    HEAD + prefix / BLOCK * 4 + prefix
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn i64_at(bytes: &[u8], at: usize) -> i64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    i64::from_le_bytes(word)
}

fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: the data directory is locked by this process, so nobody else changes or truncates the file; every record is
    // read as plain bytes, for which any content is valid.
    unsafe { MmapMut::map_mut(file) }
}

impl Inner {
    fn record(&self, slot: usize, size: usize) -> &[u8] {
        &self.map[slot * size..(slot + 1) * size]
    }

    fn put(&mut self, slot: usize, size: usize, state: u32, key: Key, scope: ScopeKey, code: Option<(&Code, usize)>) {
        let record = &mut self.map[slot * size..(slot + 1) * size];
        record[4..8].copy_from_slice(&state.to_le_bytes());
        record[8..16].copy_from_slice(&key.0.to_le_bytes());
        record[16..24].copy_from_slice(&scope.0.to_le_bytes());
        if let Some((code, prefix)) = code {
            let blocks = prefix / BLOCK;
            for (bytes, scale) in record[HEAD..HEAD + blocks * 4].chunks_exact_mut(4).zip(code.scales()) {
                bytes.copy_from_slice(&scale.to_le_bytes());
            }
            record[HEAD + blocks * 4..].copy_from_slice(&code.high()[..prefix]);
        }
        let sum = crc32fast::hash(&record[4..]);
        record[..4].copy_from_slice(&sum.to_le_bytes());
    }

    fn grow(&mut self, size: usize) -> io::Result<()> {
        if (self.slots + 1) * size > self.map.len() {
            let capacity = (self.map.len() / size * 2).max(GROW);
            self.file.set_len((capacity * size) as u64)?;
            self.map = map(&self.file)?;
        }
        Ok(())
    }
}

impl VectorIndex for FlatIndex {
    fn apply(&self, upserts: &[Entry], removals: &[Key], watermark: Sequence) -> io::Result<()> {
        let size = record_size(self.prefix);
        let mut inner = self.write();
        for key in removals {
            if let Some(slot) = inner.by_key.remove(key) {
                inner.put(slot, size, 0, *key, ScopeKey(0), None);
                inner.free.push(slot);
            }
        }
        for entry in upserts {
            if entry.code.dimension() != inner.manifest.dimension {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a vector has another size than the index",
                ));
            }
            let slot = match (inner.by_key.get(&entry.key).copied(), inner.free.pop()) {
                (Some(slot), free) => {
                    inner.free.extend(free);
                    slot
                }
                (None, Some(slot)) => slot,
                (None, None) => {
                    inner.grow(size)?;
                    inner.slots += 1;
                    inner.slots - 1
                }
            };
            inner.put(
                slot,
                size,
                LIVE,
                entry.key,
                entry.scope,
                Some((&entry.code, self.prefix)),
            );
            inner.by_key.insert(entry.key, slot);
        }
        inner.manifest.watermark = inner.manifest.watermark.max(watermark);
        Ok(())
    }

    fn watermark(&self) -> Sequence {
        self.read().manifest.watermark
    }

    fn search(
        &self,
        query: &Code,
        scopes: &HashSet<ScopeKey>,
        exclude: &HashSet<Key>,
        limit: usize,
    ) -> Vec<(Key, f32)> {
        let size = record_size(self.prefix);
        let blocks = self.prefix / BLOCK;
        let inner = self.read();
        if query.dimension() != inner.manifest.dimension || limit == 0 {
            return Vec::new();
        }
        let wanted: &[i8] = bytemuck::cast_slice(&query.high()[..self.prefix]);
        let query_scales: Vec<f32> = query.scales().take(blocks).collect();
        let mut best: Vec<(Key, f32)> = Vec::with_capacity(inner.by_key.len().min(4 * limit));
        let mut floor = f32::NEG_INFINITY;
        let by_score = |a: &(Key, f32), b: &(Key, f32)| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0));
        for slot in 0..inner.slots {
            let record = inner.record(slot, size);
            let key = Key(i64_at(record, 8));
            let shown = u32_at(record, 4) == LIVE && scopes.contains(&ScopeKey(i64_at(record, 16)));
            if !shown || exclude.contains(&key) {
                continue;
            }
            let values: &[i8] = bytemuck::cast_slice(&record[HEAD + blocks * 4..]);
            let mut score = 0f32;
            for block in 0..blocks {
                let range = block * BLOCK..(block + 1) * BLOCK;
                let dot = i8::dot(&values[range.clone()], &wanted[range]).unwrap_or(0.0);
                let scale = f32::from_le_bytes([
                    record[HEAD + block * 4],
                    record[HEAD + block * 4 + 1],
                    record[HEAD + block * 4 + 2],
                    record[HEAD + block * 4 + 3],
                ]);
                score += dot as f32 * scale * query_scales[block] * 256.0;
            }
            if score > floor || best.len() < limit {
                best.push((key, score));
                if best.len() >= 4 * limit {
                    best.sort_unstable_by(by_score);
                    best.truncate(limit);
                    floor = best.last().map_or(f32::NEG_INFINITY, |last| last.1);
                }
            }
        }
        best.sort_unstable_by(by_score);
        best.truncate(limit);
        best
    }

    fn len(&self) -> usize {
        self.read().by_key.len()
    }

    fn flush(&self) -> io::Result<()> {
        let mut inner = self.write();
        inner.map.flush()?;
        inner.manifest.slots = inner.slots;
        let text = serde_json::to_vec(&inner.manifest)?;
        let draft = self.directory.join("manifest.draft");
        let file = File::create(&draft)?;
        io::Write::write_all(&mut &file, &text)?;
        file.sync_all()?;
        fs::rename(draft, self.directory.join("manifest.json"))?;
        File::open(&self.directory)?.sync_all()
    }
}
