//! What waits for a handler: one key at a time, in order; other keys in parallel.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use anybroker_core::{Bytes, Delivery, Destination, Lane, MessageId, Order, Timestamp};

/// A delivery in the worker's hands. It is shared only while its lease is being extended.
#[allow(clippy::large_enum_variant, reason = "moved, not kept: a box would be an allocation per message")]
pub(crate) enum Held {
    Own(Delivery),
    Shared(Arc<Delivery>),
}

impl Held {
    pub(crate) fn delivery(&self) -> &Delivery {
        match self {
            Self::Own(delivery) => delivery,
            Self::Shared(delivery) => delivery,
        }
    }

    /// The delivery itself, unless somebody else still looks at it.
    pub(crate) fn into_own(self) -> Result<Delivery, Arc<Delivery>> {
        match self {
            Self::Own(delivery) => Ok(delivery),
            Self::Shared(delivery) => Arc::try_unwrap(delivery),
        }
    }
}

/// The number of a key's lane.
pub(crate) type LaneId = u32;

/// A delivery that waits for a handler.
pub(crate) struct Job {
    pub(crate) held: Held,
    /// The lane of its key; `None` where it has no order.
    pub(crate) lane: Option<LaneId>,
    /// Until when it is leased, as far as this worker knows.
    pub(crate) until: Timestamp,
}

#[derive(PartialEq, Eq, Hash, Clone)]
struct Key {
    destination: Destination,
    /// `None`: the whole destination, under total order.
    key: Option<Bytes>,
}

struct KeyLane {
    key: Option<Key>,
    /// What waits behind the job that is ready or with a handler.
    waiting: VecDeque<Job>,
}

/// Buffers of lanes that grew longer than that are not kept for the next lane.
const KEPT_CAPACITY: usize = 16;

/// Everything that waits for a handler. A lane exists from the arrival of a key's first delivery until its last one
/// is concluded; at most one of its deliveries is ready or with a handler.
///
/// Costs no allocation per message once it has grown to its size: lanes and their buffers are used again.
pub(crate) struct Lanes {
    order: Order,
    ready: VecDeque<Job>,
    lanes: Vec<KeyLane>,
    free: Vec<LaneId>,
    index: HashMap<Key, LaneId>,
    /// Keys of which something was given back, by the message that has to come first. A receive that was on its way
    /// at that moment may still bring later ones.
    barred: HashMap<Key, MessageId>,
}

impl Lanes {
    pub(crate) fn new(order: Order) -> Self {
        let (ready, lanes, free) = Default::default();
        Self { order, ready, lanes, free, index: HashMap::new(), barred: HashMap::new() }
    }

    /// How many could begin now.
    pub(crate) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// A delivery has arrived. Brings it back if others of its key, which are back at the broker, come before it.
    pub(crate) fn push(&mut self, delivery: Delivery, until: Timestamp) -> Option<Held> {
        let held = Held::Own(delivery);
        let Some(key) = self.key(held.delivery()) else {
            self.ready.push_back(Job { held, lane: None, until });
            return None;
        };
        if !self.barred.is_empty()
            && let Some(first) = self.barred.get(&key)
        {
            if first != held.delivery().message().id() {
                return Some(held);
            }
            self.barred.remove(&key);
        }
        if let Some(&lane) = self.index.get(&key) {
            self.lanes[lane as usize].waiting.push_back(Job { held, lane: Some(lane), until });
            return None;
        }
        let lane = self.open(key);
        self.ready.push_back(Job { held, lane: Some(lane), until });
        None
    }

    /// A receive is over: the next one brings only what the broker hands out from now on.
    pub(crate) fn received(&mut self) {
        self.barred.clear();
    }

    /// The lane's delivery, a message with that id, is back at the broker: what waits and comes after it goes back as
    /// well, and the lane goes on with what has been delivered from that message on.
    pub(crate) fn go_back(&mut self, lane: LaneId, id: &MessageId) -> Vec<Held> {
        let KeyLane { key, waiting } = &mut self.lanes[lane as usize];
        let again = waiting.iter().position(|job| job.held.delivery().message().id() == id);
        if again.is_none()
            && let Some(key) = key
        {
            self.barred.insert(key.clone(), id.clone());
        }
        let stragglers = waiting.drain(..again.unwrap_or(waiting.len())).map(|job| job.held).collect();
        self.advance(lane);
        stragglers
    }

    /// The next one to begin.
    pub(crate) fn pop(&mut self) -> Option<Job> {
        self.ready.pop_front()
    }

    /// The lane's delivery is concluded: the next one is ready, or the lane ends.
    pub(crate) fn advance(&mut self, lane: LaneId) {
        match self.lanes[lane as usize].waiting.pop_front() {
            Some(job) => self.ready.push_back(job),
            None => self.end(lane),
        }
    }

