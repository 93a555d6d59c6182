//! What the core keeps about deliveries, whatever the adapter does.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anybroker_core::{
    Delivery, ErrorKind, Message, Nack, Reason, Settlement, SubscribeSpec, Subscriber, SubscriptionEvent, Support,
    Verdict, ack, extend, settle,
};
use common::{TestBroker, record};
use futures_util::StreamExt;

const LONG: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(30);

async fn subscriber(
    broker: &Arc<TestBroker>,
    change: impl FnOnce(SubscribeSpec) -> SubscribeSpec,
    messages: &[(&str, u32, u32)],
) -> Subscriber {
    let ready =
        messages.iter().map(|(id, attempt, deliveries)| (Message::new("d", "x").with_id(*id), *attempt, *deliveries));
    broker.ready.lock().extend(ready);
    let bus = broker.bus();
    bus.subscribe(change(bus.subscription("d", "g"))).await.expect("subscribed")
}

fn settled(broker: &TestBroker) -> Vec<(String, String)> {
    let shown = |settlement: &Settlement| match settlement {
        Settlement::DeadLetter(verdict) => format!("dead letter: {}", verdict.reason),
        Settlement::Nack(nack) => format!("nack {:?}", nack.delay),
        other => format!("{other:?}").to_lowercase(),
    };
    broker.settler.settled.lock().iter().map(|(id, settlement)| (id.clone(), shown(settlement))).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(id, settlement)| ((*id).to_owned(), (*settlement).to_owned())).collect()
}

fn ids(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(|delivery| delivery.message().id().to_string()).collect()
}

#[tokio::test]
async fn a_settle_after_close_is_stale_gives_the_delivery_back_and_reaches_nobody() {
    let broker = TestBroker::new(record());
    let mut subscriber = subscriber(&broker, |spec| spec, &[("1", 1, 1), ("2", 1, 1), ("3", 1, 1)]).await;
    let mut deliveries = subscriber.receive(10, LONG).await.expect("received");
    subscriber.close(LONG).await.expect("closed");
    let last = deliveries.pop().expect("three");
    assert_eq!(last.extend(LONG).await.expect_err("stale").kind(), ErrorKind::StaleDelivery);
    let failed = last.ack().await.expect_err("stale");
    assert_eq!(failed.error().kind(), ErrorKind::StaleDelivery);
    let delivery = failed.into_delivery();
    assert_eq!(delivery.message().id().to_string(), "3");
    let outcomes = settle(vec![(delivery, Settlement::Release), (deliveries.remove(0), Settlement::Ack)]).await;
    let kinds: Vec<_> =
        outcomes.iter().map(|outcome| outcome.as_ref().map_err(|failed| failed.error().kind())).collect();
    assert_eq!(kinds, [Err(ErrorKind::StaleDelivery), Err(ErrorKind::StaleDelivery)]);
    drop((outcomes, deliveries));
    assert!(settled(&broker).is_empty());
    assert_eq!(broker.settler.abandoned.load(Ordering::SeqCst), 0, "close has given them back already");
}

#[tokio::test]
async fn a_delivery_that_is_dropped_unsettled_is_given_back_once() {
    let broker = TestBroker::new(record());
    let mut subscriber = subscriber(&broker, |spec| spec, &[("1", 1, 1), ("2", 1, 1)]).await;
    let mut deliveries = subscriber.receive(10, LONG).await.expect("received");
    assert_eq!(subscriber.in_flight(), 2);
    drop(deliveries.pop());
    assert_eq!((broker.settler.abandoned.load(Ordering::SeqCst), subscriber.in_flight()), (1, 1));
    deliveries.pop().expect("one left").ack().await.expect("acked");
    assert_eq!((broker.settler.abandoned.load(Ordering::SeqCst), subscriber.in_flight()), (1, 0));
}

#[tokio::test]
async fn a_settle_that_fails_gives_the_delivery_back_and_it_stays_in_flight() {
    let broker = TestBroker::new(record());
    let mut subscriber = subscriber(&broker, |spec| spec, &[("1", 1, 1)]).await;
    let delivery = subscriber.receive(1, LONG).await.expect("received").remove(0);
    *broker.settler.fail.lock() = Some(ErrorKind::Unavailable);
    let failed = delivery.ack().await.expect_err("told to fail");
    assert_eq!((failed.error().kind(), subscriber.in_flight()), (ErrorKind::Unavailable, 1));
    *broker.settler.fail.lock() = None;
    failed.into_delivery().ack().await.expect("settled at last");
    assert_eq!((subscriber.in_flight(), broker.settler.abandoned.load(Ordering::SeqCst)), (0, 0));
}

