//! How many dimensions of a Matryoshka model to use (Kusupati et al. 2022): the specification's rule as a table, and the
//! best quality that fits a latency budget by what was measured.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The Matryoshka sizes, ascending.
pub const SIZES: [usize; 4] = [256, 384, 768, 1536];
/// How long a measurement counts beside new ones, and between two trials.
const FRESH: Duration = Duration::from_secs(60);
/// Choices between two trials, at least.
const CHOICES: u32 = 16;
/// Things that are measured, at most; the one that was measured longest ago makes room.
const KEPT: usize = 1000;

/// The sizes that can be asked of a model with that many dimensions, ascending; the last is its full size.
pub fn sizes(full: usize) -> Vec<usize> {
    let smaller = SIZES.into_iter().filter(|size| *size < full);
    smaller.chain([full]).collect()
}

/// What is known about a search.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purpose {
    /// Characters of the query; `None`: unknown.
    pub query_length: Option<usize>,
    /// Results wanted; `None`: unknown.
    pub results: Option<usize>,
    /// Milliseconds; `None`: no limit.
    pub budget_ms: Option<u32>,
}

/// A number of dimensions and the reason for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Dimensions; by the table, not clipped to any model.
    pub size: usize,
    /// Which rule chose them, for a person.
    pub rule: &'static str,
}

type Applies = fn(&Purpose) -> bool;

/// The first row that applies is taken.
const TABLE: &[(&str, usize, Applies)] = &[
    (
        "query shorter than 20 characters and at most 10 results",
        256,
        |purpose| purpose.query_length.is_some_and(|n| n < 20) && purpose.results.is_some_and(|n| n <= 10),
    ),
    ("latency budget below 50 ms", 256, |purpose| {
        purpose.budget_ms.is_some_and(|ms| ms < 50)
    }),
    ("latency budget below 100 ms", 384, |purpose| {
        purpose.budget_ms.is_some_and(|ms| ms < 100)
    }),
    ("latency budget below 200 ms", 768, |purpose| {
        purpose.budget_ms.is_some_and(|ms| ms < 200)
    }),
];

/// What the specification's table says.
pub fn by_table(purpose: &Purpose) -> Chosen {
    let row = TABLE.iter().find(|(_, _, applies)| applies(purpose));
    row.map_or(
        Chosen {
            size: 1536,
            rule: "no reason for less",
        },
        |(rule, size, _)| Chosen { size: *size, rule },
    )
}

/// A moving average.
#[derive(Clone, Copy, Debug)]
struct Measured {
    ms: f64,
    at: Instant,
    /// It was not done by then.
    unfinished: bool,
}

/// What is known of one thing.
#[derive(Clone, Debug)]
struct Known {
    sizes: BTreeMap<usize, Measured>,
    /// When a larger size than fits was tried, and how often something was chosen since.
    tried: Instant,
    choices: u32,
}

/// How long something took of late, by the number of dimensions, for each of several things.
#[derive(Debug)]
pub struct Latencies<K>(Mutex<HashMap<K, Known>>);

impl<K> Default for Latencies<K> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

