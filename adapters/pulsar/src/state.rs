//! What one subscription holds: messages whose delay has not ended, that are ready, that are out, that are being settled.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Blocks, Delivery, DeliveryContext, DeliveryFacts, Destination, Error, Group, Lane, Message, Position, Received,
    SubscriptionEvent, Timestamp, Token,
};
use parking_lot::{Mutex, MutexGuard};
use pulsar::proto::MessageIdData;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::codec::Notes;
use crate::wire::Conn;

mod count;
mod failures;
mod lanes;
mod permits;
#[cfg(test)]
mod tests;
mod time;

use count::Count;
pub(crate) use count::Wanted;
use failures::Spot;
pub(crate) use failures::{Failing, Failure, MOST_WAITING};

/// Shared by the subscription, its feeds and its settler.
pub(crate) struct Shared {
    state: Mutex<State>,
    pub(crate) lease: Duration,
    pub(crate) max_in_flight: usize,
    pub(crate) keeps_order: bool,
    /// Something can be received.
    pub(crate) arrived: Notify,
    /// There is room for more, or something about receiving changed.
    pub(crate) room: Notify,
    /// A lease or a delay has to be looked after.
    pub(crate) kept: Notify,
    /// Set when the subscription closes: until when it may take.
    pub(crate) closing: watch::Sender<Option<Instant>>,
    /// How many feeds work.
    pub(crate) working: watch::Sender<usize>,
}

#[derive(Default)]
pub(crate) struct State {
    entries: HashMap<u64, Entry>,
    places: HashMap<(u32, Place), u64>,
    next_key: u64,
    pub(crate) feeds: Vec<FeedState>,
    pub(crate) events: VecDeque<SubscriptionEvent>,
    pub(crate) failure: Option<Error>,
    pub(crate) is_paused: bool,
    pub(crate) is_closing: bool,
    is_receiving: bool,
    received: Option<Instant>,
    next_feed: usize,
    /// How many are handed out and not settled.
    out: usize,
    /// How many wait for a failed one, or failed and wait themselves.
    kept: usize,
}

/// A connection, and a consumer's number on it.
pub(crate) type Attachment = (Arc<Conn>, u64);

/// A place within a topic, and within a batch of somebody else's producer.
pub(crate) type Place = (u64, u64, i32);

/// One topic of the subscription.
pub(crate) struct FeedState {
    pub(crate) destination: Destination,
    pub(crate) group: Group,
    /// It brings messages back to the group.
    pub(crate) is_back: bool,
    /// The feed of the messages that this one brings back; itself where it is that one.
    pub(crate) source: u32,
    pub(crate) epoch: u32,
    /// Its consumer, while it has one.
    pub(crate) attached: Option<Attachment>,
    /// It does not serve at the moment.
    pub(crate) is_degraded: bool,
    /// Other members shall have it: nothing more of it is handed out, and when nothing is out it is left.
    is_given_up: bool,
    /// Its consumer is being closed.
    is_leaving: bool,
    /// Messages that the broker may send, how many it is best granted, and how many of it are here.
    permits: usize,
    share: usize,
    held: usize,
    ready: BTreeMap<Place, u64>,
    /// Of hand-overs, where there is a limit.
    count: Option<Count>,
    /// What waits for failed ones of this lane, where later messages do: of a source.
    blocks: Option<Blocks<Spot>>,
    /// What is known of messages that failed in their place.
    failures: BTreeMap<Place, Failure>,
}

impl FeedState {
    pub(crate) fn new(destination: Destination, group: Group, is_back: bool, source: u32, is_counted: bool) -> Self {
        let (epoch, attached, is_degraded, is_given_up, is_leaving) = Default::default();
        let (permits, share, held, ready, blocks, failures) = Default::default();
        let count = is_counted.then(Count::default);
        Self {
            destination,
            group,
            is_back,
            source,
            epoch,
            attached,
            is_degraded,
            is_given_up,
            is_leaving,
            permits,
            share,
            held,
            ready,
            count,
            blocks,
            failures,
        }
    }

    /// Its connection or its consumer has ended, and it has not come round to that yet: the broker gives everything of it out
    /// again, so that nothing of it may be handed out here any more, least of all what was dropped because its settling failed.
    fn is_cut_off(&self) -> bool {
        self.attached.as_ref().is_some_and(|(conn, consumer)| !conn.has_consumer(*consumer))
    }
}

