//! `ruststream-rdkafka` on Kafka, under AnyBroker's suite.
//!
//! A destination is a topic, a group a consumer group with `Commit::Tracked`. Publishing, consuming and settling are ruststream's; a bare
//! client makes topics and the places where groups start, and deletes.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{AckGranularity, Capabilities, Limits, Parallelism, Support};
use anybroker_core::{
    Bus, BusOptions, Bytes, Declared, Destination, Effect, Endpoint, Error, ErrorKind, Group, Message, Receipt, Result,
    Start, SubscribeSpec, TopologySpec,
};
use async_trait::async_trait;
use futures_util::StreamExt;
use peers_common::kafka::{PARTITIONS, Topology, group_id, servers, topic};
use peers_common::{
    Counted, Deliveries, Held, InFlight, Parcel, Peer, PeerBroker, Sender, Setup, failed, modest, refused,
};
use rdkafka::error::RDKafkaErrorCode;
use ruststream::{Broker, ConnectedBroker, HeaderMap, IncomingMessage, OutgoingMessage, Publisher, Subscriber};
use ruststream_rdkafka::{
    Commit, ConnectedKafkaBroker, KafkaBroker, KafkaError, KafkaMessage, KafkaPublish, KafkaPublisher, KafkaTopic,
    PARTITION_KEY_HEADER, StartOffset,
};
use tokio::sync::RwLock;

const PEER: &str = "ruststream-rdkafka 0.7.1";

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "ruststream 0.7.7, rdkafka 0.39",
        connect: |url, creates| Box::pin(async move { connect(url, creates).await }),
        lease: Duration::from_secs(1),
        quiet: Duration::from_secs(2),
        patience: Duration::from_secs(60),
        // The server creates a topic that a producer asks for.
        has_strict: false,
    })
}

async fn connect(url: String, creates: bool) -> Result<Bus> {
    let servers = servers(&url);
    let connected = KafkaBroker::new([servers.as_str()]).connect().await;
    let connected = connected.map_err(|error| failed(ErrorKind::Unavailable, "connect", error))?;
    let peer = Kafka {
        endpoint: Endpoint {
            scheme: "ruststream-rdkafka",
            mode: "tracked".into(),
            url,
            server: peers_common::server(),
        },
        record: record(),
        topology: Topology::new(&servers)?,
        publisher: connected.publisher(KafkaPublish::default()),
        connected: RwLock::new(Some(connected)),
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // "the partition key becomes the Kafka key"; LaneKey::Partition: "lanes mirror Kafka's own ordering unit".
        key_order: Support::Native,
        parallelism: Parallelism::Lanes(u32::try_from(PARTITIONS).unwrap_or(1)),
        // Commit::Tracked: "an `ack` advances the stored position to just below the lowest still-unsettled delivery".
        ack_granularity: AckGranularity::Prefix,
        // KafkaMessage: "`nack(true)` hands the delivery back to its subscription, which delivers it again ahead of what it fetches
        // next".
        nack: Support::Native,
        nack_delay: refused("KafkaMessage has no nack_after; its runtime publishes a copy instead"),
        groups: Support::Native,
        // KafkaTopic::start.
        kept_before_group: Support::Native,
        start_latest: Support::Native,
        replay: refused("this adapter does not map its KafkaSeeker"),
        start_position: refused("this adapter does not map its KafkaSeeker"),
        // KafkaPublisher: "awaits the delivery report".
        publish_confirm: Support::Native,
        unroutable_detected: refused("the server creates a topic that a producer asks for"),
        transactions: refused("this adapter does not map KafkaPublish::transactional_id"),
        lease: refused("Kafka keeps a record for as long as a member has its partition"),
        dead_letter: refused("max_attempts and dead_letter belong to handlers of its runtime; no word to read letters"),
        limits: Limits {
            // The server's default message.max.bytes, less the headers.
            payload: Some(900_000),
            ..Limits::default()
        },
        ..modest("ruststream-rdkafka")
    }
}

struct Kafka {
    endpoint: Endpoint,
    record: Capabilities,
    connected: RwLock<Option<ConnectedKafkaBroker>>,
    publisher: KafkaPublisher,
    topology: Topology,
}

#[async_trait]
impl Peer for Kafka {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn record(&self) -> &Capabilities {
        &self.record
    }

