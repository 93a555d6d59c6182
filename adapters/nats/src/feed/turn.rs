//! Feeds that keep order: whose turn it is, and what a lost connection has swallowed.

use std::time::Duration;

use anybroker_core::Result;
use tokio::time::Instant;

use super::{Feed, HEARTBEAT, is_final};
use crate::desk::{Telling, nak};
use crate::owner::{Change, Owner};

/// How long settles are waited for before lost deliveries are counted: they are told again after a second and a half.
const SETTLED: Duration = Duration::from_secs(4);

/// How much later than its patience the server may give something to somebody else.
const LATE: Duration = Duration::from_millis(300);

/// How soon a claim is looked after again that could not be.
pub(super) const AT_ONCE: Duration = Duration::from_millis(200);

/// So many deliveries are called back one by one. Where there may be more, because something from long ago is still open, they
/// are waited for.
pub(super) const MOST_CALLED: u64 = 20_000;

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
    pub(super) fn patience(&self) -> Duration {
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
    pub(super) async fn call_back(&mut self) -> Result<()> {
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
}
