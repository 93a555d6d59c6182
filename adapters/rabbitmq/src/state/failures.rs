//! What failed and keeps its place, because later messages wait for it (`OnFailure::Block`).
//!
//! It waits here, unacked, and what is behind it waits here too. What has to be known of it elsewhere is noted in the group's
//! ledger (`ledger.rs`), which its feed writes.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Blocks, Message, Order, Timestamp};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Entry, FeedState, Key, Phase, Shared, State, Taken};
use crate::codec::Hop;
use crate::ledger::{Note, mark};

/// What of a feed waits.
pub(super) struct Waiting {
    pub(super) keys: Blocks<u64>,
    /// Failed ones whose delay is not over, by its end and their tag.
    pub(super) due: BTreeSet<(Instant, u64)>,
    /// Counts changes of what the ledger has to hold.
    changes: u64,
    /// The last change that a settle waits for.
    urgent: u64,
    /// Failures that earlier members noted, of messages that have not come yet: of the queue, and of the stream.
    expected: [HashMap<u128, Vec<Note>>; 2],
    /// How many messages may come, from the queue and from the stream, before all that was out at an earlier member has.
    to_come: [usize; 2],
}

/// A failure that is being noted.
pub(super) struct Recording {
    hop: Hop,
    until: i64,
    due: Instant,
    change: u64,
    told: oneshot::Sender<()>,
}

impl FeedState {
    /// With later messages waiting for one that failed.
    pub(crate) fn blocking(mut self, order: Order) -> Self {
        self.waiting = Some(Waiting {
            keys: Blocks::new(order),
            due: BTreeSet::new(),
            changes: 0,
            urgent: 0,
            expected: Default::default(),
            to_come: [0, 0],
        });
        self
    }

    /// How many are here, and neither ready nor out.
    pub(super) fn kept(&self) -> usize {
        self.waiting.as_ref().map_or(0, |waiting| waiting.keys.behind() + waiting.due.len())
    }
}

impl Waiting {
    /// Nothing of the feed is here any more.
    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.due.clear();
        self.expected.iter_mut().for_each(HashMap::clear);
    }

    /// One of the messages that earlier members may have had has come, or one behind all of them.
    pub(super) fn came(&mut self, of_stream: bool) {
        let (to_come, expected) =
            (&mut self.to_come[usize::from(of_stream)], &mut self.expected[usize::from(of_stream)]);
        *to_come = to_come.saturating_sub(1);
        if *to_come == 0 && !expected.is_empty() {
            // Settled by their member, which died before it could note that.
            expected.clear();
            self.changes += 1;
        }
    }

    fn claim(&mut self, message: &Message, redrives: u32, of_stream: bool) -> Option<Note> {
        let expected = &mut self.expected[usize::from(of_stream)];
        if expected.is_empty() {
            return None;
        }
        let mark = mark(message, redrives);
        let notes = expected.get_mut(&mark)?;
        let note = if notes.is_empty() { None } else { Some(notes.remove(0)) };
        if notes.is_empty() {
            expected.remove(&mark);
        }
        note
    }
}

impl Shared {
    /// The feed has its turn, and this is what earlier members have noted. They held `most` messages of the queue and of the
    /// stream at most.
    pub(crate) fn expect(&self, feed: u32, notes: Vec<Note>, most: usize, reads_stream: bool) {
        let mut state = self.lock();
        let Some(waiting) = &mut state.feeds[feed as usize].waiting else { return };
        waiting.expected.iter_mut().for_each(HashMap::clear);
        for note in notes {
            waiting.expected[usize::from(note.of_stream)].entry(note.mark).or_default().push(note);
        }
        (waiting.changes, waiting.urgent) = (0, 0);
        waiting.to_come = [most, if reads_stream { most } else { 0 }];
    }

