//! Text to vectors: models behind one port, Matryoshka sizes, a cache with single-flight.

mod app;
mod convert;
mod error;
mod grpc;
mod metrics;
mod store;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aeterna_config::{Reader, Setting};
use aeterna_error::{Error, Reason};
use aeterna_proto::embedding::v1::embedding_service_server::EmbeddingServiceServer;
use aeterna_rpc::{Dependency, Health};
use aeterna_storage::{RedisCache, RedisOptions};
use opentelemetry::metrics::Meter;
use tonic::service::Routes;

pub use error::EmbeddingError;
pub use store::local::check_directory;
use store::openai::{OpenAiModel, Options};
use store::shared::Shared;

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
        "Name of the default model; empty: the first model directory, else the model of `embedding.openai.urls`, else `hash`.",
    ),
    Setting::new(
        "embedding.reranker_dir",
        "",
        "Directory of a cross-encoder (config.json, tokenizer.json, model.safetensors; BERT with one label), for searches with `rerank`; empty: none.",
    ),
    Setting::new(
        "embedding.openai.urls",
        "",
        "Base URLs of servers that speak OpenAI's embeddings API, such as `https://api.openai.com/v1`, separated by commas: the next is asked when one fails, so all must serve the same model. Empty: none.",
    ),
    Setting::new(
        "embedding.openai.model",
        "text-embedding-3-small",
        "Name of their model.",
    ),
    Setting::new(
        "embedding.openai.dimension",
        "1536",
        "Dimensions of its vectors, a multiple of 64.",
    ),
    Setting::new(
        "embedding.openai.matryoshka",
        "true",
        "It takes `dimensions`, and a prefix of its vectors is a good vector: `true` or `false`.",
    ),
    Setting::secret(
        "embedding.openai.api_key",
        "embedding.openai.api_key_file",
        "Sent to them as a bearer token; `embedding.openai.api_key_file` reads it from a file.",
    ),
    Setting::new(
        "embedding.openai.timeout",
        "30s",
        "Time that one call to them may take.",
    ),
    Setting::new(
        "embedding.openai.price",
        "",
        "US dollars that they charge for a million tokens; empty: unknown, and no cost is counted.",
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
    Setting::new(
        "embedding.shared_cache",
        "",
        "Where copies of the service share the vectors that a model made for them: `redis://host:6379` or \
         `redis+sentinel://host1:26379,host2,host3/master`; empty: nowhere. Vectors of `hash` are made faster than fetched, and \
         are not shared.",
    ),
    Setting::secret(
        "embedding.shared_cache_password",
        "embedding.shared_cache_password_file",
        "The password of the servers in `embedding.shared_cache`.",
    ),
    Setting::secret(
        "embedding.shared_cache_sentinel_password",
        "embedding.shared_cache_sentinel_password_file",
        "The password of the Sentinels in `embedding.shared_cache`.",
    ),
    Setting::new(
        "embedding.shared_cache_term",
        "168h",
        "How long a vector is kept there.",
    ),
];

/// How the service is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Model directories.
    pub model_dirs: Vec<PathBuf>,
    /// Name of the default model; empty: the first one.
    pub default_model: String,
    /// A model behind servers that speak OpenAI's API.
    openai: Option<Options>,
    /// Directory of a cross-encoder; empty: none.
    pub reranker_dir: PathBuf,
    /// Threads per local model; 0: one per core.
    pub threads: usize,
    /// Bytes of cached vectors.
    pub cache_bytes: u64,
    /// Where copies share vectors, and for how long.
    shared: Option<(RedisOptions, Duration)>,
}

impl Config {
    /// Reads the settings; `None` after noting problems.
    pub fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let model_dirs = reader.list("embedding.model_dirs");
        let default_model = reader.text("embedding.default_model");
        let openai = openai(reader);
        let reranker_dir = reader.text("embedding.reranker_dir");
        let threads = reader.within("embedding.threads", 0..=256);
        let cache_bytes = reader.get("embedding.cache_bytes");
        let shared = RedisOptions::read(reader, "embedding.shared_cache");
        let term = reader.duration("embedding.shared_cache_term");
        if term.is_some_and(|term| term < Duration::from_secs(1)) {
            reader.problem("embedding.shared_cache_term", "is less than `1s`");
        }
        Some(Self {
            model_dirs: model_dirs?.into_iter().map(Into::into).collect(),
            default_model: default_model?,
            openai: openai?,
            reranker_dir: reranker_dir?.into(),
            threads: threads?,
            cache_bytes: cache_bytes?,
            shared: shared?.zip(Some(term?)),
        })
    }
}

