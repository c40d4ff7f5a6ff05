//! One text analysis for everything lexical: BM25 in every store, and the feature-hashing model.
//!
//! Lower case, split at everything that is neither letter nor digit, English stop words out, Snowball (Porter 2) stems.

use std::cell::RefCell;

use rust_stemmers::{Algorithm, Stemmer};

/// Version of the analysis. A store remembers it and analyses again when it changes.
pub const VERSION: u32 = 1;

/// Characters of one term that are kept; longer ones are no words.
const MAX_TERM_CHARS: usize = 64;

/// Words too common to tell texts apart (articles, pronouns, auxiliaries, prepositions, conjunctions), sorted.
const STOP_WORDS: &[&str] = &[
    "a",
    "about",
    "above",
    "after",
    "again",
    "all",
    "also",
    "am",
    "an",
    "and",
    "any",
    "are",
    "as",
    "at",
    "be",
    "because",
    "been",
    "before",
    "being",
    "below",
    "between",
    "both",
    "but",
    "by",
    "can",
    "could",
    "d",
    "did",
    "do",
    "does",
    "doing",
    "don",
    "down",
    "during",
    "each",
    "few",
    "for",
    "from",
    "further",
    "had",
    "has",
    "have",
    "having",
    "he",
    "her",
    "here",
    "hers",
    "herself",
    "him",
    "himself",
    "his",
    "how",
    "i",
    "if",
    "in",
    "into",
    "is",
    "it",
    "its",
    "itself",
    "just",
    "ll",
    "m",
    "me",
    "might",
    "more",
    "most",
    "must",
    "my",
    "myself",
    "no",
    "nor",
    "not",
    "now",
    "of",
    "off",
    "on",
    "once",
    "only",
    "or",
    "other",
    "our",
    "ours",
    "ourselves",
    "out",
    "over",
    "own",
    "re",
    "s",
    "same",
    "she",
    "should",
    "so",
    "some",
    "such",
    "t",
    "than",
    "that",
    "the",
    "their",
    "theirs",
    "them",
    "themselves",
    "then",
    "there",
    "these",
    "they",
    "this",
    "those",
    "through",
    "to",
    "too",
    "under",
    "until",
    "up",
    "ve",
    "very",
    "was",
    "we",
    "were",
    "what",
    "when",
    "where",
    "which",
    "while",
    "who",
    "whom",
    "why",
    "will",
    "with",
    "would",
    "you",
    "your",
    "yours",
    "yourself",
    "yourselves",
];

thread_local! {
    /// Building a stemmer is cheap, but not free, and it can't be shared.
    static STEMMER: RefCell<Stemmer> = RefCell::new(Stemmer::create(Algorithm::English));
}

/// The terms of a text in order, repetitions included.
///
/// A text that consists of stop words only keeps them, so that "who are you" can still be searched for.
pub fn analyse(text: &str) -> Vec<String> {
    let words: Vec<String> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(|word| word.chars().take(MAX_TERM_CHARS).flat_map(char::to_lowercase).collect())
        .collect();
    let telling = |word: &&String| STOP_WORDS.binary_search(&word.as_str()).is_err();
    let kept: Vec<&String> = if words.iter().any(|word| telling(&word)) {
        words.iter().filter(telling).collect()
    } else {
        words.iter().collect()
    };
    STEMMER.with_borrow(|stemmer| kept.into_iter().map(|word| stemmer.stem(word).into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_lowered_stopped_and_stemmed() {
        assert_eq!(
            analyse("She was RUNNING to the caf\u{e9}s, 2023!"),
            ["run", "caf\u{e9}", "2023"]
        );
        assert_eq!(analyse("The hiking trips"), ["hike", "trip"]);
    }

    #[test]
    fn a_text_of_stop_words_keeps_them() {
        assert_eq!(analyse("Who are you"), ["who", "are", "you"]);
        assert!(analyse("... --- !!!").is_empty());
    }

    #[test]
    fn stop_words_are_sorted_for_the_search() {
        assert!(STOP_WORDS.is_sorted());
    }

    #[test]
    fn hostile_text_is_cut_and_never_panics() {
        assert_eq!(analyse(&"x".repeat(100_000))[0].chars().count(), MAX_TERM_CHARS);
        for text in [
            "\u{0}\u{202e}\u{feff}",
            "İİİ ẞ ﬁ",
            "e\u{301}e\u{301}",
            "''''s",
            "y",
            "yyyy's",
        ] {
            let _ = analyse(text);
        }
    }
}
