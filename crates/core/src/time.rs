//! Moments, and a clock that tests can turn by hand.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A moment: whole milliseconds since the Unix epoch, the precision that every broker carries.
///
/// `Display` and `FromStr` use RFC 3339 (`2026-11-21T10:00:00.000Z`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From milliseconds since the Unix epoch.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub const fn as_millis(self) -> i64 {
        self.0
    }

    /// The wall clock's now.
    #[must_use]
    pub fn now() -> Self {
        SystemTime::now().into()
    }

    /// This moment plus `duration`, rounded up to whole milliseconds so that a delay never ends early.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        let millis = duration.as_nanos().div_ceil(1_000_000);
        Self(self.0.saturating_add(i64::try_from(millis).unwrap_or(i64::MAX)))
    }

    /// How long from `earlier` to this moment; zero when it is not later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self(i64::try_from(after.as_millis()).unwrap_or(i64::MAX)),
            Err(before) => Self(-i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX)),
        }
    }
}

impl From<Timestamp> for SystemTime {
    fn from(timestamp: Timestamp) -> Self {
        let distance = Duration::from_millis(timestamp.0.unsigned_abs());
        if timestamp.0 >= 0 { UNIX_EPOCH + distance } else { UNIX_EPOCH - distance }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // humantime formats 1970 to 9999; anything else prints as milliseconds.
        if (0..253_402_300_800_000).contains(&self.0) {
            write!(f, "{}", humantime::format_rfc3339_millis((*self).into()))
        } else {
            write!(f, "{}ms", self.0)
        }
    }
}

impl FromStr for Timestamp {
    type Err = humantime::TimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_rfc3339_weak(text).map(Into::into)
    }
}

/// Where a broker or worker takes its time from, so that tests of delays and leases need no waiting.
#[async_trait]
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The moment now. Never goes back.
    fn now(&self) -> Timestamp;

    /// The moment that is reached `duration` from now, and not a fraction of a millisecond earlier. `now()` has lost
    /// such a fraction, so that `now().after(duration)` may come that much too soon.
    fn deadline(&self, duration: Duration) -> Timestamp {
        self.now().after(duration)
    }

    /// Waits until `now()` is at least `moment`. Cancel-safe.
    async fn sleep_until(&self, moment: Timestamp);
}

/// The real clock: it starts at the wall clock's time and then follows the monotonic clock, so that a step of
/// the wall clock neither expires leases nor holds delays back.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    wall: Timestamp,
    start: std::time::Instant,
}

impl SystemClock {
    /// A clock that agrees with the wall clock now.
    #[must_use]
    pub fn new() -> Self {
        Self { wall: Timestamp::now(), start: std::time::Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        let elapsed = i64::try_from(self.start.elapsed().as_millis()).unwrap_or(i64::MAX);
        Timestamp(self.wall.0.saturating_add(elapsed))
    }

    fn deadline(&self, duration: Duration) -> Timestamp {
        self.wall.after(self.start.elapsed().saturating_add(duration))
    }

    async fn sleep_until(&self, moment: Timestamp) {
        loop {
            let left = moment.since(self.now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}

/// A clock that stands still until it is [advanced](ManualClock::advance).
///
/// ```
/// use std::time::Duration;
/// use anybroker_core::{Clock, ManualClock};
/// let clock = ManualClock::new();
/// let before = clock.now();
/// clock.advance(Duration::from_secs(30));
/// assert_eq!(clock.now().since(before), Duration::from_secs(30));
/// ```
#[derive(Debug, Clone)]
pub struct ManualClock(Arc<(Mutex<Timestamp>, Notify)>);

impl ManualClock {
    /// A clock at 2026-01-01T00:00:00Z.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new((Mutex::new(Timestamp(1_767_225_600_000)), Notify::new())))
    }

    /// Moves the clock forward and wakes everyone whose moment has come.
    pub fn advance(&self, duration: Duration) {
        let mut now = self.0.0.lock();
        *now = now.after(duration);
        drop(now);
        self.0.1.notify_waiters();
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        *self.0.0.lock()
    }

    async fn sleep_until(&self, moment: Timestamp) {
        loop {
            let advanced = self.0.1.notified();
            if self.now() >= moment {
                return;
            }
            advanced.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_rounds_up_to_the_next_millisecond() {
        assert_eq!(Timestamp(0).after(Duration::from_nanos(1)), Timestamp(1));
        assert_eq!(Timestamp(5).after(Duration::from_millis(2)), Timestamp(7));
    }

    #[test]
    fn a_deadline_of_the_real_clock_is_never_early() {
        let clock = SystemClock::new();
        for micros in [1, 500, 999, 1_000, 1_001] {
            let duration = Duration::from_micros(micros);
            let start = std::time::Instant::now();
            let deadline = clock.deadline(duration);
            while clock.now() < deadline {
                std::hint::spin_loop();
            }
            assert!(start.elapsed() >= duration, "{duration:?}");
        }
    }

    #[test]
    fn text_form_round_trips() {
        let moment = Timestamp::from_millis(1_767_225_600_123);
        assert_eq!(moment.to_string().parse::<Timestamp>().expect("rfc 3339"), moment);
    }

    #[tokio::test]
    async fn a_manual_sleeper_wakes_when_its_moment_comes() {
        let clock = ManualClock::new();
        let until = clock.now().after(Duration::from_secs(10));
        let sleeper = {
            let clock = clock.clone();
            tokio::spawn(async move { clock.sleep_until(until).await })
        };
        clock.advance(Duration::from_secs(4));
        assert!(clock.now() < until);
        clock.advance(Duration::from_secs(6));
        sleeper.await.expect("woken");
    }
}
