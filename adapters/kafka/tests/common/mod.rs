//! The broker that the environment names.
#![allow(dead_code, reason = "each test binary uses its share")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::PathBuf;
use std::time::Duration;

use anybroker_core::{Bus, Config, Delivery, Message, MessageId, Registry, Subscriber};
use anybroker_kafka::KafkaDriver;
use tokio::time::Instant;

pub(crate) const LONG: Duration = Duration::from_secs(30);
/// An absence is shown by nothing coming for that long, and something coming afterwards.
pub(crate) const QUIET: Duration = Duration::from_secs(2);

/// The URL of the broker, or `None` after saying why the test does not run.
pub(crate) fn url() -> Option<String> {
    const VARIABLE: &str = "ANYBROKER_TEST_KAFKA_URL";
    let url = std::env::var(VARIABLE).ok().filter(|url| !url.is_empty());
    if url.is_none() {
        println!("not run: {VARIABLE} is not set (cargo xtask brokers up kafka)");
        let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
        assert!(!is_required, "{VARIABLE} is not set, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
    }
    url
}

/// The server that `cargo xtask brokers up kafka` started.
pub(crate) struct Server {
    pub(crate) folder: PathBuf,
    properties: String,
}

impl Server {
    /// `None` after saying why the test does not run.
    pub(crate) fn find() -> Option<Self> {
        url()?;
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state/anybroker"));
        let state = std::env::var_os("ANYBROKER_STATE").map(PathBuf::from).or_else(home).unwrap();
        let instance = std::env::var("ANYBROKER_INSTANCE").unwrap_or_else(|_| "dev".into());
        let folder = state.join("brokers").join(instance).join("kafka");
        let Ok(properties) = std::fs::read_to_string(folder.join("server.properties")) else {
            println!("not run: {} is not a server of `cargo xtask brokers`", folder.display());
            return None;
        };
        Some(Self { folder, properties })
    }

    /// The port of a listener in `listeners` or `advertised.listeners`.
    pub(crate) fn port(&self, setting: &str, listener: &str) -> u16 {
        let line = self.properties.lines().find_map(|line| line.strip_prefix(setting)?.strip_prefix('=')).unwrap();
        let address = line.split(',').find_map(|address| address.strip_prefix(listener)?.strip_prefix("://")).unwrap();
        address.rsplit_once(':').unwrap().1.parse().unwrap()
    }
}

impl Server {
    /// Runs one of Kafka's own tools against it, with the program and the classes that it runs with itself.
    pub(crate) fn tool(&self, class: &str, arguments: &[&str]) {
        let address = format!("127.0.0.1:{}", self.port("listeners", "PLAINTEXT"));
        let mine = self.folder.join("server.properties").display().to_string();
        let words = |process: PathBuf| -> Vec<String> {
            let words = std::fs::read(process.join("cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
        };
        let processes = std::fs::read_dir("/proc").unwrap().map(|process| words(process.unwrap().path()));
        let server = processes.into_iter().find(|words| words.contains(&mine)).expect("a process of the server");
        let classes = server.iter().position(|word| word == "-cp" || word == "-classpath").unwrap() + 1;
        let status = std::process::Command::new(&server[0])
            .args(["-cp", &server[classes], class, "--bootstrap-server", &address])
            .args(arguments)
            .stdout(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success(), "{class}");
    }
}

/// The command that kills, freezes and starts the broker; `None` after saying why the test does not run.
pub(crate) fn xtask() -> Option<impl Fn(&str) + Send + Sync + 'static> {
    let Some(xtask) = std::env::var_os("ANYBROKER_XTASK") else {
        println!("not run: ANYBROKER_XTASK is not set (cargo xtask test sets it)");
        return None;
    };
    Some(move |verb: &str| {
        let status = std::process::Command::new(&xtask).args(["brokers", verb, "kafka"]).status();
        assert!(status.unwrap().success(), "{verb}");
    })
}

pub(crate) async fn connect(url: &str, settings: &'static str) -> Bus {
    try_connect(url.to_owned(), settings).await.unwrap()
}

pub(crate) async fn try_connect(url: String, settings: &'static str) -> anybroker_core::Result<Bus> {
    let separator = if url.contains('?') { '&' } else { '?' };
    let registry = Registry::new().with(KafkaDriver);
    registry.connect(Config::from_url(format!("{url}{separator}{settings}"))).await
}

/// A name that no other test and no other run uses.
pub(crate) fn unique(name: &str) -> String {
    format!("{name}.{}", MessageId::new())
}

/// Numbered messages, all of one key and so of one partition.
pub(crate) fn numbered(destination: &str, numbers: std::ops::Range<u32>) -> Vec<Message> {
    numbers.map(|number| Message::new(destination, number.to_string()).with_key("k")).collect()
}

pub(crate) fn number(delivery: &Delivery) -> u32 {
    std::str::from_utf8(delivery.message().bytes()).unwrap().parse().unwrap()
}

pub(crate) async fn publish(bus: &Bus, batch: Vec<Message>) {
    for outcome in bus.publish(batch).await {
        outcome.unwrap();
    }
}

/// Receives until there are `count`.
pub(crate) async fn receive(subscriber: &mut Subscriber, count: usize) -> Vec<Delivery> {
    let deadline = Instant::now() + LONG;
    let mut deliveries = Vec::new();
    while deliveries.len() < count {
        assert!(Instant::now() < deadline, "{} of {count} arrived", deliveries.len());
        deliveries.extend(subscriber.receive(count - deliveries.len(), Duration::from_secs(1)).await.unwrap());
    }
    deliveries
}

/// Nothing comes for a while.
pub(crate) async fn nothing(subscriber: &mut Subscriber) {
    let deliveries = subscriber.receive(10, QUIET).await.unwrap();
    assert!(deliveries.is_empty(), "{deliveries:?}");
}
