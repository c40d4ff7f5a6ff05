//! The flat indexes on disk: one a model, and one beside it while a rotation is learned.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::app::{Indexes, Model, Serving};
use crate::domain::Sequence;
use crate::store::VectorIndex;
use crate::store::flat::rotation::{self, Rotation};
use crate::store::flat::{FlatIndex, Layout, Opened};

/// How the directories of indexes with a learned rotation are called, before the number of vectors.
const LEARNED: &str = "learned-";

/// Flat indexes in a directory, each in one of its own.
pub struct FlatIndexes {
    root: PathBuf,
    /// The relational store that they follow.
    store: String,
    /// Indexes may have a learned rotation.
    learn: bool,
}

impl FlatIndexes {
    /// In a directory, of what the relational store with this identity holds; with learned rotations or without.
    pub fn new(root: PathBuf, store: String, learn: bool) -> Self {
        Self { root, store, learn }
    }

    fn directory(&self, identity: &str) -> PathBuf {
        self.root.join(file_name(identity))
    }

    /// How the vectors of a model are laid out, with a rotation that was learned of so many vectors.
    fn layout(&self, model: &Model, learned: usize) -> Layout {
        let kept = rotation::kept(model.dimension).filter(|_| learned > 0);
        Layout {
            store: self.store.clone(),
            model: model.identity.clone(),
            dimension: model.dimension,
            prefix: kept.unwrap_or(model.prefix),
            learned,
        }
    }

    /// The indexes of a model whose rotation was learned, the one of most vectors first.
    fn learned(&self, identity: &str) -> std::io::Result<Vec<(usize, PathBuf)>> {
        let entries = match std::fs::read_dir(self.directory(identity)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let learned = name.to_str().and_then(|name| name.strip_prefix(LEARNED)?.parse().ok());
            found.extend(learned.map(|learned| (learned, entry.path())));
        }
        found.sort_unstable();
        found.reverse();
        Ok(found)
    }
}

impl Indexes for FlatIndexes {
    fn open(&self, model: &Model, end: Sequence) -> std::io::Result<(Arc<dyn VectorIndex>, Option<String>)> {
        let plain = self.directory(&model.identity);
        let newest = FlatIndex::watermark_in(&plain);
        let mut unusable = None;
        for (learned, directory) in self.learned(&model.identity)? {
            // One without a manifest was being made when the process ended; of two the one that served last has more.
            let watermark = FlatIndex::watermark_in(&directory).filter(|_| self.learn);
            if watermark.is_some() && watermark >= newest {
                match FlatIndex::open_learned(&directory, &self.layout(model, learned), end) {
                    Ok(index) => return Ok((Arc::new(index), None)),
                    Err(why) => unusable = Some(why),
                }
            }
            std::fs::remove_dir_all(directory)?;
        }
        Ok(match FlatIndex::open(&plain, self.layout(model, 0), end)? {
            Opened::Intact(index) => (Arc::new(index), None),
            Opened::Fresh(index, why) => (Arc::new(index), Some(unusable.unwrap_or(why))),
        })
    }

    fn learns(&self, model: &Model) -> bool {
        self.learn && model.prefix == model.dimension && rotation::kept(model.dimension).is_some()
    }

    fn learn(
        &self,
        model: &Model,
        vectors: &[Vec<f32>],
        count: usize,
        stop: &CancellationToken,
    ) -> std::io::Result<Option<Arc<dyn VectorIndex>>> {
        // Threads of its own, and half as many: searches and writes use the common ones meanwhile.
        let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(std::io::Error::other)?;
        let learned = pool.install(|| Rotation::learn(vectors, &|| stop.is_cancelled()));
        let Some((rotation, share)) = learned.filter(|_| !stop.is_cancelled()) else {
            return Ok(None);
        };
        tracing::info!(model = model.name, vectors = vectors.len(), share, "learned a rotation");
        let directory = self.directory(&model.identity).join(format!("{LEARNED}{count}"));
        let index = FlatIndex::create_learned(&directory, &self.layout(model, count), rotation)?;
        Ok(Some(Arc::new(index)))
    }

    fn plain(&self, model: &Model) -> std::io::Result<Arc<dyn VectorIndex>> {
        let index = FlatIndex::create(&self.directory(&model.identity), &self.layout(model, 0))?;
        Ok(Arc::new(index))
    }

    fn settle(&self, serving: &Serving) -> std::io::Result<()> {
        let (identity, own) = (&serving.model.identity, serving.index.learned());
        for (learned, directory) in self.learned(identity)? {
            if learned != own {
                std::fs::remove_dir_all(directory)?;
            }
        }
        if own > 0 {
            FlatIndex::remove(&self.directory(identity))?;
        }
        Ok(())
    }

    fn remove(&self, identity: &str) -> std::io::Result<()> {
        match std::fs::remove_dir_all(self.directory(identity)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

/// A name for a directory.
fn file_name(identity: &str) -> String {
    identity
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-@.".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect()
}
