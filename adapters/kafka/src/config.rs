//! Settings, and what they mean to librdkafka.

use std::time::Duration;

use anybroker_core::config::{Field, Problem, Section};
use rdkafka::ClientConfig;

/// The settings of section `kafka`.
pub(crate) const FIELDS: &[Field] = &[
    Field::bool("create_destinations", "Whether publishing creates a destination that is missing.", "true"),
    Field::integer("partitions", "Partitions of the destinations it creates.", 1, 10_000, "3"),
    Field::integer(
        "replication",
        "Replicas of the destinations it creates; -1 for the broker's default.",
        -1,
        100,
        "-1",
    ),
    Field::choice("compression", "How batches are compressed.", &["lz4", "none"], "lz4"),
    Field::duration("linger", "How long a message waits for others of its batch.", "5ms"),
    Field::integer(
        "message_max_bytes",
        "Largest message with key and headers; the brokers' `max.message.bytes` has to allow it.",
        131_072,
        1_000_000_000,
        "1000000",
    ),
    Field::duration("delivery_timeout", "How long the client keeps trying to store a message.", "2m"),
    Field::duration("session_timeout", "How long a dead member keeps its partitions.", "10s"),
    Field::duration("commit_interval", "How often acks are committed.", "100ms"),
    Field::duration("revoke_wait", "How long a partition that is taken away waits for its handlers.", "3s"),
    Field::integer("prefetch_kib", "KiB that the client fetches ahead for a subscription.", 64, 2_000_000, "16384"),
    Field::integer("held_retries", "Failed deliveries that one member holds back in memory.", 1, 1_000_000, "10000"),
];

/// The settings after reading.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) brokers: String,
    pub(crate) url: String,
    pub(crate) connect_timeout: Duration,
    pub(crate) create_destinations: bool,
    pub(crate) partitions: i32,
    pub(crate) replication: i32,
    pub(crate) message_max_bytes: u64,
    pub(crate) commit_interval: Duration,
    pub(crate) revoke_wait: Duration,
    pub(crate) held_retries: usize,
    compression: String,
    linger: Duration,
    delivery_timeout: Duration,
    session_timeout: Duration,
    prefetch_kib: i64,
}

impl Settings {
    pub(crate) fn read(section: &Section) -> Self {
        let small = |field: &str| i32::try_from(section.integer(field)).expect("the field's bounds are within i32");
        Self {
            brokers: section.url().hosts().join(","),
            url: section.url().to_string(),
            connect_timeout: section.connect_timeout(),
            create_destinations: section.bool("create_destinations"),
            partitions: small("partitions"),
            replication: small("replication"),
            message_max_bytes: section.integer("message_max_bytes").unsigned_abs(),
            commit_interval: section.duration("commit_interval"),
            revoke_wait: section.duration("revoke_wait"),
            held_retries: usize::try_from(section.integer("held_retries")).expect("the field's bounds are positive"),
            compression: section.text("compression").to_owned(),
            linger: section.duration("linger"),
            delivery_timeout: section.duration("delivery_timeout"),
            session_timeout: section.duration("session_timeout"),
            prefetch_kib: section.integer("prefetch_kib"),
        }
    }

    /// What the fields cannot check one by one.
    pub(crate) fn check(section: &Section) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut wrong = |key: &str, message: &str| {
            problems.push(Problem { key: key.into(), origin: "url".into(), message: message.into() });
        };
        if section.url().hosts().is_empty() {
            wrong("url", "expected at least one host, such as kafka://broker:9092");
        }
        if section.url().username().is_some() || section.url().password().is_some() {
            // Refused rather than ignored: an unauthenticated connection is not what was asked for.
            wrong("url", "user and password: authentication and TLS are not written yet in this adapter");
        }
        if !matches!(section.url().path(), "" | "/") {
            wrong("url", "a path means nothing to Kafka; destinations are named by the messages");
        }
        problems
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", "anybroker")
            // Destinations are created on purpose or not at all.
            .set("allow.auto.create.topics", "false")
            .set("reconnect.backoff.max.ms", "1000")
            .set("socket.keepalive.enable", "true");
        config
    }

    pub(crate) fn admin(&self) -> ClientConfig {
        self.client()
    }

    pub(crate) fn producer(&self) -> ClientConfig {
        let mut config = self.client();
        config
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("compression.type", &self.compression)
            .set("linger.ms", self.linger.as_millis().to_string())
            .set("message.max.bytes", self.message_max_bytes.to_string())
            .set("message.timeout.ms", self.delivery_timeout.as_millis().to_string())
            // The partition of a key is the one that the Java client would choose.
            .set("partitioner", "murmur2_random")
            // Bounds what a broker that is away makes this process keep.
            .set("queue.buffering.max.kbytes", "65536");
        config
    }

    pub(crate) fn consumer(&self, group: &str) -> ClientConfig {
        let mut config = self.client();
        config
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // Partitions that are added later start at their beginning; where the group starts is committed.
            .set("auto.offset.reset", "earliest")
            .set("isolation.level", "read_committed")
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", self.session_timeout.as_millis().to_string())
            .set("heartbeat.interval.ms", (self.session_timeout.as_millis() / 4).to_string())
            // The default of 1 s idles a consumer that is slower than the fetcher.
            .set("fetch.queue.backoff.ms", "10")
            .set("fetch.wait.max.ms", "100")
            .set("fetch.error.backoff.ms", "100")
            .set("topic.metadata.refresh.interval.ms", "10000")
            .set("queued.max.messages.kbytes", self.prefetch_kib.to_string());
        config
    }
}
