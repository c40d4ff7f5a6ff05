//! Typed reading with collected problems.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use crate::{Problems, Secret, Settings};

/// Reads typed values out of [`Settings`]; problems are kept until [`Reader::finish`].
#[derive(Debug)]
pub struct Reader<'a> {
    settings: &'a Settings,
    problems: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(settings: &'a Settings) -> Self {
        Self {
            settings,
            problems: Vec::new(),
        }
    }

    /// Notes that the value of `key` is wrong.
    pub fn problem(&mut self, key: &str, what: impl Display) {
        let Some(entry) = self.settings.0.get(key) else {
            return self.problems.push(format!("`{key}` is read but not declared"));
        };
        let shown = if entry.setting.file_key.is_some() {
            "***".into()
        } else {
            crate::masked(&entry.value)
        };
        self.problems
            .push(format!("`{key}` is `{shown}` ({}): {what}", entry.origin));
    }

    /// Notes that the value of `key` is wrong, without showing it.
    pub fn hidden_problem(&mut self, key: &str, what: impl Display) {
        let origin = self.settings.0.get(key).map_or("unknown", |entry| &entry.origin);
        self.problems.push(format!("`{key}` ({origin}): {what}"));
    }

    /// The value, parsed; `None` after noting a problem.
    pub fn get<T: FromStr<Err: Display>>(&mut self, key: &str) -> Option<T> {
        let text = self.text(key)?;
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.problem(key, error);
                None
            }
        }
    }

    /// The value, parsed and within a range; `None` after noting a problem.
    pub fn within<T>(&mut self, key: &str, range: std::ops::RangeInclusive<T>) -> Option<T>
    where
        T: FromStr<Err: Display> + PartialOrd + Display,
    {
        let value: T = self.get(key)?;
        if range.contains(&value) {
            return Some(value);
        }
        self.problem(key, format!("must be {} to {}", range.start(), range.end()));
        None
    }

    /// The value when it is set: `Some(None)` when it is empty, `None` after noting a problem.
    pub fn optional<T: FromStr<Err: Display>>(&mut self, key: &str) -> Option<Option<T>> {
        if self.settings.value(key) == Some("") {
            Some(None)
        } else {
            self.get(key).map(Some)
        }
    }

    /// The value as text.
    pub fn text(&mut self, key: &str) -> Option<String> {
        match self.settings.value(key) {
            Some(value) => Some(value.into()),
            None => {
                self.problem(key, "");
                None
            }
        }
    }

    /// The values of a list separated by commas.
    pub fn list(&mut self, key: &str) -> Option<Vec<String>> {
        let text = self.text(key)?;
        Some(
            text.split(',')
                .map(str::trim)
                .filter(|item| !item.is_empty())
                .map(Into::into)
                .collect(),
        )
    }

    /// A secret when it is set.
    pub fn secret(&mut self, key: &str) -> Option<Option<Secret>> {
        self.text(key).map(|text| (!text.is_empty()).then(|| Secret::new(text)))
    }

    /// A duration such as `250ms`, `5s`, `2m` or `1h`.
    pub fn duration(&mut self, key: &str) -> Option<Duration> {
        let text = self.text(key)?;
        let parsed = parse_duration(&text);
        parsed.map_err(|error| self.problem(key, error)).ok()
    }

    /// The value built from what was read, or every problem noted on the way.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Problems> {
        match (self.problems.is_empty(), value) {
            (true, Some(value)) => Ok(value),
            (true, None) => Err(Problems(vec!["a value is missing".into()])),
            (false, _) => Err(Problems(self.problems)),
        }
    }
}

/// A duration such as `250ms`, `5s`, `2m` or `1h`.
///
/// # Errors
/// A sentence that says how to write one.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number = number.parse::<u64>().ok();
    let parsed = number.and_then(|number| match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    });
    parsed.ok_or_else(|| "write a number with a unit: `250ms`, `5s`, `2m` or `1h`".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "5", "s", "-1s", "1 s", "1.5s", "99999999999999999999s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
