//! One message: it arrives, is handed out, and is settled.

use std::sync::Arc;

use anybroker_core::{Delivery, DeliveryContext, Error, Lane, Received, Timestamp, Token};
use async_nats::Subject;
use tokio::time::Instant;

use super::entry::{Arrival, Arrived, Entry, Key, Phase, Taken};
use super::{REMEMBERED, Shared, State};
use crate::record::Record;

impl Shared {
    pub(crate) fn arrive(&self, arrival: Arrival) -> Arrived {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let feed = &mut state.feeds[arrival.feed as usize];
        feed.asked = feed.asked.saturating_sub(1);
        let server_until = now + feed.ack_wait;
        let place = (arrival.feed, arrival.sequence);
        if let Some(slot) = state.places.get(&place).copied() {
            let entry = state.slots[slot as usize].entry.as_mut().expect("a place names an entry");
            let is_over = matches!(entry.phase, Phase::Out { until } if until <= now);
            if !is_over {
                // A restarted server has forgotten that it is here: from now on it is acked as this delivery.
                (entry.ack, entry.server_until) = (arrival.ack, server_until);
                entry.delivered = entry.delivered.max(arrival.delivered);
                return Arrived::Done;
            }
            state.remove(slot);
        }
        let remembered = state.remembered.remove(&place);
        let known = remembered.filter(|(record, _)| record.delivered + 1 == arrival.delivered);
        let must_look = arrival.delivered > 1 || arrival.must_look;
        let entry = Entry {
            feed: arrival.feed,
            sequence: arrival.sequence,
            ack: arrival.ack,
            message: Arc::new(arrival.message),
            delivered: arrival.delivered,
            record: Record::default(),
            record_at: None,
            redrives: arrival.redrives,
            expires: arrival.expires,
            arrived_at: Timestamp::now(),
            again: 0,
            was_out: false,
            server_until,
            phase: Phase::Looking,
        };
        let key = state.insert(entry);
        let feed = &mut state.feeds[arrival.feed as usize];
        if must_look {
            feed.looking.insert(arrival.sequence);
            return match known {
                Some((record, at)) => Arrived::Known(key, record, at),
                None => Arrived::Look(key),
            };
        }
        state.make_ready(key);
        drop(guard);
        self.arrived.notify_one();
        Arrived::Done
    }

    /// Its record is read and applied: it can be handed out.
    pub(crate) fn ready(&self, key: Key, record: Record, record_at: Option<u64>) {
        let mut state = self.lock();
        if let Some(entry) = state.entry(key) {
            (entry.record, entry.record_at) = (record, record_at);
            state.make_ready(key);
        }
        drop(state);
        self.arrived.notify_one();
    }

    /// Hands out up to `max`; an error ends the subscription, `None` is nothing at the moment.
    pub(crate) fn take(&self, max: usize, context: &Arc<DeliveryContext>) -> Result<Option<Received>, Error> {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut received = Received { deliveries: Vec::new(), events: state.events.drain(..).collect() };
        if state.failure.is_none() && !state.is_paused {
            let lease_until = Timestamp::now().after(self.lease);
            let feeds = state.feeds.len();
            for offset in 0..feeds {
                let feed = (state.next_feed + offset) % feeds;
                while received.deliveries.len() < max {
                    let Some(slot) = state.next_ready(feed, now) else { break };
                    if let Some(expired) = state.expire(slot, now + self.lease) {
                        let _ = self.expiries.send(expired);
                        continue;
                    }
                    received.deliveries.push(self.hand_out(state, slot, now, lease_until, context));
                }
            }
            state.next_feed = state.next_feed.wrapping_add(1) % feeds;
        }
        if received.deliveries.is_empty() && received.events.is_empty() {
            return state.failure.as_ref().map_or(Ok(None), |failure| Err(failure.duplicate()));
        }
        Ok(Some(received))
    }

