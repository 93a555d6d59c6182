//! One message: it arrives, is handed out, and is settled.

use std::sync::Arc;

use anybroker_core::{Delivery, DeliveryContext, Error, Lane, Received, Timestamp, Token};
use async_nats::Subject;
use tokio::time::Instant;

use super::entry::{Acking, Arrival, Entry, Key, Looking, Phase, Renewal, Taken};
use super::slots::Slot;
use super::{REMEMBERED, Shared, State};
use crate::desk::Telling;
use crate::record::Record;

impl Shared {
    /// Takes in what came, all of it under one lock; answers what cannot be handed out yet.
    pub(crate) fn arrive(&self, arrivals: &mut Vec<Arrival>) -> Vec<Looking> {
        let (now, arrived_at) = (Instant::now(), Timestamp::now());
        let (mut looking, mut is_any_ready) = (Vec::new(), false);
        let mut guard = self.lock();
        let state = &mut *guard;
        for arrival in arrivals.drain(..) {
            match state.arrive(arrival, now, arrived_at) {
                Some(Ok(key)) => {
                    state.make_ready(key);
                    is_any_ready = true;
                }
                Some(Err(not_yet)) => looking.push(not_yet),
                None => {}
            }
        }
        drop(guard);
        if is_any_ready {
            self.arrived.notify_one();
        }
        looking
    }

