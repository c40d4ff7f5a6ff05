//! The flat indexes on disk: one a model, and one beside it while a rotation is learned.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use crate::app::{Indexes, Model, Serving};
use crate::domain::Sequence;
use crate::store::flat::rotation::{self, Rotations};
use crate::store::flat::{FlatIndex, Layout, Opened, blocking};
use crate::store::{Sample, StorageError, VectorIndex, plain_name};

/// How the directories of indexes with a learned rotation are called, before the number of vectors.
const LEARNED: &str = "learned-";

/// Flat indexes in a directory, each in one of its own.
#[derive(Clone)]
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
        self.root.join(plain_name(identity))
    }

    /// How the vectors of a model are laid out, with a rotation that was learned of so many vectors.
    fn layout(&self, model: &Model, learned: usize) -> Layout {
        Layout {
            store: self.store.clone(),
            model: model.identity.clone(),
            dimension: model.dimension,
            prefix: rotation::indexed(model.dimension, model.prefix, learned > 0),
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

#[async_trait]
impl Indexes for FlatIndexes {
    async fn open(&self, model: &Model, end: Sequence) -> Result<(Arc<dyn VectorIndex>, Option<String>), StorageError> {
        let (files, model) = (self.clone(), model.clone());
        let (index, why) = blocking(move || files.open(&model, end)).await?;
        Ok((Arc::new(index), why))
    }

    fn learns(&self, model: &Model) -> bool {
        self.learn && model.prefix == model.dimension && rotation::kept(model.dimension).is_some()
    }

    async fn learn(
        &self,
        before: &Serving,
        sample: Sample,
        count: usize,
        stop: &CancellationToken,
    ) -> Result<Option<Arc<dyn VectorIndex>>, StorageError> {
        let (files, model, stop) = (self.clone(), before.model.clone(), stop.clone());
        let rotated = before.index.learned() > 0;
        let next = blocking(move || files.learn(&model, rotated, &sample, count, &stop)).await?;
        Ok(next.map(|index| Arc::new(index) as Arc<dyn VectorIndex>))
    }

    async fn settle(&self, serving: &Serving) -> Result<(), StorageError> {
        let (files, identity) = (self.clone(), serving.model.identity.clone());
        let own = serving.index.learned();
        blocking(move || files.settle(&identity, own)).await
    }

    async fn remove(&self, identity: &str) -> Result<(), StorageError> {
        let directory = self.directory(identity);
        blocking(move || match std::fs::remove_dir_all(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        })
        .await
    }
}

impl FlatIndexes {
    fn open(&self, model: &Model, end: Sequence) -> std::io::Result<(Arc<FlatIndex>, Option<String>)> {
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

    fn learn(
        &self,
        model: &Model,
        rotated: bool,
        sample: &Sample,
        count: usize,
        stop: &CancellationToken,
    ) -> std::io::Result<Option<Arc<FlatIndex>>> {
        // Threads of its own, and half as many: searches and writes use the common ones meanwhile.
        let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(std::io::Error::other)?;
        let learned = pool.install(|| Rotations::learn(sample, &|| stop.is_cancelled()));
        if stop.is_cancelled() {
            return Ok(None);
        }
        let (directory, model_name) = (self.directory(&model.identity), &model.name);
        if let Some((rotations, share)) = learned {
            let (vectors, tenants) = (sample.all.len(), rotations.tenants());
            tracing::info!(model = model_name, vectors, tenants, share, "learned a rotation");
            let directory = directory.join(format!("{LEARNED}{count}"));
            let index = FlatIndex::create_learned(&directory, &self.layout(model, count), rotations)?;
            return Ok(Some(Arc::new(index)));
        }
        tracing::info!(
            model = model_name,
            vectors = count,
            "no rotation serves: all dimensions are scanned"
        );
        if rotated {
            let index = FlatIndex::create(&directory, &self.layout(model, 0))?;
            return Ok(Some(Arc::new(index)));
        }
        Ok(None)
    }

    /// Removes the other indexes of a model than the one with a rotation of so many vectors; 0: without one.
    fn settle(&self, identity: &str, own: usize) -> std::io::Result<()> {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors that lie in so many directions, each a number of its own.
    fn sample(directions: usize) -> Sample {
        let vector = |seed: u64| {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut value = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1 << 23) as f32 - 1.0
            };
            let mut vector: Vec<f32> = (0..128).map(|_| value()).collect();
            vector[directions..].fill(0.0);
            vector
        };
        Sample {
            all: (1..=1_200).map(vector).collect(),
            own: Vec::new(),
        }
    }

    #[test]
    fn models_are_cut_by_their_training_or_by_a_rotation_where_that_saves_half() {
        let indexes = FlatIndexes::new(PathBuf::new(), "a-store".into(), true);
        let prefix = |dimension: usize, prefix: usize, learned: usize| {
            let model = Model {
                name: "a".into(),
                identity: "a@1".into(),
                dimension,
                prefix,
            };
            indexes.layout(&model, learned).prefix
        };
        let sizes = [64, 192, 256, 320, 384, 448, 512, 768, 1536, 3072];
        let first = sizes.map(|dimension| prefix(dimension, dimension.min(256), 0));
        assert_eq!(first, [64, 192, 256, 256, 192, 256, 256, 256, 256, 256]);
        assert_eq!(sizes.map(|dimension| prefix(dimension, dimension, 0)), sizes);
        let learned = [128, 256, 384, 512, 768, 3072].map(|dimension| prefix(dimension, dimension, 5_000));
        assert_eq!(learned, [64, 128, 192, 256, 256, 256]);
    }

    #[test]
    fn where_no_rotation_serves_any_more_all_dimensions_are_scanned_again() {
        let root = tempfile::tempdir().unwrap();
        let indexes = FlatIndexes::new(root.path().to_owned(), "a-store".into(), true);
        let model = Model {
            name: "model".into(),
            identity: "model@1".into(),
            dimension: 128,
            prefix: 128,
        };
        let stop = CancellationToken::new();
        let learn = |rotated, directions, count| {
            let index = indexes
                .learn(&model, rotated, &sample(directions), count, &stop)
                .unwrap();
            index.map(|index| index.learned())
        };
        assert_eq!(
            learn(false, 128, 2_000),
            None,
            "nothing is better than all dimensions, which serve already"
        );
        assert_eq!(learn(false, 40, 2_000), Some(2_000));
        assert_eq!(learn(true, 40, 16_000), Some(16_000));
        assert_eq!(learn(true, 128, 128_000), Some(0));
        // What serves then is alone once it has settled, and the next start opens it.
        indexes.settle(&model.identity, 0).unwrap();
        assert_eq!(indexes.learned(&model.identity).unwrap(), []);
        stop.cancel();
        assert_eq!(learn(true, 40, 16_000), None);
    }
}
