//! What is known of one message, and of one destination.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{DeliveryFacts, Destination, Group, Lane, Message, Position, Timestamp, Token};
use async_nats::Subject;
use tokio::time::Instant;

use crate::record::Record;

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
    pub(super) ready: BTreeMap<u64, u32>,
    pub(super) looking: BTreeSet<u64>,
}

impl FeedState {
    pub(crate) fn new(destination: Destination, group: Group, keeps_order: bool, ack_wait: Duration) -> Self {
        let (fence, epoch, asked, ready, looking) = Default::default();
        Self { destination, group, keeps_order, is_active: !keeps_order, fence, epoch, ack_wait, asked, ready, looking }
    }

    pub(super) fn may_deliver(&self, now: Instant) -> bool {
        self.is_active && self.fence.is_none_or(|fence| now < fence)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
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
    pub(super) again: u32,
    pub(super) was_out: bool,
    /// Until when the server waits for an ack, as far as this member knows.
    pub(super) server_until: Instant,
    pub(super) phase: Phase,
}

impl Entry {
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
