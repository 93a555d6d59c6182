//! The broker that the environment names.
#![allow(dead_code, reason = "each test binary uses its share")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::time::Duration;

use anybroker_core::{Bus, Config, Delivery, Message, MessageId, Registry, Subscriber};
use anybroker_sqs::SqsDriver;
use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use tokio::time::Instant;

pub(crate) const LONG: Duration = Duration::from_secs(30);
/// An absence is shown by nothing coming for that long, and something coming afterwards.
pub(crate) const QUIET: Duration = Duration::from_secs(2);

/// The URL of a server with queues only, or `None` after saying why the test does not run.
pub(crate) fn url() -> Option<String> {
    named("ANYBROKER_TEST_SQS_URL", "sqs")
}

/// The URL of a server with queues and topics.
pub(crate) fn localstack_url() -> Option<String> {
    named("ANYBROKER_TEST_LOCALSTACK_URL", "localstack")
}

fn named(variable: &str, broker: &str) -> Option<String> {
    let url = std::env::var(variable).ok().filter(|url| !url.is_empty());
    if url.is_none() {
        println!("not run: {variable} is not set (cargo xtask brokers up {broker})");
        let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
        assert!(!is_required, "{variable} is not set, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
    }
    url
}

/// The host and port of a URL.
pub(crate) fn host(url: &str) -> String {
    url.split_once("://").unwrap().1.split(['?', '/']).next().unwrap().to_owned()
}

/// The bare client.
pub(crate) fn bare(url: &str) -> aws_sdk_sqs::Client {
    let config = aws_sdk_sqs::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .endpoint_url(format!("http://{}", host(url)))
        .region(Region::new("elasticmq"))
        .credentials_provider(Credentials::new("k", "s", None, None, "test"))
        .build();
    aws_sdk_sqs::Client::from_conf(config)
}

pub(crate) async fn connect(url: &str, settings: &'static str) -> Bus {
    try_connect(url.to_owned(), settings).await.unwrap()
}

pub(crate) async fn try_connect(url: String, settings: &'static str) -> anybroker_core::Result<Bus> {
    let separator = if url.contains('?') { '&' } else { '?' };
    let registry = Registry::new().with(SqsDriver);
    registry.connect(Config::from_url(format!("{url}{separator}{settings}"))).await
}

/// A name that no other test and no other run uses.
pub(crate) fn unique(name: &str) -> String {
    format!("{name}.{}", MessageId::new())
}

/// Numbered messages.
pub(crate) fn numbered(destination: &str, numbers: std::ops::Range<u32>) -> Vec<Message> {
    numbers.map(|number| Message::new(destination, number.to_string())).collect()
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
