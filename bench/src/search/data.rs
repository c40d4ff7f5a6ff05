//! The vectors.

use rayon::prelude::*;
use simsimd::SpatialSimilarity as _;

use super::{Args, K, SCOPES};
use crate::stats::Rng;

const TOPICS: usize = 64;
/// Vectors of a cluster.
const CLUSTER: usize = 50;
/// How strongly topic, cluster and noise pull.
const PULLS: [f32; 3] = [0.5, 0.5, 0.5];

/// Vectors and queries, unit length, side by side.
pub struct Data {
    /// Dimensions of all of them.
    pub dimensions: usize,
    vectors: Vec<f32>,
    queries: Vec<f32>,
}

impl Data {
    pub fn new(args: &Args, n: usize, queries: usize) -> Self {
        let (dimensions, spectrum, seed) = (args.dimensions, args.spectrum.as_str(), args.seed);
        let deviations = deviations(if spectrum == "hard" { 0.46 } else { 0.79 });
        let turned = spectrum == "untrained";
        let clusters = (n / CLUSTER).max(TOPICS);
        let make = |count: usize, salt: u64| {
            let mut all = vec![0f32; count * dimensions];
            all.par_chunks_mut(dimensions).enumerate().for_each(|(number, vector)| {
                let mut rng = Rng::new(seed ^ salt ^ ((number as u64) << 8));
                let cluster = rng.below(clusters);
                let seeds = [
                    1 << 60 | (cluster % TOPICS) as u64,
                    1 << 61 | cluster as u64,
                    rng.next(),
                ];
                for (pull, own) in PULLS.iter().zip(seeds) {
                    let mut rng = Rng::new(seed ^ own);
                    for (value, deviation) in vector.iter_mut().zip(&deviations) {
                        *value += pull * deviation * normal(&mut rng);
                    }
                }
                if turned {
                    turn(vector);
                }
                let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
                vector.iter_mut().for_each(|x| *x /= norm);
            });
            all
        };
        Self {
            dimensions,
            vectors: make(n, 0),
            queries: make(queries, 1 << 62),
        }
    }

    pub fn len(&self) -> usize {
        self.vectors.len() / self.dimensions
    }

    pub fn queries(&self) -> usize {
        self.queries.len() / self.dimensions
    }

    pub fn query(&self, number: usize) -> &[f32] {
        &self.queries[number * self.dimensions..(number + 1) * self.dimensions]
    }

    pub fn vector(&self, number: usize) -> &[f32] {
        &self.vectors[number * self.dimensions..(number + 1) * self.dimensions]
    }

    /// The part of the squared length that lies in the first 256 dimensions.
    pub fn energy(&self) -> f64 {
        let some = self.len().min(1000);
        let squares = |vector: &[f32]| vector.iter().take(256).map(|x| f64::from(x * x)).sum::<f64>();
        (0..some).map(|number| squares(self.vector(number))).sum::<f64>() / some as f64
    }

    /// The nearest vectors of each query among those of the first so many scopes.
    pub fn truth(&self, scopes: usize) -> Vec<Vec<usize>> {
        let queries = (0..self.queries()).into_par_iter();
        queries
            .map(|query| nearest(self.among(scopes), self.query(query)))
            .collect()
    }

    /// The vectors of the first so many scopes.
    pub fn among(&self, scopes: usize) -> impl Iterator<Item = (usize, &[f32])> {
        let among = (0..self.len()).filter(move |number| number % SCOPES < scopes);
        among.map(|number| (number, self.vector(number)))
    }
}

/// The nearest of some vectors, by inner product.
pub fn nearest<'a>(among: impl Iterator<Item = (usize, &'a [f32])>, query: &[f32]) -> Vec<usize> {
    let mut best: Vec<(f64, usize)> = Vec::with_capacity(K + 1);
    for (number, vector) in among {
        let score = f32::dot(vector, query).unwrap_or(f64::MIN);
        if best.len() == K && score <= best[K - 1].0 {
            continue;
        }
        let place = best.partition_point(|(other, _)| *other >= score);
        best.insert(place, (score, number));
        best.truncate(K);
    }
    best.into_iter().map(|(_, number)| number).collect()
}

/// Spreads the energy over all dimensions, by the same rotation for every vector: signs are changed at random, blocks of the
/// largest power of 2 that divides the dimensions go through a Walsh-Hadamard transform, and the dimensions of all blocks change
/// places, three times.
fn turn(vector: &mut [f32]) {
    let mut rng = Rng::new(0);
    let length = vector.len();
    let steps = length.trailing_zeros();
    for _ in 0..3 {
        for block in vector.chunks_exact_mut(1 << steps) {
            block
                .iter_mut()
                .for_each(|value| *value *= 1.0 - 2.0 * rng.below(2) as f32);
            for half in (0..steps).map(|step| 1 << step) {
                for pair in block.chunks_exact_mut(2 * half) {
                    let (low, high) = pair.split_at_mut(half);
                    for (a, b) in low.iter_mut().zip(high) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
            }
        }
        let before = vector.to_vec();
        // Neighbours go to places 29 apart, which reaches every place once.
        (0..length).for_each(|at| vector[at * 29 % length] = before[at]);
    }
}

/// Dimensions that a power law is chosen for; vectors of fewer have its beginning.
pub const MOST: usize = 1536;

/// Standard deviations that fall as a power law, with this part of the energy in the first 256 of 1536 dimensions.
fn deviations(energy: f64) -> Vec<f32> {
    let part = |power: f64| {
        let sum = |end: usize| (1..=end).map(|i| (i as f64).powf(-power)).sum::<f64>();
        sum(256) / sum(MOST)
    };
    let (mut low, mut high) = (0.0, 4.0);
    for _ in 0..50 {
        let middle = (low + high) / 2.0;
        if part(middle) < energy {
            low = middle
        } else {
            high = middle
        }
    }
    (1..=MOST).map(|i| (i as f64).powf(-low / 2.0) as f32).collect()
}

/// A standard normal number: the sum of 12 uniform ones, which is near enough and quick (Irwin and Hall).
fn normal(rng: &mut Rng) -> f32 {
    let mut sum = 0u64;
    for _ in 0..3 {
        let bits = rng.next();
        sum += (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    }
    sum as f32 / 65_536.0 - 6.0
}
