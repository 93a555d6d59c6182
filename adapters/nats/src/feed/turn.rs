//! Feeds that keep order: whose turn it is, and what a lost connection has swallowed.

use std::time::Duration;

use anybroker_core::Result;
use tokio::time::Instant;

use super::{Feed, Gathering, HEARTBEAT, is_final};
use crate::desk::{Telling, nak};
use crate::owner::{Change, Owner};

/// How long settles are waited for before lost deliveries are counted: they are told again after a second and a half.
const SETTLED: Duration = Duration::from_secs(4);

/// How much later than its patience the server may give something to somebody else.
const LATE: Duration = Duration::from_millis(300);

/// How soon a claim is looked after again that could not be.
const AT_ONCE: Duration = Duration::from_millis(200);

/// So many deliveries are called back one by one. Where there may be more, because something from long ago is still open, they
/// are waited for.
const MOST_CALLED: u64 = 20_000;

impl Gathering {
    fn needed(self) -> usize {
        usize::try_from(self.pending.min(MOST_CALLED)).unwrap_or(usize::MAX)
    }

    /// When there is something to be done for it.
    pub(super) fn next(self) -> Instant {
        if self.again > Instant::now() { self.again.min(self.until) } else { self.until }
    }
}

impl Feed {
    pub(super) async fn look_after_turn(&mut self, look: &mut Instant) -> Result<()> {
        let Some(owner) = self.owner.as_mut().filter(|_| Instant::now() >= *look) else { return Ok(()) };
        let shared = &self.desk.shared;
        match owner.look().await {
            Ok(Change::Gained) => {
                shared.gain(self.index, self.destination.to_string(), owner.fence());
                self.is_uncalled = false;
                self.note_count().await;
            }
            Ok(Change::TakenOver) => {
                shared.gain(self.index, self.destination.to_string(), owner.fence());
                // The server goes on sending to a connection that it does not know to be dead, long after the last
                // renewal. So what was sent by now is counted, instead of how long ago that was.
                self.is_uncalled = false;
                match self.count_lost().await {
                    Err(error) if is_final(&error) => return Err(error),
                    // Counted again before anything is asked for.
                    counted => self.is_ready &= counted.is_ok(),
                }
            }
            Ok(Change::Renewed) => {
                shared.keep_fence(self.index, owner.fence());
                if self.is_uncalled {
                    match self.call_back().await {
                        Err(error) if is_final(&error) => return Err(error),
                        Err(error) => {
                            tracing::debug!(%error, "what was lost could not be called back yet");
                            *look = Instant::now() + AT_ONCE;
                            return Ok(());
                        }
                        Ok(()) => self.is_uncalled = false,
                    }
                }
            }
            Ok(Change::Lost) => {
                shared.lose(self.index);
                self.is_uncalled = false;
                (self.last, self.is_missing, self.held_until, self.gathering) = (None, false, None, None);
                self.renew_inbox().await?;
            }
            Ok(Change::None) => {}
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => {
                // The fence stops deliveries in time, should it stay like this.
                tracing::debug!(%error, "could not look after the claim");
                *look = Instant::now() + AT_ONCE;
                return Ok(());
            }
        }
        *look = Instant::now() + self.owner.as_ref().map_or(HEARTBEAT, Owner::next);
        Ok(())
    }

    /// After a member that was silent: what the server has sent to it and to others comes back first, once the server's
    /// patience has ended, because its deliveries may be in somebody's hands until then.
    async fn count_lost(&mut self) -> Result<()> {
        let scope = &self.desk.scopes[self.index as usize];
        let Some(info) = self.desk.topology.api.consumer("receive", &scope.stream, &scope.consumer).await? else {
            return self.check_consumer().await;
        };
        self.last = Some(info.delivered.consumer_seq);
        self.gathering = None;
        self.desk.shared.hold(self.index, false);
        if info.num_ack_pending > self.desk.shared.accounted_for(self.index, info.delivered.stream_seq) {
            self.wait_for_lost();
        }
        Ok(())
    }

    /// How long the server may wait for an ack of what it has sent, before it gives it to somebody else.
    fn patience(&self) -> Duration {
        self.desk.shared.lock().feeds[self.index as usize].ack_wait + LATE
    }

