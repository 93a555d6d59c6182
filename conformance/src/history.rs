//! One log of everything that every client of a case did and saw. Nothing in it is deduplicated.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anybroker_core::{
    AckLevel, Destination, Effect, ErrorKind, Group, Message, MessageId, OnFailure, Order, Position, Start,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// The log, shared by all clients of a case.
#[derive(Clone)]
pub(crate) struct History(Arc<Log>);

struct Log {
    start: Instant,
    /// The same moment by the clock that other processes have, too.
    began: SystemTime,
    /// Where else each event goes, before whoever caused it goes on.
    told: Option<Tell>,
    /// How far an adjustable clock has been turned beyond the real one.
    turned: AtomicU64,
    next: AtomicU64,
    events: Mutex<Vec<Event>>,
}

/// What is done with each event beside writing it down.
pub(crate) type Tell = Box<dyn Fn(&Event) + Send + Sync>;

/// Something that happened, and when.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Event {
    /// Microseconds since the case began, by a monotonic clock (plus what a test clock was turned by).
    pub(crate) at: u64,
    /// Which client.
    pub(crate) client: u32,
    #[serde(flatten)]
    pub(crate) what: What,
}

/// What happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum What {
    /// A message was handed to `publish`.
    PublishInvoke {
        call: u64,
        id: MessageId,
        destination: Destination,
        key: Option<Vec<u8>>,
        /// Counts what this client publishes to this destination and key.
        sequence: u64,
        digest: u64,
        /// Held back, or with a time to live: its first delivery has no place in the order.
        instructed: bool,
        /// It has a time to live.
        expires: bool,
    },
    PublishOk {
        call: u64,
        duplicate: bool,
        #[serde(with = "position", default)]
        position: Option<Position>,
    },
    /// It certainly is not stored.
    PublishFail {
        call: u64,
        kind: ErrorKind,
    },
    /// It may be stored.
    PublishInfo {
        call: u64,
        kind: ErrorKind,
    },
    Declared {
        destination: Destination,
        group: Group,
    },
    SubscribeInvoke {
        subscription: u64,
        group: Group,
        destinations: Vec<Destination>,
    },
    Subscribed {
        subscription: u64,
        group: Group,
        destinations: Vec<Destination>,
        order: Order,
        on_failure: OnFailure,
        earliest: bool,
        lease_micros: u64,
        max_attempts: Option<u32>,
        crash_limit: Option<u32>,
    },
    Deliver(Seen),
    SettleInvoke {
        delivery: u64,
        verb: Verb,
        /// How long a nack is to be held back, in microseconds.
        delay: u64,
    },
    SettleOk {
        delivery: u64,
        level: AckLevel,
    },
    SettleFail {
        delivery: u64,
        kind: ErrorKind,
        effect: Effect,
    },
    /// Dropped unsettled.
    Dropped {
        delivery: u64,
    },
    /// The lease was extended; `until` counts from before the call.
    Extended {
        delivery: u64,
        until: u64,
    },
    Assigned {
        subscription: u64,
        lane: u32,
    },
    LaneLost {
        subscription: u64,
        lane: u32,
    },
    /// It is not served, its connection being lost: what is out may be with somebody else.
    Degraded {
        subscription: u64,
    },
    /// It is served again.
    Recovered {
        subscription: u64,
    },
    /// Asked to close: what is unsettled may be with somebody else from here on.
    CloseInvoke {
        subscription: u64,
    },
    Closed {
        subscription: u64,
    },
    /// Gone without a close, deliveries and all.
    Vanished {
        subscription: u64,
    },
    /// One letter of one reading (`scan`) of a dead-letter queue.
    Letter {
        scan: u64,
        destination: Destination,
        group: Group,
        id: MessageId,
        digest: u64,
        reason: String,
        attempts: u32,
    },
    RedriveInvoke {
        destination: Destination,
        group: Group,
        ids: Vec<MessageId>,
    },
    /// Asked for by one that was not told whether it was done: there may be a letter still, and the message may come.
    RedriveInfo {
        destination: Destination,
        group: Group,
        ids: Vec<MessageId>,
    },
    PurgeInvoke {
        destination: Destination,
        group: Group,
        ids: Vec<MessageId>,
    },
    /// A fresh client has read the group until nothing came any more; `scan` is the reading of its dead letters.
    Drained {
        destination: Destination,
        group: Group,
        scan: Option<u64>,
    },
    /// A fault of the connections of these clients, or of the server, begins.
    FaultBegin {
        fault: u64,
        kind: String,
        clients: Vec<u32>,
        /// How many connections were open.
        connections: u64,
    },
    /// It is over.
    FaultEnd {
        fault: u64,
        /// How many connections it met, new ones included.
        connections: u64,
        /// How many bytes met it.
        bytes: u64,
    },
    /// An operation did not end by its deadline.
    Hang {
        operation: String,
    },
}

