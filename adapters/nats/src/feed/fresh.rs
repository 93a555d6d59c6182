//! How old what has just arrived can be.
//!
//! It may have lain in a connection that stood still for longer than the server waits, and be with somebody else by now. A
//! message tells when it was stored and not when it was sent. So this side sends itself an echo now and then: the server puts
//! it behind everything that it has sent already. What arrives behind it was sent after the echo was.

use std::time::Duration;

use tokio::time::Instant;

use super::Feed;

/// So many echoes in the time for which the server keeps a message: what arrives is at most a part of that older than it seems.
const ECHOES: u32 = 16;
/// More often than that says nothing.
const LEAST: Duration = Duration::from_millis(20);

pub(super) struct Fresh {
    /// What arrives now was not sent before that.
    since: Instant,
    /// The last echo, when it was sent, and whether it has come back.
    number: u64,
    sent: Option<Instant>,
    has_come: bool,
    /// Whether any ever came: a user may not be allowed to write to its own inbox.
    works: bool,
}

impl Fresh {
    /// For an inbox that is opened at that moment or later.
    pub(super) fn new(now: Instant, before: Option<&Self>) -> Self {
        let works = before.is_some_and(|before| before.works);
        Self { since: now, number: 0, sent: None, has_come: true, works }
    }

    /// What arrives now was not sent before that.
    pub(super) fn since(&self, now: Instant) -> Instant {
        // Each pull is behind an echo. What comes without any echo comes to somebody who may not send himself one.
        if self.works { self.since } else { now }
    }

    /// When the next one is due; one at a time.
    fn due(&self, now: Instant, ack_wait: Duration) -> Option<Instant> {
        let due = self.sent.map_or(now, |sent| sent + (ack_wait / ECHOES).max(LEAST));
        self.has_come.then_some(due)
    }

    fn send(&mut self, now: Instant) -> [u8; 8] {
        (self.number, self.sent, self.has_come) = (self.number + 1, Some(now), false);
        self.number.to_be_bytes()
    }

    pub(super) fn came(&mut self, echo: &[u8]) {
        if echo == self.number.to_be_bytes() && !self.has_come {
            (self.has_come, self.works) = (true, true);
            self.since = self.sent.unwrap_or(self.since);
        }
    }
}

impl Feed {
    /// When an echo is due, while anything is asked for.
    pub(super) fn echo_due(&self) -> Option<Instant> {
        let state = self.desk.shared.lock();
        let feed = &state.feeds[self.index as usize];
        self.fresh.due(Instant::now(), feed.ack_wait).filter(|_| feed.asked > 0)
    }

    /// Sends one where it is due: before a pull, and while anything is asked for.
    pub(super) async fn echo(&mut self) {
        let (now, ack_wait) = (Instant::now(), self.desk.shared.lock().feeds[self.index as usize].ack_wait);
        if self.fresh.due(now, ack_wait).is_some_and(|due| due <= now) {
            let echo = self.fresh.send(now).to_vec();
            // One that is not sent does not come back: then nothing counts as fresh any more, as it should.
            let _ = self.desk.link.client.publish(self.inbox.subject.clone(), echo.into()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_behind_an_echo_was_not_sent_before_it() {
        let (begun, ack_wait) = (Instant::now(), Duration::from_secs(16));
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut fresh = Fresh::new(begun, None);
        let first = fresh.send(begun);
        assert_eq!(fresh.due(at(5), ack_wait), None, "one at a time");
        assert_eq!(fresh.since(at(5)), at(5), "no echo has ever come");
        fresh.came(&[]);
        fresh.came(&7_u64.to_be_bytes());
        assert_eq!(fresh.due(at(5), ack_wait), None);
        fresh.came(&first);
        assert_eq!(fresh.since(at(5)), begun, "what was sent then has just arrived");
        assert_eq!(fresh.due(at(5), ack_wait), Some(at(1)));
        let second = fresh.send(at(5));
        assert_eq!(fresh.since(at(10)), begun);
        fresh.came(&second);
        assert_eq!(fresh.since(at(10)), at(5));
        assert_eq!(
            Fresh::new(at(10), Some(&fresh)).since(at(20)),
            at(10),
            "nothing was sent to an inbox before it was there"
        );
    }
}
