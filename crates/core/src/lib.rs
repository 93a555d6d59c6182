//! Traits, messages, errors, capability record, configuration and check layer of AnyBroker.
//!
//! Services use [`Bus`] and [`Subscriber`]; adapters implement [`Broker`], [`Subscription`], [`Settler`] and
//! [`Driver`]. What each word means, on every broker, stands in the documentation of the traits' methods; the
//! conformance suite proves it.

mod blocks;
mod broker;
mod burials;
mod bus;
pub mod capability;
mod check;
pub mod config;
mod credentials;
mod dead_letter;
mod dead_letters;
mod delivery;
mod error;
pub mod gate;
pub mod headers;
mod lag;
pub mod lineage;
mod message;
pub mod naming;
mod publish;
mod registry;
mod settle;
mod subscribe;
mod subscriber;
mod time;
mod topology;

pub use blocks::Blocks;
pub use broker::{Broker, Endpoint, PublishTerms, Subscription};
pub use bus::{Bus, BusOptions, SubscribeDefaults};
pub use bytes::Bytes;
pub use bytestring::ByteString;
pub use capability::{
    AckGranularity, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Requirement, Support,
};
pub use check::RESERVED_HEADER_PREFIX;
pub use config::{Config, Secret};
pub use credentials::{Credentials, CredentialsFile, CredentialsProvider, Login};
pub use dead_letter::{
    DeadLetter, DeadLetterFilter, DeadLetterId, DeadLetterPage, DeadLetterScope, Reason, RedriveOptions, RedriveReport,
};
pub use dead_letters::DeadLetters;
pub use delivery::{
    AckLevel, Delivery, DeliveryContext, DeliveryFacts, Lane, Nack, Position, SettleError, SettleOutcome, Settlement,
    Settler, Token, Verdict,
};
pub use error::{Effect, Error, ErrorKind, Result, Retry};
pub use headers::Headers;
pub use lag::{Figure, Lag, Precision};
pub use message::{Destination, Group, Message, MessageId};
pub use publish::{Confirms, PublishOptions, PublishOrder, PublishOutcome, Receipt, Settling, Transaction, held_back};
pub use registry::{Driver, Registry};
pub use settle::{ack, extend, settle, settle_in, settle_unchecked};
pub use subscribe::{OnFailure, Order, Received, Start, SubscribeSpec, SubscriptionEvent, TopologyMode};
pub use subscriber::Subscriber;
pub use time::{Clock, ManualClock, SystemClock, Timestamp};
pub use topology::{Declared, Description, GroupDescription, TopologySpec};
