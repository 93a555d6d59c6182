//! What one subscription holds: messages that are ready, that are out, that are being settled.
//!
//! Delivery tags belong to a channel: acking one on another channel, or twice, closes the channel and gives back everything
//! that is unacked on it. So every entry belongs to its channel, frames go out under the lock that changes the entries, and
//! an entry whose channel is gone cannot be settled.

mod arrivals;
mod failures;
mod figures;
mod log;
mod returns;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Delivery, DeliveryContext, DeliveryFacts, Destination, Error, Group, Lane, Message, Position, SubscriptionEvent,
    Timestamp, Token,
};
use futures_util::FutureExt;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::codec::Hop;
use failures::{Recording, Waiting};
use log::Log;
pub(crate) use log::Share;

/// Shared by the subscription, its feeds and its settler.
pub(crate) struct Shared {
    state: Mutex<State>,
    pub(crate) lease: Duration,
    /// Something can be received.
    pub(crate) arrived: Notify,
    /// Something about consuming changed.
    pub(crate) changed: Notify,
    /// Set when the subscription closes: until when it may take.
    pub(crate) closing: watch::Sender<Option<Instant>>,
    /// How many feeds work.
    pub(crate) working: watch::Sender<usize>,
}

#[derive(Default)]
pub(crate) struct State {
    slots: Vec<Slot>,
    free: Vec<u32>,
    pub(crate) feeds: Vec<FeedState>,
    pub(crate) events: VecDeque<SubscriptionEvent>,
    pub(crate) failure: Option<Error>,
    pub(crate) is_paused: bool,
    pub(crate) is_closing: bool,
    is_receiving: bool,
    received: Option<Instant>,
    next_feed: usize,
    /// Whether the server counts hand-overs.
    is_counted: bool,
}

#[derive(Default)]
struct Slot {
    generation: u64,
    entry: Option<Entry>,
}

/// One destination of the subscription.
pub(crate) struct FeedState {
    pub(crate) destination: Destination,
    pub(crate) group: Group,
    pub(crate) keeps_order: bool,
    /// How many may be out. Under order more may be here: as many as any member of the group takes.
    most_out: usize,
    epoch: u32,
    channel: Option<Arc<Channel>>,
    /// What came of the stream, while one is read.
    log: Option<Log>,
    ready: BTreeMap<u64, u32>,
    /// Everything that is unacked on the channel.
    unacked: BTreeMap<u64, u32>,
    /// What waits for a failed one, where later messages do.
    waiting: Option<Waiting>,
    /// What was found to be over when it was to be handed out: its feed buries it.
    over: Vec<Taken>,
}

impl FeedState {
    pub(crate) fn new(destination: Destination, group: Group, keeps_order: bool, most_out: usize) -> Self {
        let (epoch, channel, log, ready, unacked) = Default::default();
        let (waiting, over) = Default::default();
        Self { destination, group, keeps_order, most_out, epoch, channel, log, ready, unacked, waiting, over }
    }

    fn is_full(&self) -> bool {
        self.unacked.len() - self.ready.len() - self.kept() >= self.most_out
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Ready,
    /// It waits for an earlier one that failed.
    Behind,
    /// It failed, and waits here until then.
    Delayed {
        until: Instant,
    },
    Out {
        until: Instant,
    },
    Settling {
        until: Instant,
    },
}

impl Phase {
    /// It is here, and not with the application.
    fn is_waiting(self) -> bool {
        matches!(self, Self::Ready | Self::Behind | Self::Delayed { .. })
    }
}

/// A message that is with this member.
struct Entry {
    feed: u32,
    tag: u64,
    message: Arc<Message>,
    hop: Hop,
    /// Its place in the stream, where it came from one.
    offset: Option<u64>,
    /// How often the server has handed it out since it was stored, this time included.
    delivered: u32,
    arrived_at: Timestamp,
    /// Hand-overs by this member beyond the first.
    again: u32,
    was_out: bool,
    /// It failed, and later messages wait for it.
    has_failed: bool,
    /// When it may come again, in milliseconds of Unix time; 0 for at once.
    not_before: i64,
    /// A failure that is being noted.
    recording: Option<Box<Recording>>,
    phase: Phase,
}

impl Entry {
    fn is_over(&self, now: Timestamp) -> bool {
        self.hop.expires != 0 && self.hop.expires <= now.as_millis()
    }

