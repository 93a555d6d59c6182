//! The places of messages: which one is where, and which one is next.

use std::collections::hash_map;
use std::sync::Arc;

use anybroker_core::{Lane, Token};
use tokio::time::Instant;

use super::entry::{Entry, Key, Looking, Phase};
use super::{Expired, State};

#[derive(Default)]
pub(super) struct Slot {
    pub(super) generation: u64,
    pub(super) entry: Option<Entry>,
}

impl State {
    pub(super) fn insert(&mut self, entry: Entry) -> Key {
        let (place, is_known) = ((entry.feed, entry.sequence), entry.is_known);
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("memory ends before 2^32 entries")
        });
        let own = &mut self.slots[slot as usize];
        own.generation += 1;
        own.entry = Some(entry);
        let generation = own.generation;
        self.places.insert(place, slot);
        self.count += 1;
        self.unknown += usize::from(!is_known);
        (slot, generation)
    }

    pub(super) fn entry(&mut self, (slot, generation): Key) -> Option<&mut Entry> {
        let slot = self.slots.get_mut(slot as usize).filter(|slot| slot.generation == generation)?;
        slot.entry.as_mut()
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<Entry> {
        let entry = self.slots[slot as usize].entry.take()?;
        self.free.push(slot);
        self.count -= 1;
        self.unknown -= usize::from(!entry.is_known);
        let place = (entry.feed, entry.sequence);
        if let hash_map::Entry::Occupied(own) = self.places.entry(place)
            && *own.get() == slot
        {
            own.remove();
        }
        let feed = &mut self.feeds[entry.feed as usize];
        match entry.phase {
            Phase::Ready if feed.ready.get(&entry.sequence) == Some(&slot) => {
                feed.ready.remove(&entry.sequence);
            }
            Phase::Looking => {
                feed.looking.remove(&entry.sequence);
            }
            _ => {}
        }
        feed.unblock(&entry.message, entry.sequence);
        Some(entry)
    }

    pub(super) fn make_ready(&mut self, key: Key) {
        let Some(entry) = self.entry(key) else { return };
        entry.phase = Phase::Ready;
        let (feed, sequence) = (entry.feed, entry.sequence);
        let failed = (!entry.has_not_failed()).then(|| Arc::clone(&entry.message));
        let feed = &mut self.feeds[feed as usize];
        feed.looking.remove(&sequence);
        feed.ready.insert(sequence, key.0);
        if let Some(message) = failed {
            feed.block(&message, sequence);
        }
    }

    /// To be handed out again by this member: at once, or, where it may have failed, when its record has told.
    pub(super) fn again(&mut self, key: Key) -> Option<Looking> {
        let entry = self.entry(key)?;
        if !entry.may_have_failed {
            self.make_ready(key);
            return None;
        }
        entry.phase = Phase::Looking;
        let (feed, sequence, arrival, ack) = (entry.feed, entry.sequence, entry.arrival, entry.ack.clone());
        let message = Arc::clone(&entry.message);
        let own = &mut self.feeds[feed as usize];
        own.looking.insert(sequence, (arrival, Instant::now()));
        own.block(&message, sequence);
        Some(Looking { key, feed, ack, known: None })
    }

    pub(super) fn next_ready(&mut self, feed: usize, now: Instant) -> Option<u32> {
        loop {
            let own = &mut self.feeds[feed];
            if !own.may_deliver(now) {
                return None;
            }
            let slots = &self.slots;
            // Without order nothing overtakes what came before it and still looks its record up: else what comes again would come
            // behind everything that is new, however much that is.
            let first = if own.keeps_order { None } else { own.first_looking(now) };
            let is_free = |(sequence, slot): &(&u64, &u32)| {
                let entry = slots[**slot as usize].entry.as_ref().expect("what is ready is an entry");
                first.is_none_or(|first| entry.arrival < first) && !own.is_held_back(&entry.message, **sequence)
            };
            let (sequence, slot) = own.ready.iter().find(is_free).map(|(sequence, slot)| (*sequence, *slot))?;
            // Under order nothing overtakes what still looks its record up.
            if own.keeps_order && own.looking.first_key_value().is_some_and(|(looking, _)| *looking < sequence) {
                return None;
            }
            own.ready.remove(&sequence);
            let keeps_order = own.keeps_order;
            let entry = self.slots[slot as usize].entry.as_ref().expect("what is ready is an entry");
            // Here for so long that the server may have given it to somebody else.
            if !keeps_order && entry.server_until <= now {
                self.remove(slot);
                continue;
            }
            return Some(slot);
        }
    }

    /// Takes a message whose time to live has ended out of the way of the others, to be settled as a dead letter.
    pub(super) fn expire(&mut self, slot: u32, until: Instant) -> Option<Expired> {
        let own = &mut self.slots[slot as usize];
        let entry = own.entry.as_mut().filter(|entry| entry.is_expired())?;
        entry.phase = Phase::Settling { until };
        Some((entry.taken((slot, own.generation)), Arc::clone(&entry.message)))
    }

    /// The entry that a delivery stands for, while it is out and its lease holds.
    pub(super) fn out(&mut self, token: &Token, lane: Lane) -> Option<Key> {
        self.out_at(token, lane, Instant::now())
    }

    pub(super) fn out_at(&mut self, token: &Token, lane: Lane, now: Instant) -> Option<Key> {
        let Token::Pair(slot, generation) = token else { return None };
        let key = (u32::try_from(*slot).ok()?, *generation);
        if self.feeds.get(lane.index as usize).is_none_or(|feed| feed.epoch != lane.epoch) {
            return None;
        }
        let entry = self.entry(key)?;
        matches!(entry.phase, Phase::Out { until } if now < until).then_some(key)
    }

    pub(super) fn drop_feed(&mut self, feed: u32) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].entry.as_ref().is_some_and(|entry| entry.feed == feed) {
                self.remove(u32::try_from(slot).expect("slots are numbered in 32 bits"));
            }
        }
        self.remembered.retain(|(other, _), _| *other != feed);
    }
}
