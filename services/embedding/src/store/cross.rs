//! A cross-encoder of the BERT family, run by candle: reads a query and a text together and says how well they fit
//! (Nogueira and Cho 2019).

use std::path::Path;
use std::sync::Arc;

use candle_core::{D, Tensor};
use candle_nn::{Linear, Module as _, linear, ops};
use candle_transformers::models::bert::BertModel;
use rayon::prelude::*;
use tokenizers::Tokenizer;
use tokio_util::sync::CancellationToken;

use super::local::{Loaded, bad, tensors};
use crate::error::EmbeddingError;

/// Pairs per forward pass.
const BATCH: usize = 8;

/// A loaded cross-encoder.
#[derive(Clone)]
pub struct CrossEncoder(Arc<Network>);

struct Network {
    name: String,
    bert: BertModel,
    pooler: Linear,
    classifier: Linear,
    tokenizer: Tokenizer,
    threads: rayon::ThreadPool,
}

impl CrossEncoder {
    /// Loads a directory with one label, as sequence classifiers of sentence-transformers have it.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the model is no cross-encoder of the BERT family.
    pub fn load(dir: &Path, threads: usize) -> Result<Self, EmbeddingError> {
        let loaded = Loaded::from(dir)?;
        let layer = |name: &str, outputs: usize| {
            let missing = |error| {
                bad(
                    dir,
                    format!("it has no `{name}` of a cross-encoder with one label: {error}"),
                )
            };
            linear(loaded.dimension, outputs, loaded.weights.pp(name)).map_err(missing)
        };
        let pooler = layer("bert.pooler.dense", loaded.dimension)?;
        let classifier = layer("classifier", 1)?;
        let threads = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build();
        Ok(Self(Arc::new(Network {
            name: loaded.name,
            bert: loaded.bert,
            pooler,
            classifier,
            tokenizer: loaded.tokenizer,
            threads: threads.map_err(|error| bad(dir, format!("can't start threads: {error}")))?,
        })))
    }

    /// The name of its directory.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// How well each text answers the query, 0 to 1: the sigmoid of the model's output.
    ///
    /// # Errors
    /// When the model fails.
    pub async fn score(&self, query: String, texts: Vec<String>) -> Result<Vec<f64>, EmbeddingError> {
        let network = Arc::clone(&self.0);
        let gone = CancellationToken::new();
        let _caller = gone.clone().drop_guard();
        let scored = tokio::task::spawn_blocking(move || {
            // Texts of like length together: the shorter ones of a pass are padded.
            let mut order: Vec<usize> = (0..texts.len()).collect();
            order.sort_by_key(|&number| texts[number].len());
            let score = |numbers: &[usize]| match gone.is_cancelled() {
                true => Err("the caller has left".into()),
                false => network.score(&query, numbers.iter().map(|&number| texts[number].as_str())),
            };
            let parts: Result<Vec<Vec<f64>>, _> =
                network.threads.install(|| order.par_chunks(BATCH).map(score).collect());
            parts.map(|parts| {
                let mut scores = vec![0.0; texts.len()];
                for (number, score) in order.into_iter().zip(parts.concat()) {
                    scores[number] = score;
                }
                scores
            })
        });
        let failed = |error: String| EmbeddingError::Failed(error);
        let scored = scored.await.map_err(|error| failed(error.to_string()))?;
        scored.map_err(|error| failed(error.to_string()))
    }
}

impl Network {
    fn score<'a>(
        &self,
        query: &'a str,
        texts: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<f64>, Box<dyn std::error::Error + Send + Sync>> {
        let pairs: Vec<(&str, &str)> = texts.map(|text| (query, text)).collect();
        let encodings = self.tokenizer.encode_batch(pairs, true)?;
        let (ids, types, mask) = tensors(&encodings)?;
        let hidden = self.bert.forward(&ids, &types, Some(&mask))?;
        let first: Tensor = hidden.narrow(1, 0, 1)?.squeeze(1)?;
        let pooled = self.pooler.forward(&first)?.tanh()?;
        let scores = ops::sigmoid(&self.classifier.forward(&pooled)?)?.squeeze(D::Minus1)?;
        let scores = scores.to_vec1::<f32>()?;
        if scores.iter().any(|score| !score.is_finite()) {
            return Err("the model answered a value that is not finite".into());
        }
        Ok(scores.into_iter().map(f64::from).collect())
    }
}