/// How many messages of a batch are not settled yet: the broker acks it as a whole.
pub(crate) type Siblings = Arc<std::sync::atomic::AtomicUsize>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting {
        until: Timestamp,
    },
    /// It waits for an earlier one that failed.
    Behind,
    Ready,
    Out {
        until: Instant,
    },
    Settling {
        until: Instant,
    },
}

struct Entry {
    feed: u32,
    id: MessageIdData,
    siblings: Option<Siblings>,
    message: Arc<Message>,
    notes: Notes,
    arrived_at: Timestamp,
    phase: Phase,
    /// How often it was handed out, as far as that is known, and up to which number that is stored.
    hand_overs: u32,
    noted: u32,
    /// Another member may have handed it out.
    is_suspect: bool,
    /// How often it failed and kept its place.
    in_place: u32,
}

impl Entry {
    fn place(&self) -> Place {
        (self.id.ledger_id, self.id.entry_id, self.id.batch_index())
    }

    /// Handed out, and not settled.
    fn is_out(&self) -> bool {
        matches!(self.phase, Phase::Out { .. } | Phase::Settling { .. })
    }
}

/// A message as it came from the broker.
pub(crate) struct Arrival {
    pub(crate) id: MessageIdData,
    pub(crate) siblings: Option<Siblings>,
    pub(crate) message: Message,
    pub(crate) notes: Notes,
}

/// What a settle needs of an entry.
pub(crate) struct Taken {
    pub(crate) key: u64,
    pub(crate) feed: u32,
    pub(crate) id: MessageIdData,
    pub(crate) siblings: Option<Siblings>,
    pub(crate) notes: Notes,
    /// Hand-overs without an outcome, before this one.
    pub(crate) lost: u32,
    pub(crate) first_at: Timestamp,
    pub(crate) attached: Attachment,
}

/// Messages that go back to the broker, each by the consumer that it came by: another one of the feed may have got it since.
pub(crate) type Returned = Vec<(Attachment, MessageIdData)>;

impl Shared {
    pub(crate) fn new(lease: Duration, max_in_flight: usize, keeps_order: bool, feeds: Vec<FeedState>) -> Self {
        let working = watch::Sender::new(feeds.len());
        let state = Mutex::new(State { feeds, received: Some(Instant::now()), ..State::default() });
        let (arrived, room, kept, closing) = Default::default();
        let closing: watch::Sender<Option<Instant>> = closing;
        Self { state, lease, max_in_flight, keeps_order, arrived, room, kept, closing, working }
    }

    /// Stops receiving; what is here goes back. Idempotent.
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

    /// How many messages a feed may be sent now; counts them as granted.
    pub(crate) fn reserve(&self, feed: u32) -> usize {
        let mut state = self.lock();
        if state.is_closing || state.failure.is_some() || self.rests(&state) {
            return 0;
        }
        if state.is_given_up(feed) {
            return 0;
        }
        let wanted = state.wanted(feed, self.max_in_flight);
        state.feeds[feed as usize].permits += wanted;
        wanted
    }

