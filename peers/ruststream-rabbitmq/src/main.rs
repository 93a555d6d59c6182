//! `ruststream-lapin` on RabbitMQ's quorum queues, under AnyBroker's suite.
//!
//! A destination is a durable fanout exchange, a group a quorum queue that is bound to it, as in the crate's documentation
//! (`RabbitQuorumQueue::new(..).bind(..)`, `LapinPublish::default().exchange(..).confirms()`). Queues, publishing, consuming and
//! settling are ruststream's; a bare client makes exchanges, looks whether things are there, and deletes.

use std::collections::HashMap;
use std::num::NonZeroU16;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{AttemptCount, Capabilities, Limits, Support};
use anybroker_core::{
    Bus, BusOptions, Bytes, Declared, Destination, Effect, Endpoint, Error, ErrorKind, Group, Message, Receipt, Result,
    SubscribeSpec, TopologySpec,
};
use async_trait::async_trait;
use futures_util::StreamExt;
use parking_lot::Mutex;
use peers_common::rabbitmq::{Topology, exchange, queue};
use peers_common::{Deliveries, Held, Parcel, Peer, PeerBroker, Sender, Setup, failed, modest, refused};
use ruststream::runtime::RETRY_COUNT_HEADER;
use ruststream::{Broker, ConnectedBroker, HeaderMap, IncomingMessage, OutgoingMessage, Publisher, Subscriber};
use ruststream_lapin::{
    AmqpError, ConfirmsPublisher, ConnectedLapinBroker, Delay, LapinBroker, LapinMessage, LapinPublish, RabbitExchange,
    RabbitQuorumQueue,
};
use tokio::sync::RwLock;

const PEER: &str = "ruststream-lapin 0.7.2";

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "ruststream 0.7.7, lapin 4",
        connect: |url, creates| Box::pin(async move { connect(url, creates).await }),
        lease: Duration::from_secs(1),
        quiet: Duration::from_secs(2),
        patience: Duration::from_secs(30),
        has_strict: true,
    })
}

async fn connect(url: String, creates: bool) -> Result<Bus> {
    let broker = LapinBroker::new(url.as_str()).declare_topology(true).auto_recover(true);
    let connected = broker.connect().await.map_err(|error| failed(ErrorKind::Unavailable, "connect", error))?;
    let topology = Topology::connect(&url).await?;
    let peer = Rabbit {
        endpoint: Endpoint { scheme: "ruststream-lapin", mode: "quorum".into(), url, server: peers_common::server() },
        record: record(),
        publishers: Mutex::default(),
        connected: RwLock::new(Some(connected)),
        topology,
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // "`ack` is `basic.ack`, a retry is `basic.reject` with requeue": https://docs.rs/ruststream-lapin/0.7.2
        nack: Support::Native,
        // "Durable delayed retry through a TTL waiting queue"; "Opts in with RabbitQueue::delay".
        nack_delay: Support::emulated("a copy in a waiting queue; a short delay waits behind a longer one"),
        // LapinMessage::redelivery_count: the quorum queue's count of returns. A copy that was delayed starts anew.
        attempt_count: AttemptCount::Approximate,
        groups: Support::Native,
        start_latest: Support::Native,
        kept_before_group: refused("an exchange without queues keeps nothing"),
        // ConfirmsPublisher: "each publish resolves only once the broker confirmed the message".
        publish_confirm: Support::Native,
        // An exchange that is missing closes the channel, and the publish fails.
        unroutable_detected: Support::Native,
        dead_letter: refused(
            "a drop goes to the queue's dead-letter exchange, without a reason; no word to read letters",
        ),
        lease: refused("RabbitMQ keeps a delivery until its channel ends"),
        declare: Support::emulated("queues by ruststream; exchanges by a bare client, beside it"),
        limits: Limits {
            // The server's default max_message_size.
            payload: Some(16 << 20),
            ..Limits::default()
        },
        ..modest("ruststream-lapin")
    }
}

struct Rabbit {
    endpoint: Endpoint,
    record: Capabilities,
    connected: RwLock<Option<ConnectedLapinBroker>>,
    publishers: Mutex<HashMap<Destination, ConfirmsPublisher>>,
    topology: Topology,
}

fn descriptor(destination: &Destination, group: &Group) -> RabbitQuorumQueue {
    RabbitQuorumQueue::new(queue(destination, group))
        .bind(RabbitExchange::fanout(exchange(destination)).durable(true), "")
        .delay(Delay::dlx_ttl())
        // RabbitMQ 4 drops what was returned more than 20 times; the cases count attempts by themselves.
        .delivery_limit(10_000)
}

impl Rabbit {
    async fn publisher(&self, destination: &Destination) -> Result<ConfirmsPublisher> {
        if let Some(publisher) = self.publishers.lock().get(destination) {
            return Ok(publisher.clone());
        }
        let connected = self.connected.read().await;
        let connected = connected.as_ref().ok_or_else(|| Error::closed("publish"))?;
        let policy = LapinPublish::default().exchange(exchange(destination)).confirms();
        let publisher = connected.publisher(policy);
        self.publishers.lock().insert(destination.clone(), publisher.clone());
        Ok(publisher)
    }
}

#[async_trait]
impl Peer for Rabbit {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn record(&self) -> &Capabilities {
        &self.record
    }

