//! The stages of the funnel that need no more than the index.

use rayon::prelude::*;
use simsimd::SpatialSimilarity as _;

use super::super::code::{BLOCK, Code, SCALE, STEP, scales};
use super::file::HEAD;
use super::row_size;

/// Vectors up to which int8 alone is fast enough.
const FEW: usize = 8192;
/// Of the vectors that the signs rank, one in so many goes on to int8: a rank by signs is coarse.
const SHARE: usize = 32;
/// Vectors that go on to int8, at least.
const KEPT: usize = 2000;
/// Vectors from which on threads share the work of one search.
const PARALLEL: usize = 1 << 18;
/// Vectors that a thread takes at a time.
const CHUNK: usize = 1 << 15;
/// Vectors that the centre is the mean of, at most.
const SAMPLE: usize = 8192;

/// The rows of the file.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    bytes: &'a [u8],
    size: usize,
    blocks: usize,
}

impl<'a> Rows<'a> {
    /// Rows with a prefix of so many dimensions.
    pub fn new(bytes: &'a [u8], prefix: usize) -> Self {
        Self {
            bytes,
            size: row_size(prefix),
            blocks: prefix / BLOCK,
        }
    }

    /// The scales of a row's blocks.
    fn scales(&self, slot: usize) -> impl Iterator<Item = f32> + 'a {
        let start = slot * self.size + HEAD;
        scales(&self.bytes[start..start + self.blocks * SCALE])
    }

    /// The int8 values of a row.
    fn values(&self, slot: usize) -> &'a [i8] {
        let start = slot * self.size + HEAD + self.blocks * SCALE;
        bytemuck::cast_slice(&self.bytes[start..start + self.blocks * BLOCK])
    }

    /// The best of some slots by the inner product of the int8 prefixes, best first; equal ones in the order of slots.
    pub fn best(&self, query: &Code, slots: &[u32], limit: usize) -> Vec<(u32, f32)> {
        let prefix = self.blocks * BLOCK;
        let wanted: &[i8] = bytemuck::cast_slice(&query.high()[..prefix]);
        let factors: Vec<f32> = query
            .scales()
            .take(self.blocks)
            .map(|scale| scale * f32::from(STEP * STEP))
            .collect();
        let score = |slot: u32| {
            let (values, scales) = (self.values(slot as usize), self.scales(slot as usize));
            let blocks = values.chunks_exact(BLOCK).zip(wanted.chunks_exact(BLOCK));
            let parts = blocks.zip(scales.zip(&factors)).map(|((a, b), (scale, factor))| {
                let dot = i8::dot(a, b).unwrap_or(0.0);
                dot as f32 * scale * factor
            });
            parts.sum::<f32>()
        };
        let mut scored: Vec<(u32, f32)> = match slots.len() * SHARE < PARALLEL {
            true => slots.iter().map(|slot| (*slot, score(*slot))).collect(),
            false => slots.par_iter().map(|slot| (*slot, score(*slot))).collect(),
        };
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if scored.len() > limit {
            scored.select_nth_unstable_by(limit, order);
            scored.truncate(limit);
        }
        scored.sort_unstable_by(order);
        scored
    }

    /// The signs of a row around a centre.
    fn signs(&self, slot: usize, centre: &[f32], out: &mut [u64]) {
        let scales = self.scales(slot).map(|scale| scale * f32::from(STEP));
        signs(self.values(slot), scales, centre, out);
    }
}

/// One bit a value: above the centre or not.
fn signs(values: &[i8], scales: impl Iterator<Item = f32>, centre: &[f32], out: &mut [u64]) {
    let blocks = values.chunks_exact(BLOCK).zip(centre.chunks_exact(BLOCK));
    for ((word, (values, centre)), scale) in out.iter_mut().zip(blocks).zip(scales) {
        let bits = values.iter().zip(centre).enumerate();
        *word = bits.fold(0, |word, (at, (value, centre))| {
            word | (u64::from(f32::from(*value) * scale > *centre) << at)
        });
    }
}

/// The signs of all rows: 1 bit a dimension, made from the rows and never stored.
#[derive(Debug)]
pub struct Signs {
    /// Words of 64 dimensions a row.
    words: usize,
    bits: Vec<u64>,
    /// The mean of the vectors. Around 0, a direction that all vectors share would tell nothing apart.
    centre: Vec<f32>,
    /// Rows when the centre was taken.
    taken: usize,
}

