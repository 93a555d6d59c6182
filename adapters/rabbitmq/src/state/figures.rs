//! What a feed has.

use anybroker_core::{Destination, Group};

use super::{Phase, Shared};

impl Shared {
    /// How many of a feed's messages are unacked, and up to which tag.
    pub(crate) fn unacked(&self, feed: u32) -> (usize, u64) {
        let state = self.lock();
        let unacked = &state.feeds[feed as usize].unacked;
        (unacked.len(), unacked.last_key_value().map_or(0, |(tag, _)| *tag))
    }

    /// Whether anything up to that tag is unacked.
    pub(crate) fn has_unacked_to(&self, feed: u32, tag: u64) -> bool {
        let state = self.lock();
        state.feeds[feed as usize].unacked.first_key_value().is_some_and(|(first, _)| *first <= tag)
    }

    /// Whether anything of the feed is being settled.
    pub(crate) fn is_settling(&self, feed: u32) -> bool {
        let state = self.lock();
        let entry = |slot: &u32| state.slots[*slot as usize].entry.as_ref();
        let mut entries = state.feeds[feed as usize].unacked.values().filter_map(entry);
        entries.any(|entry| matches!(entry.phase, Phase::Settling { .. }))
    }

    /// Messages that this member has prefetched, which the server counts as in flight.
    pub(crate) fn prefetched(&self, destination: &Destination, group: &Group) -> u64 {
        let state = self.lock();
        let own = state.feeds.iter().filter(|feed| feed.destination == *destination && feed.group == *group);
        let is_queued = |slot: &&u32| {
            state.entry_at(**slot).is_some_and(|entry| entry.phase.is_waiting() && entry.offset.is_none())
        };
        own.map(|feed| feed.unacked.values().filter(is_queued).count() as u64).sum()
    }
}
