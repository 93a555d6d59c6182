//! What a killed, restarted or frozen broker and a killed consumer must not break.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::{HashMap, HashSet};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{
    Bus, Effect, ErrorKind, Message, Nack, Order, PublishOptions, Settlement, SubscriptionEvent, ack, settle,
};
use common::{LONG, connect, number, numbered, publish, receive, unique, url};
use tokio::time::Instant;

const CRASHER: &str = "ANYBROKER_PULSAR_TEST_CRASHER";

/// A broker of this test's own, by the project's own commands; `None` after saying why there is none.
struct Server {
    instance: String,
    url: String,
}

impl Server {
    fn start(name: &str) -> Option<Self> {
        url()?;
        let Ok(xtask) = std::env::var("ANYBROKER_XTASK") else {
            println!("not run: ANYBROKER_XTASK is not set (the path of the project's xtask binary)");
            let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
            assert!(!is_required, "ANYBROKER_XTASK is not set, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
            return None;
        };
        let instance = format!("pulsar-{name}-{}", std::process::id());
        let up = Command::new(xtask)
            .args(["brokers", "--instance", &instance, "up", "pulsar", "--how", "native"])
            .output()
            .unwrap();
        assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
        let output = String::from_utf8(up.stdout).unwrap();
        let url = output.split('\'').nth(1).unwrap().to_owned();
        Some(Self { instance, url })
    }

    fn run(&self, verb: &str) {
        let xtask = std::env::var("ANYBROKER_XTASK").unwrap();
        let done =
            Command::new(xtask).args(["brokers", "--instance", &self.instance, verb, "pulsar"]).output().unwrap();
        assert!(done.status.success(), "{verb}: {}", String::from_utf8_lossy(&done.stderr));
    }

    async fn does(&self, verb: &'static str) {
        let server = Self { instance: self.instance.clone(), url: self.url.clone() };
        tokio::task::spawn_blocking(move || {
            server.run(verb);
            std::mem::forget(server);
        })
        .await
        .unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.run("down");
    }
}

const PUBLISHERS: u32 = 4;
const EACH: u32 = 1_000;

/// One broker for all of it: starting one takes longer than the rest of the test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_killed_or_frozen_in_the_middle_loses_nothing_that_was_confirmed() {
    let Some(server) = Server::start("kill") else { return };
    let bus = connect(&server.url, "publish_timeout=3s").await;
    let failing = unique("attempts");
    let spec = bus.subscription(failing.as_str(), "g").with_max_attempts(None);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    publish(&bus, numbered(&failing, 0..3)).await;
    let mut deliveries = receive(&mut subscriber, 3).await;
    deliveries.sort_by_key(number);
    let kept = deliveries.split_off(1);
    let delay = Duration::from_secs(4);
    let nacked = Instant::now();
    deliveries.remove(0).nack(delay).await.unwrap();
    for outcome in ack(kept).await {
        outcome.unwrap();
    }

    killed_in_the_middle(&server, &bus).await;

    let back = receive(&mut subscriber, 1).await.remove(0);
    assert!(nacked.elapsed() >= delay, "it came back after {:?} of {delay:?}", nacked.elapsed());
    assert_eq!((number(&back), back.attempt()), (0, 2), "its attempts survive the broker's crash");
    back.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();

    frozen(&server, &bus).await;
    bus.close(LONG).await.unwrap();
}

