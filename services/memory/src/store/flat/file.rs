//! The files of the index.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use memmap2::MmapMut;
use serde::{Deserialize, Serialize};

use super::row_size;
use crate::domain::{Key, ScopeKey, Sequence};

/// Layout of the files.
const VERSION: u32 = 4;
/// Checksum, key with the state in its lowest bit, scope.
pub const HEAD: usize = 4 + NUMBER + NUMBER;
/// Bytes of a number.
const NUMBER: usize = 6;
/// Keys and scopes are below.
pub const BEYOND: i64 = 1 << 47;
/// Rows that the file grows by, at least.
const GROW: usize = 4096;
/// One in so many of its rows when that is more: what may stand empty.
const GROWTH: usize = 64;

/// What the index is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The relational store that it follows.
    pub store: String,
    /// The model, with its revision.
    pub model: String,
    /// Dimensions of the vectors.
    pub dimension: usize,
    /// Dimensions that are kept here.
    pub prefix: usize,
    /// Vectors that there were when a rotation was learned from them; 0: the first dimensions are kept.
    #[serde(default)]
    pub learned: usize,
}

/// What the small file says.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    layout: Layout,
    slots: usize,
    watermark: Sequence,
}

/// A manifest with the checksum of its own text.
#[derive(Debug, Serialize, Deserialize)]
struct Sealed {
    checksum: u32,
    manifest: String,
}

/// What a row says beside its values.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// There is a vector.
    pub live: bool,
    /// The memory.
    pub key: Key,
    /// Its scope.
    pub scope: ScopeKey,
}

/// The open files.
#[derive(Debug)]
pub struct Files {
    directory: PathBuf,
    layout: Layout,
    file: File,
    map: MmapMut,
    slots: usize,
    size: usize,
}

impl Files {
    /// Opens what is there, with the change up to which everything is in.
    pub fn open(directory: &Path, wanted: &Layout, end: Sequence) -> Result<(Self, Sequence), String> {
        let text = fs::read(directory.join("manifest.json")).map_err(|_| "there was none".to_string())?;
        let manifest = unseal(&text).ok_or("its manifest is damaged")?;
        if manifest.version != VERSION || manifest.layout.model != wanted.model {
            let model = manifest.layout.model;
            return Err(format!("it was made for the model {model} or by another version"));
        }
        if manifest.layout != *wanted {
            return Err("it is of another store".into());
        }
        if manifest.watermark > end {
            return Err("it is ahead of the relational store, which was restored or replaced".into());
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(directory.join("vectors.bin"));
        let file = file.map_err(|error| format!("its vectors can't be read: {error}"))?;
        let map = map(&file).map_err(|error| format!("its vectors can't be mapped: {error}"))?;
        let size = row_size(wanted.prefix);
        if manifest.slots.checked_mul(size).is_none_or(|bytes| bytes > map.len()) {
            return Err("its vectors are cut off".into());
        }
        let files = Self {
            directory: directory.into(),
            layout: manifest.layout,
            file,
            map,
            slots: manifest.slots,
            size,
        };
        Ok((files, manifest.watermark))
    }

    /// Begins anew.
    pub fn create(directory: &Path, layout: Layout) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let _ = fs::remove_file(directory.join("manifest.json"));
        let path = directory.join("vectors.bin");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let size = row_size(layout.prefix);
        extend(&file, GROW * size)?;
        Ok(Self {
            directory: directory.into(),
            layout,
            map: map(&file)?,
            file,
            slots: 0,
            size,
        })
    }

    /// What the manifest says.
    pub fn watermark(directory: &Path) -> Option<Sequence> {
        let text = fs::read(directory.join("manifest.json")).ok()?;
        unseal(&text).map(|manifest| manifest.watermark)
    }

    /// Removes the files; what is counted on goes first.
    pub fn remove(directory: &Path) -> io::Result<()> {
        for name in ["manifest.json", "vectors.bin"] {
            match fs::remove_file(directory.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed?,
            }
        }
        Ok(())
    }

    /// Rows in use, free ones between them included.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes on disk, the manifest left out.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// All rows.
    pub fn rows(&self) -> &[u8] {
        &self.map[..self.slots * self.size]
    }

