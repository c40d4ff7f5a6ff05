//! A sentence-transformers directory of the BERT family, run by candle: no network, off the async threads.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use async_trait::async_trait;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use tokenizers::{Encoding, Tokenizer, TruncationParams};
use tokio::sync::oneshot;

use super::{Embedded, Model, ModelInfo, TextKind, normalise};
use crate::error::EmbeddingError;

/// Texts per forward pass: short enough that a query does not wait long behind documents.
const BATCH: usize = 16;

type Answer = oneshot::Sender<Result<Embedded, EmbeddingError>>;

/// A loaded model with its worker threads.
pub struct LocalModel {
    info: ModelInfo,
    queue: Arc<Queue>,
}

struct Network {
    bert: BertModel,
    tokenizer: Tokenizer,
    max_tokens: usize,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    ready: Condvar,
}

#[derive(Default)]
struct Jobs {
    queries: VecDeque<(String, Answer)>,
    documents: VecDeque<(String, Answer)>,
    closed: bool,
}

/// Checks that a directory holds what a model needs, without loading it.
///
/// # Errors
/// A sentence that says what is missing.
pub fn check_directory(dir: &Path) -> Result<(), String> {
    let files = ["config.json", "tokenizer.json", "model.safetensors"];
    match files.iter().find(|name| !dir.join(name).is_file()) {
        Some(missing) => Err(format!(
            "`{missing}` is missing; a model directory has {}",
            files.join(", ")
        )),
        None => Ok(()),
    }
}

/// What a directory of the BERT family holds.
pub struct Loaded {
    /// The layers.
    pub bert: BertModel,
    /// Cuts texts at `max_tokens`, and pads nothing.
    pub tokenizer: Tokenizer,
    /// Tokens that it reads.
    pub max_tokens: usize,
    /// The directory's name.
    pub name: String,
    /// Digest of its files.
    pub revision: String,
    /// Dimensions of a token's vector.
    pub dimension: usize,
    /// All weights, for what stands on the layers.
    pub weights: VarBuilder<'static>,
}

/// What is wrong with a directory.
pub fn bad(dir: &Path, why: String) -> EmbeddingError {
    EmbeddingError::BadDirectory {
        dir: dir.display().to_string(),
        why,
    }
}

impl Loaded {
    /// Reads a directory.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the model is not of the BERT family with mean pooling.
    pub fn from(dir: &Path) -> Result<Self, EmbeddingError> {
        let bad = |why: String| bad(dir, why);
        check_directory(dir).map_err(bad)?;
        let read = |name: &str| fs::read(dir.join(name)).map_err(|e| bad(format!("can't read `{name}`: {e}")));
        let json = |name: &str| -> Result<serde_json::Value, EmbeddingError> {
            serde_json::from_slice(&read(name)?).map_err(|e| bad(format!("`{name}` is not JSON: {e}")))
        };
        let config_json = json("config.json")?;
        match config_json["model_type"].as_str() {
            None | Some("bert") => {}
            Some(other) => return Err(bad(format!("its model_type is `{other}`; only `bert` is supported"))),
        }
        let config: Config = serde_json::from_value(config_json)
            .map_err(|e| bad(format!("`config.json` is no BERT configuration: {e}")))?;
        if dir.join("1_Pooling/config.json").is_file()
            && json("1_Pooling/config.json")?["pooling_mode_mean_tokens"].as_bool() == Some(false)
        {
            return Err(bad("it does not pool by mean; only mean pooling is supported".into()));
        }
        let window = match dir.join("sentence_bert_config.json").is_file() {
            true => json("sentence_bert_config.json")?["max_seq_length"].as_u64(),
            false => None,
        };
        let max_tokens = window
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(config.max_position_embeddings);
        let max_tokens = max_tokens.min(config.max_position_embeddings);

        let weights = read("model.safetensors")?;
        let mut digest = blake3::Hasher::new();
        digest
            .update(&weights)
            .update(&read("tokenizer.json")?)
            .update(&read("config.json")?);
        let mut tokenizer = Tokenizer::from_bytes(read("tokenizer.json")?)
            .map_err(|e| bad(format!("`tokenizer.json` is no tokenizer: {e}")))?;
        // The file's own settings cut and pad at a length of their own choosing.
        tokenizer.with_padding(None);
        let truncation = TruncationParams {
            max_length: max_tokens,
            ..Default::default()
        };
        tokenizer
            .with_truncation(Some(truncation))
            .map_err(|e| bad(format!("`tokenizer.json` can't truncate: {e}")))?;
        let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)
            .map_err(|e| bad(format!("`model.safetensors` can't be read: {e}")))?;
        let bert = BertModel::load(weights.clone(), &config)
            .map_err(|e| bad(format!("`model.safetensors` does not fit `config.json`: {e}")))?;
        let name = dir
            .file_name()
            .map_or_else(|| "local".into(), |name| name.to_string_lossy().into_owned());
        Ok(Self {
            bert,
            tokenizer,
            max_tokens,
            name,
            revision: digest.finalize().to_hex()[..16].to_string(),
            dimension: config.hidden_size,
            weights,
        })
    }
}

