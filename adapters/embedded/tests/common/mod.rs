//! What the tests share.
#![allow(clippy::unwrap_used, reason = "test code")]
#![allow(dead_code, reason = "each test file uses some of it")]

pub(crate) mod child;
pub(crate) mod trace;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anybroker_core::{Bus, BusOptions, Clock, Delivery, ManualClock, Message, Subscriber};
use anybroker_embedded::{EmbeddedBroker, Settings};
use tempfile::TempDir;

pub(crate) const NOW: Duration = Duration::ZERO;
/// Long enough for anything that is on its way on this machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A file in a directory of its own.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("events.db")
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings::new(self.path())
    }
}

/// A broker whose clock stands still.
pub(crate) async fn manual() -> (Bus, ManualClock, Place) {
    built(|_| {}).await
}

pub(crate) async fn built(change: impl FnOnce(&mut Settings)) -> (Bus, ManualClock, Place) {
    let (clock, place) = (ManualClock::new(), Place::new());
    let mut settings = place.settings();
    change(&mut settings);
    (open(settings, clock.clone()).await, clock, place)
}

/// A broker with the real clock.
pub(crate) async fn real(path: &Path) -> Bus {
    let broker = EmbeddedBroker::open(Settings::new(path)).await.unwrap();
    Bus::new(Arc::new(broker), BusOptions::default())
}

pub(crate) async fn open(settings: Settings, clock: impl Clock) -> Bus {
    let broker = EmbeddedBroker::open_with_clock(settings, Arc::new(clock)).await.unwrap();
    Bus::new(Arc::new(broker), BusOptions::default())
}

pub(crate) async fn publish(bus: &Bus, destination: &str, payloads: &[&str]) {
    let batch = payloads.iter().map(|payload| Message::new(destination, payload.to_string())).collect();
    for outcome in bus.publish(batch).await {
        outcome.unwrap();
    }
}

/// `key:payload` pairs.
pub(crate) async fn publish_keyed(bus: &Bus, destination: &str, messages: &[(&str, &str)]) {
    let keyed =
        |(key, payload): &(&str, &str)| Message::new(destination, payload.to_string()).with_key(key.to_string());
    for outcome in bus.publish(messages.iter().map(keyed).collect()).await {
        outcome.unwrap();
    }
}

/// What is there now.
pub(crate) async fn ready(subscriber: &mut Subscriber) -> Vec<Delivery> {
    subscriber.receive(10_000, NOW).await.unwrap()
}

/// The one delivery that is there now.
pub(crate) async fn one(subscriber: &mut Subscriber) -> Delivery {
    let mut deliveries = ready(subscriber).await;
    assert_eq!(deliveries.len(), 1, "{:?}", texts(&deliveries));
    deliveries.pop().unwrap()
}

pub(crate) fn text(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().bytes()).into_owned()
}

pub(crate) fn texts(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(text).collect()
}

/// Takes the delivery with that payload out of `deliveries`.
pub(crate) fn pick(deliveries: &mut Vec<Delivery>, payload: &str) -> Delivery {
    let place = deliveries.iter().position(|delivery| text(delivery) == payload).unwrap();
    deliveries.remove(place)
}

pub(crate) async fn ack_all(deliveries: Vec<Delivery>) {
    for outcome in anybroker_core::ack(deliveries).await {
        outcome.unwrap();
    }
}

/// Acks what is there now and tells what it was.
pub(crate) async fn done(subscriber: &mut Subscriber) -> Vec<String> {
    let deliveries = ready(subscriber).await;
    let seen = texts(&deliveries);
    ack_all(deliveries).await;
    seen
}

/// Waits until the group has nothing left to do, however long that takes on this machine: as long as it becomes less.
pub(crate) async fn worked_off(bus: &Bus, destination: &str, group: &str) {
    let (mut least, mut until) = (u64::MAX, Instant::now() + SOON);
    loop {
        let lag = bus.lag(destination, group).await.unwrap();
        let left = lag.total().unwrap();
        if left == 0 {
            return;
        }
        if left < least {
            (least, until) = (left, Instant::now() + SOON);
        }
        assert!(Instant::now() < until, "nothing more is settled: {lag:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