/// How an OpenAI-compatible model is reached, when there is one.
fn openai(reader: &mut Reader<'_>) -> Option<Option<Options>> {
    // All of them, so that all problems are told together.
    let urls = reader.list("embedding.openai.urls");
    let model = reader.text("embedding.openai.model");
    let dimension: Option<usize> = reader.within("embedding.openai.dimension", 64..=65_472);
    let matryoshka: Option<bool> = reader.get("embedding.openai.matryoshka");
    let key = reader.secret("embedding.openai.api_key");
    let timeout = reader.duration("embedding.openai.timeout");
    let price = reader.text("embedding.openai.price");
    let (urls, model, dimension, matryoshka) = (urls?, model?, dimension?, matryoshka?);
    let (key, timeout, price) = (key?, timeout?, price?);
    if !dimension.is_multiple_of(64) {
        reader.problem("embedding.openai.dimension", "is no multiple of 64");
        return None;
    }
    let mut parsed = Vec::with_capacity(urls.len());
    for url in urls {
        match url.parse::<reqwest::Url>() {
            Ok(url) if !url.username().is_empty() || url.password().is_some() || url.query().is_some() => {
                let what = "has a URL with a user, a password or a query, which would be shown; set `embedding.openai.api_key_file`";
                reader.hidden_problem("embedding.openai.urls", what);
                return None;
            }
            Ok(url) if matches!(url.scheme(), "http" | "https") => parsed.push(url),
            _ => {
                reader.hidden_problem("embedding.openai.urls", "has something that is no http or https URL");
                return None;
            }
        }
    }
    let price = match price.as_str() {
        "" => None,
        text => match text.parse::<f64>() {
            Ok(price) if price.is_finite() && price >= 0.0 => Some(price),
            _ => {
                reader.problem("embedding.openai.price", "is no number of US dollars, such as `0.02`");
                return None;
            }
        },
    };
    Some((!parsed.is_empty()).then_some(Options {
        urls: parsed,
        model,
        dimension,
        matryoshka,
        key,
        timeout,
        price,
    }))
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

/// What is wrong with what a setting names.
fn setting(name: &str, error: &EmbeddingError) -> Error {
    Error::new(Reason::NotConfigured, format!("`{name}`: {error}"))
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
    if dirs.is_empty() && config.openai.is_none() {
        tracing::warn!(
            "no embedding model is installed, so `hash` compares words and not meanings; `aeterna models fetch` installs one"
        );
    }
    for dir in dirs {
        let loaded = tokio::task::spawn_blocking(move || store::local::LocalModel::load(&dir, threads)).await;
        let loaded = loaded.map_err(Error::internal)?;
        models.push(Arc::new(
            loaded.map_err(|error| setting("embedding.model_dirs", &error))?,
        ));
    }
    let metrics = metrics::Metrics::new(&deps.meter);
    if let Some(options) = config.openai {
        models.push(Arc::new(OpenAiModel::new(options, metrics.clone())?));
    }
    models.push(Arc::new(store::hash::HashModel::new()));
    let mut reranker = None;
    if !config.reranker_dir.as_os_str().is_empty() {
        let dir = config.reranker_dir;
        let loaded = tokio::task::spawn_blocking(move || store::cross::CrossEncoder::load(&dir, threads)).await;
        let loaded = loaded.map_err(Error::internal)?;
        reranker = Some(loaded.map_err(|error| setting("embedding.reranker_dir", &error))?);
    }
    let mut shared = None;
    if let Some((options, term)) = config.shared {
        let cache = Arc::new(RedisCache::new(options)?);
        let made = Shared::new(cache, term, deps.health.clone(), SERVICE);
        made.probe().await;
        shared = Some(made);
    }
    let app = app::App::new(
        models,
        &config.default_model,
        config.cache_bytes,
        shared,
        reranker,
        metrics,
    );
    let app = app.map_err(|error| match error {
        EmbeddingError::UnknownModel { .. } => setting("embedding.default_model", &error),
        error => error.into(),
    })?;
    deps.health.report(SERVICE, "models", Dependency::Up).await;
    let server = EmbeddingServiceServer::new(grpc::Embedding::new(app, deps.message_bytes))
        .max_decoding_message_size(deps.message_bytes)
        .max_encoding_message_size(deps.message_bytes);
    Ok(Routes::new(server))
}
