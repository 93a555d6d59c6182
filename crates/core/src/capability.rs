//! The capability record: what a configured endpoint gives natively, what is emulated and at what price, and what
//! it refuses.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{AckLevel, Error, Precision, Result};

/// How a verb or guarantee is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Support {
    /// By the broker itself.
    Native,
    /// By the adapter, on top of the broker; the text states the price.
    Emulated(String),
    /// Not at all: the verb answers [`Unsupported`](crate::ErrorKind::Unsupported). The text names the setting or broker
    /// that would give it.
    Refused(String),
}

impl Support {
    /// Emulated, at that price.
    pub fn emulated(price: impl Into<String>) -> Self {
        Self::Emulated(price.into())
    }

    /// Refused; `remedy` names the setting or broker that would give it.
    pub fn refused(remedy: impl Into<String>) -> Self {
        Self::Refused(remedy.into())
    }

    /// Whether it is given, natively or emulated.
    #[must_use]
    pub fn is_given(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }

    /// `native`, `emulated` or `refused`.
    #[must_use]
    pub fn level(&self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Emulated(_) => "emulated",
            Self::Refused(_) => "refused",
        }
    }

    /// The price or the remedy.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        match self {
            Self::Native => None,
            Self::Emulated(note) | Self::Refused(note) => Some(note),
        }
    }

    /// Refuses `operation` unless it is given.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported), with the remedy.
    pub fn check(&self, capability: &str, operation: &'static str) -> Result<()> {
        match self {
            Self::Refused(remedy) => {
                Err(Error::unsupported(operation, format!("this endpoint refuses {capability}; {remedy}")))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.note() {
            None => f.write_str(self.level()),
            Some(note) => write!(f, "{} ({note})", self.level()),
        }
    }
}

/// How many members of a group can work at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Parallelism {
    /// As many as there are.
    Any,
    /// At most one for each lane, of which there are that many per destination.
    Lanes(u32),
    /// One; the others stand by.
    One,
}

/// What an ack settles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AckGranularity {
    /// That message. It never comes back, whatever becomes of the others.
    Individual,
    /// That message for this member; the broker keeps only the contiguous prefix of a lane, so what was acked
    /// above an unsettled message may come again after a crash or a close.
    Prefix,
}

/// What happens to an ack after lease, assignment or connection are gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LateAck {
    /// It is accepted, although the message may have been handed to somebody else.
    Accepted,
    /// It may or may not be accepted; the endpoint cannot tell.
    Possible,
    /// It is refused as [`StaleDelivery`](crate::ErrorKind::StaleDelivery).
    Refused,
}

/// What the attempt number is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttemptCount {
    /// 1 + failed handler outcomes, whatever crashes in between.
    Exact,
    /// May count too much: hand-overs that ended in a crash or a lost lease count too.
    Approximate,
    /// May start again at 1 after a crash of the consumer, the broker, or a rebalance.
    Volatile,
}

/// How a dead letter and the settling of its source hang together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetterAtomicity {
    /// Both or neither.
    Atomic,
    /// The letter is stored first; a crash in between may double it, never lose it.
    StoredFirst,
}

/// What reading dead letters does to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Browse {
    /// They are leased while they are read: a second reader does not see them until the lease ends.
    Leasing,
    /// Nothing.
    NonDestructive,
}

/// The figures that [`lag`](crate::Broker::lag) tells, and how exact they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LagPrecision {
    /// Messages ready to be delivered.
    pub ready: Option<Precision>,
    /// Messages delivered and not settled.
    pub in_flight: Option<Precision>,
    /// Messages whose delay has not ended.
    pub delayed: Option<Precision>,
    /// Age of the oldest unsettled message.
    pub oldest_age: Option<Precision>,
}

