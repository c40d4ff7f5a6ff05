//! Limits on what a caller may ask for, each with its refusal.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aeterna_config::{Reader, Setting};
use aeterna_types::TenantId;

/// The settings of this crate.
pub const SETTINGS: &[Setting] = &[
    Setting::new(
        "limits.message_bytes",
        "8388608",
        "Largest gRPC message, in bytes, 65536 to 268435456.",
    ),
    Setting::new(
        "limits.concurrent_requests",
        "1024",
        "Requests served at once by one process; more are refused. Where tokens are checked, one tenant has three quarters of \
         them at most.",
    ),
    Setting::new(
        "limits.streams",
        "32768",
        "Streams of answers (Watch, Export) open at once in one process; more are refused. Where tokens are checked, one tenant has \
         three quarters of them at most.",
    ),
    Setting::new(
        "limits.requests_per_second",
        "0",
        "Requests per second and principal; 0 means no limit.",
    ),
    Setting::new("limits.default_timeout", "60s", "Deadline of a call that brings none."),
    Setting::new(
        "limits.max_timeout",
        "10m",
        "Longest deadline that a call may bring; a longer one is cut to it.",
    ),
    Setting::new(
        "limits.connections",
        "16384",
        "Connections open at once; more wait to be accepted.",
    ),
];

/// The limits in force.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest gRPC message, in bytes.
    pub message_bytes: usize,
    /// Requests served at once.
    pub concurrent_requests: usize,
    /// Streams of answers open at once.
    pub streams: usize,
    /// Requests per second and principal; 0: no limit.
    pub requests_per_second: u32,
    /// Deadline of a call that brings none.
    pub default_timeout: Duration,
    /// Longest deadline.
    pub max_timeout: Duration,
    /// Connections open at once.
    pub connections: usize,
}

impl Limits {
    /// Reads the limits; `None` after noting problems.
    pub fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let message_bytes = reader.within("limits.message_bytes", 65_536..=268_435_456);
        let concurrent_requests = reader.within("limits.concurrent_requests", 1..=1_000_000);
        let streams = reader.within("limits.streams", 1..=1_000_000);
        let requests_per_second = reader.get("limits.requests_per_second");
        let default_timeout = reader.duration("limits.default_timeout");
        let max_timeout = reader.duration("limits.max_timeout");
        let connections = reader.within("limits.connections", 1..=1_000_000);
        Some(Self {
            message_bytes: message_bytes?,
            concurrent_requests: concurrent_requests?,
            streams: streams?,
            requests_per_second: requests_per_second?,
            default_timeout: default_timeout?,
            max_timeout: max_timeout?,
            connections: connections?,
        })
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: 8 << 20,
            concurrent_requests: 1024,
            streams: 32_768,
            requests_per_second: 0,
            default_timeout: Duration::from_secs(60),
            max_timeout: Duration::from_secs(600),
            connections: 16_384,
        }
    }
}

/// How many of something that is limited each tenant has.
#[derive(Debug)]
pub(crate) struct Shares {
    most: usize,
    under_way: Mutex<HashMap<TenantId, usize>>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    of: Arc<Shares>,
    tenant: TenantId,
}

impl Shares {
    /// Of so many in all.
    pub(crate) fn new(all: usize) -> Self {
        Self {
            most: (all - all / 4).max(1),
            under_way: Mutex::default(),
        }
    }

    /// One more for a tenant; the most that it may have at once when it has them already.
    pub(crate) fn take(self: &Arc<Self>, tenant: &TenantId) -> Result<Share, usize> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let count = under_way.entry(tenant.clone()).or_default();
        if *count >= self.most {
            return Err(self.most);
        }
        *count += 1;
        Ok(Share {
            of: Arc::clone(self),
            tenant: tenant.clone(),
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut under_way = self.of.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = under_way.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                under_way.remove(&self.tenant);
            }
        }
    }
}

/// Token buckets by principal; each holds one second's worth of requests.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    per_second: f64,
    buckets: Mutex<HashMap<String, (f64, Instant)>>,
}

/// Buckets kept at most; full ones are dropped first, they hold nothing worth keeping.
const MAX_BUCKETS: usize = 65_536;

impl RateLimiter {
    pub(crate) fn new(per_second: u32) -> Self {
        Self {
            per_second: f64::from(per_second),
            buckets: Mutex::default(),
        }
    }

    /// Takes one request out of the principal's bucket, or says how long to wait.
    pub(crate) fn take(&self, principal: &str, now: Instant) -> Result<(), Duration> {
        if self.per_second == 0.0 {
            return Ok(());
        }
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_BUCKETS {
            buckets.retain(|_, (_, last)| now.duration_since(*last) < Duration::from_secs(1));
        }
        let (tokens, last) = buckets.entry(principal.into()).or_insert((self.per_second, now));
        *tokens = (*tokens + now.duration_since(*last).as_secs_f64() * self.per_second).min(self.per_second);
        *last = now;
        if *tokens >= 1.0 {
            *tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - *tokens) / self.per_second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_empties_refills_and_belongs_to_one_principal() {
        let limiter = RateLimiter::new(2);
        let start = Instant::now();
        assert!(limiter.take("a", start).is_ok());
        assert!(limiter.take("a", start).is_ok());
        let wait = limiter.take("a", start).unwrap_err();
        assert_eq!(wait, Duration::from_millis(500));
        assert!(limiter.take("b", start).is_ok());
        assert!(limiter.take("a", start + wait).is_ok());
    }
}
