//! The port to models.

pub mod cross;
pub mod hash;
pub mod local;
pub mod openai;
pub mod shared;

use aeterna_types::dimension;
use async_trait::async_trait;

use crate::error::EmbeddingError;

/// What there is to know about a model.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Its name.
    pub name: String,
    /// `hash`, `local` or `openai`.
    pub provider: &'static str,
    /// Dimensions of its full vectors.
    pub dimension: usize,
    /// A prefix of a vector is a good vector.
    pub matryoshka: bool,
    /// It compares words and not meanings.
    pub lexical: bool,
    /// Tokens it reads of a text; 0: no limit, or one that its server knows.
    pub max_tokens: usize,
    /// Digest of what it was loaded from.
    pub revision: String,
}

impl ModelInfo {
    /// The sizes that can be asked of it, ascending; the last is its full size.
    pub fn sizes(&self) -> Vec<usize> {
        dimension::sizes(self.dimension)
    }
}

/// Whether a text is stored or searched with; queries go before documents in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TextKind {
    /// A text that is stored.
    Document,
    /// A text that is searched with.
    Query,
}

/// A full-size unit vector and what it took.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// Of length 1 in the Euclidean norm.
    pub vector: Vec<f32>,
    /// Tokens read.
    pub tokens: u32,
    /// The text was longer than the model's window.
    pub truncated: bool,
}

/// A model.
#[async_trait]
pub trait Model: Send + Sync {
    /// What there is to know about it.
    fn info(&self) -> &ModelInfo;

    /// Embeds one text at full size. Models gather texts that arrive together into batches themselves.
    async fn embed(&self, text: String, kind: TextKind) -> Result<Embedded, EmbeddingError>;
}

/// The first `size` values, scaled to length 1. A zero vector stays zero.
pub fn truncate(vector: &[f32], size: usize) -> Vec<f32> {
    let mut prefix = vector[..size.min(vector.len())].to_vec();
    normalise(&mut prefix);
    prefix
}

/// Scales to length 1; a zero vector stays zero.
pub fn normalise(vector: &mut [f32]) {
    let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    if norm > 0.0 {
        vector.iter_mut().for_each(|x| *x /= norm);
    }
}
