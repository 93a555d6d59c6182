//! Every mode of every adapter, as data. A mode is an endpoint's settings; the suite runs on each.

use crate::brokers::with_settings;

/// One mode.
pub(crate) struct Mode {
    /// In commands, and what the report calls it.
    pub(crate) name: &'static str,
    /// The server it needs, as `cargo xtask brokers` calls it; none for what runs in the process.
    pub(crate) broker: Option<&'static str>,
    /// The feature of the command that brings the adapter in; none for what is always there.
    pub(crate) feature: Option<&'static str>,
    /// Settings that are added to the server's URL; without a server the whole URL, in which `{folder}` is an empty folder.
    pub(crate) settings: &'static str,
    /// Whether `--modes default` runs it.
    pub(crate) is_default: bool,
    /// Packages of Cargo.lock whose versions stand in the report as the client's.
    pub(crate) clients: &'static [&'static str],
    /// What stands in for the product.
    pub(crate) emulated: Option<&'static str>,
    pub(crate) pace: Pace,
}

/// How long cases wait, and how many run at once: what the adapters' own tests take.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) lease: &'static str,
    pub(crate) quiet: &'static str,
    pub(crate) patience: &'static str,
    pub(crate) parallel: u16,
    /// The same of cases about faults, each of which has seven clients at work on 2,000 messages.
    pub(crate) trials: u16,
}

const IN_PROCESS: Pace = Pace { lease: "500ms", quiet: "150ms", patience: "30s", parallel: 8, trials: 8 };
/// Kafka: members come and go by rebalances, which take seconds.
const GROUPED: Pace = Pace { lease: "2s", quiet: "2s", patience: "60s", parallel: 8, trials: 8 };
const PROMPT: Pace = Pace { lease: "1s", quiet: "500ms", patience: "30s", parallel: 8, trials: 8 };
/// SQS counts leases in whole seconds, and its emulator answers slowly.
const POLLED: Pace = Pace { lease: "2s", quiet: "2s", patience: "60s", parallel: 16, trials: 16 };
/// Its FIFO queues are asked ten times a second by every member, and hand out a key to one of them at a time. Eight trials at once
/// did not end in time on a machine that had other work to do; nor did half of those through LocalStack's FIFO topics, sixteen at once.
const LOCKED: Pace = Pace { trials: 3, ..POLLED };

const ELASTIC_MQ: Option<&str> = Some("ElasticMQ in the place of Amazon SQS");
const LOCALSTACK: Option<&str> = Some("LocalStack in the place of Amazon SQS and SNS");

macro_rules! in_process {
    ($name:literal, $settings:literal, $default:literal, $clients:expr) => {
        Mode {
            name: $name,
            broker: None,
            feature: None,
            settings: $settings,
            is_default: $default,
            clients: $clients,
            emulated: None,
            pace: IN_PROCESS,
        }
    };
}

macro_rules! on_server {
    ($name:literal, $broker:literal, $feature:literal, $settings:literal, $default:literal, $clients:expr, $emulated:expr, $pace:expr) => {
        Mode {
            name: $name,
            broker: Some($broker),
            feature: Some($feature),
            settings: $settings,
            is_default: $default,
            clients: $clients,
            emulated: $emulated,
            pace: $pace,
        }
    };
}