/// A delivery as it was seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) delivery: u64,
    pub(crate) subscription: u64,
    pub(crate) id: MessageId,
    pub(crate) destination: Destination,
    pub(crate) digest: u64,
    pub(crate) attempt: u32,
    pub(crate) deliveries: Option<u32>,
    pub(crate) lane: u32,
    /// Which assignment of the lane this was.
    #[serde(default)]
    pub(crate) epoch: u32,
    #[serde(with = "position")]
    pub(crate) position: Option<Position>,
    /// The first bytes of the payload, which name run, producer, key and sequence.
    pub(crate) excerpt: String,
}

/// Positions as they are printed.
mod position {
    use anybroker_core::Position;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    pub(super) fn serialize<S: Serializer>(position: &Option<Position>, serializer: S) -> Result<S::Ok, S::Error> {
        position.map(|position| position.to_string()).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Position>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(de::Error::custom)).transpose()
    }
}

/// How a delivery is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verb {
    Ack,
    Nack,
    Release,
    DeadLetter,
}

impl What {
    /// That a delivery is to be settled so.
    pub(crate) fn settle_invoke(delivery: u64, settlement: &anybroker_core::Settlement) -> Self {
        let delay = match settlement {
            anybroker_core::Settlement::Nack(nack) => micros(nack.delay),
            _ => 0,
        };
        Self::SettleInvoke { delivery, verb: Verb::of(settlement), delay }
    }
}

impl Verb {
    fn of(settlement: &anybroker_core::Settlement) -> Self {
        match settlement {
            anybroker_core::Settlement::Ack => Self::Ack,
            anybroker_core::Settlement::Nack(_) => Self::Nack,
            anybroker_core::Settlement::Release => Self::Release,
            anybroker_core::Settlement::DeadLetter(_) => Self::DeadLetter,
        }
    }
}

impl History {
    pub(crate) fn new() -> Self {
        Self::beginning(SystemTime::now(), 1, None)
    }

    /// A part of the history that began then, which another process keeps: its numbers begin there, and each event is told.
    pub(crate) fn part(began: SystemTime, first: u64, tell: Tell) -> Self {
        Self::beginning(began, first, Some(tell))
    }

    fn beginning(began: SystemTime, first: u64, told: Option<Tell>) -> Self {
        let start = Instant::now();
        let start = start.checked_sub(began.elapsed().unwrap_or_default()).unwrap_or(start);
        Self(Arc::new(Log {
            start,
            began,
            told,
            turned: AtomicU64::new(0),
            next: AtomicU64::new(first),
            events: Mutex::default(),
        }))
    }

    /// When it began.
    pub(crate) fn began(&self) -> SystemTime {
        self.0.began
    }

    /// As many numbers for another process; the first of them.
    pub(crate) fn numbers(&self, count: u64) -> u64 {
        self.0.next.fetch_add(count, Ordering::Relaxed)
    }

    /// A number that no other call, delivery, subscription or scan of this history has.
    pub(crate) fn number(&self) -> u64 {
        self.0.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn record(&self, client: u32, what: What) {
        let mut events = self.0.events.lock();
        // Read under the lock, so that the order of the log is the order of the moments.
        let event = Event { at: self.now(), client, what };
        if let Some(tell) = &self.0.told {
            tell(&event);
        }
        events.push(event);
    }

    /// Takes in what another process has seen.
    pub(crate) fn take_in(&self, event: Event) {
        self.0.events.lock().push(event);
    }

    /// A test clock was turned.
    pub(crate) fn turn(&self, by: Duration) {
        self.0.turned.fetch_add(micros(by), Ordering::Relaxed);
    }

    /// Microseconds since the case began.
    pub(crate) fn now(&self) -> u64 {
        micros(self.0.start.elapsed()) + self.0.turned.load(Ordering::Relaxed)
    }

    /// In the order of the moments, whichever process saw them.
    pub(crate) fn events(&self) -> Vec<Event> {
        let mut events = self.0.events.lock().clone();
        events.sort_by_key(|event| event.at);
        events
    }

    /// The log as JSON lines.
    pub(crate) fn to_json_lines(&self) -> String {
        let lines: Vec<String> =
            self.events().iter().map(|event| serde_json::to_string(event).unwrap_or_default()).collect();
        lines.join("\n") + "\n"
    }
}

/// A duration in whole microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX / 4)
}

/// Whether a new group with that start sees what was published before.
pub(crate) fn is_earliest(start: Start) -> bool {
    start == Start::Earliest
}

/// A fingerprint of everything that must come through unchanged.
pub(crate) fn digest(message: &Message) -> u64 {
    let mut hasher = DefaultHasher::new();
    message.id().with_str(|id| id.hash(&mut hasher));
    message.key().hash(&mut hasher);
    message.headers().as_packed().hash(&mut hasher);
    message.content_type().hash(&mut hasher);
    message.timestamp().as_millis().hash(&mut hasher);
    message.payload().hash(&mut hasher);
    hasher.finish()
}
