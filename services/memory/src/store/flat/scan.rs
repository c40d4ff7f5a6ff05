//! The stages of the funnel that need no more than the index.

use std::sync::{Condvar, Mutex, PoisonError, mpsc};

use rayon::prelude::*;

use super::super::code::{BLOCK, prefetch};
use super::super::locks::lock;
use super::coarse::{Turned, Wanted, unpacked};
use super::file::HEAD;
use super::row_size;

/// Vectors up to which the rows alone are fast enough.
const FEW: usize = 16_384;
/// Of the vectors that the signs rank, one in so many goes on to its row: a rank by signs is coarse.
const SHARE: usize = 64;
/// Vectors that go on to their rows, at least.
const KEPT: usize = 1600;
/// Signs a vector from which on that is enough: of fewer, more vectors go on.
const SIGNS: usize = 256;
/// Words that are compared at once: a row has a multiple of them.
const WORDS: usize = 4;
/// Vectors from which on threads share the work of one search.
const PARALLEL: usize = 1 << 18;
/// Rows that are asked for before they are read.
const AHEAD: usize = 6;
/// Vectors that a thread takes at a time.
const CHUNK: usize = 1 << 15;
/// Vectors whose signs stay in a processor's cache while several searches go over them.
const SHARED: usize = 1 << 12;
/// One in so many distances tells which ones are near.
const SAMPLED: usize = 7;
/// Distances that are looked at together.
const TOGETHER: usize = 32;
/// Buffers of distances that are kept for the next searches.
const SPARE: usize = 16;
/// Vectors that the centre is the mean of, at most.
const SAMPLE: usize = 8192;

/// The rows of the file.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    bytes: &'a [u8],
    size: usize,
}

impl<'a> Rows<'a> {
    /// Rows with a prefix of so many dimensions.
    pub fn new(bytes: &'a [u8], prefix: usize) -> Self {
        let size = row_size(prefix);
        Self { bytes, size }
    }

    /// What a row keeps of its vector.
    fn row(&self, slot: usize) -> &'a [u8] {
        &self.bytes[slot * self.size + HEAD..(slot + 1) * self.size]
    }

    /// The best of some slots by the inner product of the prefixes, best first; equal ones in the order of slots.
    pub fn best(&self, query: &Turned, slots: &[u32], limit: usize) -> Vec<(u32, f32)> {
        let wanted = Wanted::new(query);
        let score = |part: &[u32]| self.scores(part, &wanted);
        let mut scored: Vec<(u32, f32)> = match slots.len() < CHUNK {
            true => score(slots),
            false => slots.par_chunks(CHUNK / SHARE).flat_map_iter(score).collect(),
        };
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if scored.len() > limit {
            scored.select_nth_unstable_by(limit, order);
            scored.truncate(limit);
        }
        scored.sort_unstable_by(order);
        scored
    }

    /// Inner products of the prefixes of some slots with a query's.
    fn scores(&self, slots: &[u32], wanted: &Wanted) -> Vec<(u32, f32)> {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the instructions, as was just asked.
            return unsafe { self.scores_avx2(slots, wanted) };
        }
        self.each(slots, |row| wanted.product(row))
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn scores_avx2(&self, slots: &[u32], wanted: &Wanted) -> Vec<(u32, f32)> {
        self.each(slots, |row| wanted.product_avx2(row))
    }

    #[inline(always)]
    fn each(&self, slots: &[u32], product: impl Fn(&[u8]) -> f32) -> Vec<(u32, f32)> {
        let mut scored = Vec::with_capacity(slots.len());
        for (place, slot) in slots.iter().enumerate() {
            if let Some(ahead) = slots.get(place + AHEAD) {
                // Rows lie far apart, and waiting for memory costs more than the arithmetic.
                prefetch(self.row(*ahead as usize));
            }
            scored.push((*slot, product(self.row(*slot as usize))));
        }
        scored
    }

    /// The signs of a row around a centre.
    fn signs(&self, slot: usize, centre: &[f32], out: &mut [u64]) {
        let blocks = unpacked(self.row(slot)).zip(centre.as_chunks::<BLOCK>().0);
        for (word, (values, centre)) in out.iter_mut().zip(blocks) {
            *word = signs(&values, centre);
        }
    }
}

/// One bit a value: above the centre or not.
fn signs(values: &[f32; BLOCK], centre: &[f32; BLOCK]) -> u64 {
    let bits = values.iter().zip(centre).enumerate();
    bits.fold(0, |word, (at, (value, centre))| {
        word | (u64::from(value > centre) << at)
    })
}

/// A search that waits for a pass: its signs, and where its distances go.
type Waiting = (Vec<u64>, mpsc::Sender<Vec<u16>>);

