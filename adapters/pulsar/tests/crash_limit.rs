//! A message that kills its consumer again and again.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::process::Command;
use std::time::Duration;

use anybroker_core::{Message, Order, Reason, SubscribeSpec, ack};
use common::{LONG, connect, nothing, publish, receive, unique, url};

const VICTIM: &str = "ANYBROKER_PULSAR_TEST_VICTIM";
const LIMIT: u32 = 3;
/// What kills whoever receives it.
const POISON: &str = "poison";

fn spec(bus: &anybroker_core::Bus, name: &str, order: &str) -> SubscribeSpec {
    let order = if order == "key" { Order::Key } else { Order::None };
    bus.subscription(name, "g").with_order(order).with_crash_limit(LIMIT).with_max_in_flight(20)
}

/// Receives and acks until the last message; dies of the poison. Run as a process of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn victim() {
    let Ok(text) = std::env::var(VICTIM) else { return };
    let [name, order, batch] = text.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let bus = connect(&url().unwrap(), "").await;
    let mut subscriber = bus.subscribe(spec(&bus, name, order)).await.unwrap();
    loop {
        let deliveries = subscriber.receive(batch.parse().unwrap(), LONG).await.unwrap();
        assert!(!deliveries.is_empty(), "the last message did not come");
        let is = |body: &str| deliveries.iter().any(|delivery| delivery.message().bytes() == body.as_bytes());
        if is(POISON) {
            // So that the test sees this death and no other.
            println!("dying");
            std::process::abort();
        }
        let is_last = is("last");
        for outcome in ack(deliveries).await {
            outcome.unwrap();
        }
        if is_last {
            break;
        }
    }
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// How many consumers died until one came to the end.
async fn deaths(name: &str, order: &str, batch: usize) -> u32 {
    for deaths in 0..=LIMIT + 3 {
        let mut victim = Command::new(std::env::current_exe().unwrap());
        victim.args(["--exact", "victim", "--nocapture"]).env(VICTIM, format!("{name} {order} {batch}"));
        let done = tokio::task::spawn_blocking(move || victim.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&done.stdout);
        if done.status.success() {
            return deaths;
        }
        assert!(said.contains("dying"), "{said}{}", String::from_utf8_lossy(&done.stderr));
    }
    panic!("it kills for ever");
}

async fn is_buried_alone(order: &str, batch: usize) {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("killing");
    bus.subscribe(spec(&bus, &name, order)).await.unwrap().close(LONG).await.unwrap();
    let bodies = (0..5).map(|number| number.to_string()).chain([POISON.to_owned()]);
    let bodies = bodies.chain((6..20).map(|number| number.to_string())).chain(["last".to_owned()]);
    publish(&bus, bodies.map(|body| Message::new(name.as_str(), body).with_key("k")).collect()).await;
    // The first hand-over is not noted, so it takes one more than the limit.
    assert_eq!(deaths(&name, order, batch).await, LIMIT + 1);
    let letters = bus.dead_letters(name.as_str(), "g").unwrap().page(None, 100).await.unwrap().letters;
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0].message.bytes(), POISON.as_bytes());
    assert_eq!((letters[0].reason.clone(), letters[0].attempts), (Reason::CrashLimit, 1));
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
async fn a_message_that_kills_its_consumers_is_buried_alone_when_one_is_received_at_a_time() {
    is_buried_alone("none", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_order_a_message_that_kills_its_consumers_is_buried_alone_and_its_key_goes_on() {
    is_buried_alone("key", 1).await;
}

/// Also as a retry: what comes back lies on another topic, and a failure keeps the count.
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
