//! `mq-bridge`'s Kafka endpoints, under AnyBroker's suite.
//!
//! A destination is a topic, a group a consumer group. Commits are called in the order in which messages came, as
//! `MessageConsumer::commit_requires_order` asks and mq-bridge's routes do. A consumer that was nacked ends with
//! `ConsumerError::Connection`, "making the route reconnect and resume from the last committed offset"; so does this. A bare client
//! makes topics and the places where groups start, and deletes.

use std::collections::VecDeque;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{AckGranularity, Capabilities, Limits, Parallelism, Support};
use anybroker_core::{
    Bus, BusOptions, Declared, Destination, Endpoint, ErrorKind, Group, Message, Receipt, Result, SubscribeSpec,
    TopologySpec,
};
use async_trait::async_trait;
use mq_bridge::endpoints::kafka::{KafkaConsumer, KafkaPublisher};
use mq_bridge::models::KafkaConfig;
use mq_bridge::traits::{CommitFunc, MessageConsumer, MessageDisposition};
use parking_lot::Mutex;
use peer_mq_bridge::{PEER, Publishers, parcel_of};
use peers_common::kafka::{PARTITIONS, Topology, group_id, servers, topic};
use peers_common::{Counted, Deliveries, Held, InFlight, Parcel, Peer, PeerBroker, Sender, Setup, failed, refused};

/// How long after its end a consumer is followed by another: the default of a route, `reconnect_interval_ms`.
const RECONNECT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "rdkafka 0.39",
        connect: |url, creates| Box::pin(async move { connect(url, creates).await }),
        lease: Duration::from_secs(1),
        quiet: Duration::from_secs(2),
        patience: Duration::from_secs(60),
        // `create_topic: false` keeps mq-bridge from it; the server creates a topic that a producer asks for.
        has_strict: false,
    })
}

async fn connect(url: String, creates: bool) -> Result<Bus> {
    let servers = servers(&url);
    let peer = Bridge {
        endpoint: Endpoint { scheme: "mq-bridge", mode: "kafka".into(), url, server: peers_common::server() },
        record: record(),
        topology: Topology::new(&servers)?,
        publishers: Publishers::default(),
        servers,
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // KafkaConfig::partitions: "ordering is only guaranteed per partition key"; ::partition_key names it.
        key_order: Support::Native,
        parallelism: Parallelism::Lanes(u32::try_from(PARTITIONS).unwrap_or(1)),
        ack_granularity: AckGranularity::Prefix,
        // KafkaConfig::group_id.
        groups: Support::Native,
        kept_before_group: Support::Native,
        start_latest: refused("a group starts with the oldest; without one, a subscriber is told no place"),
        unroutable_detected: refused("the server creates a topic that a producer asks for"),
        lease: refused("Kafka keeps a record for as long as a member has its partition"),
        tombstones: refused("this adapter does not map its tombstone metadata"),
        limits: Limits {
            // The server's default message.max.bytes, less the headers.
            payload: Some(900_000),
            ..Limits::default()
        },
        ..peer_mq_bridge::record()
    }
}

struct Bridge {
    endpoint: Endpoint,
    record: Capabilities,
    servers: String,
    topology: Topology,
    publishers: Publishers<KafkaPublisher>,
}

impl Bridge {
    fn config(&self, destination: &Destination) -> KafkaConfig {
        KafkaConfig {
            url: self.servers.clone(),
            topic: Some(topic(destination)),
            // The parcel's name for a message's key.
            partition_key: Some("any-key".to_owned()),
            partitions: Some(PARTITIONS),
            create_topic: Some(false),
            // By default all publishers of the process have one producer: each client of a case wants its own.
            shared: Some(false),
            ..KafkaConfig::default()
        }
    }
}

#[async_trait]
impl Peer for Bridge {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn record(&self) -> &Capabilities {
        &self.record
    }

    /// Metadata is "string key/value pairs next to the payload". `reply_to` and `correlation_id` mean something to it.
    fn carries(&self, name: &str, value: &[u8]) -> bool {
        let is_mq_bridges = name.starts_with("mqb.src.") || name.contains("message_id") || name.contains("tombstone");
        std::str::from_utf8(value).is_ok() && !is_mq_bridges
    }

