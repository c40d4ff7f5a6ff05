//! The compact code of a unit vector: 12 bits a value, a scale per block of 64 values.
//!
//! The high 8 bits of all values come first, the low 4 bits after them, so that a prefix of the high part is at once the
//! int8 vector that a first pass scans. Bytes: 1 for the layout, 2 for the dimensions, 4 per block, 1.5 per value: 39 % of
//! float32. The layout's first byte is its version.

/// Values that share a scale.
pub const BLOCK: usize = 64;
const VERSION: u8 = 1;
const HEADER: usize = 3;
/// The largest magnitude of a 12-bit value whose high part, rounded, still fits 8 bits.
const TOP: f32 = 2039.0;

/// An encoded vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code(Vec<u8>);

impl Code {
    /// Encodes a vector whose length is a multiple of 64, at most 65,472; `None` for others or values that are not finite.
    pub fn encode(vector: &[f32]) -> Option<Self> {
        let dimension = u16::try_from(vector.len()).ok()?;
        if vector.is_empty() || !vector.len().is_multiple_of(BLOCK) || vector.iter().any(|x| !x.is_finite()) {
            return None;
        }
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&dimension.to_le_bytes());
        let scales: Vec<f32> = vector
            .chunks_exact(BLOCK)
            .map(|block| block.iter().fold(0f32, |top, x| top.max(x.abs())) / TOP)
            .collect();
        scales
            .iter()
            .for_each(|scale| bytes.extend_from_slice(&scale.to_le_bytes()));
        let quantized: Vec<i16> = vector
            .chunks_exact(BLOCK)
            .zip(&scales)
            .flat_map(|(block, scale)| {
                let inverse = if *scale > 0.0 { 1.0 / scale } else { 0.0 };
                block.iter().map(move |x| (x * inverse).round().clamp(-TOP, TOP) as i16)
            })
            .collect();
        bytes.extend(quantized.iter().map(|q| ((q + 8) >> 4) as i8 as u8));
        let low = |q: i16| (q - (((q + 8) >> 4) << 4) + 8) as u8;
        bytes.extend(quantized.chunks_exact(2).map(|pair| low(pair[0]) | (low(pair[1]) << 4)));
        Some(Self(bytes))
    }

    /// Reads what [`Code::as_bytes`] gave; `None` when it is damaged.
    pub fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
        let dimension = usize::from(u16::from_le_bytes([*bytes.get(1)?, *bytes.get(2)?]));
        let whole = HEADER + dimension / BLOCK * 4 + dimension + dimension / 2;
        let sound = bytes[0] == VERSION && dimension > 0 && dimension.is_multiple_of(BLOCK) && bytes.len() == whole;
        sound.then_some(Self(bytes))
    }

    /// The bytes to store.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Dimensions of the vector.
    pub fn dimension(&self) -> usize {
        usize::from(u16::from_le_bytes([self.0[1], self.0[2]]))
    }

    /// The scale of each block.
    pub fn scales(&self) -> impl Iterator<Item = f32> {
        let blocks = self.dimension() / BLOCK;
        self.0[HEADER..HEADER + blocks * 4]
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// The high 8 bits of each value, to be read as signed.
    pub fn high(&self) -> &[u8] {
        let start = HEADER + self.dimension() / BLOCK * 4;
        &self.0[start..start + self.dimension()]
    }

    /// The vector, with an error of at most half a step per value.
    #[cfg(test)]
    pub fn decode(&self) -> Vec<f32> {
        let high = self.high();
        let low = &self.0[self.0.len() - self.dimension() / 2..];
        let scales: Vec<f32> = self.scales().collect();
        (0..self.dimension())
            .map(|i| {
                let nibble = (low[i / 2] >> (4 * (i % 2))) & 15;
                let value = i16::from(high[i] as i8) * 16 + i16::from(nibble) - 8;
                f32::from(value) * scales[i / BLOCK]
            })
            .collect()
    }

    /// Cosine with a unit vector of the same size.
    pub fn cosine(&self, query: &[f32]) -> f32 {
        let low = &self.0[self.0.len() - self.dimension() / 2..];
        let blocks = self.high().chunks_exact(BLOCK).zip(low.chunks_exact(BLOCK / 2));
        let (mut dot, mut norm) = (0f32, 0f32);
        for (((high, low), query), scale) in blocks.zip(query.chunks_exact(BLOCK)).zip(self.scales()) {
            let (mut part, mut square) = (0f32, 0f32);
            for ((high, low), query) in high.chunks_exact(2).zip(low).zip(query.chunks_exact(2)) {
                let first = f32::from(i16::from(high[0] as i8) * 16 + i16::from(low & 15) - 8);
                let second = f32::from(i16::from(high[1] as i8) * 16 + i16::from(low >> 4) - 8);
                part += first * query[0] + second * query[1];
                square += first * first + second * second;
            }
            dot += part * scale;
            norm += square * scale * scale;
        }
        if norm > 0.0 { dot / norm.sqrt() } else { 0.0 }
    }
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
                assert!((a - b).abs() <= top / TOP * 0.51, "{a} {b}");
            }
            assert!(code.cosine(&vector) > 0.99999);
            let plain: f32 = code
                .decode()
                .iter()
                .zip(super::super::conformance::vector(9, dimension))
                .map(|(a, b)| a * b)
                .sum();
            assert!((code.cosine(&super::super::conformance::vector(9, dimension)) - plain).abs() < 1e-4);
            assert!(code.as_bytes().len() * 100 <= dimension * 4 * 40 + 300);
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
