//! What the adapters of peers share, so that each of them holds nothing but the peer's own API.
//!
//! [`Peer`] is what a peer can do, one message at a time; [`PeerBroker`] makes of it what AnyBroker's suite drives. Nothing in
//! here repairs a peer: no retry, no redelivery, no dedup, no count of its own.

mod broker;
mod command;
mod in_flight;
#[cfg(feature = "kafka")]
pub mod kafka;
mod owners;
mod parcel;
mod peer;
#[cfg(feature = "rabbitmq")]
pub mod rabbitmq;
#[cfg(feature = "sqs")]
pub mod sqs;
mod subscription;

pub use broker::PeerBroker;
pub use command::{Setup, main, server};
pub use in_flight::{Counted, InFlight};
pub use owners::{disown, is_owner, one_group};
pub use parcel::Parcel;
pub use peer::{Deliveries, Held, Peer, Sender, failed, modest, refused};
