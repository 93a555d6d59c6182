//! `ruststream-nats` on JetStream, under AnyBroker's suite.
//!
//! A destination is a stream with one subject, a group a durable of it. Publishing, consuming and settling are ruststream's;
//! streams and durables are made by the JetStream context that it hands out for that.

use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anybroker_core::capability::{AttemptCount, Capabilities, Limits, Support};
use anybroker_core::naming::{escape, shorten};
use anybroker_core::{
    Bus, BusOptions, Bytes, Declared, Destination, Effect, Endpoint, Error, ErrorKind, Group, Message, Position,
    Receipt, Result, Start, SubscribeSpec, TopologySpec,
};
use async_nats::jetstream::consumer::pull::{self, MessagesErrorKind};
use async_nats::jetstream::context::{ConsumerInfoErrorKind, GetStreamErrorKind, PublishError, PublishErrorKind};
use async_nats::jetstream::{self, ErrorCode};
use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::StreamExt;
use peers_common::{Deliveries, Held, Parcel, Peer, PeerBroker, Sender, Setup, failed, modest, refused};
use ruststream::{Broker, ConnectedBroker, HeaderMap, IncomingMessage, OutgoingMessage, Subscriber};
use ruststream_nats::{
    ConnectedNatsBroker, DeliverPolicy, JetStreamOptions, JetStreamPublish, JetStreamPublisher, JetStreamSubject,
    NatsBroker, NatsError, NatsMessage, NonZeroDuration,
};
use tokio::sync::RwLock;

const PEER: &str = "ruststream-nats 0.7.1";

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "ruststream 0.7.7, async-nats 0.50.0",
        connect: |url, creates| Box::pin(async move { connect(url, creates).await }),
        lease: Duration::from_secs(3),
        quiet: Duration::from_secs(2),
        patience: Duration::from_secs(30),
        has_strict: true,
    })
}

async fn connect(url: String, creates: bool) -> Result<Bus> {
    let connected = NatsBroker::new(url.as_str()).connect().await;
    let connected = connected.map_err(|error| failed(ErrorKind::Unavailable, "connect", error))?;
    let version = connected.client().server_info().version;
    let peer = Nats {
        endpoint: Endpoint {
            scheme: "ruststream-nats",
            mode: "jetstream".into(),
            url,
            server: format!("NATS {version}"),
        },
        record: record(),
        publisher: connected.publisher(JetStreamPublish::default()),
        context: connected.jetstream(),
        connected: RwLock::new(Some(connected)),
    };
    Ok(Bus::new(std::sync::Arc::new(PeerBroker::new(peer, creates)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // "Native JetStream acknowledgement, delayed redelivery included": https://docs.rs/ruststream-nats/0.7.1
        nack: Support::Native,
        nack_delay: Support::Native,
        // JetStreamSubject::ack_wait: "After this window an unacked delivery is redelivered."
        lease: Support::Native,
        // NatsMessage::redelivery_count: "How many times the server has delivered this message, counting this one."
        attempt_count: AttemptCount::Approximate,
        // JetStreamSubject::durable and deliver_policy.
        groups: Support::Native,
        kept_before_group: Support::Native,
        start_latest: Support::Native,
        replay: refused("this adapter does not map its DeliverPolicy::ByStartSequence and ByStartTime"),
        start_position: refused("this adapter does not map its DeliverPolicy::ByStartSequence and ByStartTime"),
        // JetStreamPublisher: "awaits the stream's publish acknowledgement"; an error for "no such stream".
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        // JetStreamOptions::message_id: "a repeat inside the stream's deduplication window is stored once".
        publish_dedup: Support::Native,
        dead_letter: refused("max_attempts and dead_letter belong to handlers of its runtime; no word to read letters"),
        declare: Support::emulated("by the JetStream context that it hands out for administration"),
        delete: Support::emulated("by the JetStream context that it hands out for administration"),
        // As AnyBroker's own record of JetStream: the file of acks is not written at once.
        survives_process_kill: Support::emulated("the server may forget acks of the last moment"),
        limits: Limits {
            // The server's default max_payload, less the headers.
            payload: Some(950_000),
            lease_min_ms: Some(500),
            // What is prefetched or held when a subscription ends comes back when ack_wait is over, so that a case has to
            // wait for it. The default is 30 s.
            lease_max_ms: Some(10_000),
            delay_precision_ms: Some(1_000),
            // The server's default duplicate_window.
            dedup_window_ms: Some(120_000),
            ..Limits::default()
        },
        ..modest("ruststream-nats")
    }
}

struct Nats {
    endpoint: Endpoint,
    record: Capabilities,
    connected: RwLock<Option<ConnectedNatsBroker>>,
    publisher: JetStreamPublisher,
    context: jetstream::Context,
}

/// A name for a stream or a durable.
fn token(name: &str) -> String {
    let escaped = escape(name, "=", |byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    if escaped.len() <= 120 { escaped } else { shorten(&escaped, "=", 80, name) }
}

fn subject(stream: &str) -> String {
    format!("peers.{stream}")
}

fn deliver_policy(start: Start) -> DeliverPolicy {
    match start {
        Start::Latest => DeliverPolicy::New,
        _ => DeliverPolicy::All,
    }
}

impl Nats {
    async fn stream(&self, stream: &str, operation: &'static str) -> Result<jetstream::stream::Stream> {
        self.context.get_stream(stream).await.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(told) if told.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                failed(ErrorKind::NotFound, operation, error)
            }
            _ => failed(ErrorKind::Unavailable, operation, error),
        })
    }

    /// The durable as it is, or nothing.
    async fn durable(&self, stream: &str, group: &str, operation: &'static str) -> Result<Option<pull::Config>> {
        let found = self.stream(stream, operation).await?.consumer_info(group).await;
        match found {
            Ok(info) => Ok(Some(pull::Config {
                durable_name: info.config.durable_name,
                deliver_policy: info.config.deliver_policy,
                ..pull::Config::default()
            })),
            Err(error) if matches!(error.kind(), ConsumerInfoErrorKind::NotFound) => Ok(None),
            Err(error) => Err(failed(ErrorKind::Unavailable, operation, error)),
        }
    }
}

