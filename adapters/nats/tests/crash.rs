//! What a killed, restarted or frozen server and a killed consumer must not break.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::{HashMap, HashSet};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anybroker_conformance::{Level, Options, UrlHarness, Volume, routes_of, run, url_through, volume};
use anybroker_core::{
    Bus, Effect, ErrorKind, Message, Order, PublishOptions, Settlement, SubscriptionEvent, ack, settle,
};
use anybroker_testing::OwnServer;
use common::{LONG, connect, number, numbered, publish, receive, try_connect, unique, url};
use tokio::time::Instant;

const CRASHER: &str = "ANYBROKER_NATS_TEST_CRASHER";

/// A server of this test's own; `None` after saying why there is none.
fn own_server(name: &str) -> Option<OwnServer> {
    url()?;
    OwnServer::start("nats", name)
}

/// Of the suite's cases about a server those that `many_messages_…` is not about, on a server of this test's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_frozen_full_or_closed_to_its_clients_breaks_no_promise() {
    let Some(server) = own_server("suite") else { return };
    let url = server.url.clone();
    let harness = UrlHarness::new("nats", move || {
        let url = url.clone();
        Box::pin(async move { try_connect(&url, "").await })
    })
    .with_server(Arc::new(server))
    .with_lease(Duration::from_secs(1))
    .with_quiet(Duration::from_secs(1));
    let options = Options::default().with_level(Level::Reliability).with_seed(1);
    let cases =
        ["faults/a-server-that-is-frozen-*", "faults/a-server-without-*", "faults/clients-that-are-locked-out-*"];
    let options = cases.iter().fold(options, |options, case| options.with_filter(*case));
    let report = run(Arc::new(harness), options).await.unwrap();
    println!("{}", report.text());
    assert!(report.is_green() && report.totals.not_run == 0, "{}", report.summary());
}

/// Twenty thousand and the cut alone; with `ANYBROKER_TEST_VOLUME=1` a hundred thousand, and the kill before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_messages_survive_a_cut_and_a_kill_and_keep_the_order_of_their_keys() {
    let Some(server) = own_server("volume") else { return };
    let (url, through) = (server.url.clone(), server.url.clone());
    let routes = routes_of(&url).unwrap();
    let harness = UrlHarness::new("nats", move || {
        let url = url.clone();
        Box::pin(async move { try_connect(&url, "").await })
    })
    .with_proxies(routes, move |addresses| {
        let url = url_through(&through, &addresses);
        Box::pin(async move { try_connect(&url, "").await })
    });
    let report = if std::env::var("ANYBROKER_TEST_VOLUME").is_ok_and(|value| value == "1") {
        volume(&harness.with_server(Arc::new(server)), &Volume::default()).await.unwrap()
    } else {
        volume(&harness, &Volume { messages: 20_000, ..Volume::default() }).await.unwrap()
    };
    println!("{report}");
    assert!(report.is_green(), "{report:?}");
    assert!(report.cut >= 12, "connections went past the proxy: {}", report.cut);
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

/// Publishes what has no confirmation again, with the same ids: the server keeps one copy.
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
    // A server that is killed at once has not written down yet that it was told a delay: then the message comes back when
    // its lease ends.
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
        // An ack is kept in the server's memory for a moment before it is written: a kill may bring it again.
        if number(&came) == 0 {
            break came;
        }
        assert_eq!(came.attempt(), 1);
        came.ack().await.unwrap();
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
    // The first attempt may have been stored: the same id is kept once.
    publish_until_confirmed(&bus, vec![message]).await;
    let came = receive(&mut subscriber, 2).await;
    assert_eq!(came.iter().map(number).collect::<Vec<_>>(), [0, 1]);
    for outcome in ack(came).await {
        outcome.unwrap();
    }
    common::nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Receives, fails one, and dies holding the rest. Run as a process of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crasher() {
    let Ok(name) = std::env::var(CRASHER) else { return };
    let bus = connect(&url().unwrap(), "member_timeout=1s").await;
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
    let bus = connect(&url, "member_timeout=1s").await;
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
    bus.close(LONG).await.unwrap();
}
