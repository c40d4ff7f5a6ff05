//! Compares the vector index and the live streams with the relational store, and mends them.
//!
//! The services may run meanwhile. What differs is looked at once more after a while in which whoever follows the outbox has
//! caught up, and only what differs still is counted.

use std::collections::HashSet;
use std::time::Duration;

use aeterna_error::{Error, Reason};
use aeterna_storage::live::{Live, Page};

use crate::app::Model;
use crate::domain::{Key, Sequence};
use crate::store::{Changes, Entry, IndexState, Relational, VectorIndex};

/// Memories at a time.
const PAGE: usize = 500;
/// Numbers of memories at a time.
const KEYS: usize = 5_000;
/// Entries of a stream at a time.
const ENTRIES: usize = 500;
/// How long whoever follows the outbox may take to catch up.
const SETTLE: Duration = Duration::from_secs(3);

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Memories that the store has.
    pub memories: u64,
    /// Of them, those that the index did not have, or not as they are.
    pub unlike: u64,
    /// Memories that the index had and the store does not.
    pub stray: u64,
    /// Entries of the live streams.
    pub entries: u64,
    /// Changes that a stream did not have, and entries that are no changes.
    pub untrue: u64,
    /// What was not as it should be and is so still.
    pub left: u64,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The store is read, and the index compared with it.
    Vectors,
    /// The index is read, and compared with the store.
    Strays,
    /// What differed is looked at once more, and mended.
    Mending,
    /// The streams are read.
    Streams,
}

/// What is compared.
pub struct Parts<'a> {
    /// The relational store, which is right.
    pub store: &'a dyn Relational,
    /// The index of a model.
    pub index: &'a dyn VectorIndex,
    /// The model.
    pub model: &'a Model,
    /// The live streams.
    pub live: Option<&'a dyn Live>,
    /// What the log of the store is called there.
    pub log: &'a str,
    /// Nothing is mended.
    pub dry: bool,
}

