//! What is known of one message, and of one destination.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bytes, DeliveryFacts, Destination, Group, Lane, Message, Order, Position, Timestamp, Token};
use async_nats::Subject;
use tokio::time::Instant;

use crate::record::Record;

/// How long others wait for one that looks its record up.
const OTHERS_WAIT: Duration = Duration::from_secs(5);

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
    /// Later messages of a key wait for one that failed.
    pub(super) blocks: Option<Order>,
    /// Under order: earlier messages are on their way back.
    pub(super) is_held: bool,
    /// The failed messages of each key (of everything, under total order) that are not settled for good.
    pub(super) blocked: HashMap<Bytes, BTreeSet<u64>>,
    pub(super) ready: BTreeMap<u64, u32>,
    /// What looks its record up: which arrival it was, and when.
    pub(super) looking: BTreeMap<u64, (u64, Instant)>,
}

impl FeedState {
    pub(crate) fn new(destination: Destination, group: Group, keeps_order: bool, ack_wait: Duration) -> Self {
        let (fence, epoch, asked, blocks, blocked) = Default::default();
        let (ready, looking, is_held) = Default::default();
        Self {
            destination,
            group,
            keeps_order,
            is_active: !keeps_order,
            fence,
            epoch,
            ack_wait,
            asked,
            blocks,
            blocked,
            is_held,
            ready,
            looking,
        }
    }

    /// With later messages of a key waiting for one that failed.
    pub(crate) fn blocking(mut self, order: Order) -> Self {
        self.blocks = Some(order);
        self
    }

    /// Until when the server keeps what it cannot have sent before `since`. A little less, because it counts from a moment before
    /// it sends.
    pub(super) fn kept_until(&self, since: Instant) -> Instant {
        since + self.ack_wait - self.ack_wait / 16
    }

    /// The first arrival that later ones wait for without order, because it still looks its record up. Not for ever: what is
    /// said of one message may stay away.
    pub(super) fn first_looking(&self, now: Instant) -> Option<u64> {
        self.looking.values().filter(|(_, since)| now < *since + OTHERS_WAIT).map(|(arrival, _)| *arrival).min()
    }

    /// What waits for a failure of this message: the others of its key, all others, or nothing.
    fn scope_of(&self, message: &Message) -> Option<Bytes> {
        match self.blocks? {
            Order::Total => Some(Bytes::new()),
            _ => message.key_bytes().cloned(),
        }
    }

    /// From here on later messages wait for this one.
    pub(super) fn block(&mut self, message: &Message, sequence: u64) {
        if let Some(scope) = self.scope_of(message) {
            self.blocked.entry(scope).or_default().insert(sequence);
        }
    }

    pub(super) fn unblock(&mut self, message: &Message, sequence: u64) {
        let Some(scope) = self.scope_of(message).filter(|_| !self.blocked.is_empty()) else { return };
        if let Some(waiting) = self.blocked.get_mut(&scope) {
            waiting.remove(&sequence);
            if waiting.is_empty() {
                self.blocked.remove(&scope);
            }
        }
    }

    /// Whether it waits for an earlier one.
    pub(super) fn is_held_back(&self, message: &Message, sequence: u64) -> bool {
        if self.blocked.is_empty() {
            return false;
        }
        let waiting = self.scope_of(message).and_then(|scope| self.blocked.get(&scope)?.first().copied());
        waiting.is_some_and(|failed| failed < sequence)
    }

    pub(super) fn may_deliver(&self, now: Instant) -> bool {
        self.is_active && !self.is_held && self.fence.is_none_or(|fence| now < fence)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Looking,
    Ready,
    /// It failed, and its delay ends here, because later messages wait for it.
    Waiting,
    Out {
        until: Instant,
    },
    Settling {
        until: Instant,
    },
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
    /// When its time to live ends, in milliseconds of Unix time.
    pub(super) expires: Option<i64>,
    pub(crate) arrived_at: Timestamp,
    /// Hand-overs by this member beyond the first.
    pub(super) again: u32,
    pub(super) was_out: bool,
    /// Which arrival it was.
    pub(super) arrival: u64,
    /// Until then the server has certainly given it to nobody else.
    pub(super) server_until: Instant,
    /// Whether the server knows that it is here, as far as this member knows.
    pub(super) is_known: bool,
    /// When the server was asked for more time.
    pub(super) asked_at: Option<Instant>,
    pub(super) phase: Phase,
    /// A nack of it had no answer: its record may count a failure that is not known here.
    pub(super) may_have_failed: bool,
}

impl Entry {
    pub(super) fn taken(&self, key: Key) -> Taken {
        Taken {
            key,
            feed: self.feed,
            sequence: self.sequence,
            delivered: self.delivered,
            record: self.record,
            record_at: self.record_at,
            redrives: self.redrives,
            first_at: self.record.first_at().or((self.delivered == 1).then_some(self.arrived_at)),
        }
    }

    pub(super) fn has_not_failed(&self) -> bool {
        self.record.failures == 0 && !self.may_have_failed
    }

    pub(super) fn is_expired(&self) -> bool {
        self.expires.is_some_and(|expires| expires <= Timestamp::now().as_millis())
    }

    pub(super) fn facts(&self, token: Token, lane: Lane, lease_until: Timestamp) -> DeliveryFacts {
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
    pub(crate) message: Arc<Message>,
    pub(crate) delivered: u32,
    pub(crate) redrives: u32,
    /// The server has not sent it before that.
    pub(crate) since: Instant,
    /// When its time to live ends, in milliseconds of Unix time.
    pub(crate) expires: Option<i64>,
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

/// A message whose record has to be read or applied first.
pub(crate) struct Looking {
    pub(crate) key: Key,
    pub(crate) feed: u32,
    pub(crate) ack: Subject,
    /// Its record, where it is known.
    pub(crate) known: Option<(Record, u64)>,
}

/// An entry that is being acked.
#[derive(Clone, Copy)]
pub(crate) struct Acking {
    pub(crate) key: Key,
    pub(crate) feed: u32,
    /// Where its record is stored, when it has one.
    pub(crate) record_at: Option<u64>,
}

/// A delivery that the server is asked to keep for longer.
pub(crate) struct Renewal {
    pub(crate) key: Key,
    pub(crate) ack: Subject,
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
