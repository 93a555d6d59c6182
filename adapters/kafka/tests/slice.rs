//! What the slice promises, on a running broker.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::process::Command;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Bus, Config, Effect, ErrorKind, Message, PublishOptions, Reason, Registry, Settlement, Start,
    SubscriptionEvent, Timestamp, TopologyMode, TopologySpec, Verdict, ack, settle,
};
use anybroker_kafka::KafkaDriver;
use common::{LONG, connect, nothing, number, numbered, publish, receive, unique, url};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::time::Instant;

const CRASHER: &str = "ANYBROKER_KAFKA_TEST_CRASHER";
/// Longer than a dead member keeps its partitions.
const DELAY: Duration = Duration::from_secs(9);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_shape_of_message_comes_back_byte_for_byte() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let destination = unique("shapes");
    let name = destination.as_str();
    let mut subscriber = bus.subscribe(bus.subscription(name, "g")).await.unwrap();
    let all_bytes: Vec<u8> = (0..=255).collect();
    let messages = vec![
        Message::new(name, all_bytes.clone()).with_key(all_bytes.clone()).with_id("not a uuid ✓"),
        Message::new(name, ""),
        Message::tombstone(name, "k"),
        Message::new(name, "key is empty").with_key(""),
        Message::new(name, "headers")
            .with_header("a", "1")
            .with_header("A", all_bytes.clone())
            .with_header("a", "")
            .with_header("ключ", "значение")
            .with_header("content-type", "the user's own"),
        Message::new(name, "typed").with_content_type("application/json").with_header("x", "y"),
        Message::new(name, "both").with_content_type("text/plain").with_header("content-type", "the user's own"),
        Message::new(name, "nul").with_content_type("text/plain").with_header("a\0b", "1").with_header("a", "2"),
        Message::new(name, "old").with_timestamp(Timestamp::from_millis(1_000)),
        Message::new(name, "epoch").with_timestamp(Timestamp::from_millis(0)),
        Message::new(name, "before").with_timestamp(Timestamp::from_millis(-5)),
        Message::new(name, "future").with_timestamp(Timestamp::now().after(Duration::from_secs(90_000))),
    ];
    publish(&bus, messages.clone()).await;
    let deliveries = receive(&mut subscriber, messages.len()).await;
    // Without a key the client chooses partitions; there is one.
    for (delivery, sent) in deliveries.iter().zip(&messages) {
        assert_eq!(delivery.message(), sent);
        assert_eq!((delivery.attempt(), delivery.facts().deliveries), (1, None));
    }
    ack(deliveries).await.into_iter().for_each(|outcome| assert_eq!(outcome.unwrap(), AckLevel::Recorded));
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_entry_of_a_batch_has_its_own_outcome() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let destination = unique("outcomes");
    let name = destination.as_str();
    let mut subscriber = bus.subscribe(bus.subscription(name, "g")).await.unwrap();
    let limits = bus.capabilities().limits;
    let payload = usize::try_from(limits.payload.unwrap()).unwrap();
    let batch = vec![
        Message::new(name, "0").with_key("a"),
        Message::new(name, vec![7; payload + 1]).with_key("b"),
        Message::new(name, "held back").with_key("b"),
        Message::new(name, "1").with_key("a"),
        Message::new(name, vec![7; payload]).with_key("c").with_header("h", vec![1; 30_000]),
        Message::new(name, "reserved").with_header("anybroker-meta", "forged"),
        Message::new(name, "2").with_key("a"),
    ];
    let outcomes = bus.publish(batch).await;
    let kinds: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().err().map(|error| error.kind())).collect();
    let (large, held, invalid) = (ErrorKind::TooLarge, ErrorKind::Unavailable, ErrorKind::InvalidMessage);
    assert_eq!(kinds, [None, Some(large), Some(held), None, None, Some(invalid), None]);
    assert!(outcomes.iter().flat_map(|outcome| outcome.as_ref().err()).all(|error| error.effect() == Effect::NotDone));
    let deliveries = receive(&mut subscriber, 4).await;
    let sizes: Vec<_> = deliveries.iter().map(|delivery| delivery.message().bytes().len()).collect();
    assert_eq!(sizes, [1, 1, payload, 1]);
    drop(ack(deliveries));
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_destination_is_not_found_unless_it_may_be_created() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "create_destinations=false").await;
    let name = unique("missing");
    let error = bus.send(Message::new(name.as_str(), "x")).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::NotFound, Effect::NotDone));
    let spec = bus.subscription(name.as_str(), "g").with_topology(TopologyMode::Verify);
    assert_eq!(bus.subscribe(spec.clone()).await.unwrap_err().kind(), ErrorKind::NotFound);
    let topology = TopologySpec::group(name.as_str(), "g");
    assert_eq!(bus.verify(&topology).await.unwrap_err().kind(), ErrorKind::NotFound);
    bus.declare(&topology).await.unwrap();
    bus.verify(&topology).await.unwrap();
    bus.send(Message::new(name.as_str(), "kept")).await.unwrap();
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    assert_eq!(receive(&mut subscriber, 1).await[0].message().bytes(), b"kept");
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    assert_eq!(bus.verify(&topology).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_keeps_what_was_acked_above_a_hole_and_brings_back_the_hole() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("hole");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..10)).await;
    let mut deliveries = receive(&mut subscriber, 10).await;
    let hole = deliveries.remove(5);
    // In any order.
    deliveries.reverse();
    for outcome in ack(deliveries).await {
        outcome.unwrap();
    }
    subscriber.close(LONG).await.unwrap();
    let late = hole.ack().await.unwrap_err();
    assert_eq!(late.error().kind(), ErrorKind::StaleDelivery);
    drop(late);
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let again = receive(&mut subscriber, 1).await;
    assert_eq!((number(&again[0]), again[0].attempt()), (5, 1));
    // What the commit before told goes into the next one too.
    subscriber.close(LONG).await.unwrap();
    drop(again);
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let again = receive(&mut subscriber, 1).await;
    assert_eq!(number(&again[0]), 5);
    drop(ack(again));
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    nothing(&mut subscriber).await;
    publish(&bus, numbered(&name, 10..11)).await;
    assert_eq!(number(&receive(&mut subscriber, 1).await[0]), 10);
    subscriber.close(LONG).await.unwrap();
}

