//! Ranges of delays: messages that wait about as long wait in one queue.
//!
//! A queue lets only its first message expire, so one behind a longer one is late. Within a range nothing is later than by
//! half the length of its delay; what waits equally long is on time.

use std::fmt;
use std::time::Duration;

/// The shortest range, in milliseconds.
const SHORTEST: u64 = 250;

/// Delays of `from` (included) to the next range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    from: u64,
}

impl Range {
    /// 0, 250, 500, 750, 1,000, 1,500, 2,000, 3,000, 4,000, 6,000, …
    pub(crate) fn of(delay: Duration) -> Self {
        let delay = millis(delay);
        if delay < SHORTEST {
            return Self { from: 0 };
        }
        let octave = (delay / SHORTEST).ilog2();
        let (low, middle) = (SHORTEST << octave, (SHORTEST << octave) + (SHORTEST << octave) / 2);
        Self { from: if delay < middle { low } else { middle } }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.from)
    }
}

/// Whole milliseconds, rounded up: what comes back must not be early.
pub(crate) fn millis(delay: Duration) -> u64 {
    u64::try_from(delay.as_micros().div_ceil(1_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_reaches_half_its_start_further() {
        let from = |millis| Range::of(Duration::from_millis(millis)).from;
        let expected = [(0, 0), (249, 0), (250, 250), (400, 375), (999, 750), (1_000, 1_000), (1_499, 1_000)];
        for (millis, start) in expected {
            assert_eq!(from(millis), start, "{millis}");
        }
        let delays = (0..10_000).chain((10..30 * 24 * 3600).map(|second| second * 1_000));
        let all: std::collections::BTreeSet<u64> = delays.map(from).collect();
        assert!(all.len() < 50, "{}", all.len());
        let steps: Vec<u64> = all.into_iter().skip(1).collect();
        assert!(steps.windows(2).all(|pair| pair[1] - pair[0] <= pair[0] / 2 + 1));
    }

    #[test]
    fn a_part_of_a_millisecond_is_a_whole_one() {
        assert_eq!(millis(Duration::from_micros(1)), 1);
        assert_eq!(millis(Duration::from_micros(1_001)), 2);
    }
}
