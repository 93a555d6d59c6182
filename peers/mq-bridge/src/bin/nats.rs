//! `mq-bridge`'s NATS endpoints on JetStream, under AnyBroker's suite.
//!
//! A destination is a stream of mq-bridge's shape, `STREAM.>`, and one subject of it. The durable is mq-bridge's, which names it after
//! stream and subject: a destination has one group. A bare client makes streams, looks whether things are there, and deletes.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::capability::{Capabilities, Limits, Support};
use anybroker_core::naming::{escape, shorten};
use anybroker_core::{
    Bus, BusOptions, Declared, Destination, Endpoint, Error, ErrorKind, Group, Message, Receipt, Result, Start,
    SubscribeSpec, TopologySpec,
};
use async_nats::jetstream::consumer::DeliverPolicy;
use async_nats::jetstream::context::{ConsumerInfoErrorKind, GetStreamErrorKind};
use async_nats::jetstream::{self, ErrorCode};
use async_trait::async_trait;
use mq_bridge::endpoints::nats::{NatsConsumer, NatsPublisher};
use mq_bridge::models::{NatsConfig, NatsDeliverPolicy};
use peer_mq_bridge::{PEER, Publishers, receiving};
use peers_common::{Deliveries, Parcel, Peer, PeerBroker, Sender, Setup, disown, failed, is_owner, one_group, refused};

/// The server's default `ack_wait`: `NatsConfig` has no word for it.
const ACK_WAIT: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    peers_common::main(Setup {
        peer: PEER,
        client: "async-nats 0.50.0",
        connect: |url, _| Box::pin(async move { connect(url).await }),
        lease: ACK_WAIT,
        quiet: Duration::from_secs(2),
        patience: Duration::from_secs(60),
        // NatsPublisher::new creates the stream that is missing, whatever NatsConfig says.
        has_strict: false,
    })
}

async fn connect(url: String) -> Result<Bus> {
    let bare = async_nats::connect(&url).await.map_err(|error| failed(ErrorKind::Unavailable, "connect", error))?;
    let version = bare.server_info().version;
    let peer = Bridge {
        endpoint: Endpoint {
            scheme: "mq-bridge",
            mode: "jetstream".into(),
            url: url.clone(),
            server: format!("NATS {version}"),
        },
        record: record(),
        bare: jetstream::new(bare),
        publishers: Publishers::default(),
        url,
    };
    Ok(Bus::new(Arc::new(PeerBroker::new(peer, true)), BusOptions::default()))
}

fn record() -> Capabilities {
    Capabilities {
        // JetStream's, at the server's default.
        lease: Support::Native,
        groups: refused(
            "its durable is named after stream and subject; those of subscriber_mode live with their connection",
        ),
        // NatsConfig::deliver_policy: "The delivery policy for the consumer. Defaults to \"all\"."
        kept_before_group: Support::Native,
        start_latest: Support::Native,
        unroutable_detected: Support::Native,
        publish_dedup: refused("`deduplicate` sends an id, but its answer does not tell a duplicate"),
        // As AnyBroker's own record of JetStream: the file of acks is not written at once.
        survives_process_kill: Support::emulated("the server may forget acks of the last moment"),
        limits: Limits {
            // The server's default max_payload, less the headers.
            payload: Some(950_000),
            lease_min_ms: Some(30_000),
            lease_max_ms: Some(30_000),
            ..Limits::default()
        },
        ..peer_mq_bridge::record()
    }
}