/// In the order in which they run. Modes of one server stand together, so that it is started once.
pub(crate) const MODES: &[Mode] = &[
    in_process!("memory", "memory://", true, &[]),
    in_process!("memory-as-kafka", "memory://?profile=kafka", false, &[]),
    in_process!("memory-as-rabbitmq", "memory://?profile=rabbitmq", false, &[]),
    in_process!("memory-as-jetstream", "memory://?profile=jetstream", false, &[]),
    in_process!("memory-as-sqs", "memory://?profile=sqs", false, &[]),
    in_process!("memory-as-pulsar", "memory://?profile=pulsar", false, &[]),
    in_process!("embedded", "embedded://{folder}/events.db?durability=synced", true, &["rusqlite"]),
    in_process!("embedded-grouped", "embedded://{folder}/events.db?durability=grouped", false, &["rusqlite"]),
    on_server!("kafka", "kafka", "kafka", "", true, &["rdkafka", "rdkafka-sys"], None, GROUPED),
    on_server!("kafka-in-place", "kafka", "kafka", "nack=in_place", false, &["rdkafka", "rdkafka-sys"], None, GROUPED),
    on_server!("rabbitmq", "rabbitmq", "rabbitmq", "", true, &["lapin"], None, PROMPT),
    on_server!("rabbitmq-classic", "rabbitmq", "rabbitmq", "queue=classic", false, &["lapin"], None, PROMPT),
    on_server!("rabbitmq-stream", "rabbitmq", "rabbitmq", "queue=stream", false, &["lapin"], None, PROMPT),
    on_server!("nats", "nats", "nats", "", true, &["async-nats"], None, PROMPT),
    on_server!("sqs", "sqs", "sqs", "", true, &["aws-sdk-sqs"], ELASTIC_MQ, POLLED),
    on_server!("sqs-fifo", "sqs", "sqs", "mode=fifo", false, &["aws-sdk-sqs"], ELASTIC_MQ, LOCKED),
    on_server!(
        "sqs-fifo-total",
        "sqs",
        "sqs",
        "mode=fifo&message_group=one",
        false,
        &["aws-sdk-sqs"],
        ELASTIC_MQ,
        LOCKED
    ),
    on_server!("sqs-sns", "localstack", "sqs", "", false, &["aws-sdk-sqs", "aws-sdk-sns"], LOCALSTACK, POLLED),
    on_server!(
        "sqs-sns-fifo",
        "localstack",
        "sqs",
        "mode=fifo",
        false,
        &["aws-sdk-sqs", "aws-sdk-sns"],
        LOCALSTACK,
        LOCKED
    ),
    on_server!("pulsar", "pulsar", "pulsar", "", true, &["pulsar"], None, PROMPT),
    on_server!("pulsar-partitions", "pulsar", "pulsar", "partitions=3", false, &["pulsar"], None, PROMPT),
];

/// On clusters of three nodes, of which every message has three copies. They are run when they are asked for.
pub(crate) const CLUSTERS: &[Mode] = &[
    on_server!("kafka-cluster", "kafka-cluster", "kafka", "", false, &["rdkafka", "rdkafka-sys"], None, GROUPED),
    on_server!("rabbitmq-cluster", "rabbitmq-cluster", "rabbitmq", "", false, &["lapin"], None, PROMPT),
    on_server!("nats-cluster", "nats-cluster", "nats", "", false, &["async-nats"], None, PROMPT),
];

/// All of them.
pub(crate) fn every() -> impl Iterator<Item = &'static Mode> + Clone {
    MODES.iter().chain(CLUSTERS)
}

impl Mode {
    /// The endpoint: `server` is its server's URL.
    pub(crate) fn url(&self, server: Option<&str>, folder: &str) -> String {
        match server {
            None => self.settings.replace("{folder}", folder),
            Some(server) => with_settings(server, self.settings),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::brokers;

    #[test]
    fn every_mode_has_a_name_of_its_own_and_a_server_that_can_be_started() {
        let mut names: Vec<&str> = every().map(|mode| mode.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), every().count());
        for mode in every() {
            let broker: Vec<String> = mode.broker.iter().map(|&name| name.to_owned()).collect();
            assert!(brokers::recipes(&broker).is_ok(), "{}: {broker:?}", mode.name);
            assert_eq!(mode.broker.is_some(), mode.feature.is_some(), "{}", mode.name);
        }
    }

    #[test]
    fn every_adapter_has_exactly_one_default_mode_and_modes_of_one_server_stand_together() {
        let mut seen: Vec<Option<&str>> = Vec::new();
        for mode in MODES {
            if mode.broker.is_some() && seen.last() != Some(&mode.broker) {
                assert!(!seen.contains(&mode.broker), "{:?} is started twice", mode.broker);
            }
            seen.push(mode.broker);
        }
        let defaults: Vec<&str> = MODES.iter().filter(|mode| mode.is_default).map(|mode| mode.name).collect();
        assert_eq!(defaults, ["memory", "embedded", "kafka", "rabbitmq", "nats", "sqs", "pulsar"]);
    }

    #[test]
    fn settings_are_added_to_what_the_url_has_already() {
        let mode = MODES.iter().find(|mode| mode.name == "sqs-fifo").unwrap();
        assert_eq!(mode.url(Some("sqs://h?region=x"), ""), "sqs://h?region=x&mode=fifo");
        assert_eq!(mode.url(Some("sqs://h"), ""), "sqs://h?mode=fifo");
        let embedded = MODES.iter().find(|mode| mode.name == "embedded").unwrap();
        assert!(embedded.url(None, "/f").starts_with("embedded:///f/events.db?"));
    }
}
