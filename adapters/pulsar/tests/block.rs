//! `OnFailure::Block`: later messages of a key wait for the one that failed, whatever happens to its member.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/server.rs"]
#[allow(dead_code, reason = "it needs no server of its own")]
mod server;

use std::time::{Duration, Instant};

use anybroker_core::{Bus, Message, OnFailure, Order, Reason, SubscribeSpec, Subscriber, Verdict, ack};
use common::{LONG, connect, nothing, number, numbered, publish, receive, try_connect, unique, url};
use server::Proxy;

/// A topic, ranges of its keys, and partitions.
const MODES: [&str; 3] = ["", "key_ranges=4", "partitions=3"];

fn spec(bus: &Bus, name: &str, max_in_flight: usize) -> SubscribeSpec {
    bus.subscription(name, "g")
        .with_order(Order::Key)
        .with_on_failure(OnFailure::Block)
        .with_max_in_flight(max_in_flight)
        .with_max_attempts(3)
}

async fn subscribe(bus: &Bus, name: &str, max_in_flight: usize) -> Subscriber {
    bus.subscribe(spec(bus, name, max_in_flight)).await.unwrap()
}

fn of_key(name: &str, key: &'static str, count: u32) -> Vec<Message> {
    (0..count).map(|number| Message::new(name, number.to_string()).with_key(key)).collect()
}

async fn acked(subscriber: &mut Subscriber, count: usize) -> Vec<u32> {
    let deliveries = receive(subscriber, count).await;
    let seen = deliveries.iter().map(number).collect();
    for outcome in ack(deliveries).await {
        outcome.unwrap();
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_keys_go_on_while_more_of_a_blocked_key_waits_than_may_be_in_flight() {
    let Some(url) = url() else { return };
    for mode in MODES {
        let bus = connect(&url, mode).await;
        let name = unique("beyond");
        let mut subscriber = subscribe(&bus, &name, 4).await;
        publish(&bus, of_key(&name, "a", 40)).await;
        receive(&mut subscriber, 1).await.pop().unwrap().nack(LONG * 10).await.unwrap();
        publish(&bus, of_key(&name, "b", 10)).await;
        // As many as may be out at once, and none of the other key among them.
        for from in [0, 4] {
            assert_eq!(acked(&mut subscriber, 4).await, (from..from + 4).collect::<Vec<_>>(), "{mode}");
        }
        assert_eq!(acked(&mut subscriber, 2).await, [8, 9], "{mode}");
        nothing(&mut subscriber).await;
        subscriber.close(LONG).await.unwrap();
        bus.delete(name.as_str(), None).await.unwrap();
        bus.close(LONG).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_bound_of_what_may_wait_other_keys_wait_too_and_nothing_is_lost() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("bound");
    let mut subscriber = subscribe(&bus, &name, 4).await;
    publish(&bus, of_key(&name, "a", 1_004)).await;
    let failed = receive(&mut subscriber, 1).await.pop().unwrap();
    failed.nack(Duration::from_secs(5)).await.unwrap();
    publish(&bus, of_key(&name, "b", 3)).await;
    nothing(&mut subscriber).await;
    // Its second failure is its verdict: the key goes on behind the letter.
    let failed = receive(&mut subscriber, 1).await.pop().unwrap();
    assert_eq!((number(&failed), failed.attempt()), (0, 2));
    failed.dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
    let (mut of_a, mut of_b) = (Vec::new(), Vec::new());
    while of_a.len() + of_b.len() < 1_006 {
        let deliveries = receive(&mut subscriber, 1).await;
        for delivery in &deliveries {
            let of = if delivery.message().key() == Some(b"a") { &mut of_a } else { &mut of_b };
            of.push(number(delivery));
        }
        for outcome in ack(deliveries).await {
            outcome.unwrap();
        }
    }
    assert_eq!((of_a, of_b), ((1..1_004).collect(), (0..3).collect()));
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// How the member with the failed message goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Goes {
    Closed,
    Cut,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_comes_after_a_member_with_a_blocked_key_goes_on_with_the_failed_message_and_its_count() {
    let Some(url) = url() else { return };
    let cases = MODES.into_iter().flat_map(|mode| [(mode, Goes::Closed), (mode, Goes::Cut)]);
    let cases: Vec<_> = cases.map(|(mode, goes)| tokio::spawn(followed(url.clone(), mode, goes))).collect();
    for case in cases {
        case.await.unwrap();
    }
}

async fn followed(url: String, mode: &'static str, goes: Goes) {
    let bus = connect(&url, mode).await;
    let name = unique("after");
    subscribe(&bus, &name, 8).await.close(LONG).await.unwrap();
    publish(&bus, numbered(&name, 0..6)).await;
    let (proxy, address) = (Proxy::listen().await, url.split("://").nth(1).unwrap().split('?').next().unwrap());
    proxy.to(address);
    let other = try_connect(&url.replacen(address, &proxy.address(), 1), mode).await.unwrap();
    let mut first = subscribe(&other, &name, 8).await;
    let delay = Duration::from_secs(4);
    let mut held = receive(&mut first, 3).await;
    let began = Instant::now();
    held.remove(0).nack(delay).await.unwrap();
    match goes {
        Goes::Closed => first.close(LONG).await.unwrap(),
        Goes::Cut => {
            // Nobody is there any more.
            proxy.to("127.0.0.1:1");
            proxy.cut();
            drop(first);
        }
    }
    drop((held, other));
    let mut next = subscribe(&bus, &name, 8).await;
    let failed = receive(&mut next, 1).await.pop().unwrap();
    assert!(began.elapsed() >= delay, "{mode} {goes:?}: early, after {:?}", began.elapsed());
    assert_eq!((number(&failed), failed.attempt()), (0, 2), "{mode} {goes:?}");
    failed.nack(Duration::ZERO).await.unwrap();
    let failed = receive(&mut next, 1).await.pop().unwrap();
    assert_eq!((number(&failed), failed.attempt()), (0, 3), "{mode} {goes:?}");
    // The last of its attempts.
    failed.nack(Duration::ZERO).await.unwrap();
    assert_eq!(acked(&mut next, 5).await, [1, 2, 3, 4, 5], "{mode} {goes:?}");
    nothing(&mut next).await;
    let letters = bus.dead_letters(name.as_str(), "g").unwrap().page(None, 10).await.unwrap();
    assert_eq!(letters.letters.iter().map(|letter| letter.attempts).collect::<Vec<_>>(), [3], "{mode} {goes:?}");
    next.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}
