//! URIs that choose an adapter.

use std::fmt;
use std::str::FromStr;

/// `scheme:rest`, for instance `sqlite:data/memory.db` or `postgres://h1,h2/db`.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreUri {
    /// What chooses the adapter.
    pub scheme: String,
    /// What the adapter reads.
    pub rest: String,
}

impl FromStr for StoreUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once(':').ok_or("write `scheme:…`, for instance `sqlite:`")?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '+';
        if scheme.is_empty() || !scheme.chars().all(plain) {
            return Err("the scheme before `:` must be lower-case letters, digits or `+`".into());
        }
        Ok(Self {
            scheme: scheme.into(),
            rest: rest.into(),
        })
    }
}

impl fmt::Debug for StoreUri {
    /// Without what follows the scheme, which may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:…", self.scheme)
    }
}