/// A name for a stream. mq-bridge makes the durable's of it, in which a server refuses dots and spaces.
fn stream(destination: &Destination) -> String {
    let escaped = escape(destination, "=", |byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    if escaped.len() <= 100 { escaped } else { shorten(&escaped, "=", 60, destination) }
}

/// The durable that mq-bridge makes, which its documentation does not name: `durable_name` in `endpoints/nats.rs`.
fn durable(destination: &Destination) -> String {
    let stream = stream(destination);
    format!("mq-bridge-{stream}-{stream}-m")
}

struct Bridge {
    endpoint: Endpoint,
    record: Capabilities,
    url: String,
    bare: jetstream::Context,
    publishers: Publishers<NatsPublisher>,
}

impl Bridge {
    fn config(&self, destination: &Destination) -> NatsConfig {
        let stream = stream(destination);
        NatsConfig {
            url: self.url.clone(),
            subject: Some(format!("{stream}.m")),
            stream: Some(stream),
            // By default all publishers of the process have one connection: each client of a case wants its own.
            shared: Some(false),
            ..NatsConfig::default()
        }
    }

    async fn stream(&self, destination: &Destination, operation: &'static str) -> Result<jetstream::stream::Stream> {
        self.bare.get_stream(stream(destination)).await.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(told) if told.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                failed(ErrorKind::NotFound, operation, error)
            }
            _ => failed(ErrorKind::Unavailable, operation, error),
        })
    }

    /// Where the durable starts, if it is there.
    async fn start(&self, destination: &Destination, operation: &'static str) -> Result<Option<Start>> {
        match self.stream(destination, operation).await?.consumer_info(durable(destination)).await {
            Ok(info) if info.config.deliver_policy == DeliverPolicy::New => Ok(Some(Start::Latest)),
            Ok(_) => Ok(Some(Start::Earliest)),
            Err(error) if matches!(error.kind(), ConsumerInfoErrorKind::NotFound) => Ok(None),
            Err(error) => Err(failed(ErrorKind::Unavailable, operation, error)),
        }
    }

    async fn consumer(
        &self,
        destination: &Destination,
        start: Start,
        prefetch: Option<usize>,
    ) -> Result<(NatsConfig, NatsConsumer)> {
        let policy = if start == Start::Latest { NatsDeliverPolicy::New } else { NatsDeliverPolicy::All };
        let config = NatsConfig { deliver_policy: Some(policy), prefetch_count: prefetch, ..self.config(destination) };
        let built = NatsConsumer::new(&config).await;
        let consumer = built.map_err(|error| failed(ErrorKind::Unavailable, "subscribe", error))?;
        Ok((config, consumer))
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

    /// Metadata is "string key/value pairs next to the payload"; "NATS cannot carry this metadata entry as a header (name with a
    /// space, ':' or non-ASCII, or a value with a line break); it is left out" (a warning in its log). NATS does not count spaces
    /// around a value to it, and mq-bridge leaves out an empty one.
    fn carries(&self, name: &str, value: &[u8]) -> bool {
        let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':');
        let is_line = std::str::from_utf8(value)
            .is_ok_and(|text| !text.contains(['\r', '\n']) && !text.is_empty() && text.trim() == text);
        let is_natss = name.to_ascii_lowercase().starts_with("nats-");
        let is_mq_bridges = name.starts_with("mqb.src.") || name == "mq_bridge.message_id";
        is_name && is_line && !is_natss && !is_mq_bridges
    }

    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt> {
        let destination = message.destination();
        let config = self.config(destination);
        self.publishers.send(destination, NatsPublisher::new(&config), parcel, Some("stream not found")).await
    }

    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries> {
        one_group(destination, &spec.group, "subscribe")?;
        let start = self.start(destination, "subscribe").await?.unwrap_or(spec.start);
        let (config, consumer) = self.consumer(destination, start, Some(spec.max_in_flight)).await?;
        let again = move || {
            let config = config.clone();
            async move { NatsConsumer::new(&config).await }
        };
        Ok(receiving(consumer, again, into))
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        if let Some(group) = &spec.group {
            one_group(&spec.destination, group, "declare")?;
        }
        let mut declared = Declared::Existed;
        if let Err(error) = self.stream(&spec.destination, "declare").await {
            if error.kind() != ErrorKind::NotFound {
                return Err(error);
            }
            let name = stream(&spec.destination);
            let config = jetstream::stream::Config {
                subjects: vec![format!("{name}.>")],
                name,
                ..jetstream::stream::Config::default()
            };
            let made = self.bare.get_or_create_stream(config).await;
            made.map_err(|error| failed(ErrorKind::Unavailable, "declare", error))?;
            declared = Declared::Created;
        }
        if spec.group.is_some() && self.start(&spec.destination, "declare").await?.is_none() {
            // mq-bridge makes a durable when it consumes.
            self.consumer(&spec.destination, spec.start, None).await?;
            declared = Declared::Created;
        }
        Ok(declared)
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let has_durable = self.start(&spec.destination, "verify").await?.is_some();
        match &spec.group {
            Some(group) if !has_durable || !is_owner(&spec.destination, group) => {
                Err(Error::new(ErrorKind::NotFound, "verify", "there is no such durable"))
            }
            _ => Ok(()),
        }
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.verify(&TopologySpec { group: group.cloned(), ..TopologySpec::destination(destination) }).await?;
        disown(destination);
        let unavailable = |error: &dyn std::fmt::Display| failed(ErrorKind::Unavailable, "delete", error);
        if group.is_some() {
            let stream = self.stream(destination, "delete").await?;
            return stream.delete_consumer(&durable(destination)).await.map(drop).map_err(|error| unavailable(&error));
        }
        self.bare.delete_stream(stream(destination)).await.map(drop).map_err(|error| unavailable(&error))
    }

    async fn close(&self) -> Result<()> {
        // Consumers are closed by dropping them; publishers have no close.
        self.publishers.clear();
        Ok(())
    }
}
