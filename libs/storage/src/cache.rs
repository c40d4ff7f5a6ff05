//! What may be forgotten at any time: values that several processes share, each for a while.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

use crate::StorageError;
use crate::redis::{Redis, RedisOptions, key};

/// The port.
#[async_trait]
pub trait Cache: fmt::Debug + Send + Sync {
    /// The value of each key, in their order; `None` for one that has none.
    ///
    /// # Errors
    /// When the server is away.
    async fn get(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, StorageError>;

    /// Keeps values for a while, or for less when there is no room.
    ///
    /// # Errors
    /// When the server is away or takes nothing; any of them may have been kept.
    async fn put(&self, values: &[(String, Vec<u8>)], term: Duration) -> Result<(), StorageError>;
}

/// The port on Redis.
#[derive(Clone, Debug)]
pub struct RedisCache(Redis);

impl RedisCache {
    /// A port for a server, or for the master that Sentinels name.
    ///
    /// # Errors
    /// Never: the pool has a runtime.
    pub fn new(options: RedisOptions) -> Result<Self, StorageError> {
        Redis::new(options).map(Self)
    }
}

#[async_trait]
impl Cache for RedisCache {
    async fn get(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, StorageError> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let mut get = redis::cmd("MGET");
        for name in keys {
            get.arg(key("cache", name));
        }
        self.0.with(async |connection| get.query_async(connection).await).await
    }

    async fn put(&self, values: &[(String, Vec<u8>)], term: Duration) -> Result<(), StorageError> {
        let mut put = redis::pipe();
        let term = u64::try_from(term.as_millis()).unwrap_or(u64::MAX);
        for (name, value) in values {
            put.cmd("SET")
                .arg(key("cache", name))
                .arg(value)
                .arg("PX")
                .arg(term)
                .ignore();
        }
        self.0.with(async |connection| put.query_async(connection).await).await
    }
}
