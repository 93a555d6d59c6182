//! Whether this process has stood still: stopped by a signal, or with whatever it runs in, as far as Linux' monotonic clock goes on
//! meanwhile (it does not while a machine sleeps).
//!
//! A broker that misses a member for `session_timeout` gives its partitions to others. The member learns of that by the answer to its
//! next heartbeat, and until then it would take acks of what others have by now. So a thread beats all the time, whatever the application
//! and its runtime do; who settles or receives after a pause in which nothing did finds it out first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::state::Shared;

/// See the module's documentation.
pub(crate) struct Pulse {
    last: Mutex<Instant>,
    /// How long nothing may beat.
    limit: Duration,
    stops: AtomicU64,
}

impl Pulse {
    /// The last heartbeat may be older than the last beat, and its answer takes time: a quarter is kept for both.
    pub(crate) fn new(session_timeout: Duration) -> Self {
        Self { last: Mutex::new(Instant::now()), limit: session_timeout * 3 / 4, stops: AtomicU64::new(0) }
    }

    /// From now on.
    fn begin(&self) {
        *self.last.lock() = Instant::now();
    }

    /// Beats; tells whether nothing did for too long.
    pub(crate) fn beat(&self) -> bool {
        let now = Instant::now();
        let last = std::mem::replace(&mut *self.last.lock(), now);
        let stood_still = now.saturating_duration_since(last) > self.limit;
        if stood_still {
            self.stops.fetch_add(1, Ordering::AcqRel);
        }
        stood_still
    }

    /// How often the process stood still.
    pub(crate) fn stops(&self) -> u64 {
        self.stops.load(Ordering::Acquire)
    }
}

/// Beats until the subscription closes. From then on nothing is judged: what is settled is committed where the broker still takes it.
pub(crate) fn keep_beating(shared: &Arc<Shared>) -> std::io::Result<()> {
    let shared = Arc::clone(shared);
    shared.pulse.begin();
    let pause = shared.pulse.limit / 30;
    let beat = move || {
        while !shared.is_closing.load(Ordering::Acquire) {
            drop(shared.lock_awake());
            std::thread::sleep(pause);
        }
    };
    std::thread::Builder::new().name("anybroker-kafka-pulse".into()).spawn(beat).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_counts_once_and_only_when_it_was_too_long() {
        let pulse = Pulse::new(Duration::from_millis(80));
        assert!(!pulse.beat());
        *pulse.last.lock() -= Duration::from_millis(50);
        assert!(!pulse.beat());
        *pulse.last.lock() -= Duration::from_millis(61);
        assert!(pulse.beat());
        assert!(!pulse.beat());
        assert_eq!(pulse.stops(), 1);
    }
}