/// The signs of all rows: 1 bit a dimension, made from the rows and never stored.
#[derive(Debug)]
pub struct Signs {
    /// Words of 64 dimensions a row, the last ones empty.
    words: usize,
    bits: Vec<u64>,
    /// The mean of the vectors. Around 0, a direction that all vectors share would tell nothing apart.
    centre: Vec<f32>,
    /// Rows when the centre was taken.
    taken: usize,
    /// Buffers of distances.
    spare: Mutex<Vec<Vec<u16>>>,
    /// Searches that wait for a pass.
    waiting: Mutex<Vec<Waiting>>,
    /// There is a pass.
    busy: Mutex<bool>,
    /// It is over.
    over: Condvar,
}

/// A pass that ends whatever becomes of it.
struct Pass<'a>(&'a Signs);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        *lock(&self.0.busy) = false;
        self.0.over.notify_all();
    }
}

impl Signs {
    /// Of rows with a prefix of so many dimensions; there are none yet.
    pub fn new(prefix: usize) -> Self {
        Self {
            words: (prefix / BLOCK).next_multiple_of(WORDS),
            bits: Vec::new(),
            centre: vec![0.0; prefix],
            taken: 0,
            spare: Mutex::default(),
            waiting: Mutex::default(),
            busy: Mutex::default(),
            over: Condvar::new(),
        }
    }

    /// Takes the centre anew and makes all signs again.
    pub fn refresh(&mut self, rows: &Rows<'_>, count: usize) {
        self.taken = count;
        let step = count.div_ceil(SAMPLE).max(1);
        let mut sums = vec![0f64; self.centre.len()];
        let mut seen = 0u32;
        for slot in (0..count).step_by(step) {
            seen += 1;
            let values = unpacked(rows.row(slot)).flatten();
            sums.iter_mut()
                .zip(values)
                .for_each(|(sum, value)| *sum += f64::from(value));
        }
        let mean = |sum: f64| (sum / f64::from(seen.max(1))) as f32;
        self.centre = sums.into_iter().map(mean).collect();
        self.bits = vec![0; count * self.words];
        for (slot, out) in self.bits.chunks_exact_mut(self.words).enumerate() {
            rows.signs(slot, &self.centre, out);
        }
    }

    /// Makes the signs of one row, of `count` in all; when there are twice as many as the centre knows, of all of them.
    pub fn put(&mut self, rows: &Rows<'_>, slot: usize, count: usize) {
        if count >= FEW && count >= 2 * self.taken {
            return self.refresh(rows, count);
        }
        self.bits.resize(count * self.words, 0);
        let out = &mut self.bits[slot * self.words..(slot + 1) * self.words];
        rows.signs(slot, &self.centre, out);
    }

    /// Of many slots, those nearest to the query by their signs; few ones all go on. At least `limit` remain.
    pub fn nearest(&self, query: &Turned, slots: Vec<u32>, limit: usize) -> Vec<u32> {
        let keep = self.keep(slots.len(), limit);
        if slots.len() <= keep.max(FEW) {
            return slots;
        }
        let wanted = self.wanted(query);
        let rows = slots.iter().map(|slot| *slot as usize * self.words);
        let rows = rows.map(|start| &self.bits[start..start + self.words]);
        let distances: Vec<u16> = rows.map(|row| distance(row, &wanted)).collect();
        let counts = histogram(&distances, &|_| true, self.words * BLOCK);
        let cut = cut(&counts, keep);
        let near = slots
            .into_iter()
            .zip(distances)
            .filter(|(_, distance)| *distance <= cut);
        near.map(|(slot, _)| slot).collect()
    }

    /// The same out of the first `count` slots, those that are shown.
    pub fn nearest_of_all(
        &self,
        query: &Turned,
        count: usize,
        shown: impl Fn(usize) -> bool,
        limit: usize,
    ) -> Vec<u32> {
        let keep = self.keep(count, limit);
        if count <= keep.max(FEW) {
            return (0..count).filter(|slot| shown(*slot)).filter_map(number).collect();
        }
        let wanted = self.wanted(query);
        let distances = self.distances(wanted, count);
        let farthest = self.words * BLOCK;
        // A part of them tells nearly as well where to cut, with some more for the chance that it does not.
        let sampled = keep / SAMPLED;
        let sampled = sampled + 3 * sampled.isqrt();
        let mut near = nearer(&distances, cut(&sample(&distances, &shown, farthest), sampled), &shown);
        if near.len() < keep {
            near = nearer(&distances, cut(&histogram(&distances, &shown, farthest), keep), &shown);
        }
        let mut spare = lock(&self.spare);
        if count < PARALLEL && spare.len() < SPARE {
            spare.push(distances);
        }
        near
    }