    /// The server creates a topic that is missing.
    fn tells_missing(&self) -> bool {
        true
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let destination = message.destination();
        let config = self.config(destination);
        self.publishers.send(destination, KafkaPublisher::new(&config), parcel, None).await
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        let config = KafkaConfig { group_id: Some(group_id(destination, &spec.group)), ..self.config(destination) };
        let built = KafkaConsumer::new(&config).await;
        let mut consumer = built.map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))?;
        let in_flight = InFlight::new(spec.max_in_flight);
        let mut sequence = Sequence::default();
        Ok(Deliveries::driven_by(async move {
            loop {
                let room = in_flight.room().await;
                let Ok(place) = into.reserve().await else { break };
                match consumer.receive().await {
                    Ok(received) => {
                        let delivered = Delivered {
                            parcel: parcel_of(received.message),
                            number: sequence.take(received.commit),
                            sequence: sequence.clone(),
                        };
                        place.send(Ok(Counted::boxed(delivered, room)));
                    }
                    Err(error) => {
                        place.send(Err(failed(ErrorKind::Unavailable, "receive", error)));
                        // What is out belongs to the old consumer, and comes again.
                        sequence = Sequence::default();
                        // As its routes do, the old one is gone first: as a member of the group it would hold up the next.
                        drop(consumer);
                        consumer = loop {
                            tokio::time::sleep(RECONNECT).await;
                            if let Ok(again) = KafkaConsumer::new(&config).await {
                                break again;
                            }
                        };
                    }
                }
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
        // Consumers are closed by dropping them; publishers have no close.
        self.publishers.clear();
        Ok(())
    }
}

/// What came of one consumer, and how each is settled: `None` where it is not yet.
#[derive(Clone, Default)]
struct Sequence(Arc<Mutex<Waiting>>);

#[derive(Default)]
struct Waiting {
    first: u64,
    commits: VecDeque<(CommitFunc, Option<MessageDisposition>)>,
    /// Whether a task calls commits: they are called one after the other.
    is_busy: bool,
}

impl Sequence {
    fn take(&self, commit: CommitFunc) -> u64 {
        let mut waiting = self.0.lock();
        waiting.commits.push_back((commit, None));
        waiting.first + waiting.commits.len() as u64 - 1
    }

    /// Notes how a message is settled, and calls the commits of all that are settled from the first on.
    async fn settle(&self, number: u64, disposition: MessageDisposition) -> Result<()> {
        {
            let mut waiting = self.0.lock();
            let at = usize::try_from(number - waiting.first).unwrap_or(usize::MAX);
            if let Some(entry) = waiting.commits.get_mut(at) {
                entry.1 = Some(disposition);
            }
            if std::mem::replace(&mut waiting.is_busy, true) {
                return Ok(());
            }
        }
        loop {
            let (commit, disposition) = {
                let mut waiting = self.0.lock();
                match waiting.commits.pop_front() {
                    Some((commit, Some(disposition))) => {
                        waiting.first += 1;
                        (commit, disposition)
                    }
                    Some(unsettled) => {
                        waiting.commits.push_front(unsettled);
                        waiting.is_busy = false;
                        return Ok(());
                    }
                    None => {
                        waiting.is_busy = false;
                        return Ok(());
                    }
                }
            };
            if let Err(error) = commit(disposition).await {
                self.0.lock().is_busy = false;
                return Err(failed(ErrorKind::StaleDelivery, "settle", error));
            }
        }
    }
}

struct Delivered {
    parcel: Parcel,
    number: u64,
    sequence: Sequence,
}

#[async_trait]
impl Held for Delivered {
    fn parcel(&self) -> Parcel {
        self.parcel.clone()
    }

    async fn ack(self: Box<Self>) -> Result<()> {
        self.sequence.settle(self.number, MessageDisposition::Ack).await
    }

    async fn nack(self: Box<Self>, _delay: Duration) -> Result<()> {
        self.sequence.settle(self.number, MessageDisposition::Nack).await
    }
}
