//! What a feed waits for: each comes never where it is not there.

use anybroker_core::Result;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use lapin::{Channel, Consumer};

use crate::ledger::Ledger;
use crate::owner::Owner;
use crate::reader::{Read, Reader};
use crate::state::Shared;

/// The next message of a consumer; never, without one.
pub(crate) async fn next(consumer: &mut Option<Consumer>) -> Option<lapin::Result<Delivery>> {
    match consumer {
        Some(consumer) => consumer.next().await,
        None => std::future::pending().await,
    }
}

/// The next message of a stream; never, without one.
pub(crate) async fn read(reader: &mut Option<Reader>) -> Read {
    match reader {
        Some(reader) => reader.next().await,
        None => std::future::pending().await,
    }
}

/// When failures were noted, or could not be; never, where nothing is.
pub(crate) async fn wrote(ledger: &mut Option<Ledger>, shared: &Shared, feed: u32) {
    match ledger {
        Some(ledger) => ledger.wrote(shared, feed).await,
        None => std::future::pending().await,
    }
}

/// When it becomes this member's turn; never, without order.
pub(crate) async fn gained(owner: &mut Option<Owner>) -> Result<()> {
    match owner {
        Some(owner) => owner.gained().await,
        None => std::future::pending().await,
    }
}

/// Acks one message of a channel that has no others of ours.
pub(crate) fn ack_alone(channel: &Channel, tag: u64) {
    let _ = channel.basic_ack(tag, BasicAckOptions::default()).now_or_never();
}
