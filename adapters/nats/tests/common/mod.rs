//! The server that the environment names.
#![allow(dead_code, reason = "each test binary uses its share")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

pub(crate) mod line;
pub(crate) mod server;

use std::time::Duration;

use anybroker_core::{Bus, Config, Delivery, Message, MessageId, Registry, Result, Subscriber};
use anybroker_nats::NatsDriver;
use tokio::time::Instant;

pub(crate) const LONG: Duration = Duration::from_secs(30);
/// An absence is shown by nothing coming for that long, and something coming afterwards.
pub(crate) const QUIET: Duration = Duration::from_secs(1);

/// The URL of the server, or `None` after saying why the test does not run.
pub(crate) fn url() -> Option<String> {
    const VARIABLE: &str = "ANYBROKER_TEST_NATS_URL";
    let url = std::env::var(VARIABLE).ok().filter(|url| !url.is_empty());
    if url.is_none() {
        println!("not run: {VARIABLE} is not set (cargo xtask brokers up nats)");
        let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
        assert!(!is_required, "{VARIABLE} is not set, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
    }
    url
}

pub(crate) async fn try_connect(url: &str, settings: &str) -> Result<Bus> {
    let separator = if url.contains('?') { '&' } else { '?' };
    let url = if settings.is_empty() { url.to_owned() } else { format!("{url}{separator}{settings}") };
    Registry::new().with(NatsDriver).connect(Config::from_url(url)).await
}

pub(crate) async fn connect(url: &str, settings: &str) -> Bus {
    try_connect(url, settings).await.unwrap()
}

/// A name that no other test and no other run uses.
pub(crate) fn unique(name: &str) -> String {
    format!("{name}.{}", MessageId::new())
}

/// Numbered messages, all of one key.
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
