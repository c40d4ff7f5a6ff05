//! Within one process.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::broadcast;

use super::{Appended, Batch, Listener, Live, Page};
use crate::StorageError;

/// Messages that a listener may be behind.
const BEHIND: usize = 1024;

/// The port within one process.
#[derive(Debug, Default)]
pub struct MemoryLive(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    channels: HashMap<String, broadcast::Sender<String>>,
    leases: HashMap<String, (String, Instant)>,
    logs: HashMap<String, Log>,
}

#[derive(Debug)]
struct Log {
    began: i64,
    stands: i64,
    streams: HashMap<String, Stream>,
}

#[derive(Debug, Default)]
struct Stream {
    entries: VecDeque<(i64, Vec<u8>)>,
    /// Entries after this place are there.
    complete_after: i64,
}

impl State {
    fn channel(&mut self, name: &str) -> &broadcast::Sender<String> {
        let channel = self.channels.entry(name.to_owned());
        channel.or_insert_with(|| broadcast::Sender::new(BEHIND))
    }

    fn holds(&self, lease: &str, holder: &str) -> Option<bool> {
        let (who, until) = self.leases.get(lease)?;
        (*until > Instant::now()).then(|| who == holder)
    }
}

impl MemoryLive {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Live for MemoryLive {
    async fn publish(&self, channel: &str, message: &str) -> Result<(), StorageError> {
        // Nobody may be listening, which is no error.
        let _ = self.state().channel(channel).send(message.to_owned());
        Ok(())
    }

    async fn listen(&self, channel: &str) -> Result<Box<dyn Listener>, StorageError> {
        Ok(Box::new(Ear(self.state().channel(channel).subscribe())))
    }

    async fn hold(&self, lease: &str, holder: &str, term: Duration) -> Result<bool, StorageError> {
        let mut state = self.state();
        let free = state.holds(lease, holder) != Some(false);
        if free {
            let until = Instant::now() + term;
            state.leases.insert(lease.to_owned(), (holder.to_owned(), until));
        }
        Ok(free)
    }

    async fn release(&self, lease: &str, holder: &str) -> Result<(), StorageError> {
        let mut state = self.state();
        if state.holds(lease, holder) == Some(true) {
            state.leases.remove(lease);
        }
        Ok(())
    }

    async fn begin(&self, log: &str, at: i64) -> Result<i64, StorageError> {
        let mut state = self.state();
        let log = state.logs.entry(log.to_owned()).or_insert_with(|| Log {
            began: at,
            stands: at,
            streams: HashMap::new(),
        });
        Ok(log.stands)
    }

    async fn append(&self, batch: &Batch<'_>) -> Result<Appended, StorageError> {
        let mut state = self.state();
        if state.holds(batch.log, batch.holder) != Some(true) {
            return Ok(Appended::NotHeld);
        }
        let Some(log) = state.logs.get_mut(batch.log) else {
            return Ok(Appended::At(None));
        };
        if log.stands != batch.from {
            return Ok(Appended::At(Some(log.stands)));
        }
        let began = log.began;
        for entry in &batch.entries {
            let stream = log.streams.entry(entry.stream.clone()).or_insert_with(|| Stream {
                entries: VecDeque::new(),
                complete_after: began,
            });
            stream.entries.push_back((entry.place, entry.payload.clone()));
            if stream.entries.len() > batch.keep
                && let Some((place, _)) = stream.entries.pop_front()
            {
                stream.complete_after = place;
            }
        }
        log.stands = batch.to;
        Ok(Appended::Done)
    }

    async fn read(&self, log: &str, stream: &str, after: i64, limit: usize) -> Result<Page, StorageError> {
        let state = self.state();
        let Some(log) = state.logs.get(log) else {
            return Ok(Page::Gap);
        };
        let Some(stream) = log.streams.get(stream) else {
            return Ok(if after < log.began {
                Page::Gap
            } else {
                Page::Entries(Vec::new())
            });
        };
        if after < stream.complete_after {
            return Ok(Page::Gap);
        }
        let later = stream.entries.iter().filter(|(place, _)| *place > after);
        Ok(Page::Entries(later.take(limit).cloned().collect()))
    }

    async fn stands(&self, log: &str) -> Result<Option<i64>, StorageError> {
        Ok(self.state().logs.get(log).map(|log| log.stands))
    }

    async fn since(&self, log: &str, stream: &str) -> Result<Option<i64>, StorageError> {
        let state = self.state();
        let since = |log: &Log| {
            log.streams
                .get(stream)
                .map_or(log.began, |stream| stream.complete_after)
        };
        Ok(state.logs.get(log).map(since))
    }

    async fn forget(&self, log: &str) -> Result<(), StorageError> {
        self.state().logs.remove(log);
        Ok(())
    }
}

struct Ear(broadcast::Receiver<String>);

#[async_trait]
impl Listener for Ear {
    async fn next(&mut self) -> Option<String> {
        // One that was behind too far has missed something, as when a connection is lost.
        self.0.recv().await.ok()
    }
}
