//! What one subscription holds: messages that look their record up, that are ready, that are out, that are being settled.
//!
//! Every one of them counts against `max_in_flight`, and so does what a pull has asked the server for.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Delivery, DeliveryContext, DeliveryFacts, Destination, Error, Group, Lane, Message, Position, Received,
    SubscriptionEvent, Timestamp, Token,
};
use async_nats::Subject;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use crate::record::Record;

/// Failures that this member remembers so that it need not read them back.
const REMEMBERED: usize = 10_000;

/// Shared by the subscription, its feeds and its settler.
pub(crate) struct Shared {
    state: Mutex<State>,
    pub(crate) lease: Duration,
    pub(crate) max_in_flight: usize,
    /// Something can be received.
    pub(crate) arrived: Notify,
    /// There is room for more, or something about pulling changed.
    pub(crate) room: Notify,
    /// Where leases are renewed.
    renewals: mpsc::UnboundedSender<Subject>,
    /// Set when the subscription closes: until when it may take.
    pub(crate) closing: watch::Sender<Option<Instant>>,
    /// How many feeds work.
    pub(crate) working: watch::Sender<usize>,
}

#[derive(Default)]
pub(crate) struct State {
    slots: Vec<Slot>,
    free: Vec<u32>,
    count: usize,
    places: HashMap<(u32, u64), u32>,
    pub(crate) feeds: Vec<FeedState>,
    pub(crate) events: VecDeque<SubscriptionEvent>,
    pub(crate) failure: Option<Error>,
    pub(crate) is_paused: bool,
    pub(crate) is_closing: bool,
    is_receiving: bool,
    received: Option<Instant>,
    remembered: HashMap<(u32, u64), (Record, u64)>,
    next_feed: usize,
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
    /// Under order: this member works. Without order always.
    pub(crate) is_active: bool,
    /// Under order: until when nobody else works.
    pub(crate) fence: Option<Instant>,
    pub(crate) epoch: u32,
    pub(crate) ack_wait: Duration,
    /// Messages that the server was asked for and has not sent.
    pub(crate) asked: usize,
    ready: BTreeMap<u64, u32>,
    looking: BTreeSet<u64>,
}

impl FeedState {
    pub(crate) fn new(destination: Destination, group: Group, keeps_order: bool, ack_wait: Duration) -> Self {
        let (fence, epoch, asked, ready, looking) = Default::default();
        Self { destination, group, keeps_order, is_active: !keeps_order, fence, epoch, ack_wait, asked, ready, looking }
    }

    fn may_deliver(&self, now: Instant) -> bool {
        self.is_active && self.fence.is_none_or(|fence| now < fence)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Looking,
    Ready,
    Out { until: Instant },
    Settling { until: Instant },
}

/// A message that is with this member.
pub(crate) struct Entry {
    pub(crate) feed: u32,
    pub(crate) sequence: u64,
    /// Where it is acked.
    pub(crate) ack: Subject,
    pub(crate) message: Arc<Message>,
    /// How often the server has handed it out, this time included.
    pub(crate) delivered: u32,
    pub(crate) record: Record,
    /// Where its record is stored, when it has one.
    pub(crate) record_at: Option<u64>,
    pub(crate) redrives: u32,
    pub(crate) arrived_at: Timestamp,
    /// Hand-overs by this member beyond the first.
    again: u32,
    was_out: bool,
    /// Until when the server waits for an ack, as far as this member knows.
    server_until: Instant,
    phase: Phase,
}

impl Entry {
    fn facts(&self, token: Token, lane: Lane, lease_until: Timestamp) -> DeliveryFacts {
        let attempt = self.record.failures + 1;
        let deliveries = (self.delivered + self.again).saturating_sub(self.record.spare).max(attempt);
        let mut facts = DeliveryFacts::new(token);
        (facts.attempt, facts.deliveries, facts.lane) = (attempt, Some(deliveries), lane);
        (facts.position, facts.lease_until) = (Some(Position::new(self.sequence)), Some(lease_until));
        facts
    }
}

/// A message as it came from the server.
pub(crate) struct Arrival {
    pub(crate) feed: u32,
    pub(crate) sequence: u64,
    pub(crate) ack: Subject,
    pub(crate) message: Message,
    pub(crate) delivered: u32,
    pub(crate) redrives: u32,
    /// Its record must be read even if the server says that this is its first delivery.
    pub(crate) must_look: bool,
}

/// A message that goes back to the server.
pub(crate) struct Surrendered {
    pub(crate) sequence: u64,
    pub(crate) ack: Subject,
    /// What has to be written down first.
    pub(crate) spared: Option<Record>,
}

/// What an arrival became.
pub(crate) enum Arrived {
    /// It can be handed out, or is here already.
    Done,
    /// Its record has to be read first.
    Look(Key),
    /// Its record is known, and has to be applied.
    Known(Key, Record, u64),
}

/// Slot and generation: an entry, and no other that takes its slot later.
pub(crate) type Key = (u32, u64);

/// What a settle needs of an entry.
pub(crate) struct Taken {
    pub(crate) key: Key,
    pub(crate) feed: u32,
    pub(crate) sequence: u64,
    pub(crate) delivered: u32,
    pub(crate) record: Record,
    pub(crate) record_at: Option<u64>,
    pub(crate) redrives: u32,
    pub(crate) first_at: Option<Timestamp>,
}

impl Shared {
    pub(crate) fn new(
        lease: Duration,
        max_in_flight: usize,
        feeds: Vec<FeedState>,
    ) -> (Self, mpsc::UnboundedReceiver<Subject>) {
        let (renewals, renewed) = mpsc::unbounded_channel();
        let working = watch::Sender::new(feeds.len());
        let state = Mutex::new(State { feeds, received: Some(Instant::now()), ..State::default() });
        let (arrived, room, closing) = (Notify::new(), Notify::new(), watch::Sender::new(None));
        (Self { state, lease, max_in_flight, arrived, room, renewals, closing, working }, renewed)
    }