impl Signs {
    /// Of rows with a prefix of so many dimensions; there are none yet.
    pub fn new(prefix: usize) -> Self {
        Self {
            words: prefix / BLOCK,
            bits: Vec::new(),
            centre: vec![0.0; prefix],
            taken: 0,
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
            let blocks = rows.values(slot).chunks_exact(BLOCK).zip(rows.scales(slot));
            for ((values, scale), sums) in blocks.zip(sums.chunks_exact_mut(BLOCK)) {
                let scale = f64::from(scale) * f64::from(STEP);
                values
                    .iter()
                    .zip(sums)
                    .for_each(|(value, sum)| *sum += f64::from(*value) * scale);
            }
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
    pub fn nearest(&self, query: &Code, slots: Slots<'_>, limit: usize) -> Vec<u32> {
        let keep = |count: usize| (count / SHARE).max(KEPT).max(4 * limit);
        let few = |count: usize| count <= FEW.max(keep(count));
        match slots {
            Slots::These(slots) if few(slots.len()) => slots,
            Slots::These(slots) => {
                let wanted = self.wanted(query);
                let words = self.words;
                let rows = slots
                    .iter()
                    .map(|slot| &self.bits[*slot as usize * words..(*slot as usize + 1) * words]);
                let distances: Vec<u16> = rows.map(|row| distance(row, &wanted)).collect();
                let near = slots.iter().copied().zip(distances.iter().copied());
                let (cut, _) = cut(near.clone(), self.words * BLOCK, keep);
                near.filter(|(_, distance)| *distance <= cut)
                    .map(|(slot, _)| slot)
                    .collect()
            }
            Slots::All { count, shown } => {
                if few(count) {
                    return (0..count)
                        .filter(|slot| shown(*slot))
                        .filter_map(|slot| u32::try_from(slot).ok())
                        .collect();
                }
                let wanted = self.wanted(query);
                let mut distances = vec![0u16; count];
                let bits = &self.bits[..count * self.words];
                match count < PARALLEL {
                    true => distances_to(&wanted, bits, &mut distances),
                    false => {
                        let parts = bits.par_chunks(CHUNK * self.words).zip(distances.par_chunks_mut(CHUNK));
                        parts.for_each(|(bits, distances)| distances_to(&wanted, bits, distances));
                    }
                }
                let all = distances.iter().copied().enumerate();
                let (cut, found) = cut(all.clone().filter(|(slot, _)| shown(*slot)), self.words * BLOCK, keep);
                let mut near = Vec::with_capacity(found);
                near.extend(
                    all.filter(|(slot, distance)| *distance <= cut && shown(*slot))
                        .filter_map(|(slot, _)| u32::try_from(slot).ok()),
                );
                near
            }
        }
    }

    /// The signs of a query.
    fn wanted(&self, query: &Code) -> Vec<u64> {
        let mut wanted = vec![0; self.words];
        let values: &[i8] = bytemuck::cast_slice(&query.high()[..self.words * BLOCK]);
        signs(
            values,
            query.scales().map(|scale| scale * f32::from(STEP)),
            &self.centre,
            &mut wanted,
        );
        wanted
    }
}

/// What a search may find, as slots.
pub enum Slots<'a> {
    /// These.
    These(Vec<u32>),
    /// Of the first `count`, those that are shown.
    All {
        /// Slots in all.
        count: usize,
        /// Which of them may be found.
        shown: &'a dyn Fn(usize) -> bool,
    },
}

/// The distance up to which slots go on, so that at least as many do as `keep` says for their number, and how many do. A
/// histogram of distances, of which there are few, tells where to cut without sorting.
fn cut<S>(near: impl Iterator<Item = (S, u16)>, farthest: usize, keep: impl Fn(usize) -> usize) -> (u16, usize) {
    let mut counts = vec![0usize; farthest + 1];
    near.for_each(|(_, distance)| counts[usize::from(distance)] += 1);
    let wanted = keep(counts.iter().sum());
    let mut total = 0;
    let cut = counts.iter().position(|count| {
        total += count;
        total >= wanted
    });
    (cut.and_then(|cut| u16::try_from(cut).ok()).unwrap_or(u16::MAX), total)
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
    // A known length lets the compiler unroll; other prefixes take the general way.
    if let Ok(wanted) = <&[u64; 4]>::try_from(wanted) {
        let (rows, _) = bits.as_chunks::<4>();
        for (row, out) in rows.iter().zip(out) {
            *out = distance(row, wanted);
        }
        return;
    }
    for (row, out) in bits.chunks_exact(wanted.len()).zip(out) {
        *out = distance(row, wanted);
    }
}
