//! What the adapters of peers share, so that each of them holds nothing but the peer's own API.
//!
//! [`Peer`] is what a peer can do, one message at a time; [`PeerBroker`] makes of it what AnyBroker's suite drives. Nothing in
//! here repairs a peer: no retry, no redelivery, no dedup, no count of its own.

mod broker;
mod command;
mod parcel;
mod peer;
#[cfg(feature = "rabbitmq")]
pub mod rabbitmq;
mod subscription;

pub use broker::PeerBroker;
pub use command::{Setup, main, server};
pub use parcel::Parcel;
pub use peer::{Deliveries, Held, Peer, Sender, failed, modest, refused};
