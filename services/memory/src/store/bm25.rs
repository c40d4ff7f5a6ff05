//! BM25 (Robertson and Zaragoza 2009), as far as it does not depend on where the texts are.

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
    let taken = counted.into_iter().enumerate().take_while(|(place, (count, _))| {
        documents += count;
        *place == 0 || documents <= DOCUMENTS
    });
    taken.map(|(_, term)| term).collect()
}