    /// Stops pulling and receiving; what is here goes back until `deadline`. Idempotent.
    pub(crate) fn close(&self, deadline: Instant) {
        self.lock().is_closing = true;
        self.closing.send_if_modified(|closing| {
            let is_first = closing.is_none();
            *closing = Some(closing.unwrap_or(deadline));
            is_first
        });
        self.arrived.notify_one();
        self.room.notify_waiters();
    }

    /// Waits until no feed works any more; false at the deadline.
    pub(crate) async fn ended(&self, deadline: Instant) -> bool {
        let mut working = self.working.subscribe();
        let ended = working.wait_for(|working| *working == 0);
        tokio::time::timeout_at(deadline, ended).await.is_ok()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
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

    /// How many messages a feed may ask for now; counts them as asked for.
    pub(crate) fn reserve(&self, feed: u32) -> usize {
        if self.is_resting() {
            return 0;
        }
        let mut state = self.lock();
        let asked: usize = state.feeds.iter().map(|feed| feed.asked).sum();
        let free = self.max_in_flight.saturating_sub(state.count + asked);
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

    /// The server will not send `count` of what it was asked for; all of it with `None`.
    pub(crate) fn unasked(&self, feed: u32, count: Option<usize>) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        own.asked = count.map_or(0, |count| own.asked.saturating_sub(count));
        drop(state);
        self.room.notify_waiters();
    }

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
        Some(Taken {
            key,
            feed: entry.feed,
            sequence: entry.sequence,
            delivered: entry.delivered,
            record: entry.record,
            record_at: entry.record_at,
            redrives: entry.redrives,
            first_at: entry.record.first_at().or((entry.delivered == 1).then_some(entry.arrived_at)),
        })
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
        if let Some(entry) = self.lock().entry(key)
            && let Phase::Settling { until } = entry.phase
        {
            entry.phase = Phase::Out { until };
        }
    }

    /// Gives a delivery back to be handed out again by this member, in its place. `counts` tells whether it was a
    /// hand-over without an outcome.
    pub(crate) fn give_back(&self, token: &Token, lane: Lane, counts: bool) -> bool {
        let mut state = self.lock();
        let Some(key) = state.out(token, lane) else { return false };
        if let Some(entry) = state.entry(key) {
            if !counts {
                (entry.was_out, entry.again) = (entry.again > 0, entry.again.saturating_sub(1));
            }
            state.make_ready(key);
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
        let Some(feed) = state.entry(key).map(|entry| entry.feed) else { return false };
        let ack_wait = state.feeds[feed as usize].ack_wait;
        let Some(entry) = state.entry(key) else { return false };
        let until = now + lease;
        entry.phase = Phase::Out { until };
        let _ = self.renewals.send(entry.ack.clone());
        entry.server_until = now + ack_wait;
        true
    }

    /// Renews what needs it, forgets what is over; answers when to look again.
    pub(crate) fn keep_leases(&self) -> Duration {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut next = Duration::from_secs(1);
        let mut over = Vec::new();
        for (slot, entry) in state.slots.iter_mut().enumerate() {
            let Some(entry) = entry.entry.as_mut() else { continue };
            let ack_wait = state.feeds[entry.feed as usize].ack_wait;
            next = next.min(ack_wait / 5);
            match entry.phase {
                Phase::Out { until } if until <= now => {
                    over.push(u32::try_from(slot).expect("slots are numbered in 32 bits"));
                    continue;
                }
                Phase::Out { until } if until <= entry.server_until => continue,
                _ => {}
            }
            if entry.server_until < now + ack_wait / 2 {
                let _ = self.renewals.send(entry.ack.clone());
                entry.server_until = now + ack_wait;
            }
        }
        if state.remembered.len() > REMEMBERED / 2 {
            // Those whose next delivery went to another member.
            let recently = Timestamp::now().as_millis() - 60_000;
            state.remembered.retain(|_, (record, _)| record.not_before > recently);
        }
        let any_over = !over.is_empty();
        for slot in over {
            state.remove(slot);
        }
        drop(guard);
        if any_over {
            self.room.notify_waiters();
        }
        next.max(Duration::from_millis(50))
    }

    /// The lane is another member's: nothing of it can be settled here any more.
    pub(crate) fn lose(&self, feed: u32) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        (own.is_active, own.fence, own.asked) = (false, None, 0);
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
                            Phase::Looking | Phase::Ready => true,
                        }
                })
            })
            .map(|(slot, _)| slot)
            .collect();
        let mut entries: Vec<_> = slots.into_iter().filter_map(|slot| state.remove(slot)).collect();
        entries.sort_unstable_by_key(|entry| entry.sequence);
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

    /// Prefetched and delayed messages of this member that the server counts as in flight.
    pub(crate) fn kept_back(&self, destination: &Destination, group: &Group) -> (u64, u64) {
        let now = Timestamp::now().as_millis();
        let state = self.lock();
        let own = state.feeds.iter().position(|feed| feed.destination == *destination && feed.group == *group);
        let Some(feed) = own.and_then(|own| u32::try_from(own).ok()) else { return (0, 0) };
        let entries = state.slots.iter().filter_map(|slot| slot.entry.as_ref());
        let is_waiting = |entry: &&Entry| entry.feed == feed && matches!(entry.phase, Phase::Looking | Phase::Ready);
        let delayed = state.remembered.iter().filter(|((of, _), (record, _))| *of == feed && record.not_before > now);
        (entries.filter(is_waiting).count() as u64, delayed.count() as u64)
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

    /// The entry, for looking up its record.
    pub(crate) fn place_of(&self, key: Key) -> Option<(u64, u32)> {
        self.lock().entry(key).map(|entry| (entry.sequence, entry.delivered))
    }
}

