//! Leases: kept, extended, given up. A member that does not receive rests.

use std::time::Duration;

use anybroker_core::{Lane, Timestamp, Token};
use tokio::time::Instant;

use super::entry::{FeedState, Phase, Renewal};
use super::{Key, REMEMBERED, Shared};

impl Shared {
    /// Gives a delivery back to be handed out again by this member, in its place. `counts` tells whether it was a
    /// hand-over without an outcome.
    pub(crate) fn give_back(&self, token: &Token, lane: Lane, counts: bool) -> bool {
        let mut state = self.lock();
        let Some(key) = state.out(token, lane) else { return false };
        if let Some(entry) = state.entry(key) {
            if !counts {
                (entry.was_out, entry.again) = (entry.again > 0, entry.again.saturating_sub(1));
            }
            if let Some(looking) = state.again(key) {
                let _ = self.lookups.send(looking);
            }
        }
        drop(state);
        self.arrived.notify_one();
        true
    }

    /// Keeps a delivery for `lease` from now.
    pub(crate) fn extend(&self, token: &Token, lane: Lane, lease: Duration) -> bool {
        let now = Instant::now();
        let mut state = self.lock();
        let Some(key) = state.out(token, lane) else { return false };
        let Some(entry) = state.entry(key) else { return false };
        let until = now + lease;
        (entry.phase, entry.asked_at) = (Phase::Out { until }, Some(now));
        let _ = self.renewals.send(Renewal { key, ack: entry.ack.clone() });
        true
    }

    /// The server has answered that it keeps these, as it was asked to at that moment or later.
    pub(crate) fn renewed(&self, asked_at: Instant, keys: impl Iterator<Item = Key>) {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        for key in keys {
            let Some(feed) = state.entry(key).map(|entry| entry.feed) else { continue };
            let feed = &state.feeds[feed as usize];
            let (until, keeps_order) = (feed.kept_until(asked_at), feed.keeps_order);
            let Some(entry) = state.entry(key) else { continue };
            // Answered too late, it may have been somebody else's before it was kept.
            if keeps_order || now < entry.server_until {
                entry.server_until = until.max(entry.server_until);
            }
        }
    }

    /// After that an answer to a renewal is of no use.
    pub(crate) fn renewal_limit(&self) -> Duration {
        self.lock().feeds.iter().map(|feed| feed.ack_wait).min().unwrap_or_default() / 4
    }

    /// Renews what needs it, forgets what is over; answers when to look again.
    pub(crate) fn keep_leases(&self) -> Duration {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut next = Duration::from_secs(1);
        let mut over = Vec::new();
        for (place, slot) in state.slots.iter_mut().enumerate() {
            let Some(entry) = slot.entry.as_mut() else { continue };
            let FeedState { ack_wait, keeps_order, fence, .. } = state.feeds[entry.feed as usize];
            next = next.min(ack_wait / 5);
            match entry.phase {
                Phase::Out { until } if until <= now => {
                    over.push(u32::try_from(place).expect("slots are numbered in 32 bits"));
                    continue;
                }
                Phase::Out { until } if until <= entry.server_until => continue,
                // Not handed out any more: it may be with somebody else.
                Phase::Ready | Phase::Looking if entry.server_until <= now && !keeps_order => {
                    over.push(u32::try_from(place).expect("slots are numbered in 32 bits"));
                    continue;
                }
                _ => {}
            }
            let was_asked = entry.asked_at.is_some_and(|asked| now < asked + ack_wait / 8);
            // Under order somebody else may have the turn by then, and would wait for what is kept here.
            let is_fenced = fence.is_some_and(|fence| fence <= now);
            if entry.server_until < now + ack_wait / 2 && !was_asked && !is_fenced {
                entry.asked_at = Some(now);
                let key = (u32::try_from(place).expect("slots are numbered in 32 bits"), slot.generation);
                let _ = self.renewals.send(Renewal { key, ack: entry.ack.clone() });
            }
        }
        if state.remembered.len() > REMEMBERED / 2 {
            // Those whose next delivery went to another member.
            let recently = Timestamp::now().as_millis() - 60_000;
            state.remembered.retain(|_, (record, _)| record.not_before > recently);
        }
        let any_over = !over.is_empty();
        for slot in over {
            let Some(mut entry) = state.remove(slot) else { continue };
            let feed = &state.feeds[entry.feed as usize];
            if feed.blocks.is_some() && !entry.has_not_failed() {
                // Later ones wait for it: it stays, as a new delivery, and keeps its place at the server.
                let ack = entry.ack.clone();
                entry.server_until = now + feed.ack_wait;
                entry.phase = Phase::Looking;
                let key = state.insert(entry);
                let _ = self.renewals.send(Renewal { key, ack });
                if let Some(looking) = state.again(key) {
                    let _ = self.lookups.send(looking);
                }
            }
        }
        drop(guard);
        if any_over {
            self.arrived.notify_one();
            self.room.notify_waiters();
        }
        next.max(Duration::from_millis(50))
    }

    /// Whether nobody has received for so long that what is prefetched should rather go to others.
    pub(crate) fn is_resting(&self) -> bool {
        let state = self.lock();
        state.is_paused || (!state.is_receiving && state.received.is_some_and(|at| at.elapsed() > self.lease / 2))
    }

    /// When a member that does not receive begins to rest.
    pub(crate) fn rests_at(&self) -> Option<Instant> {
        let state = self.lock();
        if state.is_receiving { None } else { state.received.map(|at| at + self.lease / 2) }
    }

    /// A receive begins or ends.
    pub(crate) fn receiving(&self, is_receiving: bool) {
        let mut state = self.lock();
        let was_late = state.received.is_none_or(|at| at.elapsed() > self.lease / 2);
        (state.is_receiving, state.received) = (is_receiving, Some(Instant::now()));
        drop(state);
        if is_receiving && was_late {
            self.room.notify_waiters();
        }
    }
}