    /// "every other header lands in the `headers` field table as a LongString (an arbitrary byte string, so binary values
    /// survive the round trip)". A short string has 255 bytes; names of RabbitMQ's own mean something to it.
    fn carries(&self, name: &str, value: &[u8]) -> bool {
        let lower = name.to_ascii_lowercase();
        let is_property = ["content-type", "correlation-id", "reply-to", "message-id"].contains(&lower.as_str());
        let is_short = value.len() <= 255 && std::str::from_utf8(value).is_ok();
        let is_the_servers = lower.starts_with("x-") || lower == "cc" || lower == "bcc";
        name.len() <= 255 && !is_the_servers && (is_short || !is_property)
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let publisher = self.publisher(message.destination()).await?;
        let mut headers = HeaderMap::new();
        for (name, value) in parcel.headers {
            headers.insert(name, value);
        }
        let outgoing = OutgoingMessage::new(message.destination().as_str(), &parcel.payload).with_headers(headers);
        publisher.publish(outgoing, None).await.map_err(publish_error)?;
        Ok(Receipt { position: None, duplicate: false })
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        let prefetch = u16::try_from(spec.max_in_flight).unwrap_or(u16::MAX);
        let source =
            descriptor(destination, &spec.group).prefetch(NonZeroU16::new(prefetch).unwrap_or(NonZeroU16::MIN));
        let connected = self.connected.read().await;
        let connected = connected.as_ref().ok_or_else(|| Error::closed("subscribe"))?;
        let subscriber = connected.subscribe(source).await;
        let mut subscriber = subscriber.map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))?;
        Ok(Deliveries::driven_by(async move {
            let mut stream = std::pin::pin!(subscriber.stream());
            // A place first: what is fetched ahead stays in ruststream's stream.
            while let Ok(place) = into.reserve().await {
                let Some(item) = stream.next().await else { break };
                place.send(match item {
                    Ok(message) => Ok(Box::new(Delivered(message))),
                    Err(error) => Err(failed(ErrorKind::Unavailable, "receive", error)),
                });
            }
        }))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let is_new = !self.topology.has_exchange(&spec.destination).await?;
        if is_new {
            self.topology.create_exchange(&spec.destination).await?;
        }
        let declared = if is_new { Declared::Created } else { Declared::Existed };
        let Some(group) = &spec.group else { return Ok(declared) };
        self.topology.remember(&spec.destination, group);
        if self.topology.has_queue(&queue(&spec.destination, group)).await? {
            return Ok(declared);
        }
        // ruststream declares a queue when it subscribes to it.
        let connected = self.connected.read().await;
        let connected = connected.as_ref().ok_or_else(|| Error::closed("declare"))?;
        let subscriber = connected.subscribe(descriptor(&spec.destination, group)).await;
        subscriber.map_err(|error| failed(ErrorKind::Unavailable, "declare", error)).map(|_| Declared::Created)
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let missing = |what: &str| Err(Error::new(ErrorKind::NotFound, "verify", format!("there is no such {what}")));
        if !self.topology.has_exchange(&spec.destination).await? {
            return missing("exchange");
        }
        match &spec.group {
            Some(group) if !self.topology.has_queue(&queue(&spec.destination, group)).await? => missing("queue"),
            _ => Ok(()),
        }
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let spec = TopologySpec { group: group.cloned(), ..TopologySpec::destination(destination) };
        self.verify(&spec).await?;
        self.topology.delete(destination, group).await
    }

    async fn close(&self) -> Result<()> {
        self.publishers.lock().clear();
        let Some(connected) = self.connected.write().await.take() else { return Ok(()) };
        let closed = connected.shutdown().await;
        self.topology.close().await;
        closed.map(drop).map_err(|error| failed(ErrorKind::Unavailable, "close", error))
    }
}

/// What ruststream's errors tell, down to the client's, which they carry.
fn publish_error(error: AmqpError) -> Error {
    let client = match &error {
        AmqpError::Publish(source) => source.downcast_ref::<lapin::Error>(),
        _ => None,
    };
    let code = client.and_then(|client| match client.kind() {
        lapin::ErrorKind::ProtocolError(told) => Some(told.get_id()),
        _ => None,
    });
    let (kind, effect) = match (&error, code) {
        (_, Some(404)) => (ErrorKind::NotFound, Effect::NotDone),
        (AmqpError::Closed { .. }, _) => (ErrorKind::Closed, Effect::NotDone),
        (AmqpError::InvalidOptions(_), _) => (ErrorKind::InvalidMessage, Effect::NotDone),
        _ => (ErrorKind::Unavailable, Effect::Unknown),
    };
    failed(kind, "publish", error).with_effect(effect)
}

struct Delivered(LapinMessage);

#[async_trait]
impl Held for Delivered {
    fn parcel(&self) -> Parcel {
        let headers = self.0.headers().iter();
        Parcel {
            headers: headers.map(|(name, value)| (name.to_owned(), Bytes::copy_from_slice(value))).collect(),
            payload: Bytes::copy_from_slice(self.0.payload()),
        }
    }

    /// The queue's count where there is one, otherwise that of ruststream's own copies.
    fn count(&self) -> Option<u32> {
        let copies = || self.0.headers().get_str(RETRY_COUNT_HEADER)?.parse::<u64>().ok().map(|copies| copies + 1);
        let count = self.0.redelivery_count().or_else(copies).unwrap_or(1);
        u32::try_from(count).ok()
    }

    async fn ack(self: Box<Self>) -> Result<()> {
        self.0.ack().await.map_err(|error| failed(ErrorKind::StaleDelivery, "settle", error))
    }

    async fn nack(self: Box<Self>, delay: Duration) -> Result<()> {
        let nacked = if delay.is_zero() { self.0.nack(true).await } else { self.0.nack_after(delay).await };
        nacked.map_err(|error| failed(ErrorKind::StaleDelivery, "settle", error))
    }
}
