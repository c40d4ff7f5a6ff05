//! Listing models.

use super::App;
use crate::store::ModelInfo;

/// A model as it is listed.
#[derive(Clone, Debug)]
pub struct Listed {
    /// What there is to know about it.
    pub info: ModelInfo,
    /// An empty name means this one.
    pub default: bool,
}

impl App {
    /// The models, the default first.
    pub fn models(&self) -> Vec<Listed> {
        let listed = |(index, info): (usize, ModelInfo)| Listed {
            info,
            default: index == 0,
        };
        self.models
            .iter()
            .map(|model| model.info().clone())
            .enumerate()
            .map(listed)
            .collect()
    }
}