/// The part of [`after_a_crash_only_the_hole_comes_again_and_a_nack_keeps_its_delay_and_its_count`] that is killed; nothing when run by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_member_that_crashes() {
    let (Some(url), Ok(name)) = (std::env::var("ANYBROKER_TEST_KAFKA_URL").ok(), std::env::var(CRASHER)) else {
        return;
    };
    let bus = connect(&url, "partitions=1&session_timeout=6s").await;
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let mut deliveries = receive(&mut subscriber, 10).await;
    deliveries.remove(7).nack(DELAY).await.unwrap();
    let _hole = deliveries.remove(5);
    for outcome in ack(deliveries).await {
        outcome.unwrap();
    }
    // It goes on as a living member until it is killed.
    subscriber.receive(10, Duration::from_secs(120)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_crash_only_the_hole_comes_again_and_a_nack_keeps_its_delay_and_its_count() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1&session_timeout=6s").await;
    let name = unique("crash");
    bus.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..10)).await;
    let start = Instant::now();
    let mut member = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_member_that_crashes", "--nocapture"])
        .env(CRASHER, &name)
        .spawn()
        .unwrap();
    // Asked of Kafka itself, beside the adapter.
    let deadline = Instant::now() + LONG;
    while committed(&bus, &name, "g") != Some(5) {
        assert!(Instant::now() < deadline, "committed: {:?}", committed(&bus, &name, "g"));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    member.kill().unwrap();
    member.wait().unwrap();
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let again = receive(&mut subscriber, 2).await;
    let mut found: Vec<_> = again.iter().map(|delivery| (number(delivery), delivery.attempt())).collect();
    found.sort_unstable();
    assert_eq!(found, [(5, 1), (7, 2)]);
    assert!(start.elapsed() >= DELAY, "back after {:?}", start.elapsed());
    drop(ack(again));
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
}