impl<K: Clone + Eq + Hash> Latencies<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what it took with that many dimensions. What was measured long ago counts no more then.
    pub fn note(&self, key: K, size: usize, took: Duration, now: Instant) {
        self.put(key, size, took, now, false);
    }

    fn put(&self, key: K, size: usize, took: Duration, now: Instant, unfinished: bool) {
        let ms = took.as_secs_f64() * 1e3;
        let mut all = self.lock();
        if all.len() >= KEPT && !all.contains_key(&key) {
            let last = |known: &Known| known.sizes.values().map(|one| one.at).max();
            let oldest = all.iter().min_by_key(|(_, known)| last(known));
            let oldest = oldest.map(|(key, _)| key.clone());
            oldest.and_then(|key| all.remove(&key));
        }
        let known = all.entry(key).or_insert_with(|| Known {
            sizes: BTreeMap::new(),
            tried: now,
            choices: 0,
        });
        let before = known.sizes.get(&size);
        let before = before.filter(|one| !one.unfinished && now.saturating_duration_since(one.at) < FRESH);
        let ms = before.map_or(ms, |one| one.ms + 0.2 * (ms - one.ms));
        let at = now;
        known.sizes.insert(size, Measured { ms, at, unfinished });
    }

    /// Notes that it was not done after so long: it counts when it is longer than what is known, until it is measured.
    pub fn note_unfinished(&self, key: K, size: usize, after: Duration, now: Instant) {
        let known = self.lock().get(&key).and_then(|known| estimate(&known.sizes, size));
        if known.is_none_or(|ms| ms < after.as_secs_f64() * 1e3) {
            self.put(key, size, after, now, true);
        }
    }

    /// The largest of the sizes (ascending) whose latency, on average, fits the budget; the smallest when none does. A size that
    /// was not measured is taken to lie on the line between its neighbours, to take no longer than the next larger one, or, when
    /// no larger one is known either, to fit.
    pub fn fitting(&self, key: &K, sizes: &[usize], budget_ms: Option<u32>) -> Chosen {
        let (least, full) = ends(sizes);
        let chosen = |size, rule| Chosen { size, rule };
        let Some(budget) = budget_ms.map(f64::from) else {
            return chosen(full, "no latency budget: full size");
        };
        let all = self.lock();
        let Some(known) = all.get(key) else {
            return chosen(full, "nothing was measured yet: full size");
        };
        for &size in sizes.iter().rev() {
            match estimate(&known.sizes, size) {
                None => return chosen(size, "nothing as large was measured yet"),
                Some(ms) if ms <= budget => {
                    return chosen(size, "the largest size whose measured latency fits the budget");
                }
                Some(_) => {}
            }
        }
        chosen(least, "no size fits the latency budget: the smallest")
    }

    /// The same for something that is measured: now and then, once a minute and in one of sixteen choices at most, the next
    /// larger size has a trial, so that what was slow once is not thought to be slow for good.
    pub fn choose(&self, key: &K, sizes: &[usize], budget_ms: Option<u32>, now: Instant) -> Chosen {
        let fitting = self.fitting(key, sizes, budget_ms);
        let larger = sizes.iter().copied().find(|size| *size > fitting.size);
        let mut all = self.lock();
        if let (Some(size), Some(known)) = (larger, all.get_mut(key)) {
            known.choices += 1;
            if known.choices >= CHOICES && now.saturating_duration_since(known.tried) >= FRESH {
                (known.tried, known.choices) = (now, 0);
                let rule = "a larger size than fits, by what was measured, is tried";
                return Chosen { size, rule };
            }
        }
        fitting
    }
}

fn ends(sizes: &[usize]) -> (usize, usize) {
    let (least, full) = (sizes.first(), sizes.last());
    (least.copied().unwrap_or(0), full.copied().unwrap_or(0))
}

