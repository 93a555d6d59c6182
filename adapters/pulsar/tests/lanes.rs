//! Under order per key the members of a group share the keys out among themselves.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bus, Message, Order, Subscriber};
use common::{LONG, connect, numbered, publish, receive, unique, url};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

const KEYS: u32 = 40;
const RANGES: &str = "key_ranges=8";

/// Member, key, round, in the order in which they came.
type Log = Arc<Mutex<Vec<(usize, u32, u32)>>>;

async fn member(bus: &Bus, name: &str) -> Subscriber {
    bus.subscribe(bus.subscription(name, "g").with_order(Order::Key)).await.unwrap()
}

/// One message of each key.
async fn round(bus: &Bus, name: &str, round: u32) {
    let of = |key: u32| Message::new(name, format!("{key} {round}")).with_key(format!("key-{key}"));
    publish(bus, (0..KEYS).map(of).collect()).await;
}

fn key_and_round(message: &Message) -> (u32, u32) {
    let text = std::str::from_utf8(message.bytes()).unwrap();
    let (key, round) = text.split_once(' ').unwrap();
    (key.parse().unwrap(), round.parse().unwrap())
}

/// Acks what comes until it is told to stop; then closes.
async fn work(mut subscriber: Subscriber, index: usize, log: Log, mut stop: watch::Receiver<usize>) {
    while *stop.borrow_and_update() > index {
        for delivery in subscriber.receive(50, Duration::from_millis(100)).await.unwrap() {
            let (key, round) = key_and_round(delivery.message());
            log.lock().push((index, key, round));
            delivery.ack().await.unwrap();
        }
    }
    subscriber.close(LONG).await.unwrap();
}

async fn until(what: &str, log: &Log, is_so: impl Fn(&[(usize, u32, u32)]) -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so(&log.lock()) {
        assert!(Instant::now() < deadline, "not within {LONG:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Members come and go while messages flow: each has its share, none comes twice, and each key keeps its order.
async fn come_and_go(settings: &str) {
    let Some(url) = url() else { return };
    let bus = connect(&url, settings).await;
    let name = unique("lanes");
    let log: Log = Arc::default();
    let (stay, staying) = watch::channel(4);
    let mut workers = Vec::new();
    // Each in a process of its own, as far as the broker can tell.
    let join = async || member(&connect(&url, settings).await, &name).await;
    let start = |subscriber, index| tokio::spawn(work(subscriber, index, Arc::clone(&log), staying.clone()));
    workers.push(start(join().await, 0));
    let (stop, mut stopping) = watch::channel(false);
    let publisher = tokio::spawn({
        let (bus, name) = (bus.clone(), name.clone());
        async move {
            let mut rounds = 0;
            while !*stopping.borrow_and_update() {
                round(&bus, &name, rounds).await;
                rounds += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            rounds
        }
    });
    for index in 1..4 {
        workers.push(start(join().await, index));
    }
    let all = |log: &[(usize, u32, u32)]| (0..4).all(|member| log.iter().any(|(who, ..)| *who == member));
    until("four members work at once", &log, all).await;
    stay.send_replace(2);
    for worker in workers.drain(2..) {
        worker.await.unwrap();
    }
    let from = log.lock().len();
    let every_key = |log: &[(usize, u32, u32)]| (0..KEYS).all(|key| log[from..].iter().any(|(_, of, _)| *of == key));
    until("two members have every key", &log, every_key).await;
    stop.send_replace(true);
    let rounds = publisher.await.unwrap();
    until("everything has come", &log, |log| log.len() >= (KEYS * rounds) as usize).await;
    stay.send_replace(0);
    for worker in workers {
        worker.await.unwrap();
    }
    let mut by_key: HashMap<u32, Vec<u32>> = HashMap::new();
    for (_, key, round) in log.lock().iter() {
        by_key.entry(*key).or_default().push(*round);
    }
    for key in 0..KEYS {
        assert_eq!(by_key[&key], (0..rounds).collect::<Vec<_>>(), "of key {key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_come_and_go_share_the_keys_of_a_topic_and_each_key_keeps_its_order() {
    come_and_go(RANGES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_come_and_go_share_partitions_and_each_key_keeps_its_order() {
    come_and_go("partitions=4").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_stays_with_the_member_that_works_on_it_until_that_has_settled() {
    let Some(url) = url() else { return };
    let bus = connect(&url, RANGES).await;
    let name = unique("drained");
    let mut first = member(&bus, &name).await;
    round(&bus, &name, 0).await;
    let held = receive(&mut first, KEYS as usize).await;
    let mut second = member(&connect(&url, RANGES).await, &name).await;
    round(&bus, &name, 1).await;
    // Long enough to be seen several times.
    let early = second.receive(100, Duration::from_secs(4)).await.unwrap();
    assert!(early.is_empty(), "{early:?}");
    for delivery in held {
        delivery.ack().await.unwrap();
    }
    let came = receive(&mut second, 1).await;
    assert_eq!(key_and_round(came[0].message()).1, 1);
    drop(came);
    let kept = receive(&mut first, 1).await;
    assert_eq!(key_and_round(kept[0].message()).1, 1);
}

/// Nobody hands out more than was asked for, however many ranges a member has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_in_flight_is_one_in_flight_whatever_keys_there_are() {
    let Some(url) = url() else { return };
    let bus = connect(&url, RANGES).await;
    let name = unique("one");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key).with_max_in_flight(1);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    round(&bus, &name, 0).await;
    for _ in 0..KEYS {
        let one = receive(&mut subscriber, 1).await.remove(0);
        assert!(subscriber.receive(10, Duration::from_millis(20)).await.unwrap().is_empty());
        one.ack().await.unwrap();
    }
    publish(&bus, numbered(&name, 0..1)).await;
    receive(&mut subscriber, 1).await;
}
