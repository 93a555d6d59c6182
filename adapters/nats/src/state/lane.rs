//! One destination of a subscription: how much is asked for, whose it is, what goes back to the server.

use std::collections::HashSet;

use anybroker_core::{Destination, Group, Lane, SubscriptionEvent, Timestamp};
use tokio::time::Instant;

use super::Shared;
use super::entry::{Entry, Phase, Surrendered};
use crate::record::Record;

impl Shared {
    /// How many messages a feed may ask for now; counts them as asked for.
    pub(crate) fn reserve(&self, feed: u32) -> usize {
        if self.is_resting() {
            return 0;
        }
        let mut state = self.lock();
        let asked: usize = state.feeds.iter().map(|feed| feed.asked).sum();
        // What the server does not know to be here comes again, and takes no room of its own. It cannot be acked before.
        let free = self.max_in_flight.saturating_sub(state.count - state.unknown + asked);
        let share = self.max_in_flight.div_ceil(state.feeds.len()).max(1);
        let is_stopped = state.is_closing || state.failure.is_some();
        let own = &mut state.feeds[feed as usize];
        if is_stopped || !own.is_active {
            return 0;
        }
        let wanted = free.min(share.saturating_sub(own.asked));
        // Few large requests rather than many small ones.
        if wanted == 0 || (own.asked > 0 && wanted < share.div_ceil(2)) {
            return 0;
        }
        own.asked += wanted;
        wanted
    }

    /// Of `needed` messages up to a place, which have to be here together before any of them can be handed out: how many to ask
    /// for, whether there is room or not. None while what was asked for has not come, or while the member rests. Counts them as
    /// asked for.
    pub(crate) fn reserve_for(&self, feed: u32, needed: usize, up_to: u64) -> usize {
        if self.is_resting() {
            return 0;
        }
        let here = usize::try_from(self.held(feed, up_to)).unwrap_or(usize::MAX);
        let mut state = self.lock();
        let is_stopped = state.is_closing || state.failure.is_some();
        let own = &mut state.feeds[feed as usize];
        if is_stopped || !own.is_active || own.asked > 0 {
            return 0;
        }
        own.asked = needed.saturating_sub(here);
        own.asked
    }

