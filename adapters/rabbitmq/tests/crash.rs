//! What a killed, restarted or frozen server and a killed consumer must not break.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::HashSet;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anybroker_conformance::UrlHarness;
use anybroker_core::{
    Bus, Effect, ErrorKind, Message, Order, PublishOptions, Settlement, SubscriptionEvent, ack, settle,
};
use anybroker_testing::judge_server;
use common::{LONG, connect, number, numbered, own_server, publish, receive, try_connect, unique, url};
use tokio::time::Instant;

const CRASHER: &str = "ANYBROKER_RABBITMQ_TEST_CRASHER";

/// The suite's cases about a killed server: once, and again while clients come back.
const KILLED: &[&str] = &["faults/a-server-that-is-killed-and-*", "faults/a-server-that-is-killed-again-*"];

/// Cases of the suite, on a server of this test's own.
async fn by_the_suite(name: &str, query: &'static str, cases: &[&str]) {
    let Some(server) = own_server(name) else { return };
    let url = server.url.clone();
    let harness = UrlHarness::new("rabbitmq", move || {
        let url = url.clone();
        Box::pin(async move { try_connect(&url, query).await })
    })
    .with_server(Arc::new(server))
    .with_lease(Duration::from_secs(1))
    .with_quiet(Duration::from_secs(1));
    judge_server(harness, cases).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_breaks_no_promise() {
    by_the_suite("suite", "", KILLED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_breaks_no_promise_of_classic_queues() {
    by_the_suite("suite-classic", "queue=classic", KILLED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_breaks_no_promise_of_streams() {
    by_the_suite("suite-stream", "queue=stream", KILLED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_alarm_and_a_changed_password_break_no_promise() {
    by_the_suite("alarm", "", &["faults/a-server-without-room-*", "faults/clients-that-are-locked-out-*"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_in_the_middle_loses_nothing_that_was_confirmed() {
    const PUBLISHERS: u32 = 4;
    const EACH: u32 = 2_000;
    let Some(server) = own_server("kill") else { return };
    let name = unique("killed");
    let bus = connect(&server.url, "publish_timeout=3s").await;
    let mut members = Vec::new();
    for _ in 0..2 {
        members.push(
            bus.subscribe(bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(5))).await.unwrap(),
        );
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
                    tokio::time::sleep(Duration::from_millis(40)).await;
                }
            })
        })
        .collect();
    // Everything that any member has seen: they go on until that is all there is, however long the outage takes.
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let consumers: Vec<_> = members
        .into_iter()
        .map(|mut member| {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let (mut deliveries, mut events) = (0, Vec::new());
                let deadline = Instant::now() + LONG * 6;
                let is_complete = |events: &[SubscriptionEvent]| {
                    let all = seen.lock().unwrap().len() >= (PUBLISHERS * EACH) as usize;
                    all && events.contains(&SubscriptionEvent::Recovered)
                };
                while !is_complete(&events) && Instant::now() < deadline {
                    let received = member.receive_all(100, Duration::from_secs(1)).await.unwrap();
                    events.extend(received.events);
                    deliveries += received.deliveries.len();
                    seen.lock().unwrap().extend(received.deliveries.iter().map(number));
                    // An ack that the crash swallowed gives the delivery back, and that brings it again.
                    drop(ack(received.deliveries).await);
                }
                member.close(LONG).await.unwrap();
                (deliveries, events)
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
    let mut deliveries = 0;
    for consumer in consumers {
        let (count, events) = consumer.await.unwrap();
        assert!(events.iter().any(|event| matches!(event, SubscriptionEvent::Degraded { .. })), "{events:?}");
        assert!(events.contains(&SubscriptionEvent::Recovered), "{events:?}");
        deliveries += count;
    }
    let seen = seen.lock().unwrap().clone();
    let lost: Vec<_> = (0..PUBLISHERS * EACH).filter(|number| !seen.contains(number)).collect();
    assert!(lost.is_empty(), "{} lost: {:?}", lost.len(), &lost[..lost.len().min(20)]);
    assert_eq!(seen.len(), (PUBLISHERS * EACH) as usize, "nothing that was never published");
    println!("{} messages, {deliveries} deliveries", seen.len());
    bus.close(LONG).await.unwrap();
}

/// Publishes what has no confirmation again, with the same ids.
async fn publish_until_confirmed(bus: &Bus, mut batch: Vec<Message>) {
    let deadline = Instant::now() + Duration::from_secs(60);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_and_delays_survive_a_killed_server() {
    let Some(server) = own_server("attempts") else { return };
    let name = unique("attempts");
    let bus = connect(&server.url, "").await;
    let spec = bus.subscription(name.as_str(), "g").with_max_attempts(None).with_lease(Duration::from_secs(5));
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    publish(&bus, numbered(&name, 0..3)).await;
    let delay = Duration::from_secs(4);
    let nacked = Instant::now();
    let mut deliveries = receive(&mut subscriber, 3).await;
    let kept = deliveries.split_off(1);
    deliveries.remove(0).nack(delay).await.unwrap();
    for outcome in ack(kept).await {
        outcome.unwrap();
    }
    server.does("kill").await;
    server.does("restart").await;
    let back = loop {
        let mut came = receive(&mut subscriber, 1).await;
        let came = came.remove(0);
        // The source of the copy that waits may have come back too, with its own attempt.
        if number(&came) == 0 && came.attempt() == 1 {
            drop(came.ack().await);
            continue;
        }
        // An ack is sent and not confirmed: a kill may bring the message again.
        if number(&came) == 0 {
            break came;
        }
        assert_eq!(came.attempt(), 1);
        drop(came.ack().await);
    };
    assert!(nacked.elapsed() >= delay, "it came back after {:?} of {delay:?}", nacked.elapsed());
    assert_eq!(back.attempt(), 2);
    back.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_leaves_publishes_unknown_at_their_deadline_and_nothing_hangs() {
    let Some(server) = own_server("frozen") else { return };
    let name = unique("frozen");
    let bus = connect(&server.url, "").await;
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    server.does("pause").await;
    // The signal may reach the server's threads a moment later.
    let probe = PublishOptions::default().with_timeout(Duration::from_millis(300));
    while bus.submit(vec![Message::new(unique("probe").as_str(), "x")], &probe).await.await.remove(0).is_ok() {}
    let begun = Instant::now();
    let options = PublishOptions::default().with_timeout(Duration::from_secs(1));
    let message = Message::new(name.as_str(), "1");
    let error = bus.submit(vec![message.clone()], &options).await.await.remove(0).unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Timeout, Effect::Unknown));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    server.does("resume").await;
    publish_until_confirmed(&bus, vec![message]).await;
    // The first attempt may have been stored too: the server keeps both, under one id.
    let mut seen = HashSet::new();
    while seen.len() < 2 {
        for delivery in receive(&mut subscriber, 1).await {
            seen.insert(number(&delivery));
            drop(delivery.ack().await);
        }
    }
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Receives, fails one, and dies holding the rest. Run as a process of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crasher() {
    let Ok(name) = std::env::var(CRASHER) else { return };
    let bus = connect(&url().unwrap(), "").await;
    let ordered = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(2)).with_order(Order::Key);
    let mut subscriber = bus.subscribe(ordered).await.unwrap();
    let mut deliveries = receive(&mut subscriber, 3).await;
    let failed = deliveries.remove(0);
    settle(vec![(failed, Settlement::Nack(anybroker_core::Nack { delay: Duration::from_secs(6), error_type: None }))])
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
    let spec = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(2)).with_order(Order::Key);
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
    // The failed copy is confirmed before its source is acked; that the ack was written when the process died is not known
    // (`ack_level` is sent). Then the source comes back beside its copy, once.
    let mut came: Vec<(u32, u32)> = Vec::new();
    while !came.contains(&(0, 2)) || came.iter().filter(|(number, _)| *number != 0).count() < 5 {
        for delivery in receive(&mut subscriber, 1).await {
            came.push((number(&delivery), delivery.attempt()));
            delivery.ack().await.unwrap();
        }
    }
    let (failed, held): (Vec<_>, Vec<_>) = came.into_iter().partition(|(number, _)| *number == 0);
    assert!([&[(0, 2)][..], &[(0, 1), (0, 2)]].contains(&&failed[..]), "its failure is remembered: {failed:?}");
    let expected: Vec<_> = (1..6).map(|number| (number, 1)).collect();
    assert_eq!(held, expected, "what the dead member held comes before what is behind it, and a crash is no failure");
    assert!(begun.elapsed() >= Duration::from_secs(6), "its delay is kept");
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}
