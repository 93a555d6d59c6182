//! `mq-bridge`'s AMQP endpoints on RabbitMQ, under AnyBroker's suite.
//!
//! A destination is a durable classic queue, the only kind that mq-bridge declares. A consumer whose connection is gone ends with
//! `ConsumerError::Connection`, which is documented as one "that should trigger a reconnect"; its routes make another, and so does this.
//! A bare client looks whether queues are there, and deletes them.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{Capabilities, Limits, Support};
use anybroker_core::{
    Bus, BusOptions, Declared, Destination, Endpoint, ErrorKind, Group, Message, Receipt, Result, SubscribeSpec,
    TopologySpec,
};
use async_trait::async_trait;
use mq_bridge::endpoints::amqp::{AmqpConsumer, AmqpPublisher};
use mq_bridge::models::AmqpConfig;
use peer_mq_bridge::{PEER, Publishers, receiving};
use peers_common::rabbitmq::{Topology, exchange};
use peers_common::{Deliveries, Parcel, Peer, PeerBroker, Sender, Setup, failed, one_group, refused};

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "lapin 4",
        connect: |url, creates| Box::pin(async move { connect(url, creates).await }),
        lease: Duration::from_secs(1),
        quiet: Duration::from_secs(2),
        patience: Duration::from_secs(30),
        has_strict: true,
    })
}

async fn connect(url: String, creates: bool) -> Result<Bus> {
    let peer = Bridge {
        endpoint: Endpoint {
            scheme: "mq-bridge",
            mode: "rabbitmq".into(),
            url: url.clone(),
            server: peers_common::server(),
        },
        record: record(),
        topology: Topology::connect(&url).await?,
        publishers: Publishers::default(),
        creates,
        url,
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        groups: refused("the groups of subscribe_mode live as long as their connection"),
        // A destination is its group's queue; AmqpPublisher makes it unless no_declare_queue is set.
        kept_before_group: Support::Native,
        // CHANGELOG: "a publish the broker cannot route is an error".
        unroutable_detected: Support::Native,
        // AmqpConfig::no_persistence: "If true, declare queues as non-durable (transient). Defaults to false."
        survives_process_kill: Support::Native,
        limits: Limits {
            // The server's default max_message_size.
            payload: Some(16 << 20),
            ..Limits::default()
        },
        ..peer_mq_bridge::record()
    }
}

struct Bridge {
    endpoint: Endpoint,
    record: Capabilities,
    url: String,
    topology: Topology,
    publishers: Publishers<AmqpPublisher>,
    creates: bool,
}

impl Bridge {
    fn config(&self, destination: &Destination, prefetch: Option<u16>) -> AmqpConfig {
        AmqpConfig {
            url: self.url.clone(),
            queue: Some(exchange(destination)),
            prefetch_count: prefetch,
            no_declare_queue: !self.creates,
            ..AmqpConfig::default()
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

    /// Metadata is "string key/value pairs next to the payload"; of AMQP's own, "a metadata key, `reply_to` or
    /// `correlation_id` over 255 bytes is left out". Names of RabbitMQ's own mean something to it.
    fn carries(&self, name: &str, value: &[u8]) -> bool {
        let lower = name.to_ascii_lowercase();
        let is_property = name == "reply_to" || name == "correlation_id";
        let is_the_servers = lower.starts_with("x-") || lower == "cc" || lower == "bcc";
        let is_mq_bridges = name.starts_with("mqb.src.") || name == "amqp_message_id";
        let is_text = std::str::from_utf8(value).is_ok();
        is_text && name.len() <= 255 && !is_the_servers && !is_mq_bridges && !(is_property && value.len() > 255)
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let destination = message.destination();
        let config = self.config(destination, None);
        self.publishers
            .send(destination, AmqpPublisher::new(&config), parcel, Some("returned the message as unroutable"))
            .await
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        one_group(destination, &spec.group, "subscribe")?;
        let config = self.config(destination, Some(u16::try_from(spec.max_in_flight).unwrap_or(u16::MAX)));
        let built = AmqpConsumer::new(&config).await;
        let consumer = built.map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))?;
        let again = move || {
            let config = config.clone();
            async move { AmqpConsumer::new(&config).await }
        };
        Ok(receiving(consumer, again, into))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.topology.declare_one(spec, false).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.topology.verify_one(spec).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.topology.delete_one(destination, group).await
    }

    async fn close(&self) -> Result<()> {
        // Consumers are closed by dropping them, as its documentation says; publishers have no close.
        self.publishers.clear();
        self.topology.close().await;
        Ok(())
    }
}
