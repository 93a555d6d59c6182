//! How long a failed message waits before its next attempt.

use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Result};

/// How long a failed message waits before its next attempt: the first delay, multiplied after each failure, spread
/// by jitter, up to a cap. How many attempts there are is the subscription's
/// [`max_attempts`](anybroker_core::SubscribeSpec::max_attempts) (default 5): the broker's side of the library
/// counts them, so that they survive this process.
///
/// The wait is the broker's (a nack with delay): it takes no place among the running handlers.
///
/// ```
/// use std::time::Duration;
/// use anybroker_worker::RetryPolicy;
/// let policy = RetryPolicy::default();
/// assert_eq!(policy.base_delay(1), Duration::from_secs(1));
/// assert_eq!(policy.base_delay(3), Duration::from_secs(4));
/// assert_eq!(policy.base_delay(10), Duration::from_secs(60));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    first_delay: Duration,
    multiplier: f64,
    max_delay: Duration,
    jitter: f64,
}

impl Default for RetryPolicy {
    /// First delay 1,000 ms, multiplier 2.0, cap 60,000 ms, jitter 0.2.
    fn default() -> Self {
        Self { first_delay: Duration::from_secs(1), multiplier: 2.0, max_delay: Duration::from_secs(60), jitter: 0.2 }
    }
}

impl RetryPolicy {
    /// No delay at all: the message comes back as soon as the broker hands it out.
    #[must_use]
    pub fn immediate() -> Self {
        Self { first_delay: Duration::ZERO, ..Self::default() }
    }

    /// The same delay after each failure, without jitter.
    #[must_use]
    pub fn fixed(delay: Duration) -> Self {
        Self { first_delay: delay, multiplier: 1.0, max_delay: delay, jitter: 0.0 }
    }

    /// The delay after the first failure.
    #[must_use]
    pub fn with_first_delay(mut self, delay: Duration) -> Self {
        self.first_delay = delay;
        self
    }

    /// The factor from one delay to the next; at least 1.
    #[must_use]
    pub fn with_multiplier(mut self, multiplier: f64) -> Self {
        self.multiplier = multiplier;
        self
    }

    /// The longest delay, jitter included.
    #[must_use]
    pub fn with_max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = delay;
        self
    }

    /// How far a delay may be off its base, as a fraction of it: 0.2 spreads 1 s over 0.8 s to 1.2 s, so that
    /// messages that failed together do not come back together.
    #[must_use]
    pub fn with_jitter(mut self, jitter: f64) -> Self {
        self.jitter = jitter;
        self
    }

    /// Whether every delay is zero.
    #[must_use]
    pub fn is_immediate(&self) -> bool {
        self.first_delay.is_zero() || self.max_delay.is_zero()
    }

    /// The delay after attempt number `attempt` (from 1) has failed, before jitter.
    #[must_use]
    pub fn base_delay(&self, attempt: u32) -> Duration {
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let cap = self.max_delay.as_secs_f64();
        // `min` also turns an overflow to infinity into the cap.
        Duration::from_secs_f64((self.first_delay.as_secs_f64() * self.multiplier.powi(exponent)).min(cap))
    }

    /// The delay after attempt number `attempt` (from 1) has failed, with jitter.
    #[must_use]
    pub fn delay(&self, attempt: u32) -> Duration {
        let base = self.base_delay(attempt);
        if self.jitter == 0.0 || base.is_zero() {
            return base;
        }
        self.spread(base, rand::random_range(-1.0..=1.0))
    }

    /// `side` from -1 (earliest) to 1 (latest).
    fn spread(&self, base: Duration, side: f64) -> Duration {
        base.mul_f64((1.0 + self.jitter * side).max(0.0)).min(self.max_delay)
    }

    /// # Errors
    /// `ConfigInvalid`, one context pair per bad field.
    pub(crate) fn validate(&self) -> Result<()> {
        let mut error = None;
        let mut refuse = |name: &'static str, problem: String| {
            let so_far = error.take().unwrap_or_else(|| Error::new(ErrorKind::ConfigInvalid, "worker", "retry policy"));
            error = Some(so_far.with(name, problem));
        };
        if !self.multiplier.is_finite() || self.multiplier < 1.0 {
            refuse("multiplier", format!("expected a number of at least 1, found {}", self.multiplier));
        }
        if !(0.0..=1.0).contains(&self.jitter) {
            refuse("jitter", format!("expected a fraction from 0 to 1, found {}", self.jitter));
        }
        if self.first_delay > self.max_delay {
            refuse("first_delay", format!("{:?} is longer than max_delay {:?}", self.first_delay, self.max_delay));
        }
        error.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_from_one_second_to_a_cap_of_a_minute() {
        let policy = RetryPolicy::default();
        let seconds: Vec<u64> = (1..=8).map(|attempt| policy.base_delay(attempt).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(policy.base_delay(u32::MAX), Duration::from_secs(60));
    }

    #[test]
    fn jitter_stays_within_a_fifth_and_under_the_cap_and_reaches_both_sides() {
        let policy = RetryPolicy::default();
        let delays: Vec<Duration> = (0..10_000).map(|_| policy.delay(1)).collect();
        let (least, most) = (delays.iter().min().unwrap(), delays.iter().max().unwrap());
        assert!(*least >= Duration::from_millis(800) && *least < Duration::from_millis(820), "{least:?}");
        assert!(*most <= Duration::from_millis(1_200) && *most > Duration::from_millis(1_180), "{most:?}");
        assert!((0..1_000).all(|_| policy.delay(20) <= Duration::from_secs(60)));
        assert_eq!(policy.spread(Duration::from_secs(10), -1.0), Duration::from_secs(8));
        assert_eq!(policy.spread(Duration::from_secs(10), 1.0), Duration::from_secs(12));
    }

    #[test]
    fn an_immediate_policy_never_waits() {
        assert!((1..10).all(|attempt| RetryPolicy::immediate().delay(attempt).is_zero()));
        assert_eq!(RetryPolicy::fixed(Duration::from_millis(5)).delay(9), Duration::from_millis(5));
    }

    #[test]
    fn every_bad_field_is_reported_at_once() {
        let policy =
            RetryPolicy::default().with_multiplier(f64::NAN).with_jitter(1.5).with_first_delay(Duration::from_secs(61));
        let error = policy.validate().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
        let names: Vec<_> = error.context().map(|(name, _)| name).collect();
        assert_eq!(names, ["multiplier", "jitter", "first_delay"]);
    }
}
