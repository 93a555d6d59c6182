//! `ruststream-sqs-sns` on standard queues of SQS, under AnyBroker's suite.
//!
//! A destination is a queue, which has one group. Publishing, consuming and settling are ruststream's; a bare client makes queues,
//! looks whether they are there, and deletes.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{AttemptCount, Capabilities, Limits, Support};
use anybroker_core::{
    Bus, BusOptions, Bytes, Declared, Destination, Effect, Endpoint, Error, ErrorKind, Group, Message, Receipt, Result,
    SubscribeSpec, TopologySpec,
};
use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::StreamExt;
use peers_common::sqs::{REGION, Topology, endpoint, is_missing, queue, settle_failed};
use peers_common::{
    Counted, Deliveries, Held, InFlight, Parcel, Peer, PeerBroker, Sender, Setup, failed, modest, one_group, refused,
};
use ruststream::{
    AckError, Broker, ConnectedBroker, HeaderMap, IncomingMessage, OutgoingMessage, Publisher, Subscriber,
};
use ruststream_sqs_sns::{
    ConnectedSqsBroker, PARTITION_KEY_HEADER, RECEIVE_COUNT_HEADER, SqsBroker, SqsError, SqsMessage, SqsPublisher,
    SqsQueue,
};
use tokio::sync::RwLock;

const PEER: &str = "ruststream-sqs-sns 0.7.1";
/// A message has ten attributes: this adapter's are at most five, ruststream's own is one.
const ROOM: usize = 4;

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "ruststream 0.7.7, aws-sdk-sqs",
        connect: |url, creates| Box::pin(async move { connect(url, creates).await }),
        lease: Duration::from_secs(2),
        quiet: Duration::from_secs(3),
        patience: Duration::from_secs(30),
        has_strict: true,
    })
}

async fn connect(url: String, creates: bool) -> Result<Bus> {
    let connected = SqsBroker::new().endpoint(endpoint(&url)).region(REGION).test_credentials().connect().await;
    let connected = connected.map_err(|error| failed(ErrorKind::Unavailable, "connect", error))?;
    let peer = Sqs {
        topology: Topology::connect(&url).await,
        endpoint: Endpoint { scheme: "ruststream-sqs-sns", mode: "sqs".into(), url, server: peers_common::server() },
        record: record(),
        publisher: connected.publisher(),
        connected: RwLock::new(Some(connected)),
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // SqsMessage: "`nack(requeue = true)` zeroes its visibility so it redelivers immediately; `nack_after(delay)` sets the
        // visibility to the delay".
        nack: Support::Native,
        nack_delay: Support::Native,
        // "While the handle is alive, a background task keeps extending the message's visibility".
        lease: refused("its deliveries are extended for as long as they are held"),
        // SqsMessage::redelivery_count: "SQS counts every receive of a message and reports it with the delivery".
        attempt_count: AttemptCount::Approximate,
        groups: refused("a queue has one group; this adapter does not map its SNS"),
        kept_before_group: Support::Native,
        // SendMessage has an answer.
        publish_confirm: Support::Native,
        // SqsQueue: a name is "resolved through `GetQueueUrl`".
        unroutable_detected: Support::Native,
        publish_dedup: refused("FIFO queues have it; this adapter uses standard ones"),
        key_order: refused("FIFO queues have it; this adapter uses standard ones"),
        dead_letter: refused(
            "the queue's redrive policy moves what is spent, without a reason; no word to read letters",
        ),
        survives_process_kill: refused("the emulator keeps nothing"),
        limits: Limits {
            // The emulator's 256 KiB, of which base64 takes a third and headers their part.
            payload: Some(170_000),
            headers: Some(8_192),
            // What is held when a subscription ends comes back when its visibility is over, so that a case has to wait.
            lease_min_ms: Some(1_000),
            lease_max_ms: Some(10_000),
            delay_max_ms: Some(39_600_000),
            delay_precision_ms: Some(2_000),
            ..Limits::default()
        },
        ..modest("ruststream-sqs-sns")
    }
}

struct Sqs {
    endpoint: Endpoint,
    record: Capabilities,
    connected: RwLock<Option<ConnectedSqsBroker>>,
    publisher: SqsPublisher,
    topology: Topology,
}

#[async_trait]
impl Peer for Sqs {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn record(&self) -> &Capabilities {
        &self.record
    }

