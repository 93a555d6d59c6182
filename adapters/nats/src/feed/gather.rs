//! Feeds that keep order, after a takeover or a lost connection: what has to come back is gathered before anything is handed out.

use std::time::Duration;

use anybroker_core::Result;
use tokio::time::Instant;

use super::turn::{AT_ONCE, MOST_CALLED};
use super::{Feed, is_final};

/// What is waited for under order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gathering {
    /// How many messages, of those up to that place, there must be here.
    pending: u64,
    up_to: u64,
    until: Instant,
    /// Not before that more is asked for than there is room for.
    again: Instant,
}

impl Gathering {
    fn new(pending: u64, up_to: u64, now: Instant, patience: Duration) -> Self {
        Self { pending, up_to, until: now + patience, again: now }
    }

    fn needed(self) -> usize {
        usize::try_from(self.pending.min(MOST_CALLED)).unwrap_or(usize::MAX)
    }

    /// When there is something to be done for it.
    pub(super) fn next(self) -> Instant {
        if self.again > Instant::now() { self.again.min(self.until) } else { self.until }
    }

    /// A member that rests asks for nothing: the time in which the server sends everything begins when it asks again.
    fn rested(&mut self, now: Instant, patience: Duration) {
        self.until = now + patience;
    }

    fn is_over(self, here: u64, now: Instant) -> bool {
        here >= self.needed() as u64 || now >= self.until
    }
}

impl Feed {
    /// What was lost is due by now, and may be asked for; false while more was lost meanwhile.
    ///
    /// The server hands out what has come back in the order in which it came back, which is not its order in the stream. So
    /// nothing is handed out here before all of it is here, or the server has had the time to send it a second time: what comes
    /// later than that was delayed by the last member. (After two seconds some of it was still missing in two of ten fault runs on
    /// a busy machine, and what had been published behind it was handed out first.)
    pub(super) async fn gather(&mut self) -> Result<bool> {
        let scope = &self.desk.scopes[self.index as usize];
        let info = match self.desk.topology.api.consumer("receive", &scope.stream, &scope.consumer).await {
            Ok(Some(info)) => info,
            Err(error) if is_final(&error) => return Err(error),
            unknown => {
                self.check_consumer().await?;
                tracing::debug!(error = ?unknown.err(), "it could not be counted what was lost");
                self.held_until = Some(Instant::now() + AT_ONCE);
                return Ok(false);
            }
        };
        let shared = &self.desk.shared;
        let sent = info.delivered.consumer_seq;
        if self.last.replace(sent).is_some_and(|last| last != sent) {
            // Nothing was asked for here: the server still sends to the connection that is lost, until it has sent there what
            // was asked for. Who is there hands nothing out any more.
            return match self.call_back().await {
                Err(error) if is_final(&error) => Err(error),
                called => {
                    tracing::debug!(?called, "the server still sends elsewhere");
                    self.held_until = self.held_until.max(Some(Instant::now() + AT_ONCE));
                    Ok(false)
                }
            };
        }
        shared.hold(self.index, true);
        let (pending, up_to) = (info.num_ack_pending, info.delivered.stream_seq);
        (self.held_until, self.gathering) =
            (None, Some(Gathering::new(pending, up_to, Instant::now(), self.patience())));
        Ok(true)
    }

    /// How much to ask for beyond what there is room for, because it must be here before anything is handed out. The room may be
    /// full of what is new: the last member can have renewed a lease of what it held, and then the server sends what is new first.
    /// And there may be more to come back than has room, where the last member's connections were cut one after the other.
    /// Both were found by the suite's faults. Each time something new may come instead, so it is asked for now and then.
    pub(super) fn gather_more(&mut self) -> usize {
        let Some(gathering) = self.gathering.as_mut().filter(|gathering| gathering.again <= Instant::now()) else {
            return 0;
        };
        let batch = self.desk.shared.reserve_for(self.index, gathering.needed(), gathering.up_to);
        if batch > 0 {
            gathering.again = Instant::now() + AT_ONCE;
        }
        batch
    }

    /// Hands out again, once all is here that had to come back. `rested`: nothing was asked for since this was looked at last.
    pub(super) fn gathered(&mut self, rested: bool) {
        let (now, patience) = (Instant::now(), self.patience());
        let Some(gathering) = self.gathering.as_mut() else { return };
        if rested {
            gathering.rested(now, patience);
        }
        let shared = &self.desk.shared;
        if !self.is_missing && gathering.is_over(shared.held(self.index, gathering.up_to), now) {
            self.gathering = None;
            shared.hold(self.index, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_rests_while_it_gathers_does_not_run_out_of_time() {
        let (begun, patience) = (Instant::now(), Duration::from_secs(10));
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut gathering = Gathering::new(5, 7, begun, patience);
        assert!(!gathering.is_over(4, at(9)));
        assert!(gathering.is_over(5, at(1)), "all is here");
        gathering.rested(at(60), patience);
        assert!(!gathering.is_over(4, at(69)), "it has asked for ten seconds at most");
        assert!(gathering.is_over(4, at(70)), "what comes later was delayed");
    }
}