async fn killed_in_the_middle(server: &Server, bus: &Bus) {
    let name = unique("killed");
    let total = (PUBLISHERS * EACH) as usize;
    let mut members = Vec::new();
    for _ in 0..2 {
        members.push(bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap());
    }
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let (bus, name) = (bus.clone(), name.clone());
            tokio::spawn(async move {
                for start in (0..EACH).step_by(50) {
                    let numbers = (start..start + 50).map(|number| publisher * EACH + number);
                    let batch: Vec<_> = numbers.map(|number| Message::new(name.as_str(), number.to_string())).collect();
                    publish_until_confirmed(&bus, batch).await;
                    // So that the crash falls in the middle.
                    tokio::time::sleep(Duration::from_millis(60)).await;
                }
            })
        })
        .collect();
    let seen = Arc::new(parking_lot::Mutex::new(HashSet::new()));
    let deliveries = Arc::new(AtomicUsize::new(0));
    let deadline = Instant::now() + Duration::from_secs(150);
    let consumers: Vec<_> = members
        .into_iter()
        .map(|mut member| {
            let (seen, deliveries) = (Arc::clone(&seen), Arc::clone(&deliveries));
            tokio::spawn(async move {
                let mut events = Vec::new();
                while seen.lock().len() < total && Instant::now() < deadline {
                    let received = member.receive_all(100, Duration::from_secs(1)).await.unwrap();
                    events.extend(received.events);
                    deliveries.fetch_add(received.deliveries.len(), Ordering::Relaxed);
                    seen.lock().extend(received.deliveries.iter().map(number));
                    // An ack that the crash swallowed leaves the message with the broker, which brings it again.
                    drop(ack(received.deliveries).await);
                }
                member.close(LONG).await.unwrap();
                events
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let killed = Instant::now();
    server.does("kill").await;
    server.does("restart").await;
    println!("killed and ready again after {:?}", killed.elapsed());
    for publisher in publishers {
        publisher.await.unwrap();
    }
    for consumer in consumers {
        let events = consumer.await.unwrap();
        assert!(events.iter().any(|event| matches!(event, SubscriptionEvent::Degraded { .. })), "{events:?}");
        assert!(events.contains(&SubscriptionEvent::Recovered), "{events:?}");
    }
    let seen = seen.lock();
    let lost: Vec<_> = (0..PUBLISHERS * EACH).filter(|number| !seen.contains(number)).collect();
    assert!(lost.is_empty(), "{} lost: {:?}", lost.len(), &lost[..lost.len().min(20)]);
    assert_eq!(seen.len(), total, "nothing that was never published");
    println!("{} messages, {} deliveries", seen.len(), deliveries.load(Ordering::Relaxed));
}

/// Publishes what has no confirmation again. Pulsar does not dedup by id: what was stored and not confirmed is there twice.
async fn publish_until_confirmed(bus: &Bus, mut batch: Vec<Message>) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !batch.is_empty() {
        assert!(Instant::now() < deadline, "{} messages are not confirmed", batch.len());
        let outcomes = bus.publish(batch.clone()).await;
        let mut outcomes = outcomes.into_iter();
        let mut first = None;
        batch.retain(|_| match outcomes.next().unwrap() {
            Ok(_) => false,
            Err(error) => {
                first.get_or_insert(error);
                true
            }
        });
        if let Some(error) = first {
            println!("{} not confirmed yet: {error}", batch.len());
        }
    }
}

async fn frozen(server: &Server, bus: &Bus) {
    let name = unique("frozen");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(bus, numbered(&name, 0..1)).await;
    receive(&mut subscriber, 1).await.remove(0).ack().await.unwrap();
    server.does("pause").await;
    let begun = Instant::now();
    let options = PublishOptions::default().with_timeout(Duration::from_secs(1));
    let message = Message::new(name.as_str(), "1");
    let error = bus.submit(vec![message.clone()], &options).await.await.remove(0).unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Timeout, Effect::Unknown));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    server.does("resume").await;
    publish_until_confirmed(bus, vec![message]).await;
    let came = receive(&mut subscriber, 1).await;
    assert_eq!(number(&came[0]), 1);
    for outcome in ack(came).await {
        outcome.unwrap();
    }
    subscriber.close(LONG).await.unwrap();
}

/// Receives, fails one, and dies holding the rest. Run as a process of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crasher() {
    let Ok(name) = std::env::var(CRASHER) else { return };
    let bus = connect(&url().unwrap(), "").await;
    let ordered = bus.subscription(name.as_str(), "g").with_order(Order::Key);
    let mut subscriber = bus.subscribe(ordered).await.unwrap();
    let mut deliveries = receive(&mut subscriber, 3).await;
    let failed = deliveries.remove(0);
    settle(vec![(failed, Settlement::Nack(Nack { delay: Duration::from_secs(6), error_type: None }))])
        .await
        .into_iter()
        .for_each(|outcome| assert!(outcome.is_ok()));
    std::process::abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_consumer_held_comes_back_in_order_with_its_attempts() {
    let Some(url) = url() else { return };
    let name = unique("crashed");
    let bus = connect(&url, "").await;
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key);
    // The group exists before anything is published.
    bus.subscribe(spec.clone()).await.unwrap().close(LONG).await.unwrap();
    publish(&bus, numbered(&name, 0..6)).await;
    let begun = Instant::now();
    let died = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crasher", "--nocapture"])
        .env(CRASHER, &name)
        .output()
        .unwrap();
    assert!(!died.status.success(), "the crasher came to its end");
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let mut came = Vec::new();
    while came.len() < 6 {
        for delivery in receive(&mut subscriber, 1).await {
            came.push((number(&delivery), delivery.attempt()));
            delivery.ack().await.unwrap();
        }
    }
    let order: Vec<_> = came.iter().map(|(number, _)| *number).filter(|number| *number != 0).collect();
    assert_eq!(order, [1, 2, 3, 4, 5], "what the dead member held comes before what is behind it");
    let attempts: HashMap<u32, u32> = came.into_iter().collect();
    assert_eq!(attempts[&0], 2, "its failure is remembered");
    assert!((1..6).all(|number| attempts[&number] == 1), "a crash is no failure: {attempts:?}");
    assert!(begun.elapsed() >= Duration::from_secs(6), "its delay is kept");
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}