    /// The server will not send `count` of what it was asked for; all of it with `None`.
    pub(crate) fn unasked(&self, feed: u32, count: Option<usize>) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        own.asked = count.map_or(0, |count| own.asked.saturating_sub(count));
        drop(state);
        self.room.notify_waiters();
    }

    /// Under order: nothing is handed out while earlier messages are on their way back.
    pub(crate) fn hold(&self, feed: u32, is_held: bool) {
        self.lock().feeds[feed as usize].is_held = is_held;
        self.arrived.notify_one();
    }

    /// The lane is another member's: nothing of it can be settled here any more.
    pub(crate) fn lose(&self, feed: u32) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        (own.is_active, own.is_held, own.fence, own.asked) = (false, false, None, 0);
        let lane = Lane { index: feed, epoch: own.epoch };
        state.drop_feed(feed);
        state.events.push_back(SubscriptionEvent::Lost { lane });
        drop(state);
        self.arrived.notify_one();
        self.room.notify_waiters();
    }

    /// The lane is this member's.
    pub(crate) fn gain(&self, feed: u32, name: String, fence: Instant) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        own.epoch += 1;
        (own.is_active, own.fence) = (true, Some(fence));
        let lane = Lane { index: feed, epoch: own.epoch };
        state.events.push_back(SubscriptionEvent::Assigned { lane, name });
        drop(state);
        self.arrived.notify_one();
        self.room.notify_waiters();
    }

    pub(crate) fn keep_fence(&self, feed: u32, fence: Instant) {
        self.lock().feeds[feed as usize].fence = Some(fence);
        self.arrived.notify_one();
    }

    /// Takes everything of a feed that is not being settled, in order, to be given back to the server; what is out only
    /// with `all`.
    pub(crate) fn surrender(&self, feed: u32, all: bool) -> Vec<Surrendered> {
        let mut state = self.lock();
        let slots: Vec<u32> = (0..)
            .zip(&state.slots)
            .filter(|(_, slot)| {
                slot.entry.as_ref().is_some_and(|entry| {
                    entry.feed == feed
                        && match entry.phase {
                            Phase::Settling { .. } => false,
                            Phase::Out { .. } => all,
                            Phase::Looking | Phase::Ready | Phase::Waiting => true,
                        }
                })
            })
            .map(|(slot, _)| slot)
            .collect();
        let mut entries: Vec<_> = slots.into_iter().filter_map(|slot| state.remove(slot)).collect();
        entries.sort_unstable_by_key(|entry| entry.sequence);
        let (now, keeps_order) = (Instant::now(), state.feeds[feed as usize].keeps_order);
        // What may be with somebody else by now is not taken from there.
        entries.retain(|entry| keeps_order || now < entry.server_until);
        let surrendered = |entry: Entry| Surrendered {
            sequence: entry.sequence,
            // The server counts this delivery, which reached no handler. Of one whose record is not read yet nothing may
            // be written. The first is not worth a record: the limit that it counts against is far away.
            spared: (!entry.was_out && entry.delivered > 1 && entry.phase == Phase::Ready).then(|| Record {
                spare: entry.record.spare + 1,
                delivered: entry.delivered,
                ..entry.record
            }),
            ack: entry.ack,
        };
        entries.into_iter().map(surrendered).collect()
    }

    /// The server has sent nothing behind that place, as far as it knows: a killed one may have forgotten that it has.
    pub(crate) fn sent_up_to(&self, feed: u32, place: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let entries = state.slots.iter_mut().filter_map(|slot| slot.entry.as_mut());
        for entry in entries.filter(|entry| entry.feed == feed && entry.sequence > place) {
            state.unknown += usize::from(std::mem::replace(&mut entry.is_known, false));
        }
    }

    /// What is prefetched is not here any more: the server may not know that it is.
    pub(crate) fn forget_prefetched(&self, feed: u32) {
        let mut state = self.lock();
        let is_prefetched = |entry: &Entry| entry.feed == feed && matches!(entry.phase, Phase::Looking | Phase::Ready);
        for slot in 0..state.slots.len() {
            if state.slots[slot].entry.as_ref().is_some_and(is_prefetched) {
                state.remove(u32::try_from(slot).expect("slots are numbered in 32 bits"));
            }
        }
        drop(state);
        self.room.notify_waiters();
    }

    /// Prefetched and delayed messages of this member that the server counts as in flight.
    pub(crate) fn kept_back(&self, destination: &Destination, group: &Group) -> (u64, u64) {
        let now = Timestamp::now().as_millis();
        let state = self.lock();
        let own = state.feeds.iter().position(|feed| feed.destination == *destination && feed.group == *group);
        let Some(feed) = own.and_then(|own| u32::try_from(own).ok()) else { return (0, 0) };
        let entries = state.slots.iter().filter_map(|slot| slot.entry.as_ref());
        let is_waiting = |entry: &&Entry| entry.feed == feed && matches!(entry.phase, Phase::Looking | Phase::Ready);
        let here = entries.clone().filter(|entry| entry.feed == feed && entry.phase == Phase::Waiting).count();
        let delayed = state.remembered.iter().filter(|((of, _), (record, _))| *of == feed && record.not_before > now);
        (entries.filter(is_waiting).count() as u64, (delayed.count() + here) as u64)
    }

    /// How many messages of the feed, up to a place, this member accounts for: those that are here and not being settled, and
    /// those that it delayed.
    pub(crate) fn accounted_for(&self, feed: u32, up_to: u64) -> u64 {
        let places = self.places(feed, |phase| !matches!(phase, Phase::Settling { .. }));
        places.into_iter().filter(|place| *place <= up_to).count() as u64
    }

    /// How many messages of the feed, up to a place, the server counts as being with this member.
    pub(crate) fn held(&self, feed: u32, up_to: u64) -> u64 {
        self.all_held(feed).into_iter().filter(|place| *place <= up_to).count() as u64
    }

    /// The places of messages of the feed that the server counts as being with this member.
    pub(crate) fn all_held(&self, feed: u32) -> HashSet<u64> {
        self.places(feed, |_| true)
    }

    /// The places of messages of the feed that are here in such a phase, or that this member delayed.
    fn places(&self, feed: u32, counts: impl Fn(Phase) -> bool) -> HashSet<u64> {
        let now = Timestamp::now().as_millis();
        let state = self.lock();
        let entries = state.slots.iter().filter_map(|slot| slot.entry.as_ref());
        let here = entries.filter(|entry| entry.feed == feed && counts(entry.phase)).map(|entry| entry.sequence);
        let delayed = state.remembered.iter().filter(|((of, _), (record, _))| *of == feed && record.not_before > now);
        here.chain(delayed.map(|((_, place), _)| *place)).collect()
    }

    /// Whether anything of the feed is being settled.
    pub(crate) fn is_settling(&self, feed: u32) -> bool {
        let state = self.lock();
        let mut entries = state.slots.iter().filter_map(|slot| slot.entry.as_ref());
        entries.any(|entry| entry.feed == feed && matches!(entry.phase, Phase::Settling { .. }))
    }

    /// Whether anything of the feed still looks its record up: given back like that, it would count as handed over.
    pub(crate) fn is_looking(&self, feed: u32) -> bool {
        !self.lock().feeds[feed as usize].looking.is_empty()
    }
}
