//! Text to vectors: models behind one port, Matryoshka sizes, a cache with single-flight.

mod app;
mod convert;
mod error;
mod grpc;
mod metrics;
mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use aeterna_config::{Reader, Setting};
use aeterna_error::Error;
use aeterna_proto::embedding::v1::embedding_service_server::EmbeddingServiceServer;
use aeterna_rpc::{Dependency, Health};
use opentelemetry::metrics::Meter;
use tonic::service::Routes;

pub use error::EmbeddingError;
pub use store::local::check_directory;

/// The service's name in its contract.
pub const SERVICE: &str = "aeterna.embedding.v1.EmbeddingService";

/// The settings of this service.
pub const SETTINGS: &[Setting] = &[
    Setting::new(
        "embedding.model_dirs",
        "",
        "Model directories (config.json, tokenizer.json, model.safetensors), separated by commas; the first is the default model. Empty: those under `models` in the data directory.",
    ),
    Setting::new(
        "embedding.default_model",
        "",
        "Name of the default model; empty: the first model directory, else `hash`.",
    ),
    Setting::new(
        "embedding.reranker_dir",
        "",
        "Directory of a cross-encoder (config.json, tokenizer.json, model.safetensors; BERT with one label), for searches with `rerank`; empty: none.",
    ),
    Setting::new(
        "embedding.threads",
        "0",
        "Threads that run local models; 0 means one per core.",
    ),
    Setting::new(
        "embedding.cache_bytes",
        "67108864",
        "Memory for vectors of recent texts, in bytes; 0 turns the cache off.",
    ),
];

/// How the service is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Model directories.
    pub model_dirs: Vec<PathBuf>,
    /// Name of the default model; empty: the first one.
    pub default_model: String,
    /// Directory of a cross-encoder; empty: none.
    pub reranker_dir: PathBuf,
    /// Threads per local model; 0: one per core.
    pub threads: usize,
    /// Bytes of cached vectors.
    pub cache_bytes: u64,
}

impl Config {
    /// Reads the settings; `None` after noting problems.
    pub fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let model_dirs = reader.list("embedding.model_dirs");
        let default_model = reader.text("embedding.default_model");
        let reranker_dir = reader.text("embedding.reranker_dir");
        let threads = reader.within("embedding.threads", 0..=256);
        let cache_bytes = reader.get("embedding.cache_bytes");
        Some(Self {
            model_dirs: model_dirs?.into_iter().map(Into::into).collect(),
            default_model: default_model?,
            reranker_dir: reranker_dir?.into(),
            threads: threads?,
            cache_bytes: cache_bytes?,
        })
    }
}

/// What the service needs from the process it runs in.
#[derive(Clone, Debug)]
pub struct Deps {
    /// For its instruments.
    pub meter: Meter,
    /// For its health.
    pub health: Health,
    /// Largest message, in bytes.
    pub message_bytes: usize,
    /// Where fetched models are.
    pub data_dir: PathBuf,
}

impl Deps {
    /// Taken from the process.
    pub fn of(host: &aeterna_rpc::Host) -> Self {
        Self {
            meter: host.telemetry.meter("aeterna_embedding"),
            health: host.health.clone(),
            message_bytes: host.stack.limits().message_bytes,
            data_dir: host.config.data_dir.clone(),
        }
    }
}

/// Where models are installed.
pub fn models_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("models")
}

/// The model directories in a data directory, sorted by name.
pub fn installed(data_dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(models_dir(data_dir)).into_iter().flatten().flatten();
    let mut dirs: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|dir| check_directory(dir).is_ok())
        .collect();
    dirs.sort();
    dirs
}

/// Loads the models and makes the service's routes.
///
/// # Errors
/// When a model directory can't be loaded or the default model does not exist.
pub async fn build(config: Config, deps: Deps) -> Result<Routes, Error> {
    deps.health
        .report(SERVICE, "models", Dependency::Down("loading".into()))
        .await;
    let threads = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let mut models: Vec<Arc<dyn store::Model>> = Vec::new();
    let mut dirs = config.model_dirs;
    if dirs.is_empty() {
        dirs = installed(&deps.data_dir);
    }
    if dirs.is_empty() {
        tracing::warn!(
            "no embedding model is installed, so `hash` compares words and not meanings; `aeterna models fetch` installs one"
        );
    }
    for dir in dirs {
        let loaded = tokio::task::spawn_blocking(move || store::local::LocalModel::load(&dir, threads)).await;
        models.push(Arc::new(loaded.map_err(Error::internal)??));
    }
    models.push(Arc::new(store::hash::HashModel::new()));
    let mut reranker = None;
    if !config.reranker_dir.as_os_str().is_empty() {
        let dir = config.reranker_dir;
        let loaded = tokio::task::spawn_blocking(move || store::cross::CrossEncoder::load(&dir, threads)).await;
        reranker = Some(loaded.map_err(Error::internal)??);
    }
    let metrics = metrics::Metrics::new(&deps.meter);
    let app = app::App::new(models, &config.default_model, config.cache_bytes, reranker, metrics)?;
    deps.health.report(SERVICE, "models", Dependency::Up).await;
    let server = EmbeddingServiceServer::new(grpc::Embedding::new(app))
        .max_decoding_message_size(deps.message_bytes)
        .max_encoding_message_size(deps.message_bytes);
    Ok(Routes::new(server))
}
