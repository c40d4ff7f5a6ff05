//! Vectors that all copies of the service share: what one has had made, the others need not have made again.
//!
//! It is a cache and nothing more. It is waited for a moment only, left alone for a while when it does not answer, and what is
//! found in it is used only when it is a vector of the model.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aeterna_rpc::{Breaker, Dependency, Health};
use aeterna_storage::{Cache, StorageError};
use tokio::sync::Semaphore;

use super::{Embedded, ModelInfo, TextKind};

/// How long vectors are waited for; a model answers in about as much.
const PATIENCE: Duration = Duration::from_millis(100);
/// Vectors that are asked for at a time.
const PART: usize = 64;
/// Batches on their way to the cache at once; vectors beyond are not kept.
const WRITES: usize = 16;
/// The form of a value; one in another form is none.
const FORM: u8 = 1;
/// Bytes before the vector: the form, whether the text was cut off, and its tokens.
const HEAD: usize = 6;

/// The shared cache of vectors.
pub struct Shared {
    cache: Arc<dyn Cache>,
    term: Duration,
    breaker: Breaker,
    writes: Arc<Semaphore>,
    /// Whether it answered last; `None`: it was not asked yet.
    answers: Mutex<Option<bool>>,
    health: Health,
    service: &'static str,
}

impl Shared {
    /// Vectors are kept for `term`.
    pub fn new(cache: Arc<dyn Cache>, term: Duration, health: Health, service: &'static str) -> Self {
        Self {
            cache,
            term,
            breaker: Breaker::default(),
            writes: Arc::new(Semaphore::new(WRITES)),
            answers: Mutex::new(None),
            health,
            service,
        }
    }

    /// Looks whether it is there, and says so.
    pub async fn probe(&self) {
        let _ = self.fetch(vec!["probe".to_owned()]).await;
    }

    /// Vectors of texts by their digests, in their order; `None` where there is none.
    pub async fn get(&self, model: &ModelInfo, kind: TextKind, texts: &[[u8; 32]]) -> Vec<Option<Embedded>> {
        let mut found = Vec::with_capacity(texts.len());
        let began = Instant::now();
        for part in texts.chunks(PART) {
            // All parts together may take as long as one.
            if began.elapsed() >= PATIENCE {
                break;
            }
            let keys = part.iter().map(|text| key(model, kind, text)).collect();
            let Some(values) = self.fetch(keys).await else { break };
            found.extend(values.into_iter().map(|value| decode(&value?, model.dimension)));
        }
        found.resize_with(texts.len(), || None);
        found
    }

    async fn fetch(&self, keys: Vec<String>) -> Option<Vec<Option<Vec<u8>>>> {
        if !self.breaker.admits() {
            return None;
        }
        // A task of its own: a connection that takes longer is there for the next call.
        let cache = Arc::clone(&self.cache);
        let asked = tokio::spawn(async move { cache.get(&keys).await });
        let answer = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => Err(StorageError::Other(Box::new(error))),
            Err(_) => Err(StorageError::Unavailable("it does not answer".into())),
        };
        self.breaker.tell(answer.is_ok());
        if self.answers().replace(answer.is_ok()) != Some(answer.is_ok()) {
            let state = match &answer {
                Ok(_) => Dependency::Up,
                Err(error) => Dependency::Degraded(format!("{error}; each copy has its vectors made by itself")),
            };
            self.health.report(self.service, "shared_cache", state).await;
        }
        answer.ok()
    }

    fn answers(&self) -> MutexGuard<'_, Option<bool>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps vectors by the digests of their texts, without being waited for.
    pub fn put(&self, model: &ModelInfo, kind: TextKind, fresh: &[([u8; 32], Arc<Embedded>)]) {
        if fresh.is_empty() || *self.answers() == Some(false) {
            return;
        }
        let Ok(permit) = Arc::clone(&self.writes).try_acquire_owned() else {
            return;
        };
        let value = |(text, embedded): &([u8; 32], Arc<Embedded>)| (key(model, kind, text), encode(embedded));
        let values: Vec<_> = fresh.iter().map(value).collect();
        let (cache, term) = (Arc::clone(&self.cache), self.term);
        tokio::spawn(async move {
            if let Err(error) = cache.put(&values, term).await {
                tracing::debug!(%error, "vectors are not shared");
            }
            drop(permit);
        });
    }
}

/// All that a vector depends on.
fn key(model: &ModelInfo, kind: TextKind, text: &[u8; 32]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [model.provider, &model.name, &model.revision] {
        hasher
            .update(&(part.len() as u64).to_le_bytes())
            .update(part.as_bytes());
    }
    hasher.update(&(model.dimension as u64).to_le_bytes());
    hasher.update(&[u8::from(kind == TextKind::Query)]).update(text);
    format!("vector:{}", hasher.finalize().to_hex())
}

fn encode(embedded: &Embedded) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEAD + 4 * embedded.vector.len());
    value.extend([FORM, u8::from(embedded.truncated)]);
    value.extend(embedded.tokens.to_le_bytes());
    value.extend(embedded.vector.iter().flat_map(|x| x.to_le_bytes()));
    value
}

fn decode(value: &[u8], dimension: usize) -> Option<Embedded> {
    let (head, body) = value.split_first_chunk::<HEAD>()?;
    let [FORM, truncated @ (0 | 1), tokens @ ..] = *head else {
        return None;
    };
    let (values, rest) = body.as_chunks::<4>();
    let vector: Vec<f32> = values.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let sound = vector.len() == dimension && rest.is_empty() && vector.iter().all(|x| x.is_finite());
    sound.then_some(Embedded {
        vector,
        tokens: u32::from_le_bytes(tokens),
        truncated: truncated == 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_as_it_was_written_and_never_otherwise() {
        let embedded = Embedded {
            vector: vec![0.6, -0.8],
            tokens: 70_000,
            truncated: true,
        };
        let value = encode(&embedded);
        let read = decode(&value, 2).unwrap();
        assert_eq!(
            (read.vector, read.tokens, read.truncated),
            (vec![0.6, -0.8], 70_000, true)
        );
        assert!(decode(&value, 3).is_none());
        assert!(decode(&value[..value.len() - 1], 2).is_none());
        let mut other = value.clone();
        other[0] = FORM + 1;
        assert!(decode(&other, 2).is_none());
        let mut broken = value;
        broken[HEAD..HEAD + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(decode(&broken, 2).is_none());
        assert!(decode(&[], 0).is_none());
    }

    #[test]
    fn each_model_and_kind_has_keys_of_its_own() {
        let model = |name: &str, revision: &str, dimension| ModelInfo {
            name: name.into(),
            provider: "local",
            dimension,
            matryoshka: false,
            lexical: false,
            max_tokens: 8,
            revision: revision.into(),
        };
        let text = [7; 32];
        let keys = [
            key(&model("a", "bc", 2), TextKind::Query, &text),
            key(&model("a", "bc", 2), TextKind::Document, &text),
            key(&model("ab", "c", 2), TextKind::Query, &text),
            key(&model("a", "bc", 3), TextKind::Query, &text),
            key(&model("a", "bc", 2), TextKind::Query, &[8; 32]),
        ];
        let different: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
    }
}