impl Parts<'_> {
    /// Compares everything; `tell` hears of progress.
    ///
    /// # Errors
    /// When a store, the index or the live server is away.
    pub async fn reconcile(&self, mut tell: impl FnMut(Step, &Reconciled)) -> Result<Reconciled, Error> {
        let mut found = Reconciled::default();
        let end = self.store.last_sequence().await?;
        let care = self.index.tend().await.map_err(away)?;
        if let Some(what) = care.condition.trouble() {
            let message = format!("the vector index is not well, and what differs could not be told: {what}");
            return Err(Error::new(Reason::DependencyUnavailable, message));
        }
        let mut suspects = self.unlike(&mut found, &mut tell).await?;
        suspects.extend(self.strays(&mut found, &mut tell).await?);
        if !suspects.is_empty() {
            tokio::time::sleep(SETTLE).await;
            self.mend(&suspects, &mut found, &mut tell).await?;
        }
        if !self.dry && found.left == 0 {
            // It may have been filled by this.
            let last = self.index.filled().map_or(Key(0), |(last, _)| last);
            self.index.fill_all(last, end);
            self.index.advance(end);
            self.index.tend().await.map_err(away)?;
        }
        if let Some(live) = self.live {
            self.streams(live, &mut found, &mut tell).await?;
        }
        Ok(found)
    }

    /// What the store has and the index does not.
    async fn unlike(
        &self,
        found: &mut Reconciled,
        tell: &mut impl FnMut(Step, &Reconciled),
    ) -> Result<Vec<Key>, Error> {
        let (mut after, mut unlike) = (Key(0), Vec::new());
        loop {
            let states = self.store.scan(&self.model.identity, after, PAGE, false).await?;
            let Some(last) = states.last() else { return Ok(unlike) };
            after = last.key;
            let entries = entries(&states);
            found.memories += entries.len() as u64;
            unlike.extend(self.index.unlike(entries).await.map_err(away)?);
            tell(Step::Vectors, found);
        }
    }

    /// What the index has and the store does not.
    async fn strays(
        &self,
        found: &mut Reconciled,
        tell: &mut impl FnMut(Step, &Reconciled),
    ) -> Result<Vec<Key>, Error> {
        let (mut after, mut strays) = (Key(0), Vec::new());
        loop {
            let keys = self.index.keys(after, KEYS).await.map_err(away)?;
            let Some(last) = keys.last() else { return Ok(strays) };
            after = *last;
            for part in keys.chunks(PAGE) {
                let (_, gone) = self.states(part).await?;
                strays.extend(gone);
            }
            tell(Step::Strays, found);
        }
    }

    /// What the store has of some memories, and which of them it does not have.
    async fn states(&self, keys: &[Key]) -> Result<(Vec<Entry>, Vec<Key>), Error> {
        let states = self.store.states(&self.model.identity, keys).await?;
        let entries = entries(&states);
        let there: HashSet<Key> = entries.iter().map(|entry| entry.key).collect();
        let gone = keys.iter().copied().filter(|key| !there.contains(key)).collect();
        Ok((entries, gone))
    }

    /// Which of some memories are not in the index as the store has them.
    async fn wrong(&self, keys: &[Key]) -> Result<(Vec<Entry>, Vec<Key>), Error> {
        let (mut entries, gone) = self.states(keys).await?;
        let unlike = self.index.unlike(entries.clone()).await.map_err(away)?;
        let unlike: HashSet<Key> = unlike.into_iter().collect();
        entries.retain(|entry| unlike.contains(&entry.key));
        Ok((entries, self.index.present(gone).await.map_err(away)?))
    }

    async fn mend(
        &self,
        suspects: &[Key],
        found: &mut Reconciled,
        tell: &mut impl FnMut(Step, &Reconciled),
    ) -> Result<(), Error> {
        for keys in suspects.chunks(PAGE) {
            // What is read after this is at least as new.
            let at = self.store.last_sequence().await?;
            let (upserts, removals) = self.wrong(keys).await?;
            let count = (upserts.len() + removals.len()) as u64;
            found.unlike += upserts.len() as u64;
            found.stray += removals.len() as u64;
            if self.dry || count == 0 {
                found.left += count;
            } else {
                let changes = Changes { upserts, removals, at };
                self.index.apply(changes).await.map_err(away)?;
                let (unlike, stray) = self.wrong(keys).await?;
                found.left += (unlike.len() + stray.len()) as u64;
            }
            tell(Step::Mending, found);
        }
        Ok(())
    }

    /// Compares the places of a stream's entries with those of the outbox. A stream with a hole is worth nothing: all begin anew,
    /// and whoever reads them is told to read the store for what came before.
    async fn streams(
        &self,
        live: &dyn Live,
        found: &mut Reconciled,
        tell: &mut impl FnMut(Step, &Reconciled),
    ) -> Result<(), Error> {
        let Some(stands) = live.stands(self.log).await? else {
            return Ok(());
        };
        self.store.reach(Sequence(stands)).await?;
        let mut untrue = 0;
        for tenant in self.store.tenants().await? {
            let name = tenant.to_string();
            let Some(mut after) = live.since(self.log, &name).await? else {
                continue;
            };
            loop {
                let page = match live.read(self.log, &name, after, ENTRIES).await? {
                    Page::Entries(page) => page,
                    // It was trimmed meanwhile, or forgotten.
                    Page::Gap => break,
                };
                let full = page.len() == ENTRIES;
                let upto = page.last().filter(|_| full).map_or(stands, |(place, _)| *place);
                let told: HashSet<i64> = page
                    .iter()
                    .map(|(place, _)| *place)
                    .filter(|place| *place <= upto)
                    .collect();
                let mut committed = HashSet::new();
                let mut from = Sequence(after);
                loop {
                    let changes = self.store.changes(Some(&tenant), from, ENTRIES).await?;
                    let Some(last) = changes.last() else { break };
                    from = last.sequence;
                    let places = changes.iter().map(|change| change.sequence.0);
                    committed.extend(places.filter(|place| *place <= upto));
                    if from.0 >= upto {
                        break;
                    }
                }
                found.entries += told.len() as u64;
                untrue += told.symmetric_difference(&committed).count() as u64;
                tell(Step::Streams, found);
                after = upto;
                if !full {
                    break;
                }
            }
        }
        found.untrue = untrue;
        if untrue > 0 {
            if self.dry {
                found.left += untrue;
            } else {
                live.forget(self.log).await?;
            }
        }
        Ok(())
    }
}

fn entries(states: &[IndexState]) -> Vec<Entry> {
    states.iter().map(Entry::from).collect()
}

