//! Decides from a history and from what is there in the end.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::history::{Kind, Operation, Outcome};

/// What is stored in the end.
#[derive(Debug, Default)]
pub struct Stored {
    /// How often each content is there.
    pub contents: BTreeMap<String, u64>,
    /// Every value that each counter ever had, in order.
    pub counters: BTreeMap<String, Vec<u64>>,
}

/// What the history says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Writes that were acknowledged.
    pub acknowledged: u64,
    /// Acknowledged writes that are not there.
    pub lost: u64,
    /// Writes that are there more than once.
    pub duplicated: u64,
    /// What is there although nobody sent it, or in an order in which nobody did; and what watchers or readers of the streams
    /// were told of and is not there.
    pub phantom: u64,
    /// Reads by the holder of a token that did not see what it stands for.
    pub went_back: u64,
    /// Acknowledged memories that a watcher, or a reader of the live streams, was not told of, or not in the order in which they
    /// were added, or twice. After a gap in a stream its reader has asked the store for what was acknowledged before.
    pub untold: u64,
}

impl Verdict {
    /// Nothing happened that must not.
    pub fn is_clean(&self) -> bool {
        self.acknowledged > 0 && self.lost + self.duplicated + self.phantom + self.went_back + self.untold == 0
    }
}

/// Compares what was acknowledged with what is there.
pub fn check(operations: &[Operation], stored: &Stored) -> Verdict {
    let mut verdict = Verdict::default();
    let mut sent = BTreeSet::new();
    let mut acknowledged = BTreeSet::new();
    let mut told = BTreeMap::<&str, u64>::new();
    let mut last = BTreeMap::<&str, u64>::new();
    let (mut streamed, mut read, mut place) = (BTreeSet::new(), BTreeSet::new(), 0);
    let mut asked = BTreeMap::new();
    let gaps = operations
        .iter()
        .filter(|read| read.kind == Kind::Fan && read.outcome == Outcome::Failed("Gap".into()));
    let gap = gaps.map(|read| read.at).max();
    for operation in operations {
        let done = operation.outcome == Outcome::Done;
        match operation.kind {
            Kind::Add | Kind::Count => {
                let write = (operation.kind, operation.key.as_str(), operation.value);
                sent.insert(write);
                if operation.outcome == Outcome::Doubled {
                    verdict.duplicated += 1;
                }
                if operation.outcome == Outcome::Doubled || done {
                    acknowledged.insert(write);
                }
                let first = *asked
                    .entry(operation.key.as_str())
                    .or_insert(operation.at.saturating_sub(operation.took));
                if gap.is_some_and(|gap| first <= gap) {
                    streamed.insert(operation.key.as_str());
                }
            }
            // One writer adds its memories in the order of their values.
            Kind::Hear if done => {
                *told.entry(operation.key.as_str()).or_default() += 1;
                let writer = operation.key.split(' ').next().unwrap_or_default();
                let before = last.insert(writer, operation.value).unwrap_or(0);
                verdict.untold += u64::from(operation.value <= before);
            }
            Kind::Fan if done => {
                read.insert(operation.key.as_str());
                streamed.insert(operation.key.as_str());
                verdict.untold += u64::from(operation.value <= place);
                place = operation.value;
            }
            Kind::Hear | Kind::Fan => {}
            Kind::Read | Kind::Search | Kind::Near => {
                if done && operation.value < operation.floor {
                    verdict.went_back += 1;
                }
            }
        }
    }
    verdict.acknowledged = acknowledged.len() as u64;
    // Counters have been there before the load, and what nobody was acknowledged has no name but its identifier.
    let there = |key: &str| stored.contents.contains_key(key) || key.contains(" counts ");
    verdict.phantom += told.keys().chain(&read).filter(|key| !there(key)).count() as u64;
    for (kind, key, value) in &acknowledged {
        let there = match kind {
            Kind::Add => stored.contents.contains_key(*key),
            _ => stored.counters.get(*key).is_some_and(|values| values.contains(value)),
        };
        verdict.lost += u64::from(!there);
        verdict.untold += u64::from(*kind == Kind::Add && !(told.contains_key(key) && streamed.contains(key)));
    }
    for (content, count) in &stored.contents {
        verdict.duplicated += count.saturating_sub(1);
        verdict.phantom += u64::from(!sent.contains(&(Kind::Add, content.as_str(), 0)));
    }
    for (counter, values) in &stored.counters {
        let distinct = BTreeSet::from_iter(values);
        verdict.duplicated += (values.len() - distinct.len()) as u64;
        let known = |value: &u64| sent.contains(&(Kind::Count, counter.as_str(), *value));
        let unknown = distinct.iter().filter(|value| !known(value)).count();
        let falls = values.windows(2).filter(|pair| pair[1] < pair[0]).count();
        verdict.phantom += (unknown + falls) as u64;
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::operation;

    fn history() -> (Vec<Operation>, Stored) {
        let failed = || Outcome::Failed("UNAVAILABLE".into());
        let mut read = operation(Kind::Read, "c", 2, 6, Outcome::Done);
        read.floor = 2;
        let operations = vec![
            operation(Kind::Add, "a", 0, 1, failed()),
            operation(Kind::Add, "a", 0, 2, Outcome::Done),
            operation(Kind::Hear, "a", 1, 2, Outcome::Done),
            operation(Kind::Fan, "a", 7, 2, Outcome::Done),
            operation(Kind::Add, "b", 0, 3, failed()),
            operation(Kind::Count, "c", 1, 4, Outcome::Done),
            operation(Kind::Count, "c", 2, 5, Outcome::Done),
            read,
        ];
        let stored = Stored {
            contents: BTreeMap::from([("a".to_owned(), 1)]),
            counters: BTreeMap::from([("c".to_owned(), vec![1, 2])]),
        };
        (operations, stored)
    }

    fn verdict(change: impl Fn(&mut Vec<Operation>, &mut Stored)) -> [u64; 6] {
        let (mut operations, mut stored) = history();
        change(&mut operations, &mut stored);
        let verdict = check(&operations, &stored);
        let counts = [
            verdict.lost,
            verdict.duplicated,
            verdict.phantom,
            verdict.went_back,
            verdict.untold,
        ];
        assert_eq!(verdict.is_clean(), counts == [0; 5]);
        let [lost, duplicated, phantom, went_back, untold] = counts;
        [verdict.acknowledged, lost, duplicated, phantom, went_back, untold]
    }

    #[test]
    fn what_must_not_be_is_found() {
        assert_eq!(verdict(|_, _| ()), [3, 0, 0, 0, 0, 0]);
        // What failed may be there or not.
        let there = |_: &mut Vec<_>, stored: &mut Stored| _ = stored.contents.insert("b".into(), 1);
        assert_eq!(verdict(there), [3, 0, 0, 0, 0, 0]);
        // Lost, and a watcher and a reader of the streams were told of it.
        assert_eq!(verdict(|_, stored| stored.contents.clear()), [3, 1, 0, 2, 0, 0]);
        assert_eq!(verdict(|_, stored| stored.counters.clear()), [3, 2, 0, 0, 0, 0]);
        assert_eq!(
            verdict(|_, stored| *stored.contents.entry("a".into()).or_default() += 1),
            [3, 0, 1, 0, 0, 0]
        );
        assert_eq!(
            verdict(|operations, _| operations[1].outcome = Outcome::Doubled),
            [3, 0, 1, 0, 0, 0]
        );
        let set = |values: &'static [u64]| {
            move |_: &mut Vec<_>, stored: &mut Stored| _ = stored.counters.insert("c".into(), values.to_vec())
        };
        assert_eq!(verdict(set(&[1, 2, 2])), [3, 0, 1, 0, 0, 0]);
        assert_eq!(verdict(set(&[1, 2, 3])), [3, 0, 0, 1, 0, 0]);
        assert_eq!(verdict(set(&[2, 1])), [3, 0, 0, 1, 0, 0]);
        let unsent = |_: &mut Vec<_>, stored: &mut Stored| _ = stored.contents.insert("z".into(), 1);
        assert_eq!(verdict(unsent), [3, 0, 0, 1, 0, 0]);
        assert_eq!(verdict(|operations, _| operations[7].value = 1), [3, 0, 0, 0, 1, 0]);
        assert_eq!(verdict(|operations, _| _ = operations.remove(2)), [3, 0, 0, 0, 0, 1]);
        assert_eq!(
            verdict(|operations, _| operations.insert(2, operations[2].clone())),
            [3, 0, 0, 0, 0, 1]
        );
        // The same of the streams, but for what was acknowledged before a gap.
        assert_eq!(verdict(|operations, _| _ = operations.remove(3)), [3, 0, 0, 0, 0, 1]);
        assert_eq!(
            verdict(|operations, _| operations.insert(3, operations[3].clone())),
            [3, 0, 0, 0, 0, 1]
        );
        let gap = |at: u64| operation(Kind::Fan, "", 0, at, Outcome::Failed("Gap".into()));
        assert_eq!(verdict(|operations, _| operations[3] = gap(2)), [3, 0, 0, 0, 0, 0]);
        assert_eq!(verdict(|operations, _| operations[3] = gap(0)), [3, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn nothing_acknowledged_proves_nothing() {
        assert!(!check(&[], &Stored::default()).is_clean());
    }
}