#[tokio::test]
async fn a_settle_whose_answer_nobody_awaits_is_made_all_the_same() {
    let broker = TestBroker::new(record());
    let mut subscriber = subscriber(&broker, |spec| spec, &[("1", 1, 1)]).await;
    let deliveries = subscriber.receive(1, LONG).await.expect("received");
    drop(ack(deliveries));
    assert_eq!(settled(&broker), pairs(&[("1", "ack")]));
    assert_eq!((subscriber.in_flight(), broker.settler.abandoned.load(Ordering::SeqCst)), (0, 0));
}

#[tokio::test]
async fn the_nack_of_the_last_attempt_is_a_dead_letter_with_its_error_type() {
    let broker = TestBroker::new(record());
    let messages = [("1", 2, 2), ("2", 3, 3), ("3", 9, 9)];
    let mut subscriber = subscriber(&broker, |spec| spec.with_max_attempts(3), &messages).await;
    let nack = Nack { delay: Duration::from_secs(1), error_type: Some("TIMEOUT".into()) };
    let batch = subscriber.receive(10, LONG).await.expect("received").into_iter();
    for outcome in settle(batch.map(|delivery| (delivery, Settlement::Nack(nack.clone()))).collect()).await {
        outcome.expect("settled");
    }
    let exhausted = "dead letter: attempts_exhausted";
    assert_eq!(settled(&broker), pairs(&[("1", "nack 1s"), ("2", exhausted), ("3", exhausted)]));
    let settlements = broker.settler.settled.lock();
    let Settlement::DeadLetter(verdict) = &settlements[1].1 else { panic!("a dead letter") };
    assert_eq!(verdict.error_type.as_deref(), Some("TIMEOUT"));
}

#[tokio::test]
async fn without_max_attempts_a_nack_stays_a_nack() {
    let broker = TestBroker::new(record());
    let mut subscriber = subscriber(&broker, |spec| spec.with_max_attempts(None), &[("1", 1000, 1000)]).await;
    subscriber.receive(1, LONG).await.expect("received").remove(0).nack(Duration::ZERO).await.expect("nacked");
    assert_eq!(settled(&broker), pairs(&[("1", "nack 0ns")]));
}

#[tokio::test]
async fn what_kills_its_consumers_is_buried_instead_of_handed_over_again() {
    let broker = TestBroker::new(record());
    // 2 failed attempts and 3 hand-overs without an outcome; 4 failed attempts alone are none of its business.
    let messages = [("killer", 3, 6), ("failing", 5, 5), ("healthy", 1, 1)];
    let mut subscriber = subscriber(&broker, |spec| spec.with_crash_limit(3), &messages).await;
    let deliveries = subscriber.receive(10, LONG).await.expect("received");
    assert_eq!(ids(&deliveries), ["failing", "healthy"]);
    assert_eq!(settled(&broker), pairs(&[("killer", "dead letter: crash_limit")]));
    assert_eq!(subscriber.in_flight(), 2);
}

#[tokio::test]
async fn where_there_are_no_dead_letters_nothing_is_buried() {
    let mut record = record();
    record.dead_letter = anybroker_core::Support::refused("take another broker");
    let broker = TestBroker::new(record);
    let change = |spec: SubscribeSpec| spec.with_crash_limit(1).with_max_attempts(None);
    let mut subscriber = subscriber(&broker, change, &[("1", 1, 100)]).await;
    assert_eq!(ids(&subscriber.receive(10, LONG).await.expect("received")), ["1"]);
}

#[tokio::test]
async fn a_receive_that_brought_only_killers_waits_on() {
    let broker = TestBroker::new(record());
    let mut subscriber = subscriber(&broker, |spec| spec.with_crash_limit(1), &[("killer", 1, 2)]).await;
    assert!(subscriber.receive(10, QUIET).await.expect("received").is_empty());
    broker.ready.lock().push_back((Message::new("d", "x").with_id("canary"), 1, 1));
    assert_eq!(ids(&subscriber.receive(10, LONG).await.expect("received")), ["canary"]);
}

