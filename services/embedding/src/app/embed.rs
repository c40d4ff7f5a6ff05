//! Embedding texts.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use aeterna_rpc::RequestContext;
use aeterna_types::TenantId;
use futures::future::join_all;

use super::{App, CacheKey, Digest};
use crate::error::EmbeddingError;
use crate::store::shared::Shared;
use crate::store::{Embedded, TextKind, truncate};

/// What is wanted of a batch.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Name of the model; empty: the default.
    pub model: String,
    /// Dimensions; `None`: the model's full size. Clipped to it.
    pub size: Option<usize>,
    /// Stored or searched with.
    pub kind: TextKind,
}

/// Vectors and what they took.
#[derive(Clone, Debug)]
pub struct Batch {
    /// One unit vector per text.
    pub vectors: Vec<Vec<f32>>,
    /// The model used.
    pub model: String,
    /// Dimensions of the vectors.
    pub dimension: usize,
    /// Texts answered from the cache.
    pub cached: usize,
    /// Tokens read.
    pub tokens: u64,
    /// Texts longer than the window.
    pub truncated: usize,
    /// The model was not trained for this truncation.
    pub untrained_truncation: bool,
}

impl App {
    /// Dimensions of the vectors that are wanted.
    ///
    /// # Errors
    /// When the model is unknown.
    pub fn dimension(&self, wanted: &Wanted) -> Result<usize, EmbeddingError> {
        let full = self.models[self.model(&wanted.model)?].info().dimension;
        Ok(wanted.size.map_or(full, |size| size.min(full)))
    }

    /// Embeds texts; the same text asked for by several callers of a tenant at once is embedded once.
    ///
    /// # Errors
    /// When the model is unknown or fails.
    pub async fn embed(
        &self,
        context: &RequestContext,
        texts: Vec<String>,
        wanted: Wanted,
    ) -> Result<Batch, EmbeddingError> {
        let index = self.model(&wanted.model)?;
        let info = self.models[index].info();
        let dimension = self.dimension(&wanted)?;
        let mut answers = Vec::with_capacity(texts.len());
        let tenant = &context.principal().tenant;
        let digests: Vec<Digest> = texts.iter().map(|text| digest(tenant, text)).collect();
        let mut fetched = self.fetch(index, wanted.kind, &digests).await;
        let (alone, began) = (texts.len() == 1, Instant::now());
        let waiting: Vec<_> = texts
            .into_iter()
            .zip(&digests)
            .map(|(text, digest)| {
                let there = fetched.remove(digest);
                self.one(text, (index, wanted.kind, *digest), there)
            })
            .collect();
        // All at once, so that a model can gather them into batches.
        for (index, answer) in join_all(waiting).await.into_iter().enumerate() {
            answers.push(answer.map_err(|error| match error {
                EmbeddingError::Refused(why) => EmbeddingError::RefusedOne { index, why },
                error => error,
            })?);
        }
        self.share(index, wanted.kind, &digests, &answers);
        if alone && answers.iter().all(|(_, cached)| !cached) {
            self.latencies.note(index, dimension, began.elapsed(), Instant::now());
        }
        let cached = answers.iter().filter(|(_, cached)| *cached).count();
        let fresh = || answers.iter().filter(|(_, cached)| !cached);
        let tokens = fresh().map(|(embedded, _)| u64::from(embedded.tokens)).sum();
        self.metrics.cached.add(cached as u64, &[]);
        self.metrics.embedded.add(fresh().count() as u64, &[]);
        self.metrics.tokens.add(tokens, &[]);
        Ok(Batch {
            vectors: answers
                .iter()
                .map(|(embedded, _)| truncate(&embedded.vector, dimension))
                .collect(),
            model: info.name.clone(),
            dimension,
            cached,
            tokens,
            truncated: answers.iter().filter(|(embedded, _)| embedded.truncated).count(),
            untrained_truncation: dimension < info.dimension && !info.matryoshka,
        })
    }

