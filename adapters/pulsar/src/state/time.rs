//! What is given back or kept, and what time changes: leases, delays, and a member that rests.

use std::time::Duration;

use anybroker_core::{Lane, Timestamp, Token};
use tokio::time::Instant;

use super::{Phase, Returned, Shared, State};

/// A member that has not received for so long leaves what it has prefetched to others.
const REST: Duration = Duration::from_secs(2);

impl Shared {
    /// Gives a delivery back to be handed out again by this member, in its place. Released, it was not handed out.
    pub(crate) fn give_back(&self, token: &Token, lane: Lane, is_released: bool) -> bool {
        let mut state = self.lock();
        let Some(key) = state.out(token, lane) else { return false };
        if let Some(entry) = state.entries.get_mut(&key).filter(|_| is_released) {
            entry.hand_overs -= 1;
        }
        let is_given_up = state.entries.get(&key).is_some_and(|entry| state.is_given_up(entry.feed));
        state.ready_again(key);
        drop(state);
        self.arrived.notify_one();
        if is_given_up {
            self.room.notify_waiters();
        }
        true
    }

    /// Keeps a delivery for `lease` from now.
    pub(crate) fn extend(&self, token: &Token, lane: Lane, lease: Duration) -> bool {
        let mut state = self.lock();
        let Some(key) = state.out(token, lane) else { return false };
        let Some(entry) = state.entries.get_mut(&key) else { return false };
        entry.phase = Phase::Out { until: Instant::now() + lease };
        drop(state);
        self.kept.notify_one();
        true
    }

    /// Ends leases and delays that are over; answers what goes back to the broker, and when to look again.
    pub(crate) fn look_after(&self) -> (Returned, Instant) {
        let (now, time) = (Instant::now(), Timestamp::now());
        let mut next = now + Duration::from_millis(500);
        let (mut due, mut over) = (Vec::new(), Vec::new());
        let mut state = self.lock();
        let gives_back = !self.keeps_order && self.rests(&state) && !state.is_closing;
        let mut surplus = Vec::new();
        for (key, entry) in &state.entries {
            match entry.phase {
                Phase::Waiting { until } if until <= time => due.push(*key),
                // Whole milliseconds: not before it is really over.
                Phase::Waiting { until } => next = next.min(now + until.since(time) + Duration::from_millis(1)),
                Phase::Out { until } if until <= now => over.push(*key),
                Phase::Out { until } => next = next.min(until),
                Phase::Ready if gives_back && entry.siblings.is_none() => surplus.push(*key),
                Phase::Ready | Phase::Behind | Phase::Settling { .. } => {}
            }
        }
        for key in &due {
            state.ready_again(*key);
        }
        let mut returned = Vec::new();
        for key in over.iter().chain(&surplus) {
            // Under order, and for one of a batch, it stays with this member, in its place; otherwise others may have it.
            let stays = self.keeps_order || state.entries.get(key).is_some_and(|entry| entry.siblings.is_some());
            if stays {
                state.ready_again(*key);
            } else if let Some(entry) = state.remove(*key) {
                state.keep_count(&entry);
                returned.extend(state.returned(entry.feed, entry.id));
            }
        }
        drop(state);
        if !due.is_empty() || !over.is_empty() {
            self.arrived.notify_one();
        }
        if !returned.is_empty() || !over.is_empty() {
            self.room.notify_waiters();
        }
        (returned, next.max(now + Duration::from_millis(1)))
    }

    /// Whether nobody has received for so long that what is prefetched should rather go to others.
    pub(super) fn rests(&self, state: &State) -> bool {
        let is_late = || state.received.is_some_and(|at| at.elapsed() > self.rest());
        state.is_paused || (!state.is_receiving && is_late())
    }

    fn rest(&self) -> Duration {
        REST.min(self.lease / 2)
    }

    /// A receive begins or ends.
    pub(crate) fn receiving(&self, is_receiving: bool) {
        let mut state = self.lock();
        let was_late = state.received.is_none_or(|at| at.elapsed() > self.rest());
        (state.is_receiving, state.received) = (is_receiving, Some(Instant::now()));
        drop(state);
        if is_receiving && was_late {
            self.room.notify_waiters();
        }
    }
}
