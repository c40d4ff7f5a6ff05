//! A learned rotation for models whose vectors were not trained to be cut short: the directions in which most of their energy
//! lies, found among the vectors themselves.
//!
//! The directions are the first ones of an uncentred principal component analysis, found by orthogonal iteration (Golub and
//! Van Loan 2013, §8.2.4), and then mixed at random, so that every sign tells equally much (Gong et al. 2013,
//! §3). Inner products of what is kept are near those of the vectors; the best by them are rescored at full size.
//!
//! A search compares vectors of one tenant only, so each may have directions of its own. Those that have many vectors do; the
//! others share the directions of all.

use std::io::{self, Write as _};
use std::path::Path;

use aeterna_types::TenantId;
use rayon::prelude::*;
use rustc_hash::FxHashMap;

use super::super::code::BLOCK;
use super::super::vectors::Sample;

/// The name of its file.
const FILE: &str = "rotation.bin";
/// Vectors that are needed to learn from.
const LEAST: usize = 1024;
/// Vectors of a tenant that tell whether a rotation of its own serves.
const TELLING: usize = LEAST + LEAST / 2;
/// Rounds of the iteration: more bring nothing that a first pass would notice.
const ROUNDS: usize = 10;
/// Vectors that a rotation is tried with as queries.
const TRIED: usize = 128;
/// Nearest neighbours that it should keep.
const NEAREST: usize = 10;
/// Candidates among which they should be.
const CANDIDATES: usize = 2 * NEAREST;
/// The part of the neighbours that has to be among the candidates.
const KEPT: f64 = 0.98;

/// Directions, as mixtures of some that have unit length and stand at right angles to one another.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    dimension: usize,
    directions: Vec<f32>,
}

/// The rotations of an index.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotations {
    all: Rotation,
    own: FxHashMap<TenantId, Rotation>,
}

/// How many directions are kept of so many dimensions; `None` when that would save little.
pub fn kept(dimension: usize) -> Option<usize> {
    let kept = (dimension / 2).next_multiple_of(BLOCK).min(256);
    (2 * kept <= dimension).then_some(kept)
}

/// Dimensions that an index has of vectors of so many, of which the first `prefix` tell most: all, when the model was not trained
/// for being cut short. One that was is cut as far as by a rotation that was learned.
pub fn indexed(dimension: usize, prefix: usize, learned: bool) -> usize {
    let cut = learned || prefix < dimension;
    let kept = kept(dimension).filter(|_| cut);
    kept.map_or(prefix, |kept| kept.min(prefix))
}

impl Rotation {
    /// Learns from one half of some vectors, tries it on the other, and says which part of the nearest neighbours it
    /// keeps there; `None` when that is too little, when there are too few vectors, or when it is told to stop.
    pub fn learn(vectors: &[Vec<f32>], stopped: &(dyn Fn() -> bool + Sync)) -> Option<(Self, f64)> {
        let dimension = vectors.first()?.len();
        if vectors.len() < LEAST || vectors.iter().any(|vector| vector.len() != dimension) {
            return None;
        }
        // Those whose place has an odd number of ones, and the others: tenants that take turns are in both halves.
        let half = |odd: u32| -> Vec<&[f32]> {
            let chosen = vectors.iter().zip(0u32..);
            let chosen = chosen.filter(|(_, place)| place.count_ones() % 2 == odd);
            chosen.map(|(vector, _)| vector.as_slice()).collect()
        };
        let rotation = Self::fit(&half(0), kept(dimension)?, stopped)?;
        let share = rotation.keeps(&half(1));
        tracing::debug!(share, "neighbours that a learned rotation keeps");
        (share >= KEPT).then_some((rotation, share))
    }

    /// The directions of most energy.
    fn fit(vectors: &[&[f32]], kept: usize, stopped: &(dyn Fn() -> bool + Sync)) -> Option<Self> {
        let dimension = vectors[0].len();
        let moments = moments(vectors);
        let mut directions = at_random(kept, dimension);
        for _ in 0..ROUNDS {
            if stopped() {
                return None;
            }
            directions
                .par_chunks_mut(dimension)
                .for_each(|direction| direction.copy_from_slice(&times(&moments, direction)));
            straighten(&mut directions, dimension);
        }
        // Each towards the mean, so that the means of all tenants lie near one another, as the signs want it.
        let mut mean = vec![0f32; dimension];
        vectors.iter().for_each(|vector| add(&mut mean, 1.0, vector));
        for direction in directions.chunks_exact_mut(dimension) {
            if dot(direction, &mean) < 0.0 {
                direction.iter_mut().for_each(|value| *value = -*value);
            }
        }
        let mut mixture = at_random(kept, kept);
        straighten(&mut mixture, kept);
        let mix = |weights: &[f32]| {
            let mut mixed = vec![0f32; dimension];
            for (weight, direction) in weights.iter().zip(directions.chunks_exact(dimension)) {
                add(&mut mixed, *weight, direction);
            }
            mixed
        };
        Some(Self {
            dimension,
            directions: mixture.par_chunks(kept).flat_map_iter(mix).collect(),
        })
    }

