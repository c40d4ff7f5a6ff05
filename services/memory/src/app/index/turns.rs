//! What one copy of the service does for all of them, in turns: writing an index that they share, and making vectors.
//!
//! A turn is a lease of the live server, and how far a shared index has come is a place kept beside it. Both only save work:
//! whatever is done twice is done right, so that a copy goes on by itself when the live server is away, and a turn whose holder
//! has died or hangs ends by itself. What was brought before a copy knew the index counts for nothing: the index remembers how
//! far all of its replicas are, and from there on the copy brings everything itself once (`Background::catch_up`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use aeterna_error::Error;
use aeterna_rpc::Breaker;
use aeterna_storage::StorageError;
use aeterna_storage::live::{Appended, Batch, Live};
use uuid::Uuid;

use crate::app::Serving;
use crate::domain::Sequence;
use crate::store::Changes;

/// How long a copy that does not answer keeps a turn at an index.
const TERM: Duration = Duration::from_secs(1);
/// How long one keeps a turn at making vectors: longer than a page of them usually takes.
const LONG_TERM: Duration = Duration::from_secs(30);
/// How often it is looked whether another copy has brought a change.
const LOOK: Duration = Duration::from_millis(10);
/// How long the live server may take: without it everything goes on.
const ANSWER: Duration = Duration::from_millis(100);

/// The turns of one copy.
pub struct Turns {
    live: Arc<dyn Live>,
    log: String,
    /// Names this copy.
    me: String,
    breaker: Breaker,
}

/// Which vectors are made. What one copy is about never keeps another one from the other: copies may still answer by the model
/// before, and what they write goes on being pending for those that do not.
#[derive(Clone, Copy, Debug)]
pub(super) enum Vectors {
    /// Those that memories lack by the model that answers.
    Pending,
    /// All, by the next model.
    Anew,
}

/// Whose turn it is to bring changes to an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// This copy's, and how far the index has come by all of them, when that is known.
    Mine(Option<i64>),
    /// Another's, who has not brought them yet.
    Others,
    /// Nobody's: they were brought.
    Done,
}

impl Turns {
    /// Of the copies on a store, whose log is called so.
    pub fn new(live: Arc<dyn Live>, log: String) -> Self {
        Self {
            live,
            log,
            me: Uuid::now_v7().to_string(),
            breaker: Breaker::default(),
        }
    }

    fn index(&self, model: &str) -> String {
        format!("{}:index:{model}", self.log)
    }

    fn making(&self, what: Vectors, model: &str) -> String {
        format!("{}:{what:?}:{model}", self.log).to_lowercase()
    }

    /// `None` when the live server does not answer.
    async fn ask<T>(&self, asked: impl Future<Output = Result<T, StorageError>>) -> Option<T> {
        if !self.breaker.admits() {
            return None;
        }
        let answer = tokio::time::timeout(ANSWER, asked).await.ok().and_then(Result::ok);
        self.breaker.tell(answer.is_some());
        answer
    }

    /// Takes the turn at an index, to bring it what lies between two changes.
    async fn take(&self, index: &str, from: Sequence, to: Sequence) -> Turn {
        match self.ask(self.live.hold(index, &self.me, TERM)).await {
            None => Turn::Mine(None),
            Some(true) => {
                let place = self.ask(self.live.begin(index, from.0)).await;
                if place.is_none_or(|place| place < to.0) {
                    return Turn::Mine(place);
                }
                // One that is far behind keeps nobody waiting.
                self.give(index).await;
                Turn::Done
            }
            Some(false) => match self.ask(self.live.stands(index)).await {
                Some(Some(place)) if place >= to.0 => Turn::Done,
                _ => Turn::Others,
            },
        }
    }

