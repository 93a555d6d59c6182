//! What failed and keeps its place, because later messages wait for it (`OnFailure::Block`).
//!
//! It waits here, unacked, and what is behind it waits here too, so that whatever becomes of this member the broker gives all of it
//! out again in order. What has to be known of it elsewhere is stored where hand-overs are (`hand_overs.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;

use anybroker_core::{Blocks, Message, Order, Timestamp};

use super::{Entry, FeedState, Phase, Place, Shared, State, Taken};

/// How many messages may wait in a member beyond `max_in_flight`, behind failed ones or failed themselves.
pub(crate) const MOST_WAITING: usize = 1_000;
/// More failures are not kept: the oldest are forgotten.
const MOST_KEPT: usize = 100_000;

/// A place within a lane. What came back stands before what is new: nothing that comes back waits for that.
pub(super) type Spot = (bool, Place);

/// What is known of a message that failed in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failure {
    /// How often it failed there.
    pub(crate) times: u32,
    /// Not to be handed out before; milliseconds since 1970, 0 for at once.
    pub(crate) not_before: i64,
    /// When the group first received it.
    pub(crate) first_at: i64,
}

/// A message whose failure has to be stored.
pub(crate) struct Failing {
    pub(crate) key: u64,
    pub(crate) feed: u32,
    pub(crate) place: Place,
    pub(crate) failure: Failure,
}

impl FeedState {
    /// With later messages waiting for one that failed.
    pub(crate) fn blocking(mut self, order: Order) -> Self {
        self.blocks = Some(Blocks::new(order));
        self
    }

    pub(super) fn keep_failure(&mut self, place: Place, failure: Failure) {
        if self.blocks.is_none() {
            return;
        }
        let known = self.failures.entry(place).or_insert(failure);
        if known.times <= failure.times {
            *known = failure;
        }
        if self.failures.len() > MOST_KEPT {
            self.failures.pop_first();
        }
    }
}

impl Entry {
    /// It takes room of its own, beyond what may be prefetched.
    pub(super) fn is_kept(&self) -> bool {
        match self.phase {
            Phase::Behind => true,
            Phase::Waiting { .. } => self.in_place > 0,
            Phase::Ready | Phase::Out { .. } | Phase::Settling { .. } => false,
        }
    }
}

impl Shared {
    /// Somebody has stored that a message failed in its place.
    pub(crate) fn has_failed(&self, feed: u32, place: Place, failure: Failure) {
        if let Some(own) = self.lock().feeds.get_mut(feed as usize) {
            own.keep_failure(place, failure);
        }
    }

    /// It is being nacked: from here on later messages wait for it, and that it failed has to be stored. `None` where nothing
    /// waits, and a copy of it comes back instead.
    pub(crate) fn failing(&self, taken: &Taken, message: &Message, not_before: i64) -> Option<Failing> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let feed = taken.feed as usize;
        let lane = state.feeds[feed].source as usize;
        if !state.feeds[lane].blocks.as_ref()?.can_block(message) {
            return None;
        }
        let entry = state.entries.get(&taken.key);
        let place = (taken.id.ledger_id, taken.id.entry_id, taken.id.batch_index());
        let failure = Failure {
            times: entry.map_or(0, |entry| entry.in_place) + 1,
            not_before,
            first_at: taken.first_at.as_millis(),
        };
        if entry.is_some() {
            let spot = (!state.feeds[feed].is_back, place);
            if let Some(blocks) = &mut state.feeds[lane].blocks {
                blocks.fail(message, spot);
            }
            state.hold_back(lane);
        }
        Some(Failing { key: taken.key, feed: taken.feed, place, failure })
    }

    /// That it failed is stored: it waits here for its time. False when it is not here any more, or its consumer is not: whoever
    /// works on its lane by now may have looked before.
    pub(crate) fn failed(&self, failing: &Failing) -> bool {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.feeds[failing.feed as usize].is_cut_off() {
            return false;
        }
        let Some(entry) = state.entries.get_mut(&failing.key) else { return false };
        let Failure { times, not_before, first_at } = failing.failure;
        (entry.in_place, entry.notes.failures) = (times, entry.notes.failures + 1);
        (entry.notes.not_before, entry.notes.first_at) = (not_before, first_at);
        state.feeds[failing.feed as usize].keep_failure(failing.place, failing.failure);
        let until = Timestamp::from_millis(not_before);
        if until <= Timestamp::now() {
            state.ready_again(failing.key);
        } else if let Some(mut entry) = state.remove(failing.key) {
            entry.phase = Phase::Waiting { until };
            state.insert(entry);
        }
        drop(guard);
        self.arrived.notify_one();
        self.kept.notify_one();
        self.room.notify_waiters();
        true
    }

    /// That it failed could not be stored: it is the application's again.
    pub(crate) fn unfailed(&self, key: u64) {
        self.unsettled(key);
        let mut state = self.lock();
        let Some(entry) = state.entries.get(&key).filter(|entry| entry.in_place == 0) else { return };
        let (feed, place, message) = (entry.feed, entry.place(), Arc::clone(&entry.message));
        state.leave(feed, place, &message);
        drop(state);
        self.arrived.notify_one();
    }

    /// Everything here that failed in its place.
    pub(crate) fn all_failed(&self) -> Vec<Failing> {
        let state = self.lock();
        let failing = |(key, entry): (&u64, &Entry)| {
            let (times, notes) = (entry.in_place, entry.notes);
            let failure = Failure { times, not_before: notes.not_before, first_at: notes.first_at };
            (times > 0).then(|| Failing { key: *key, feed: entry.feed, place: entry.place(), failure })
        };
        state.entries.iter().filter_map(failing).collect()
    }
}