    /// What a row says; `None` when its checksum does not fit.
    pub fn head(&self, slot: usize) -> Option<Head> {
        let row = &self.map[slot * self.size..(slot + 1) * self.size];
        let (sum, rest) = row.split_first_chunk::<4>()?;
        let (key, scope) = rest.split_at(NUMBER);
        let key = number(key);
        (u32::from_le_bytes(*sum) == crc32fast::hash(rest)).then(|| Head {
            live: key & 1 == 1,
            key: Key(key >> 1),
            scope: ScopeKey(number(&scope[..NUMBER])),
        })
    }

    /// Writes a row whose key and scope are below [`BEYOND`]; without a packed vector its own stays.
    pub fn put(&mut self, slot: usize, head: &Head, packed: Option<&[u8]>) {
        let row = &mut self.map[slot * self.size..(slot + 1) * self.size];
        let key = head.key.0 << 1 | i64::from(head.live);
        row[4..4 + NUMBER].copy_from_slice(&key.to_le_bytes()[..NUMBER]);
        row[4 + NUMBER..HEAD].copy_from_slice(&head.scope.0.to_le_bytes()[..NUMBER]);
        if let Some(packed) = packed {
            row[HEAD..].copy_from_slice(packed);
        }
        let sum = crc32fast::hash(&row[4..]);
        row[..4].copy_from_slice(&sum.to_le_bytes());
    }

    /// Whether a row has a packed vector.
    pub fn has(&self, slot: usize, packed: &[u8]) -> bool {
        self.map[slot * self.size + HEAD..(slot + 1) * self.size] == *packed
    }

    /// One more row at the end.
    pub fn push(&mut self) -> io::Result<usize> {
        if (self.slots + 1) * self.size > self.map.len() {
            let capacity = self.map.len() / self.size;
            extend(&self.file, (capacity + (capacity / GROWTH).max(GROW)) * self.size)?;
            self.map = map(&self.file)?;
        }
        self.slots += 1;
        Ok(self.slots - 1)
    }

    /// From here on nothing says that it is complete, until it is flushed.
    pub fn doubt(&self) -> io::Result<()> {
        match fs::remove_file(self.directory.join("manifest.json")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Makes the rows survive a loss of power.
    pub fn sync(&self) -> io::Result<()> {
        self.map.flush()
    }

    /// Makes everything survive a loss of power: first the rows, then the manifest that counts on them.
    pub fn flush(&mut self, watermark: Sequence) -> io::Result<()> {
        self.sync()?;
        let manifest = Manifest {
            version: VERSION,
            layout: self.layout.clone(),
            slots: self.slots,
            watermark,
        };
        let manifest = serde_json::to_string(&manifest)?;
        let sealed = Sealed {
            checksum: crc32fast::hash(manifest.as_bytes()),
            manifest,
        };
        let draft = self.directory.join("manifest.draft");
        let mut file = File::create(&draft)?;
        file.write_all(&serde_json::to_vec(&sealed)?)?;
        file.sync_all()?;
        fs::rename(draft, self.directory.join("manifest.json"))?;
        File::open(&self.directory)?.sync_all()
    }
}

fn number(bytes: &[u8]) -> i64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | i64::from(*byte))
}

fn unseal(text: &[u8]) -> Option<Manifest> {
    let sealed: Sealed = serde_json::from_slice(text).ok()?;
    // What the text says in other words is no more its own.
    let whole = serde_json::to_vec(&sealed).ok()? == text;
    let fits = whole && sealed.checksum == crc32fast::hash(sealed.manifest.as_bytes());
    fits.then(|| serde_json::from_str(&sealed.manifest).ok()).flatten()
}

/// Makes the file longer with zeros that are really there: a hole in a mapped file, on a full disk, would end the process.
fn extend(file: &File, length: usize) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let before = file.metadata()?.len();
    let length = u64::try_from(length).map_err(io::Error::other)?;
    let mut at = before;
    while at < length {
        let step = (length - at).min(ZEROS.len() as u64);
        let chunk = &ZEROS[..usize::try_from(step).unwrap_or(ZEROS.len())];
        if let Err(error) = std::os::unix::fs::FileExt::write_all_at(file, chunk, at) {
            file.set_len(before)?;
            return Err(error);
        }
        at += step;
    }
    Ok(())
}

fn map(file: &File) -> io::Result<MmapMut> {
    // SAFETY: the data directory is locked by this process, so nobody else changes or truncates the file; every row is read
    // as plain bytes, for which any content is valid.
    unsafe { MmapMut::map_mut(file) }
}
