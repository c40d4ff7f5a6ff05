//! Indexes in a Qdrant cluster: a collection a model.

use std::sync::Arc;

use async_trait::async_trait;

use crate::app::{Indexes, Model};
use crate::domain::Sequence;
use crate::store::qdrant::{Cluster, QdrantOptions};
use crate::store::{StorageError, VectorIndex};

/// The indexes of a relational store in a cluster, which all copies of the service share.
pub struct QdrantIndexes(Arc<Cluster>);

impl QdrantIndexes {
    /// Of what the relational store with this identity holds.
    ///
    /// # Errors
    /// What is wrong with an endpoint.
    pub fn new(options: QdrantOptions, store: String) -> Result<Self, StorageError> {
        Ok(Self(Arc::new(Cluster::new(options, store)?)))
    }
}

#[async_trait]
impl Indexes for QdrantIndexes {
    /// Asks nothing: a cluster that is away keeps no service from starting.
    async fn open(
        &self,
        model: &Model,
        _end: Sequence,
    ) -> Result<(Arc<dyn VectorIndex>, Option<String>), StorageError> {
        Ok((Arc::new(self.0.index(&model.identity, model.prefix)), None))
    }

    async fn remove(&self, identity: &str) -> Result<(), StorageError> {
        self.0.remove(identity).await
    }
}
