//! What the index keeps of a vector: 3 bits a value.
//!
//! Each block of 64 values is turned first: some signs change, and a Walsh-Hadamard transform follows. No inner product changes,
//! and what some dimensions have more of than others is spread over their block, so that few bits serve all of its values alike
//! (Ashkboos et al. 2024, §3). Eight levels at equal distances follow. What a level counts for is chosen so that the inner product
//! of a block with its own levels is right, which keeps products with others free of bias (Gao and Long 2024, §3.2). For a stage
//! that passes on more than is finally needed, they tell about as much of dense vectors as 8 bits do; of sparse ones, as feature
//! hashing makes of a few words, a little less.

use super::super::code::{BLOCK, SCALE, scales};

/// The width of a level, in standard deviations; 0.586 has the least error for normal values (Max 1960, table II), and a little
/// more keeps more of the neighbours.
const WIDTH: f32 = 0.65;
/// Levels below 0.
const BELOW: f32 = 4.0;
/// What the lowest level stands for, in steps.
const LOWEST: f32 = -3.5;
/// Bytes of a block's low 2 bits, and of its high ones after them.
const LOW: usize = BLOCK / 4;
/// Bytes of a block.
const PACKED: usize = LOW + BLOCK / 8;
/// The signs that change, one bit a value: any that do not follow the transform's own pattern do.
const SIGNS: u64 = 0x9e37_79b9_7f4a_7c15;
/// The largest magnitude of a value of a query.
const FINE: f32 = 127.0;

/// Bytes of so many values.
pub fn size(values: usize) -> usize {
    values / BLOCK * (SCALE + PACKED)
}

/// A vector whose blocks are turned.
#[derive(Clone, Debug)]
pub struct Turned(Vec<f32>);

impl Turned {
    /// Turns a vector whose length is a multiple of 64.
    pub fn new(mut vector: Vec<f32>) -> Self {
        vector.as_chunks_mut::<BLOCK>().0.iter_mut().for_each(turn);
        Self(vector)
    }

    /// Its values.
    pub fn values(&self) -> &[f32] {
        &self.0
    }

    /// What a row keeps of it: the step of each block, then the levels.
    pub fn pack(&self) -> Vec<u8> {
        let mut steps = Vec::with_capacity(size(self.0.len()));
        let mut values = Vec::with_capacity(size(self.0.len()));
        for block in self.0.as_chunks::<BLOCK>().0 {
            let square = block.iter().map(|x| x * x).sum::<f32>();
            let width = WIDTH * (square / BLOCK as f32).sqrt();
            let inverse = if width > 0.0 { width.recip() } else { 0.0 };
            let levels = block.map(|x| ((x * inverse).floor() + BELOW).clamp(0.0, 7.0) as u8);
            let own: f32 = block.iter().zip(levels).map(|(x, level)| x * value(level)).sum();
            steps.extend(nearest(if own > 0.0 { square / own } else { 0.0 }));
            values.extend(packed(&levels));
        }
        steps.extend(values);
        steps
    }
}

/// What a level stands for, in steps.
fn value(level: u8) -> f32 {
    f32::from(level) + LOWEST
}

/// The nearest bfloat16.
fn nearest(step: f32) -> [u8; SCALE] {
    (((step.to_bits() + 0x8000) >> 16) as u16).to_le_bytes()
}

/// A rotation of 64 dimensions.
fn turn(block: &mut [f32; BLOCK]) {
    for (at, value) in block.iter_mut().enumerate() {
        if SIGNS >> at & 1 == 1 {
            *value = -*value;
        }
    }
    for half in (0..6).map(|step| 1 << step) {
        for pair in block.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
    }
    // As long as before.
    block.iter_mut().for_each(|value| *value *= 0.125);
}

/// Value i, i + 16, i + 32 and i + 48 share a byte of low bits, so that all of one shift lie side by side; the high bits follow
/// in order.
fn packed(levels: &[u8; BLOCK]) -> [u8; PACKED] {
    let mut bytes = [0; PACKED];
    for (at, level) in levels.iter().enumerate() {
        bytes[at % LOW] |= (level & 3) << (2 * (at / LOW));
        bytes[LOW + at / 8] |= (level >> 2) << (at % 8);
    }
    bytes
}

fn levels(bytes: &[u8; PACKED]) -> [u8; BLOCK] {
    std::array::from_fn(|at| {
        let low = bytes[at % LOW] >> (2 * (at / LOW)) & 3;
        low | (bytes[LOW + at / 8] >> (at % 8) & 1) << 2
    })
}

/// The blocks of a row, with their steps.
fn blocks(row: &[u8]) -> impl Iterator<Item = (&[u8; PACKED], f32)> {
    let (steps, values) = row.split_at(row.len() / (SCALE + PACKED) * SCALE);
    values.as_chunks::<PACKED>().0.iter().zip(scales(steps))
}

/// The values of a row's blocks.
pub fn unpacked(row: &[u8]) -> impl Iterator<Item = [f32; BLOCK]> {
    blocks(row).map(|(bytes, step)| levels(bytes).map(|level| value(level) * step))
}

/// What rows are compared with: 8 bits a value, a step per block.
#[derive(Clone, Debug)]
pub struct Wanted(Vec<Block>);

#[derive(Clone, Debug)]
struct Block {
    values: [i8; BLOCK],
    step: f32,
    /// What the values bring when all levels are the lowest.
    lowest: f32,
}

