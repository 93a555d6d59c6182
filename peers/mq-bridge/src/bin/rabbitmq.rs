//! `mq-bridge`'s AMQP endpoints on RabbitMQ, under AnyBroker's suite.
//!
//! A destination is a durable classic queue, the only kind that mq-bridge declares. A consumer whose connection is gone ends with
//! `ConsumerError::Connection`, which is documented as one "that should trigger a reconnect"; its routes make another, and so does this.
//! A bare client looks whether queues are there, and deletes them.

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{Capabilities, Limits, Support};
use anybroker_core::{
    Bus, BusOptions, Declared, Destination, Effect, Endpoint, Error, ErrorKind, Group, Message, Receipt, Result,
    SubscribeSpec, TopologySpec,
};
use async_trait::async_trait;
use mq_bridge::endpoints::amqp::{AmqpConsumer, AmqpPublisher};
use mq_bridge::models::AmqpConfig;
use mq_bridge::traits::{MessageConsumer, MessagePublisher};
use parking_lot::Mutex;
use peer_mq_bridge::{Delivered, PEER, canonical};
use peers_common::rabbitmq::{Topology, exchange};
use peers_common::{
    Deliveries, Parcel, Peer, PeerBroker, Sender, Setup, disown, failed, is_owner, modest, one_group, refused,
};

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
        publishers: Mutex::default(),
        creates,
        url,
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // DELIVERY.md: "`mq-bridge` is **at-least-once**. A message is acked only after the output chain reports success".
        at_least_once: Support::Native,
        // MessageDisposition::Nack: "Negative acknowledgement (failure)"; REFERENCE.md: "A source that redelivers nacked messages
        // (a broker) delivers it again".
        nack: Support::Native,
        nack_delay: refused("MessageDisposition::Nack takes no delay"),
        groups: refused("the groups of subscribe_mode live as long as their connection"),
        // A destination is its group's queue; AmqpPublisher makes it unless no_declare_queue is set.
        kept_before_group: Support::Native,
        // AmqpConfig::delayed_ack: "If true, do not wait for an acknowledgement when sending to broker. Defaults to false."
        publish_confirm: Support::Native,
        // CHANGELOG: "a publish the broker cannot route is an error".
        unroutable_detected: Support::Native,
        // AmqpConfig::no_persistence: "If true, declare queues as non-durable (transient). Defaults to false."
        survives_process_kill: Support::Native,
        dead_letter: refused("the dlq middleware belongs to a route's output; no word to read letters"),
        limits: Limits {
            // The server's default max_message_size.
            payload: Some(16 << 20),
            ..Limits::default()
        },
        ..modest("mq-bridge")
    }
}

struct Bridge {
    endpoint: Endpoint,
    record: Capabilities,
    url: String,
    topology: Topology,
    publishers: Mutex<HashMap<Destination, Arc<AmqpPublisher>>>,
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

    async fn publisher(&self, destination: &Destination) -> Result<Arc<AmqpPublisher>> {
        if let Some(publisher) = self.publishers.lock().get(destination) {
            return Ok(Arc::clone(publisher));
        }
        let built = AmqpPublisher::new(&self.config(destination, None)).await;
        let publisher = Arc::new(built.map_err(|error| failed(ErrorKind::Unavailable, "publish", error))?);
        self.publishers.lock().insert(destination.clone(), Arc::clone(&publisher));
        Ok(publisher)
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
        let publisher = self.publisher(message.destination()).await?;
        match publisher.send(canonical(parcel)).await {
            Ok(_) => Ok(Receipt { position: None, duplicate: false }),
            // Its errors have no kinds; this is what they say in words.
            Err(error) if error.to_string().contains("returned the message as unroutable") => {
                Err(failed(ErrorKind::NotFound, "publish", error).with_effect(Effect::NotDone))
            }
            Err(error) => Err(failed(ErrorKind::Unavailable, "publish", error).with_effect(Effect::Unknown)),
        }
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        one_group(destination, &spec.group, "subscribe")?;
        let config = self.config(destination, Some(u16::try_from(spec.max_in_flight).unwrap_or(u16::MAX)));
        let built = AmqpConsumer::new(&config).await;
        let mut consumer = built.map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))?;
        Ok(Deliveries::driven_by(async move {
            // A place first: what is fetched ahead stays in mq-bridge's consumer.
            while let Ok(place) = into.reserve().await {
                match consumer.receive().await {
                    Ok(received) => place.send(Ok(Box::new(Delivered::of(received)))),
                    Err(error) => {
                        place.send(Err(failed(ErrorKind::Unavailable, "receive", error)));
                        match AmqpConsumer::new(&config).await {
                            Ok(again) => consumer = again,
                            Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                        }
                    }
                }
            }
        }))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        if let Some(group) = &spec.group {
            one_group(&spec.destination, group, "declare")?;
        }
        let name = exchange(&spec.destination);
        if self.topology.has_queue(&name).await? {
            return Ok(Declared::Existed);
        }
        self.topology.create_queue(&name, false).await?;
        Ok(Declared::Created)
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let is_groups = |group: &Group| is_owner(&spec.destination, group);
        let has_queue = self.topology.has_queue(&exchange(&spec.destination)).await?;
        if has_queue && spec.group.as_ref().is_none_or(is_groups) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, "verify", "there is no such queue"))
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.verify(&TopologySpec { group: group.cloned(), ..TopologySpec::destination(destination) }).await?;
        disown(destination);
        self.topology.delete_queue(&exchange(destination)).await
    }

    async fn close(&self) -> Result<()> {
        // Consumers are closed by dropping them, as its documentation says; publishers have no close.
        self.publishers.lock().clear();
        self.topology.close().await;
        Ok(())
    }
}
