//! `omniqueue` on standard queues of SQS, under AnyBroker's suite.
//!
//! A destination is a queue, which has one group. Its payload is text, so that a message goes as hexadecimal. A bare client makes
//! queues, with the visibility timeout that omniqueue leaves to them, and deletes.

use std::collections::HashMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{Capabilities, Limits, Support};
use anybroker_core::{
    Bus, BusOptions, Declared, Destination, Effect, Endpoint, ErrorKind, Group, Message, Receipt, Result,
    SubscribeSpec, TopologySpec,
};
use async_trait::async_trait;
use omniqueue::backends::SqsBackend;
use omniqueue::backends::sqs::{SqsConfigFull, SqsConsumer, SqsProducer};
use omniqueue::{Delivery, QueueError};
use parking_lot::Mutex;
use peers_common::sqs::{Topology, config, endpoint, is_missing, queue, settle_failed};
use peers_common::{
    Counted, Deliveries, Held, InFlight, Parcel, Peer, PeerBroker, Sender, Setup, failed, modest, one_group, refused,
};

const PEER: &str = "omniqueue 0.3.0";
/// The visibility timeout of the queues.
const VISIBILITY: Duration = Duration::from_secs(20);
/// How long one receive waits.
const POLL: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "aws-sdk-sqs",
        connect: |url, creates| Box::pin(async move { connect(url, creates).await }),
        lease: VISIBILITY,
        quiet: Duration::from_secs(3),
        patience: Duration::from_secs(60),
        has_strict: true,
    })
}

async fn connect(url: String, creates: bool) -> Result<Bus> {
    let peer = Omniqueue {
        topology: Topology::connect(&url).await,
        client: aws_sdk_sqs::Config::from(&config(&url).await),
        endpoint: Endpoint { scheme: "omniqueue", mode: "sqs".into(), url, server: peers_common::server() },
        record: record(),
        producers: Mutex::default(),
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // Delivery::nack: "usually it ensures that the same message is either reinserted into the same queue or is sent to a
        // separate collection". On SQS it does nothing; the visibility timeout brings the message back.
        nack: Support::Native,
        nack_delay: refused("Delivery::nack takes no delay"),
        // The queue's visibility timeout.
        lease: Support::Native,
        lease_extension: refused("Delivery::set_ack_deadline is behind its feature `beta`"),
        groups: refused("a queue has one group"),
        kept_before_group: Support::Native,
        // send_raw is SendMessage, which has an answer.
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        // ScheduledQueueProducer::send_raw_scheduled.
        delayed_publish: Support::Native,
        survives_process_kill: refused("the emulator keeps nothing"),
        limits: Limits {
            // 256 KiB of hexadecimal, less the headers.
            payload: Some(110_000),
            headers: Some(8_192),
            lease_min_ms: Some(20_000),
            lease_max_ms: Some(20_000),
            // SQS' DelaySeconds.
            delay_max_ms: Some(900_000),
            delay_precision_ms: Some(2_000),
            ..Limits::default()
        },
        ..modest("omniqueue")
    }
}

struct Omniqueue {
    endpoint: Endpoint,
    record: Capabilities,
    client: aws_sdk_sqs::Config,
    topology: Topology,
    /// One of each destination, as a service keeps its own: each has a client with its connections.
    producers: Mutex<HashMap<Destination, Arc<SqsProducer>>>,
}

impl Omniqueue {
    /// omniqueue takes a queue's URL: on the emulator, account and name behind the endpoint.
    fn settings(&self, destination: &Destination) -> SqsConfigFull {
        format!("{}/000000000000/{}", endpoint(&self.endpoint.url), queue(destination)).into()
    }

    async fn producer(&self, destination: &Destination) -> Result<Arc<SqsProducer>> {
        if let Some(known) = self.producers.lock().get(destination) {
            return Ok(Arc::clone(known));
        }
        let built = SqsBackend::builder(self.settings(destination)).sqs_config(self.client.clone()).build_producer();
        let built = Arc::new(built.await.map_err(|error| failed(ErrorKind::Unavailable, "publish", error))?);
        self.producers.lock().insert(destination.clone(), Arc::clone(&built));
        Ok(built)
    }

    async fn consumer(&self, destination: &Destination) -> Result<SqsConsumer> {
        let built = SqsBackend::builder(self.settings(destination)).sqs_config(self.client.clone()).build_consumer();
        built.await.map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))
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

    fn tells_missing(&self) -> bool {
        true
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let producer = self.producer(message.destination()).await?;
        let text = hex(&parcel.into_frame());
        let sent = match message.delay() {
            Some(delay) => producer.send_raw_scheduled(&text, delay).await,
            None => producer.send_raw(&text).await,
        };
        match sent {
            Ok(()) => Ok(Receipt { position: None, duplicate: false }),
            Err(error) if is_missing(&error.to_string()) => {
                Err(failed(ErrorKind::NotFound, "publish", error).with_effect(Effect::NotDone))
            }
            Err(error @ QueueError::PayloadTooLarge { .. }) => {
                Err(failed(ErrorKind::TooLarge, "publish", error).with_effect(Effect::NotDone))
            }
            Err(error) => Err(failed(ErrorKind::Unavailable, "publish", error).with_effect(Effect::Unknown)),
        }
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        one_group(destination, &spec.group, "subscribe")?;
        let consumer = self.consumer(destination).await?;
        let in_flight = InFlight::new(spec.max_in_flight);
        Ok(Deliveries::driven_by(async move {
            'receiving: loop {
                // As many as there is room for: omniqueue's consumer fetches nothing ahead.
                let mut rooms = vec![in_flight.room().await];
                while rooms.len() < 10
                    && let Some(room) = in_flight.more()
                {
                    rooms.push(room);
                }
                let Ok(place) = into.reserve().await else { break };
                match consumer.receive_all(rooms.len(), POLL).await {
                    Ok(deliveries) => {
                        let mut place = Some(place);
                        for delivery in deliveries {
                            let Some(room) = rooms.pop() else { break };
                            let held = Ok(Counted::boxed(Delivered(delivery), room));
                            if let Some(place) = place.take() {
                                place.send(held);
                            } else if into.send(held).await.is_err() {
                                break 'receiving;
                            }
                        }
                    }
                    Err(error) => {
                        let text = error.to_string();
                        let kind = if is_missing(&text) { ErrorKind::NotFound } else { ErrorKind::Unavailable };
                        place.send(Err(failed(kind, "receive", text)));
                        tokio::time::sleep(POLL).await;
                    }
                }
            }
        }))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.topology.declare(spec, VISIBILITY).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.topology.verify(spec).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.topology.delete(destination, group).await
    }

    async fn close(&self) -> Result<()> {
        // Its producers and consumers have no close: dropping is all there is.
        self.producers.lock().clear();
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.chunks(2).map(|pair| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?)).collect()
}

struct Delivered(Delivery);

#[async_trait]
impl Held for Delivered {
    fn parcel(&self) -> Parcel {
        let frame = self.0.borrow_payload().and_then(unhex);
        frame.and_then(|frame| Parcel::from_frame(&frame)).unwrap_or_default()
    }

    async fn ack(self: Box<Self>) -> Result<()> {
        self.0.ack().await.map_err(|(error, _)| settle_failed(&error.to_string()))
    }

    async fn nack(self: Box<Self>, _delay: Duration) -> Result<()> {
        self.0.nack().await.map_err(|(error, _)| settle_failed(&error.to_string()))
    }
}
