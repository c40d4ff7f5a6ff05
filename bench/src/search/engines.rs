//! The rivals.

use std::path::Path;
use std::time::{Duration, Instant};

use aeterna_memory::domain::{Key, ScopeKey, Sequence};
use aeterna_memory::store::code::Code;
use aeterna_memory::store::flat::rotation::{Rotations, indexed};
use aeterna_memory::store::flat::{FlatIndex, Layout, Opened};
use aeterna_memory::store::sqlite::SqliteStore;
use aeterna_memory::store::{Among, Entry, Relational as _, Rescoring, Sample};
use aeterna_storage::SqliteOptions;
use aeterna_storage::rusqlite::{Connection, params};
use aeterna_types::TenantId;
use anyhow::Context as _;

use super::data::{Data, nearest};
use super::{K, SCOPES};

/// One way to search.
pub trait Engine {
    fn name(&self) -> &'static str;
    /// The nearest vectors among those of the first so many scopes.
    async fn search(&self, query: &[f32], scopes: usize) -> anyhow::Result<Vec<usize>>;
    /// Brings it to where it is when it has been in use for a while.
    async fn warm(&self) -> anyhow::Result<()> {
        Ok(())
    }
    /// What building took.
    fn built(&self) -> Duration;
    fn disk_bytes(&self) -> u64;
    fn memory_bytes(&self) -> u64;
}

/// All vectors, or prefixes of them, compared one by one.
pub struct Exact {
    name: &'static str,
    vectors: Vec<f32>,
    dimensions: usize,
    built: Duration,
}

impl Exact {
    pub fn build(name: &'static str, data: &Data, dimensions: usize) -> Self {
        let began = Instant::now();
        let mut vectors = Vec::with_capacity(data.len() * dimensions);
        for number in 0..data.len() {
            let prefix = &data.vector(number)[..dimensions];
            let norm = prefix.iter().map(|x| x * x).sum::<f32>().sqrt();
            vectors.extend(prefix.iter().map(|x| x / norm));
        }
        Self {
            name,
            vectors,
            dimensions,
            built: began.elapsed(),
        }
    }
}

impl Engine for Exact {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn search(&self, query: &[f32], scopes: usize) -> anyhow::Result<Vec<usize>> {
        let vectors = self.vectors.chunks_exact(self.dimensions).enumerate();
        let among = vectors.filter(|(number, _)| number % SCOPES < scopes);
        Ok(nearest(among, &query[..self.dimensions]))
    }

    fn built(&self) -> Duration {
        self.built
    }

    fn disk_bytes(&self) -> u64 {
        (self.vectors.len() * 4) as u64
    }

    fn memory_bytes(&self) -> u64 {
        self.disk_bytes()
    }
}

/// What the first pass of a funnel works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum First {
    /// The first dimensions.
    Dimensions,
    /// All of them, as with a model that was not trained for being cut short.
    All,
    /// What a learned rotation keeps of them.
    Learned,
}

/// The index and the relational store of the memory service.
pub struct Funnel {
    name: &'static str,
    dimensions: usize,
    index: FlatIndex,
    store: SqliteStore,
    built: Duration,
    disk: u64,
    memory: u64,
    _directory: tempfile::TempDir,
}

const MODEL: &str = "synthetic@1";
/// Candidates that are rescored at full size, as many as in the service.
const RESCORED: usize = 200;
/// Vectors that a rotation is learned from, as many as in the service.
const SAMPLE: usize = 8192;
/// Bytes that the store keeps in memory, as many as in the service.
const CACHE: u64 = 512 << 20;
/// Vectors in one transaction.
const BATCH: usize = 1000;