impl State {
    fn insert(&mut self, entry: Entry) -> Key {
        let place = (entry.feed, entry.sequence);
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
        (slot, generation)
    }

    fn entry(&mut self, (slot, generation): Key) -> Option<&mut Entry> {
        let slot = self.slots.get_mut(slot as usize).filter(|slot| slot.generation == generation)?;
        slot.entry.as_mut()
    }

    fn remove(&mut self, slot: u32) -> Option<Entry> {
        let entry = self.slots[slot as usize].entry.take()?;
        self.free.push(slot);
        self.count -= 1;
        let place = (entry.feed, entry.sequence);
        if self.places.get(&place) == Some(&slot) {
            self.places.remove(&place);
        }
        let feed = &mut self.feeds[entry.feed as usize];
        if feed.ready.get(&entry.sequence) == Some(&slot) {
            feed.ready.remove(&entry.sequence);
        }
        if entry.phase == Phase::Looking {
            feed.looking.remove(&entry.sequence);
        }
        Some(entry)
    }

    fn make_ready(&mut self, key: Key) {
        let Some(entry) = self.entry(key) else { return };
        entry.phase = Phase::Ready;
        let (feed, sequence) = (entry.feed, entry.sequence);
        let feed = &mut self.feeds[feed as usize];
        feed.looking.remove(&sequence);
        feed.ready.insert(sequence, key.0);
    }

    fn next_ready(&mut self, feed: usize, now: Instant) -> Option<u32> {
        loop {
            let own = &mut self.feeds[feed];
            if !own.may_deliver(now) {
                return None;
            }
            let (sequence, slot) = own.ready.first_key_value().map(|(sequence, slot)| (*sequence, *slot))?;
            // Under order nothing overtakes what still looks its record up.
            if own.keeps_order && own.looking.first().is_some_and(|looking| *looking < sequence) {
                return None;
            }
            own.ready.remove(&sequence);
            let keeps_order = own.keeps_order;
            let entry = self.slots[slot as usize].entry.as_ref().expect("what is ready is an entry");
            // Kept waiting for so long that the server has given it to somebody else.
            if !keeps_order && entry.server_until <= now {
                self.remove(slot);
                continue;
            }
            return Some(slot);
        }
    }

    /// The entry that a delivery stands for, while it is out and its lease holds.
    fn out(&mut self, token: &Token, lane: Lane) -> Option<Key> {
        let Token::Pair(slot, generation) = token else { return None };
        let key = (u32::try_from(*slot).ok()?, *generation);
        if self.feeds.get(lane.index as usize).is_none_or(|feed| feed.epoch != lane.epoch) {
            return None;
        }
        let entry = self.entry(key)?;
        matches!(entry.phase, Phase::Out { until } if Instant::now() < until).then_some(key)
    }

    fn drop_feed(&mut self, feed: u32) {
        for slot in 0..self.slots.len() {
            if self.slots[slot].entry.as_ref().is_some_and(|entry| entry.feed == feed) {
                self.remove(u32::try_from(slot).expect("slots are numbered in 32 bits"));
            }
        }
        self.remembered.retain(|(other, _), _| *other != feed);
    }
}
