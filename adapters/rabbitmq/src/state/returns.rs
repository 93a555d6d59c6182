//! What goes back: leases that are over, and what nobody here is going to be handed.

use tokio::time::Instant;

use super::{Phase, Shared};

impl Shared {
    /// Ends the leases of a feed that are over: the server gives the messages to whoever is free; under order this member
    /// hands them out again, in their places.
    pub(crate) fn end_leases(&self, feed: u32) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let is_over = |slot: &&u32| {
            let entry = state.slots[**slot as usize].entry.as_ref();
            entry.is_some_and(|entry| matches!(entry.phase, Phase::Out { until } if until <= now))
        };
        let over: Vec<u32> = state.feeds[feed as usize].unacked.values().filter(is_over).copied().collect();
        if over.is_empty() {
            return;
        }
        for slot in over {
            if state.feeds[feed as usize].keeps_order {
                // A new generation: the delivery that is out is stale.
                let own = &mut state.slots[slot as usize];
                own.generation += 1;
                let key = (slot, own.generation);
                state.make_ready(key);
            } else {
                state.return_to_server(slot);
            }
        }
        drop(guard);
        self.arrived.notify_one();
        self.changed.notify_waiters();
    }

    /// Gives what is ready back to the server.
    pub(crate) fn surrender(&self, feed: u32) {
        let mut state = self.lock();
        let ready: Vec<u32> = state.feeds[feed as usize].ready.values().copied().collect();
        for slot in ready {
            state.return_to_server(slot);
        }
    }

    /// Whether what is prefetched should rather go to others: paused, or nobody has received for long.
    pub(crate) fn is_resting(&self) -> bool {
        let state = self.lock();
        state.is_paused || (!state.is_receiving && state.received.is_some_and(|at| at.elapsed() > self.lease / 2))
    }

    /// A receive begins or ends.
    pub(crate) fn receiving(&self, is_receiving: bool) {
        let mut state = self.lock();
        let was_late = state.received.is_none_or(|at| at.elapsed() > self.lease / 2);
        (state.is_receiving, state.received) = (is_receiving, Some(Instant::now()));
        drop(state);
        if is_receiving && was_late {
            self.changed.notify_waiters();
        }
    }
}