    fn deliveries(&self) -> u32 {
        self.hop.deliveries.saturating_add(self.delivered).saturating_add(self.again)
    }

    fn facts(&self, token: Token, lane: Lane, lease_until: Timestamp, is_counted: bool) -> DeliveryFacts {
        let attempt = self.hop.failures + 1;
        let mut facts = DeliveryFacts::new(token);
        let deliveries = is_counted.then(|| self.deliveries().max(attempt));
        (facts.attempt, facts.deliveries, facts.lane) = (attempt, deliveries, lane);
        facts.lease_until = Some(lease_until);
        facts.position = self.offset.map(Position::new);
        facts
    }
}

/// A message as it came from the server.
pub(crate) struct Arrival {
    pub(crate) feed: u32,
    pub(crate) tag: u64,
    pub(crate) message: Arc<Message>,
    pub(crate) hop: Hop,
    pub(crate) offset: Option<u64>,
    pub(crate) delivered: u32,
}

/// Slot and generation: an entry, and no other that takes its slot later.
pub(crate) type Key = (u32, u64);

/// What a settle needs of an entry.
pub(crate) struct Taken {
    pub(crate) key: Key,
    pub(crate) feed: u32,
    /// As it is after a failure: one more is counted by whoever stores it.
    pub(crate) hop: Hop,
    pub(crate) message: Arc<Message>,
}

impl Shared {
    pub(crate) fn new(lease: Duration, is_counted: bool, feeds: Vec<FeedState>) -> Self {
        let working = watch::Sender::new(feeds.len());
        let state = State { feeds, is_counted, received: Some(Instant::now()), ..State::default() };
        let state = Mutex::new(state);
        let (arrived, changed, closing) = (Notify::new(), Notify::new(), watch::Sender::new(None));
        Self { state, lease, arrived, changed, closing, working }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Stops consuming and receiving; what is here goes back until `deadline`. Idempotent.
    pub(crate) fn close(&self, deadline: Instant) {
        self.lock().is_closing = true;
        self.closing.send_if_modified(|closing| {
            let is_first = closing.is_none();
            *closing = Some(closing.unwrap_or(deadline));
            is_first
        });
        self.arrived.notify_one();
        self.changed.notify_waiters();
    }

    /// Waits until no feed works any more; false at the deadline.
    pub(crate) async fn ended(&self, deadline: Instant) -> bool {
        let mut working = self.working.subscribe();
        let ended = working.wait_for(|working| *working == 0);
        tokio::time::timeout_at(deadline, ended).await.is_ok()
    }

    /// Ends the subscription with an error that every receive answers from now on.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.lock();
        if state.failure.is_none() && !state.is_closing {
            state.failure = Some(error);
        }
        drop(state);
        self.arrived.notify_one();
    }

    pub(crate) fn tell(&self, event: SubscriptionEvent) {
        self.lock().events.push_back(event);
        self.arrived.notify_one();
    }

    /// A feed has a channel. What was on an earlier one is gone already.
    pub(crate) fn attach(&self, feed: u32, channel: Arc<Channel>) -> Lane {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        own.epoch += 1;
        own.channel = Some(channel);
        Lane { index: feed, epoch: own.epoch }
    }

    /// The channel is gone: the server gives everything on it out again, and nothing of it can be settled here.
    pub(crate) fn detach(&self, feed: u32) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        (own.channel, own.log) = (None, None);
        own.ready.clear();
        own.waiting.iter_mut().for_each(Waiting::clear);
        let gone: Vec<u32> = std::mem::take(&mut own.unacked).into_values().collect();
        for slot in gone {
            state.slots[slot as usize].entry = None;
            state.free.push(slot);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Begins to settle a delivery; `None` when its lease or its channel is gone.
    pub(crate) fn begin(&self, token: &Token, lane: Lane) -> Option<Taken> {
        let mut state = self.lock();
        let key = state.out(token, lane)?;
        state.take(key)
    }

    /// As [`begin`](Self::begin), for acks: all of them under one lock.
    pub(crate) fn begin_acks<'d>(&self, deliveries: impl Iterator<Item = &'d Delivery>) -> Vec<Option<Key>> {
        let now = Instant::now();
        let mut state = self.lock();
        let begin = |delivery: &Delivery| {
            let key = state.out_at(delivery.token(), delivery.lane(), now)?;
            let entry = state.entry(key)?;
            let Phase::Out { until } = entry.phase else { return None };
            entry.phase = Phase::Settling { until };
            Some(key)
        };
        deliveries.map(begin).collect()
    }