    /// The distances of the first `count` slots. Of few, each search makes its own pass; a pass over many uses all threads, and
    /// serves all searches that wait when it begins: the signs come from memory once for all of them.
    fn distances(&self, wanted: Vec<u64>, count: usize) -> Vec<u16> {
        let bits = &self.bits[..count * self.words];
        if count < PARALLEL {
            let mut distances = lock(&self.spare).pop().unwrap_or_default();
            distances.resize(count, 0);
            distances_to(&wanted, bits, &mut distances);
            return distances;
        }
        let (answer, answered) = mpsc::channel();
        lock(&self.waiting).push((wanted, answer));
        let mut busy = lock(&self.busy);
        loop {
            // The pass before may have served this one, too.
            if let Ok(distances) = answered.try_recv() {
                return distances;
            }
            if !*busy {
                *busy = true;
                break;
            }
            busy = self.over.wait(busy).unwrap_or_else(PoisonError::into_inner);
        }
        drop(busy);
        let pass = Pass(self);
        let searches = std::mem::take(&mut *lock(&self.waiting));
        let mut all = vec![vec![0u16; count]; searches.len()];
        let mut chunks: Vec<Vec<&mut [u16]>> = (0..count.div_ceil(SHARED)).map(|_| Vec::new()).collect();
        for distances in &mut all {
            let parts = distances.chunks_mut(SHARED).zip(&mut chunks);
            parts.for_each(|(part, chunk)| chunk.push(part));
        }
        let parts = bits.par_chunks(SHARED * self.words).zip(chunks);
        parts.for_each(|(bits, outs)| {
            let searches = searches.iter().zip(outs);
            searches.for_each(|((wanted, _), out)| distances_to(wanted, bits, out));
        });
        for ((_, answer), distances) in searches.into_iter().zip(all) {
            // Nobody waits only when the search was given up.
            let _ = answer.send(distances);
        }
        drop(pass);
        answered.try_recv().unwrap_or_default()
    }

    /// How many of so many go on.
    fn keep(&self, count: usize, limit: usize) -> usize {
        let signs = self.centre.len();
        ((count / SHARE).max(KEPT) * SIGNS.max(signs) / signs).max(4 * limit)
    }

    /// The signs of a query.
    fn wanted(&self, query: &Turned) -> Vec<u64> {
        let blocks = query.values().as_chunks::<BLOCK>().0.iter();
        let words = blocks.zip(self.centre.as_chunks::<BLOCK>().0);
        let mut wanted: Vec<u64> = words.map(|(values, centre)| signs(values, centre)).collect();
        wanted.resize(self.words, 0);
        wanted
    }
}

fn number(slot: usize) -> Option<u32> {
    u32::try_from(slot).ok()
}

/// The slots that are shown and not farther than `cut`.
fn nearer(distances: &[u16], cut: u16, shown: &impl Fn(usize) -> bool) -> Vec<u32> {
    let mut near = Vec::with_capacity(2 * KEPT);
    for chunk in within(distances, cut) {
        let first = chunk * TOGETHER;
        let part = distances[first..].iter().take(TOGETHER).zip(first..);
        let found = part.filter(|(distance, slot)| **distance <= cut && shown(*slot));
        near.extend(found.filter_map(|(_, slot)| number(slot)));
    }
    near
}

/// The chunks with a distance up to `cut`. Most have none, which a chunk as a whole tells quicker than each of its own.
fn within(distances: &[u16], cut: u16) -> Vec<usize> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has the instructions, as was just asked.
        return unsafe { within_avx2(distances, cut) };
    }
    within_plain(distances, cut)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn within_avx2(distances: &[u16], cut: u16) -> Vec<usize> {
    within_plain(distances, cut)
}

#[inline(always)]
fn within_plain(distances: &[u16], cut: u16) -> Vec<usize> {
    let mut chunks = Vec::with_capacity(2 * KEPT);
    let (whole, rest) = distances.as_chunks::<TOGETHER>();
    for (number, chunk) in whole.iter().enumerate() {
        if chunk.iter().fold(u16::MAX, |least, distance| least.min(*distance)) <= cut {
            chunks.push(number);
        }
    }
    if !rest.is_empty() {
        chunks.push(whole.len());
    }
    chunks
}

/// How many of a part of those that are shown have each distance.
fn sample(distances: &[u16], shown: &impl Fn(usize) -> bool, farthest: usize) -> Vec<u32> {
    let mut counts = vec![0; farthest + 1];
    for (part, number) in distances.chunks_exact(SAMPLED).zip(0..) {
        // Another one of each part, lest all be of one scope where scopes take turns.
        let place = number % SAMPLED;
        counts[usize::from(part[place])] += u32::from(shown(number * SAMPLED + place));
    }
    counts
}

