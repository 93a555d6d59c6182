//! The time that a file goes by.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anybroker_core::{Clock, Timestamp};

/// Where leases, delays and times to live take their moments from. Processes that share a file have to agree on them,
/// so the system's clock is read more finely than to a millisecond before it is cut to one; like the core's, it follows
/// the monotonic clock from there on.
#[derive(Clone)]
pub(crate) enum FileClock {
    /// The system's: nanoseconds since the Unix epoch when the connection was opened.
    System { wall: Duration, start: Instant },
    /// One that was given; it stands still within a millisecond.
    Given(Arc<dyn Clock>),
}

impl FileClock {
    pub(crate) fn system() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::System { wall, start: Instant::now() }
    }

    /// Milliseconds since the Unix epoch.
    pub(crate) fn now(&self) -> i64 {
        match self {
            Self::System { wall, start } => i64::try_from((*wall + start.elapsed()).as_millis()).unwrap_or(i64::MAX),
            Self::Given(clock) => clock.now().as_millis(),
        }
    }

    /// How much later than [`now`](Self::now) it may be already.
    pub(crate) fn grain(&self) -> i64 {
        match self {
            Self::System { .. } => 1,
            Self::Given(_) => 0,
        }
    }

    /// Waits until `now` has come to that moment.
    pub(crate) async fn sleep_until(&self, moment: i64) {
        match self {
            Self::System { wall, start } => loop {
                let target = Duration::from_millis(moment.max(0).cast_unsigned());
                let left = target.saturating_sub(*wall + start.elapsed());
                if left.is_zero() {
                    return;
                }
                // tokio's timer cannot look further ahead than about two years.
                tokio::time::sleep(left.min(Duration::from_secs(365 * 24 * 3600))).await;
            },
            Self::Given(clock) => clock.sleep_until(Timestamp::from_millis(moment)).await,
        }
    }
}

/// Milliseconds of a duration, rounded up.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX)
}