/// Limits as numbers; `None` is "no limit of this endpoint's".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of a payload.
    pub payload: Option<u64>,
    /// Bytes of a key.
    pub key: Option<u64>,
    /// Bytes of all header names and values of a message.
    pub headers: Option<u64>,
    /// Bytes of one header name.
    pub header_name: Option<u64>,
    /// Headers of a message.
    pub header_count: Option<u64>,
    /// Messages that one request to the broker carries; larger batches are split.
    pub publish_batch: Option<u64>,
    /// Deliveries that one request of the broker's brings.
    pub receive_batch: Option<u64>,
    /// Settlements that one request to the broker carries; larger batches are split.
    pub settle_batch: Option<u64>,
    /// Shortest lease, in milliseconds.
    pub lease_min_ms: Option<u64>,
    /// Longest lease, in milliseconds.
    pub lease_max_ms: Option<u64>,
    /// Longest delay of a nack or a publish, in milliseconds.
    pub delay_max_ms: Option<u64>,
    /// How late a delayed message may be, in milliseconds, beside the load of the machine.
    pub delay_precision_ms: Option<u64>,
    /// How long publish dedup remembers an id, in milliseconds.
    pub dedup_window_ms: Option<u64>,
}

macro_rules! record {
    ($($(#[$doc:meta])* $name:ident : $kind:ty),+ $(,)?) => {
        /// What a configured endpoint gives: one piece of data that the check layer, the docs, the conformance
        /// gate and the swap plan all read.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Capabilities {
            $($(#[$doc])* pub $name: $kind,)+
        }

        impl Capabilities {
            /// Field names with their values as JSON, in the order of the record.
            #[must_use]
            pub fn fields(&self) -> Vec<(&'static str, serde_json::Value)> {
                vec![$((stringify!($name), serde_json::to_value(&self.$name).unwrap_or_default()),)+]
            }
        }
    };
}

record! {
    /// A message that was published `Ok` reaches every group at least once.
    at_least_once: Support,
    /// Order per key, across all members of a group.
    key_order: Support,
    /// Order of a whole destination (`Order::Total`).
    total_order: Support,
    /// Later messages of a key wait for a failed one (`OnFailure::Block`).
    block_on_failure: Support,
    /// Later messages of a key follow it to the dead letters (`OnFailure::Park`).
    park_on_failure: Support,
    /// How many members of a group can work at once.
    parallelism: Parallelism,
    /// What an ack settles.
    ack_granularity: AckGranularity,
    /// What `Ok` of an ack says.
    ack_level: AckLevel,
    /// What happens to an ack that comes too late.
    late_ack: LateAck,
    /// A failed delivery comes back.
    nack: Support,
    /// Not before its delay.
    nack_delay: Support,
    /// A delivery can be given back without counting as a failure.
    release: Support,
    /// Deliveries are leased and come back when the lease ends.
    lease: Support,
    /// Leases can be extended.
    lease_extension: Support,
    /// What the attempt number is worth.
    attempt_count: AttemptCount,
    /// Hand-overs without outcome are counted, so that `crash_limit` holds.
    crash_count: Support,
    /// Dead letters, stored before their source is settled.
    dead_letter: Support,
    /// How a dead letter and its source hang together.
    dead_letter_atomicity: DeadLetterAtomicity,
    /// What reading dead letters does to them.
    dead_letter_browse: Browse,
    /// Dead letters go back to the group that failed them.
    redrive: Support,
    /// Dead letters can be deleted.
    purge: Support,
    /// Several groups, each of which sees every message.
    groups: Support,
    /// Messages published before a group exists are kept for it (`Start::Earliest`).
    kept_before_group: Support,
    /// New groups can start at a time (`Start::Time`), and so read again what others have settled.
    replay: Support,
    /// New groups can start at a position (`Start::Position`).
    start_position: Support,
    /// New groups can start with what is published after they exist (`Start::Latest`).
    start_latest: Support,
    /// Subscriptions to patterns of destinations.
    patterns: Support,
    /// Messages that are held back before their first delivery.
    delayed_publish: Support,
    /// Messages that expire into the dead letters.
    ttl: Support,
    /// `Ok` of a publish means that the broker has stored the message as durably as it is configured.
    publish_confirm: Support,
    /// Publishing to a destination that does not exist fails (under `TopologyMode::Verify`).
    unroutable_detected: Support,
    /// A second publish of the same id within the window is not stored again.
    publish_dedup: Support,
    /// Several messages committed together.
    transactions: Support,
    /// Payloads that are null rather than empty.
    tombstones: Support,
    /// Destinations and groups can be created.
    declare: Support,
    /// Destinations can be described.
    describe: Support,
    /// Destinations and groups can be deleted.
    delete: Support,
    /// The lag figures and their precision.
    lag: LagPrecision,
    /// Some verbs need an admin endpoint in the configuration.
    admin_needed: bool,
    /// What was published `Ok` survives a `kill -9` of the broker. `Native`: so does what it has confirmed of acks;
    /// otherwise it may forget those of the last moment, and those messages come again.
    survives_process_kill: Support,
    /// What was published `Ok` survives a power loss of the broker's machine.
    survives_power_loss: Support,
    /// Limits as numbers.
    limits: Limits,
}

impl Capabilities {
    /// Checks requirements such as `key_order`, `nack_delay:native` or `payload>=1048576`.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) that lists every unmet requirement with what would meet it.
    pub fn require(&self, endpoint: &str, requirements: &[Requirement]) -> Result<()> {
        let unmet: Vec<String> = requirements
            .iter()
            .filter_map(|requirement| {
                requirement.unmet_by(self).map(|remedy| format!("`{requirement}` is not met by {endpoint}: {remedy}"))
            })
            .collect();
        if unmet.is_empty() {
            return Ok(());
        }
        Err(Error::unsupported("connect", format!("unmet requirements: {}", unmet.join("; ")))
            .with("endpoint", endpoint))
    }
}

/// One thing a service cannot do without. Text forms: a field of the record that is a [`Support`] (`key_order`),
/// optionally `:native`; `ack_individual`, `ack_confirmed`, `attempts_exact`, `attempts_survive_crash`,
/// `dead_letter_atomic`, `browse_non_destructive`, `parallel`; or a limit with a least value
/// (`payload>=1048576`).
///
/// ```
/// use anybroker_core::Requirement;
/// assert!("nack_delay:native".parse::<Requirement>().is_ok());
/// assert!("payload>=1048576".parse::<Requirement>().is_ok());
/// assert!("exactly_once".parse::<Requirement>().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement(Need);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Need {
    Support { name: &'static str, native: bool },
    Property(&'static str),
    Limit { name: &'static str, least: u64 },
}

type Supports = (&'static str, fn(&Capabilities) -> &Support);
type Properties = (&'static str, fn(&Capabilities) -> Option<String>);
type LimitFields = (&'static str, fn(&Limits) -> Option<u64>);

macro_rules! supports {
    ($($name:ident),+ $(,)?) => { &[$((stringify!($name), |record| &record.$name)),+] };
}

const SUPPORTS: &[Supports] = supports![
    at_least_once,
    key_order,
    total_order,
    block_on_failure,
    park_on_failure,
    nack,
    nack_delay,
    release,
    lease,
    lease_extension,
    crash_count,
    dead_letter,
    redrive,
    purge,
    groups,
    kept_before_group,
    replay,
    start_position,
    start_latest,
    patterns,
    delayed_publish,
    ttl,
    publish_confirm,
    unroutable_detected,
    publish_dedup,
    transactions,
    tombstones,
    declare,
    describe,
    delete,
    survives_process_kill,
    survives_power_loss,
];

const PROPERTIES: &[Properties] = &[
    ("ack_individual", |record| {
        (record.ack_granularity != AckGranularity::Individual)
            .then(|| "it commits prefixes; a queue (RabbitMQ, SQS) or JetStream settles individually".into())
    }),
    ("ack_confirmed", |record| {
        (record.ack_level != AckLevel::Confirmed).then(|| format!("its acks are {:?}", record.ack_level))
    }),
    ("attempts_exact", |record| {
        (record.attempt_count != AttemptCount::Exact)
            .then(|| format!("its attempt count is {:?}", record.attempt_count))
    }),
    ("attempts_survive_crash", |record| {
        (record.attempt_count == AttemptCount::Volatile).then(|| "its attempt count is volatile".into())
    }),
    ("dead_letter_atomic", |record| {
        (record.dead_letter_atomicity != DeadLetterAtomicity::Atomic)
            .then(|| "a crash may double a dead letter; the embedded broker moves it in one transaction".into())
    }),
    ("browse_non_destructive", |record| {
        (record.dead_letter_browse != Browse::NonDestructive).then(|| "browsing leases the letters".into())
    }),
    ("parallel", |record| (record.parallelism == Parallelism::One).then(|| "one member works at a time".into())),
];

const LIMITS: &[LimitFields] = &[
    ("payload", |limits| limits.payload),
    ("key", |limits| limits.key),
    ("headers", |limits| limits.headers),
    ("header_count", |limits| limits.header_count),
    ("lease_max_ms", |limits| limits.lease_max_ms),
    ("delay_max_ms", |limits| limits.delay_max_ms),
    ("dedup_window_ms", |limits| limits.dedup_window_ms),
];

impl Requirement {
    /// Every text form, for docs and error messages.
    pub fn names() -> impl Iterator<Item = String> {
        let supports = SUPPORTS.iter().map(|(name, _)| (*name).to_owned());
        let properties = PROPERTIES.iter().map(|(name, _)| (*name).to_owned());
        supports.chain(properties).chain(LIMITS.iter().map(|(name, _)| format!("{name}>=N")))
    }

    /// Why the record does not meet it, and what would; `None` when it does.
    fn unmet_by(&self, record: &Capabilities) -> Option<String> {
        match self.0 {
            Need::Support { name, native } => {
                let (_, read) = SUPPORTS.iter().find(|(other, _)| *other == name)?;
                match read(record) {
                    Support::Native => None,
                    Support::Emulated(price) if native => Some(format!("it is emulated ({price})")),
                    Support::Emulated(_) => None,
                    Support::Refused(remedy) => Some(remedy.clone()),
                }
            }
            Need::Property(name) => PROPERTIES.iter().find(|(other, _)| *other == name)?.1(record),
            Need::Limit { name, least } => {
                let limit = LIMITS.iter().find(|(other, _)| *other == name)?.1(&record.limits)?;
                (limit < least).then(|| format!("its limit is {limit}"))
            }
        }
    }
}

impl FromStr for Requirement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((name, least)) = text.split_once(">=") {
            let limit = LIMITS.iter().find(|(other, _)| *other == name.trim());
            if let (Some((name, _)), Ok(least)) = (limit, least.trim().parse()) {
                return Ok(Self(Need::Limit { name, least }));
            }
        } else {
            let (name, native) = match text.split_once(':') {
                Some((name, "native")) => (name, true),
                Some(_) => ("", false),
                None => (text, false),
            };
            if let Some((name, _)) = SUPPORTS.iter().find(|(other, _)| *other == name) {
                return Ok(Self(Need::Support { name, native }));
            }
            if let Some((name, _)) = PROPERTIES.iter().find(|(other, _)| *other == name && !native) {
                return Ok(Self(Need::Property(name)));
            }
        }
        let names: Vec<String> = Self::names().collect();
        Err(format!(
            "unknown requirement `{text}`; expected one of {} (the first kind also with `:native`)",
            names.join(", ")
        ))
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Need::Support { name, native: true } => write!(f, "{name}:native"),
            Need::Support { name, native: false } | Need::Property(name) => f.write_str(name),
            Need::Limit { name, least } => write!(f, "{name}>={least}"),
        }
    }
}

/// A duration as milliseconds, for [`Limits`].
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