    /// It is being nacked, and later messages have to wait for it: from here on they do. What is answered comes when the
    /// failure is noted, and is closed when the message is not here any more. `None` where a copy of it comes back instead.
    pub(crate) fn failing(&self, taken: &Taken, delay: Duration) -> Option<oneshot::Receiver<()>> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let waiting = state.feeds[taken.feed as usize].waiting.as_mut()?;
        if !waiting.keys.can_block(&taken.message) {
            return None;
        }
        let (told, answer) = oneshot::channel();
        let (slot, generation) = taken.key;
        let own = state.slots.get_mut(slot as usize).filter(|slot| slot.generation == generation);
        if let Some(entry) = own.and_then(|own| own.entry.as_mut()) {
            waiting.keys.fail(&entry.message, entry.tag);
            waiting.changes += 1;
            waiting.urgent = waiting.changes;
            let deliveries = entry.hop.deliveries.saturating_add(entry.again);
            entry.recording = Some(Box::new(Recording {
                hop: Hop { failures: taken.hop.failures + 1, deliveries, ..taken.hop },
                until: if delay.is_zero() { 0 } else { Timestamp::now().after(delay).as_millis() + 1 },
                due: Instant::now() + delay,
                change: waiting.changes,
                told,
            }));
        }
        drop(guard);
        self.changed.notify_waiters();
        Some(answer)
    }

    /// Its failure could not be noted in time: it is the application's again. False when it was noted after all.
    pub(crate) fn unfail(&self, key: Key) -> bool {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.entry(key) else { return true };
        if entry.recording.take().is_none() {
            return false;
        }
        if let Phase::Settling { until } = entry.phase {
            entry.phase = Phase::Out { until };
        }
        let (feed, tag, message, has_failed) = (entry.feed, entry.tag, Arc::clone(&entry.message), entry.has_failed);
        if let Some(waiting) = &mut state.feeds[feed as usize].waiting {
            waiting.changes += 1;
        }
        if !has_failed {
            state.leave(feed, &message, tag);
        }
        drop(guard);
        self.arrived.notify_one();
        self.changed.notify_waiters();
        true
    }

    /// How often what the ledger has to hold has changed, and the last change that a settle waits for.
    pub(crate) fn changes(&self, feed: u32) -> (u64, u64) {
        let state = self.lock();
        state.feeds[feed as usize].waiting.as_ref().map_or((0, 0), |waiting| (waiting.changes, waiting.urgent))
    }

    /// What the ledger has to hold, and as of which change.
    pub(crate) fn notes(&self, feed: u32) -> (u64, Vec<Note>) {
        let state = self.lock();
        let own = &state.feeds[feed as usize];
        let Some(waiting) = &own.waiting else { return (0, Vec::new()) };
        let note = |slot: &u32| {
            let entry = state.entry_at(*slot)?;
            let (hop, until) = match &entry.recording {
                Some(recording) => (recording.hop, recording.until),
                None if entry.has_failed => (entry.hop, entry.not_before),
                None => return None,
            };
            let deliveries = if entry.recording.is_some() { hop.deliveries } else { hop.deliveries + entry.again };
            let mark = mark(&entry.message, hop.redrives);
            let of_stream = entry.offset.is_some();
            Some(Note { of_stream, mark, failures: hop.failures, until, first: hop.first, deliveries })
        };
        // In order, so that of two with the same mark the first one is found first.
        let mut notes: Vec<Note> = own.unacked.values().filter_map(note).collect();
        notes.extend(waiting.expected.iter().flat_map(HashMap::values).flatten());
        (waiting.changes, notes)
    }

    /// What the ledger had to hold at that change is noted.
    pub(crate) fn noted(&self, feed: u32, change: u64) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let own = &mut state.feeds[feed as usize];
        let Some(waiting) = &mut own.waiting else { return };
        for slot in own.unacked.values() {
            let Some(entry) = state.slots[*slot as usize].entry.as_mut() else { continue };
            let Some(recording) = entry.recording.take_if(|recording| recording.change <= change) else { continue };
            (entry.hop, entry.again, entry.has_failed) = (recording.hop, 0, true);
            (entry.not_before, entry.phase) = (recording.until, Phase::Delayed { until: recording.due });
            waiting.due.insert((recording.due, entry.tag));
            let _ = recording.told.send(());
        }
        drop(guard);
        // What failed is not out any more: there may be room for one that is ready.
        self.arrived.notify_one();
        self.changed.notify_waiters();
    }

    /// Makes ready what has waited for its time; tells when the next one is due.
    pub(crate) fn resume(&self, feed: u32) -> Option<Instant> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let (now, mut is_any_due) = (Instant::now(), false);
        let next = loop {
            let own = &mut state.feeds[feed as usize];
            let Some(waiting) = &mut own.waiting else { break None };
            let Some((due, tag)) = waiting.due.first().copied() else { break None };
            if due > now {
                break Some(due);
            }
            waiting.due.remove(&(due, tag));
            if let Some(slot) = own.unacked.get(&tag).copied() {
                state.make_slot_ready(slot);
                is_any_due = true;
            }
        };
        drop(guard);
        if is_any_due {
            self.arrived.notify_one();
        }
        next
    }
}