    /// What a vector has in each direction.
    pub fn apply(&self, vector: &[f32]) -> Vec<f32> {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the instructions, as was just asked.
            return unsafe { self.apply_avx2(vector) };
        }
        self.apply_plain(vector)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn apply_avx2(&self, vector: &[f32]) -> Vec<f32> {
        self.apply_plain(vector)
    }

    #[inline(always)]
    fn apply_plain(&self, vector: &[f32]) -> Vec<f32> {
        let directions = self.directions.chunks_exact(self.dimension);
        directions.map(|direction| dot(direction, vector)).collect()
    }

    /// The part of the nearest neighbours of some of the vectors, among the others, that are near by what is kept, too.
    fn keeps(&self, vectors: &[&[f32]]) -> f64 {
        let short: Vec<Vec<f32>> = vectors.par_iter().map(|vector| self.apply(vector)).collect();
        let short: Vec<&[f32]> = short.iter().map(Vec::as_slice).collect();
        // Of old ones as many as of new ones.
        let step = vectors.len().div_ceil(TRIED);
        let queries: Vec<usize> = (0..vectors.len()).step_by(step).collect();
        let kept = queries.par_iter().map(|query| {
            let near = nearest(&short, *query, CANDIDATES);
            // Equal ones are as good as one another.
            let farthest = near.last().map_or(f32::MIN, |(score, _)| *score);
            let wanted = nearest(vectors, *query, NEAREST);
            let within = |(_, number): &&(f32, usize)| dot(short[*number], short[*query]) >= farthest;
            wanted.iter().filter(within).count()
        });
        kept.sum::<usize>() as f64 / (queries.len() * NEAREST) as f64
    }
}

impl Rotations {
    /// Learns one of all vectors, and one of each tenant that has many; with the part of the nearest neighbours that the first
    /// keeps. `None` when one of them keeps too little, or when it is told to stop. A tenant of which there are too few to tell
    /// has the one of all.
    pub fn learn(sample: &Sample, stopped: &(dyn Fn() -> bool + Sync)) -> Option<(Self, f64)> {
        let (all, share) = Rotation::learn(&sample.all, stopped)?;
        let own = sample.own.iter().filter(|(_, vectors)| vectors.len() >= TELLING);
        let own = own.map(|(tenant, vectors)| {
            let Some((rotation, share)) = Rotation::learn(vectors, stopped) else {
                tracing::info!(%tenant, "no rotation serves this tenant's vectors");
                return None;
            };
            tracing::debug!(%tenant, share, "learned a tenant's own rotation");
            Some((tenant.clone(), rotation))
        });
        let own = own.collect::<Option<_>>()?;
        Some((Self { all, own }, share))
    }

    /// Tenants that have one of their own.
    pub fn tenants(&self) -> usize {
        self.own.len()
    }

    /// The one that a tenant's vectors are turned by.
    pub fn of(&self, tenant: &TenantId) -> &Rotation {
        self.own.get(tenant).unwrap_or(&self.all)
    }

    /// Writes them to a directory.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = number(self.all.dimension).to_vec();
        bytes.extend(number(self.own.len()));
        for tenant in self.own.keys() {
            bytes.extend(number(tenant.as_str().len()));
            bytes.extend(tenant.as_str().as_bytes());
        }
        for rotation in std::iter::once(&self.all).chain(self.own.values()) {
            bytes.extend(rotation.directions.iter().flat_map(|value| value.to_le_bytes()));
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        let mut file = std::fs::File::create(directory.join(FILE))?;
        file.write_all(&bytes)?;
        file.sync_all()
    }

