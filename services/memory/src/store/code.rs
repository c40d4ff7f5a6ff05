//! The compact code of a unit vector: 10 bits a value, a scale per block of 64 values.
//!
//! The high 8 bits of all values come first, the low 2 bits after them, each as SIMD wants them. Bytes: 1 for the layout, 2 for
//! the dimensions, 2 per block (a bfloat16), 1.25 per value: 32 % of float32, and two codes of 1536 dimensions fit a page of the
//! relational store. The first byte is the layout's version.

/// Values that share a scale.
pub const BLOCK: usize = 64;
/// Layout of the bytes; 1 had 12 bits a value.
const VERSION: u8 = 2;
const HEADER: usize = 3;
/// Bytes of a scale.
pub const SCALE: usize = 2;
/// What a value's high 8 bits count for.
const STEP: i8 = 4;
/// The largest magnitude of a 10-bit value whose high part, rounded, still fits 8 bits.
const TOP: f32 = 509.0;
/// The largest magnitude of a value of a query.
const FINE: f32 = 16_383.0;

/// An encoded vector, in bytes of its own or in those of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code<B = Vec<u8>>(B);

/// The nearest bfloat16 that is not smaller.
fn round_up(scale: f32) -> u16 {
    let bits = scale.to_bits();
    let high = (bits >> 16) as u16;
    if bits & 0xffff == 0 { high } else { high + 1 }
}

fn widen(scale: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(scale)) << 16)
}

/// Scales as they are stored.
pub fn scales(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(SCALE).map(|b| widen([b[0], b[1]]))
}

impl Code {
    /// Encodes a vector whose length is a multiple of 64, at most 65,472; `None` for others or values that are not finite.
    pub fn encode(vector: &[f32]) -> Option<Self> {
        let dimension = u16::try_from(vector.len()).ok()?;
        if vector.is_empty() || !vector.len().is_multiple_of(BLOCK) || vector.iter().any(|x| !x.is_finite()) {
            return None;
        }
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&dimension.to_le_bytes());
        let scales: Vec<u16> = vector
            .chunks_exact(BLOCK)
            .map(|block| round_up(block.iter().fold(0f32, |top, x| top.max(x.abs())) / TOP))
            .collect();
        scales.iter().for_each(|scale| bytes.extend(scale.to_le_bytes()));
        let quantized: Vec<i16> = vector
            .chunks_exact(BLOCK)
            .zip(&scales)
            .flat_map(|(block, scale)| {
                let scale = widen(scale.to_le_bytes());
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                block.iter().map(move |x| (x * inverse).round().clamp(-TOP, TOP) as i16)
            })
            .collect();
        let high = |q: i16| (q + 2) >> 2;
        bytes.extend(quantized.iter().map(|q| high(*q) as i8 as u8));
        let low = |q: i16| (q - (high(q) << 2) + 2) as u8;
        // Value i, i + 16, i + 32 and i + 48 of a block share a byte: all of one shift lie side by side, as SIMD wants them.
        let quarter = BLOCK / 4;
        for block in quantized.chunks_exact(BLOCK) {
            let four = |i: usize| (0..4).fold(0, |byte, part| byte | low(block[i + part * quarter]) << (2 * part));
            bytes.extend((0..quarter).map(four));
        }
        Some(Self(bytes))
    }
}

impl<B: AsRef<[u8]>> Code<B> {
    /// Reads what [`Code::as_bytes`] gave; `None` when it is damaged.
    pub fn from_bytes(code: B) -> Option<Self> {
        let bytes = code.as_ref();
        let dimension = usize::from(u16::from_le_bytes([*bytes.get(1)?, *bytes.get(2)?]));
        let whole = HEADER + dimension / BLOCK * SCALE + dimension + dimension / 4;
        let sound = bytes[0] == VERSION && dimension > 0 && dimension.is_multiple_of(BLOCK) && bytes.len() == whole;
        sound.then_some(Self(code))
    }