    fn wait_for_lost(&mut self) {
        let patience = self.patience();
        tracing::debug!(destination = %self.destination, ?patience, "deliveries were lost; waiting for them");
        self.held_until = Some(Instant::now() + patience);
    }

    /// Under order, before anything is asked for on a new connection: what the server has sent and what is not here was lost
    /// with the old one. It has been this member's turn all the time, so nobody has it. It is given back in its name, and comes
    /// again in its order: the server looks at the message that a nak names, and at whether the delivery's number can be
    /// (nats-server 2.15, `processNak`). What is acked by then stays so.
    async fn call_back(&mut self) -> Result<()> {
        let deadline = Instant::now() + SETTLED;
        // What is being settled is pending at the server or not: it has to be told first.
        while self.desk.shared.is_settling(self.index) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let scope = &self.desk.scopes[self.index as usize];
        let Some(info) = self.desk.topology.api.consumer("receive", &scope.stream, &scope.consumer).await? else {
            return self.check_consumer().await;
        };
        let (first, last) = (info.ack_floor.stream_seq + 1, info.delivered.stream_seq);
        self.last = Some(info.delivered.consumer_seq);
        (self.is_missing, self.gathering) = (false, None);
        self.desk.shared.sent_up_to(self.index, last);
        if last >= first + MOST_CALLED {
            self.wait_for_lost();
            return Ok(());
        }
        let prefix = self.ack_prefix.clone().unwrap_or_else(|| format!("$JS.ACK.{}.{}", scope.stream, scope.consumer));
        let here = self.desk.shared.all_held(self.index);
        let lost = (first..=last).filter(|sequence| info.num_ack_pending > 0 && !here.contains(sequence));
        let call = |sequence| Telling {
            feed: self.index,
            key: None,
            ack: format!("{prefix}.1.{sequence}.{}.0.0", info.delivered.consumer_seq).into(),
            payload: nak(Duration::ZERO),
        };
        let mut calls: Vec<Telling> = lost.map(call).collect();
        tracing::debug!(destination = %self.destination, from = first, to = last, calls = calls.len(), "called back");
        let called = self.desk.tell(&mut calls, Instant::now() + self.desk.settle_timeout).await;
        match called.into_iter().collect::<Result<()>>() {
            // It is due.
            Ok(()) => self.held_until = Some(Instant::now()),
            Err(error) => {
                tracing::debug!(%error, "not everything could be called back");
                self.wait_for_lost();
            }
        }
        Ok(())
    }

    /// The count that the next delivery follows.
    pub(super) async fn note_count(&mut self) {
        let scope = &self.desk.scopes[self.index as usize];
        let info = self.desk.topology.api.consumer("receive", &scope.stream, &scope.consumer).await;
        self.last = info.ok().flatten().map(|info| info.delivered.consumer_seq);
    }

    /// Messages were sent to a connection that was lost. Under order everything behind them goes back with them.
    pub(super) async fn call_missing(&mut self) -> Result<()> {
        tracing::debug!(destination = %self.destination, "deliveries were lost; calling them back");
        self.take_in().await;
        self.renew_inbox().await?;
        let entries = self.desk.shared.surrender(self.index, false);
        let deadline = Instant::now() + self.desk.settle_timeout;
        if let Err(error) = self.desk.spare(self.index, &entries, deadline).await {
            tracing::debug!(%error, "prefetched messages will count as handed over");
        }
        match self.call_back().await {
            Err(error) if is_final(&error) => Err(error),
            Err(error) => {
                tracing::debug!(%error, "what was lost could not be called back");
                (self.is_missing, self.last, self.gathering) = (false, None, None);
                self.wait_for_lost();
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

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
            (None, Some(Gathering { pending, up_to, until: Instant::now() + self.patience(), again: Instant::now() }));
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

    /// Hands out again, once all is here that had to come back.
    pub(super) fn gathered(&mut self) {
        let Some(gathering) = self.gathering else { return };
        let shared = &self.desk.shared;
        let here = shared.held(self.index, gathering.up_to);
        if !self.is_missing && (here >= gathering.needed() as u64 || Instant::now() >= gathering.until) {
            self.gathering = None;
            shared.hold(self.index, false);
        }
    }
}