fn committed(bus: &Bus, topic: &str, group: &str) -> Option<i64> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", bus.endpoint().url.trim_start_matches("kafka://").trim_end_matches('/'))
        .set("group.id", format!("{topic}/{group}"))
        .create()
        .unwrap();
    let mut partitions = TopicPartitionList::new();
    partitions.add_partition(topic, 0);
    let offsets = consumer.committed_offsets(partitions, LONG).unwrap();
    match offsets.elements()[0].offset() {
        Offset::Offset(offset) => Some(offset),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nack_comes_back_after_its_delay_and_never_before_while_others_go_on() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("nack");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..2)).await;
    let mut deliveries = receive(&mut subscriber, 2).await;
    deliveries.pop().unwrap().ack().await.unwrap();
    let delay = Duration::from_millis(700);
    let before = Instant::now();
    deliveries.pop().unwrap().nack(delay).await.unwrap();
    publish(&bus, numbered(&name, 2..3)).await;
    let other = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&other), other.attempt()), (2, 1));
    other.ack().await.unwrap();
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert!(before.elapsed() >= delay, "{:?}", before.elapsed());
    assert_eq!((number(&again), again.attempt()), (0, 2));
    // Unsettled, or given back: no failure, so no attempt.
    drop(again);
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (0, 2));
    again.release().await.unwrap();
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (0, 2));
    again.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_attempt_leaves_one_dead_letter_and_silence() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("letters");
    let spec = bus.subscription(name.as_str(), "g").with_max_attempts(2);
    let mut subscriber = bus.subscribe(spec.clone()).await.unwrap();
    let sent = Message::new(name.as_str(), vec![0, 255]).with_key("k").with_header("h", "1").with_content_type("x/y");
    publish(&bus, vec![sent.clone(), Message::new(name.as_str(), "rejected")]).await;
    let mut deliveries = receive(&mut subscriber, 2).await;
    let verdict = Verdict::new(Reason::Rejected).with_error_type("VALIDATION").with_detail("no such product ✗");
    deliveries.pop().unwrap().dead_letter(verdict).await.unwrap();
    deliveries.pop().unwrap().nack(Duration::ZERO).await.unwrap();
    receive(&mut subscriber, 1).await.remove(0).nack(Duration::ZERO).await.unwrap();
    nothing(&mut subscriber).await;
    let mut letters = bus.dead_letters(name.as_str(), "g").unwrap().peek(&Default::default(), 10).await.unwrap();
    letters.sort_by_key(|letter| letter.attempts);
    assert_eq!(letters.len(), 2);
    let (rejected, exhausted) = (&letters[0], &letters[1]);
    assert_eq!(exhausted.message, sent);
    assert_eq!((&exhausted.reason, exhausted.attempts), (&Reason::AttemptsExhausted, 2));
    assert_eq!((&rejected.reason, rejected.error_type.as_deref()), (&Reason::Rejected, Some("VALIDATION")));
    assert_eq!(rejected.detail.as_deref(), Some("no such product ✗"));
    // Settled: nothing comes back in this group, another group has none of its letters.
    subscriber.close(LONG).await.unwrap();
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    nothing(&mut subscriber).await;
    bus.declare(&TopologySpec::group(name.as_str(), "other")).await.unwrap();
    let others = bus.dead_letters(name.as_str(), "other").unwrap();
    assert!(others.peek(&Default::default(), 10).await.unwrap().is_empty());
    publish(&bus, vec![Message::new(name.as_str(), "canary")]).await;
    assert_eq!(receive(&mut subscriber, 1).await[0].message().bytes(), b"canary");
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settle_of_a_partition_that_moved_on_is_stale_and_harms_nothing() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=2&revoke_wait=300ms").await;
    let name = unique("revoked");
    let mut first = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let batch: Vec<_> =
        (0..40).map(|number| Message::new(name.as_str(), number.to_string()).with_key(number.to_string())).collect();
    publish(&bus, batch).await;
    let held = receive(&mut first, 40).await;
    let mut second = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let mut events = Vec::new();
    let deadline = Instant::now() + LONG;
    while !events.iter().any(|event| matches!(event, SubscriptionEvent::Lost { .. })) {
        assert!(Instant::now() < deadline, "{events:?}");
        events.extend(first.receive_all(10, Duration::from_millis(100)).await.unwrap().events);
    }
    let lost: HashSet<u32> = events
        .iter()
        .filter_map(|event| match event {
            SubscriptionEvent::Lost { lane } => Some(lane.index),
            _ => None,
        })
        .collect();
    assert!(events.iter().any(|event| matches!(event, SubscriptionEvent::Revoking { .. })), "{events:?}");
    let moved: HashSet<u32> =
        held.iter().filter(|delivery| lost.contains(&delivery.lane().index)).map(number).collect();
    assert!(!moved.is_empty() && moved.len() < 40, "one of two partitions moved");
    let batch = held.into_iter().map(|delivery| (delivery, Settlement::Ack)).collect();
    for outcome in settle(batch).await {
        match outcome {
            Ok(level) => assert_eq!(level, AckLevel::Recorded),
            Err(stale) => {
                assert_eq!(stale.error().kind(), ErrorKind::StaleDelivery);
                assert!(moved.contains(&number(&stale.into_delivery())));
            }
        }
    }
    let again = receive(&mut second, moved.len()).await;
    assert_eq!(again.iter().map(number).collect::<HashSet<_>>(), moved);
    drop(ack(again));
    nothing(&mut second).await;
    nothing(&mut first).await;
    second.close(LONG).await.unwrap();
    // The lane comes home, under a new epoch, with nothing left.
    nothing(&mut first).await;
    publish(&bus, (0..10).map(|key| Message::new(name.as_str(), "canary").with_key(key.to_string())).collect()).await;
    receive(&mut first, 10).await;
    first.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_batches_flow_under_a_small_bound_in_order_per_key() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=3").await;
    let name = unique("flow");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g").with_max_in_flight(150)).await.unwrap();
    let mut confirms = Vec::new();
    for batch in 0..50_u32 {
        let messages = (0..100)
            .map(|entry| {
                Message::new(name.as_str(), (batch * 100 + entry).to_string()).with_key((entry % 10).to_string())
            })
            .collect();
        confirms.push(bus.submit(messages, &PublishOptions::default()).await);
    }
    for confirm in confirms {
        assert_eq!(confirm.await.into_iter().filter(Result::is_ok).count(), 100);
    }
    let (mut seen, mut last) = (0, [None; 10]);
    let mut waiting = Vec::new();
    while seen < 5_000 {
        let deliveries = receive(&mut subscriber, 50.min(5_000 - seen)).await;
        seen += deliveries.len();
        assert!(subscriber.in_flight() <= 150);
        for delivery in &deliveries {
            let number = number(delivery);
            let before = last[(number % 10) as usize].replace(number);
            assert!(before < Some(number), "{before:?} before {number}");
        }
        waiting.push(deliveries);
        // Up to three batches are out at a time.
        if waiting.len() == 3 {
            assert_eq!(ack(waiting.remove(0)).await.into_iter().filter(Result::is_ok).count(), 50);
        }
    }
    for deliveries in waiting {
        assert!(ack(deliveries).await.iter().all(Result::is_ok));
    }
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    nothing(&mut subscriber).await;
    publish(&bus, numbered(&name, 0..1)).await;
    receive(&mut subscriber, 1).await;
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn latest_is_fixed_when_subscribe_returns_and_groups_do_not_share() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("latest");
    publish(&bus, numbered(&name, 0..3)).await;
    let latest = bus.subscription(name.as_str(), "late").with_start(Start::Latest);
    let mut late = bus.subscribe(latest).await.unwrap();
    publish(&bus, numbered(&name, 3..6)).await;
    let mut early = bus.subscribe(bus.subscription(name.as_str(), "early")).await.unwrap();
    let numbers = |deliveries: &[anybroker_core::Delivery]| deliveries.iter().map(number).collect::<Vec<_>>();
    assert_eq!(numbers(&receive(&mut late, 3).await), [3, 4, 5]);
    assert_eq!(numbers(&receive(&mut early, 6).await), [0, 1, 2, 3, 4, 5]);
    late.close(LONG).await.unwrap();
    early.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_receives_lose_nothing_and_burn_no_attempt() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("cancel");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let (mut next, mut cancelled) = (0, 0);
    for round in 0..200_u32 {
        // On its way, so that the first receives find nothing, and later ones are cancelled about when it comes.
        let confirms = bus.submit(numbered(&name, round..round + 1), &PublishOptions::default()).await;
        for _ in 0..3 {
            let receiving = subscriber.receive(1, LONG);
            match tokio::time::timeout(Duration::from_micros(u64::from(round * 370 % 9000)), receiving).await {
                Err(_) => cancelled += 1,
                Ok(deliveries) => {
                    for delivery in deliveries.unwrap() {
                        assert_eq!((number(&delivery), delivery.attempt()), (next, 1));
                        next += 1;
                        delivery.ack().await.unwrap();
                    }
                }
            }
            if next > round {
                break;
            }
        }
        confirms.await.remove(0).unwrap();
    }
    assert!(cancelled > 0);
    while next < 200 {
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        assert_eq!((number(&delivery), delivery.attempt()), (next, 1));
        next += 1;
        delivery.ack().await.unwrap();
    }
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_subscription_gets_nothing_until_it_is_resumed() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("pause");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    subscriber.pause(true).await.unwrap();
    publish(&bus, numbered(&name, 0..3)).await;
    nothing(&mut subscriber).await;
    subscriber.pause(false).await.unwrap();
    assert_eq!(receive(&mut subscriber, 3).await.len(), 3);
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_deleted_ends_the_subscription_with_not_found() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("deleted");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    let deadline = Instant::now() + LONG;
    let error = loop {
        assert!(Instant::now() < deadline, "it goes on in silence");
        if let Err(error) = subscriber.receive(1, Duration::from_millis(200)).await {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_not_there_is_a_typed_error_within_the_connect_timeout() {
    // Bound and not listening: nobody else takes the port, and connecting is refused.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("kafka://{}?connect_timeout=1s", socket.local_addr().unwrap());
    let start = Instant::now();
    let error = Registry::new().with(KafkaDriver).connect(Config::from_url(url)).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(start.elapsed() < Duration::from_secs(5));
    let url = "kafka://user:secret@127.0.0.1:9092?partitions=x&nonsense=1";
    let error = Registry::new().with(KafkaDriver).connect(Config::from_url(url)).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(!format!("{error:?}").contains("secret"));
}
