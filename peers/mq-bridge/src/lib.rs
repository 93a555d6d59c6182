//! What the adapters of `mq-bridge` share: its message and its commit.

use std::time::Duration;

use anybroker_core::{ErrorKind, Result};
use async_trait::async_trait;
use mq_bridge::CanonicalMessage;
use mq_bridge::traits::{CommitFunc, MessageDisposition, Received};
use parking_lot::Mutex;
use peers_common::{Held, Parcel, failed};

/// Its name and version.
pub const PEER: &str = "mq-bridge 1.3.0";

/// A message as it takes one: metadata is "string key/value pairs next to the payload".
#[must_use]
pub fn canonical(parcel: Parcel) -> CanonicalMessage {
    let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
    let metadata = parcel.headers.iter().map(|(name, value)| (name.clone(), text(value))).collect();
    CanonicalMessage::new_bytes(parcel.payload, None).with_metadata(metadata)
}

/// What came.
#[must_use]
pub fn parcel_of(message: CanonicalMessage) -> Parcel {
    let headers = message.metadata.into_iter().map(|(name, value)| (name, value.into_bytes().into())).collect();
    Parcel { headers, payload: message.payload }
}

/// A delivery, and the function by which it is settled.
pub struct Delivered {
    parcel: Parcel,
    commit: Mutex<Option<CommitFunc>>,
}

impl Delivered {
    /// Of what `MessageConsumer::receive` gave.
    #[must_use]
    pub fn of(received: Received) -> Self {
        Self { parcel: parcel_of(received.message), commit: Mutex::new(Some(received.commit)) }
    }

    async fn commit(self, disposition: MessageDisposition) -> Result<()> {
        let Some(commit) = self.commit.into_inner() else { return Ok(()) };
        commit(disposition).await.map_err(|error| failed(ErrorKind::StaleDelivery, "settle", error))
    }
}

#[async_trait]
impl Held for Delivered {
    fn parcel(&self) -> Parcel {
        self.parcel.clone()
    }

    async fn ack(self: Box<Self>) -> Result<()> {
        self.commit(MessageDisposition::Ack).await
    }

    async fn nack(self: Box<Self>, _delay: Duration) -> Result<()> {
        self.commit(MessageDisposition::Nack).await
    }
}