/// Encoded texts as tensors of `(texts, tokens)`: ids, types and mask, padded with zeros.
pub fn tensors(encodings: &[Encoding]) -> candle_core::Result<(Tensor, Tensor, Tensor)> {
    let longest = encodings.iter().map(|e| e.len()).max().unwrap_or(1).max(1);
    let (mut ids, mut types, mut mask) = (Vec::new(), Vec::new(), Vec::new());
    for encoding in encodings {
        let padding = longest - encoding.len();
        let padded = |values: &[u32]| {
            values
                .iter()
                .copied()
                .chain(std::iter::repeat_n(0, padding))
                .collect::<Vec<_>>()
        };
        ids.extend(padded(encoding.get_ids()));
        types.extend(padded(encoding.get_type_ids()));
        mask.extend(std::iter::repeat_n(1f32, encoding.len()).chain(std::iter::repeat_n(0.0, padding)));
    }
    let shape = (encodings.len(), longest);
    Ok((
        Tensor::from_vec(ids, shape, &Device::Cpu)?,
        Tensor::from_vec(types, shape, &Device::Cpu)?,
        Tensor::from_vec(mask, shape, &Device::Cpu)?,
    ))
}

impl LocalModel {
    /// Loads a directory and starts `threads` workers.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the model is not of the BERT family with mean pooling.
    pub fn load(dir: &Path, threads: usize) -> Result<Self, EmbeddingError> {
        let Loaded {
            bert,
            tokenizer,
            max_tokens,
            name,
            revision,
            dimension,
            ..
        } = Loaded::from(dir)?;
        let network = Network {
            bert,
            tokenizer,
            max_tokens,
        };
        let info = ModelInfo {
            name,
            provider: "local",
            dimension,
            matryoshka: false,
            lexical: false,
            max_tokens,
            revision,
        };
        let queue = Arc::new(Queue::default());
        let network = Arc::new(network);
        for index in 0..threads.max(1) {
            let (queue, network) = (Arc::clone(&queue), Arc::clone(&network));
            std::thread::Builder::new()
                .name(format!("embed-{index}"))
                .spawn(move || queue.work(&network))
                .map_err(|e| bad(dir, format!("can't start a thread: {e}")))?;
        }
        Ok(Self { info, queue })
    }
}

impl Drop for LocalModel {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.ready.notify_all();
    }
}

#[async_trait]
impl Model for LocalModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    async fn embed(&self, text: String, kind: TextKind) -> Result<Embedded, EmbeddingError> {
        let (answer, answered) = oneshot::channel();
        {
            let mut jobs = self.queue.lock();
            match kind {
                TextKind::Query => jobs.queries.push_back((text, answer)),
                TextKind::Document => jobs.documents.push_back((text, answer)),
            }
        }
        self.queue.ready.notify_one();
        answered
            .await
            .unwrap_or_else(|_| Err(EmbeddingError::Failed("a worker thread ended".into())))
    }
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for texts, queries first; `None` when the model is dropped.
    fn take(&self) -> Option<Vec<(String, Answer)>> {
        let mut jobs = self.lock();
        loop {
            if jobs.closed {
                return None;
            }
            let pending = if jobs.queries.is_empty() {
                &mut jobs.documents
            } else {
                &mut jobs.queries
            };
            if !pending.is_empty() {
                let count = pending.len().min(BATCH);
                return Some(
                    pending
                        .drain(..count)
                        .filter(|(_, answer)| !answer.is_closed())
                        .collect(),
                );
            }
            jobs = self.ready.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn work(&self, network: &Network) {
        // One thread a worker: the matrices are small, and splitting them costs more than it gains.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        while let Some(batch) = self.take() {
            let (texts, answers): (Vec<String>, Vec<Answer>) = batch.into_iter().unzip();
            if texts.is_empty() {
                continue;
            }
            let vectors = match &pool {
                Ok(pool) => pool.install(|| network.embed(texts)),
                Err(_) => network.embed(texts),
            };
            match vectors {
                Ok(vectors) => answers.into_iter().zip(vectors).for_each(|(answer, vector)| {
                    // The asker may have gone; then nobody needs the vector.
                    let _ = answer.send(vector);
                }),
                Err(error) => answers.into_iter().for_each(|answer| {
                    let _ = answer.send(Err(EmbeddingError::Failed(error.to_string())));
                }),
            }
        }
    }
}

/// What candle and the tokenizer fail with.
type Failed = Box<dyn std::error::Error + Send + Sync>;

impl Network {
    /// Mean over the tokens of the last hidden layer, scaled to length 1; a text for which that is no finite number has none.
    fn embed(&self, texts: Vec<String>) -> Result<Vec<Result<Embedded, EmbeddingError>>, Failed> {
        let encodings = self.tokenizer.encode_batch(texts, true)?;
        let (ids, types, mask) = tensors(&encodings)?;
        let hidden = self.bert.forward(&ids, &types, Some(&mask))?;
        let weights = mask.unsqueeze(2)?;
        let sums = hidden.broadcast_mul(&weights)?.sum(1)?;
        let means = sums.broadcast_div(&weights.sum(1)?)?;
        let rows = means.to_vec2::<f32>()?.into_iter().zip(&encodings);
        let embedded = rows.map(|(mut vector, encoding)| {
            if vector.iter().any(|x| !x.is_finite()) {
                let why = "the model answers a value that is not finite".to_owned();
                return Err(EmbeddingError::Refused(why));
            }
            normalise(&mut vector);
            let tokens = u32::try_from(encoding.len()).unwrap_or(u32::MAX);
            let truncated = !encoding.get_overflowing().is_empty() && encoding.len() >= self.max_tokens;
            Ok(Embedded {
                vector,
                tokens,
                truncated,
            })
        });
        Ok(embedded.collect())
    }
}
