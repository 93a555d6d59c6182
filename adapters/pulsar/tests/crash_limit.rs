//! A message that kills its consumer again and again.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::process::Command;
use std::time::Duration;

use anybroker_core::{Message, Order, Reason, SubscribeSpec};
use common::{LONG, connect, nothing, publish, receive, unique, url};
use tokio::time::Instant;

const VICTIM: &str = "ANYBROKER_PULSAR_TEST_VICTIM";
const LIMIT: u32 = 3;
/// What kills whoever receives it.
const POISON: &str = "poison";

fn spec(bus: &anybroker_core::Bus, name: &str, order: &str) -> SubscribeSpec {
    let order = if order == "key" { Order::Key } else { Order::None };
    bus.subscription(name, "g").with_order(order).with_crash_limit(LIMIT).with_max_in_flight(20)
}

/// Receives and acks one by one until the group has nothing left; dies of the poison, or fails it once and dies of it when it
/// comes back. Run as a process of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn victim() {
    let Ok(text) = std::env::var(VICTIM) else { return };
    let [name, order, fails] = text.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let bus = connect(&url().unwrap(), "").await;
    let mut subscriber = bus.subscribe(spec(&bus, name, order)).await.unwrap();
    let deadline = Instant::now() + LONG * 3;
    loop {
        let Some(delivery) = subscriber.receive(1, Duration::from_millis(300)).await.unwrap().pop() else {
            assert!(Instant::now() < deadline, "something is left that does not come");
            if bus.lag(name, "g").await.unwrap().total() == Some(0) {
                break;
            }
            continue;
        };
        if delivery.message().bytes() != POISON.as_bytes() {
            delivery.ack().await.unwrap();
        } else if fails == "fails" && delivery.attempt() == 1 {
            delivery.nack(Duration::ZERO).await.unwrap();
        } else {
            // So that the test sees this death and no other.
            println!("dying");
            std::process::abort();
        }
    }
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// How many consumers died until one came to the end.
async fn deaths(name: &str, order: &str, fails: &str) -> u32 {
    for deaths in 0..=LIMIT + 3 {
        let mut victim = Command::new(std::env::current_exe().unwrap());
        victim.args(["--exact", "victim", "--nocapture"]).env(VICTIM, format!("{name} {order} {fails}"));
        let done = tokio::task::spawn_blocking(move || victim.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&done.stdout);
        if done.status.success() {
            return deaths;
        }
        assert!(said.contains("dying"), "{said}{}", String::from_utf8_lossy(&done.stderr));
    }
    panic!("it kills for ever");
}

async fn is_buried_alone(order: &str, fails: &str, members: u32) {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("killing");
    bus.subscribe(spec(&bus, &name, order)).await.unwrap().close(LONG).await.unwrap();
    let bodies = (0..5).map(|number| number.to_string()).chain([POISON.to_owned()]);
    let bodies = bodies.chain((6..20).map(|number| number.to_string()));
    publish(&bus, bodies.map(|body| Message::new(name.as_str(), body).with_key("k")).collect()).await;
    // The first hand-over is not noted: it takes one more than the limit, and another one for a second member at most.
    if members == 1 {
        assert_eq!(deaths(&name, order, fails).await, LIMIT + 1);
    } else {
        let (one, other) = tokio::join!(deaths(&name, order, fails), deaths(&name, order, fails));
        assert!((LIMIT + 1..=LIMIT + 2).contains(&(one + other)), "{one} and {other}");
    }
    let letters = bus.dead_letters(name.as_str(), "g").unwrap().page(None, 100).await.unwrap().letters;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0].message.bytes(), POISON.as_bytes());
    let attempts = if fails == "fails" { 2 } else { 1 };
    assert_eq!((letters[0].reason.clone(), letters[0].attempts), (Reason::CrashLimit, attempts));
    let mut subscriber = bus.subscribe(spec(&bus, &name, order)).await.unwrap();
    nothing(&mut subscriber).await;
    // A letter that is put back starts anew.
    assert_eq!(bus.dead_letters(name.as_str(), "g").unwrap().redrive(&Default::default()).await.unwrap().moved, 1);
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((delivery.attempt(), delivery.facts().deliveries), (1, Some(1)));
    delivery.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_kills_its_consumers_is_buried_alone() {
    is_buried_alone("none", "dies", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_order_a_message_that_kills_its_consumers_is_buried_alone_and_its_key_goes_on() {
    is_buried_alone("key", "dies", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_kills_one_member_after_the_other_is_buried() {
    is_buried_alone("none", "dies", 2).await;
    is_buried_alone("key", "dies", 2).await;
}

/// What comes back lies on another topic, whose hand-overs are counted like those of the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_kills_its_consumers_when_it_comes_back_is_buried_with_its_attempts() {
    is_buried_alone("none", "fails", 1).await;
    is_buried_alone("key", "fails", 1).await;
}

/// What comes back lies on another topic, and a failure keeps the count.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_keeps_the_hand_overs_that_had_no_outcome() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    for order in [Order::None, Order::Key] {
        let name = unique("counted");
        let spec = bus.subscription(name.as_str(), "g").with_order(order).with_crash_limit(20);
        let mut subscriber = bus.subscribe(spec.clone()).await.unwrap();
        bus.send(Message::new(name.as_str(), "x").with_key("k")).await.unwrap();
        let mut told = Vec::new();
        // Dropped, failed, released, dropped, left behind by a close, failed.
        for step in 0..6 {
            let delivery = receive(&mut subscriber, 1).await.remove(0);
            told.push((delivery.attempt(), delivery.facts().deliveries.unwrap()));
            match step {
                1 | 5 => drop(delivery.nack(Duration::ZERO).await.unwrap()),
                2 => drop(delivery.release().await.unwrap()),
                4 => {
                    subscriber.close(LONG).await.unwrap();
                    drop(delivery);
                    subscriber = bus.subscribe(spec.clone()).await.unwrap();
                }
                _ => drop(delivery),
            }
        }
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        told.push((delivery.attempt(), delivery.facts().deliveries.unwrap()));
        assert_eq!(told, [(1, 1), (1, 2), (2, 3), (2, 3), (2, 4), (2, 5), (3, 6)], "{order:?}");
        delivery.ack().await.unwrap();
        subscriber.close(LONG).await.unwrap();
        bus.delete(name.as_str(), None).await.unwrap();
    }
    bus.close(LONG).await.unwrap();
}