/// How many of those that are shown have each distance.
fn histogram(distances: &[u16], shown: &impl Fn(usize) -> bool, farthest: usize) -> Vec<u32> {
    // Neighbours count in tables of their own: counting one distance twice in a row would wait for the first count.
    let mut tables = vec![[0u32; 4]; farthest + 1];
    for (four, first) in distances.chunks(4).zip((0..).step_by(4)) {
        for (lane, distance) in four.iter().enumerate() {
            tables[usize::from(*distance)][lane] += u32::from(shown(first + lane));
        }
    }
    tables.iter().map(|counts| counts.iter().sum()).collect()
}

/// The distance up to which slots go on, so that at least `keep` do: of distances there are few, so that nothing need be
/// sorted.
fn cut(counts: &[u32], keep: usize) -> u16 {
    let mut total = 0;
    let cut = counts.iter().position(|count| {
        total += *count as usize;
        total >= keep
    });
    cut.and_then(|cut| u16::try_from(cut).ok()).unwrap_or(u16::MAX)
}

/// Bits that differ.
#[inline(always)]
fn distance(row: &[u64], wanted: &[u64]) -> u16 {
    row.iter().zip(wanted).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>() as u16
}

/// Hamming distances of rows that lie side by side, by the widest bit count that the processor has.
fn distances_to(wanted: &[u64], bits: &[u64], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected;
        if is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vpopcntdq") {
            // SAFETY: the processor has the instructions, as was just asked.
            return unsafe { distances_avx512(wanted, bits, out) };
        }
        if is_x86_feature_detected!("popcnt") {
            // SAFETY: as above.
            return unsafe { distances_popcnt(wanted, bits, out) };
        }
    }
    distances_plain(wanted, bits, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512vpopcntdq")]
fn distances_avx512(wanted: &[u64], bits: &[u64], out: &mut [u16]) {
    distances_plain(wanted, bits, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "popcnt")]
fn distances_popcnt(wanted: &[u64], bits: &[u64], out: &mut [u16]) {
    distances_plain(wanted, bits, out);
}

#[inline(always)]
fn distances_plain(wanted: &[u64], bits: &[u64], out: &mut [u16]) {
    // A known length lets the compiler unroll.
    const TWICE: usize = 2 * WORDS;
    match wanted.len() {
        WORDS => distances_of::<WORDS>(wanted, bits, out),
        TWICE => distances_of::<TWICE>(wanted, bits, out),
        _ => {
            for (row, out) in bits.chunks_exact(wanted.len()).zip(out) {
                *out = distance(row, wanted);
            }
        }
    }
}

#[inline(always)]
fn distances_of<const N: usize>(wanted: &[u64], bits: &[u64], out: &mut [u16]) {
    if let Ok(wanted) = <&[u64; N]>::try_from(wanted) {
        for (row, out) in bits.as_chunks::<N>().0.iter().zip(out) {
            *out = distance(row, wanted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn searches_that_share_a_pass_get_what_each_would_get_alone() {
        let mut signs = Signs::new(BLOCK);
        let word = |number: usize| (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let count = PARALLEL + 77;
        signs.bits = (0..count * WORDS).map(word).collect();
        std::thread::scope(|scope| {
            for caller in 0..16 {
                let signs = &signs;
                scope.spawn(move || {
                    for round in 0..5 {
                        let wanted: Vec<u64> = (0..WORDS).map(|at| word(caller * 31 + round + at)).collect();
                        let found = signs.distances(wanted.clone(), count);
                        let rows = signs.bits.chunks_exact(WORDS);
                        let alone: Vec<u16> = rows.map(|row| distance(row, &wanted)).collect();
                        assert!(found == alone, "caller {caller}, round {round}");
                    }
                });
            }
        });
        assert!(signs.waiting.lock().unwrap().is_empty());
    }

    #[test]
    fn what_the_processor_does_at_once_is_what_is_done_one_by_one() {
        let word = |number: usize| (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The lengths that are unrolled, and another.
        for words in [4, 8, 12] {
            let wanted: Vec<u64> = (0..words).map(|number| word(number + 1_000)).collect();
            let bits: Vec<u64> = (0..words * 37).map(word).collect();
            let mut at_once = vec![0; 37];
            distances_to(&wanted, &bits, &mut at_once);
            let differ = |row: &[u64]| {
                let bits = row
                    .iter()
                    .zip(&wanted)
                    .flat_map(|(a, b)| (0..64).filter(move |bit| (a ^ b) >> bit & 1 == 1));
                bits.count() as u16
            };
            let one_by_one: Vec<u16> = bits.chunks_exact(words).map(differ).collect();
            assert_eq!(at_once, one_by_one, "{words} words");
        }
    }
}