#[async_trait]
impl Peer for Nats {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn record(&self) -> &Capabilities {
        &self.record
    }

    /// "A NATS header is text: the name is printable ASCII without a colon, and the value is a line". Names of NATS' own
    /// (`Nats-Msg-Id`) mean something to the server, whoever sends them.
    fn carries(&self, name: &str, value: &[u8]) -> bool {
        let is_name = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':');
        let is_line = std::str::from_utf8(value).is_ok_and(|text| !text.contains(['\r', '\n']));
        is_name && is_line && !name.is_empty() && !name.to_ascii_lowercase().starts_with("nats-")
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let mut headers = HeaderMap::new();
        for (name, value) in parcel.headers {
            headers.insert(name, value);
        }
        let subject = subject(&token(message.destination()));
        let outgoing = OutgoingMessage::produced(&subject, BytesMut::from(&parcel.payload[..])).with_headers(headers);
        let options = JetStreamOptions { message_id: Some(message.id().to_string()), ..JetStreamOptions::default() };
        let ack = self.publisher.publish_ack(outgoing, Some(&options)).await.map_err(publish_error)?;
        Ok(Receipt { position: Some(Position::new(ack.sequence)), duplicate: ack.duplicate })
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        let (stream, group) = (token(destination), token(&spec.group));
        let start = match self.durable(&stream, &group, "subscribe").await? {
            Some(durable) => durable.deliver_policy,
            None => deliver_policy(spec.start),
        };
        let source = JetStreamSubject::new(subject(&stream), stream)
            .durable(group)
            // "Soft cap on in-flight unacked deliveries", which the members of a durable share.
            .max_ack_pending(i64::try_from(spec.max_in_flight).unwrap_or(i64::MAX))
            .ack_wait(NonZeroDuration::new(spec.lease).unwrap_or(NonZeroDuration::from_secs(std::num::NonZeroU64::MIN)))
            .deliver_policy(start);
        let connected = self.connected.read().await;
        let connected = connected.as_ref().ok_or_else(|| Error::closed("subscribe"))?;
        let mut subscriber = connected
            .subscribe_with(source)
            .await
            .map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))?;
        let statistics = connected.client().statistics();
        Ok(Deliveries::driven_by(async move {
            let mut stream = std::pin::pin!(subscriber.stream());
            let mut connects = statistics.connects.load(Ordering::Relaxed);
            let mut look = tokio::time::interval(Duration::from_millis(100));
            // A place first: what is fetched ahead stays in ruststream's stream.
            while let Ok(place) = into.reserve().await {
                let item = loop {
                    tokio::select! {
                        item = stream.next() => break item,
                        _ = look.tick() => if statistics.connects.load(Ordering::Relaxed) != connects { break None },
                    }
                };
                // ruststream's stream tells nothing of a connection that was lost; the client that it hands out does.
                let now = statistics.connects.load(Ordering::Relaxed);
                let mut place = Some(place);
                if std::mem::replace(&mut connects, now) != now {
                    let told =
                        Error::new(ErrorKind::Unavailable, "receive", "the connection was lost, and is there again");
                    place.take().into_iter().for_each(|place| place.send(Err(told.duplicate())));
                    if item.is_none() {
                        continue;
                    }
                }
                let Some(item) = item else { break };
                let item: Result<Box<dyn Held>> = match item {
                    Ok(message) => Ok(Box::new(Delivered(message))),
                    Err(error) => Err(receive_error(error)),
                };
                let Ok(place) = (match place {
                    Some(place) => Ok(place),
                    None => into.reserve().await,
                }) else {
                    break;
                };
                place.send(item);
            }
        }))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let stream = token(&spec.destination);
        let mut declared = Declared::Existed;
        if let Err(error) = self.stream(&stream, "declare").await {
            if error.kind() != ErrorKind::NotFound {
                return Err(error);
            }
            let config = jetstream::stream::Config {
                name: stream.clone(),
                subjects: vec![subject(&stream)],
                ..jetstream::stream::Config::default()
            };
            self.context
                .get_or_create_stream(config)
                .await
                .map_err(|error| failed(ErrorKind::Unavailable, "declare", error))?;
            declared = Declared::Created;
        }
        let Some(group) = spec.group.as_ref().map(|group| token(group)) else { return Ok(declared) };
        if self.durable(&stream, &group, "declare").await?.is_some() {
            return Ok(declared);
        }
        // The settings that ruststream gives a consumer of this descriptor.
        let config = pull::Config {
            durable_name: Some(group),
            filter_subject: subject(&stream),
            deliver_policy: deliver_policy(spec.start),
            ack_wait: Duration::from_secs(30),
            max_ack_pending: 1_024,
            ..pull::Config::default()
        };
        self.context
            .create_consumer_on_stream(config, stream)
            .await
            .map_err(|error| failed(ErrorKind::Unavailable, "declare", error))?;
        Ok(Declared::Created)
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let stream = token(&spec.destination);
        let Some(group) = &spec.group else { return self.stream(&stream, "verify").await.map(drop) };
        match self.durable(&stream, &token(group), "verify").await? {
            Some(_) => Ok(()),
            None => Err(Error::new(ErrorKind::NotFound, "verify", "there is no such durable").with("group", group)),
        }
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let stream = token(destination);
        self.stream(&stream, "delete").await?;
        let deleted = match group {
            Some(group) => {
                self.verify(&TopologySpec::group(destination, group)).await?;
                let deleted = self.context.delete_consumer_from_stream(token(group), stream).await;
                deleted.map(drop).map_err(|error| error.to_string())
            }
            None => self.context.delete_stream(stream).await.map(drop).map_err(|error| error.to_string()),
        };
        deleted.map_err(|error| failed(ErrorKind::Unavailable, "delete", error))
    }

    async fn close(&self) -> Result<()> {
        match self.connected.write().await.take() {
            Some(connected) => match connected.shutdown().await {
                Ok(_) => Ok(()),
                Err(error) => Err(failed(ErrorKind::Unavailable, "close", error)),
            },
            None => Ok(()),
        }
    }
}

