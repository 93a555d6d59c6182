//! What a killed, restarted or frozen broker and a killed consumer must not break.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;
#[path = "common/flood.rs"]
mod flood;
#[path = "common/server.rs"]
mod server;

use std::collections::HashMap;
use std::process::Command;
use std::time::Duration;

use anybroker_core::{Bus, Effect, ErrorKind, Message, Nack, Order, PublishOptions, Settlement, ack, settle};
use common::{LONG, connect, number, numbered, publish, receive, unique, url};
use server::{Proxy, Server};
use tokio::time::Instant;

const CRASHER: &str = "ANYBROKER_PULSAR_TEST_CRASHER";

/// One broker for all of it: starting one takes longer than the rest of the test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_connections_and_a_broker_that_is_killed_or_frozen_lose_nothing_that_was_confirmed() {
    let proxy = Proxy::listen().await;
    let Some(server) = Server::start("kill", &proxy) else { return };
    proxy.to(server.address());
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

    flood::survives(&server, &proxy).await;

    let back = receive(&mut subscriber, 1).await.remove(0);
    assert!(nacked.elapsed() >= delay, "it came back after {:?} of {delay:?}", nacked.elapsed());
    assert_eq!((number(&back), back.attempt()), (0, 2), "its attempts survive the broker's crash");
    back.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();

    frozen(&server, &bus).await;
    bus.close(LONG).await.unwrap();
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
