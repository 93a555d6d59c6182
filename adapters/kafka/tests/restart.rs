//! The broker is killed or frozen, while publishers and members go on. One test after the other: both need the broker.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anybroker_core::{
    Bus, Effect, Message, Order, PublishOptions, Reason, Settlement, SubscriptionEvent, Verdict, settle,
};
use common::{LONG, connect, number, url, xtask};
use tokio::task::JoinHandle;
use tokio::time::Instant;

const PUBLISHERS: u32 = 2;
const MEMBERS: usize = 2;

/// What publishers know of their messages.
#[derive(Default)]
struct Published {
    stored: HashSet<u32>,
    unknown: HashSet<u32>,
}

type Acked = Arc<Mutex<HashSet<u32>>>;

/// What members saw.
#[derive(Default)]
struct Seen {
    /// First deliveries of each key, by member.
    first: BTreeMap<u32, Vec<u32>>,
    events: Vec<SubscriptionEvent>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_the_broker_is_killed_or_frozen_and_everybody_goes_on_by_himself() {
    let Some(url) = url() else { return };
    let Some(broker) = xtask().map(Arc::new) else { return };
    let kills = Arc::clone(&broker);
    disturbed(&url, "killed", 12, move || {
        kills("kill");
        kills("restart");
    })
    .await;
    disturbed(&url, "frozen", 9, move || {
        broker("pause");
        std::thread::sleep(Duration::from_secs(4));
        broker("resume");
    })
    .await;
}

async fn disturbed(url: &str, what: &str, seconds: u64, disturb: impl FnOnce() + Send + 'static) {
    let bus = connect(url, "partitions=4").await;
    let name = common::unique(what);
    let is_over = Arc::new(AtomicBool::new(false));
    let acked = Acked::default();
    let members: Vec<_> = (0..MEMBERS).map(|_| member(&bus, &name, &acked, &is_over)).collect();
    let until = Instant::now() + Duration::from_secs(seconds);
    let publishers: Vec<_> = (0..PUBLISHERS).map(|number| publisher(&bus, &name, number, until)).collect();
    tokio::time::sleep(Duration::from_secs(2)).await;
    tokio::task::spawn_blocking(disturb).await.unwrap();
    let mut published = Published::default();
    for publisher in publishers {
        let part = publisher.await.unwrap();
        published.stored.extend(part.stored);
        published.unknown.extend(part.unknown);
    }
    // It went on after the return.
    let last = Message::new(name.as_str(), u32::MAX.to_string()).with_key("last");
    let deadline = Instant::now() + LONG;
    while let Err(error) = bus.send(last.clone()).await {
        assert!(Instant::now() < deadline, "{what}: {error:?}");
    }
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    let deadline = Instant::now() + LONG;
    let buried = loop {
        let letters = letters.peek(&Default::default(), usize::MAX).await.unwrap();
        let buried: HashSet<u32> = letters
            .iter()
            .map(|letter| std::str::from_utf8(letter.message.bytes()).unwrap().parse().unwrap())
            .collect();
        let lost: Vec<u32> = {
            let acked = acked.lock().unwrap();
            let is_lost = |one: &&u32| !acked.contains(one) && !buried.contains(one);
            published.stored.iter().chain([&u32::MAX]).filter(is_lost).copied().collect()
        };
        if lost.is_empty() {
            break buried;
        }
        assert!(Instant::now() < deadline, "{what}: lost {lost:?}, {:?}", bus.lag(name.as_str(), "g").await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    is_over.store(true, Ordering::Release);
    let (mut degraded, mut recovered) = (false, false);
    for member in members {
        let seen = member.await.unwrap();
        for (key, numbers) in &seen.first {
            assert!(numbers.is_sorted(), "{what}: key {key} out of order: {numbers:?}");
        }
        degraded |= seen.events.iter().any(|event| matches!(event, SubscriptionEvent::Degraded { .. }));
        recovered |= seen.events.contains(&SubscriptionEvent::Recovered);
    }
    let acked = acked.lock().unwrap().clone();
    let (stored, unknown) = (published.stored.len(), published.unknown.len());
    println!("{what}: {stored} stored, {unknown} unknown, {} acked, {} buried", acked.len(), buried.len());
    let phantom = |one: &&u32| **one != u32::MAX && !published.stored.contains(one) && !published.unknown.contains(one);
    assert_eq!(acked.union(&buried).filter(phantom).count(), 0, "{what}: came, and certainly is not stored");
    assert!(stored > 50 && !buried.is_empty(), "{what}: {stored} stored");
    if what == "killed" {
        assert!(degraded && recovered, "{what}: nobody was told");
    }
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Publishes numbered messages of four keys of its own, in small batches.
fn publisher(bus: &Bus, name: &str, publisher: u32, until: Instant) -> JoinHandle<Published> {
    let (bus, name) = (bus.clone(), name.to_owned());
    tokio::spawn(async move {
        let options = PublishOptions::default().with_timeout(Duration::from_secs(3));
        let mut published = Published::default();
        let mut next = publisher;
        while Instant::now() < until {
            let numbers: Vec<u32> = (0..10).map(|entry| next + entry * PUBLISHERS).collect();
            next += 10 * PUBLISHERS;
            let message =
                |number: &u32| Message::new(name.as_str(), number.to_string()).with_key(key(*number).to_string());
            let begun = Instant::now();
            let outcomes = bus.submit(numbers.iter().map(message).collect(), &options).await.await;
            assert!(begun.elapsed() < Duration::from_secs(8), "a publish took {:?}", begun.elapsed());
            for (number, outcome) in numbers.into_iter().zip(outcomes) {
                match outcome {
                    Ok(_) => published.stored.insert(number),
                    Err(error) if error.effect() == Effect::Unknown => published.unknown.insert(number),
                    Err(_) => false,
                };
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        published
    })
}

/// Keys belong to one publisher each.
fn key(number: u32) -> u32 {
    number % (4 * PUBLISHERS)
}

/// Acks most, nacks some once with a delay, buries some.
fn member(bus: &Bus, name: &str, acked: &Acked, is_over: &Arc<AtomicBool>) -> JoinHandle<Seen> {
    let (bus, name, acked, is_over) = (bus.clone(), name.to_owned(), Arc::clone(acked), Arc::clone(is_over));
    tokio::spawn(async move {
        let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g").with_order(Order::Key)).await.unwrap();
        let (mut seen, mut known) = (Seen::default(), HashSet::new());
        while !is_over.load(Ordering::Acquire) {
            let received = subscriber.receive_all(50, Duration::from_millis(200)).await.unwrap();
            seen.events.extend(received.events);
            let mut numbers = Vec::new();
            let batch = received.deliveries.into_iter().map(|delivery| {
                let number = number(&delivery);
                numbers.push(number);
                if delivery.attempt() == 1 && known.insert(number) && number != u32::MAX {
                    seen.first.entry(key(number)).or_default().push(number);
                }
                let settlement = match number % 40 {
                    7 => Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))),
                    3 | 4 if delivery.attempt() == 1 => {
                        let delay = Duration::from_millis(300);
                        Settlement::Nack(anybroker_core::Nack { delay, error_type: None })
                    }
                    _ => Settlement::Ack,
                };
                (delivery, settlement)
            });
            let batch: Vec<_> = batch.collect();
            let acks: Vec<bool> = batch.iter().map(|(_, settlement)| matches!(settlement, Settlement::Ack)).collect();
            for ((number, is_ack), outcome) in numbers.into_iter().zip(acks).zip(settle(batch).await) {
                match outcome {
                    Ok(_) if is_ack => {
                        acked.lock().unwrap().insert(number);
                    }
                    Ok(_) => {}
                    // It comes again.
                    Err(error) => println!("{number}: {}", error.error()),
                }
            }
        }
        subscriber.close(LONG).await.unwrap();
        seen
    })
}
