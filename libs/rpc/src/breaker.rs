//! A circuit breaker: callers do not wait, one after the other, for a peer that hangs.
//!
//! After some time-outs in a row the peer is not asked for a while; then one call may try, and its outcome decides
//! (M. Nygard, Release It!, 2nd edition, chapter 5).

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time-outs in a row that open it.
const FAILURES: u32 = 3;
/// How long the peer is left alone, and how long one call that tries keeps others from it.
const PAUSE: Duration = Duration::from_secs(5);

/// The breaker in front of one peer.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// When the next call may try, while it is open.
    next: Option<Instant>,
}

impl Breaker {
    /// Whether the peer may be asked; [`Breaker::tell`] must be told what came of it.
    pub fn admits(&self) -> bool {
        self.admits_at(Instant::now())
    }

    fn admits_at(&self, now: Instant) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.next {
            Some(next) if now < next => false,
            Some(_) => {
                state.next = Some(now + PAUSE);
                true
            }
            None => true,
        }
    }

    /// Takes over whether the peer answered in time; a refusal is an answer.
    pub fn tell(&self, answered: bool) {
        self.tell_at(Instant::now(), answered);
    }

    fn tell_at(&self, now: Instant, answered: bool) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answered {
            if state.next.is_some() {
                tracing::info!("the peer answers again");
            }
            *state = State::default();
            return;
        }
        state.failures += 1;
        if state.failures == FAILURES {
            tracing::warn!("the peer does not answer; it is left alone for {PAUSE:?} at a time");
        }
        if state.failures >= FAILURES {
            state.next = Some(now + PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_hangs_is_left_alone_and_tried_by_one_at_a_time() {
        let (breaker, mut now) = (Breaker::default(), Instant::now());
        // An answer in between begins the count anew.
        for answered in [false, false, true, false, false] {
            assert!(breaker.admits_at(now));
            breaker.tell_at(now, answered);
        }
        assert!(breaker.admits_at(now));
        breaker.tell_at(now, false);
        assert!(!breaker.admits_at(now));
        now += PAUSE;
        assert!(breaker.admits_at(now) && !breaker.admits_at(now));
        breaker.tell_at(now, false);
        assert!(!breaker.admits_at(now));
        now += PAUSE;
        assert!(breaker.admits_at(now));
        breaker.tell_at(now, true);
        assert!(breaker.admits_at(now) && breaker.admits_at(now));
    }

    #[test]
    fn a_try_that_is_never_told_of_does_not_keep_it_open() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..FAILURES {
            breaker.tell_at(now, false);
        }
        assert!(breaker.admits_at(now + PAUSE));
        assert!(breaker.admits_at(now + PAUSE * 2));
    }
}