impl Funnel {
    /// With the first dimensions in the index, as many as the service keeps; untrained ones with all of them, or as many as a
    /// rotation keeps. Fails when no rotation serves.
    pub async fn build(data: &Data, first: First) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("memory.db");
        let options = SqliteOptions {
            path: path.clone(),
            busy_timeout: Duration::from_secs(5),
            readers: 2,
        };
        let open = async || SqliteStore::open(&options, CACHE).await.context("open the store");
        open().await?.close().await;
        let before = resident()?;
        let (dimension, learned) = (data.dimensions, first == First::Learned);
        let most = if first == First::Dimensions { 256 } else { dimension };
        let layout = Layout {
            store: "bench".into(),
            model: MODEL.into(),
            dimension,
            prefix: indexed(dimension, most.min(dimension), learned),
            learned: if learned { data.len() } else { 0 },
        };
        let vectors = directory.path().join("vectors");
        let began = Instant::now();
        let index = match first {
            First::Learned => {
                let step = data.len().div_ceil(SAMPLE);
                let sample = (0..data.len()).step_by(step).map(|number| data.vector(number).to_vec());
                let sample = Sample {
                    all: sample.collect(),
                    own: Vec::new(),
                };
                let learned = Rotations::learn(&sample, &|| false);
                let (rotations, share) = learned.context("a rotation can be learned")?;
                eprintln!("the rotation keeps {share:.4} of the neighbours of a sample");
                FlatIndex::create_learned(&vectors, &layout, rotations)?
            }
            _ => match FlatIndex::open(&vectors, layout, Sequence::default())? {
                Opened::Fresh(index, _) | Opened::Intact(index) => index,
            },
        };
        fill(data, &path, &index)?;
        let built = began.elapsed();
        let memory = resident()?.saturating_sub(before);
        let disk = index.bytes() + table_bytes(&path)?;
        Ok(Self {
            name: match first {
                First::Dimensions => "funnel",
                First::All => "funnel-all",
                First::Learned => "funnel-learned",
            },
            dimensions: data.dimensions,
            index,
            store: open().await?,
            built,
            disk,
            memory,
            _directory: directory,
        })
    }
}

/// Puts the codes where the service has them: into the store, with as little of a memory as each needs, and the index.
fn fill(data: &Data, path: &Path, index: &FlatIndex) -> anyhow::Result<()> {
    let mut connection = Connection::open(path)?;
    connection.execute("INSERT INTO models (key, identity) VALUES (1, ?)", [MODEL])?;
    let table = "CREATE TABLE vectors_1 (memory INTEGER PRIMARY KEY REFERENCES memories (key) ON DELETE CASCADE, \
                 code BLOB NOT NULL) STRICT";
    connection.execute(table, [])?;
    connection.execute(
        "INSERT INTO scopes (key, tenant, layer, path) VALUES (1, 'bench', 1, '{}')",
        [],
    )?;
    for start in (0..data.len()).step_by(BATCH) {
        let numbers = start..(start + BATCH).min(data.len());
        let codes = numbers.map(|number| Code::encode(data.vector(number)).map(|code| (number, code)));
        let codes: Vec<(usize, Code)> = codes.collect::<Option<_>>().context("a vector can be encoded")?;
        let transaction = connection.transaction()?;
        for (number, code) in &codes {
            let key = *number as i64 + 1;
            transaction
                .prepare_cached(
                    "INSERT INTO memories (key, id, tenant, scope, identity, record, version) VALUES (?1, ?2, '', 1, ?2, '', 1)",
                )?
                .execute(params![key, key.to_be_bytes()])?;
            transaction
                .prepare_cached("INSERT INTO vectors_1 (memory, code) VALUES (?, ?)")?
                .execute(params![key, code.as_bytes()])?;
        }
        transaction.commit()?;
        let entry = |(number, code): (usize, Code)| Entry {
            key: Key(number as i64 + 1),
            tenant: TenantId::local(),
            scope: ScopeKey((number % SCOPES) as i64),
            code: Some(code),
            text: String::new(),
        };
        let entries: Vec<Entry> = codes.into_iter().map(entry).collect();
        index.apply(&entries, &[], Sequence(start as i64))?;
    }
    index.flush()?;
    Ok(())
}

/// Bytes of the pages that vectors take in the store.
fn table_bytes(path: &Path) -> anyhow::Result<u64> {
    let connection = Connection::open(path)?;
    let text = "SELECT sum(pgsize) FROM dbstat WHERE name = 'vectors_1'";
    let bytes: i64 = connection.query_row(text, [], |row| row.get(0))?;
    Ok(bytes.unsigned_abs())
}

/// Resident memory of this process that is not a mapped file.
fn resident() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kilobytes.context("the kernel tells the memory in use")? * 1024)
}