    /// Acks what is being settled; tells for each whether it was handed to the client. Neighbours from the oldest
    /// on go in one frame.
    pub(crate) fn ack(&self, keys: &[Key]) -> Vec<bool> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut tags = Vec::with_capacity(keys.len());
        let mut outcomes = vec![false; keys.len()];
        for (index, key) in keys.iter().enumerate() {
            if let Some(entry) = state.entry(*key) {
                tags.push((entry.feed, entry.tag, index));
            }
        }
        tags.sort_unstable();
        for tags in tags.chunk_by(|one, other| one.0 == other.0) {
            let own = &mut state.feeds[tags[0].0 as usize];
            let Some(channel) = own.channel.clone() else { continue };
            let together = own.unacked.keys().zip(tags).take_while(|(unacked, (_, tag, _))| *unacked == tag).count();
            let mut is_sent = true;
            for (place, (_, tag, index)) in tags.iter().enumerate() {
                if place + 1 >= together {
                    let options = BasicAckOptions { multiple: place + 1 == together && together > 1 };
                    is_sent = handed_over(channel.basic_ack(*tag, options));
                }
                outcomes[*index] = is_sent;
            }
            // All or nothing: what the frame with several did not do, none of them did.
            let is_done = outcomes[tags[together.saturating_sub(1)].2];
            tags[..together].iter().for_each(|(_, _, index)| outcomes[*index] = is_done);
        }
        for (key, is_sent) in keys.iter().zip(&outcomes) {
            if *is_sent && state.entry(*key).is_some() {
                state.remove(key.0);
            }
        }
        drop(guard);
        // There may be room for one that is ready.
        self.arrived.notify_one();
        self.changed.notify_waiters();
        outcomes
    }

    /// It could not be settled: it is the application's again.
    pub(crate) fn unsettled(&self, key: Key) {
        if let Some(entry) = self.lock().entry(key)
            && let Phase::Settling { until } = entry.phase
        {
            entry.phase = Phase::Out { until };
        }
        self.changed.notify_waiters();
    }

    /// Gives a delivery back to be handed out again by this member, in its place. `counts` tells whether it was a
    /// hand-over without an outcome.
    pub(crate) fn give_back(&self, token: &Token, lane: Lane, counts: bool) -> bool {
        let mut state = self.lock();
        let Some(key) = state.out(token, lane) else { return false };
        if let Some(entry) = state.entry(key)
            && !counts
        {
            (entry.was_out, entry.again) = (entry.again > 0, entry.again.saturating_sub(1));
        }
        state.make_ready(key);
        drop(state);
        self.arrived.notify_one();
        self.changed.notify_waiters();
        true
    }

    /// Keeps a delivery for `lease` from now.
    pub(crate) fn extend(&self, token: &Token, lane: Lane, lease: Duration) -> bool {
        let mut state = self.lock();
        let Some(key) = state.out(token, lane) else { return false };
        let Some(entry) = state.entry(key) else { return false };
        entry.phase = Phase::Out { until: Instant::now() + lease };
        true
    }
}

/// Frames are handed to the client in the first poll; what is left is to wait until they are written.
fn handed_over(request: impl Future<Output = lapin::Result<()>>) -> bool {
    !matches!(request.now_or_never(), Some(Err(_)))
}

