//! Identifiers, parsed once at the door.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::str::FromStr;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use uuid::{ContextV7, Uuid};

use crate::Timestamp;

/// An identifier that is not well formed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not a UUID in its canonical text form.
    #[error("is not a UUID; send an id as the server gave it")]
    NotUuid,
    /// Empty or too long.
    #[error("must have 1 to {0} characters")]
    Length(usize),
    /// A character that identifiers don't have.
    #[error("has the character {0:?}; use letters, digits and `._@:/+=-`")]
    Character(char),
}

/// Id of a memory: a UUIDv7, so that ids sort by the time they were made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemoryId(Uuid);

impl MemoryId {
    /// A new id that carries `now` with millisecond precision. Ids that one process makes ascend, within a millisecond
    /// and when the clock goes backwards, too.
    pub fn new(now: Timestamp) -> Self {
        static COUNTER: Mutex<AssertUnwindSafe<ContextV7>> = Mutex::new(AssertUnwindSafe(ContextV7::new()));
        let (seconds, nanos) = now.parts();
        let time = uuid::Timestamp::from_unix(
            &COUNTER,
            u64::try_from(seconds).unwrap_or(0),
            u32::try_from(nanos).unwrap_or(0),
        );
        Self(Uuid::new_v7(time))
    }

    /// From its 16 bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// Its 16 bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl FromStr for MemoryId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() != 36 {
            return Err(IdError::NotUuid);
        }
        Uuid::try_parse(text).map(Self).map_err(|_| IdError::NotUuid)
    }
}

impl fmt::Display for MemoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for MemoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Checks an identifier that a person or program chose: 1 to `max` characters out of letters, digits and `._@:/+=-`.
pub(crate) fn check_name(text: &str, max: usize) -> Result<(), IdError> {
    let chars = text.chars().take(max + 1).count();
    if chars == 0 || chars > max {
        return Err(IdError::Length(max));
    }
    match text.chars().find(|c| !(c.is_alphanumeric() || "._@:/+=-".contains(*c))) {
        Some(other) => Err(IdError::Character(other)),
        None => Ok(()),
    }
}

/// Id of a tenant: the wall that no call crosses. It comes from the token only.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TenantId(String);

impl TenantId {
    /// The tenant of a standalone installation without tokens.
    pub fn local() -> Self {
        Self("local".into())
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TenantId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        check_name(text, 128).map(|()| Self(text.into()))
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The caller's id of a write, which makes a retry safe.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(String);

impl RequestId {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RequestId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        check_name(text, 128).map(|()| Self(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_sort_by_time_and_round_trip() {
        let early = MemoryId::new(Timestamp::from_micros(1_700_000_000_000_000).unwrap());
        let late = MemoryId::new(Timestamp::from_micros(1_700_000_000_001_000).unwrap());
        assert!(early < late);
        assert_eq!(early.to_string().parse(), Ok(early));
    }

    #[test]
    fn ids_of_one_moment_ascend() {
        let now = Timestamp::from_micros(1_700_000_000_000_000).unwrap();
        let ids: Vec<MemoryId> = (0..10_000).map(|_| MemoryId::new(now)).collect();
        assert!(ids.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn only_the_canonical_form_is_an_id() {
        for bad in [
            "",
            "x",
            "00000000000000000000000000000000",
            "{00000000-0000-7000-8000-000000000000}",
        ] {
            assert_eq!(bad.parse::<MemoryId>(), Err(IdError::NotUuid), "{bad}");
        }
    }

    #[test]
    fn names_refuse_control_characters_and_say_which() {
        assert_eq!("a\0b".parse::<TenantId>(), Err(IdError::Character('\0')));
        assert_eq!("".parse::<TenantId>(), Err(IdError::Length(128)));
        assert_eq!("x".repeat(129).parse::<RequestId>(), Err(IdError::Length(128)));
        assert!("team-ä/é_1".parse::<TenantId>().is_ok());
    }
}