fn away(error: aeterna_storage::StorageError) -> Error {
    Error::unavailable("the vector index is away").caused_by(error)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use aeterna_storage::SqliteOptions;
    use aeterna_storage::live::{Appended, Batch, Entry as Told, MemoryLive};
    use aeterna_types::{Clock as _, SystemClock, TenantId};

    use super::*;
    use crate::domain::ScopeKey;
    use crate::store::code::Code;
    use crate::store::conformance;
    use crate::store::flat::{FlatIndex, Layout, Opened};
    use crate::store::sqlite::SqliteStore;

    const LOG: &str = "log";

    async fn stream(store: &SqliteStore, spoil: bool) -> MemoryLive {
        let live = MemoryLive::default();
        live.hold(LOG, "x", Duration::from_secs(60)).await.unwrap();
        assert_eq!(live.begin(LOG, 0).await.unwrap(), 0);
        let changes = store.changes(None, Sequence(0), 1_000).await.unwrap();
        let mut entries: Vec<Told> = changes
            .iter()
            .map(|change| Told {
                stream: change.tenant.to_string(),
                place: change.sequence.0,
                payload: Vec::new(),
            })
            .collect();
        let to = entries.last().unwrap().place;
        if spoil {
            entries.remove(2);
        }
        let batch = Batch {
            log: LOG,
            holder: "x",
            from: 0,
            to,
            entries,
            keep: 10_000,
        };
        assert_eq!(live.append(&batch).await.unwrap(), Appended::Done);
        live
    }

    #[tokio::test]
    async fn what_differs_is_told_and_mended() {
        let dir = tempfile::tempdir().unwrap();
        let options = SqliteOptions {
            path: dir.path().join("memory.db"),
            busy_timeout: Duration::from_secs(5),
            readers: 2,
        };
        let store = SqliteStore::open(&options, 0).await.unwrap();
        let model = Model {
            name: "m".into(),
            identity: "m@1".into(),
            dimension: 128,
            prefix: 64,
        };
        for number in 0..20 {
            conformance::one_memory(&store, &format!("memory {number}")).await;
        }
        let code = |seed: u32| Code::encode(&conformance::vector(seed, 128)).unwrap();
        let pending = store.scan("m@1", Key(0), 100, true).await.unwrap();
        let codes: Vec<_> = pending
            .iter()
            .map(|state| (state.id, state.version, code(state.key.0 as u32)))
            .collect();
        store.put_codes("m@1", &codes, SystemClock.now()).await.unwrap();
        let layout = Layout {
            store: "s".into(),
            model: "m@1".into(),
            dimension: 128,
            prefix: 64,
            learned: 0,
        };
        let Opened::Fresh(index, _) = FlatIndex::open(&dir.path().join("vectors"), layout, Sequence(0)).unwrap() else {
            panic!("it is new")
        };
        let index = Arc::new(index);
        let end = store.last_sequence().await.unwrap();
        let entries = entries(&store.scan("m@1", Key(0), 100, false).await.unwrap());
        FlatIndex::apply(&index, &entries, &[], end).unwrap();
        let reconcile = async |live: &MemoryLive, dry: bool| {
            let parts = Parts {
                store: &store,
                index: &index,
                model: &model,
                live: Some(live),
                log: LOG,
                dry,
            };
            let mut told = 0;
            let found = parts.reconcile(|_, _| told += 1).await.unwrap();
            assert!(told > 0);
            found
        };
        let well = stream(&store, false).await;
        let found = reconcile(&well, true).await;
        let all = Reconciled {
            memories: 20,
            entries: found.entries,
            ..Reconciled::default()
        };
        assert!(found == all && found.entries >= 20, "{found:?}");

        // One is missing, one is another vector, one is in another scope, and one is of no memory.
        let mut wrong = vec![entries[4].clone(), entries[5].clone(), entries[6].clone()];
        wrong[0].code = Some(code(99));
        wrong[1].scope = ScopeKey(77);
        wrong[2].key = Key(9_999);
        wrong[2].tenant = "elsewhere".parse::<TenantId>().unwrap();
        FlatIndex::apply(&index, &wrong, &[entries[3].key], end).unwrap();
        let spoilt = stream(&store, true).await;
        let found = reconcile(&spoilt, true).await;
        assert_eq!((found.unlike, found.stray, found.untrue, found.left), (3, 1, 1, 5));
        let found = reconcile(&spoilt, false).await;
        assert_eq!((found.unlike, found.stray, found.untrue, found.left), (3, 1, 1, 0));
        assert_eq!(spoilt.stands(LOG).await.unwrap(), None, "the streams begin anew");
        assert_eq!(reconcile(&well, true).await, all);
        store.close().await;
    }
}
