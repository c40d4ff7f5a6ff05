//! Signed feature hashing: needs nothing, compares words and not meanings.
//!
//! Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (2009). Each feature sets one signed value in
//! each of the nested bands [0,256), [256,384), [384,768), [768,1536), so that every Matryoshka prefix is itself a
//! complete feature-hashing vector.

use std::collections::HashMap;

use async_trait::async_trait;

use super::{Embedded, Model, ModelInfo, TextKind, normalise};
use crate::error::EmbeddingError;

const BANDS: [(usize, usize); 4] = [(0, 256), (256, 384), (384, 768), (768, 1536)];

/// The model.
#[derive(Debug)]
pub struct HashModel(ModelInfo);

impl HashModel {
    /// There is only one.
    pub fn new() -> Self {
        Self(ModelInfo {
            name: "hash".into(),
            provider: "hash",
            dimension: 1536,
            matryoshka: true,
            lexical: true,
            max_tokens: 0,
            revision: format!("2-{}", aeterna_text::VERSION),
        })
    }
}

#[async_trait]
impl Model for HashModel {
    fn info(&self) -> &ModelInfo {
        &self.0
    }

    async fn embed(&self, text: String, _kind: TextKind) -> Result<Embedded, EmbeddingError> {
        let mut terms = aeterna_text::analyse(&text);
        if terms.is_empty() {
            // It is like nothing but itself.
            terms.push(text);
        }
        let tokens = u32::try_from(terms.len()).unwrap_or(u32::MAX);
        Ok(Embedded {
            vector: hash(&terms),
            tokens,
            truncated: false,
        })
    }
}

/// Terms weigh 1 and pairs of neighbours 0.5, each dampened by the square root of its count.
fn hash(terms: &[String]) -> Vec<f32> {
    let mut counts: HashMap<(&str, &str), f32> = HashMap::new();
    for (index, term) in terms.iter().enumerate() {
        *counts.entry((term, "")).or_default() += 1.0;
        if let Some(next) = terms.get(index + 1) {
            *counts.entry((term, next)).or_default() += 1.0;
        }
    }
    let mut features: Vec<_> = counts.into_iter().collect();
    features.sort_by_key(|(feature, _)| *feature); // so that rounding is the same every time
    let mut vector = vec![0.0; 1536];
    for ((first, second), count) in features {
        let weight = count.sqrt() * if second.is_empty() { 1.0 } else { 0.5 };
        let mut hasher = blake3::Hasher::new();
        hasher.update(first.as_bytes()).update(&[0]).update(second.as_bytes());
        let digest = hasher.finalize();
        for ((start, end), bytes) in BANDS.into_iter().zip(digest.as_bytes().chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            let word = u64::from_le_bytes(word);
            let sign = if word >> 63 == 0 { 1.0 } else { -1.0 };
            let width = end - start;
            let slot = start + usize::try_from(word % width as u64).unwrap_or(0);
            // A band as wide as the prefix before it adds as much as that prefix: every size weighs alike.
            vector[slot] += sign * weight * (width as f32 / 256.0).sqrt();
        }
    }
    normalise(&mut vector);
    vector
}

#[cfg(test)]
mod tests {
    use super::*;
    use aeterna_types::dimension::SIZES;

    use crate::store::truncate;

    fn cosine(a: &str, b: &str, size: usize) -> f32 {
        let vector = |text: &str| truncate(&hash(&aeterna_text::analyse(text)), size);
        vector(a).iter().zip(vector(b)).map(|(x, y)| x * y).sum()
    }

    #[test]
    fn texts_that_share_words_are_nearer_at_every_size() {
        for size in SIZES {
            let near = cosine("Ann adopted a grey cat in May", "which cat did Ann adopt", size);
            let far = cosine(
                "Ann adopted a grey cat in May",
                "the quarterly budget was approved",
                size,
            );
            assert!(near > far + 0.3, "{size}: {near} {far}");
            assert!((cosine("same text", "same text", size) - 1.0).abs() < 1e-5);
        }
    }

    #[tokio::test]
    async fn a_text_without_words_is_like_itself_alone() {
        let vector = async |text: &str| {
            HashModel::new()
                .embed(text.into(), TextKind::Query)
                .await
                .unwrap()
                .vector
        };
        let (smile, again, tears) = (
            vector("\u{1f600}").await,
            vector("\u{1f600}").await,
            vector("\u{1f622}").await,
        );
        let cosine = |other: &[f32]| smile.iter().zip(other).map(|(x, y)| x * y).sum::<f32>();
        assert!((cosine(&again) - 1.0).abs() < 1e-5 && cosine(&tears).abs() < 0.9);
    }
}
