//! One text analysis for everything lexical: BM25 in every store, and the feature-hashing model.
//!
//! Compatibility composition (Unicode Normalization Form KC), lower case, split at everything that is neither letter nor digit,
//! English stop words out, Snowball (Porter 2) stems. Of scripts that put no blanks between words, each character and each
//! pair of neighbours is a term (as in Nie, Gao, Zhang and Zhou 2000, “On the use of words and n-grams for Chinese information
//! retrieval”).

use std::borrow::Cow;
use std::cell::RefCell;

use rust_stemmers::{Algorithm, Stemmer};
use unicode_normalization::UnicodeNormalization as _;
use unicode_normalization::char::is_combining_mark;

/// Version of the analysis. A store remembers it and analyses again when it changes.
pub const VERSION: u32 = 2;

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

/// Scripts that put no blanks between words, or write so much together that a word tells little; first and last characters.
const UNSPACED: [(char, char); 12] = [
    ('\u{e00}', '\u{eff}'),     // Thai, Lao
    ('\u{1000}', '\u{109f}'),   // Myanmar
    ('\u{1780}', '\u{17ff}'),   // Khmer
    ('\u{3005}', '\u{3007}'),   // signs among Han characters
    ('\u{3041}', '\u{309f}'),   // Hiragana
    ('\u{30a1}', '\u{30ff}'),   // Katakana
    ('\u{31f0}', '\u{31ff}'),   // Katakana, extended
    ('\u{3400}', '\u{4dbf}'),   // Han, extended
    ('\u{4e00}', '\u{9fff}'),   // Han
    ('\u{ac00}', '\u{d7a3}'),   // Hangul
    ('\u{f900}', '\u{faff}'),   // Han, for compatibility
    ('\u{20000}', '\u{3ffff}'), // Han, extended
];

fn is_unspaced(c: char) -> bool {
    // Most texts have none.
    c >= UNSPACED[0].0 && UNSPACED.iter().any(|(first, last)| (*first..=*last).contains(&c))
}

/// Signs that only say how the character before them looks.
fn is_style(c: char) -> bool {
    matches!(c, '\u{34f}' | '\u{20e3}' | '\u{fe00}'..='\u{fe0f}' | '\u{e0100}'..='\u{e01ef}')
}

/// Signs that become letters or digits by composition, and are no part of the word beside them.
fn stands_apart(c: char) -> bool {
    matches!(c, '\u{2122}' | '\u{2120}' | '\u{2116}' | '\u{bc}'..='\u{be}' | '\u{2150}'..='\u{215f}')
}

/// Characters that look the same are the same.
fn composed(text: &str) -> String {
    let plain = text.chars().filter(|c| !is_style(*c));
    let apart = plain.flat_map(|c| {
        let blank = stands_apart(c).then_some(' ');
        blank.into_iter().chain([c]).chain(blank)
    });
    apart.nfkc().collect()
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || (!c.is_ascii() && is_combining_mark(c))
}

/// The terms of a text in order, repetitions included.
///
/// A text that consists of stop words only keeps them, so that "who are you" can still be searched for.
pub fn analyse(text: &str) -> Vec<String> {
    let text: Cow<'_, str> = match text.is_ascii() {
        true => text.into(),
        false => composed(text).into(),
    };
    let mut words: Vec<String> = Vec::new();
    let between = |c: char| !is_of_word(c);
    // A mark that stands on nothing is none of a word.
    let split = text
        .split(between)
        .map(|word| word.trim_start_matches(is_combining_mark));
    for word in split.filter(|word| !word.is_empty()) {
        if word.is_ascii() {
            words.push(lowered(word));
        } else {
            parts(word, &mut words);
        }
    }
    let telling = |word: &&String| STOP_WORDS.binary_search(&word.as_str()).is_err();
    let kept: Vec<&String> = if words.iter().any(|word| telling(&word)) {
        words.iter().filter(telling).collect()
    } else {
        words.iter().collect()
    };
    STEMMER.with_borrow(|stemmer| kept.into_iter().map(|word| stemmer.stem(word).into_owned()).collect())
}

fn lowered(word: &str) -> String {
    word.chars().take(MAX_TERM_CHARS).flat_map(char::to_lowercase).collect()
}

/// The terms of what stands between two blanks: words, and of what is written without blanks the characters, with the marks
/// that stand on them, and the pairs of them.
fn parts(word: &str, terms: &mut Vec<String>) {
    let mut rest = word;
    while let Some(first) = rest.chars().next() {
        let unspaced = is_unspaced(first);
        let end = rest.find(|c| is_unspaced(c) != unspaced && !is_combining_mark(c));
        let (run, left) = rest.split_at(end.unwrap_or(rest.len()));
        rest = left;
        if !unspaced {
            terms.push(lowered(run));
            continue;
        }
        let starts: Vec<usize> = run
            .char_indices()
            .filter(|(at, c)| *at == 0 || !is_combining_mark(*c))
            .map(|(at, _)| at)
            .collect();
        let until = |place: usize| starts.get(place).copied().unwrap_or(run.len());
        for (place, start) in starts.iter().enumerate() {
            terms.push(lowered(&run[*start..until(place + 1)]));
            if place + 1 < starts.len() {
                terms.push(lowered(&run[*start..until(place + 2)]));
            }
        }
    }
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
    fn what_looks_the_same_is_the_same() {
        let composed = analyse("caf\u{e9} \u{fb01}le \u{ff21}\u{ff22}\u{ff23} \u{d55c}");
        assert_eq!(composed, analyse("cafe\u{301} file abc \u{1112}\u{1161}\u{11ab}"));
        // Signs of style, and those that stand beside words, change none.
        assert_eq!(
            analyse("\u{2764}\u{fe0f}world nice \u{2764}\u{fe0f}"),
            ["world", "nice"]
        );
        assert_eq!(analyse("who are you \u{2764}\u{fe0f}"), ["who", "are", "you"]);
        assert_eq!(analyse("l\u{b4}eau \u{bb}1\u{fe0f}\u{20e3}\u{ab}"), ["l", "eau", "1"]);
        assert_eq!(
            analyse("Foo\u{2122} 5\u{bd} \u{2116}7 \u{845b}\u{e0100}"),
            ["foo", "tm", "5", "1", "2", "7", "\u{845b}"]
        );
        // A mark that no letter has with it stays in its word.
        assert_eq!(analyse("\u{939}\u{93f}\u{928}\u{94d}\u{926}\u{940}").len(), 1);
    }

    #[test]
    fn what_is_written_without_blanks_is_found_by_any_part_of_it() {
        assert_eq!(
            analyse("\u{6771}\u{4eac}\u{90fd}"),
            [
                "\u{6771}",
                "\u{6771}\u{4eac}",
                "\u{4eac}",
                "\u{4eac}\u{90fd}",
                "\u{90fd}"
            ]
        );
        assert_eq!(
            analyse("iPhone\u{624b}\u{673a}15"),
            ["iphon", "\u{624b}", "\u{624b}\u{673a}", "\u{673a}", "15"]
        );
        assert_eq!(analyse("\u{732b}"), ["\u{732b}"]);
        // Thai: a vowel sign and a tone mark belong to their consonant.
        assert_eq!(
            analyse("\u{e17}\u{e35}\u{e48}\u{e19}"),
            ["\u{e17}\u{e35}\u{e48}", "\u{e17}\u{e35}\u{e48}\u{e19}", "\u{e19}"]
        );
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
            "\u{e35}\u{e48}\u{301}",
            "\u{4eac}\u{301}a\u{301}\u{4eac}",
        ] {
            let _ = analyse(text);
        }
    }
}
