//! How many messages, and how: for each broker so that one measurement takes about a second.

/// The rows of one broker.
pub(crate) struct Plan {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// The packages of the bare client, whose versions are noted.
    pub(crate) clients: &'static [&'static str],
    /// What `Ok` of a publish and of an ack says, on both sides.
    pub(crate) publish_guarantee: &'static str,
    pub(crate) ack_guarantee: &'static str,
    /// Added to the endpoint's URL, for both sides.
    pub(crate) query: &'static str,
    /// Whether each round has destinations of its own: a log keeps what was read, and a queue of RabbitMQ may hand out again
    /// what was acked just before the channel was closed.
    pub(crate) is_fresh: bool,
    /// Whether the broker's own count of what is left is exact once everything is settled.
    pub(crate) has_lag: bool,
    /// Whether the protocol by hand is measured too.
    pub(crate) has_by_hand: bool,
    pub(crate) window: usize,
    /// A smaller window, at which publishing alone is measured too: how long an answer takes counts more there.
    pub(crate) small_window: Option<usize>,
    pub(crate) batch: usize,
    pub(crate) in_flight: usize,
    pub(crate) receive: usize,
    /// Messages of 256 B and of 16 KiB.
    pub(crate) small: usize,
    pub(crate) large: usize,
    pub(crate) large_window: usize,
}

impl Plan {
    /// How many messages of a size are on their way.
    pub(crate) fn window_of(&self, size: usize) -> usize {
        if size == SMALL { self.window } else { self.large_window }
    }
}

pub(crate) const SMALL: usize = 256;
pub(crate) const LARGE: usize = 16 * 1_024;

pub(crate) static PLANS: &[Plan] = &[
    Plan {
        name: "kafka",
        title: "Kafka",
        clients: &["rdkafka", "rdkafka-sys"],
        publish_guarantee: "acks=all, idempotent; one partition, one replica",
        ack_guarantee: "offsets committed every 100 ms, and at the close, which is in the time",
        query: "partitions=1",
        is_fresh: true,
        has_lag: true,
        has_by_hand: false,
        window: 10_000,
        small_window: Some(1_000),
        batch: 100,
        in_flight: 10_000,
        receive: 500,
        small: 1_000_000,
        large: 15_000,
        large_window: 1_000,
    },
    Plan {
        name: "rabbitmq",
        title: "RabbitMQ",
        clients: &["lapin"],
        publish_guarantee: "publisher confirm, mandatory, persistent; quorum queue, one node",
        ack_guarantee: "acks sent, several at once; all of them taken by the close of the channel, which is in the time",
        query: "",
        is_fresh: true,
        has_lag: false,
        has_by_hand: false,
        window: 1_000,
        small_window: None,
        batch: 100,
        in_flight: 1_000,
        receive: 100,
        small: 30_000,
        large: 5_000,
        large_window: 500,
    },
    Plan {
        name: "nats",
        title: "NATS JetStream",
        clients: &["async-nats"],
        publish_guarantee: "PubAck; ids remembered by the server; file storage, one replica",
        ack_guarantee: "each ack confirmed by the server",
        query: "",
        is_fresh: true,
        has_lag: true,
        has_by_hand: true,
        window: 1_000,
        small_window: None,
        batch: 100,
        in_flight: 1_000,
        receive: 100,
        small: 150_000,
        large: 15_000,
        large_window: 500,
    },
    Plan {
        name: "sqs",
        title: "SQS (ElasticMQ, an emulator)",
        clients: &["aws-sdk-sqs"],
        publish_guarantee: "SendMessageBatch of ten, each entry's answer read",
        ack_guarantee: "DeleteMessageBatch, each entry's answer read",
        query: "",
        is_fresh: false,
        has_lag: false,
        has_by_hand: false,
        window: 320,
        small_window: None,
        batch: 10,
        in_flight: 320,
        receive: 10,
        small: 5_000,
        large: 2_000,
        large_window: 320,
    },
    Plan {
        name: "pulsar",
        title: "Pulsar",
        clients: &["pulsar"],
        publish_guarantee: "receipt for each message, no batches; standalone, one bookie",
        ack_guarantee: "adapter: each ack confirmed by the broker; bare client: acks sent, it cannot ask for receipts",
        query: "",
        is_fresh: true,
        has_lag: false,
        has_by_hand: false,
        window: 1_000,
        small_window: None,
        batch: 100,
        in_flight: 1_000,
        receive: 100,
        small: 15_000,
        large: 3_000,
        large_window: 500,
    },
];

/// Whether an ack that returned `Ok` is safe at the broker. Where it is not, closing the subscription is in the time.
pub(crate) fn acks_are_confirmed(broker: &str) -> bool {
    !matches!(broker, "kafka" | "rabbitmq")
}