    /// The shared cache, for models whose vectors are dearer to make than to fetch.
    fn shared(&self, index: usize) -> Option<&Shared> {
        self.shared.as_ref().filter(|_| !self.models[index].info().lexical)
    }

    /// What other copies have had made and this one does not have.
    async fn fetch(&self, index: usize, kind: TextKind, digests: &[Digest]) -> HashMap<Digest, Arc<Embedded>> {
        let mut fetched = HashMap::new();
        let Some(shared) = self.shared(index) else {
            return fetched;
        };
        let unknown: BTreeSet<Digest> = digests
            .iter()
            .filter(|digest| !self.cache.contains_key(&(index, kind, **digest)))
            .copied()
            .collect();
        let unknown: Vec<Digest> = unknown.into_iter().collect();
        let found = shared.get(self.models[index].info(), kind, &unknown).await;
        for (digest, embedded) in unknown.into_iter().zip(found) {
            if let Some(embedded) = embedded {
                fetched.insert(digest, Arc::new(embedded));
            }
        }
        self.metrics.shared.add(fetched.len() as u64, &[]);
        fetched
    }

    /// Gives other copies what this one has had made.
    fn share(&self, index: usize, kind: TextKind, digests: &[Digest], answers: &[(Arc<Embedded>, bool)]) {
        let Some(shared) = self.shared(index) else { return };
        let made = digests.iter().zip(answers).filter(|(_, (_, cached))| !cached);
        let made: Vec<_> = made
            .map(|(digest, (embedded, _))| (*digest, Arc::clone(embedded)))
            .collect();
        shared.put(self.models[index].info(), kind, &made);
    }

    /// The vector of a text, and whether no model had to be asked; `there` is what another copy had made of it.
    async fn one(
        &self,
        text: String,
        key: CacheKey,
        there: Option<Arc<Embedded>>,
    ) -> Result<(Arc<Embedded>, bool), EmbeddingError> {
        let fresh = AtomicBool::new(false);
        let model = Arc::clone(&self.models[key.0]);
        let load = async {
            if let Some(there) = there {
                return Ok(there);
            }
            fresh.store(true, Ordering::Relaxed);
            model.embed(text, key.1).await.map(Arc::new)
        };
        match self.cache.try_get_with(key, load).await {
            Ok(embedded) => Ok((embedded, !fresh.load(Ordering::Relaxed))),
            Err(error) => Err(EmbeddingError::clone(&error)),
        }
    }
}

