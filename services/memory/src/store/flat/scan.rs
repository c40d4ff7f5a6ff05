//! The stages of the funnel that need no more than the index.

use simsimd::SpatialSimilarity as _;

use super::super::code::{BLOCK, Code};
use super::file::HEAD;
use super::row_size;

/// Vectors up to which int8 alone is fast enough.
const FEW: usize = 8192;
/// Of the vectors that the signs rank, one in so many goes on to int8: a rank by signs is coarse.
const SHARE: usize = 32;
/// Vectors that go on to int8, at least.
const KEPT: usize = 2000;
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
        let bytes = &self.bytes[start..start + self.blocks * 4];
        bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// The int8 values of a row.
    fn values(&self, slot: usize) -> &'a [i8] {
        let start = slot * self.size + HEAD + self.blocks * 4;
        bytemuck::cast_slice(&self.bytes[start..start + self.blocks * BLOCK])
    }

    /// The best of some slots by the inner product of the int8 prefixes, best first; equal ones in the order of slots.
    pub fn best(&self, query: &Code, slots: &[u32], limit: usize) -> Vec<(u32, f32)> {
        let prefix = self.blocks * BLOCK;
        let wanted: &[i8] = bytemuck::cast_slice(&query.high()[..prefix]);
        let factors: Vec<f32> = query.scales().take(self.blocks).map(|scale| scale * 256.0).collect();
        let score = |slot: u32| {
            let (values, scales) = (self.values(slot as usize), self.scales(slot as usize));
            let blocks = values.chunks_exact(BLOCK).zip(wanted.chunks_exact(BLOCK));
            let parts = blocks.zip(scales.zip(&factors)).map(|((a, b), (scale, factor))| {
                let dot = i8::dot(a, b).unwrap_or(0.0);
                dot as f32 * scale * factor
            });
            parts.sum::<f32>()
        };
        let mut scored: Vec<(u32, f32)> = slots.iter().map(|slot| (*slot, score(*slot))).collect();
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
        let scales = self.scales(slot).map(|scale| scale * 16.0);
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
                let scale = f64::from(scale) * 16.0;
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
    pub fn nearest(&self, query: &Code, slots: Vec<u32>, limit: usize) -> Vec<u32> {
        let keep = (slots.len() / SHARE).max(KEPT).max(4 * limit);
        if slots.len() <= FEW || slots.len() <= keep {
            return slots;
        }
        let prefix = self.words * BLOCK;
        let mut wanted = vec![0; self.words];
        let values: &[i8] = bytemuck::cast_slice(&query.high()[..prefix]);
        signs(
            values,
            query.scales().map(|scale| scale * 16.0),
            &self.centre,
            &mut wanted,
        );
        let mut distances = vec![0u16; slots.len()];
        distances_to(&wanted, &self.bits, &slots, &mut distances);
        // A histogram of distances, of which there are few, tells where to cut without sorting.
        let mut counts = vec![0usize; prefix + 1];
        distances
            .iter()
            .for_each(|distance| counts[usize::from(*distance)] += 1);
        let mut total = 0;
        let cut = counts.iter().position(|count| {
            total += count;
            total >= keep
        });
        let cut = cut.unwrap_or(prefix);
        let near = slots
            .iter()
            .zip(&distances)
            .filter(|(_, distance)| usize::from(**distance) <= cut);
        near.map(|(slot, _)| *slot).collect()
    }
}

/// Hamming distances, with the processor's own bit count where it has one.
fn distances_to(wanted: &[u64], bits: &[u64], slots: &[u32], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("popcnt") {
        // SAFETY: the processor has the instruction, as was just asked.
        return unsafe { distances_popcnt(wanted, bits, slots, out) };
    }
    distances_plain(wanted, bits, slots, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "popcnt")]
fn distances_popcnt(wanted: &[u64], bits: &[u64], slots: &[u32], out: &mut [u16]) {
    distances_plain(wanted, bits, slots, out);
}

#[inline(always)]
fn distances_plain(wanted: &[u64], bits: &[u64], slots: &[u32], out: &mut [u16]) {
    // A known length lets the compiler unroll; other prefixes take the general way.
    if let Ok(wanted) = <&[u64; 4]>::try_from(wanted) {
        for (slot, out) in slots.iter().zip(out) {
            let start = *slot as usize * 4;
            let row = &bits[start..start + 4];
            let ones = (row[0] ^ wanted[0]).count_ones()
                + (row[1] ^ wanted[1]).count_ones()
                + (row[2] ^ wanted[2]).count_ones()
                + (row[3] ^ wanted[3]).count_ones();
            *out = ones as u16;
        }
        return;
    }
    let words = wanted.len();
    for (slot, out) in slots.iter().zip(out) {
        let start = *slot as usize * words;
        let row = &bits[start..start + words];
        *out = row.iter().zip(wanted).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>() as u16;
    }
}