    /// Takes out what waits in the lane; the lane stays as it is.
    pub(crate) fn take_waiting(&mut self, lane: LaneId) -> Vec<Held> {
        self.lanes[lane as usize].waiting.drain(..).map(|job| job.held).collect()
    }

    /// Takes out everything that is not with a handler, in the order of each lane.
    pub(crate) fn take_all(&mut self) -> Vec<Held> {
        self.take_where(|_| true)
    }

    /// Takes out everything of one of the broker's lanes that is not with a handler.
    pub(crate) fn take_lane(&mut self, lane: Lane) -> Vec<Held> {
        self.take_where(|job| job.held.delivery().lane() == lane)
    }

    /// Takes out one delivery, unless it is with a handler already.
    pub(crate) fn take_one(&mut self, wanted: &Arc<Delivery>) -> Option<Held> {
        let wanted = Arc::as_ptr(wanted);
        self.take_where(|job| matches!(&job.held, Held::Shared(held) if std::ptr::eq(Arc::as_ptr(held), wanted))).pop()
    }

    fn take_where(&mut self, mut wanted: impl FnMut(&Job) -> bool) -> Vec<Held> {
        let mut taken = Vec::new();
        let mut heads = Vec::new();
        let mut firsts: Vec<(LaneId, MessageId)> = Vec::new();
        for job in std::mem::take(&mut self.ready) {
            if wanted(&job) {
                heads.extend(job.lane);
                firsts.extend(job.lane.map(|lane| (lane, job.held.delivery().message().id().clone())));
                taken.push(job.held);
            } else {
                self.ready.push_back(job);
            }
        }
        for lane in &mut self.lanes {
            if lane.waiting.iter().any(&mut wanted) {
                for job in std::mem::take(&mut lane.waiting) {
                    if wanted(&job) {
                        firsts.extend(job.lane.map(|lane| (lane, job.held.delivery().message().id().clone())));
                        taken.push(job.held);
                    } else {
                        lane.waiting.push_back(job);
                    }
                }
            }
        }
        for (lane, first) in firsts {
            if let Some(key) = &self.lanes[lane as usize].key {
                self.barred.entry(key.clone()).or_insert(first);
            }
        }
        // Lanes whose head was taken go on with what is left of them.
        heads.into_iter().for_each(|lane| self.advance(lane));
        taken
    }

    /// Shares what is leased until `before` or earlier, so that its lease can be extended, and takes it to be
    /// leased until `until` from now on.
    pub(crate) fn share_leased(&mut self, before: Timestamp, until: Timestamp) -> Vec<Arc<Delivery>> {
        let mut shared = Vec::new();
        let mut share = |jobs: &mut VecDeque<Job>| {
            if jobs.iter().any(|job| job.until <= before) {
                *jobs = std::mem::take(jobs)
                    .into_iter()
                    .map(|mut job| {
                        if job.until <= before {
                            let delivery = match job.held {
                                Held::Own(delivery) => Arc::new(delivery),
                                Held::Shared(delivery) => delivery,
                            };
                            shared.push(Arc::clone(&delivery));
                            (job.held, job.until) = (Held::Shared(delivery), until);
                        }
                        job
                    })
                    .collect();
            }
        };
        share(&mut self.ready);
        self.lanes.iter_mut().for_each(|lane| share(&mut lane.waiting));
        shared
    }

    /// Takes out what is not leased any more.
    pub(crate) fn take_expired(&mut self, now: Timestamp) -> Vec<Held> {
        self.take_where(|job| job.until <= now)
    }

    fn key(&self, delivery: &Delivery) -> Option<Key> {
        let message = delivery.message();
        let key = match self.order {
            Order::None => return None,
            Order::Key => Some(message.key_bytes()?.clone()),
            Order::Total => None,
        };
        Some(Key { destination: message.destination().clone(), key })
    }

    fn open(&mut self, key: Key) -> LaneId {
        let lane = self.free.pop().unwrap_or_else(|| {
            self.lanes.push(KeyLane { key: None, waiting: VecDeque::new() });
            u32::try_from(self.lanes.len() - 1).expect("fewer lanes than max_in_flight, which is far below 2^32")
        });
        self.lanes[lane as usize].key = Some(key.clone());
        self.index.insert(key, lane);
        lane
    }

    fn end(&mut self, lane: LaneId) {
        let ended = &mut self.lanes[lane as usize];
        if ended.waiting.capacity() > KEPT_CAPACITY {
            ended.waiting = VecDeque::new();
        }
        if let Some(key) = ended.key.take() {
            self.index.remove(&key);
        }
        self.free.push(lane);
    }
}