/// Each tenant has digests of its own: what is answered from a cache tells nobody what another tenant has embedded.
fn digest(tenant: &TenantId, text: &str) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(tenant.as_str().as_bytes()).update(&[0]);
    hasher.update(text.as_bytes()).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::store::{Model, ModelInfo};
    use aeterna_rpc::{Credentials, Health};
    use aeterna_storage::{Cache, StorageError};
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    struct Counting(ModelInfo, AtomicUsize);

    #[async_trait::async_trait]
    impl Model for Counting {
        fn info(&self) -> &ModelInfo {
            &self.0
        }

        async fn embed(&self, _: String, _: TextKind) -> Result<Embedded, EmbeddingError> {
            self.1.fetch_add(1, Ordering::SeqCst);
            tokio::task::yield_now().await;
            Ok(Embedded {
                vector: vec![0.05; 384],
                tokens: 3,
                truncated: false,
            })
        }
    }

    /// Forgets nothing.
    #[derive(Debug, Default)]
    struct Kept(Mutex<HashMap<String, Vec<u8>>>);

    #[async_trait::async_trait]
    impl Cache for Kept {
        async fn get(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, StorageError> {
            let kept = self.0.lock().unwrap();
            Ok(keys.iter().map(|key| kept.get(key).cloned()).collect())
        }

        async fn put(&self, values: &[(String, Vec<u8>)], _: Duration) -> Result<(), StorageError> {
            self.0.lock().unwrap().extend(values.iter().cloned());
            Ok(())
        }
    }

    fn app() -> (App, Arc<Counting>) {
        app_with(1 << 20, None)
    }

    fn app_with(cache_bytes: u64, shared: Option<Shared>) -> (App, Arc<Counting>) {
        let info = ModelInfo {
            name: "counting".into(),
            provider: "local",
            dimension: 384,
            matryoshka: false,
            lexical: false,
            max_tokens: 8,
            revision: String::new(),
        };
        let model = Arc::new(Counting(info, AtomicUsize::new(0)));
        let meter = opentelemetry::global::meter("t");
        let models = vec![model.clone() as Arc<dyn Model>];
        let app = App::new(models, "", cache_bytes, shared, None, Metrics::new(&meter));
        (app.unwrap(), model)
    }

    fn wanted(size: Option<usize>) -> Wanted {
        Wanted {
            model: String::new(),
            size,
            kind: TextKind::Document,
        }
    }

    fn context(tenant: &str) -> RequestContext {
        RequestContext::background(tenant.parse().unwrap(), &Credentials::default())
    }

    #[tokio::test]
    async fn what_another_copy_had_made_is_used_whatever_there_is_room_for_here() {
        let kept = Arc::new(Kept::default());
        let term = Duration::from_secs(60);
        let shared = || Some(Shared::new(kept.clone(), term, Health::default(), "test"));
        let texts = || (0..150).map(|number| format!("text {number}")).collect::<Vec<_>>();
        let (first, _) = app_with(1 << 20, shared());
        let made = first.embed(&context("one"), texts(), wanted(None)).await.unwrap();
        while kept.0.lock().unwrap().len() < 150 {
            tokio::task::yield_now().await;
        }
        for cache_bytes in [0, 4_000] {
            let (other, model) = app_with(cache_bytes, shared());
            let found = other.embed(&context("one"), texts(), wanted(None)).await.unwrap();
            assert_eq!(
                (found.cached, model.1.load(Ordering::SeqCst)),
                (150, 0),
                "{cache_bytes}"
            );
            assert_eq!(found.vectors, made.vectors);
        }
    }

    #[tokio::test]
    async fn no_tenant_is_told_what_another_one_has_embedded() {
        let (app, model) = app();
        for tenant in ["one", "two"] {
            let batch = app
                .embed(&context(tenant), vec!["a".into()], wanted(None))
                .await
                .unwrap();
            assert_eq!((batch.cached, batch.tokens), (0, 3));
        }
        assert_eq!(model.1.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn the_same_text_is_embedded_once_however_often_it_is_asked_for() {
        let (app, model) = app();
        let batch = app
            .embed(&context("one"), vec!["a".into(), "a".into(), "b".into()], wanted(None))
            .await
            .unwrap();
        assert_eq!((batch.vectors.len(), batch.cached, batch.tokens), (3, 1, 6));
        let again = app
            .embed(&context("one"), vec!["b".into()], wanted(None))
            .await
            .unwrap();
        assert_eq!((again.cached, model.1.load(Ordering::SeqCst)), (1, 2));
    }

    #[tokio::test]
    async fn sizes_are_clipped_renormalised_and_said_to_be_untrained() {
        let (app, _) = app();
        let small = app
            .embed(&context("one"), vec!["a".into()], wanted(Some(256)))
            .await
            .unwrap();
        let norm: f32 = small.vectors[0].iter().map(|x| x * x).sum();
        assert_eq!((small.dimension, small.untrained_truncation), (256, true));
        assert!((norm - 1.0).abs() < 1e-5);
        let large = app
            .embed(&context("one"), vec!["a".into()], wanted(Some(1536)))
            .await
            .unwrap();
        assert_eq!((large.dimension, large.untrained_truncation), (384, false));
    }
}