    /// So many messages came that are not taken in: the broker has counted them.
    pub(crate) fn spent(&self, feed: u32, permits: usize) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        own.permits = own.permits.saturating_sub(permits);
    }

    /// Takes arrivals of a feed in; answers those that go back to the broker at once, because there is no room for them.
    pub(crate) fn arrive(&self, feed: u32, arrivals: Vec<Arrival>) -> Returned {
        let mut returned = Vec::new();
        let now = Timestamp::now();
        let mut waits = false;
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        own.permits = own.permits.saturating_sub(arrivals.len());
        // On an Exclusive subscription the broker would give out everything again that is not acked.
        let may_return = !self.keeps_order;
        let is_resting = self.rests(&state);
        for arrival in arrivals {
            let place = (arrival.id.ledger_id, arrival.id.entry_id, arrival.id.batch_index());
            if state.places.contains_key(&(feed, place)) {
                // It is here already: the broker has given it out again.
                continue;
            }
            let is_full = state.entries.len() >= self.max_in_flight;
            if may_return && arrival.siblings.is_none() && (is_full || is_resting) {
                returned.extend(state.returned(feed, arrival.id));
                continue;
            }
            let may_overtake = self.keeps_order || state.feeds[feed as usize].is_back;
            let count = state.feeds[feed as usize].count.as_mut();
            let is_suspect = count.is_some_and(|count| count.arrived(place, may_overtake));
            let mut entry = Entry {
                feed,
                id: arrival.id,
                siblings: arrival.siblings,
                message: Arc::new(arrival.message),
                notes: arrival.notes,
                arrived_at: now,
                phase: Phase::Ready,
                hand_overs: 0,
                noted: 0,
                is_suspect,
                in_place: 0,
            };
            state.recall(&mut entry);
            let until = Timestamp::from_millis(entry.notes.not_before);
            if until > now {
                entry.phase = Phase::Waiting { until };
                waits = true;
            }
            state.insert(entry);
        }
        drop(state);
        self.arrived.notify_one();
        if waits {
            self.kept.notify_one();
        }
        returned
    }

    /// Hands out up to `max`; an error ends the subscription, `None` is nothing at the moment. What has to be stored before
    /// more can be handed out is added to `wanted`.
    pub(crate) fn take(
        &self,
        max: usize,
        context: &Arc<DeliveryContext>,
        wanted: &mut Vec<Wanted>,
    ) -> Result<Option<Received>, Error> {
        let now = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut received = Received { deliveries: Vec::new(), events: state.events.drain(..).collect() };
        if state.failure.is_none() && !state.is_paused {
            let lease_until = Timestamp::now().after(self.lease);
            let until = now + self.lease;
            let feeds = state.feeds.len();
            let mut announcing = state.announcing();
            for offset in 0..feeds {
                let index = (state.next_feed + offset) % feeds;
                let gives_up = state.is_given_up(u32::try_from(index).expect("a subscription has few topics"));
                let feed = &mut state.feeds[index];
                if feed.is_cut_off() || feed.is_leaving {
                    continue;
                }
                // More may be here: a foreign batch comes whole, and each idle source has one on its way beyond the bound.
                while received.deliveries.len() < max && state.out < self.max_in_flight {
                    let Some((_, &key)) = feed.ready.first_key_value() else { break };
                    if gives_up && !state.entries[&key].is_announced() {
                        break;
                    }
                    if let Some(count) = &mut feed.count {
                        let room = (max - received.deliveries.len()).min(self.max_in_flight - state.out);
                        let may_announce = announcing.is_none_or(|other| other == index);
                        let need = count.before(&feed.ready, &state.entries, room, may_announce);
                        if need.announces() {
                            announcing = Some(index);
                        }
                        let must_wait = need.must_wait();
                        wanted.extend(need.wanted(index));
                        if must_wait {
                            break;
                        }
                    }
                    feed.ready.pop_first();
                    let entry = state.entries.get_mut(&key).expect("what is ready is an entry");
                    entry.phase = Phase::Out { until };
                    state.out += 1;
                    entry.hand_overs += 1;
                    let mut facts = DeliveryFacts::new(Token::Pair(key, 0));
                    facts.attempt = entry.notes.failures + 1;
                    facts.deliveries = feed.count.is_some().then(|| facts.attempt + entry.lost());
                    facts.lane = Lane { index: entry.feed, epoch: feed.epoch };
                    facts.position = Some(Position { major: entry.id.ledger_id, minor: entry.id.entry_id });
                    facts.lease_until = Some(lease_until);
                    received.deliveries.push(Delivery::shared(Arc::clone(&entry.message), facts, context));
                }
            }
            state.next_feed = state.next_feed.wrapping_add(1) % feeds;
        }
        if received.deliveries.is_empty() && received.events.is_empty() {
            return state.failure.as_ref().map_or(Ok(None), |failure| Err(failure.duplicate()));
        }
        drop(guard);
        if !received.deliveries.is_empty() {
            self.kept.notify_one();
        }
        Ok(Some(received))
    }

    /// Begins to settle a delivery; `None` when its lease or its consumer is over.
    pub(crate) fn begin(&self, token: &Token, lane: Lane) -> Option<Taken> {
        let mut state = self.lock();
        let key = state.out(token, lane)?;
        let attached = state.feeds[lane.index as usize].attached.clone()?;
        let entry = state.entries.get_mut(&key)?;
        let Phase::Out { until } = entry.phase else { return None };
        entry.phase = Phase::Settling { until };
        let first_at = match entry.notes.first_at {
            0 => entry.arrived_at,
            millis => Timestamp::from_millis(millis),
        };
        let (feed, id, siblings, notes) = (entry.feed, entry.id.clone(), entry.siblings.clone(), entry.notes);
        Some(Taken { key, feed, id, siblings, notes, lost: entry.lost(), first_at, attached })
    }

    /// It is settled: it is not here any more, so that there is room. False when its consumer was lost meanwhile.
    pub(crate) fn settled(&self, key: u64) -> bool {
        let mut state = self.lock();
        let was_full = state.out >= self.max_in_flight;
        let entry = state.remove(key);
        let was_full = was_full || state.kept > 0;
        if let Some(entry) = &entry {
            state.feeds[entry.feed as usize].failures.remove(&entry.place());
            state.leave(entry.feed, entry.place(), &entry.message);
        }
        if was_full {
            self.arrived.notify_one();
        }
        if let Some(entry) = &entry
            && let Some(count) = &mut state.feeds[entry.feed as usize].count
        {
            count.settled(entry.place());
        }
        entry.is_some()
    }

    /// It could not be settled: it is the application's again.
    pub(crate) fn unsettled(&self, key: u64) {
        if let Some(entry) = self.lock().entries.get_mut(&key)
            && let Phase::Settling { until } = entry.phase
        {
            entry.phase = Phase::Out { until };
        }
    }

    /// Whether it is here still.
    pub(crate) fn has(&self, key: u64) -> bool {
        self.lock().entries.contains_key(&key)
    }

    /// Prefetched and delayed messages of this member that the broker counts as in flight.
    pub(crate) fn kept_back(&self, destination: &Destination, group: &Group) -> (u64, u64) {
        let state = self.lock();
        let is_own = |entry: &&Entry| {
            let feed = &state.feeds[entry.feed as usize];
            feed.destination == *destination && feed.group == *group
        };
        let count = |is: fn(&Phase) -> bool| {
            state.entries.values().filter(is_own).filter(|entry| is(&entry.phase)).count() as u64
        };
        (
            count(|phase| matches!(phase, Phase::Ready | Phase::Behind)),
            count(|phase| matches!(phase, Phase::Waiting { .. })),
        )
    }

    /// Whether anything of the feed is being settled.
    pub(crate) fn is_settling(&self, feed: u32) -> bool {
        let state = self.lock();
        state.entries.values().any(|entry| entry.feed == feed && matches!(entry.phase, Phase::Settling { .. }))
    }
}