impl State {
    /// With what is known of an arrival that failed in its place.
    pub(super) fn recall(&mut self, entry: &mut Entry) {
        let own = &self.feeds[entry.feed as usize];
        let (lane, spot) = (own.source as usize, (!own.is_back, entry.place()));
        let Some(Failure { times, not_before, first_at }) = own.failures.get(&entry.place()).copied() else { return };
        let Some(blocks) = &mut self.feeds[lane].blocks else { return };
        (entry.in_place, entry.notes.failures) = (times, entry.notes.failures + times);
        (entry.notes.not_before, entry.notes.first_at) = (not_before, first_at);
        blocks.fail(&entry.message, spot);
    }

    /// Whether it waits for one that failed before it.
    pub(super) fn holds_back(&mut self, entry: &Entry) -> bool {
        let own = &self.feeds[entry.feed as usize];
        let (lane, spot) = (own.source as usize, (!own.is_back, entry.place()));
        self.feeds[lane].blocks.as_mut().is_some_and(|blocks| blocks.holds_back(&entry.message, spot))
    }

    /// What is ready in a lane, and has to wait from now on.
    fn hold_back(&mut self, lane: usize) {
        let Some(mut blocks) = self.feeds[lane].blocks.take() else { return };
        for own in self.feeds.iter_mut().filter(|feed| feed.source as usize == lane) {
            let (ready, is_back) = (std::mem::take(&mut own.ready), own.is_back);
            let waits = |(place, key): &(Place, u64)| {
                let entry = self.entries.get_mut(key).expect("what is ready is an entry");
                let waits = blocks.holds_back(&entry.message, (!is_back, *place));
                if waits {
                    entry.phase = Phase::Behind;
                    self.kept += 1;
                }
                !waits
            };
            own.ready = ready.into_iter().filter(waits).collect::<BTreeMap<_, _>>();
        }
        self.feeds[lane].blocks = Some(blocks);
    }

    /// A message is not in the way of others any more.
    pub(super) fn leave(&mut self, feed: u32, place: Place, message: &Message) {
        let own = &self.feeds[feed as usize];
        let (lane, is_source) = (own.source, !own.is_back);
        let Some(blocks) = &mut self.feeds[lane as usize].blocks else { return };
        for (is_source, place) in blocks.leave(message, (is_source, place)) {
            let feed = self.feeds.iter().position(|feed| feed.source == lane && feed.is_back != is_source);
            let feed = feed.and_then(|feed| u32::try_from(feed).ok());
            if let Some(key) = feed.and_then(|feed| self.places.get(&(feed, place)).copied()) {
                self.ready_again(key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pulsar::proto::MessageIdData;

    use super::super::tests::{Nobody, consumer};
    use super::super::{Arrival, DeliveryContext};
    use super::*;
    use crate::codec::Notes;

    fn of_key(entry_id: u64) -> Arrival {
        let id = MessageIdData { ledger_id: 1, entry_id, ..Default::default() };
        let message = Message::new("d", entry_id.to_string()).with_key("a");
        Arrival { id, siblings: None, message, notes: Notes::default() }
    }

    fn shared(is_counted: bool) -> (Shared, Arc<DeliveryContext>) {
        let feed = FeedState::new("d".into(), "g".into(), false, 0, is_counted).blocking(Order::Key);
        let context = DeliveryContext::new("g".into(), None, Arc::new(Nobody));
        (Shared::new(Duration::from_secs(60), 10, true, vec![feed]), context)
    }

    /// Takes the first one, and fails it for long.
    fn fail_first(shared: &Shared, context: &Arc<DeliveryContext>) -> Failing {
        let received = shared.take(1, context, &mut Vec::new()).unwrap().unwrap();
        let first = received.deliveries.first().unwrap();
        let taken = shared.begin(first.token(), first.lane()).unwrap();
        shared.failing(&taken, first.message(), i64::MAX).unwrap()
    }

    #[test]
    fn a_failure_is_not_told_as_kept_by_a_member_whose_consumer_the_broker_has_closed_meanwhile() {
        let (shared, context) = shared(false);
        let (conn, _inbound) = consumer();
        shared.attached(0, &conn, 1, None);
        shared.arrive(0, vec![of_key(1)]);
        let failing = fail_first(&shared, &context);
        conn.abandon_consumer(1);
        assert!(!shared.failed(&failing));
    }

    #[test]
    fn a_lane_does_not_wait_for_a_message_that_waits_for_a_failed_one_when_others_shall_have_it() {
        let (shared, context) = shared(true);
        let (conn, _inbound) = consumer();
        shared.reserved(0, (1, 10_000));
        shared.attached(0, &conn, 1, None);
        shared.arrive(0, vec![of_key(1), of_key(2)]);
        // Others may have handed them out: that it is done once more is stored first.
        shared.noted(&shared.hand_overs(&[0, 1]));
        let failing = fail_first(&shared, &context);
        assert!(shared.failed(&failing));
        shared.balance(0..1, 0);
        assert!(shared.leaves(0));
    }
}