    /// Tells the others how far an index has come by this copy.
    async fn brought(&self, index: &str, from: i64, to: Sequence) {
        let batch = Batch {
            log: index,
            holder: &self.me,
            from,
            to: to.0,
            entries: Vec::new(),
            keep: 0,
        };
        let told = self.ask(self.live.append(&batch)).await;
        // It took longer than the turn.
        if told == Some(Appended::NotHeld) && self.ask(self.live.hold(index, &self.me, TERM)).await == Some(true) {
            self.ask(self.live.append(&batch)).await;
        }
    }

    /// How far an index has come by all copies; `None` when nobody says.
    pub(super) async fn place(&self, model: &str) -> Option<Sequence> {
        let stands = self.ask(self.live.stands(&self.index(model))).await?;
        Some(Sequence(stands.unwrap_or_default()))
    }

    /// The store was put back to an earlier time: how far the index had come is not true any more.
    pub(super) async fn forget(&self, model: &str) {
        self.ask(self.live.forget(&self.index(model))).await;
    }

    /// Takes the turn at making vectors by a model, or keeps it; false when another copy is at it.
    pub(super) async fn may_make(&self, what: Vectors, model: &str) -> bool {
        let turn = self.making(what, model);
        self.ask(self.live.hold(&turn, &self.me, LONG_TERM)).await != Some(false)
    }

    /// Leaves making vectors by a model to the others.
    pub(super) async fn made(&self, what: Vectors, model: &str) {
        self.give(&self.making(what, model)).await;
    }

    async fn give(&self, turn: &str) {
        self.ask(self.live.release(turn, &self.me)).await;
    }

    /// Brings an index of a model that all copies share what is new, unless another copy does; `news` has the changes after one,
    /// and `applied` hears how far the index is.
    ///
    /// # Errors
    /// What the store says, or that the index can't be written.
    pub(super) async fn follow<F>(
        &self,
        serving: &Serving,
        news: impl Fn(Sequence) -> F,
        applied: impl Fn(Sequence),
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<Option<Changes>, Error>>,
    {
        let index = self.index(&serving.model.identity);
        let followed = async {
            while let Some(from) = serving.index.watermark() {
                let Some(changes) = news(from).await? else { break };
                let to = changes.at;
                let since = Instant::now();
                let turn = loop {
                    match self.take(&index, from, to).await {
                        // Somebody who gets turns and brings nothing is not waited for.
                        Turn::Others if since.elapsed() > 2 * TERM => break Turn::Mine(None),
                        Turn::Others => tokio::time::sleep(LOOK).await,
                        turn => break turn,
                    }
                };
                match turn {
                    Turn::Mine(_) => serving.apply(changes).await?,
                    Turn::Others | Turn::Done => serving.applied(),
                }
                serving.index.advance(to);
                applied(to);
                if let Turn::Mine(Some(from)) = turn {
                    self.brought(&index, from, to).await;
                }
            }
            Ok(())
        };
        let followed = followed.await;
        self.give(&index).await;
        followed
    }
}

#[cfg(test)]
mod tests {
    use aeterna_storage::live::MemoryLive;
    use aeterna_storage::{RedisLive, RedisOptions};
    use async_trait::async_trait;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

    use super::*;
    use crate::app::Model;
    use crate::domain::Key;
    use crate::store::code::Code;
    use crate::store::{Among, Care, Condition, Entry, VectorIndex};

    /// How many changes there are, and how many are read at a time.
    const CHANGES: i64 = 100;
    const PAGE: i64 = 7;

    /// An index that all copies share, as one of them sees it.
    #[derive(Default)]
    struct Shared {
        /// Up to where, for each time that something was applied by any copy.
        applied: Arc<Mutex<Vec<i64>>>,
        /// How far this copy knows it to be.
        watermark: AtomicI64,
        /// This copy never gets an answer.
        hangs: AtomicBool,
        /// It takes nothing from this copy.
        fails: AtomicBool,
    }