    /// Reads them from a directory; `None` when they are missing, damaged, or of other sizes.
    pub fn read(directory: &Path, dimension: usize, kept: usize) -> Option<Self> {
        let bytes = std::fs::read(directory.join(FILE)).ok()?;
        let (whole, sum) = bytes.split_last_chunk::<4>()?;
        if crc32fast::hash(whole) != u32::from_le_bytes(*sum) {
            return None;
        }
        let mut rest = whole;
        if number(&mut rest)? != dimension {
            return None;
        }
        let count = number(&mut rest)?;
        let mut tenants: Vec<TenantId> = Vec::new();
        for _ in 0..count {
            let length = number(&mut rest)?;
            let (name, after) = rest.split_at_checked(length)?;
            rest = after;
            tenants.push(std::str::from_utf8(name).ok()?.parse().ok()?);
        }
        let size = kept * dimension * size_of::<f32>();
        if rest.len() != (count + 1) * size {
            return None;
        }
        let mut rotations = rest.chunks_exact(size).map(|bytes| {
            let values = bytes.as_chunks::<4>().0.iter();
            let directions = values.map(|value| f32::from_le_bytes(*value)).collect();
            Rotation { dimension, directions }
        });
        Some(Self {
            all: rotations.next()?,
            own: tenants.into_iter().zip(rotations).collect(),
        })
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> u64 {
        let rotations = std::iter::once(&self.all).chain(self.own.values());
        rotations.map(|rotation| (rotation.directions.len() * 4) as u64).sum()
    }
}

/// Takes a number from the front.
fn number(bytes: &mut &[u8]) -> Option<usize> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    usize::try_from(u32::from_le_bytes(*number)).ok()
}

/// The mean of the products of all pairs of dimensions: a symmetric matrix.
fn moments(vectors: &[&[f32]]) -> Vec<f32> {
    let dimension = vectors[0].len();
    let mut moments = vec![0f32; dimension * dimension];
    let share = 1.0 / vectors.len() as f32;
    moments.par_chunks_mut(dimension).enumerate().for_each(|(row, out)| {
        for vector in vectors {
            add(out, vector[row] * share, vector);
        }
    });
    moments
}

fn times(matrix: &[f32], vector: &[f32]) -> Vec<f32> {
    matrix.chunks_exact(vector.len()).map(|row| dot(row, vector)).collect()
}

/// Makes rows stand at right angles to those before them, and of unit length, or 0 where there is no further direction (modified
/// Gram-Schmidt).
fn straighten(rows: &mut [f32], length: usize) {
    for at in 0..rows.len() / length {
        let (before, rest) = rows.split_at_mut(at * length);
        let row = &mut rest[..length];
        // Twice is enough (Giraud et al. 2005): what the first round leaves may be little but rounding errors, and where the second
        // leaves little of that, those before span everything.
        for least in [f32::MIN_POSITIVE, 0.1] {
            for other in before.chunks_exact(length) {
                let part = dot(other, row);
                add(row, -part, other);
            }
            let norm = dot(row, row).sqrt();
            let scale = if norm >= least { norm.recip() } else { 0.0 };
            row.iter_mut().for_each(|value| *value *= scale);
        }
    }
}

/// Adds so many times another row.
fn add(row: &mut [f32], times: f32, other: &[f32]) {
    for (value, other) in row.iter_mut().zip(other) {
        *value += times * other;
    }
}

