//! What a subscription states, and what it yields beside deliveries.

use std::time::Duration;

use crate::{Delivery, Destination, Error, ErrorKind, Group, Lane, Position, Result, Timestamp};

/// What a subscription asks for. Nothing in it is broker-specific; an endpoint that cannot give it refuses.
///
/// ```
/// use std::time::Duration;
/// use anybroker_core::{Order, SubscribeSpec};
/// let spec = SubscribeSpec::new("orders", "payments")
///     .with_order(Order::Key)
///     .with_max_in_flight(500)
///     .with_lease(Duration::from_secs(60));
/// assert_eq!(spec.max_attempts, Some(5));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscribeSpec {
    /// The destinations, in flight together under one bound. Logical names; with `patterns` also patterns.
    pub destinations: Vec<Destination>,
    /// The group whose members share the messages.
    pub group: Group,
    /// Where a group that does not exist yet starts. A group that exists goes on where it was.
    pub start: Start,
    /// How many deliveries may be with this member unsettled, prefetched ones included. Default 1,000.
    pub max_in_flight: usize,
    /// How long a delivery is leased before it comes back. Default 30 s.
    pub lease: Duration,
    /// Failed attempts after which a message becomes a dead letter; `None` for never. Default 5.
    pub max_attempts: Option<u32>,
    /// Hand-overs without any outcome (crash, lost lease) after which a message becomes a dead letter with reason
    /// `crash_limit`; `None` for never. Default 20. Applies where the endpoint counts hand-overs and has dead letters.
    pub crash_limit: Option<u32>,
    /// The order that deliveries keep. Default none.
    pub order: Order,
    /// What happens to later messages of a key whose message failed. Default: go past it.
    pub on_failure: OnFailure,
    /// Whether missing destinations and groups are created, verified or left alone. Default: created.
    pub topology: TopologyMode,
}

impl SubscribeSpec {
    /// The defaults for one destination and group.
    pub fn new(destination: impl Into<Destination>, group: impl Into<Group>) -> Self {
        Self {
            destinations: vec![destination.into()],
            group: group.into(),
            start: Start::Earliest,
            max_in_flight: 1_000,
            lease: Duration::from_secs(30),
            max_attempts: Some(5),
            crash_limit: Some(20),
            order: Order::None,
            on_failure: OnFailure::GoPast,
            topology: TopologyMode::Declare,
        }
    }

    /// Adds another destination.
    #[must_use]
    pub fn and_destination(mut self, destination: impl Into<Destination>) -> Self {
        self.destinations.push(destination.into());
        self
    }

    /// Where a new group starts.
    #[must_use]
    pub fn with_start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// How many deliveries may be unsettled with this member.
    #[must_use]
    pub fn with_max_in_flight(mut self, max_in_flight: usize) -> Self {
        self.max_in_flight = max_in_flight;
        self
    }

    /// How long a delivery is leased.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Failed attempts before the dead letter; `None` for never.
    #[must_use]
    pub fn with_max_attempts(mut self, max_attempts: impl Into<Option<u32>>) -> Self {
        self.max_attempts = max_attempts.into();
        self
    }

    /// Hand-overs without outcome before the dead letter; `None` for never.
    #[must_use]
    pub fn with_crash_limit(mut self, crash_limit: impl Into<Option<u32>>) -> Self {
        self.crash_limit = crash_limit.into();
        self
    }

    /// The order that deliveries keep.
    #[must_use]
    pub fn with_order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// What happens to later messages of a failed key.
    #[must_use]
    pub fn with_on_failure(mut self, on_failure: OnFailure) -> Self {
        self.on_failure = on_failure;
        self
    }

    /// Whether topology is created, verified or left alone.
    #[must_use]
    pub fn with_topology(mut self, topology: TopologyMode) -> Self {
        self.topology = topology;
        self
    }

