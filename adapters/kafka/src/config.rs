//! Settings, and what they mean to librdkafka.

use std::time::Duration;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Credentials, Login};
use rdkafka::ClientConfig;

use crate::publisher::TRANSACTION_BATCH;

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
    Field::choice(
        "nack",
        "Where a failed message waits: on the group's retry topic, which survives its member, or in place, in its \
         member's memory, which can keep the order of its key.",
        &["retry_topic", "in_place"],
        "retry_topic",
    ),
    Field::integer(
        "held_retries",
        "Messages that one member holds back in memory until their time.",
        1,
        1_000_000,
        "10000",
    ),
    Field::integer("held_mib", "MiB that those may take.", 1, 1_000_000, "64"),
    Field::text(
        "transactional_id",
        "The name of this process in transactions. A process that connects with the same name fences this one, and takes \
         back what it left open. Without it a random one.",
    ),
    Field::duration(
        "transaction_timeout",
        "How long a transaction may be open; then the broker takes it back. A commit or abort ends within that time too.",
        "30s",
    ),
    Field::integer("open_transactions", "Transactions that are open at the same time; more wait.", 1, 1_000, "8"),
    Field::duration("dead_letter_retention", "How long created dead-letter topics keep a letter.", "7d"),
    Field::bool("tls", "Whether the connection is encrypted.", "false"),
    Field::text("tls_ca", "A file of the certificate authorities (PEM) to trust instead of the system's."),
    Field::text("tls_certificate", "A file of this client's certificate (PEM)."),
    Field::text("tls_key", "A file of this client's private key (PEM)."),
    Field::bool(
        "danger_accept_any_certificate",
        "Whether any certificate of any host is taken. Whoever sits in between reads everything.",
        "false",
    ),
    Field::choice(
        "sasl",
        "How the user and password of the URL are shown to the cluster.",
        &["scram_sha_512", "scram_sha_256", "plain"],
        "scram_sha_512",
    ),
];

/// Room on the group's own topics for a note beside a message of any destination.
const NOTE_ROOM: u64 = 65_536;

/// How long a request may be without an answer before its connection is taken for dead (`socket.timeout.ms`, by default a minute). As long
/// as that a client whose connection ended in silence stands still: a publisher does not find its topic, and a member does not get into
/// its group.
const ANSWERED: Duration = Duration::from_secs(10);

/// How much less that is than the time of a transaction, which is 1 s at least.
const TOLD: Duration = Duration::from_millis(100);

/// How the cluster is spoken to. `Debug` shows no secret.
#[derive(Debug, Clone)]
struct Security {
    tls: bool,
    ca: Option<String>,
    client: Option<(String, String)>,
    accept_any: bool,
    mechanism: &'static str,
    login: Option<Login>,
}

impl Security {
    fn read(section: &Section) -> Self {
        let text = |field: &str| section.optional_text(field).map(ToOwned::to_owned);
        Self {
            tls: section.bool("tls"),
            ca: text("tls_ca"),
            client: text("tls_certificate").zip(text("tls_key")),
            accept_any: section.bool("danger_accept_any_certificate"),
            mechanism: match section.text("sasl") {
                "plain" => "PLAIN",
                "scram_sha_256" => "SCRAM-SHA-256",
                _ => "SCRAM-SHA-512",
            },
            login: section.login().cloned(),
        }
    }

