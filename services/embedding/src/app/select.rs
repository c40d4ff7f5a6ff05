//! Choosing how many dimensions a vector should have.

use aeterna_types::dimension::{Chosen, Purpose, by_table};

use super::App;
use crate::error::EmbeddingError;

/// Who chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The table.
    #[default]
    Rule,
    /// The use case, which names a size.
    Size(usize),
    /// What was measured: the best quality that fits the budget.
    Measured,
}

/// What a vector is for.
#[derive(Clone, Debug, Default)]
pub struct SelectionRequest {
    /// Name of the model; empty: the default.
    pub model: String,
    /// What the use case names.
    pub choice: Choice,
    /// What is known about the search.
    pub purpose: Purpose,
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

impl App {
    /// Chooses the dimensions, clipped to the model.
    ///
    /// # Errors
    /// When the model is unknown.
    pub fn select(&self, request: &SelectionRequest) -> Result<Selection, EmbeddingError> {
        let index = self.model(&request.model)?;
        let info = self.models[index].info();
        let budget_ms = request.purpose.budget_ms;
        let Chosen { size, rule } = match request.choice {
            Choice::Rule => by_table(&request.purpose),
            Choice::Size(size) => Chosen { size, rule: "use case" },
            Choice::Measured => self.latencies.fitting(&index, &info.sizes(), budget_ms),
        };
        let dimension = size.min(info.dimension);
        Ok(Selection {
            dimension,
            rule,
            model: info.name.clone(),
            untrained_truncation: dimension < info.dimension && !info.matryoshka,
        })
    }
}
