//! BM25 (Robertson and Zaragoza 2009), as far as it does not depend on where the texts are.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;

/// How soon another occurrence of a term tells little more, as SQLite has it.
pub const K1: f64 = 1.2;
/// How much a text's length counts, as SQLite has it.
pub const B: f64 = 0.75;
/// Counts kept at most.
const KEPT: usize = 100_000;
/// Documents that the terms of one search may bring: ranking a document costs one or two microseconds.
const DOCUMENTS: i64 = 1_500;
/// Documents that are ranked at most, the newest first, when even the rarest term is everywhere.
pub const RANKED: i64 = 3_000;

/// How much a term tells: its inverse document frequency, as SQLite has it; what is in more than half of them tells next to
/// nothing.
pub fn rarity(documents: i64, with: i64) -> f64 {
    let (documents, with) = (documents.max(with) as f64, with as f64);
    ((documents - with + 0.5) / (with + 0.5)).ln().max(1e-6)
}

/// The rarest of terms, each with how many documents have it, as many as bring a bounded number of documents: a term that is
/// in most of them tells little, and costs the most.
pub fn rarest(mut counted: Vec<(i64, String)>) -> Vec<(i64, String)> {
    counted.sort();
    let mut documents = 0;
    let taken = counted.into_iter().take_while(|(count, _)| {
        // Words that nobody has said come first, and must not take the place of those that somebody has.
        let first = documents == 0;
        documents += count;
        first || documents <= DOCUMENTS
    });
    taken.collect()
}

/// What was counted not long ago, each with the newest memory at that time: counting reads whole lists, and a store that has
/// grown by a tenth is counted anew.
#[derive(Debug)]
pub struct Counts<K, V>(HashMap<K, (V, i64)>);

impl<K, V> Default for Counts<K, V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash, V: Copy> Counts<K, V> {
    /// What was counted, unless the store has grown too much since; `newest` is its newest memory now.
    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q, newest: i64) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let (value, then) = self.0.get(key)?;
        (newest <= then + then / 10 + 100).then_some(*value)
    }

    /// Keeps what was counted now.
    pub fn keep(&mut self, counted: impl IntoIterator<Item = (K, V)>, newest: i64) {
        if self.0.len() >= KEPT {
            self.0.clear();
        }
        let counted = counted.into_iter();
        self.0.extend(counted.map(|(key, value)| (key, (value, newest))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rarest_words_that_somebody_has_said_are_taken() {
        let taken = |counted: &[(i64, &str)]| {
            let counted = counted
                .iter()
                .map(|(count, term)| (*count, (*term).to_owned()))
                .collect();
            rarest(counted).into_iter().map(|(_, term)| term).collect::<Vec<_>>()
        };
        assert_eq!(taken(&[(900, "b"), (2, "a"), (700, "c")]), ["a", "c"]);
        assert_eq!(taken(&[(90_000, "everywhere")]), ["everywhere"]);
        assert_eq!(
            taken(&[(90_000, "coffee"), (0, "xyzzy"), (0, "qwrt")]),
            ["qwrt", "xyzzy", "coffee"]
        );
    }
}
