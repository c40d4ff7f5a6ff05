//! Time as a dependency, so that tests own it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use serde::{Deserialize, Serialize};

/// A point in time: microseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The earliest time the contracts allow: 0001-01-01T00:00:00Z.
    pub const MIN: Self = Self(-62_135_596_800_000_000);
    /// The latest time the contracts allow: 9999-12-31T23:59:59.999999Z.
    pub const MAX: Self = Self(253_402_300_799_999_999);

    /// From microseconds since the epoch; `None` outside of the years 1 to 9999.
    pub fn from_micros(micros: i64) -> Option<Self> {
        (Self::MIN.0..=Self::MAX.0).contains(&micros).then_some(Self(micros))
    }

    /// From seconds and nanoseconds as protobuf carries them; `None` outside of the years 1 to 9999.
    pub fn from_parts(seconds: i64, nanos: i32) -> Option<Self> {
        if !(0..1_000_000_000).contains(&nanos) {
            return None;
        }
        Self::from_micros(seconds.checked_mul(1_000_000)?.checked_add(i64::from(nanos) / 1000)?)
    }

    /// Microseconds since the epoch.
    pub fn micros(self) -> i64 {
        self.0
    }

    /// Seconds and nanoseconds as protobuf carries them.
    pub fn parts(self) -> (i64, i32) {
        let nanos = self.0.rem_euclid(1_000_000) * 1000;
        (self.0.div_euclid(1_000_000), i32::try_from(nanos).unwrap_or(0))
    }

    /// Whole seconds that passed since `earlier`; negative when `earlier` is later.
    pub fn seconds_since(self, earlier: Self) -> f64 {
        (self.0 - earlier.0) as f64 / 1e6
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(time) => write!(f, "{time}"),
            Err(_) => write!(f, "{} µs", self.0),
        }
    }
}

/// A text that is no time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is no time; write `2024-01-31T10:30:00Z`, or `2024-01-31` for the start of that day in UTC")]
pub struct TimeError;

impl FromStr for Timestamp {
    type Err = TimeError;

    /// RFC 3339, or a date.
    fn from_str(text: &str) -> Result<Self, TimeError> {
        // A date alone; the parser of dates would also take, and drop, a time behind it.
        let moment = if text.len() == "2024-01-31".len() {
            let date = text.parse::<jiff::civil::Date>().map_err(|_| TimeError)?;
            date.to_zoned(jiff::tz::TimeZone::UTC).map(|time| time.timestamp())
        } else {
            text.parse::<jiff::Timestamp>()
        };
        let moment = moment.map_err(|_| TimeError)?;
        Self::from_micros(moment.as_microsecond()).ok_or(TimeError)
    }
}

/// Where the time comes from.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The time now.
    fn now(&self) -> Timestamp;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp(jiff::Timestamp::now().as_microsecond())
    }
}

/// A clock that stands still until it is set.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<AtomicI64>);

impl ManualClock {
    /// A clock that shows `now`.
    pub fn at(now: Timestamp) -> Self {
        Self(Arc::new(AtomicI64::new(now.0)))
    }

    /// Sets the time.
    pub fn set(&self, now: Timestamp) {
        self.0.store(now.0, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protobuf_parts_round_trip_on_both_sides_of_the_epoch() {
        for micros in [-1_500_001, -1, 0, 1, 1_700_000_000_123_456] {
            let time = Timestamp::from_micros(micros).unwrap();
            let (seconds, nanos) = time.parts();
            assert_eq!(Timestamp::from_parts(seconds, nanos), Some(time));
        }
    }

    #[test]
    fn times_are_read_as_they_are_printed() {
        let time: Timestamp = "2023-05-08T13:56:00.25+02:00".parse().unwrap();
        assert_eq!(time.to_string().parse(), Ok(time));
        assert_eq!(
            "2023-05-08".parse::<Timestamp>().map(Timestamp::micros),
            Ok(1_683_504_000_000_000)
        );
        for bad in ["", "yesterday", "2023-13-01", "2023-05-08 13:56"] {
            assert_eq!(bad.parse::<Timestamp>(), Err(TimeError), "{bad}");
        }
    }

    #[test]
    fn times_that_no_calendar_holds_are_refused() {
        assert_eq!(Timestamp::from_parts(i64::MAX, 0), None);
        assert_eq!(Timestamp::from_parts(0, -1), None);
        assert_eq!(Timestamp::from_parts(0, 1_000_000_000), None);
        assert_eq!(Timestamp::from_micros(Timestamp::MAX.micros() + 1), None);
    }
}
