//! What can go wrong, by what a caller can do about it.

use aeterna_error::{Error, Reason};

/// An error of the embedding service.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EmbeddingError {
    /// No model of that name is loaded.
    #[error("no model `{name}` is loaded; use one of: {known}")]
    UnknownModel {
        /// The name asked for.
        name: String,
        /// The names that are there.
        known: String,
    },
    /// Two models have the same name.
    #[error(
        "two models are named `{0}`; rename a directory in `embedding.model_dirs`, or leave one of them or \
         `embedding.openai.model` out"
    )]
    TwoModels(String),
    /// A model directory can't be used.
    #[error("the model directory `{dir}` can't be used: {why}")]
    BadDirectory {
        /// The directory.
        dir: String,
        /// What is wrong with it and what to do.
        why: String,
    },
    /// There is no cross-encoder.
    #[error("there is no cross-encoder; set `embedding.reranker_dir` to the directory of one")]
    NoReranker,
    /// The model failed on a text.
    #[error("the model failed")]
    Failed(String),
    /// The model's server does not take the text.
    #[error("the model's server refuses the text: {0}")]
    Refused(String),
    /// The same of one of several texts.
    #[error("the model's server refuses the text: {why}")]
    RefusedOne {
        /// Its place.
        index: usize,
        /// What the server says.
        why: String,
    },
    /// The model's servers are away, or answer nonsense.
    #[error("the model's server is away: {0}")]
    Away(String),
}

impl EmbeddingError {
    /// Of a call with one text.
    pub fn alone(self) -> Self {
        match self {
            Self::RefusedOne { why, .. } => Self::Refused(why),
            error => error,
        }
    }
}

impl From<EmbeddingError> for Error {
    fn from(error: EmbeddingError) -> Self {
        match &error {
            EmbeddingError::UnknownModel { known, .. } => {
                let message = error.to_string();
                Self::new(Reason::ModelNotFound, message).with("models", known)
            }
            EmbeddingError::BadDirectory { .. } | EmbeddingError::TwoModels(_) | EmbeddingError::NoReranker => {
                Self::new(Reason::NotConfigured, error.to_string())
            }
            EmbeddingError::Refused(_) => Self::field("text", error.to_string()),
            EmbeddingError::RefusedOne { index, .. } => Self::field(&format!("texts[{index}]"), error.to_string()),
            EmbeddingError::Away(_) => Self::unavailable(error.to_string()),
            EmbeddingError::Failed(why) => Self::internal(why.clone()),
        }
    }
}
