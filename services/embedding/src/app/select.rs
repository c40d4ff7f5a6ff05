//! Choosing how many dimensions a search should use: the specification's rule as a table.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::App;
use crate::error::EmbeddingError;

/// Who chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The rule.
    #[default]
    Rule,
    /// The use case, which names a size.
    Size(usize),
    /// What was measured: the best quality that fits the budget.
    Measured,
}

/// How long single texts took of late, by model and size: a moving average in milliseconds. Answers from the cache do not
/// count.
#[derive(Debug, Default)]
pub struct Latencies(Mutex<HashMap<(usize, usize), f64>>);

impl Latencies {
    /// Notes what one text took.
    pub fn note(&self, model: usize, size: usize, took: Duration) {
        let took = took.as_secs_f64() * 1e3;
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry((model, size))
            .and_modify(|average| *average += 0.2 * (took - *average))
            .or_insert(took);
    }

    /// What a size takes; a size that nobody has asked for yet takes as long as the next larger one that somebody has.
    fn of(&self, model: usize, size: usize) -> Option<f64> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.iter().filter(|((of, other), _)| *of == model && *other >= size);
        known.min_by_key(|((_, other), _)| *other).map(|(_, ms)| *ms)
    }
}

/// What is known about a search.
#[derive(Clone, Debug, Default)]
pub struct SelectionRequest {
    /// Name of the model; empty: the default.
    pub model: String,
    /// What the use case names.
    pub choice: Choice,
    /// Characters of the query; `None`: unknown.
    pub query_length: Option<usize>,
    /// Results wanted; `None`: unknown.
    pub results: Option<usize>,
    /// Milliseconds; `None`: no limit.
    pub budget_ms: Option<u32>,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Dimensions.
    pub dimension: usize,
    /// Which rule chose them.
    pub rule: &'static str,
    /// The model.
    pub model: String,
    /// The model was not trained for this truncation.
    pub untrained_truncation: bool,
}

type Applies = fn(&SelectionRequest) -> bool;

/// The first row that applies is taken.
const RULES: &[(&str, usize, Applies)] = &[
    (
        "query shorter than 20 characters and at most 10 results",
        256,
        |request| request.query_length.is_some_and(|n| n < 20) && request.results.is_some_and(|n| n <= 10),
    ),
    ("latency budget below 50 ms", 256, |request| {
        request.budget_ms.is_some_and(|ms| ms < 50)
    }),
    ("latency budget below 100 ms", 384, |request| {
        request.budget_ms.is_some_and(|ms| ms < 100)
    }),
    ("latency budget below 200 ms", 768, |request| {
        request.budget_ms.is_some_and(|ms| ms < 200)
    }),
    ("no reason for less", 1536, |_| true),
];

impl App {
    /// Chooses the dimensions, clipped to the model.
    ///
    /// # Errors
    /// When the model is unknown.
    pub fn select(&self, request: &SelectionRequest) -> Result<Selection, EmbeddingError> {
        let index = self.model(&request.model)?;
        let info = self.models[index].info();
        let (rule, size) = match request.choice {
            Choice::Measured => self.measured(index, request.budget_ms),
            _ => choose(request),
        };
        let dimension = size.min(info.dimension);
        Ok(Selection {
            dimension,
            rule,
            model: info.name.clone(),
            untrained_truncation: dimension < info.dimension && !info.matryoshka,
        })
    }

    fn measured(&self, index: usize, budget_ms: Option<u32>) -> (&'static str, usize) {
        let sizes = self.models[index].info().sizes();
        fitting(&sizes, budget_ms, |size| self.latencies.of(index, size))
    }
}

/// The largest size whose measured latency fits the budget; the smallest one when none does.
fn fitting(sizes: &[usize], budget_ms: Option<u32>, latency: impl Fn(usize) -> Option<f64>) -> (&'static str, usize) {
    let (least, full) = (sizes.first().copied().unwrap_or(0), sizes.last().copied().unwrap_or(0));
    let Some(budget) = budget_ms.map(f64::from) else {
        return ("no latency budget: full size", full);
    };
    let fits = |size: &usize| latency(*size).is_none_or(|ms| ms <= budget);
    match sizes.iter().copied().rev().find(fits) {
        Some(size) if latency(size).is_none() => ("nothing was measured yet: full size", size),
        Some(size) => ("the largest size whose measured latency fits the budget", size),
        None => ("no size fits the latency budget: the smallest", least),
    }
}

fn choose(request: &SelectionRequest) -> (&'static str, usize) {
    if let Choice::Size(size) = request.choice {
        return ("use case", size);
    }
    let row = RULES.iter().find(|(_, _, applies)| applies(request));
    row.map_or(("no reason for less", 1536), |(rule, size, _)| (rule, *size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_speaks_for_smaller_sizes_too() {
        let latencies = Latencies::default();
        assert_eq!(latencies.of(0, 256), None);
        latencies.note(0, 1536, Duration::from_millis(100));
        latencies.note(0, 384, Duration::from_millis(20));
        assert_eq!((latencies.of(0, 256), latencies.of(0, 768)), (Some(20.0), Some(100.0)));
        assert_eq!(latencies.of(1, 256), None);
        latencies.note(0, 384, Duration::from_millis(70));
        assert!((latencies.of(0, 384).unwrap() - 30.0).abs() < 1e-9);
    }

    #[test]
    fn the_largest_size_that_fits_the_budget_is_taken() {
        let latencies = Latencies::default();
        let sizes = [256, 384, 768, 1536];
        let chosen = |budget_ms| fitting(&sizes, budget_ms, |size| latencies.of(0, size)).1;
        assert_eq!(chosen(Some(1)), 1536, "nothing was measured yet");
        for (size, ms) in [(1536, 90), (768, 40), (256, 10)] {
            latencies.note(0, size, Duration::from_millis(ms));
        }
        // What 384 takes is not known, but it is no more than what 768 does.
        for (budget_ms, size) in [(9, 256), (10, 256), (39, 256), (40, 768), (89, 768), (90, 1536)] {
            assert_eq!(chosen(Some(budget_ms)), size, "{budget_ms} ms");
        }
        assert_eq!(chosen(None), 1536);
        // Full size has become quicker since.
        for _ in 0..20 {
            latencies.note(0, 1536, Duration::from_millis(20));
        }
        assert_eq!(chosen(Some(39)), 1536);
    }

    #[test]
    fn the_table_is_the_specification() {
        let request = |query_length, results, budget_ms| SelectionRequest {
            query_length,
            results,
            budget_ms,
            ..SelectionRequest::default()
        };
        for (request, size) in [
            (request(Some(19), Some(10), None), 256),
            (request(Some(20), Some(10), None), 1536),
            (request(Some(19), Some(11), None), 1536),
            (request(None, None, Some(49)), 256),
            (request(None, None, Some(50)), 384),
            (request(None, None, Some(100)), 768),
            (request(None, None, Some(200)), 1536),
        ] {
            assert_eq!(choose(&request).1, size, "{request:?}");
        }
    }
}
