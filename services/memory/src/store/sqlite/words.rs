//! The words of a tenant's memories in memory: an inverted index that ranks as the lexical tables do.
//!
//! A posting is the distance to the document before and, when it is not 1, how often the term is there, each in as few bytes as
//! it needs (LEB128). Documents are only ever added at the end: one that changes is added anew, and what it was before is
//! skipped until there is enough of that to be cleared away.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::domain::{Key, ScopeKey};
use crate::store::bm25::{B, K1, RANKED, rarity};
use crate::store::locks::lock;

/// Postings of one search, at most, where it looks at many documents: reading one costs a few nanoseconds.
const POSTINGS: usize = 1 << 14;
/// Postings of one search, at most, wherever it looks: beyond, the lexical tables are quicker.
const READ: usize = 1 << 17;
/// Sums that are kept for the next searches.
const SPARE: usize = 4;
/// Documents that are there no more from which on clearing them away is worth while.
const CLEARED: usize = 1 << 10;
/// The scope of a document that is there no more.
const GONE: u32 = u32::MAX;
/// Bytes that a table takes for an entry beside its contents, about.
const ENTRY: usize = 48;

/// An inverted index of one tenant.
#[derive(Debug, Default)]
pub struct Words {
    terms: HashMap<Box<str>, Postings>,
    documents: Vec<Document>,
    by_key: FxHashMap<Key, u32>,
    by_scope: FxHashMap<ScopeKey, u32>,
    /// By the place of a scope, how many documents it has.
    documents_in: Vec<usize>,
    /// Terms in all documents that are there.
    length: usize,
    /// About how many bytes the postings and terms take.
    bytes: usize,
    /// What the last searches have used.
    spare: Mutex<Vec<Sums>>,
}

/// What a search adds up.
#[derive(Debug, Default)]
struct Sums {
    /// By document, all zero between searches.
    sums: Vec<f64>,
    /// Documents whose sum is not zero.
    found: Vec<u32>,
}

/// The best of many, of which most are not kept for long.
struct Best {
    limit: usize,
    kept: Vec<(Key, f64)>,
    /// Nothing below is among the best.
    floor: f64,
}

impl Best {
    fn of(limit: usize) -> Self {
        Self {
            limit,
            kept: Vec::new(),
            floor: f64::NEG_INFINITY,
        }
    }

    fn order(a: &(Key, f64), b: &(Key, f64)) -> std::cmp::Ordering {
        b.1.total_cmp(&a.1).then(b.0.cmp(&a.0))
    }

    fn push(&mut self, key: Key, score: f64) {
        if score < self.floor {
            return;
        }
        self.kept.push((key, score));
        if self.kept.len() > 2 * self.limit {
            let (_, last, _) = self.kept.select_nth_unstable_by(self.limit, Self::order);
            self.floor = last.1;
            self.kept.truncate(self.limit);
        }
    }

    fn sorted(mut self) -> Vec<(Key, f64)> {
        self.kept.sort_unstable_by(Self::order);
        self.kept.truncate(self.limit);
        self.kept
    }
}

#[derive(Clone, Copy, Debug)]
struct Document {
    key: Key,
    /// The place of its scope, or [`GONE`].
    scope: u32,
    /// Its terms.
    length: u32,
}

/// Where a term is.
#[derive(Debug, Default)]
struct Postings {
    bytes: Vec<u8>,
    last: u32,
    count: u32,
}

impl Postings {
    /// Adds a document, which comes after all others.
    fn push(&mut self, document: u32, times: u32) {
        let many = u64::from(times > 1);
        put(&mut self.bytes, (u64::from(document - self.last) << 1) | many);
        if times > 1 {
            put(&mut self.bytes, u64::from(times));
        }
        self.last = document;
        self.count += 1;
    }

    /// The documents, each with how often it has the term.
    fn iter(&self) -> impl Iterator<Item = (u32, u32)> {
        let (mut rest, mut document) = (self.bytes.as_slice(), 0u32);
        std::iter::from_fn(move || {
            let step = take(&mut rest)?;
            document += (step >> 1) as u32;
            let times = if step & 1 == 1 { take(&mut rest)? as u32 } else { 1 };
            Some((document, times))
        })
    }
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

#[inline]
fn take(bytes: &mut &[u8]) -> Option<u64> {
    let (mut number, mut shift) = (0, 0);
    loop {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(first & 0x7f) << shift;
        if *first < 0x80 {
            return Some(number);
        }
        shift += 7;
    }
}

impl Words {
    /// Puts a document in, in the place of what it was before.
    pub fn put(&mut self, key: Key, scope: ScopeKey, mut terms: Vec<String>) {
        self.remove(key);
        let Ok(document) = u32::try_from(self.documents.len()) else {
            return;
        };
        let next = u32::try_from(self.documents_in.len()).unwrap_or(GONE);
        let place = *self.by_scope.entry(scope).or_insert(next);
        if place == next {
            self.documents_in.push(0);
        }
        self.documents_in[place as usize] += 1;
        self.documents.push(Document {
            key,
            scope: place,
            length: u32::try_from(terms.len()).unwrap_or(u32::MAX),
        });
        self.by_key.insert(key, document);
        self.length += terms.len();
        terms.sort_unstable();
        for times in terms.chunk_by(|a, b| a == b) {
            let term = times[0].as_str();
            let postings = match self.terms.get_mut(term) {
                Some(postings) => postings,
                None => {
                    self.bytes += term.len() + size_of::<(Box<str>, Postings)>() + ENTRY;
                    self.terms.entry(term.into()).or_default()
                }
            };
            let before = postings.bytes.capacity();
            postings.push(document, u32::try_from(times.len()).unwrap_or(u32::MAX));
            self.bytes += postings.bytes.capacity() - before;
        }
    }