impl Wanted {
    /// Of a query.
    pub fn new(query: &Turned) -> Self {
        let block = |block: &[f32; BLOCK]| {
            let top = block.iter().fold(0f32, |top, x| top.max(x.abs()));
            let inverse = if top > 0.0 { FINE / top } else { 0.0 };
            let values = block.map(|x| (x * inverse).round() as i8);
            Block {
                lowest: LOWEST * values.iter().map(|value| f32::from(*value)).sum::<f32>(),
                values,
                step: top / FINE,
            }
        };
        Self(query.0.as_chunks::<BLOCK>().0.iter().map(block).collect())
    }

    /// The inner product with a row.
    pub fn product(&self, row: &[u8]) -> f32 {
        let blocks = blocks(row).zip(&self.0).map(|((bytes, step), wanted)| {
            let products = levels(bytes).into_iter().zip(&wanted.values);
            let sum: i32 = products
                .map(|(level, wanted)| i32::from(level) * i32::from(*wanted))
                .sum();
            (sum as f32 + wanted.lowest) * step * wanted.step
        });
        blocks.sum()
    }

    /// The same, 32 values at a time.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    #[inline]
    pub fn product_avx2(&self, row: &[u8]) -> f32 {
        use std::arch::x86_64::*;
        let shifts = [
            _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2),
            _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6),
        ];
        // Eight copies of each byte of a word, and one bit of each copy.
        let copies = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let bit = _mm256_set1_epi64x(i64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]));
        let mut sums = _mm256_setzero_ps();
        let mut lowest = 0f32;
        for ((bytes, step), wanted) in blocks(row).zip(&self.0) {
            let (low, high) = bytes.split_at(LOW);
            // SAFETY: the 16 bytes of the low bits are read.
            let low = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(low.as_ptr().cast()) });
            let words = high.as_chunks::<4>().0.iter().zip(shifts);
            let mut products = _mm256_setzero_si256();
            for ((word, shift), wanted) in words.zip(wanted.values.as_chunks::<32>().0) {
                let low = _mm256_and_si256(_mm256_srlv_epi32(low, shift), _mm256_set1_epi8(3));
                let word = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(*word)), copies);
                let set = _mm256_cmpeq_epi8(_mm256_and_si256(word, bit), bit);
                let levels = _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(4)));
                // SAFETY: 32 values are read.
                let wanted = unsafe { _mm256_loadu_si256(wanted.as_ptr().cast()) };
                // Two products of 3 with 8 bits are below 2^11, and so are four below 2^12.
                products = _mm256_add_epi16(products, _mm256_maddubs_epi16(levels, wanted));
            }
            let factor = step * wanted.step;
            let whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(products, _mm256_set1_epi16(1)));
            sums = _mm256_add_ps(sums, _mm256_mul_ps(whole, _mm256_set1_ps(factor)));
            lowest += factor * wanted.lowest;
        }
        let half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
        let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter))) + lowest
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::conformance::vector;
    use super::*;

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn turning_changes_no_inner_product_and_spreads_what_sticks_out() {
        let (mut a, b) = (vector(3, 192), vector(4, 192));
        a[70] = 0.9;
        let [turned, other] = [&a, &b].map(|vector| Turned::new(vector.clone()));
        assert!((dot(turned.values(), other.values()) - dot(&a, &b)).abs() < 1e-5);
        assert!(turned.values().iter().all(|value| value.abs() < 0.4));
        assert!((dot(turned.values(), turned.values()) - dot(&a, &a)).abs() < 1e-5);
    }

    #[test]
    fn a_row_is_near_its_vector_and_products_are_those_of_its_values() {
        for dimension in [64, 192, 256, 1536] {
            let turned = Turned::new(vector(7, dimension));
            let row = turned.pack();
            assert_eq!(row.len(), size(dimension));
            let kept: Vec<f32> = unpacked(&row).flatten().collect();
            let cosine = dot(&kept, turned.values()) / dot(&kept, &kept).sqrt();
            assert!(cosine > 0.97, "{dimension}: {cosine}");
            let query = Turned::new(vector(8, dimension));
            let wanted = Wanted::new(&query);
            let product = wanted.product(&row);
            assert!((product - dot(&kept, query.values())).abs() < 4e-3, "{dimension}");
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has the instructions, as was just asked.
                let at_once = unsafe { wanted.product_avx2(&row) };
                assert!((at_once - product).abs() < 1e-6, "{dimension}: {at_once} {product}");
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_largest_sums_overflow_nothing() {
        if !std::arch::is_x86_feature_detected!("avx2") {
            return;
        }
        for sign in [1.0, -1.0] {
            // Every value at an end: the highest and the lowest levels, and queries of the largest values of either sign.
            let wanted = Wanted(vec![Block {
                values: [(127.0 * sign) as i8; BLOCK],
                step: 1.0,
                lowest: LOWEST * 127.0 * sign * BLOCK as f32,
            }]);
            for level in [0, 7] {
                let mut row = nearest(1.0).to_vec();
                row.extend(packed(&[level; BLOCK]));
                let expected = value(level) * 127.0 * sign * BLOCK as f32;
                // SAFETY: the processor has the instructions, as was just asked.
                let at_once = unsafe { wanted.product_avx2(&row) };
                assert_eq!((at_once, wanted.product(&row)), (expected, expected));
            }
        }
    }

    #[test]
    fn each_level_comes_back_from_its_place() {
        for first in 0..8 {
            let wanted: [u8; BLOCK] = std::array::from_fn(|at| ((at * 5 + first) % 8) as u8);
            assert_eq!(levels(&packed(&wanted)), wanted);
        }
        let nothing = Turned::new(vec![0.0; BLOCK]).pack();
        assert!(unpacked(&nothing).flatten().all(|value| value == 0.0));
        assert_eq!(Wanted::new(&Turned::new(vector(1, BLOCK))).product(&nothing), 0.0);
    }
}