    /// "Message attributes carry headers directly (String for values the service takes as text, Binary otherwise)". What the service
    /// takes: letters, digits, dots, dashes, underscores; no empty value; no name of Amazon's.
    fn carries(&self, name: &str, value: &[u8]) -> bool {
        let lower = name.to_ascii_lowercase();
        let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && !name.starts_with('.')
            && !name.ends_with('.')
            && !name.contains("..");
        let is_reserved = lower.starts_with("aws") || lower.starts_with("amazon") || lower.starts_with("ruststream-");
        let is_ruststreams = lower == PARTITION_KEY_HEADER || lower == RECEIVE_COUNT_HEADER;
        is_name && name.len() <= 256 && !name.is_empty() && !value.is_empty() && !is_reserved && !is_ruststreams
    }

    fn room(&self) -> usize {
        ROOM
    }

    fn tells_missing(&self) -> bool {
        true
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let mut headers = HeaderMap::new();
        for (name, value) in parcel.headers {
            headers.insert(name, value);
        }
        let queue = queue(message.destination());
        let outgoing = OutgoingMessage::with_payload(&queue, BytesMut::from(&parcel.payload[..])).with_headers(headers);
        self.publisher.publish(outgoing, None).await.map_err(publish_error)?;
        Ok(Receipt { position: None, duplicate: false })
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        one_group(destination, &spec.group, "subscribe")?;
        let source = SqsQueue::new(queue(destination)).visibility(spec.lease);
        let connected = self.connected.read().await;
        let connected = connected.as_ref().ok_or_else(|| Error::closed("subscribe"))?;
        let mut subscriber = connected.subscribe_queue(source).await.map_err(|error| sqs_error("subscribe", error))?;
        let in_flight = InFlight::new(spec.max_in_flight);
        Ok(Deliveries::driven_by(async move {
            let mut stream = std::pin::pin!(subscriber.stream());
            loop {
                let room = in_flight.room().await;
                // A place first: what is fetched ahead stays in ruststream's stream.
                let Ok(place) = into.reserve().await else { break };
                let Some(item) = stream.next().await else { break };
                place.send(match item {
                    Ok(message) => Ok(Counted::boxed(Delivered(message), room)),
                    Err(error) => Err(sqs_error("receive", error)),
                });
            }
        }))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.topology.declare(spec, Duration::from_secs(30)).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.topology.verify(spec).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.topology.delete(destination, group).await
    }

    async fn close(&self) -> Result<()> {
        match self.connected.write().await.take() {
            Some(connected) => {
                connected.shutdown().await.map_err(|error| failed(ErrorKind::Unavailable, "close", error))
            }
            None => Ok(()),
        }
    }
}

fn sqs_error(operation: &'static str, error: SqsError) -> Error {
    let kind = if is_missing(&error.to_string()) { ErrorKind::NotFound } else { ErrorKind::Unavailable };
    failed(kind, operation, error)
}

fn publish_error(error: SqsError) -> Error {
    let error = match error {
        SqsError::NotConnected => failed(ErrorKind::Closed, "publish", error),
        other => sqs_error("publish", other),
    };
    let effect = if error.kind() == ErrorKind::Unavailable { Effect::Unknown } else { Effect::NotDone };
    error.with_effect(effect)
}

/// What the service said is behind ruststream's own words.
fn ack_error(error: AckError) -> Error {
    match std::error::Error::source(&error) {
        Some(source) => settle_failed(&format!("{error}: {source}")),
        None => settle_failed(&error.to_string()),
    }
}

struct Delivered(SqsMessage);

#[async_trait]
impl Held for Delivered {
    fn parcel(&self) -> Parcel {
        let headers = self.0.headers().iter();
        Parcel {
            headers: headers.map(|(name, value)| (name.to_owned(), Bytes::copy_from_slice(value))).collect(),
            payload: Bytes::copy_from_slice(self.0.payload()),
        }
    }

    fn count(&self) -> Option<u32> {
        self.0.redelivery_count().and_then(|count| u32::try_from(count).ok())
    }

    async fn ack(self: Box<Self>) -> Result<()> {
        self.0.ack().await.map_err(ack_error)
    }

    async fn nack(self: Box<Self>, delay: Duration) -> Result<()> {
        let nacked = if delay.is_zero() { self.0.nack(true).await } else { self.0.nack_after(delay).await };
        nacked.map_err(ack_error)
    }
}