impl State {
    /// How a message of the feed goes back. A consumer that is gone has given it back already.
    fn returned(&self, feed: u32, id: MessageIdData) -> Option<(Attachment, MessageIdData)> {
        Some((self.feeds[feed as usize].attached.clone()?, id))
    }

    /// A feed is served again; whether that was the last one which was not.
    fn recovered(&mut self, feed: u32) -> bool {
        let was_degraded = std::mem::take(&mut self.feeds[feed as usize].is_degraded);
        let is_last = was_degraded && self.feeds.iter().all(|feed| !feed.is_degraded);
        if is_last {
            self.events.push_back(SubscriptionEvent::Recovered);
        }
        is_last
    }

    fn insert(&mut self, mut entry: Entry) {
        let key = self.next_key;
        self.next_key += 1;
        if entry.phase == Phase::Ready {
            if self.holds_back(&entry) {
                entry.phase = Phase::Behind;
            } else {
                self.feeds[entry.feed as usize].ready.insert(entry.place(), key);
            }
        }
        self.kept += usize::from(entry.is_kept());
        self.feeds[entry.feed as usize].held += 1;
        self.places.insert((entry.feed, entry.place()), key);
        self.entries.insert(key, entry);
    }

    fn remove(&mut self, key: u64) -> Option<Entry> {
        let entry = self.entries.remove(&key)?;
        self.places.remove(&(entry.feed, entry.place()));
        self.out -= usize::from(entry.is_out());
        self.kept -= usize::from(entry.is_kept());
        let feed = &mut self.feeds[entry.feed as usize];
        feed.held -= 1;
        let ready = &mut feed.ready;
        if ready.get(&entry.place()) == Some(&key) {
            ready.remove(&entry.place());
        }
        Some(entry)
    }

    /// Under a new key: whoever still holds the old delivery holds nothing.
    fn ready_again(&mut self, key: u64) {
        if let Some(mut entry) = self.remove(key) {
            entry.phase = Phase::Ready;
            self.insert(entry);
        }
    }

    /// The entry that a delivery stands for, while it is out and its lease holds.
    fn out(&mut self, token: &Token, lane: Lane) -> Option<u64> {
        let Token::Pair(key, _) = token else { return None };
        if self.feeds.get(lane.index as usize).is_none_or(|feed| feed.epoch != lane.epoch) {
            return None;
        }
        let entry = self.entries.get(key)?;
        matches!(entry.phase, Phase::Out { until } if Instant::now() < until).then_some(*key)
    }
}
