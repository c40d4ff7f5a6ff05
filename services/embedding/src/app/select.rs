//! Choosing how many dimensions a search should use: the specification's rule as a table.

use super::App;
use crate::error::EmbeddingError;

/// What is known about a search.
#[derive(Clone, Debug, Default)]
pub struct SelectionRequest {
    /// Name of the model; empty: the default.
    pub model: String,
    /// The size that the use case names; `None`: let the rule choose.
    pub size: Option<usize>,
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
        let info = self.models[self.model(&request.model)?].info();
        let (rule, size) = choose(request);
        let dimension = size.min(info.dimension);
        Ok(Selection {
            dimension,
            rule,
            model: info.name.clone(),
            untrained_truncation: dimension < info.dimension && !info.matryoshka,
        })
    }
}

fn choose(request: &SelectionRequest) -> (&'static str, usize) {
    if let Some(size) = request.size {
        return ("use case", size);
    }
    let row = RULES.iter().find(|(_, _, applies)| applies(request));
    row.map_or(("no reason for less", 1536), |(rule, size, _)| (rule, *size))
}

#[cfg(test)]
mod tests {
    use super::*;

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