    fn apply(&self, config: &mut ClientConfig) {
        let protocol = match (self.tls, &self.login) {
            (false, None) => return,
            (true, None) => "SSL",
            (false, Some(_)) => "SASL_PLAINTEXT",
            (true, Some(_)) => "SASL_SSL",
        };
        config.set("security.protocol", protocol);
        if self.login.is_some() {
            config.set("sasl.mechanism", self.mechanism);
        }
        if let Some(Credentials::Password { user, password }) = self.login.as_ref().and_then(Login::shown) {
            config.set("sasl.username", user).set("sasl.password", password.reveal());
        }
        if !self.tls {
            return;
        }
        if let Some(ca) = &self.ca {
            config.set("ssl.ca.location", ca);
        }
        if let Some((certificate, key)) = &self.client {
            config.set("ssl.certificate.location", certificate).set("ssl.key.location", key);
        }
        if self.accept_any {
            config
                .set("enable.ssl.certificate.verification", "false")
                .set("ssl.endpoint.identification.algorithm", "none");
        }
    }
}

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
    pub(crate) nack_in_place: bool,
    pub(crate) held_retries: usize,
    pub(crate) held_bytes: usize,
    pub(crate) dead_letter_retention: Duration,
    pub(crate) transactional_id: Option<String>,
    pub(crate) transaction_timeout: Duration,
    pub(crate) open_transactions: usize,
    security: Security,
    compression: String,
    linger: Duration,
    delivery_timeout: Duration,
    pub(crate) session_timeout: Duration,
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
            nack_in_place: section.text("nack") == "in_place",
            held_retries: usize::try_from(section.integer("held_retries")).expect("the field's bounds are positive"),
            held_bytes: usize::try_from(section.integer("held_mib")).expect("the field's bounds are positive") << 20,
            dead_letter_retention: section.duration("dead_letter_retention"),
            transactional_id: section.optional_text("transactional_id").map(ToOwned::to_owned),
            transaction_timeout: section.duration("transaction_timeout"),
            open_transactions: usize::try_from(section.integer("open_transactions"))
                .expect("the field's bounds are positive"),
            security: Security::read(section),
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
        if section.url().password().is_some() && section.url().username().is_none() {
            wrong("url", "a password without a user; expected user:password@host");
        }
        let is_set = |field: &str| section.optional_text(field).is_some();
        if is_set("tls_certificate") != is_set("tls_key") {
            wrong("kafka.tls_key", "tls_certificate and tls_key belong together; one of them is missing");
        }
        let is_danger = section.bool("danger_accept_any_certificate");
        if !section.bool("tls") && (is_set("tls_ca") || is_set("tls_certificate") || is_danger) {
            // Ignored, they would make believe that the connection is encrypted.
            wrong("kafka.tls", "is off, and settings of it are given; expected tls=true with them");
        }
        if section.bool("tls") && !cfg!(feature = "tls") {
            wrong("kafka.tls", "this program was built without the feature `tls` of anybroker-kafka");
        }
        if section.login().is_some() && section.text("sasl") != "plain" && !cfg!(feature = "tls") {
            wrong(
                "kafka.sasl",
                "this program was built without the feature `tls` of anybroker-kafka, which SCRAM needs",
            );
        }
        let timeout = section.duration("transaction_timeout");
        if !(Duration::from_secs(1)..=Duration::from_secs(900)).contains(&timeout) {
            // Brokers refuse more than transaction.max.timeout.ms, 15 minutes.
            wrong("kafka.transaction_timeout", "expected 1s to 15m");
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
            .set("socket.keepalive.enable", "true")
            .set("socket.timeout.ms", ANSWERED.as_millis().to_string());
        self.security.apply(&mut config);
        config
    }

    /// Where user and password come from.
    pub(crate) fn login(&self) -> Option<&Login> {
        self.security.login.as_ref()
    }

    /// The mode as it is called in reports.
    pub(crate) fn mode(&self) -> &'static str {
        if self.nack_in_place { "in_place" } else { "default" }
    }

    /// The largest record on a group's own topics.
    pub(crate) fn own_max_bytes(&self) -> u64 {
        self.message_max_bytes + NOTE_ROOM
    }

    pub(crate) fn admin(&self) -> ClientConfig {
        self.client()
    }

    /// `batch` bounds what is put into one batch, in bytes.
    pub(crate) fn producer(&self, batch: Option<usize>) -> ClientConfig {
        let mut config = self.client();
        if let Some(batch) = batch {
            config.set("batch.size", batch.to_string());
        }
        config
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("compression.type", &self.compression)
            .set("linger.ms", self.linger.as_millis().to_string())
            .set("message.max.bytes", self.own_max_bytes().to_string())
            .set("message.timeout.ms", self.delivery_timeout.as_millis().to_string())
            // The partition of a key is the one that the Java client would choose.
            .set("partitioner", "murmur2_random")
            // Bounds what a broker that is away makes this process keep.
            .set("queue.buffering.max.kbytes", "65536");
        config
    }

    /// One of the clients for transactions.
    pub(crate) fn transactional(&self, id: &str) -> ClientConfig {
        let mut config = self.producer(Some(TRANSACTION_BATCH));
        config
            .set("transactional.id", id)
            .set("transaction.timeout.ms", self.transaction_timeout.as_millis().to_string())
            // As librdkafka does by itself: one request at least can be sent before the transaction's time is over.
            .set("socket.timeout.ms", ANSWERED.min(self.transaction_timeout - TOLD).as_millis().to_string())
            // What the broker has taken back must not be tried any longer.
            .set("message.timeout.ms", self.delivery_timeout.min(self.transaction_timeout).as_millis().to_string());
        config
    }

    /// For offsets and letters: it never joins the group.
    pub(crate) fn reader(&self, group: &str) -> ClientConfig {
        let mut config = self.consumer(group);
        config.set("enable.partition.eof", "true");
        config
    }

    /// The same for everything that is stored, also in transactions that have not ended.
    pub(crate) fn reader_of_all(&self, group: &str) -> ClientConfig {
        let mut config = self.reader(group);
        config.set("isolation.level", "read_uncommitted");
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
            // Members learn of a rebalance by their heartbeats: it takes as long as the slowest of them.
            .set("heartbeat.interval.ms", (self.session_timeout.as_millis() / 20).clamp(50, 1_000).to_string())
            // The default of 1 s idles a consumer that is slower than the fetcher.
            .set("fetch.queue.backoff.ms", "10")
            .set("fetch.wait.max.ms", "100")
            .set("fetch.error.backoff.ms", "100")
            .set("topic.metadata.refresh.interval.ms", "10000")
            .set("queued.max.messages.kbytes", self.prefetch_kib.to_string());
        config
    }
}