    /// Its record is read and applied: it can be handed out.
    pub(crate) fn ready(&self, key: Key, record: Record, record_at: Option<u64>) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if let Some(entry) = state.entry(key) {
            (entry.record, entry.record_at, entry.may_have_failed) = (record, record_at, false);
            if entry.has_not_failed() {
                let (feed, message, sequence) = (entry.feed, Arc::clone(&entry.message), entry.sequence);
                state.feeds[feed as usize].unblock(&message, sequence);
            }
            state.make_ready(key);
        }
        drop(guard);
        self.arrived.notify_one();
    }

    /// Hands out up to `max`; an error ends the subscription, `None` is nothing at the moment.
    pub(crate) fn take(&self, max: usize, context: &Arc<DeliveryContext>) -> Result<Option<Received>, Error> {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut received = Received { deliveries: Vec::new(), events: state.events.drain(..).collect() };
        let max = max.min(self.room_to_hand_out(state));
        received.deliveries.reserve(max.min(state.feeds.iter().map(|feed| feed.ready.len()).sum()));
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

    /// How many more may be out. What is here is seldom more than that: after a takeover it may be.
    fn room_to_hand_out(&self, state: &State) -> usize {
        if state.count <= self.max_in_flight {
            return self.max_in_flight;
        }
        let is_out = |slot: &&Slot| {
            slot.entry.as_ref().is_some_and(|entry| matches!(entry.phase, Phase::Out { .. } | Phase::Settling { .. }))
        };
        self.max_in_flight.saturating_sub(state.slots.iter().filter(is_out).count())
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
        // A server that waits as long as the lease keeps the message for a process that stands still from now on. One that
        // waits less does not, whatever is said to it now: there the keeper of leases does it in time, not each hand-out.
        let helps = feed.ack_wait >= self.lease || entry.server_until < now + feed.ack_wait / 2;
        if entry.server_until < until && helps {
            entry.asked_at = Some(now);
            let _ = self.renewals.send(Renewal { key: (slot, generation), ack: entry.ack.clone() });
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

    /// Begins to ack deliveries, all of them under one lock: where each is acked; `None` when its lease or assignment is
    /// over.
    pub(crate) fn begin_acks<'d>(
        &self,
        deliveries: impl Iterator<Item = &'d Delivery>,
    ) -> Vec<Option<(Acking, Subject)>> {
        let now = Instant::now();
        let mut state = self.lock();
        let begin = |delivery: &Delivery| {
            let key = state.out_at(delivery.token(), delivery.lane(), now)?;
            let entry = state.entry(key)?;
            let Phase::Out { until } = entry.phase else { return None };
            entry.phase = Phase::Settling { until };
            let acking = Acking { key, feed: entry.feed, record_at: entry.record_at };
            Some((acking, entry.ack.clone()))
        };
        deliveries.map(begin).collect()
    }

    /// Where each is acked now: its server may have renamed it.
    pub(crate) fn rename<'t>(&self, tellings: impl Iterator<Item = &'t mut Telling>) {
        let mut state = self.lock();
        for telling in tellings {
            if let Some(entry) = telling.key.and_then(|key| state.entry(key))
                && entry.ack != telling.ack
            {
                telling.ack = entry.ack.clone();
            }
        }
    }

    /// It is settled: it is not here any more.
    pub(crate) fn settled(&self, key: Key) {
        self.all_settled(std::iter::once(key));
    }

    /// They are settled: none of them is here any more.
    pub(crate) fn all_settled(&self, keys: impl Iterator<Item = Key>) {
        let mut state = self.lock();
        let was_over = state.count > self.max_in_flight;
        for key in keys {
            if state.entry(key).is_some() {
                state.remove(key.0);
            }
        }
        drop(state);
        if was_over {
            self.arrived.notify_one();
        }
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

    /// It could not be settled: it is the application's again. One that may have failed keeps in the way of later messages
    /// what a failure keeps there, until it is settled or its record is read.
    pub(crate) fn unsettled(&self, key: Key, may_have_failed: bool) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.entry(key) else { return };
        let Phase::Settling { until } = entry.phase else { return };
        entry.phase = Phase::Out { until };
        entry.may_have_failed |= may_have_failed;
        if entry.has_not_failed() {
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
        entry.may_have_failed = false;
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

impl State {
    /// Takes one in: its key, or what has to be done first; nothing where it is here already.
    fn arrive(
        &mut self,
        arrival: Arrival,
        now: Instant,
        arrived_at: Timestamp,
    ) -> Option<std::result::Result<Key, Looking>> {
        let feed = &mut self.feeds[arrival.feed as usize];
        feed.asked = feed.asked.saturating_sub(1);
        let (server_until, keeps_order) = (feed.kept_until(arrival.since), feed.keeps_order);
        let place = (arrival.feed, arrival.sequence);
        if let Some(slot) = self.places.get(&place).copied() {
            let entry = self.slots[slot as usize].entry.as_mut().expect("a place names an entry");
            let is_over = matches!(entry.phase, Phase::Out { until } if until <= now);
            if !is_over {
                // A restarted server has forgotten that it is here: from now on it is acked as this delivery.
                (entry.ack, entry.server_until) = (arrival.ack, server_until.max(entry.server_until));
                entry.delivered = entry.delivered.max(arrival.delivered);
                self.unknown -= usize::from(!std::mem::replace(&mut entry.is_known, true));
                return None;
            }
            self.remove(slot);
        }
        // It lay in a connection that stood still, and may be with somebody else by now. Under order there is nobody else.
        if server_until <= now && !keeps_order {
            tracing::debug!(sequence = arrival.sequence, "came too late to be handed out");
            return None;
        }
        let remembered = if self.remembered.is_empty() { None } else { self.remembered.remove(&place) };
        let must_look = arrival.delivered > 1 || arrival.must_look;
        let looked_up = must_look.then(|| arrival.ack.clone());
        self.arrivals += 1;
        let entry = Entry {
            feed: arrival.feed,
            sequence: arrival.sequence,
            ack: arrival.ack,
            message: arrival.message,
            delivered: arrival.delivered,
            record: Record::default(),
            record_at: None,
            redrives: arrival.redrives,
            expires: arrival.expires,
            arrived_at,
            again: 0,
            was_out: false,
            arrival: self.arrivals,
            server_until,
            is_known: true,
            asked_at: None,
            phase: Phase::Looking,
            may_have_failed: false,
        };
        let key = self.insert(entry);
        let Some(ack) = looked_up else { return Some(Ok(key)) };
        self.feeds[place.0 as usize].looking.insert(place.1, (self.arrivals, now));
        let known = remembered.filter(|(record, _)| record.delivered + 1 == arrival.delivered);
        Some(Err(Looking { key, feed: place.0, ack, known }))
    }
}
