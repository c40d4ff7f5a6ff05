//! The port on Redis. What a failover loses is appended again (`Live::append`).

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use redis::aio::{MultiplexedConnection, PubSub};
use redis::{Script, Value};

use super::{Appended, Batch, Listener, Live, Page};
use crate::StorageError;
use crate::redis::{Redis, RedisOptions, away, key, leads, within};

/// How often a listener makes sure that it listens to the master.
const SURE: Duration = Duration::from_secs(1);

static APPEND: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("append.lua")));
static BEGIN: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("begin.lua")));
static FORGET: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("forget.lua")));
static HOLD: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("hold.lua")));
static READ: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("read.lua")));
static SINCE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("since.lua")));
static RELEASE: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("release.lua")));

/// The port on Redis.
#[derive(Clone, Debug)]
pub struct RedisLive(Redis);

impl RedisLive {
    /// A port for a server, or for the master that Sentinels name.
    ///
    /// # Errors
    /// Never: the pool has a runtime.
    pub fn new(options: RedisOptions) -> Result<Self, StorageError> {
        Redis::new(options).map(Self)
    }
}

#[async_trait]
impl Live for RedisLive {
    async fn publish(&self, channel: &str, message: &str) -> Result<(), StorageError> {
        let mut publish = redis::cmd("PUBLISH");
        publish.arg(key("channel", channel)).arg(message);
        self.0
            .with(async |connection| publish.query_async(connection).await)
            .await
    }

    async fn listen(&self, channel: &str) -> Result<Box<dyn Listener>, StorageError> {
        let (master, sure) = self.0.options.to_master().await?;
        let mut heard = within(self.0.options.server(&master)?.get_async_pubsub()).await?;
        within(heard.subscribe(key("channel", channel))).await?;
        Ok(Box::new(Ear {
            heard,
            sure,
            master,
            options: Arc::clone(&self.0.options),
        }))
    }

    async fn hold(&self, lease: &str, holder: &str, term: Duration) -> Result<bool, StorageError> {
        let mut hold = HOLD.prepare_invoke();
        hold.key(key("lease", lease)).arg(holder).arg(term.as_millis() as u64);
        self.0
            .with(async |connection| hold.invoke_async(connection).await)
            .await
    }

    async fn release(&self, lease: &str, holder: &str) -> Result<(), StorageError> {
        let mut release = RELEASE.prepare_invoke();
        release.key(key("lease", lease)).arg(holder);
        self.0
            .with(async |connection| release.invoke_async(connection).await)
            .await
    }

    async fn begin(&self, log: &str, at: i64) -> Result<i64, StorageError> {
        let mut begin = BEGIN.prepare_invoke();
        begin.key(key("stands", log)).key(key("began", log)).arg(at);
        self.0
            .with(async |connection| begin.invoke_async(connection).await)
            .await
    }

    async fn append(&self, batch: &Batch<'_>) -> Result<Appended, StorageError> {
        let mut append = APPEND.prepare_invoke();
        append
            .key(key("lease", batch.log))
            .key(key("stands", batch.log))
            .key(key("streams", batch.log));
        append.arg(batch.holder).arg(batch.from).arg(batch.to).arg(batch.keep);
        for entry in &batch.entries {
            append.key(key(&format!("stream:{}", batch.log), &entry.stream));
            append.arg(entry.place).arg(entry.payload.as_slice());
        }
        let (what, stands): (String, String) = self
            .0
            .with(async |connection| append.invoke_async(connection).await)
            .await?;
        Ok(match what.as_str() {
            "done" => Appended::Done,
            "at" => Appended::At(stands.parse().ok()),
            _ => Appended::NotHeld,
        })
    }

    async fn read(&self, log: &str, stream: &str, after: i64, limit: usize) -> Result<Page, StorageError> {
        let mut read = READ.prepare_invoke();
        read.key(key("began", log)).key(key(&format!("stream:{log}"), stream));
        read.arg(after).arg(limit);
        let found: Option<Vec<Vec<u8>>> = self
            .0
            .with(async |connection| read.invoke_async(connection).await)
            .await?;
        let Some(found) = found else { return Ok(Page::Gap) };
        let entry = |pair: &[Vec<u8>]| {
            let [place, payload] = pair else { return None };
            Some((str::from_utf8(place).ok()?.parse().ok()?, payload.clone()))
        };
        let entries: Option<Vec<(i64, Vec<u8>)>> = found.chunks(2).map(entry).collect();
        let entries = entries.ok_or_else(|| away("the stream has entries of somebody else".into()))?;
        Ok(Page::Entries(entries))
    }

    async fn stands(&self, log: &str) -> Result<Option<i64>, StorageError> {
        let mut get = redis::cmd("GET");
        get.arg(key("stands", log));
        self.0.with(async |connection| get.query_async(connection).await).await
    }

    async fn since(&self, log: &str, stream: &str) -> Result<Option<i64>, StorageError> {
        let mut since = SINCE.prepare_invoke();
        since.key(key("began", log)).key(key(&format!("stream:{log}"), stream));
        self.0
            .with(async |connection| since.invoke_async(connection).await)
            .await
    }

    async fn forget(&self, log: &str) -> Result<(), StorageError> {
        let mut forget = FORGET.prepare_invoke();
        forget
            .key(key("stands", log))
            .key(key("began", log))
            .key(key("streams", log));
        self.0
            .with(async |connection| forget.invoke_async(connection).await)
            .await
    }
}

/// Listens to the master, for as long as it is the master.
struct Ear {
    heard: PubSub,
    sure: MultiplexedConnection,
    master: String,
    options: Arc<RedisOptions>,
}

impl Ear {
    async fn is_sure(&mut self) -> bool {
        // A server that was cut off from its Sentinels still takes itself for the master.
        let same = self.options.master().await.is_ok_and(|master| master == self.master);
        same && leads(&mut self.sure).await.is_ok_and(|leads| leads) && within(self.heard.ping::<Value>()).await.is_ok()
    }
}

#[async_trait]
impl Listener for Ear {
    async fn next(&mut self) -> Option<String> {
        loop {
            let message = {
                let mut messages = self.heard.on_message();
                tokio::time::timeout(SURE, messages.next()).await
            };
            match message {
                Ok(message) => return message?.get_payload().ok(),
                Err(_) => {
                    if !self.is_sure().await {
                        return None;
                    }
                }
            }
        }
    }
}