impl State {
    /// A message has come: whether it failed at an earlier member and has to wait still.
    pub(super) fn was_failing(&mut self, slot: u32) -> bool {
        let Some(entry) = self.slots[slot as usize].entry.as_mut() else { return false };
        let Some(waiting) = &mut self.feeds[entry.feed as usize].waiting else { return false };
        let of_stream = entry.offset.is_some();
        let claimed = waiting.claim(&entry.message, entry.hop.redrives, of_stream);
        waiting.came(of_stream);
        let Some(note) = claimed else { return false };
        let (failures, deliveries, first) = (note.failures, note.deliveries, note.first);
        entry.hop = Hop { failures, deliveries, first, ..entry.hop };
        (entry.has_failed, entry.not_before) = (true, note.until);
        waiting.keys.fail(&entry.message, entry.tag);
        let left = note.until - Timestamp::now().as_millis();
        let Some(left) = u64::try_from(left).ok().filter(|left| *left > 0) else { return false };
        let until = Instant::now() + Duration::from_millis(left);
        entry.phase = Phase::Delayed { until };
        waiting.due.insert((until, entry.tag));
        true
    }

    /// Whether it has to wait for one that failed before it; then it does.
    pub(super) fn keeps_back(&mut self, slot: u32) -> bool {
        let Some(entry) = self.slots[slot as usize].entry.as_mut() else { return false };
        let Some(waiting) = &mut self.feeds[entry.feed as usize].waiting else { return false };
        let is_behind = waiting.keys.holds_back(&entry.message, entry.tag);
        if is_behind {
            entry.phase = Phase::Behind;
        }
        is_behind
    }

    /// The message is not in the way of others any more.
    pub(super) fn leave(&mut self, feed: u32, message: &Message, tag: u64) {
        let own = &mut self.feeds[feed as usize];
        let Some(waiting) = &mut own.waiting else { return };
        for tag in waiting.keys.leave(message, tag) {
            if let Some(slot) = self.feeds[feed as usize].unacked.get(&tag).copied() {
                self.make_slot_ready(slot);
            }
        }
    }

    /// An entry was taken away.
    pub(super) fn left(&mut self, entry: &Entry) {
        let Some(waiting) = &mut self.feeds[entry.feed as usize].waiting else { return };
        if let Phase::Delayed { until } = entry.phase {
            waiting.due.remove(&(until, entry.tag));
        }
        if entry.has_failed || entry.recording.is_some() {
            waiting.changes += 1;
        }
        self.leave(entry.feed, &entry.message, entry.tag);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Arrival;
    use super::*;

    fn arrival(tag: u64, offset: Option<u64>) -> Arrival {
        let message = Arc::new(Message::new("d", "").with_id(tag.to_string()).with_key("a"));
        Arrival { feed: 0, tag, message, hop: Hop::default(), offset, delivered: 1 }
    }

    fn note(id: &'static str, of_stream: bool) -> Note {
        let mark = mark(&Message::new("d", "").with_id(id).with_key("a"), 0);
        Note { of_stream, mark, failures: 1, until: 0, first: 0, deliveries: 0 }
    }

    #[test]
    fn what_is_noted_of_a_stream_is_forgotten_once_all_of_it_has_come_that_was_out_and_the_same_goes_for_the_queue() {
        let feed = FeedState::new("d".into(), "g".into(), true, 4).blocking(Order::Key);
        let shared = Shared::new(Duration::from_secs(60), true, vec![feed]);
        let notes = vec![note("1", true), note("gone", true), note("back", false)];
        shared.expect(0, notes.clone(), 2, true);
        shared.arrive(&mut vec![arrival(1, Some(7))]);
        assert_eq!(shared.notes(0).1.len(), 3);
        shared.arrive(&mut vec![arrival(2, Some(8))]);
        assert_eq!(shared.notes(0).1, [notes[0], notes[2]]);
        shared.arrive(&mut vec![arrival(3, None), arrival(4, None)]);
        assert_eq!(shared.notes(0).1, [notes[0]]);
    }
}
