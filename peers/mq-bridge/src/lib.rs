//! What the adapters of `mq-bridge` share: what it promises on each broker, its publishers, its consumer, its message and its commit.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{Capabilities, Support};
use anybroker_core::{Destination, Effect, ErrorKind, Receipt, Result};
use async_trait::async_trait;
use mq_bridge::CanonicalMessage;
use mq_bridge::traits::{CommitFunc, MessageConsumer, MessageDisposition, MessagePublisher, Received};
use parking_lot::Mutex;
use peers_common::{Deliveries, Held, Parcel, Sender, failed, modest, refused};

/// Its name and version.
pub const PEER: &str = "mq-bridge 1.3.0";

/// What its documentation promises on any broker.
#[must_use]
pub fn record() -> Capabilities {
    Capabilities {
        // DELIVERY.md: "`mq-bridge` is **at-least-once**. A message is acked only after the output chain reports success".
        at_least_once: Support::Native,
        // MessageDisposition::Nack: "Negative acknowledgement (failure)"; REFERENCE.md: "A source that redelivers nacked messages
        // (a broker) delivers it again".
        nack: Support::Native,
        nack_delay: refused("MessageDisposition::Nack takes no delay"),
        // delayed_ack of NatsConfig, KafkaConfig, AmqpConfig: "If true, do not wait for an acknowledgement when sending to broker.
        // Defaults to false."
        publish_confirm: Support::Native,
        dead_letter: refused("the dlq middleware belongs to a route's output; no word to read letters"),
        ..modest("mq-bridge")
    }
}

/// The publishers of one client: one of each destination, which is built once.
pub struct Publishers<P>(Mutex<HashMap<Destination, Arc<P>>>);

impl<P> Default for Publishers<P> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<P: MessagePublisher> Publishers<P> {
    /// Publishes with the destination's publisher. Its errors have no kinds; `missing` is what they say in words where the destination
    /// is not there.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`.
    pub async fn send<E: Display>(
        &self,
        destination: &Destination,
        build: impl Future<Output = std::result::Result<P, E>>,
        parcel: Parcel,
        missing: Option<&str>,
    ) -> Result<Receipt> {
        let known = self.0.lock().get(destination).cloned();
        let publisher = match known {
            Some(publisher) => publisher,
            None => {
                let built = build.await.map_err(|error| failed(ErrorKind::Unavailable, "publish", error))?;
                let publisher = Arc::new(built);
                self.0.lock().insert(destination.clone(), Arc::clone(&publisher));
                publisher
            }
        };
        match publisher.send(canonical(parcel)).await {
            Ok(_) => Ok(Receipt { position: None, duplicate: false }),
            Err(error) if missing.is_some_and(|words| error.to_string().contains(words)) => {
                Err(failed(ErrorKind::NotFound, "publish", error).with_effect(Effect::NotDone))
            }
            Err(error) => Err(failed(ErrorKind::Unavailable, "publish", error).with_effect(Effect::Unknown)),
        }
    }

    /// Drops them: they have no close.
    pub fn clear(&self) {
        self.0.lock().clear();
    }
}

/// Receives what a consumer gives. One that ends with an error is followed by another, as its routes do.
pub fn receiving<C, E, F>(mut consumer: C, again: impl Fn() -> F + Send + 'static, into: Sender) -> Deliveries
where
    C: MessageConsumer + 'static,
    E: Send,
    F: Future<Output = std::result::Result<C, E>> + Send,
{
    Deliveries::driven_by(async move {
        // A place first: what is fetched ahead stays in mq-bridge's consumer.
        while let Ok(place) = into.reserve().await {
            match consumer.receive().await {
                Ok(received) => place.send(Ok(Box::new(Delivered::of(received)))),
                Err(error) => {
                    place.send(Err(failed(ErrorKind::Unavailable, "receive", error)));
                    match again().await {
                        Ok(next) => consumer = next,
                        Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                    }
                }
            }
        }
    })
}

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
