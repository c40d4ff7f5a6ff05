//! Searching the past: what has changed since then is scored here, by its text of that time.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::{TenantId, Timestamp};
use rustc_hash::FxHashSet;

use super::super::Model;
use super::diverse::cosine;
use super::{App, Filter};
use crate::domain::{Key, Memory, ScopeKey};
use crate::store::bm25::{B, K1, rarity};
use crate::store::{Earlier, Rescoring};

/// Memories that have changed since and are scored by their text of that time, at most.
const CHANGED: usize = 2_000;
/// Texts that are embedded for a search, at most, those first that share the most words with it; the others have their lexical
/// score.
const EMBEDDED: usize = 200;

/// What there was at a time.
#[derive(Clone, Debug, Default)]
pub struct Past {
    /// Those that are still as they were.
    pub unchanged: FxHashSet<Key>,
    /// Those that are not, as they were.
    pub changed: HashMap<Key, Memory>,
    /// Those whose vector is of another text by now.
    reworded: HashSet<Key>,
    /// There were more.
    pub cut: bool,
}

impl Past {
    /// Only some of the texts of that time are embedded.
    pub fn is_partly_embedded(&self) -> bool {
        self.reworded.len() > EMBEDDED
    }

    /// The texts to embed: those that share the most words with the query, and of them the newest memories.
    fn to_embed(&self, terms: &[String]) -> Vec<(Key, String)> {
        let shared = |memory: &Memory| {
            let words: HashSet<String> = aeterna_text::analyse(&memory.body.lexical_text()).into_iter().collect();
            terms.iter().filter(|term| words.contains(*term)).count()
        };
        let reworded = self.changed.iter().filter(|(key, _)| self.reworded.contains(key));
        let mut reworded: Vec<(Key, &Memory)> = reworded.map(|(key, memory)| (*key, memory)).collect();
        if self.is_partly_embedded() {
            reworded.sort_by_cached_key(|(key, memory)| Reverse((shared(memory), *key)));
            reworded.truncate(EMBEDDED);
        }
        let text = |(key, memory): (Key, &Memory)| (key, memory.body.dense_text());
        reworded.into_iter().map(text).collect()
    }
}

impl App {
    pub(super) async fn past(
        &self,
        tenant: &TenantId,
        scopes: &[ScopeKey],
        filter: Option<&Filter>,
        at: Timestamp,
    ) -> Result<Past, Error> {
        let found = self.store.as_of(tenant, scopes, filter, at, CHANGED + 1).await?;
        let mut past = Past {
            unchanged: found.unchanged.into_iter().collect(),
            cut: found.changed.len() > CHANGED,
            ..Past::default()
        };
        for Earlier { key, memory, reworded } in found.changed.into_iter().take(CHANGED) {
            past.changed.insert(key, memory);
            if reworded {
                past.reworded.insert(key);
            }
        }
        Ok(past)
    }

    /// Cosines of what has changed since.
    pub(super) async fn past_cosines(
        &self,
        context: &RequestContext,
        model: &Model,
        past: &Past,
        (vector, terms): (&[f32], &[String]),
    ) -> Result<Vec<(Key, f64)>, Error> {
        let kept: Vec<Key> = past
            .changed
            .keys()
            .filter(|key| !past.reworded.contains(key))
            .copied()
            .collect();
        let kept = Rescoring {
            model: model.identity.clone(),
            keys: kept,
            vector: vector.to_vec(),
        };
        let kept = self.store.cosines(&context.principal().tenant, &kept).await?;
        let mut cosines: Vec<(Key, f64)> = kept.into_iter().map(|(key, cosine)| (key, f64::from(cosine))).collect();
        let (keys, texts): (Vec<Key>, Vec<String>) = past.to_embed(terms).into_iter().unzip();
        if !texts.is_empty() {
            let vectors = self.embed_soon(context, model, texts, false).await?;
            let cosine = |other: &Vec<f32>| cosine(&other[..vector.len()], vector);
            cosines.extend(keys.into_iter().zip(vectors.iter().map(cosine)));
        }
        Ok(cosines)
    }

    /// BM25 of what has changed since, by the tenant's present frequencies.
    pub(super) async fn past_lexical(
        &self,
        tenant: &TenantId,
        past: &Past,
        terms: &[String],
    ) -> Result<Vec<(Key, f64)>, Error> {
        if past.changed.is_empty() || terms.is_empty() {
            return Ok(Vec::new());
        }
        let frequencies = self.store.frequencies(tenant, terms).await?;
        let texts: Vec<(Key, Vec<String>)> = past
            .changed
            .iter()
            .map(|(key, memory)| (*key, aeterna_text::analyse(&memory.body.lexical_text())))
            .collect();
        Ok(bm25(&texts, terms, &frequencies.with, frequencies.documents))
    }
}

/// Scores of the texts that have one of the terms (Robertson and Zaragoza 2009), best first; `with` says in how many of the
/// `documents` each term is.
fn bm25(texts: &[(Key, Vec<String>)], terms: &[String], with: &[i64], documents: i64) -> Vec<(Key, f64)> {
    let length = texts.iter().map(|(_, text)| text.len() as f64).sum::<f64>() / texts.len().max(1) as f64;
    let mut scored = Vec::new();
    for (key, text) in texts {
        let mut score = 0.0;
        for (term, with) in terms.iter().zip(with) {
            let count = text.iter().filter(|word| *word == term).count() as f64;
            let norm = K1 * (1.0 - B + B * text.len() as f64 / length.max(1.0));
            score += rarity(documents, *with) * count * (K1 + 1.0) / (count + norm);
        }
        if score > 0.0 {
            scored.push((*key, score));
        }
    }
    scored
}

#[cfg(test)]
mod tests {
    use aeterna_types::{MemoryId, Scope};

    use super::*;
    use crate::domain::Body;

    #[test]
    fn rare_words_and_short_texts_count_more() {
        let text = |key: i64, words: &str| (Key(key), words.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let texts = [
            text(1, "cat sat"),
            text(2, "dog sat"),
            text(3, "dog sat on a very long mat"),
            text(4, "none"),
        ];
        let terms = ["cat".to_owned(), "dog".to_owned()];
        let scores: HashMap<Key, f64> = bm25(&texts, &terms, &[1, 20], 100).into_iter().collect();
        assert!(scores[&Key(1)] > scores[&Key(2)] && scores[&Key(2)] > scores[&Key(3)]);
        assert!(!scores.contains_key(&Key(4)));
    }

    #[test]
    fn the_texts_that_share_most_words_are_embedded_first() {
        let memory = |content: String| Memory {
            id: MemoryId::from_bytes([7; 16]),
            scope: Scope::default(),
            body: Body::of(content),
            created_at: Timestamp::default(),
            updated_at: Timestamp::default(),
            deleted_at: None,
            version: 1,
            embedding_model: String::new(),
        };
        let mut past = Past::default();
        for number in 0..300 {
            let said = if number == 3 { "the grey cat" } else { "a cat" };
            past.changed.insert(Key(number), memory(format!("{said} {number}")));
        }
        past.reworded.extend((0..299).map(Key));
        let chosen = past.to_embed(&["cat".to_owned(), "grey".to_owned()]);
        assert!(past.is_partly_embedded() && chosen.len() == EMBEDDED);
        let [first, second, .., last] = &chosen[..] else {
            panic!("{chosen:?}")
        };
        assert_eq!((first.0, second.0, last.0), (Key(3), Key(298), Key(100)));
    }
}