/// Sums side by side, so that the compiler may use vector registers.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, rest_a) = a.as_chunks::<16>();
    let (b, rest_b) = b.as_chunks::<16>();
    let mut sums = [0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// Rows of numbers between -1 and 1, the same at every call: nothing depends on which they are.
fn at_random(rows: usize, length: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        // Xorshift (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..rows * length).map(|_| next()).collect()
}

/// The nearest others of one of the vectors, best first.
fn nearest(vectors: &[&[f32]], query: usize, count: usize) -> Vec<(f32, usize)> {
    let others = vectors.iter().enumerate().filter(|(number, _)| *number != query);
    let mut scored: Vec<(f32, usize)> = others
        .map(|(number, vector)| (dot(vector, vectors[query]), number))
        .collect();
    scored.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    scored.truncate(count);
    scored
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of so many true dimensions, turned at random into 256.
    fn turned(true_dimensions: usize) -> Vec<Vec<f32>> {
        let mut turn = at_random(true_dimensions, 256);
        straighten(&mut turn, 256);
        let weights = at_random(2 * LEAST, true_dimensions);
        let make = |weights: &[f32]| {
            let mut vector = vec![0f32; 256];
            for (weight, direction) in weights.iter().zip(turn.chunks_exact(256)) {
                add(&mut vector, *weight, direction);
            }
            let norm = dot(&vector, &vector).sqrt();
            vector.iter().map(|value| value / norm).collect()
        };
        weights.chunks_exact(true_dimensions).map(make).collect()
    }

    #[test]
    fn what_lies_in_few_directions_is_kept_in_few() {
        let vectors = turned(60);
        let (rotation, share) = Rotation::learn(&vectors, &|| false).unwrap();
        assert!(share > 0.999, "{share}");
        for pair in vectors.chunks_exact(2).take(50) {
            let [a, b] = [0, 1].map(|side| rotation.apply(&pair[side]));
            assert!((dot(&a, &b) - dot(&pair[0], &pair[1])).abs() < 1e-3);
        }
        // The first dimensions alone tell little.
        let first: Vec<&[f32]> = vectors.iter().map(|vector| &vector[..64]).collect();
        let whole: Vec<&[f32]> = vectors.iter().map(Vec::as_slice).collect();
        let same = (0..50).map(|query| {
            let (short, long) = (nearest(&first, query, 20), nearest(&whole, query, 10));
            let found = |(_, number): &&(f32, usize)| short.iter().any(|(_, other)| other == number);
            long.iter().filter(found).count()
        });
        assert!(same.sum::<usize>() < 350);
    }

    #[test]
    fn what_lies_in_all_directions_is_not_cut() {
        assert_eq!(Rotation::learn(&turned(256), &|| false), None);
        assert_eq!(Rotation::learn(&turned(60)[..LEAST - 1], &|| false), None);
        assert_eq!(
            [128, 256, 384, 512, 768, 3072].map(kept),
            [64, 128, 192, 256, 256, 256].map(Some)
        );
        assert_eq!(kept(192), None);
    }

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    #[test]
    fn a_tenant_with_many_vectors_has_directions_of_its_own() {
        // What one has lies in the first dimensions, what the other has in the last ones.
        let vectors = turned(60);
        let placed = |from: usize| -> Vec<Vec<f32>> {
            let place = |vector: &Vec<f32>| {
                let mut placed = vec![0f32; 512];
                placed[from..from + 256].copy_from_slice(vector);
                placed
            };
            vectors.iter().map(place).collect()
        };
        let own = vec![(tenant("low"), placed(0)), (tenant("high"), placed(256))];
        let sample = Sample {
            all: own.iter().flat_map(|(_, vectors)| vectors.clone()).collect(),
            own,
        };
        let (rotations, _) = Rotations::learn(&sample, &|| false).unwrap();
        assert_eq!(rotations.tenants(), 2);
        for (name, from) in [("low", 0), ("high", 256)] {
            let rotation = rotations.of(&tenant(name));
            assert_ne!(rotation, rotations.of(&tenant("another")));
            let energy = |vector: &Vec<f32>| {
                let kept = rotation.apply(vector);
                dot(&kept, &kept)
            };
            let (mine, theirs) = (placed(from), placed(256 - from));
            assert!(mine.iter().take(50).all(|vector| energy(vector) > 0.999), "{name}");
            assert!(theirs.iter().take(50).all(|vector| energy(vector) < 0.9), "{name}");
        }
        let directory = tempfile::tempdir().unwrap();
        rotations.write(directory.path()).unwrap();
        assert_eq!(Rotations::read(directory.path(), 512, 256), Some(rotations));
        // One whose vectors lie in all directions keeps them from being cut, however well all together are served.
        let unserved = Sample {
            all: turned(60),
            own: vec![(tenant("wide"), turned(256))],
        };
        assert_eq!(Rotations::learn(&unserved, &|| false), None);
        // Of too few vectors nobody can tell.
        let few = Sample {
            own: vec![(tenant("wide"), turned(256)[..TELLING - 1].to_vec())],
            ..unserved
        };
        let (rotations, _) = Rotations::learn(&few, &|| false).unwrap();
        assert_eq!(rotations.tenants(), 0);
    }

    #[test]
    fn it_is_read_as_it_was_written_and_damage_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let sample = Sample {
            all: turned(60),
            own: Vec::new(),
        };
        let (rotations, _) = Rotations::learn(&sample, &|| false).unwrap();
        rotations.write(directory.path()).unwrap();
        let read = |dimension: usize, kept: usize| Rotations::read(directory.path(), dimension, kept);
        assert_eq!(read(256, 128), Some(rotations));
        assert_eq!((read(128, 256), read(256, 64)), (None, None));
        let path = directory.path().join(FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[100] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(256, 128), None);
    }
}