    #[async_trait]
    impl VectorIndex for Shared {
        async fn apply(&self, changes: Changes) -> Result<(), StorageError> {
            if self.hangs.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            if self.fails.load(Ordering::SeqCst) {
                return Err(StorageError::Unavailable("fails".into()));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.applied.lock().unwrap().push(changes.at.0);
            Ok(())
        }
        fn advance(&self, watermark: Sequence) {
            self.watermark.store(watermark.0, Ordering::SeqCst);
        }
        fn watermark(&self) -> Option<Sequence> {
            Some(Sequence(self.watermark.load(Ordering::SeqCst)))
        }
        fn is_shared(&self) -> bool {
            true
        }
        async fn search(&self, _: Code, _: Arc<Among>, _: usize) -> Result<Vec<(Key, f32)>, StorageError> {
            Ok(Vec::new())
        }
        fn len(&self) -> usize {
            0
        }
        fn bytes(&self) -> u64 {
            0
        }
        async fn tend(&self) -> Result<Care, StorageError> {
            Ok(Care {
                condition: Condition::Well,
                differs: None,
                again: None,
            })
        }
        async fn unlike(&self, _: Vec<Entry>) -> Result<Vec<Key>, StorageError> {
            Ok(Vec::new())
        }
        async fn present(&self, _: Vec<Key>) -> Result<Vec<Key>, StorageError> {
            Ok(Vec::new())
        }
        async fn keys(&self, _: Key, _: usize) -> Result<Vec<Key>, StorageError> {
            Ok(Vec::new())
        }
        async fn clear(&self) -> Result<(), StorageError> {
            Ok(())
        }
    }

    /// A copy of the service.
    struct Copy {
        turns: Turns,
        index: Arc<Shared>,
        serving: Serving,
    }

    impl Copy {
        fn new(live: &Arc<dyn Live>, applied: &Arc<Mutex<Vec<i64>>>) -> Self {
            let index = Arc::new(Shared {
                applied: Arc::clone(applied),
                ..Shared::default()
            });
            let model = Model {
                name: "m".into(),
                identity: "m@1".into(),
                dimension: 8,
                prefix: 8,
            };
            Self {
                turns: Turns::new(Arc::clone(live), "log".into()),
                index: Arc::clone(&index),
                serving: Serving::new(model, index),
            }
        }

        /// Follows to the end, and looks whether all that it is told is in has been applied.
        async fn follow(&self) {
            let news = async |after: Sequence| {
                let changes = Changes {
                    upserts: Vec::new(),
                    removals: Vec::new(),
                    at: Sequence((after.0 + PAGE).min(CHANGES)),
                };
                Ok((after.0 < CHANGES).then_some(changes))
            };
            let told = |at: Sequence| assert!(self.index.applied.lock().unwrap().contains(&at.0));
            self.turns.follow(&self.serving, news, told).await.unwrap();
            assert_eq!(self.index.watermark(), Some(Sequence(CHANGES)));
        }
    }

