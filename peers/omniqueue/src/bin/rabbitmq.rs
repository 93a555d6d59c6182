//! `omniqueue` on RabbitMQ, under AnyBroker's suite.
//!
//! A destination is a durable quorum queue, published to by its name over the default exchange, as in the crate's own tests. A bare
//! client makes and deletes queues, which omniqueue does not.

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{Capabilities, Limits, Support};
use anybroker_core::{
    Bus, BusOptions, Declared, Destination, Effect, Endpoint, ErrorKind, Group, Message, Receipt, Result,
    SubscribeSpec, TopologySpec,
};
use async_trait::async_trait;
use omniqueue::backends::rabbitmq::{
    BasicConsumeOptions, BasicProperties, BasicPublishOptions, ConnectionProperties, FieldTable,
};
use omniqueue::backends::{RabbitMqBackend, RabbitMqConfig, RabbitMqProducer};
use omniqueue::{Delivery, QueueError};
use parking_lot::Mutex;
use peers_common::rabbitmq::{Topology, exchange};
use peers_common::{Deliveries, Held, Parcel, Peer, PeerBroker, Sender, Setup, failed, modest, one_group, refused};

const PEER: &str = "omniqueue 0.3.0";

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "lapin 2.5.5",
        connect: |url, creates| Box::pin(async move { connect(url, creates).await }),
        lease: Duration::from_secs(1),
        quiet: Duration::from_secs(2),
        patience: Duration::from_secs(30),
        has_strict: true,
    })
}

async fn connect(url: String, creates: bool) -> Result<Bus> {
    let peer = Omniqueue {
        endpoint: Endpoint {
            scheme: "omniqueue",
            mode: "rabbitmq".into(),
            url: url.clone(),
            server: peers_common::server(),
        },
        record: record(),
        topology: Topology::connect(&url).await?,
        producers: Mutex::default(),
        url,
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // Delivery::nack: "usually it ensures that the same message is either reinserted into the same queue or is sent to a
        // separate collection"; RabbitMqConfig::requeue_on_nack chooses.
        nack: Support::Native,
        nack_delay: refused("Delivery::nack takes no delay"),
        groups: refused("a queue has one group; exchanges are left to the user"),
        kept_before_group: Support::Native,
        publish_confirm: refused("its RabbitMQ producer never asks for confirms"),
        unroutable_detected: refused("a publish is over when it is sent"),
        survives_process_kill: refused("nothing is confirmed"),
        limits: Limits {
            // The server's default max_message_size, less what this adapter puts before a payload: there are no headers.
            payload: Some((16 << 20) - (64 << 10)),
            ..Limits::default()
        },
        ..modest("omniqueue")
    }
}

struct Omniqueue {
    endpoint: Endpoint,
    record: Capabilities,
    url: String,
    topology: Topology,
    producers: Mutex<HashMap<Destination, Arc<RabbitMqProducer>>>,
}

impl Omniqueue {
    fn config(&self, destination: &Destination, prefetch: Option<u16>) -> RabbitMqConfig {
        RabbitMqConfig {
            uri: self.url.clone(),
            connection_properties: ConnectionProperties::default(),
            publish_exchange: String::new(),
            publish_routing_key: exchange(destination),
            publish_options: BasicPublishOptions::default(),
            // Persistent.
            publish_properties: BasicProperties::default().with_delivery_mode(2),
            consume_queue: exchange(destination),
            consumer_tag: String::new(),
            consume_options: BasicConsumeOptions::default(),
            consume_arguments: FieldTable::default(),
            consume_prefetch_count: prefetch,
            requeue_on_nack: true,
        }
    }

    async fn producer(&self, destination: &Destination) -> Result<Arc<RabbitMqProducer>> {
        if let Some(producer) = self.producers.lock().get(destination) {
            return Ok(Arc::clone(producer));
        }
        let built = RabbitMqBackend::builder(self.config(destination, None)).build_producer().await;
        let producer = Arc::new(built.map_err(|error| failed(ErrorKind::Unavailable, "publish", error))?);
        self.producers.lock().insert(destination.clone(), Arc::clone(&producer));
        Ok(producer)
    }
}

#[async_trait]
impl Peer for Omniqueue {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn record(&self) -> &Capabilities {
        &self.record
    }

    /// There are no headers: all of a message travels in the payload.
    fn carries(&self, _name: &str, _value: &[u8]) -> bool {
        false
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let producer = self.producer(message.destination()).await?;
        match producer.send_raw(&parcel.into_frame()).await {
            Ok(()) => Ok(Receipt { position: None, duplicate: false }),
            Err(error) => {
                // A producer whose channel has ended stays so: the next publish builds another.
                self.producers.lock().remove(message.destination());
                Err(failed(ErrorKind::Unavailable, "publish", error).with_effect(Effect::Unknown))
            }
        }
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        one_group(destination, &spec.group, "subscribe")?;
        let prefetch = u16::try_from(spec.max_in_flight).unwrap_or(u16::MAX);
        let built = RabbitMqBackend::builder(self.config(destination, Some(prefetch))).build_consumer().await;
        let mut consumer = built.map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))?;
        Ok(Deliveries::driven_by(async move {
            // A place first: what is fetched ahead stays in omniqueue's consumer.
            while let Ok(place) = into.reserve().await {
                match consumer.receive().await {
                    Ok(delivery) => place.send(Ok(Box::new(Delivered(delivery)))),
                    Err(QueueError::NoData) => break,
                    Err(error) => place.send(Err(failed(ErrorKind::Unavailable, "receive", error))),
                }
            }
        }))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.topology.declare_one(spec, true).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.topology.verify_one(spec).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.topology.delete_one(destination, group).await
    }

    async fn close(&self) -> Result<()> {
        // Its producers and consumers have no close: dropping is all there is.
        self.producers.lock().clear();
        self.topology.close().await;
        Ok(())
    }
}

struct Delivered(Delivery);

#[async_trait]
impl Held for Delivered {
    fn parcel(&self) -> Parcel {
        self.0.borrow_payload().and_then(Parcel::from_frame).unwrap_or_default()
    }

    async fn ack(self: Box<Self>) -> Result<()> {
        self.0.ack().await.map_err(|(error, _)| failed(ErrorKind::StaleDelivery, "settle", error))
    }

    async fn nack(self: Box<Self>, _delay: Duration) -> Result<()> {
        self.0.nack().await.map_err(|(error, _)| failed(ErrorKind::StaleDelivery, "settle", error))
    }
}