    /// Takes a document out.
    pub fn remove(&mut self, key: Key) {
        let Some(document) = self.by_key.remove(&key) else {
            return;
        };
        let document = &mut self.documents[document as usize];
        self.documents_in[document.scope as usize] -= 1;
        self.length -= document.length as usize;
        document.scope = GONE;
        let gone = self.gone();
        if gone >= CLEARED && gone * 4 > self.documents.len() {
            self.clear_away();
        }
    }

    fn gone(&self) -> usize {
        self.documents.len() - self.by_key.len()
    }

    /// About how many bytes it takes.
    pub fn bytes(&self) -> usize {
        let document = size_of::<Document>() + ENTRY + SPARE * size_of::<f64>();
        self.bytes + self.documents.len() * document
    }

    /// Numbers the documents that are there anew, and forgets the others.
    fn clear_away(&mut self) {
        let mut numbers = vec![GONE; self.documents.len()];
        let mut kept = Vec::with_capacity(self.by_key.len());
        for (document, number) in self.documents.iter().zip(&mut numbers) {
            if document.scope != GONE {
                // There are no more than before.
                *number = kept.len() as u32;
                self.by_key.insert(document.key, *number);
                kept.push(*document);
            }
        }
        self.documents = kept;
        self.bytes = 0;
        self.terms.retain(|term, postings| {
            let mut next = Postings::default();
            for (document, times) in postings.iter() {
                let number = numbers[document as usize];
                if number != GONE {
                    next.push(number, times);
                }
            }
            *postings = next;
            let bytes = term.len() + size_of::<(Box<str>, Postings)>() + ENTRY + postings.bytes.capacity();
            self.bytes += if postings.count > 0 { bytes } else { 0 };
            postings.count > 0
        });
        self.spare().clear();
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Sums>> {
        lock(&self.spare)
    }

    /// In how many documents a term is.
    fn count(&self, postings: &Postings) -> usize {
        if self.gone() == 0 {
            return postings.count as usize;
        }
        let there = |document: u32| self.documents[document as usize].scope != GONE;
        postings.iter().filter(|(document, _)| there(*document)).count()
    }

    /// The best documents of some scopes by BM25 (Robertson and Zaragoza 2009), best first and of equal ones the newest, as the
    /// lexical tables rank them: the mark of its scope counts as a word of a document, and frequencies are those of the whole
    /// tenant. Where it looks at many documents, only as many terms count, rarest first, as bring a bounded number of them.
    /// `None`: there is too much to read.
    pub fn search(
        &self,
        terms: &[String],
        scopes: &[ScopeKey],
        only: Option<&FxHashSet<Key>>,
        limit: usize,
    ) -> Option<Vec<(Key, f64)>> {
        let mut allowed = vec![false; self.documents_in.len()];
        for scope in scopes {
            if let Some(place) = self.by_scope.get(scope) {
                allowed[*place as usize] = true;
            }
        }
        let shown = self.documents_in.iter().zip(&allowed).filter(|(_, allowed)| **allowed);
        let shown: usize = shown.map(|(documents, _)| documents).sum();
        let lists = self.chosen(terms, shown);
        if lists.is_empty() || shown == 0 {
            return Some(Vec::new());
        }
        if lists.iter().map(|postings| postings.count as usize).sum::<usize>() > READ {
            return None;
        }
        let all = self.by_key.len();
        let average = (self.length + all) as f64 / all as f64;
        let Sums { mut sums, mut found } = self.spare().pop().unwrap_or_default();
        sums.resize(self.documents.len(), 0.0);
        for postings in lists {
            let weight = rarity(all as i64, self.count(postings) as i64) * (K1 + 1.0);
            for (number, times) in postings.iter() {
                let document = &self.documents[number as usize];
                // What is gone has no scope.
                if !allowed.get(document.scope as usize).is_some_and(|allowed| *allowed) {
                    continue;
                }
                let sum = &mut sums[number as usize];
                if *sum == 0.0 {
                    found.push(number);
                }
                let (times, length) = (f64::from(times), f64::from(document.length) + 1.0);
                *sum += weight * times / (times + K1 * (1.0 - B + B * length / average));
            }
        }
        let mut best = Best::of(limit);
        for number in found.drain(..) {
            let key = self.documents[number as usize].key;
            let sum = std::mem::take(&mut sums[number as usize]);
            if only.is_none_or(|only| only.contains(&key)) {
                best.push(key, sum);
            }
        }
        let mut spare = self.spare();
        if spare.len() < SPARE {
            spare.push(Sums { sums, found });
        }
        Some(best.sorted())
    }

    /// The terms that are looked for, where so many documents are shown.
    fn chosen(&self, terms: &[String], shown: usize) -> Vec<&Postings> {
        let mut lists: Vec<&Postings> = terms.iter().filter_map(|term| self.terms.get(term.as_str())).collect();
        if shown as i64 <= RANKED {
            return lists;
        }
        lists.sort_by_key(|postings| postings.count);
        let mut read = 0;
        let taken = lists.iter().take_while(|postings| {
            let first = read == 0;
            read += postings.count as usize;
            first || read <= POSTINGS
        });
        let taken = taken.count();
        lists.truncate(taken);
        lists
    }
}