    /// Every bad field at once.
    ///
    /// # Errors
    /// [`ConfigInvalid`](ErrorKind::ConfigInvalid), one context pair per field.
    pub fn validate(&self) -> Result<()> {
        let mut problems: Vec<(&'static str, String)> = Vec::new();
        if self.destinations.is_empty() || self.destinations.iter().any(|name| name.is_empty()) {
            problems.push(("destinations", "expected at least one, none of them empty".into()));
        }
        if self.group.is_empty() {
            problems.push(("group", "expected a name, found an empty text".into()));
        }
        if self.max_in_flight == 0 {
            problems.push(("max_in_flight", "expected at least 1, found 0".into()));
        }
        if self.lease.is_zero() {
            problems.push(("lease", "expected more than 0 s".into()));
        }
        if self.max_attempts == Some(0) {
            problems.push(("max_attempts", "expected at least 1, or none for no limit; found 0".into()));
        }
        if self.crash_limit == Some(0) {
            problems.push(("crash_limit", "expected at least 1, or none for no limit; found 0".into()));
        }
        if self.order == Order::None && self.on_failure != OnFailure::GoPast {
            problems.push(("on_failure", "block and park need an order to keep; set order to key or total".into()));
        }
        if problems.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = problems.iter().map(|(name, _)| *name).collect();
        let error = Error::new(ErrorKind::ConfigInvalid, "subscribe", format!("invalid: {}", names.join(", ")));
        Err(problems.into_iter().fold(error, |error, (name, problem)| error.with(name, problem)))
    }
}

/// Where a new group starts reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Start {
    /// With the oldest message that is kept.
    #[default]
    Earliest,
    /// With what is published after `subscribe` returned. Needs `start_latest`.
    Latest,
    /// With the first message that was stored at or after this moment. Needs `replay`.
    Time(Timestamp),
    /// With this position of each lane. Needs `start_position`.
    Position(Position),
}

/// The order that a subscription keeps.
///
/// It is the group's as well: a member that asks for another one than the members that are there is refused with
/// [`AlreadyExists`](crate::ErrorKind::AlreadyExists), gets nothing as long as they are there, or keeps what they keep. So a service that
/// changes its order ends its old members first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Any.
    #[default]
    None,
    /// Messages of one key in the order they were published, across all members of the group. Messages without
    /// a key have no order.
    Key,
    /// All messages of a destination, one member at a time.
    Total,
}

/// What happens to later messages of a key (or of the destination, under total order) after one has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// They go past it: the failed one comes back later, out of order.
    #[default]
    GoPast,
    /// They wait until it is settled for good (acked or dead-lettered).
    Block,
    /// As `Block`, and once it is a dead letter, later ones follow it to the dead-letter queue in order (reason
    /// `parked`), until the key's letters are redriven or purged.
    Park,
}

/// What an endpoint does about missing destinations and groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopologyMode {
    /// Creates what is missing; verifies what exists.
    #[default]
    Declare,
    /// Creates nothing: what is missing is [`NotFound`](ErrorKind::NotFound).
    Verify,
    /// Neither creates nor looks.
    Leave,
}

/// What a receive brought.
#[derive(Debug, Default)]
pub struct Received {
    /// The deliveries, in the order in which their lanes hold them.
    pub deliveries: Vec<Delivery>,
    /// What happened to the subscription meanwhile.
    pub events: Vec<SubscriptionEvent>,
}

/// Something that happened to a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SubscriptionEvent {
    /// This member owns the lane now. `name` is the broker's (such as `orders/3`).
    Assigned {
        /// The lane and its new epoch.
        lane: Lane,
        /// The broker's name of it.
        name: String,
    },
    /// The lane is being taken away: settle what you hold of it by `deadline`, then it is somebody else's.
    Revoking {
        /// The lane.
        lane: Lane,
        /// Until when settles still count.
        deadline: Timestamp,
    },
    /// The lane is gone; deliveries of it are stale and come back to its next owner.
    Lost {
        /// The lane.
        lane: Lane,
    },
    /// The broker does not serve this subscription, or a part of what it reads, at the moment; it recovers by itself.
    Degraded {
        /// What is wrong, without secrets.
        cause: String,
    },
    /// It serves all of it again.
    Recovered,
}