    fn pages() -> Vec<i64> {
        (0..CHANGES)
            .step_by(PAGE as usize)
            .map(|from| (from + PAGE).min(CHANGES))
            .collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_copy_brings_each_change_and_all_know_of_it() {
        let (live, applied): (Arc<dyn Live>, _) = (Arc::new(MemoryLive::default()), Arc::default());
        let copies = [0; 3].map(|_| Copy::new(&live, &applied));
        futures::future::join_all(copies.iter().map(Copy::follow)).await;
        assert_eq!(*applied.lock().unwrap(), pages());
        // One that comes later has nothing to do.
        Copy::new(&live, &applied).follow().await;
        assert_eq!(applied.lock().unwrap().len(), pages().len());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_copy_that_hangs_is_waited_for_only_until_its_turn_ends() {
        let (live, applied): (Arc<dyn Live>, _) = (Arc::new(MemoryLive::default()), Arc::default());
        let copies = [0; 2].map(|_| Copy::new(&live, &applied));
        copies[0].index.hangs.store(true, Ordering::SeqCst);
        let began = Instant::now();
        tokio::select! {
            biased;
            () = copies[0].follow() => panic!("it hangs"),
            () = copies[1].follow() => {}
        }
        assert!(began.elapsed() >= TERM);
        assert_eq!(*applied.lock().unwrap(), pages());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_index_that_takes_nothing_is_known_until_it_does_again() {
        let (live, applied): (Arc<dyn Live>, _) = (Arc::new(MemoryLive::default()), Arc::default());
        let copy = Copy::new(&live, &applied);
        let away = async |_| Err(Error::unavailable("the store is away"));
        copy.turns.follow(&copy.serving, away, |_| ()).await.unwrap_err();
        assert!(!copy.serving.refuses());
        copy.index.fails.store(true, Ordering::SeqCst);
        let news = async |_| {
            Ok(Some(Changes {
                upserts: Vec::new(),
                removals: Vec::new(),
                at: Sequence(PAGE),
            }))
        };
        copy.turns.follow(&copy.serving, news, |_| ()).await.unwrap_err();
        assert!(copy.serving.refuses());
        // Until it takes them, from this copy or another.
        Copy::new(&live, &applied).follow().await;
        copy.follow().await;
        assert!(!copy.serving.refuses());
        let alone = Copy::new(&(Arc::new(MemoryLive::default()) as Arc<dyn Live>), &applied);
        alone.index.fails.store(true, Ordering::SeqCst);
        alone.turns.follow(&alone.serving, news, |_| ()).await.unwrap_err();
        alone.index.fails.store(false, Ordering::SeqCst);
        alone.follow().await;
        assert!(!alone.serving.refuses());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_took_longer_than_a_turn_was_brought_all_the_same() {
        let (live, applied): (Arc<dyn Live>, _) = (Arc::new(MemoryLive::default()), Arc::default());
        let Copy { turns, .. } = Copy::new(&live, &applied);
        assert_eq!(turns.take("i", Sequence(1), Sequence(5)).await, Turn::Mine(Some(1)));
        live.release("i", &turns.me).await.unwrap();
        turns.brought("i", 1, Sequence(5)).await;
        assert_eq!(live.stands("i").await.unwrap(), Some(5));
        // Not when somebody else has gone on.
        turns.give("i").await;
        assert!(live.hold("i", "another", LONG_TERM).await.unwrap());
        turns.brought("i", 5, Sequence(9)).await;
        assert_eq!(live.stands("i").await.unwrap(), Some(5));
        assert_eq!(turns.take("i", Sequence(1), Sequence(5)).await, Turn::Done);
        assert_eq!(turns.take("i", Sequence(5), Sequence(9)).await, Turn::Others);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_a_live_server_each_copy_goes_on_by_itself() {
        // Nobody listens on the discard port.
        let options = RedisOptions::parse("redis", "//127.0.0.1:9").unwrap();
        let (live, applied): (Arc<dyn Live>, _) = (Arc::new(RedisLive::new(options).unwrap()), Arc::default());
        let copies = [0; 2].map(|_| Copy::new(&live, &applied));
        futures::future::join_all(copies.iter().map(Copy::follow)).await;
        let mut applied = applied.lock().unwrap().clone();
        applied.sort_unstable();
        let mut twice = [pages(), pages()].concat();
        twice.sort_unstable();
        assert_eq!(applied, twice);
        for copy in copies {
            assert!(copy.turns.may_make(Vectors::Pending, "m@1").await);
        }
    }

    #[tokio::test]
    async fn one_copy_makes_vectors_until_it_leaves_it_to_another() {
        let (live, applied): (Arc<dyn Live>, _) = (Arc::new(MemoryLive::default()), Arc::default());
        let [one, other] = [0; 2].map(|_| Copy::new(&live, &applied).turns);
        let may = async |copy: &Turns| copy.may_make(Vectors::Pending, "m@1").await;
        assert!(may(&one).await && may(&one).await && !may(&other).await);
        assert!(other.may_make(Vectors::Pending, "m@2").await && other.may_make(Vectors::Anew, "m@1").await);
        one.made(Vectors::Pending, "m@1").await;
        assert!(may(&other).await && !may(&one).await);
    }
}