impl Engine for Funnel {
    fn name(&self) -> &'static str {
        self.name
    }

    /// Compares every vector with something, so that the store keeps as many in memory as it has room for.
    async fn warm(&self) -> anyhow::Result<()> {
        let keys: Vec<Key> = (1..=self.index.len() as i64).map(Key).collect();
        for keys in keys.chunks(BATCH) {
            let rescoring = Rescoring {
                model: MODEL.into(),
                keys: keys.to_vec(),
                vector: vec![0.0; self.dimensions],
            };
            self.store.cosines(&TenantId::local(), &rescoring).await?;
        }
        Ok(())
    }

    async fn search(&self, query: &[f32], scopes: usize) -> anyhow::Result<Vec<usize>> {
        let code = Code::encode(query).context("the query can be encoded")?;
        let among = Among {
            tenant: TenantId::local(),
            scopes: (0..scopes).map(|scope| ScopeKey(scope as i64)).collect(),
            only: None,
            exclude: Default::default(),
        };
        let candidates = self.index.search(&code, &among, RESCORED);
        let keys: Vec<Key> = candidates.into_iter().map(|(key, _)| key).collect();
        let rescoring = Rescoring {
            model: MODEL.into(),
            keys,
            vector: query.to_vec(),
        };
        let mut scored = self.store.cosines(&TenantId::local(), &rescoring).await?;
        scored.sort_unstable_by(|a, b| b.1.total_cmp(&a.1));
        Ok(scored.into_iter().take(K).map(|(key, _)| key.0 as usize - 1).collect())
    }

    fn built(&self) -> Duration {
        self.built
    }

    fn disk_bytes(&self) -> u64 {
        self.disk
    }

    fn memory_bytes(&self) -> u64 {
        self.memory + self.index.bytes() + self.store.cached_bytes() as u64
    }
}

#[cfg(feature = "hnsw")]
pub use hnsw::Hnsw;

#[cfg(feature = "hnsw")]
mod hnsw {
    use usearch::{Index, IndexOptions, MetricKind, ScalarKind};

    use super::super::recall;
    use super::*;

    /// usearch with full-size float32 vectors.
    pub struct Hnsw {
        index: Index,
        built: Duration,
        disk: u64,
    }

    impl Hnsw {
        /// Builds the graph, and searches it as broadly as a recall of 0.99 needs.
        pub fn build(data: &Data, truth: &[Vec<usize>]) -> anyhow::Result<Self> {
            let options = IndexOptions {
                dimensions: data.dimensions,
                metric: MetricKind::IP,
                quantization: ScalarKind::F32,
                connectivity: 16,
                expansion_add: 128,
                ..IndexOptions::default()
            };
            let index = Index::new(&options)?;
            let began = Instant::now();
            index.reserve(data.len())?;
            for number in 0..data.len() {
                index.add(number as u64, data.vector(number))?;
            }
            let built = began.elapsed();
            let file = tempfile::NamedTempFile::new()?;
            index.save(&file.path().to_string_lossy())?;
            let hnsw = Self {
                index,
                built,
                disk: file.as_file().metadata()?.len(),
            };
            for breadth in [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024] {
                hnsw.index.change_expansion_search(breadth);
                let found: anyhow::Result<Vec<_>> =
                    (0..data.queries()).map(|q| hnsw.find(data.query(q), SCOPES)).collect();
                if recall(&found?, truth) >= 0.99 {
                    eprintln!("hnsw-full searches with a breadth of {breadth}");
                    break;
                }
            }
            Ok(hnsw)
        }

        fn find(&self, query: &[f32], scopes: usize) -> anyhow::Result<Vec<usize>> {
            let found = match scopes {
                SCOPES => self.index.search(query, K)?,
                _ => self
                    .index
                    .filtered_search(query, K, |key| key as usize % SCOPES < scopes)?,
            };
            Ok(found.keys.into_iter().map(|key| key as usize).collect())
        }
    }

    impl Engine for Hnsw {
        fn name(&self) -> &'static str {
            "hnsw-full"
        }

        async fn search(&self, query: &[f32], scopes: usize) -> anyhow::Result<Vec<usize>> {
            self.find(query, scopes)
        }

        fn built(&self) -> Duration {
            self.built
        }

        fn disk_bytes(&self) -> u64 {
            self.disk
        }

        fn memory_bytes(&self) -> u64 {
            self.index.memory_usage() as u64
        }
    }
}
