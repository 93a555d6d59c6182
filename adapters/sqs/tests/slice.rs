//! What the slice promises, on a running server.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Config, Effect, ErrorKind, Message, PublishOptions, Reason, Registry, Settlement, Start, Timestamp,
    TopologyMode, TopologySpec, Verdict, ack, extend, settle,
};
use anybroker_sqs::SqsDriver;
use common::{LONG, connect, localstack_url, nothing, number, numbered, publish, receive, unique, url};
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_shape_of_message_comes_back_byte_for_byte() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let destination = unique("shapes");
    let name = destination.as_str();
    let mut subscriber = bus.subscribe(bus.subscription(name, "g")).await.unwrap();
    let all_bytes: Vec<u8> = (0..=255).collect();
    let many = (0..30).fold(Message::new(name, "many headers"), |message, number| {
        message.with_header(format!("h{number}"), number.to_string())
    });
    let payload = usize::try_from(bus.capabilities().limits.payload.unwrap()).unwrap();
    let messages = vec![
        Message::new(name, all_bytes.clone()).with_key(all_bytes.clone()).with_id("not a uuid ✓"),
        Message::new(name, ""),
        Message::new(name, "empty"),
        Message::new(name, "YWJj"),
        Message::new(name, "line\r\nfeed\u{1}\u{fffe}"),
        Message::new(name, "✓ text\n\twith <xml> & \"quotes\""),
        Message::new(name, "key is empty").with_key(""),
        Message::new(name, "headers")
            .with_header("a", "1")
            .with_header("A", all_bytes.clone())
            .with_header("a", "")
            .with_header("AWS.trace", "x")
            .with_header("b..c", "x")
            .with_header("ключ", "значение")
            .with_header("content-type", "the user's own"),
        Message::new(name, "typed").with_content_type("application/json").with_header("x", "y"),
        Message::new(name, "both").with_content_type("text/plain").with_header("content-type", "the user's own"),
        Message::new(name, "old").with_timestamp(Timestamp::from_millis(-5)),
        Message::new(name, vec![255; payload]).with_header("h", vec![1; 12_000]),
        many,
    ];
    publish(&bus, messages.clone()).await;
    let deliveries = receive(&mut subscriber, messages.len()).await;
    for delivery in &deliveries {
        let sent = messages.iter().find(|sent| sent.id() == delivery.message().id()).unwrap();
        assert_eq!(delivery.message(), sent);
        assert_eq!(delivery.attempt(), 1);
    }
    let ids: HashSet<_> = deliveries.iter().map(|delivery| delivery.message().id().clone()).collect();
    assert_eq!(ids.len(), messages.len());
    ack(deliveries).await.into_iter().for_each(|outcome| assert_eq!(outcome.unwrap(), AckLevel::Confirmed));
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_entry_of_a_batch_has_its_own_outcome() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let destination = unique("outcomes");
    let name = destination.as_str();
    let mut subscriber = bus.subscribe(bus.subscription(name, "g")).await.unwrap();
    let payload = usize::try_from(bus.capabilities().limits.payload.unwrap()).unwrap();
    let batch = vec![
        Message::new(name, "0"),
        Message::new(name, vec![7; payload + 1]),
        Message::tombstone(name, "k"),
        Message::new(name, "1"),
        Message::new(name, "reserved").with_header("anybroker-meta", "forged"),
        Message::new("x", "delayed").with_delay(Duration::from_secs(12 * 3600)),
        Message::new(name, "2"),
    ];
    let outcomes = bus.publish(batch).await;
    let kinds: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().err().map(|error| error.kind())).collect();
    let (large, invalid) = (Some(ErrorKind::TooLarge), Some(ErrorKind::InvalidMessage));
    assert_eq!(kinds, [None, large, invalid, None, invalid, invalid, None]);
    assert!(outcomes.iter().flat_map(|outcome| outcome.as_ref().err()).all(|error| error.effect() == Effect::NotDone));
    let deliveries = receive(&mut subscriber, 3).await;
    assert_eq!(deliveries.iter().map(number).collect::<HashSet<_>>(), HashSet::from([0, 1, 2]));
    assert!(ack(deliveries).await.iter().all(Result::is_ok));
    nothing(&mut subscriber).await;
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
    let kept = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!(kept.message().bytes(), b"kept");
    kept.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    assert_eq!(bus.verify(&topology).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acks_are_individual_and_a_close_gives_the_rest_back_at_once() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("individual");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..10)).await;
    let mut deliveries = receive(&mut subscriber, 10).await;
    deliveries.sort_by_key(|delivery| std::cmp::Reverse(number(delivery)));
    let hole = deliveries.remove(4);
    let held = number(&hole);
    for outcome in ack(deliveries).await {
        assert_eq!(outcome.unwrap(), AckLevel::Confirmed);
    }
    subscriber.close(LONG).await.unwrap();
    let late = hole.ack().await.unwrap_err();
    assert_eq!(late.error().kind(), ErrorKind::StaleDelivery);
    drop(late);
    // Its lease of 30 s is not waited for.
    let start = Instant::now();
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!(number(&again), held);
    assert!(start.elapsed() < Duration::from_secs(10));
    again.ack().await.unwrap();
    nothing(&mut subscriber).await;
    publish(&bus, numbered(&name, 10..11)).await;
    assert_eq!(number(&receive(&mut subscriber, 1).await[0]), 10);
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nack_comes_back_after_its_delay_and_never_before_and_a_release_counts_no_attempt() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("nack");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    let delay = Duration::from_millis(1500);
    let before = Instant::now();
    receive(&mut subscriber, 1).await.remove(0).nack(delay).await.unwrap();
    publish(&bus, numbered(&name, 1..2)).await;
    let other = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&other), other.attempt()), (1, 1));
    other.ack().await.unwrap();
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert!(before.elapsed() >= delay, "{:?}", before.elapsed());
    assert_eq!((number(&again), again.attempt()), (0, 2));
    again.release().await.unwrap();
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (0, 2));
    drop(again);
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (0, 2));
    again.ack().await.unwrap();
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_ends_unless_it_is_extended_and_a_settle_after_it_is_stale() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("lease");
    let spec = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(2));
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    publish(&bus, numbered(&name, 0..2)).await;
    let mut deliveries = receive(&mut subscriber, 2).await;
    deliveries.sort_by_key(number);
    let (kept, lost) = (deliveries.pop().unwrap(), deliveries.pop().unwrap());
    for outcome in extend(&[&kept], Duration::from_secs(30)).await {
        outcome.unwrap();
    }
    // The lost one comes again when its lease is over; the kept one does not.
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!(number(&again), 0);
    assert!(lost.lease_until().unwrap() <= Timestamp::now());
    let batch = vec![(kept, Settlement::Ack), (lost, Settlement::Ack), (again, Settlement::Ack)];
    let outcomes = settle(batch).await;
    assert_eq!(outcomes[1].as_ref().unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok(), "{outcomes:?}");
    drop(outcomes);
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_attempt_leaves_one_dead_letter_and_silence() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("letters");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g").with_max_attempts(2)).await.unwrap();
    let sent = Message::new(name.as_str(), vec![0, 255]).with_key("k").with_header("h", "1").with_content_type("x/y");
    publish(&bus, vec![sent.clone(), Message::new(name.as_str(), "rejected")]).await;
    for delivery in receive(&mut subscriber, 2).await {
        if delivery.message().bytes() == b"rejected" {
            let verdict = Verdict::new(Reason::Rejected).with_error_type("VALIDATION").with_detail("no such product ✗");
            delivery.dead_letter(verdict).await.unwrap();
        } else {
            delivery.nack(Duration::ZERO).await.unwrap();
        }
    }
    receive(&mut subscriber, 1).await.remove(0).nack(Duration::ZERO).await.unwrap();
    nothing(&mut subscriber).await;
    // Reading leases, and gives back: it can be read twice.
    for _ in 0..2 {
        let mut letters = bus.dead_letters(name.as_str(), "g").unwrap().peek(&Default::default(), 10).await.unwrap();
        letters.sort_by_key(|letter| letter.attempts);
        assert_eq!(letters.len(), 2);
        let (rejected, exhausted) = (&letters[0], &letters[1]);
        assert_eq!(exhausted.message, sent);
        assert_eq!((&exhausted.reason, exhausted.attempts), (&Reason::AttemptsExhausted, 2));
        assert_eq!((&rejected.reason, rejected.error_type.as_deref()), (&Reason::Rejected, Some("VALIDATION")));
        assert_eq!(rejected.detail.as_deref(), Some("no such product ✗"));
    }
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_on_late_sees_the_letters_that_it_has_not_seen() {
    // LocalStack puts what comes back ahead of what came later; ElasticMQ behind it.
    let Some(url) = localstack_url() else { return };
    let (bus, other) = (connect(&url, "").await, connect(&url, "").await);
    let name = unique("pages");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..6)).await;
    for delivery in receive(&mut subscriber, 6).await {
        delivery.dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
    }
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    let first = letters.page(None, 2).await.unwrap();
    assert_eq!(first.letters.len(), 2);
    // What it has read is given back meanwhile: another reader sees all of them.
    let others = other.dead_letters(name.as_str(), "g").unwrap();
    let deadline = Instant::now() + LONG;
    while others.peek(&Default::default(), 10).await.unwrap().len() < 6 {
        assert!(Instant::now() < deadline, "what a reader holds that does not go on never comes back");
    }
    let mut seen: Vec<_> = first.letters.iter().map(|letter| letter.message.id().clone()).collect();
    let mut next = first.next;
    while let Some(from) = next {
        let page = letters.page(Some(from), 2).await.unwrap();
        seen.extend(page.letters.iter().map(|letter| letter.message.id().clone()));
        next = page.next;
    }
    assert_eq!(seen.len(), 6, "{seen:?}");
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 6);
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_is_closed_holds_no_letters_back() {
    let Some(url) = url() else { return };
    let (bus, other) = (connect(&url, "").await, connect(&url, "").await);
    let name = unique("peeked");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..6)).await;
    for delivery in receive(&mut subscriber, 6).await {
        delivery.dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
    }
    // No more than it asked for: a place to go on from is kept, and what it has read is leased.
    let peeked = other.dead_letters(name.as_str(), "g").unwrap().peek(&Default::default(), 2).await.unwrap();
    assert_eq!(peeked.len(), 2);
    other.close(LONG).await.unwrap();
    let count = bus.dead_letters(name.as_str(), "g").unwrap().count(&Default::default()).await.unwrap();
    assert_eq!(count, 6, "letters that are there at once");
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_cannot_be_stored_leaves_its_source() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("unburied");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    // Its dead letters go with the group; the queue stays.
    bus.delete(name.as_str(), Some(&"g".into())).await.unwrap();
    let failed = delivery.dead_letter(Verdict::new(Reason::Rejected)).await.unwrap_err();
    assert_eq!(failed.error().kind(), ErrorKind::NotFound);
    // It is still the application's, and can be settled otherwise.
    failed.into_delivery().release().await.unwrap();
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (0, 1));
    again.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_batches_flow_under_a_small_bound_and_two_members_share_them() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("flow");
    let spec = bus.subscription(name.as_str(), "g").with_max_in_flight(60);
    let mut subscribers = [bus.subscribe(spec.clone()).await.unwrap(), bus.subscribe(spec).await.unwrap()];
    let mut confirms = Vec::new();
    for batch in 0..15_u32 {
        confirms.push(bus.submit(numbered(&name, batch * 100..batch * 100 + 100), &PublishOptions::default()).await);
    }
    for confirm in confirms {
        assert_eq!(confirm.await.into_iter().filter(Result::is_ok).count(), 100);
    }
    let mut seen: Vec<u32> = Vec::new();
    let mut shares = [0, 0];
    let deadline = Instant::now() + LONG;
    while seen.len() < 1_500 {
        assert!(Instant::now() < deadline, "{}", seen.len());
        for (subscriber, share) in subscribers.iter_mut().zip(&mut shares) {
            let deliveries = subscriber.receive(50, Duration::from_millis(500)).await.unwrap();
            assert!(subscriber.in_flight() <= 60);
            seen.extend(deliveries.iter().map(number));
            *share += deliveries.len();
            let count = deliveries.len();
            assert_eq!(ack(deliveries).await.into_iter().filter(Result::is_ok).count(), count);
        }
    }
    assert!(shares.iter().all(|share| *share > 0), "{shares:?}");
    for subscriber in &mut subscribers {
        nothing(subscriber).await;
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..1_500).collect::<Vec<_>>());
    for subscriber in subscribers {
        subscriber.close(LONG).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_receives_lose_nothing_and_burn_no_attempt() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("cancel");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let mut seen = Vec::new();
    let mut cancelled = 0;
    for round in 0..100_u32 {
        publish(&bus, numbered(&name, round..round + 1)).await;
        let receiving = subscriber.receive(1, LONG);
        match tokio::time::timeout(Duration::from_micros(u64::from(round * 397 % 9_000)), receiving).await {
            Err(_) => cancelled += 1,
            Ok(deliveries) => {
                for delivery in deliveries.unwrap() {
                    assert_eq!(delivery.attempt(), 1);
                    seen.push(number(&delivery));
                    delivery.ack().await.unwrap();
                }
            }
        }
    }
    assert!(cancelled > 0);
    while seen.len() < 100 {
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        assert_eq!(delivery.attempt(), 1);
        seen.push(number(&delivery));
        delivery.ack().await.unwrap();
    }
    nothing(&mut subscriber).await;
    seen.sort_unstable();
    assert_eq!(seen, (0..100).collect::<Vec<_>>());
    subscriber.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_is_deleted_ends_the_subscription_with_not_found() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("deleted");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    let deadline = Instant::now() + LONG;
    let error = loop {
        assert!(Instant::now() < deadline, "it goes on in silence");
        if let Err(error) = subscriber.receive(1, Duration::from_millis(500)).await {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_queue_cannot_do_is_refused() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("refused");
    let refused = ErrorKind::Unsupported;
    bus.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    // A queue has one group, and cannot pass over what is in it.
    assert_eq!(bus.subscribe(bus.subscription(name.as_str(), "other")).await.unwrap_err().kind(), refused);
    bus.verify(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let unowned = unique("unowned");
    publish(&bus, numbered(&unowned, 0..1)).await;
    let latest = bus.subscription(unowned.as_str(), "g").with_start(Start::Latest);
    assert_eq!(bus.subscribe(latest).await.unwrap_err().kind(), refused);
    assert_eq!(bus.begin().await.map(|_| ()).unwrap_err().kind(), refused);
    bus.close(LONG).await.unwrap();
    assert_eq!(bus.send(Message::new("x", "")).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_there_is_a_typed_error_within_the_connect_timeout() {
    // Bound and not listening: nobody else takes the port, and connecting is refused.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("sqs://key:MARKER@{}?region=x&connect_timeout=1s", socket.local_addr().unwrap());
    let start = Instant::now();
    let error = Registry::new().with(SqsDriver).connect(Config::from_url(url)).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(start.elapsed() < Duration::from_secs(3));
    assert!(!format!("{error:?}{error}").contains("MARKER"));
    // One that takes the connection and never answers.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("sqs://{}?region=x&connect_timeout=1s", listener.local_addr().unwrap());
    let start = Instant::now();
    let error = Registry::new().with(SqsDriver).connect(Config::from_url(url)).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(start.elapsed() < Duration::from_secs(3));
    let url = "sqs://key@127.0.0.1/path?nonsense=1";
    let error = Registry::new().with(SqsDriver).connect(Config::from_url(url)).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
}
