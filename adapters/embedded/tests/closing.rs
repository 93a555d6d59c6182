//! Closing, cancelling, pausing, waking.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use anybroker_core::{ErrorKind, Message, Order};
use common::*;
use rand::{RngExt, SeedableRng};

#[tokio::test]
async fn close_keeps_acks_and_gives_the_rest_back_uncounted_at_once() {
    let (bus, _clock, _place) = manual().await;
    publish(&bus, "orders", &["1", "2", "3"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let mut out = ready(&mut subscriber).await;
    pick(&mut out, "2").ack().await.unwrap();
    subscriber.close(SOON).await.unwrap();
    for delivery in out {
        assert_eq!(delivery.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    }
    let mut next = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let back = ready(&mut next).await;
    assert_eq!(texts(&back), ["1", "3"]);
    assert!(back.iter().all(|delivery| delivery.attempt() == 1 && delivery.facts().deliveries == Some(1)));
}

#[tokio::test]
async fn every_verb_of_a_closed_connection_answers_closed() {
    let place = Place::new();
    let bus = real(&place.path()).await;
    publish(&bus, "orders", &["1"]).await;
    let broker = bus.broker().clone();
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let held = one(&mut subscriber).await;
    let waiting = tokio::spawn(async move { subscriber.receive(1, SOON).await.map(|found| found.len()) });
    tokio::task::yield_now().await;
    bus.close(SOON).await.unwrap();
    bus.close(SOON).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(held.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    assert_eq!(bus.send(Message::new("orders", "2")).await.unwrap_err().kind(), ErrorKind::Closed);
    let spec = anybroker_core::SubscribeSpec::new("orders", "g");
    assert_eq!(broker.subscribe(spec).await.err().unwrap().kind(), ErrorKind::Closed);
    assert_eq!(broker.describe(&"orders".into()).await.unwrap_err().kind(), ErrorKind::Closed);
    let other = real(&place.path()).await;
    let mut other = other.subscribe(bus.subscription("orders", "g")).await.unwrap();
    assert_eq!(one(&mut other).await.attempt(), 1);
}

#[tokio::test]
async fn what_a_closed_connection_gives_back_is_not_claimed_for_its_own_receive_that_still_waits() {
    let place = Place::new();
    let bus = real(&place.path()).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    publish(&bus, "orders", &["1"]).await;
    let held = one(&mut subscriber).await;
    let waiting = tokio::spawn(async move { subscriber.receive(1, SOON).await.map(|found| found.len()) });
    tokio::task::yield_now().await;
    // Closed by another thread while this one waits: the receive cannot run, and what it asked for stands.
    let closing = || tokio::runtime::Runtime::new().unwrap().block_on(bus.close(SOON));
    std::thread::scope(|scope| scope.spawn(closing).join()).unwrap().unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    let other = real(&place.path()).await;
    let mut other = other.subscribe(bus.subscription("orders", "g")).await.unwrap();
    assert_eq!(one(&mut other).await.attempt(), 1);
    drop(held);
}

#[tokio::test]
async fn a_subscriber_that_is_dropped_gives_everything_back() {
    let (bus, _clock, _place) = manual().await;
    publish(&bus, "orders", &["1"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let held = one(&mut subscriber).await;
    drop(subscriber);
    assert_eq!(held.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    let mut next = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    assert_eq!(one(&mut next).await.attempt(), 1);
}

#[tokio::test]
async fn a_paused_subscription_brings_nothing_until_it_is_resumed() {
    let (bus, _clock, _place) = manual().await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    publish(&bus, "orders", &["1", "2"]).await;
    let held = subscriber.receive(1, NOW).await.unwrap().remove(0);
    subscriber.pause(true).await.unwrap();
    assert!(subscriber.receive(10, Duration::from_millis(20)).await.unwrap().is_empty());
    held.ack().await.unwrap();
    subscriber.pause(false).await.unwrap();
    assert_eq!(done(&mut subscriber).await, ["2"]);
}

#[tokio::test]
async fn a_waiting_receive_wakes_for_a_publish() {
    let (bus, _clock, _place) = manual().await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let waiting = tokio::spawn(async move { texts(&subscriber.receive(10, SOON).await.unwrap()) });
    tokio::task::yield_now().await;
    publish(&bus, "orders", &["1"]).await;
    assert_eq!(waiting.await.unwrap(), ["1"]);
}

#[tokio::test]
async fn the_bound_of_unsettled_deliveries_holds() {
    let (bus, _clock, _place) = manual().await;
    publish(&bus, "orders", &["1", "2", "3", "4"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_max_in_flight(3)).await.unwrap();
    let mut out = ready(&mut subscriber).await;
    assert_eq!((out.len(), subscriber.in_flight()), (3, 3));
    assert!(ready(&mut subscriber).await.is_empty());
    out.remove(0).ack().await.unwrap();
    assert_eq!(text(&one(&mut subscriber).await), "4");
}

/// 1,000 receives, each cancelled at a random point, on several threads while messages come in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_receives_lose_nothing_and_burn_no_attempt() {
    const MESSAGES: usize = 2_000;
    let place = Place::new();
    let bus = real(&place.path()).await;
    let mut random = rand::rngs::StdRng::seed_from_u64(11);
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let publisher = tokio::spawn({
        let bus = bus.clone();
        async move {
            for number in 0..MESSAGES {
                publish(&bus, "orders", &[&number.to_string()]).await;
                tokio::task::yield_now().await;
            }
        }
    });
    let mut seen: BTreeMap<usize, u32> = BTreeMap::new();
    let mut cancelled = 0;
    let mut note = |deliveries: &[anybroker_core::Delivery]| {
        for delivery in deliveries {
            assert_eq!((delivery.attempt(), delivery.facts().deliveries), (1, Some(1)));
            *seen.entry(text(delivery).parse().unwrap()).or_default() += 1;
        }
    };
    while cancelled < 1_000 {
        let mut receive = Box::pin(subscriber.receive(3, SOON));
        let mut polls = random.random_range(0..4);
        // Polled a few times, then dropped, wherever it is.
        let outcome = std::future::poll_fn(|context| match receive.as_mut().poll(context) {
            std::task::Poll::Ready(found) => std::task::Poll::Ready(Some(found)),
            std::task::Poll::Pending if polls == 0 => std::task::Poll::Ready(None),
            std::task::Poll::Pending => {
                polls -= 1;
                context.waker().wake_by_ref();
                std::task::Poll::Pending
            }
        })
        .await;
        drop(receive);
        match outcome {
            None => cancelled += 1,
            Some(found) => {
                let found = found.unwrap();
                note(&found);
                ack_all(found).await;
                if random.random_bool(0.5) {
                    drop(Box::pin(subscriber.receive(3, SOON))); // Never polled.
                    cancelled += 1;
                }
            }
        }
    }
    publisher.await.unwrap();
    loop {
        let rest = subscriber.receive(100, NOW).await.unwrap();
        if rest.is_empty() {
            break;
        }
        note(&rest);
        ack_all(rest).await;
    }
    assert_eq!(seen.len(), MESSAGES);
    assert!(seen.values().all(|times| *times == 1));
    assert_eq!(bus.lag("orders", "g").await.unwrap().total(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn members_on_several_threads_share_everything_exactly_once() {
    const MESSAGES: usize = 20_000;
    let place = Place::new();
    let bus = real(&place.path()).await;
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let spec = bus.subscription("orders", "g").with_order(Order::Key);
        let mut subscriber = bus.subscribe(spec).await.unwrap();
        tasks.push(tokio::spawn(async move {
            let mut seen = Vec::new();
            loop {
                let found = subscriber.receive(50, SOON).await.unwrap();
                if found.iter().any(|delivery| text(delivery) == "end") {
                    ack_all(found).await;
                    return seen;
                }
                seen.extend(found.iter().map(|delivery| text(delivery).parse::<usize>().unwrap()));
                ack_all(found).await;
            }
        }));
    }
    for chunk in (0..MESSAGES).collect::<Vec<_>>().chunks(100) {
        let message = |number: &usize| Message::new("orders", number.to_string()).with_key((number % 97).to_string());
        for outcome in bus.publish(chunk.iter().map(message).collect()).await {
            outcome.unwrap();
        }
    }
    worked_off(&bus, "orders", "g").await;
    // One for each member: whoever has met the end stops receiving.
    for _ in 0..4 {
        publish(&bus, "orders", &["end"]).await;
        worked_off(&bus, "orders", "g").await;
    }
    let mut seen = Vec::new();
    for task in tasks {
        seen.extend(task.await.unwrap());
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..MESSAGES).collect::<Vec<_>>());
}