/// What ruststream's errors tell, down to the client's, which they carry.
fn publish_error(error: NatsError) -> Error {
    let client = match &error {
        NatsError::Publish(source) | NatsError::JetStream(source) => source.downcast_ref::<PublishError>(),
        _ => None,
    };
    let (kind, effect) = match (&error, client.map(PublishError::kind)) {
        (_, Some(PublishErrorKind::StreamNotFound)) => (ErrorKind::NotFound, Effect::NotDone),
        (_, Some(PublishErrorKind::MaxPayloadExceeded)) => (ErrorKind::TooLarge, Effect::NotDone),
        (_, Some(PublishErrorKind::TimedOut)) => (ErrorKind::Timeout, Effect::Unknown),
        (_, Some(_)) => (ErrorKind::Unavailable, Effect::Unknown),
        (NatsError::Closed { .. }, None) => (ErrorKind::Closed, Effect::NotDone),
        // "header … cannot be sent over NATS"
        (NatsError::Publish(_), None) => (ErrorKind::InvalidMessage, Effect::NotDone),
        _ => (ErrorKind::Unavailable, Effect::Unknown),
    };
    failed(kind, "publish", error).with_effect(effect)
}

fn receive_error(error: NatsError) -> Error {
    let client = match &error {
        NatsError::JetStream(source) => source.downcast_ref::<pull::MessagesError>(),
        _ => None,
    };
    let kind = match client.map(|client| client.kind()) {
        Some(MessagesErrorKind::ConsumerDeleted) => ErrorKind::NotFound,
        _ => ErrorKind::Unavailable,
    };
    failed(kind, "receive", error)
}

struct Delivered(NatsMessage);

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
        self.0.ack().await.map_err(|error| failed(ErrorKind::StaleDelivery, "settle", error))
    }

    async fn nack(self: Box<Self>, delay: Duration) -> Result<()> {
        let nacked = if delay.is_zero() { self.0.nack(true).await } else { self.0.nack_after(delay).await };
        nacked.map_err(|error| failed(ErrorKind::StaleDelivery, "settle", error))
    }
}
