//! Reading texts together with a query.

use super::App;
use crate::error::EmbeddingError;

/// Scores and the cross-encoder that gave them.
#[derive(Clone, Debug)]
pub struct Reranked {
    /// One per text, 0 to 1.
    pub scores: Vec<f64>,
    /// Its name.
    pub model: String,
}

impl App {
    /// How well texts answer a query.
    ///
    /// # Errors
    /// When no cross-encoder is configured, or it fails.
    pub async fn rerank(&self, query: String, texts: Vec<String>) -> Result<Reranked, EmbeddingError> {
        let reranker = self.reranker.as_ref().ok_or(EmbeddingError::NoReranker)?;
        Ok(Reranked {
            scores: reranker.score(query, texts).await?,
            model: reranker.name().to_owned(),
        })
    }
}
