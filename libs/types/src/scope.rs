//! The seven layers and where memories and callers stand in them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::{IdError, check_name};

/// Characters that one identifier of a scope may have.
pub const MAX_SCOPE_ID_CHARS: usize = 128;

/// The layers, general to specific; the order is the order of specificity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Layer {
    /// What the whole company shares.
    Company = 1,
    /// What one organisational unit shares.
    Org = 2,
    /// What one team shares.
    Team = 3,
    /// What everybody on one project shares.
    Project = 4,
    /// What belongs to one user.
    User = 5,
    /// What belongs to one session or conversation.
    Session = 6,
    /// What belongs to one agent.
    Agent = 7,
}

impl Layer {
    /// All of them, general to specific.
    pub const ALL: [Self; 7] = [
        Self::Company,
        Self::Org,
        Self::Team,
        Self::Project,
        Self::User,
        Self::Session,
        Self::Agent,
    ];

    /// Its number in the contracts, 1 to 7.
    pub fn number(self) -> i32 {
        self as i32
    }

    /// From its number in the contracts.
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|layer| layer.number() == number)
    }

    /// Its name in scopes and column names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Company => "company",
            Self::Org => "org",
            Self::Team => "team",
            Self::Project => "project",
            Self::User => "user",
            Self::Session => "session",
            Self::Agent => "agent",
        }
    }

    /// 0 for the most general layer, 1 for the most specific one.
    pub fn specificity(self) -> f64 {
        f64::from(self.number() - 1) / 6.0
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An identifier of a scope that is not well formed, or that contradicts another scope.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// The identifier of one layer is not well formed.
    #[error("{error}")]
    Identifier {
        /// The layer at fault.
        layer: Layer,
        /// What is wrong with it.
        error: IdError,
    },
    /// The layer is bound to another identifier.
    #[error("is outside of what the token is bound to")]
    OutOfBounds {
        /// The layer at fault.
        layer: Layer,
    },
}

impl ScopeError {
    /// The layer at fault.
    pub fn layer(&self) -> Layer {
        match self {
            Self::Identifier { layer, .. } | Self::OutOfBounds { layer } => *layer,
        }
    }
}

/// A place in the layers: an identifier for some of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Scope([Option<String>; 7]);

impl Scope {
    /// The identifier of a layer.
    pub fn get(&self, layer: Layer) -> Option<&str> {
        self.0[layer as usize - 1].as_deref()
    }

    /// Sets the identifier of a layer after checking it.
    pub fn set(&mut self, layer: Layer, id: &str) -> Result<(), ScopeError> {
        check_name(id, MAX_SCOPE_ID_CHARS).map_err(|error| ScopeError::Identifier { layer, error })?;
        self.0[layer as usize - 1] = Some(id.into());
        Ok(())
    }

    /// The same scope with one more layer; for tests and constants known to be well formed.
    pub fn with(mut self, layer: Layer, id: &str) -> Result<Self, ScopeError> {
        self.set(layer, id)?;
        Ok(self)
    }

    /// The layers that are set, general to specific.
    pub fn layers(&self) -> impl Iterator<Item = (Layer, &str)> {
        Layer::ALL
            .into_iter()
            .filter_map(|layer| self.get(layer).map(|id| (layer, id)))
    }

    /// The most specific layer that is set: the one a memory with this scope lives in.
    pub fn layer(&self) -> Option<Layer> {
        self.layers().last().map(|(layer, _)| layer)
    }

    /// True when no layer is set.
    pub fn is_empty(&self) -> bool {
        self.layer().is_none()
    }

    /// True when somebody who stands in `self` sees what lives in `other`: all that `other` names is the same here.
    pub fn sees(&self, other: &Self) -> bool {
        other.layers().all(|(layer, id)| self.get(layer) == Some(id))
    }

    /// The scope within `bound`: what `bound` names is filled in, and naming something else is an error.
    pub fn within(&self, bound: &Self) -> Result<Self, ScopeError> {
        let mut result = self.clone();
        for (layer, id) in bound.layers() {
            match self.get(layer) {
                None => result.0[layer as usize - 1] = Some(id.into()),
                Some(own) if own == id => {}
                Some(_) => return Err(ScopeError::OutOfBounds { layer }),
            }
        }
        Ok(result)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (layer, id)) in self.layers().enumerate() {
            write!(f, "{}{layer}={id}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(pairs: &[(Layer, &str)]) -> Scope {
        pairs
            .iter()
            .fold(Scope::default(), |scope, (layer, id)| scope.with(*layer, id).unwrap())
    }

    #[test]
    fn a_caller_sees_every_layer_it_stands_in_and_no_other() {
        let ann = scope(&[(Layer::Company, "acme"), (Layer::Team, "core"), (Layer::User, "ann")]);
        assert!(ann.sees(&scope(&[(Layer::Company, "acme")])));
        assert!(ann.sees(&scope(&[(Layer::User, "ann")])));
        assert!(ann.sees(&scope(&[(Layer::Company, "acme"), (Layer::User, "ann")])));
        assert!(!ann.sees(&scope(&[(Layer::User, "bob")])));
        assert!(!ann.sees(&scope(&[(Layer::Company, "acme"), (Layer::Session, "s")])));
        assert!(!scope(&[(Layer::User, "ann")]).sees(&ann));
    }

    #[test]
    fn a_memory_lives_in_its_most_specific_layer() {
        assert_eq!(
            scope(&[(Layer::User, "a"), (Layer::Company, "c")]).layer(),
            Some(Layer::User)
        );
        assert_eq!(Scope::default().layer(), None);
    }

    #[test]
    fn a_bound_fills_gaps_and_refuses_another_value() {
        let bound = scope(&[(Layer::User, "ann")]);
        let filled = scope(&[(Layer::Team, "core")]).within(&bound).unwrap();
        assert_eq!(filled, scope(&[(Layer::Team, "core"), (Layer::User, "ann")]));
        let error = scope(&[(Layer::User, "bob")]).within(&bound).unwrap_err();
        assert_eq!(error, ScopeError::OutOfBounds { layer: Layer::User });
    }
}