    /// "Wire headers map name for name". Its name for the key, and that of its exactly-once pipelines, mean something to it.
    fn carries(&self, name: &str, _value: &[u8]) -> bool {
        let lower = name.to_ascii_lowercase();
        lower != PARTITION_KEY_HEADER && lower != ruststream_rdkafka::EOS_SOURCE_HEADER
    }

    fn tells_missing(&self) -> bool {
        true
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let mut headers = HeaderMap::new();
        for (name, value) in parcel.headers {
            headers.insert(name, value);
        }
        if let Some(key) = message.key() {
            headers.insert(PARTITION_KEY_HEADER, Bytes::copy_from_slice(key));
        }
        let topic = topic(message.destination());
        let outgoing = OutgoingMessage::new(&topic, &parcel.payload).with_headers(headers);
        self.publisher.publish(outgoing, None).await.map_err(publish_error)?;
        Ok(Receipt { position: None, duplicate: false })
    }

    /// As many as may be out: a member that does not poll answers no rebalance. Its own runtime polls until its workers are busy.
    fn ahead(&self, spec: &SubscribeSpec) -> usize {
        spec.max_in_flight
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        let start = if spec.start == Start::Latest { StartOffset::Latest } else { StartOffset::Earliest };
        let source = KafkaTopic::new(topic(destination))
            .group(group_id(destination, &spec.group))
            .start(start)
            .commit(Commit::Tracked);
        let connected = self.connected.read().await;
        let connected = connected.as_ref().ok_or_else(|| Error::closed("subscribe"))?;
        let subscriber = connected.subscribe_with(source).await;
        let mut subscriber = subscriber.map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))?;
        let in_flight = InFlight::new(spec.max_in_flight);
        Ok(Deliveries::driven_by(async move {
            let mut stream = std::pin::pin!(subscriber.stream());
            loop {
                let room = in_flight.room().await;
                let Ok(place) = into.reserve().await else { break };
                let Some(item) = stream.next().await else { break };
                place.send(match item {
                    Ok(message) => Ok(Counted::boxed(Delivered(message), room)),
                    Err(error) => Err(failed(ErrorKind::Unavailable, "receive", error)),
                });
            }
        }))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.topology.declare(spec).await
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
                connected.shutdown().await.map(drop).map_err(|error| failed(ErrorKind::Unavailable, "close", error))
            }
            None => Ok(()),
        }
    }
}

/// What ruststream's errors tell, down to the client's, which they carry.
fn publish_error(error: KafkaError) -> Error {
    let code = match &error {
        KafkaError::Publish(source) => {
            source.downcast_ref::<rdkafka::error::KafkaError>().and_then(rdkafka::error::KafkaError::rdkafka_error_code)
        }
        _ => None,
    };
    let (kind, effect) = match (&error, code) {
        (_, Some(RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownTopicOrPartition)) => {
            (ErrorKind::NotFound, Effect::NotDone)
        }
        (_, Some(RDKafkaErrorCode::MessageSizeTooLarge)) => (ErrorKind::TooLarge, Effect::NotDone),
        (KafkaError::Closed { .. }, _) => (ErrorKind::Closed, Effect::NotDone),
        (KafkaError::InvalidOptions(_), _) => (ErrorKind::InvalidMessage, Effect::NotDone),
        _ => (ErrorKind::Unavailable, Effect::Unknown),
    };
    failed(kind, "publish", error).with_effect(effect)
}

struct Delivered(KafkaMessage);

#[async_trait]
impl Held for Delivered {
    fn parcel(&self) -> Parcel {
        let headers = self.0.headers().iter();
        Parcel {
            headers: headers.map(|(name, value)| (name.to_owned(), Bytes::copy_from_slice(value))).collect(),
            payload: Bytes::copy_from_slice(self.0.payload()),
        }
    }

    async fn ack(self: Box<Self>) -> Result<()> {
        self.0.ack().await.map_err(|error| failed(ErrorKind::StaleDelivery, "settle", error))
    }

    async fn nack(self: Box<Self>, _delay: Duration) -> Result<()> {
        self.0.nack(true).await.map_err(|error| failed(ErrorKind::StaleDelivery, "settle", error))
    }
}
