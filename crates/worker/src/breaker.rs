//! The circuit breaker: when everything fails, attempts are not burnt on it.

use std::time::Duration;

use anybroker_core::Timestamp;

/// Opens after a run of failures; while it is open consumption pauses, so that no attempt is burnt on a dependency
/// that is down.
///
/// Only failures that would be retried count (a bad message says nothing about the dependency), and any success ends
/// the run. Handlers that were running when it opened end as they end. What waited for a handler goes back uncounted.
/// After `reset` it is half-open: that many attempts are made one after another; if they succeed it closes, and the
/// first failure opens it again.
///
/// ```
/// use std::time::Duration;
/// use anybroker_worker::CircuitBreaker;
/// let breaker = CircuitBreaker::default().with_failures(5).with_reset(Duration::from_secs(10));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CircuitBreaker {
    failures: u32,
    reset: Duration,
    half_open_attempts: u32,
}

impl Default for CircuitBreaker {
    /// Opens after 10 consecutive failures, resets after 60 s, 1 half-open attempt.
    fn default() -> Self {
        Self { failures: 10, reset: Duration::from_secs(60), half_open_attempts: 1 }
    }
}

impl CircuitBreaker {
    /// After how many consecutive failures it opens; at least 1.
    #[must_use]
    pub fn with_failures(mut self, failures: u32) -> Self {
        self.failures = failures.max(1);
        self
    }

    /// How long it stays open.
    #[must_use]
    pub fn with_reset(mut self, reset: Duration) -> Self {
        self.reset = reset;
        self
    }

    /// How many attempts must succeed before it closes; at least 1.
    #[must_use]
    pub fn with_half_open_attempts(mut self, attempts: u32) -> Self {
        self.half_open_attempts = attempts.max(1);
        self
    }
}

/// What an attempt says about the dependency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    /// It works.
    Good,
    /// It does not.
    Bad,
    /// Nothing (a bad message, a cancelled handler).
    Unknown,
}

/// Where a breaker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Everything may run.
    Closed,
    /// Nothing may run until then.
    Open(Timestamp),
    /// One attempt may run.
    Probing,
    /// It runs; nothing else may.
    Probe,
}

/// A breaker at work.
#[derive(Debug)]
pub(crate) struct Breaker {
    settings: CircuitBreaker,
    gate: Gate,
    run: u32,
    good_probes: u32,
}

impl Breaker {
    pub(crate) fn new(settings: CircuitBreaker) -> Self {
        Self { settings, gate: Gate::Closed, run: 0, good_probes: 0 }
    }

    pub(crate) fn gate(&self) -> Gate {
        self.gate
    }

    /// Whether an attempt may begin; marks it as begun.
    pub(crate) fn begin(&mut self) -> bool {
        match self.gate {
            Gate::Closed => true,
            Gate::Probing => {
                self.gate = Gate::Probe;
                true
            }
            Gate::Open(_) | Gate::Probe => false,
        }
    }

    /// An attempt has ended. Tells whether the gate has changed.
    pub(crate) fn end(&mut self, health: Health, now: Timestamp) -> bool {
        match (self.gate, health) {
            (Gate::Closed, Health::Good) => {
                self.run = 0;
                false
            }
            (Gate::Closed, Health::Bad) => {
                self.run += 1;
                if self.run >= self.settings.failures {
                    self.gate = Gate::Open(now.after(self.settings.reset));
                    return true;
                }
                false
            }
            (Gate::Probe, Health::Good) => {
                self.good_probes += 1;
                if self.good_probes >= self.settings.half_open_attempts {
                    (self.gate, self.run) = (Gate::Closed, 0);
                } else {
                    self.gate = Gate::Probing;
                }
                true
            }
            (Gate::Probe, Health::Bad) => {
                self.gate = Gate::Open(now.after(self.settings.reset));
                true
            }
            (Gate::Probe, Health::Unknown) => {
                self.gate = Gate::Probing;
                true
            }
            // Attempts that began before it opened say nothing new.
            (Gate::Closed, Health::Unknown) | (Gate::Open(_) | Gate::Probing, _) => false,
        }
    }

    /// The time it was open for is over: half-open.
    pub(crate) fn half_open(&mut self) {
        (self.gate, self.good_probes) = (Gate::Probing, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(1_000);

    #[test]
    fn it_opens_after_ten_failures_in_a_row_and_closes_after_one_good_probe() {
        let mut breaker = Breaker::new(CircuitBreaker::default());
        for _ in 0..9 {
            assert!(breaker.begin());
            assert!(!breaker.end(Health::Bad, NOW));
        }
        assert!(!breaker.end(Health::Good, NOW), "a success ends the run");
        for _ in 0..9 {
            assert!(!breaker.end(Health::Bad, NOW));
        }
        assert!(breaker.end(Health::Bad, NOW));
        assert_eq!(breaker.gate(), Gate::Open(Timestamp::from_millis(61_000)));
        assert!(!breaker.begin());
        breaker.half_open();
        assert!(breaker.begin());
        assert!(!breaker.begin(), "one attempt while half-open");
        assert!(breaker.end(Health::Good, NOW));
        assert_eq!(breaker.gate(), Gate::Closed);
    }

    #[test]
    fn a_bad_probe_opens_it_again_and_an_unclear_one_is_made_again() {
        let mut breaker = Breaker::new(CircuitBreaker::default().with_failures(1));
        breaker.end(Health::Bad, NOW);
        breaker.half_open();
        assert!(breaker.begin());
        breaker.end(Health::Unknown, NOW);
        assert_eq!(breaker.gate(), Gate::Probing);
        assert!(breaker.begin());
        breaker.end(Health::Bad, NOW);
        assert!(matches!(breaker.gate(), Gate::Open(_)));
    }

    #[test]
    fn stragglers_neither_open_nor_close_it() {
        let mut breaker = Breaker::new(CircuitBreaker::default().with_failures(1));
        breaker.end(Health::Bad, NOW);
        let open = breaker.gate();
        assert!(!breaker.end(Health::Good, NOW) && !breaker.end(Health::Bad, NOW));
        assert_eq!(breaker.gate(), open);
    }
}