/// A broker that has a message which met the crash limit and cannot be buried, and a subscription to it.
async fn unburiable(kind: ErrorKind, max_in_flight: usize) -> (Arc<TestBroker>, Subscriber) {
    let broker = TestBroker::new(record());
    broker.settler.brings_back.store(true, Ordering::SeqCst);
    *broker.settler.fail.lock() = Some(kind);
    let change = |spec: SubscribeSpec| spec.with_crash_limit(3).with_max_in_flight(max_in_flight);
    let subscriber = subscriber(&broker, change, &[("killer", 1, 4)]).await;
    (broker, subscriber)
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_buried_is_held_and_tried_again_with_pauses_that_grow() {
    for kind in [ErrorKind::NotFound, ErrorKind::PermissionDenied, ErrorKind::TooLarge, ErrorKind::Unavailable] {
        let (broker, mut subscriber) = unburiable(kind, 10).await;
        let tries = || broker.settler.settled.lock().len();
        assert!(subscriber.receive(10, Duration::from_secs(2)).await.expect("received").is_empty(), "{kind}");
        assert_eq!((tries(), broker.settler.abandoned(), subscriber.in_flight()), (2, 0, 1), "{kind}: after 0 and 1 s");
        assert!(subscriber.receive(10, Duration::from_secs(58)).await.expect("received").is_empty());
        assert_eq!((tries(), subscriber.in_flight()), (6, 1), "{kind}: after 3, 7, 15 and 31 s");
        assert!(subscriber.receive(10, Duration::from_secs(60)).await.expect("received").is_empty());
        assert_eq!((tries(), broker.settler.abandoned()), (8, 0), "{kind}: after 61 and 91 s");
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_buried_keeps_nobody_from_the_other_messages() {
    let (broker, mut subscriber) = unburiable(ErrorKind::NotFound, 10).await;
    broker.ready.lock().push_back((Message::new("d", "x").with_id("healthy"), 1, 1));
    let mut received = subscriber.receive(1, LONG).await.expect("received");
    while received.is_empty() {
        received = subscriber.receive(1, LONG).await.expect("received");
    }
    assert_eq!((ids(&received), broker.settler.abandoned()), (vec!["healthy".to_owned()], 0));
    assert_eq!(subscriber.in_flight(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_burial_that_failed_once_succeeds_later_and_leaves_nothing_behind() {
    // With room for nothing else, too: then the subscription waits for room, and not for its broker.
    for (max_in_flight, slow) in [(10, false), (1, false), (10, true), (1, true)] {
        let (broker, mut subscriber) = unburiable(ErrorKind::Unexpected, max_in_flight).await;
        broker.settler.slow.store(slow, Ordering::SeqCst);
        // Too short for the second try.
        assert!(subscriber.receive(10, QUIET).await.expect("received").is_empty());
        assert_eq!(subscriber.in_flight(), 1);
        *broker.settler.fail.lock() = None;
        assert!(subscriber.receive(10, LONG).await.expect("received").is_empty());
        let letter = ("killer", "dead letter: crash_limit");
        assert_eq!(settled(&broker), pairs(&[letter, letter]), "{max_in_flight} {slow}");
        assert_eq!((subscriber.in_flight(), broker.settler.abandoned()), (0, 0), "{max_in_flight} {slow}");
        broker.ready.lock().push_back((Message::new("d", "x").with_id("canary"), 1, 1));
        assert_eq!(ids(&subscriber.receive(10, LONG).await.expect("received")), ["canary"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_burial_that_came_too_late_is_not_tried_again() {
    for kind in [ErrorKind::StaleDelivery, ErrorKind::Closed] {
        let (broker, mut subscriber) = unburiable(kind, 10).await;
        broker.settler.brings_back.store(false, Ordering::SeqCst);
        assert!(subscriber.receive(10, Duration::from_secs(100)).await.expect("received").is_empty());
        assert_eq!((broker.settler.settled.lock().len(), subscriber.in_flight()), (1, 0), "{kind}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_receive_that_is_dropped_forgets_no_burial() {
    let (broker, mut subscriber) = unburiable(ErrorKind::NotFound, 10).await;
    broker.settler.slow.store(true, Ordering::SeqCst);
    // Never long enough for a pause or an answer.
    for _ in 0..50 {
        let receiving = subscriber.receive(10, LONG);
        assert!(tokio::time::timeout(Duration::from_millis(100), receiving).await.is_err(), "nothing comes");
    }
    // Tried at 0 s, answered at 1 s; tried at 2 s, answered at 3 s; tried at 5 s.
    assert_eq!((broker.settler.abandoned(), subscriber.in_flight()), (0, 1));
    assert!((2..=3).contains(&broker.settler.settled.lock().len()));
}

#[tokio::test(start_paused = true)]
async fn what_is_held_is_given_back_with_its_lane_and_with_the_subscription() {
    let lane = anybroker_core::Lane::default();
    let revoking = SubscriptionEvent::Revoking { lane, deadline: anybroker_core::Timestamp::now() };
    for event in [SubscriptionEvent::Lost { lane }, revoking] {
        let (broker, mut subscriber) = unburiable(ErrorKind::NotFound, 10).await;
        assert!(subscriber.receive(10, QUIET).await.expect("received").is_empty());
        broker.settler.brings_back.store(false, Ordering::SeqCst);
        broker.events.lock().push(event);
        assert_eq!(subscriber.receive_all(10, LONG).await.expect("received").events.len(), 1);
        assert_eq!((broker.settler.abandoned(), subscriber.in_flight()), (1, 0));
    }
    for closes in [false, true] {
        let (broker, mut subscriber) = unburiable(ErrorKind::NotFound, 10).await;
        assert!(subscriber.receive(10, QUIET).await.expect("received").is_empty());
        assert_eq!(broker.settler.abandoned(), 0);
        if closes {
            subscriber.close(LONG).await.expect("closed");
        } else {
            drop(subscriber);
        }
        assert_eq!(broker.settler.abandoned(), 1);
    }
}

#[tokio::test]
async fn no_more_than_max_in_flight_are_out_until_one_is_settled() {
    let broker = TestBroker::new(record());
    let messages: Vec<_> = ["1", "2", "3", "4", "5"].into_iter().map(|id| (id, 1, 1)).collect();
    let mut subscriber = subscriber(&broker, |spec| spec.with_max_in_flight(2), &messages).await;
    let mut out = subscriber.receive(10, LONG).await.expect("received");
    assert_eq!(ids(&out), ["1", "2"]);
    assert!(subscriber.receive(10, QUIET).await.expect("no room").is_empty());
    let settle = out.remove(0);
    let (received, acked) = tokio::join!(subscriber.receive(10, LONG), async {
        tokio::task::yield_now().await;
        settle.ack().await
    });
    acked.expect("acked");
    let received = received.expect("received");
    assert_eq!(ids(&received), ["3"]);
    drop((out, received));
    assert_eq!(ids(&subscriber.receive(1, LONG).await.expect("received")), ["4"]);
}

#[tokio::test]
async fn entries_of_several_subscriptions_are_settled_together_and_answered_in_order() {
    let (first, second) = (TestBroker::new(record()), TestBroker::new(record()));
    let mut left = subscriber(&first, |spec| spec, &[("a", 1, 1), ("c", 1, 1)]).await;
    let mut right = subscriber(&second, |spec| spec, &[("b", 1, 1), ("d", 1, 1)]).await;
    *second.settler.fail.lock() = Some(ErrorKind::Unavailable);
    let mut left = left.receive(10, LONG).await.expect("received").into_iter();
    let mut right = right.receive(10, LONG).await.expect("received").into_iter();
    let mixed: Vec<Delivery> = [left.next(), right.next(), left.next(), right.next()].into_iter().flatten().collect();
    let borrowed: Vec<&Delivery> = mixed.iter().collect();
    assert!(extend(&borrowed, LONG).await.iter().all(Result::is_ok));
    let outcomes = ack(mixed).await;
    let failed: Vec<bool> = outcomes.iter().map(Result::is_err).collect();
    assert_eq!(failed, [false, true, false, true]);
    assert_eq!(settled(&first), pairs(&[("a", "ack"), ("c", "ack")]));
    assert_eq!(settled(&second), pairs(&[("b", "ack"), ("d", "ack")]));
}

#[tokio::test]
async fn a_verdict_of_the_handler_reaches_the_adapter_as_it_is() {
    let broker = TestBroker::new(record());
    let mut subscriber = subscriber(&broker, |spec| spec, &[("1", 1, 1)]).await;
    let verdict = Verdict::new(Reason::from("bad_card")).with_error_type("VALIDATION_ERROR").with_detail("expired");
    let delivery = subscriber.receive(1, LONG).await.expect("received").remove(0);
    delivery.dead_letter(verdict.clone()).await.expect("buried");
    let settlements = broker.settler.settled.lock();
    assert!(matches!(&settlements[0].1, Settlement::DeadLetter(found) if **found == verdict));
}

#[tokio::test]
async fn a_reason_that_is_too_long_for_a_letter_is_cut_at_the_end_of_a_character() {
    let broker = TestBroker::new(record());
    let ids: Vec<String> = (0..4).map(|id| id.to_string()).collect();
    let messages: Vec<_> = ids.iter().map(|id| (&**id, 1, 1)).collect();
    let mut subscriber = subscriber(&broker, |spec| spec, &messages).await;
    let reasons = ["x".repeat(130_000), "x".repeat(256), format!("x{}", "\u{e9}".repeat(200)), "\u{20ac}".repeat(100)];
    let received = subscriber.receive(10, LONG).await.expect("received");
    for (delivery, reason) in received.into_iter().zip(&reasons) {
        delivery.dead_letter(Verdict::new(Reason::from(&**reason))).await.expect("buried");
    }
    let settlements = broker.settler.settled.lock();
    for ((_, settlement), (whole, length)) in settlements.iter().zip(reasons.iter().zip([256, 256, 255, 255])) {
        let Settlement::DeadLetter(verdict) = settlement else { panic!("a dead letter") };
        assert_eq!(verdict.reason.as_str(), &whole[..length]);
    }
}

#[tokio::test]
async fn a_stream_brings_deliveries_one_by_one_whatever_its_batch() {
    for batch in [0, 1, 2, 10] {
        let broker = TestBroker::new(record());
        let subscriber = subscriber(&broker, |spec| spec, &[("1", 1, 1), ("2", 1, 1), ("3", 1, 1)]).await;
        let mut stream = std::pin::pin!(subscriber.into_stream(batch));
        for expected in ["1", "2", "3"] {
            let next = tokio::time::timeout(LONG, stream.next()).await.expect("no hang").expect("no end");
            assert_eq!(next.expect("received").message().id().to_string(), expected, "batch {batch}");
        }
    }
}

#[tokio::test]
async fn a_settlement_that_the_record_refuses_is_refused_without_reaching_the_adapter_and_spoils_no_other() {
    let mut record = record();
    record.nack_delay = Support::refused("use another");
    record.release = Support::refused("use another");
    record.lease_extension = Support::refused("use another");
    let broker = TestBroker::new(record);
    let messages = [("1", 1, 1), ("2", 1, 1), ("3", 1, 1), ("4", 5, 5)];
    let mut subscriber = subscriber(&broker, |spec| spec.with_max_attempts(5), &messages).await;
    let deliveries = subscriber.receive(10, LONG).await.expect("received");
    assert_eq!(deliveries[0].extend(LONG).await.expect_err("refused").kind(), ErrorKind::Unsupported);
    let later = || Settlement::Nack(Nack { delay: LONG, error_type: None });
    let settlements = [later(), Settlement::Ack, Settlement::Release, later()];
    let mut outcomes = settle(deliveries.into_iter().zip(settlements).collect()).await;
    let kinds: Vec<_> =
        outcomes.iter().map(|outcome| outcome.as_ref().err().map(|failed| failed.error().kind())).collect();
    // The last one is at its last attempt: it becomes a dead letter, whatever its delay.
    assert_eq!(kinds, [Some(ErrorKind::Unsupported), None, Some(ErrorKind::Unsupported), None]);
    assert_eq!(settled(&broker), pairs(&[("2", "ack"), ("4", "dead letter: attempts_exhausted")]));
    assert_eq!(subscriber.in_flight(), 2);
    let given_back = outcomes.remove(0).expect_err("refused").into_delivery();
    given_back.ack().await.expect("it can still be settled");
}