    fn hand_out(
        &self,
        state: &mut State,
        slot: u32,
        now: Instant,
        lease_until: Timestamp,
        context: &Arc<DeliveryContext>,
    ) -> Delivery {
        let generation = state.slots[slot as usize].generation;
        let entry = state.slots[slot as usize].entry.as_mut().expect("what is ready is an entry");
        let feed = &state.feeds[entry.feed as usize];
        let until = now + self.lease;
        if entry.server_until < until {
            let _ = self.renewals.send(entry.ack.clone());
            entry.server_until = now + feed.ack_wait;
        }
        if entry.was_out {
            entry.again += 1;
        }
        (entry.phase, entry.was_out) = (Phase::Out { until }, true);
        let lane = Lane { index: entry.feed, epoch: feed.epoch };
        let facts = entry.facts(Token::Pair(u64::from(slot), generation), lane, lease_until);
        Delivery::shared(Arc::clone(&entry.message), facts, context)
    }

    /// Begins to settle a delivery; `None` when its lease or assignment is over.
    pub(crate) fn begin(&self, token: &Token, lane: Lane) -> Option<Taken> {
        let mut state = self.lock();
        let key = state.out(token, lane)?;
        let entry = state.entry(key)?;
        let Phase::Out { until } = entry.phase else { return None };
        entry.phase = Phase::Settling { until };
        Some(entry.taken(key))
    }

    /// Where to send what settles an entry, as long as it is here.
    pub(crate) fn ack_subject(&self, key: Key) -> Option<Subject> {
        self.lock().entry(key).map(|entry| entry.ack.clone())
    }

    /// It is settled: it is not here any more.
    pub(crate) fn settled(&self, key: Key) {
        let mut state = self.lock();
        if state.entry(key).is_some() {
            state.remove(key.0);
        }
        drop(state);
        self.room.notify_waiters();
    }

    /// A nack is on its way: from here on its next delivery is another one.
    pub(crate) fn leaving(&self, key: Key, remembered: (Record, u64)) {
        let mut state = self.lock();
        let Some(entry) = state.entry(key) else { return };
        let place = (entry.feed, entry.sequence);
        if state.places.get(&place) == Some(&key.0) {
            state.places.remove(&place);
        }
        if state.remembered.len() < REMEMBERED {
            state.remembered.insert(place, remembered);
        }
    }

    /// It could not be settled: it is the application's again.
    pub(crate) fn unsettled(&self, key: Key) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.entry(key) else { return };
        let Phase::Settling { until } = entry.phase else { return };
        entry.phase = Phase::Out { until };
        if entry.record.failures == 0 {
            let (feed, message, sequence) = (entry.feed, Arc::clone(&entry.message), entry.sequence);
            state.feeds[feed as usize].unblock(&message, sequence);
        }
    }

    /// It is being nacked: from here on later messages wait for it, where they do at all.
    pub(crate) fn failing(&self, key: Key) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.entry(key) else { return };
        let (feed, message, sequence) = (entry.feed, Arc::clone(&entry.message), entry.sequence);
        state.feeds[feed as usize].block(&message, sequence);
    }

    /// Whether a message that failed waits here, with what is behind it, instead of at the server.
    pub(crate) fn keeps_failed(&self, feed: u32) -> bool {
        self.lock().feeds[feed as usize].blocks.is_some()
    }

    /// It failed, and that is stored: it waits here until `until`.
    pub(crate) fn wait(self: &Arc<Self>, key: Key, record: Record, record_at: u64, until: Instant) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.entry(key) else { return };
        (entry.record, entry.record_at, entry.phase) = (record, Some(record_at), Phase::Waiting);
        let (feed, message, sequence) = (entry.feed, Arc::clone(&entry.message), entry.sequence);
        let feed = &mut state.feeds[feed as usize];
        feed.looking.remove(&sequence);
        feed.block(&message, sequence);
        drop(guard);
        let shared = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep_until(until).await;
            let Some(shared) = shared.upgrade() else { return };
            let mut state = shared.lock();
            if state.entry(key).is_some_and(|entry| entry.phase == Phase::Waiting) {
                state.make_ready(key);
            }
            drop(state);
            shared.arrived.notify_one();
        });
        // What it no longer stands in the way of: others that only waited for its record.
        self.arrived.notify_one();
    }

    /// The entry, for looking up its record.
    pub(crate) fn place_of(&self, key: Key) -> Option<(u64, u32)> {
        self.lock().entry(key).map(|entry| (entry.sequence, entry.delivered))
    }
}