    /// The bytes to store.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_ref()
    }

    /// The same code in bytes of its own.
    pub fn to_owned(&self) -> Code {
        Code(self.as_bytes().to_vec())
    }

    /// Dimensions of the vector.
    pub fn dimension(&self) -> usize {
        let bytes = self.0.as_ref();
        usize::from(u16::from_le_bytes([bytes[1], bytes[2]]))
    }

    /// The scale of each block.
    fn scales(&self) -> impl Iterator<Item = f32> {
        scales(self.scale_bytes())
    }

    fn scale_bytes(&self) -> &[u8] {
        &self.0.as_ref()[HEADER..HEADER + self.dimension() / BLOCK * SCALE]
    }

    /// The high 8 bits of each value, to be read as signed.
    fn high(&self) -> &[u8] {
        let start = HEADER + self.dimension() / BLOCK * SCALE;
        &self.0.as_ref()[start..start + self.dimension()]
    }

    fn low(&self) -> &[u8] {
        let bytes = self.0.as_ref();
        &bytes[bytes.len() - self.dimension() / 4..]
    }

    /// The vector, with an error of at most half a step per value.
    pub fn decode(&self) -> Vec<f32> {
        self.first(self.dimension())
    }

    /// The first values of the vector, a multiple of 64.
    pub fn first(&self, values: usize) -> Vec<f32> {
        let blocks = self.high().chunks_exact(BLOCK).zip(self.low().chunks_exact(BLOCK / 4));
        let mut vector = Vec::with_capacity(values);
        for ((high, low), scale) in blocks.zip(self.scales()).take(values / BLOCK) {
            vector.extend(unpacked(high, low).into_iter().map(|value| f32::from(value) * scale));
        }
        vector
    }

    /// Cosine with a vector of the same size, or with a prefix.
    pub fn cosine(&self, query: &Query) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the instructions, as was just asked.
            return unsafe { self.cosine_avx2(query) };
        }
        self.cosine_plain(query)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn cosine_avx2(&self, query: &Query) -> f32 {
        self.cosine_plain(query)
    }

    #[inline(always)]
    fn cosine_plain(&self, query: &Query) -> f32 {
        let blocks = self.high().chunks_exact(BLOCK).zip(self.low().chunks_exact(BLOCK / 4));
        let (mut dot, mut norm) = (0f32, 0f32);
        for (((high, low), (wanted, step)), scale) in blocks.zip(&query.0).zip(self.scales()) {
            let values = unpacked(high, low);
            // Below 2^30 at most: sums of 64 products of 10 with 15 bits.
            let (mut product, mut square) = (0i32, 0i32);
            for (value, wanted) in values.iter().zip(wanted) {
                product += i32::from(*value) * i32::from(*wanted);
                square += i32::from(*value) * i32::from(*value);
            }
            dot += product as f32 * step * scale;
            norm += square as f32 * scale * scale;
        }
        if norm > 0.0 { dot / norm.sqrt() } else { 0.0 }
    }
}

/// A vector that codes are compared with: 15 bits a value, a step per block, so that whole numbers do.
#[derive(Clone, Debug)]
pub struct Query(Vec<([i16; BLOCK], f32)>);

impl Query {
    /// Of a unit vector whose length is a multiple of 64; values beyond the last multiple are left out.
    pub fn new(vector: &[f32]) -> Self {
        let block = |block: &[f32; BLOCK]| {
            let top = block.iter().fold(0f32, |top, x| top.max(x.abs()));
            let inverse = if top > 0.0 { FINE / top } else { 0.0 };
            (block.map(|x| (x * inverse).round() as i16), top / FINE)
        };
        Self(vector.as_chunks::<BLOCK>().0.iter().map(block).collect())
    }

    /// Dimensions of the vector.
    pub fn dimension(&self) -> usize {
        self.0.len() * BLOCK
    }
}

/// Asks for bytes that will be read soon: what lies anywhere in memory is waited for longer than the arithmetic on it takes.
#[inline(always)]
pub fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the address is that of a byte of the slice, and nothing is read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

/// The values of a block, before its scale.
#[inline(always)]
fn unpacked(high: &[u8], low: &[u8]) -> [i16; BLOCK] {
    let mut values = [0i16; BLOCK];
    let quarters = values.chunks_exact_mut(BLOCK / 4).zip(high.chunks_exact(BLOCK / 4));
    for (quarter, (values, high)) in quarters.enumerate() {
        for ((value, high), low) in values.iter_mut().zip(high).zip(low) {
            let low = i16::from((low >> (2 * quarter)) & 3);
            *value = i16::from(*high as i8) * i16::from(STEP) + low - 2;
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::super::conformance::vector;
    use super::*;

    #[test]
    fn a_vector_survives_within_half_a_step() {
        for dimension in [64, 384, 1536] {
            let vector = vector(7, dimension);
            let code = Code::encode(&vector).unwrap();
            let top = vector.iter().fold(0f32, |top, x| top.max(x.abs()));
            for (a, b) in vector.iter().zip(code.decode()) {
                assert!((a - b).abs() <= top / TOP * 0.52, "{a} {b}");
            }
            assert!(code.cosine(&Query::new(&vector)) > 0.9999);
            let plain: f32 = code
                .decode()
                .iter()
                .zip(super::super::conformance::vector(9, dimension))
                .map(|(a, b)| a * b)
                .sum();
            let other = Query::new(&super::super::conformance::vector(9, dimension));
            assert!((code.cosine(&other) - plain).abs() < 1e-4);
            assert!(code.as_bytes().len() * 100 <= dimension * 4 * 33 + 300);
            assert_eq!(Code::from_bytes(code.as_bytes().to_vec()), Some(code));
        }
    }

    #[test]
    fn damage_and_nonsense_are_refused() {
        let code = Code::encode(&vector(1, 64)).unwrap();
        for cut in 0..code.as_bytes().len() {
            assert_eq!(Code::from_bytes(code.as_bytes()[..cut].to_vec()), None);
        }
        assert_eq!(Code::encode(&[]), None);
        assert_eq!(Code::encode(&[0.1; 63]), None);
        assert_eq!(Code::encode(&[f32::NAN; 64]), None);
        assert_eq!(Code::encode(&[0.0; 64]).unwrap().decode(), vec![0.0; 64]);
    }
}
