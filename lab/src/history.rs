//! What was asked and answered while the load ran.

use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde::Serialize;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A memory was added; its content is the key.
    Add,
    /// A counter was set to a value.
    Count,
    /// A counter was read by a holder of a token, who must see at least `floor`.
    Read,
    /// A watcher was told of an added memory; `took` is the time since its Add was asked for, as far as that is known.
    Hear,
    /// A reader of the live streams read of an added memory; the value is its place. A gap counts as failed.
    Fan,
    /// A memory was searched for by a holder of the token of its Add: 1 is found, which `floor` wants.
    Search,
    /// The same by its vector alone; an answer without the dense arm counts as failed.
    Near,
}

/// One attempt.
#[derive(Clone, Debug, Serialize)]
pub struct Operation {
    pub kind: Kind,
    /// The content, or the name of the counter.
    pub key: String,
    /// The value written or read.
    pub value: u64,
    /// The least value that may be read.
    pub floor: u64,
    /// When the answer came, since the load began.
    pub at: Duration,
    /// How long it took.
    pub took: Duration,
    pub outcome: Outcome,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Done,
    /// An Add that found its content there: some earlier attempt had been made and was forgotten.
    Doubled,
    /// The code of the error. Whether it was done nobody knows.
    Failed(String),
}

/// Everything so far.
#[derive(Debug)]
pub struct History {
    began: Instant,
    operations: Mutex<Vec<Operation>>,
}

impl History {
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            operations: Mutex::default(),
        }
    }

    /// The time since the load began.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    pub fn add(&self, operation: Operation) {
        self.operations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(operation);
    }

    /// Everything in the order of the answers.
    pub fn all(&self) -> Vec<Operation> {
        let mut all = self.operations.lock().unwrap_or_else(PoisonError::into_inner).clone();
        all.sort_by_key(|operation| operation.at);
        all
    }

    /// Whether an operation of these kinds that was asked for after a moment has been done.
    pub fn done_since(&self, kinds: &[Kind], moment: Duration) -> bool {
        let operations = self.operations.lock().unwrap_or_else(PoisonError::into_inner);
        let late = |operation: &&Operation| operation.at.saturating_sub(operation.took) > moment;
        let mut done = operations.iter().filter(|operation| operation.outcome == Outcome::Done);
        done.any(|operation| late(&operation) && kinds.contains(&operation.kind))
    }
}

/// Writes a history, one JSON object a line.
///
/// # Errors
/// When the file can't be written.
pub fn write(operations: &[Operation], file: &Path) -> anyhow::Result<()> {
    let mut text = String::new();
    for operation in operations {
        text += &serde_json::to_string(operation)?;
        text.push('\n');
    }
    Ok(std::fs::write(file, text)?)
}

/// The longest time from one moment on, until the end, in which nothing of these kinds was done.
pub fn longest_stop(operations: &[Operation], kinds: &[Kind], from: Duration, end: Duration) -> Duration {
    let done = operations.iter().filter(|operation| {
        operation.outcome == Outcome::Done && kinds.contains(&operation.kind) && operation.at > from
    });
    let (mut last, mut longest) = (from, Duration::ZERO);
    for at in done.map(|operation| operation.at).chain([end]) {
        longest = longest.max(at.saturating_sub(last));
        last = at;
    }
    longest
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn operation(kind: Kind, key: &str, value: u64, at: u64, outcome: Outcome) -> Operation {
        Operation {
            kind,
            key: key.into(),
            value,
            floor: 0,
            at: Duration::from_secs(at),
            took: Duration::from_millis(1),
            outcome,
        }
    }

    #[test]
    fn a_stop_is_the_longest_time_without_success() {
        let done = |kind, at| operation(kind, "k", 1, at, Outcome::Done);
        let failed = operation(Kind::Add, "k", 1, 12, Outcome::Failed("x".into()));
        let all = [
            done(Kind::Add, 1),
            done(Kind::Count, 10),
            failed,
            done(Kind::Read, 13),
            done(Kind::Add, 17),
        ];
        let stop = |kinds: &[Kind], from| longest_stop(&all, kinds, Duration::from_secs(from), Duration::from_secs(20));
        assert_eq!(stop(&[Kind::Add, Kind::Count], 9), Duration::from_secs(7));
        // Not before the fault, and until the end.
        assert_eq!(stop(&[Kind::Read], 12), Duration::from_secs(7));
        assert_eq!(stop(&[Kind::Search], 5), Duration::from_secs(15));
    }
}