/// Milliseconds that a size is thought to take; `None`: nothing that large was measured.
fn estimate(known: &BTreeMap<usize, Measured>, size: usize) -> Option<f64> {
    let (above, upper) = known.range(size..).next()?;
    let Some((below, lower)) = known.range(..size).next_back() else {
        return Some(upper.ms);
    };
    let share = (size - below) as f64 / (above - below) as f64;
    Some(lower.ms + share * (upper.ms - lower.ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &[usize] = &SIZES;

    fn ms(number: u64) -> Duration {
        Duration::from_millis(number)
    }

    #[test]
    fn the_table_is_the_specification() {
        let purpose = |query_length, results, budget_ms| Purpose {
            query_length,
            results,
            budget_ms,
        };
        for (purpose, size) in [
            (purpose(Some(0), Some(1), None), 256),
            (purpose(Some(19), Some(10), None), 256),
            (purpose(Some(20), Some(10), None), 1536),
            (purpose(Some(19), Some(11), None), 1536),
            (purpose(Some(19), None, None), 1536),
            (purpose(None, Some(10), None), 1536),
            (purpose(None, None, Some(0)), 256),
            (purpose(None, None, Some(49)), 256),
            (purpose(None, None, Some(50)), 384),
            (purpose(None, None, Some(99)), 384),
            (purpose(None, None, Some(100)), 768),
            (purpose(None, None, Some(199)), 768),
            (purpose(None, None, Some(200)), 1536),
            (purpose(None, None, None), 1536),
            // The rows stand in this order.
            (purpose(Some(19), Some(10), Some(500)), 256),
            (purpose(Some(20), Some(10), Some(120)), 768),
        ] {
            assert_eq!(by_table(&purpose).size, size, "{purpose:?}");
        }
    }

    #[test]
    fn a_models_sizes_end_with_its_own() {
        assert_eq!(sizes(100), [100]);
        assert_eq!(sizes(384), [256, 384]);
        assert_eq!(sizes(1024), [256, 384, 768, 1024]);
        assert_eq!(sizes(3072), [256, 384, 768, 1536, 3072]);
    }

    #[test]
    fn the_largest_size_that_fits_the_budget_is_taken() {
        let (latencies, now) = (Latencies::default(), Instant::now());
        let chosen = |budget_ms| latencies.fitting(&"ann", ALL, budget_ms).size;
        assert_eq!(chosen(Some(1)), 1536, "nothing was measured yet");
        for (size, took) in [(1536, 90), (768, 40), (256, 10)] {
            latencies.note("ann", size, ms(took), now);
        }
        // What 384 takes is not known; on the line between 256 and 768 it is 17.5 ms.
        for (budget_ms, size) in [
            (9, 256),
            (10, 256),
            (17, 256),
            (18, 384),
            (39, 384),
            (40, 768),
            (89, 768),
            (90, 1536),
        ] {
            assert_eq!(chosen(Some(budget_ms)), size, "{budget_ms} ms");
        }
        assert_eq!(chosen(None), 1536);
        assert_eq!(latencies.fitting(&"bob", ALL, Some(1)).size, 1536, "each has its own");
        // Full size has become quicker since: 90, 76, 64.8, … ms.
        for _ in 0..20 {
            latencies.note("ann", 1536, ms(20), now);
        }
        assert_eq!(chosen(Some(39)), 1536);
    }

    #[test]
    fn what_is_larger_than_all_that_was_measured_fits_until_it_is_measured() {
        let (latencies, now) = (Latencies::default(), Instant::now());
        latencies.note("ann", 256, ms(10), now);
        assert_eq!(latencies.fitting(&"ann", ALL, Some(5)).size, 1536);
        // Whoever left before it was done has told enough; that somebody left sooner tells nothing.
        latencies.note_unfinished("ann", 1536, ms(50), now);
        assert_eq!(latencies.fitting(&"ann", ALL, Some(10)).size, 256);
        latencies.note_unfinished("ann", 1536, ms(1), now);
        assert_eq!(latencies.fitting(&"ann", ALL, Some(10)).size, 256);
    }

    #[test]
    fn a_slow_start_is_made_up_for_size_by_size_and_seldom_at_the_cost_of_a_search() {
        let (latencies, began) = (Latencies::default(), Instant::now());
        // What each takes now; the first of all took three seconds.
        let takes = |size: usize| ms(10 + size as u64 / 100);
        latencies.note("ann", 1536, ms(3_000), began);
        let mut slow = 0;
        let mut chosen = Vec::new();
        for number in 0..400 {
            // Four a second.
            let now = began + ms(250 * number);
            let size = latencies.choose(&"ann", ALL, Some(20), now).size;
            slow += usize::from(takes(size) > ms(20));
            latencies.note("ann", size, takes(size), now);
            chosen.push(size);
        }
        assert_eq!((chosen[0], slow), (256, 0));
        // After a minute the next larger one is tried, and what is thought of those beyond it becomes less.
        assert_eq!(chosen[239], 256);
        assert_eq!(chosen[240], 384);
        let now = began + ms(100_000);
        for minute in 1..=4 {
            for _ in 0..CHOICES {
                let at = now + FRESH * minute;
                let size = latencies.choose(&"ann", ALL, Some(30), at).size;
                latencies.note("ann", size, takes(size), at);
            }
        }
        assert_eq!(latencies.fitting(&"ann", ALL, Some(30)).size, 1536);
    }

    #[test]
    fn who_searches_seldom_keeps_the_budget() {
        let (latencies, began) = (Latencies::default(), Instant::now());
        latencies.note("ann", 1536, ms(90), began);
        latencies.note("ann", 768, ms(10), began);
        let chosen = (1..=32).map(|hour| {
            let now = began + Duration::from_secs(3600) * hour;
            let size = latencies.choose(&"ann", ALL, Some(20), now).size;
            latencies.note("ann", size, ms(if size == 1536 { 90 } else { 10 }), now);
            size
        });
        assert_eq!(
            chosen.filter(|size| *size == 1536).count(),
            2,
            "one search in sixteen is a trial"
        );
    }

    #[test]
    fn the_number_of_things_is_bounded() {
        let (latencies, began) = (Latencies::default(), Instant::now());
        for number in 0..=KEPT {
            latencies.note(number, 1536, ms(90), began + ms(number as u64));
        }
        assert_eq!(latencies.0.lock().unwrap().len(), KEPT);
        assert_eq!(
            latencies.fitting(&0, ALL, Some(1)).size,
            1536,
            "the oldest is forgotten"
        );
        assert_eq!(latencies.fitting(&1, ALL, Some(1)).size, 256);
    }
}