impl State {
    fn insert(&mut self, entry: Entry) -> Key {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("memory ends before 2^32 entries")
        });
        let own = &mut self.slots[slot as usize];
        own.generation += 1;
        own.entry = Some(entry);
        (slot, own.generation)
    }

    fn entry(&mut self, (slot, generation): Key) -> Option<&mut Entry> {
        let slot = self.slots.get_mut(slot as usize).filter(|slot| slot.generation == generation)?;
        slot.entry.as_mut()
    }

    fn entry_at(&self, slot: u32) -> Option<&Entry> {
        self.slots[slot as usize].entry.as_ref()
    }

    fn remove(&mut self, slot: u32) -> Option<Entry> {
        let entry = self.slots[slot as usize].entry.take()?;
        self.free.push(slot);
        let own = &mut self.feeds[entry.feed as usize];
        if entry.phase == Phase::Ready {
            own.ready.remove(&entry.tag);
        }
        own.unacked.remove(&entry.tag);
        if let (Some(offset), Some(log)) = (entry.offset, &mut own.log) {
            log.settle(offset);
        }
        self.left(&entry);
        Some(entry)
    }

    /// The server gives it out again.
    fn return_to_server(&mut self, slot: u32) {
        let Some(entry) = self.remove(slot) else { return };
        if let Some(channel) = &self.feeds[entry.feed as usize].channel {
            // On a channel that is gone it goes back anyway.
            handed_over(channel.basic_nack(entry.tag, BasicNackOptions { multiple: false, requeue: true }));
        }
    }

    fn make_ready(&mut self, key: Key) {
        if self.entry(key).is_some() {
            self.make_slot_ready(key.0);
        }
    }

    /// Whatever it is, it may be handed out: unless it waits for another one.
    fn make_slot_ready(&mut self, slot: u32) {
        if self.keeps_back(slot) {
            return;
        }
        let Some(entry) = self.slots[slot as usize].entry.as_mut() else { return };
        entry.phase = Phase::Ready;
        self.feeds[entry.feed as usize].ready.insert(entry.tag, slot);
    }

    /// Takes what is ready, when its time to live has ended.
    fn take_over(&mut self, slot: u32, now: Timestamp) -> Option<Taken> {
        let own = &self.slots[slot as usize];
        let generation = own.generation;
        own.entry.as_ref().filter(|entry| entry.is_over(now))?;
        self.take((slot, generation))
    }

    fn hand_out(
        &mut self,
        slot: u32,
        until: Instant,
        lease_until: Timestamp,
        context: &Arc<DeliveryContext>,
    ) -> Delivery {
        let own = &mut self.slots[slot as usize];
        let generation = own.generation;
        let entry = own.entry.as_mut().expect("what is ready is an entry");
        if entry.was_out {
            entry.again += 1;
        }
        (entry.phase, entry.was_out) = (Phase::Out { until }, true);
        let lane = Lane { index: entry.feed, epoch: self.feeds[entry.feed as usize].epoch };
        let facts = entry.facts(Token::Pair(u64::from(slot), generation), lane, lease_until, self.is_counted);
        Delivery::shared(Arc::clone(&entry.message), facts, context)
    }

    /// The entry that a delivery stands for, while it is out and its lease holds.
    fn out(&mut self, token: &Token, lane: Lane) -> Option<Key> {
        self.out_at(token, lane, Instant::now())
    }

    fn out_at(&mut self, token: &Token, lane: Lane, now: Instant) -> Option<Key> {
        let Token::Pair(slot, generation) = token else { return None };
        let key = (u32::try_from(*slot).ok()?, *generation);
        if self.feeds.get(lane.index as usize).is_none_or(|feed| feed.epoch != lane.epoch) {
            return None;
        }
        let entry = self.entry(key)?;
        matches!(entry.phase, Phase::Out { until } if now < until).then_some(key)
    }

    /// Takes an entry to settle it.
    fn take(&mut self, key: Key) -> Option<Taken> {
        let entry = self.entry(key)?;
        let until = match entry.phase {
            Phase::Out { until } => until,
            _ => Instant::now(),
        };
        entry.phase = Phase::Settling { until };
        let is_first = entry.hop.first == 0 && entry.deliveries() == 1;
        let first = if is_first { entry.arrived_at.as_millis() } else { entry.hop.first };
        let hop = Hop { deliveries: entry.deliveries(), first, ..entry.hop };
        Some(Taken { key, feed: entry.feed, hop, message: Arc::clone(&entry.message) })
    }
}
