//! What is this adapter's own, on a running broker.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anybroker_core::{
    AckLevel, Effect, ErrorKind, Group, Message, Order, Reason, Start, SubscriptionEvent, Timestamp, TopologySpec,
    Verdict, ack,
};
use common::{LONG, connect, nothing, number, numbered, publish, receive, try_connect, unique, url};
use pulsar::{Pulsar, TokioExecutor};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_shape_of_message_comes_back_byte_for_byte_also_as_a_retry_and_a_redriven_letter() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let destination = unique("shapes");
    let name = destination.as_str();
    let mut subscriber = bus.subscribe(bus.subscription(name, "g")).await.unwrap();
    let all_bytes: Vec<u8> = (0..=255).collect();
    let messages = vec![
        Message::new(name, all_bytes.clone()).with_key(all_bytes.clone()).with_id("not a uuid ✓"),
        Message::new(name, ""),
        Message::tombstone(name, "k"),
        Message::new(name, "headers").with_header("b", "1").with_header("a", all_bytes).with_header("b", ""),
        Message::new(name, "native").with_header("b", "1").with_header("a", "2").with_header("b", "3"),
        Message::new(name, "both").with_content_type("text/plain").with_header("content-type", "the user's own"),
        Message::new(name, "before").with_timestamp(Timestamp::from_millis(-5)),
    ];
    let expected: BTreeMap<_, _> = messages.iter().map(|message| (message.id().to_string(), message.clone())).collect();
    publish(&bus, messages.clone()).await;
    for attempt in 1..=2 {
        for delivery in receive(&mut subscriber, messages.len()).await {
            assert_eq!(delivery.message(), &expected[&delivery.message().id().to_string()]);
            assert_eq!(delivery.attempt(), attempt);
            let settled = match attempt {
                1 => delivery.nack(Duration::ZERO).await,
                _ => delivery.dead_letter(Verdict::new(Reason::Rejected)).await,
            };
            assert_eq!(settled.unwrap(), AckLevel::Confirmed);
        }
    }
    let letters = bus.dead_letters(name, "g").unwrap();
    let found = letters.page(None, 100).await.unwrap().letters;
    assert_eq!(found.len(), messages.len());
    for letter in &found {
        assert_eq!(letter.message, expected[&letter.message.id().to_string()]);
        assert_eq!((letter.attempts, letter.redrives), (2, 0));
    }
    assert_eq!(letters.redrive(&Default::default()).await.unwrap().moved, found.len() as u64);
    let deliveries = receive(&mut subscriber, messages.len()).await;
    for delivery in &deliveries {
        assert_eq!(delivery.message(), &expected[&delivery.message().id().to_string()]);
        assert_eq!(delivery.attempt(), 1);
    }
    ack(deliveries).await.into_iter().for_each(|outcome| assert_eq!(outcome.unwrap(), AckLevel::Confirmed));
    subscriber.close(LONG).await.unwrap();
    bus.delete(name, None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_keep_order_per_key_and_refuse_total_order() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=3").await;
    let name = unique("partitioned");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let batch =
        (0..300).map(|number| Message::new(name.as_str(), number.to_string()).with_key(format!("key {}", number % 10)));
    publish(&bus, batch.collect()).await;
    let mut came: BTreeMap<Vec<u8>, Vec<u32>> = BTreeMap::new();
    let mut lanes = BTreeSet::new();
    let mut failed = None;
    for delivery in receive(&mut subscriber, 300).await {
        came.entry(delivery.message().key().unwrap().to_vec()).or_default().push(number(&delivery));
        lanes.insert(delivery.lane().index);
        if number(&delivery) == 7 {
            failed = Some(delivery.message().id().clone());
            delivery.nack(Duration::from_millis(200)).await.unwrap();
        } else {
            delivery.ack().await.unwrap();
        }
    }
    assert!(came.values().all(|numbers| numbers.is_sorted() && numbers.len() == 30), "{came:?}");
    assert!(lanes.len() > 1, "ten keys lie on one partition of three: {lanes:?}");
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((Some(again.message().id()), again.attempt()), (failed.as_ref(), 2));
    again.ack().await.unwrap();
    let lag = bus.lag(name.as_str(), "g").await.unwrap();
    assert_eq!(lag.total(), Some(0));
    let total = bus.subscription(name.as_str(), "other").with_order(Order::Total);
    assert_eq!(bus.subscribe(total).await.unwrap_err().kind(), ErrorKind::Unsupported);
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    let plain = connect(&url, "").await;
    assert_eq!(plain.describe(name.as_str()).await.unwrap_err().kind(), ErrorKind::NotFound);
    plain.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// pulsar-rs #428: there, acking one message of a batch acks all of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_another_producer_is_acked_with_its_last_message_and_loses_none() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("batched");
    bus.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let client = Pulsar::builder(url.split('?').next().unwrap(), TokioExecutor).build().await.unwrap();
    let options = pulsar::ProducerOptions { batch_size: Some(5), ..Default::default() };
    let topic = format!("persistent://public/default/{name}");
    let mut producer = client.producer().with_topic(topic).with_options(options).build().await.unwrap();
    let mut receipts = Vec::new();
    for number in 0..5 {
        receipts.push(producer.send_non_blocking(number.to_string()).await.unwrap());
    }
    for receipt in receipts {
        receipt.await.unwrap();
    }
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let mut deliveries = receive(&mut subscriber, 5).await;
    assert_eq!(deliveries.iter().map(number).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    let last = deliveries.pop().unwrap();
    for outcome in ack(deliveries).await {
        assert_eq!(outcome.unwrap(), AckLevel::Recorded, "the entry is not acked yet");
    }
    drop(last);
    subscriber.close(LONG).await.unwrap();
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let mut deliveries = receive(&mut subscriber, 5).await;
    deliveries.remove(2).nack(Duration::ZERO).await.unwrap();
    let outcomes: Vec<_> = ack(deliveries).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(outcomes.last(), Some(&AckLevel::Confirmed));
    let failed = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&failed), failed.attempt()), (2, 2));
    failed.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    producer.close().await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// pulsar-rs #263, #156, #118: there, consumers stop or hang after an unload.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unloaded_topic_is_received_from_and_published_to_again() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("unloaded");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..10)).await;
    let deliveries = receive(&mut subscriber, 10).await;
    unload(&url, &name).await;
    let mut degraded = false;
    let deadline = Instant::now() + LONG;
    let mut events = Vec::new();
    while !events.contains(&SubscriptionEvent::Recovered) {
        assert!(Instant::now() < deadline, "{events:?}");
        let received = subscriber.receive_all(100, Duration::from_millis(200)).await.unwrap();
        degraded |= received.events.iter().any(|event| matches!(event, SubscriptionEvent::Degraded { .. }));
        events.extend(received.events);
        ack(received.deliveries).await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    }
    assert!(degraded);
    for outcome in ack(deliveries).await {
        assert_eq!(outcome.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    }
    publish(&bus, numbered(&name, 10..20)).await;
    let mut seen = BTreeSet::new();
    while !(10..20).all(|number| seen.contains(&number)) {
        assert!(Instant::now() < deadline, "{seen:?}");
        let received = subscriber.receive(100, Duration::from_secs(1)).await.unwrap();
        seen.extend(received.iter().map(number));
        ack(received).await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    }
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

async fn unload(url: &str, topic: &str) {
    let admin = url.split("http://").nth(1).unwrap();
    let mut stream = tokio::net::TcpStream::connect(admin).await.unwrap();
    let request = format!(
        "PUT /admin/v2/persistent/public/default/{topic}/unload HTTP/1.1\r\nHost: {admin}\r\nContent-Length: 0\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_group_ends_its_subscriptions_and_a_deleted_destination_refuses_or_is_made_again() {
    let Some(url) = url() else { return };
    let (bus, strict) = (connect(&url, "").await, connect(&url, "create_destinations=false").await);
    let name = unique("deleted");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&strict, numbered(&name, 0..1)).await;
    bus.delete(name.as_str(), Some(&Group::from("g"))).await.unwrap();
    let error = loop {
        match subscriber.receive(10, LONG).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::NotFound);
    bus.delete(name.as_str(), None).await.unwrap();
    let error = strict.send(Message::new(name.as_str(), "x")).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::NotFound, Effect::NotDone));
    bus.declare(&TopologySpec::destination(name.as_str())).await.unwrap();
    strict.send(Message::new(name.as_str(), "x")).await.unwrap();
    let mut again = bus.subscribe(bus.subscription(name.as_str(), "g").with_start(Start::Earliest)).await.unwrap();
    receive(&mut again, 1).await.remove(0).ack().await.unwrap();
    again.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
    strict.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_hands_the_order_over_at_once() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("handover");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key).with_lease(Duration::from_secs(60));
    let mut first = bus.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..10)).await;
    let held = receive(&mut first, 4).await;
    let mut second = bus.subscribe(spec).await.unwrap();
    nothing(&mut second).await;
    let begun = Instant::now();
    first.close(LONG).await.unwrap();
    let came = receive(&mut second, 10).await;
    assert_eq!(came.iter().map(number).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    drop(held);
    ack(came).await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    second.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_batches_are_on_their_way_and_dropped_answers_lose_nothing() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("pipelined");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g").with_order(Order::Key)).await.unwrap();
    let begun = Instant::now();
    let mut waiting = Vec::new();
    for batch in 0..100 {
        let confirms = bus.submit(numbered(&name, batch * 100..batch * 100 + 100), &Default::default()).await;
        if batch % 2 == 0 {
            waiting.push(confirms);
        } else {
            drop(confirms);
        }
    }
    for confirms in waiting {
        confirms.await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    }
    println!("10,000 published in {:?}", begun.elapsed());
    let begun = Instant::now();
    let mut came = Vec::new();
    while came.len() < 10_000 {
        let batch = subscriber.receive(1_000, LONG).await.unwrap();
        assert!(!batch.is_empty(), "{} of 10,000 came", came.len());
        came.extend(batch.iter().map(number));
        ack(batch).await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    }
    println!("10,000 received and acked in {:?}", begun.elapsed());
    assert_eq!(came, (0..10_000).collect::<Vec<_>>());
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_reached_is_an_error_within_the_connect_timeout_and_nothing_tells_the_token() {
    let begun = Instant::now();
    let nowhere = "pulsar://127.0.0.1:9?admin=http://127.0.0.1:9";
    let error = try_connect(nowhere, "connect_timeout=2s&token=MARKER").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert!(!format!("{error} {error:?}").contains("MARKER"));
    let error = try_connect("pulsar://u:MARKER@127.0.0.1:9/x?admin=ftp://x", "tenant=a b").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(!format!("{error} {error:?}").contains("MARKER"));
    let error = try_connect("pulsar://127.0.0.1:9", "").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "without an admin endpoint");
    let Some(url) = url() else { return };
    let error = try_connect(&url, "namespace=missing").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let encrypted = url.replace("pulsar://", "pulsar+ssl://");
    let begun = Instant::now();
    let error = try_connect(&encrypted, "connect_timeout=3s").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "a broker that does not encrypt: {error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}
