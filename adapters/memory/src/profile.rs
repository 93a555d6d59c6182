//! Profiles: what is awkward about each broker, so that no layer above grows to rely on the easy one.
//!
//! A profile is data. The store looks at these fields where it would otherwise do the exact thing, and the capability
//! record says what a caller may still count on.

use anybroker_core::{AttemptCount, LateAck};

/// Whose habits the broker takes on. See the capability record of a connection for what each still gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Profile {
    /// Exact on every verb.
    #[default]
    Exact,
    /// Four lanes that move between members, prefix acks, hand-overs not counted, no total order; with a seed, lanes
    /// move by themselves.
    Kafka,
    /// Acks that are only sent, attempts that count lost channels too, nothing kept before a group exists; with a
    /// seed, channels are lost.
    RabbitMq,
    /// Late acks accepted, attempts that count ended leases too, publish dedup by default.
    JetStream,
    /// Batches of ten, no order, attempts that count every hand-over, nothing kept before a group exists; with a seed,
    /// messages come in any order.
    Sqs,
    /// Attempts that are forgotten when a consumer goes; with a seed, messages come in any order and consumers are
    /// disconnected.
    Pulsar,
}

/// The words of the setting `profile`, in the order of [`Profile`].
pub(crate) const WORDS: &[&str] = &["exact", "kafka", "rabbitmq", "jetstream", "sqs", "pulsar"];

impl Profile {
    pub(crate) fn from_word(word: &str) -> Self {
        match word {
            "kafka" => Self::Kafka,
            "rabbitmq" => Self::RabbitMq,
            "jetstream" => Self::JetStream,
            "sqs" => Self::Sqs,
            "pulsar" => Self::Pulsar,
            _ => Self::Exact,
        }
    }

    pub(crate) fn word(self) -> &'static str {
        WORDS[self as usize]
    }

    pub(crate) fn manner(self) -> Manner {
        let exact = Manner {
            lanes: 1,
            prefix_acks: false,
            attempts: AttemptCount::Exact,
            release_counts: false,
            hand_overs: true,
            late_ack: LateAck::Refused,
            acks_are_sent: false,
            receive_batch: usize::MAX,
            shuffles: false,
            kept_before_group: true,
            disturbance: Disturbance::None,
        };
        match self {
            Self::Exact => exact,
            // A partition belongs to one member, and only its contiguous prefix is committed; nobody counts what was
            // polled. The count of attempts travels with the retry record, so that it is exact.
            Self::Kafka => {
                Manner { lanes: 4, prefix_acks: true, hand_overs: false, disturbance: Disturbance::Rebalance, ..exact }
            }
            // basic.ack is not answered; x-delivery-count counts lost channels; an exchange keeps nothing for queues
            // that are bound later.
            Self::RabbitMq => Manner {
                attempts: AttemptCount::Approximate,
                acks_are_sent: true,
                kept_before_group: false,
                disturbance: Disturbance::Disconnect,
                ..exact
            },
            // num_delivered counts ended ack waits; an ack after the ack wait is accepted (nats-server #5113).
            Self::JetStream => Manner { attempts: AttemptCount::Approximate, late_ack: LateAck::Accepted, ..exact },
            // ApproximateReceiveCount counts every receive; ten messages to a request; a topic keeps nothing for
            // queues that are subscribed later; an old receipt handle works until the message is received again.
            Self::Sqs => Manner {
                attempts: AttemptCount::Approximate,
                release_counts: true,
                late_ack: LateAck::Possible,
                receive_batch: 10,
                shuffles: true,
                kept_before_group: false,
                ..exact
            },
            // The redelivery count lives in the broker's memory, per connected consumer; what comes back comes in any
            // order.
            Self::Pulsar => Manner {
                attempts: AttemptCount::Volatile,
                hand_overs: false,
                shuffles: true,
                disturbance: Disturbance::Disconnect,
                ..exact
            },
        }
    }
}

/// What the store asks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manner {
    /// Lanes of a destination; several belong to one member each.
    pub(crate) lanes: usize,
    /// An ack above an unsettled message is forgotten when the lane moves on.
    pub(crate) prefix_acks: bool,
    pub(crate) attempts: AttemptCount,
    /// Giving back counts as an attempt too.
    pub(crate) release_counts: bool,
    /// Hand-overs are told.
    pub(crate) hand_overs: bool,
    pub(crate) late_ack: LateAck,
    pub(crate) acks_are_sent: bool,
    pub(crate) receive_batch: usize,
    /// What has no order to keep comes in any, where there is a seed.
    pub(crate) shuffles: bool,
    pub(crate) kept_before_group: bool,
    /// What goes wrong by itself, where there is a seed.
    pub(crate) disturbance: Disturbance,
}

/// What goes wrong now and then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disturbance {
    None,
    /// The member's connection is lost: what it has out comes back, and is stale.
    Disconnect,
    /// The lanes move on to other members.
    Rebalance,
}
