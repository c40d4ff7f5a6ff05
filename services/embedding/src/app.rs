//! The use cases.

mod embed;
mod models;
mod rerank;
mod select;

use std::collections::BTreeSet;
use std::sync::Arc;

use aeterna_types::dimension::{Latencies, SIZES};
use moka::future::Cache;

pub use embed::{Batch, Wanted};
pub use models::Listed;
pub use rerank::Reranked;
pub use select::{Choice, Selection, SelectionRequest};

use crate::error::EmbeddingError;
use crate::metrics::Metrics;
use crate::store::cross::CrossEncoder;
use crate::store::shared::Shared;
use crate::store::{Embedded, Model, TextKind};

/// Of a tenant's text.
type Digest = [u8; 32];

/// Model, kind and text.
type CacheKey = (usize, TextKind, Digest);

/// The service's domain.
pub struct App {
    models: Vec<Arc<dyn Model>>,
    cache: Cache<CacheKey, Arc<Embedded>>,
    shared: Option<Shared>,
    reranker: Option<CrossEncoder>,
    /// What single texts took of late, by the number of the model; answers from the cache do not count.
    latencies: Latencies<usize>,
    metrics: Metrics,
}

impl App {
    /// With its models, the default put first.
    ///
    /// # Errors
    /// When no model has the default's name, or two models have the same.
    pub fn new(
        mut models: Vec<Arc<dyn Model>>,
        default: &str,
        cache_bytes: u64,
        shared: Option<Shared>,
        reranker: Option<CrossEncoder>,
        metrics: Metrics,
    ) -> Result<Self, EmbeddingError> {
        for (place, model) in models.iter().enumerate() {
            let name = &model.info().name;
            if models[..place].iter().any(|other| other.info().name == *name) {
                return Err(EmbeddingError::TwoModels(name.clone()));
            }
        }
        if !default.is_empty() {
            let known = names(&models);
            let found = models.iter().position(|model| model.info().name == default);
            let index = found.ok_or_else(|| EmbeddingError::UnknownModel {
                name: default.into(),
                known,
            })?;
            models[..=index].rotate_right(1);
        }
        let cache = Cache::builder()
            .max_capacity(cache_bytes)
            .weigher(|_, embedded: &Arc<Embedded>| u32::try_from(embedded.vector.len() * 4 + 128).unwrap_or(u32::MAX))
            .build();
        Ok(Self {
            models,
            cache,
            shared,
            reranker,
            latencies: Latencies::default(),
            metrics,
        })
    }

    /// The sizes that can be asked of a model, ascending; what is larger than its own is clipped to it.
    pub fn sizes(&self, name: &str) -> Vec<usize> {
        let own = self.model(name).map(|index| self.models[index].info().dimension);
        let sizes: BTreeSet<usize> = SIZES.into_iter().chain(own).collect();
        sizes.into_iter().collect()
    }

    /// The index of the model of that name; empty means the default.
    fn model(&self, name: &str) -> Result<usize, EmbeddingError> {
        let found = self
            .models
            .iter()
            .position(|model| name.is_empty() || model.info().name == name);
        found.ok_or_else(|| EmbeddingError::UnknownModel {
            name: name.into(),
            known: names(&self.models),
        })
    }
}

fn names(models: &[Arc<dyn Model>]) -> String {
    let names: Vec<_> = models.iter().map(|model| model.info().name.as_str()).collect();
    names.join(", ")
}
