//! Feeds that keep order: whose turn it is, and what a lost connection has swallowed.

use std::time::Duration;

use anybroker_core::Result;
use tokio::time::Instant;

use super::{Feed, HEARTBEAT, is_final};
use crate::owner::{Change, Owner};

/// How long settles are waited for before lost deliveries are counted: they are told again after a second and a half.
const SETTLED: Duration = Duration::from_secs(4);

/// How long what has come back is waited for, once it is asked for. What the last member delayed comes later still.
const GATHERED: Duration = Duration::from_secs(2);

/// How soon a claim is looked after again that could not be.
const AT_ONCE: Duration = Duration::from_millis(200);

impl Feed {
    pub(super) async fn look_after_turn(&mut self, look: &mut Instant) -> Result<()> {
        let Some(owner) = self.owner.as_mut().filter(|_| Instant::now() >= *look) else { return Ok(()) };
        let shared = &self.desk.shared;
        match owner.look().await {
            Ok(Change::Gained) => {
                shared.gain(self.index, self.destination.to_string(), owner.fence());
                self.note_count().await;
            }
            Ok(Change::TakenOver) => {
                shared.gain(self.index, self.destination.to_string(), owner.fence());
                // The server goes on sending to a connection that it does not know to be dead, long after the last
                // renewal. So what was sent by now is counted, instead of how long ago that was.
                match self.count_lost().await {
                    Err(error) if is_final(&error) => return Err(error),
                    // Counted again before anything is asked for.
                    counted => self.is_ready &= counted.is_ok(),
                }
            }
            Ok(Change::Renewed) => shared.keep_fence(self.index, owner.fence()),
            Ok(Change::Lost) => {
                shared.lose(self.index);
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

    /// Under order, before anything is asked for on a new connection: what the server has sent and what is not here was
    /// lost with the old one. It comes back first, once the server's patience has ended.
    pub(super) async fn count_lost(&mut self) -> Result<()> {
        let deadline = Instant::now() + SETTLED;
        let (pending, here) = loop {
            // What is being settled is pending at the server or not: it has to be told first.
            while self.desk.shared.is_settling(self.index) && Instant::now() < deadline {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let scope = &self.desk.scopes[self.index as usize];
            let Some(info) = self.desk.topology.api.consumer("receive", &scope.stream, &scope.consumer).await? else {
                return self.check_consumer().await;
            };
            self.last = Some(info.delivered.consumer_seq);
            let here = self.desk.shared.accounted_for(self.index);
            let is_sure = !self.desk.shared.is_settling(self.index) || Instant::now() >= deadline;
            if is_sure || info.num_ack_pending <= here {
                break (info.num_ack_pending, here);
            }
        };
        let was_gathering = self.gathering.take().is_some();
        if pending <= here && was_gathering && !self.is_missing {
            self.desk.shared.hold(self.index, false);
        }
        if pending > here {
            let ack_wait = self.desk.shared.lock().feeds[self.index as usize].ack_wait;
            tracing::debug!(destination = %self.destination, ?ack_wait, "deliveries were lost; waiting for them");
            self.held_until = Some(Instant::now() + ack_wait + Duration::from_millis(300));
        }
        Ok(())
    }

    /// The count that the next delivery follows.
    pub(super) async fn note_count(&mut self) {
        let scope = &self.desk.scopes[self.index as usize];
        let info = self.desk.topology.api.consumer("receive", &scope.stream, &scope.consumer).await;
        self.last = info.ok().flatten().map(|info| info.delivered.consumer_seq);
    }

    /// Messages were sent to a connection that was lost, and come back when the server's patience ends. Under order
    /// everything behind them goes back too, to come after them.
    pub(super) async fn wait_for_missing(&mut self) -> Result<()> {
        let ack_wait = self.desk.shared.lock().feeds[self.index as usize].ack_wait;
        tracing::debug!(destination = %self.destination, ?ack_wait, "waiting for deliveries that were lost");
        self.take_in().await;
        self.renew_inbox().await?;
        let entries = self.desk.shared.surrender(self.index, false);
        let deadline = Instant::now() + self.desk.settle_timeout;
        let behind = ack_wait + Duration::from_millis(500);
        if let Err(error) = self.desk.give_back(self.index, entries, behind, deadline).await {
            tracing::debug!(%error, "not everything could be given back");
        }
        self.held_until = Some(Instant::now() + behind + Duration::from_millis(300));
        (self.is_missing, self.last, self.gathering) = (false, None, None);
        self.note_count().await;
        Ok(())
    }

    /// What was lost is due by now, and may be asked for; false while more was lost meanwhile.
    ///
    /// The server hands out what has come back in the order in which it came back, which is not its order in the stream. So
    /// nothing is handed out here before all of it is here.
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
            // Nothing was asked for here: the server still sends to the connection that is lost.
            let ack_wait = shared.lock().feeds[self.index as usize].ack_wait;
            self.held_until = Some(Instant::now() + ack_wait + Duration::from_millis(300));
            return Ok(false);
        }
        shared.hold(self.index, true);
        (self.held_until, self.gathering) = (None, Some((info.num_ack_pending, Instant::now() + GATHERED)));
        Ok(true)
    }

    /// Hands out again, once all is here that had to come back, or as much of it as there is room for.
    pub(super) fn gathered(&mut self) {
        let Some((pending, until)) = self.gathering else { return };
        let shared = &self.desk.shared;
        let here = shared.held(self.index);
        if !self.is_missing && (here >= pending.min(shared.max_in_flight as u64) || Instant::now() >= until) {
            self.gathering = None;
            shared.hold(self.index, false);
        }
    }
}
