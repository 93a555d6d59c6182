//! What Amazon answers under stress: each entry of a request has the outcome that its answer tells, and what no answer tells
//! stays unknown. The answers are made by a proxy before the running server.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

#[path = "common/answers.rs"]
mod answers;
mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use answers::{Fault, Proxy};
use anybroker_conformance_native::http;
use anybroker_core::{
    Bus, Delivery, Effect, ErrorKind, Message, Order, PublishOptions, PublishOrder, Reason, Subscriber,
    SubscriptionEvent, Verdict, ack,
};
use common::{LONG, connect, host, localstack_url, nothing, number, numbered, publish, receive, unique, url};
use tokio::sync::Notify;
use tokio::time::Instant;

const UNAVAILABLE: &str = r#"{"__type":"com.amazonaws.sqs#ServiceUnavailable","message":"by the test"}"#;
/// A load balancer's answer is not SQS's.
const NOT_OF_SQS: &str = "<html>503 Service Temporarily Unavailable</html>";
/// What SQS says in general, beside its own [`throttled`].
const THROTTLING: &str = r#"{"__type":"com.amazon.coral.availability#ThrottlingException","message":"by the test"}"#;

/// How SQS is asked.
const JSON: &str = "application/x-amz-json-1.0";
/// How SNS is asked.
const FORM: &str = "application/x-www-form-urlencoded";

/// What SQS and SNS answer when they are asked too often, in the form in which they are asked.
fn throttled(content_type: &str) -> Fault {
    let service = http("sqs://127.0.0.1:1", |_| None).unwrap();
    let answer = service.throttled(content_type);
    Fault::Answer(answer.status, answer.body.leak())
}

/// A connection through a proxy, and one that goes past it.
async fn connections(url: &str, settings: &'static str) -> (Proxy, Bus, Bus) {
    let proxy = Proxy::to(host(url)).await;
    let through = url.replace(&host(url), &proxy.address().to_string());
    (proxy, connect(&through, settings).await, connect(url, settings).await)
}

/// Kind and effect of each outcome; `None` for done.
async fn outcomes(bus: &Bus, messages: Vec<Message>) -> Vec<Option<(ErrorKind, Effect)>> {
    let outcomes = bus.publish(messages).await;
    outcomes.iter().map(|outcome| outcome.as_ref().err().map(|error| (error.kind(), error.effect()))).collect()
}

/// The numbers that come, each acked, until nothing comes any more.
async fn arrive(subscriber: &mut Subscriber, count: usize) -> BTreeSet<u32> {
    let deliveries = receive(subscriber, count).await;
    let numbers: BTreeSet<u32> = deliveries.iter().map(number).collect();
    assert!(ack(deliveries).await.iter().all(Result::is_ok));
    nothing(subscriber).await;
    numbers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_503_leaves_what_was_published_unknown_stored_or_not() {
    let Some(url) = url() else { return };
    let (proxy, bus, direct) = connections(&url, "").await;
    let name = unique("stress");
    let mut subscriber = direct.subscribe(direct.subscription(name.as_str(), "g")).await.unwrap();
    let faults = [Fault::Answer(503, UNAVAILABLE), Fault::DoneBut(503, UNAVAILABLE), Fault::DoneBut(503, NOT_OF_SQS)];
    proxy.script("SendMessageBatch", faults);
    let unknown = vec![Some((ErrorKind::Unavailable, Effect::Unknown)); 5];
    for first in [0, 10, 20] {
        assert_eq!(outcomes(&bus, numbered(&name, first..first + 5)).await, unknown, "{first}");
    }
    assert!(proxy.is_spent());
    assert_eq!(arrive(&mut subscriber, 10).await, (10..15).chain(20..25).collect());
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_throttled_is_certainly_not_stored() {
    let Some(url) = url() else { return };
    let (proxy, bus, direct) = connections(&url, "").await;
    let name = unique("throttled");
    let mut subscriber = direct.subscribe(direct.subscription(name.as_str(), "g")).await.unwrap();
    proxy.script("SendMessageBatch", [throttled(JSON), Fault::Answer(400, THROTTLING)]);
    for _ in 0..2 {
        let refused = vec![Some((ErrorKind::RateLimited, Effect::NotDone)); 5];
        assert_eq!(outcomes(&bus, numbered(&name, 0..5)).await, refused);
    }
    assert_eq!(outcomes(&bus, numbered(&name, 5..10)).await, vec![None; 5]);
    assert_eq!(arrive(&mut subscriber, 5).await, (5..10).collect());
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_entry_has_its_own_outcome_and_one_that_is_not_mentioned_is_unknown() {
    let Some(url) = url() else { return };
    let (proxy, bus, direct) = connections(&url, "").await;
    let name = unique("entries");
    let mut subscriber = direct.subscribe(direct.subscription(name.as_str(), "g")).await.unwrap();
    let refused = |code, is_senders| Fault::Entries { failed: vec![2, 5], code, is_senders };
    let cases = [
        (refused("InternalError", false), ErrorKind::Unavailable, Effect::Unknown, 8),
        (refused("RequestThrottled", false), ErrorKind::RateLimited, Effect::NotDone, 8),
        (refused("InvalidMessageContents", true), ErrorKind::InvalidMessage, Effect::NotDone, 8),
        (Fault::Unmentioned(vec![2, 5]), ErrorKind::Unexpected, Effect::Unknown, 10),
    ];
    for (fault, kind, effect, stored) in cases {
        proxy.script("SendMessageBatch", [fault.clone()]);
        let mut expected = vec![None; 10];
        (expected[2], expected[5]) = (Some((kind, effect)), Some((kind, effect)));
        assert_eq!(outcomes(&bus, numbered(&name, 0..10)).await, expected, "{fault:?}");
        let arrived = arrive(&mut subscriber, stored).await;
        assert_eq!(arrived, (0..10).filter(|n| stored == 10 || ![2, 5].contains(n)).collect(), "{fault:?}");
    }
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acks_that_are_refused_one_by_one_give_their_deliveries_back_and_no_other() {
    let Some(url) = url() else { return };
    let (proxy, bus, _direct) = connections(&url, "").await;
    let name = unique("acks");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..10)).await;
    let deliveries = receive(&mut subscriber, 10).await;
    proxy.script(
        "DeleteMessageBatch",
        [
            // The client asks again by itself: deleting twice is deleting once.
            Fault::Answer(503, UNAVAILABLE),
            Fault::Entries { failed: vec![3, 7], code: "InternalError", is_senders: false },
        ],
    );
    let mut again: Vec<Delivery> = Vec::new();
    for (place, outcome) in ack(deliveries).await.into_iter().enumerate() {
        match outcome {
            Ok(_) => assert!(![3, 7].contains(&place), "{place}"),
            Err(error) => {
                assert_eq!((error.error().kind(), [3, 7].contains(&place)), (ErrorKind::Unavailable, true), "{place}");
                again.push(error.into_delivery());
            }
        }
    }
    assert_eq!(again.len(), 2);
    // One of them is gone meanwhile, says SQS.
    let code = "ReceiptHandleIsInvalid";
    proxy.script("DeleteMessageBatch", [Fault::Entries { failed: vec![1], code, is_senders: true }]);
    let mut settled = ack(again).await.into_iter();
    assert!(settled.next().unwrap().is_ok());
    assert_eq!(settled.next().unwrap().unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    assert!(proxy.is_spent());
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_that_was_done_and_whose_answer_is_lost_is_done() {
    let Some(url) = url() else { return };
    let (proxy, bus, _direct) = connections(&url, "").await;
    let name = unique("answers");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..3)).await;
    // The server has never heard of the handles when it is asked again.
    proxy.script("DeleteMessageBatch", [Fault::DoneBut(503, UNAVAILABLE), Fault::DoneBut(503, NOT_OF_SQS)]);
    let mut deliveries = receive(&mut subscriber, 3).await;
    let failing = deliveries.remove(0);
    let failed = number(&failing);
    assert!(ack(deliveries).await.iter().all(Result::is_ok));
    assert!(proxy.is_spent());
    proxy.script("DeleteMessageBatch", [Fault::DoneBut(503, UNAVAILABLE)]);
    failing.nack(Duration::ZERO).await.unwrap();
    assert!(proxy.is_spent());
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (failed, 2));
    again.ack().await.unwrap();
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_whose_answers_stay_lost_until_the_lease_is_over_is_unknown() {
    let Some(url) = url() else { return };
    let (proxy, bus, _direct) = connections(&url, "").await;
    let name = unique("unknown");
    let spec = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(1));
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    // More than it is asked for: not when the lease is over.
    let lost = || Fault::DoneBut(503, UNAVAILABLE);
    proxy.script("DeleteMessageBatch", [lost(), lost(), lost()]);
    let error = delivery.ack().await.unwrap_err();
    assert_eq!((error.error().kind(), error.error().effect()), (ErrorKind::Unavailable, Effect::Unknown));
    drop(error);
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_that_was_lost_is_not_asked_for_again_when_the_lease_is_over() {
    let Some(url) = url() else { return };
    let (proxy, bus, direct) = connections(&url, "").await;
    let name = unique("late");
    let lease = Duration::from_secs(1);
    let mut first = bus.subscribe(bus.subscription(name.as_str(), "g").with_lease(lease)).await.unwrap();
    let mut second = direct.subscribe(direct.subscription(name.as_str(), "g")).await.unwrap();
    publish(&direct, numbered(&name, 0..1)).await;
    let delivery = receive(&mut first, 1).await.remove(0);
    // Amazon says so of a handle that is not the latest any more, and deletes nothing.
    let success = r#"{"Successful":[{"Id":"0"}],"Failed":[]}"#;
    proxy.script("DeleteMessageBatch", [Fault::Late(lease, 503, UNAVAILABLE), Fault::Answer(200, success)]);
    let error = delivery.ack().await.unwrap_err();
    assert_eq!((error.error().kind(), error.error().effect()), (ErrorKind::Unavailable, Effect::Unknown));
    let again = receive(&mut second, 1).await.remove(0);
    assert_eq!(number(&again), 0);
    again.ack().await.unwrap();
    nothing(&mut second).await;
    drop(error);
    first.close(LONG).await.unwrap();
    second.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}

/// A message of key `k`, and two members in order per key, the first of them through the proxy and with that lease.
async fn two_members(url: &str, name: &str, lease: Duration) -> (Proxy, Bus, [Subscriber; 2]) {
    let (proxy, bus, direct) = connections(url, "mode=fifo").await;
    let spec = |bus: &Bus| bus.subscription(name, "g").with_order(Order::Key);
    let first = bus.subscribe(spec(&bus).with_lease(lease)).await.unwrap();
    let second = direct.subscribe(spec(&direct).with_lease(LONG * 4)).await.unwrap();
    publish(&direct, vec![Message::new(name, "0").with_key("k")]).await;
    (proxy, direct, [first, second])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_answer_has_leased_comes_with_the_next_request_while_the_lease_holds() {
    let Some(url) = url() else { return };
    let name = unique("attempt");
    // Longer than the test waits.
    let (proxy, direct, [mut first, second]) = two_members(&url, &name, LONG * 4).await;
    proxy.script("ReceiveMessage", [Fault::DoneBut(503, UNAVAILABLE), Fault::DoneBut(503, NOT_OF_SQS)]);
    let delivery = receive(&mut first, 1).await.remove(0);
    assert!(proxy.is_spent());
    delivery.ack().await.unwrap();
    nothing(&mut first).await;
    for member in [first, second] {
        member.close(LONG).await.unwrap();
    }
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_answer_had_leased_is_not_taken_from_who_has_got_it_since() {
    let Some(url) = url() else { return };
    let name = unique("taken");
    let (proxy, direct, [mut first, mut second]) = two_members(&url, &name, Duration::from_secs(1)).await;
    let (done, goes) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let answer = (503, UNAVAILABLE);
    proxy.script("ReceiveMessage", [Fault::DoneThenHeld { done: done.clone(), goes: goes.clone(), answer }]);
    let others = async {
        done.notified().await;
        // When the lease of the first has ended, which knows nothing of it.
        let held = receive(&mut second, 1).await.remove(0);
        goes.notify_one();
        publish(&direct, vec![Message::new(name.as_str(), "1").with_key("another")]).await;
        held
    };
    let (came, held) = tokio::join!(receive(&mut first, 1), others);
    assert_eq!((number(&came[0]), number(&held)), (1, 0));
    assert!(ack(came).await.iter().all(Result::is_ok));
    held.ack().await.unwrap();
    nothing(&mut first).await;
    for member in [first, second] {
        member.close(LONG).await.unwrap();
    }
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_whose_letter_cannot_be_deleted_has_done_something() {
    let Some(url) = url() else { return };
    let (proxy, bus, direct) = connections(&url, "").await;
    let name = unique("redriven");
    let mut subscriber = direct.subscribe(direct.subscription(name.as_str(), "g")).await.unwrap();
    publish(&direct, numbered(&name, 0..1)).await;
    receive(&mut subscriber, 1).await.remove(0).dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
    // As often as it is asked for.
    proxy.script("DeleteMessageBatch", (0..3).map(|_| throttled(JSON)));
    let report = bus.dead_letters(name.as_str(), "g").unwrap().redrive(&Default::default()).await.unwrap();
    let failed: Vec<_> = report.failed.iter().map(|(_, error)| (error.kind(), error.effect())).collect();
    assert_eq!((report.moved, failed), (0, vec![(ErrorKind::RateLimited, Effect::Unknown)]));
    receive(&mut subscriber, 1).await.remove(0).ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_whose_copy_is_throttled_keeps_its_source_and_its_attempt() {
    let Some(url) = url() else { return };
    let (proxy, bus, _direct) = connections(&url, "").await;
    let name = unique("copy");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    proxy.script("SendMessageBatch", [throttled(JSON)]);
    let failed = receive(&mut subscriber, 1).await.remove(0).nack(Duration::ZERO).await.unwrap_err();
    assert_eq!(failed.error().kind(), ErrorKind::RateLimited);
    failed.into_delivery().nack(Duration::ZERO).await.unwrap();
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (0, 2));
    again.ack().await.unwrap();
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_unknown_message_nothing_of_its_key_is_attempted() {
    let Some(url) = url() else { return };
    let (proxy, bus, direct) = connections(&url, "mode=fifo").await;
    let name = unique("held");
    let spec = direct.subscription(name.as_str(), "g").with_order(Order::Key);
    let mut subscriber = direct.subscribe(spec).await.unwrap();
    proxy.script("SendMessageBatch", [Fault::DoneBut(503, UNAVAILABLE)]);
    let keyed = (0..25_u32).map(|n| Message::new(name.as_str(), n.to_string()).with_key("k")).collect();
    let options = PublishOptions::default().with_order(PublishOrder::Key);
    let outcomes: Vec<_> = bus.submit(keyed, &options).await.await;
    let effects: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().unwrap_err().effect()).collect();
    assert_eq!(effects, [vec![Effect::Unknown; 10], vec![Effect::NotDone; 15]].concat());
    let mut seen = Vec::new();
    while seen.len() < 10 {
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        seen.push(number(&delivery));
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_queue_is_found_late_is_not_overtaken_by_the_next_one() {
    let Some(url) = url() else { return };
    let (proxy, bus, direct) = connections(&url, "mode=fifo").await;
    let name = unique("overtaken");
    let spec = direct.subscription(name.as_str(), "g").with_order(Order::Key);
    let mut subscriber = direct.subscribe(spec).await.unwrap();
    let keyed = |numbers| numbered(&name, numbers).into_iter().map(|message| message.with_key("k")).collect::<Vec<_>>();
    // The client looks again by itself, after a while.
    proxy.script("GetQueueUrl", [Fault::Answer(503, UNAVAILABLE)]);
    let (first, second) = tokio::join!(bus.publish(keyed(0..3)), bus.publish(keyed(3..6)));
    assert!(first.into_iter().chain(second).all(|outcome| outcome.is_ok()));
    assert!(proxy.is_spent());
    let mut seen = Vec::new();
    while seen.len() < 6 {
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        seen.push(number(&delivery));
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen, (0..6).collect::<Vec<_>>());
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_tells_that_sqs_does_not_serve_and_goes_on_when_it_does() {
    let Some(url) = url() else { return };
    let (proxy, bus, direct) = connections(&url, "").await;
    let name = unique("degraded");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    // More than the client tries by itself.
    proxy.script("ReceiveMessage", (0..6).map(|_| Fault::Answer(503, UNAVAILABLE)));
    publish(&direct, numbered(&name, 0..1)).await;
    let (mut events, mut deliveries) = (Vec::new(), Vec::new());
    let deadline = Instant::now() + LONG;
    while deliveries.is_empty() || events.len() < 2 {
        assert!(Instant::now() < deadline, "{events:?} {deliveries:?}");
        let received = subscriber.receive_all(1, Duration::from_secs(1)).await.unwrap();
        events.extend(received.events);
        deliveries.extend(received.deliveries);
    }
    assert!(matches!(events[0], SubscriptionEvent::Degraded { .. }), "{events:?}");
    assert!(matches!(events[1], SubscriptionEvent::Recovered), "{events:?}");
    assert!(ack(deliveries).await.iter().all(Result::is_ok));
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_under_stress_is_told_entry_by_entry_too() {
    let Some(url) = localstack_url() else { return };
    let (proxy, bus, direct) = connections(&url, "").await;
    let name = unique("topic");
    let mut subscriber = direct.subscribe(direct.subscription(name.as_str(), "g")).await.unwrap();
    let error = |code: &str| {
        let text = format!(
            "<ErrorResponse xmlns=\"http://sns.amazonaws.com/doc/2010-03-31/\"><Error><Type>Sender</Type><Code>{code}\
             </Code><Message>by the test</Message></Error><RequestId>r</RequestId></ErrorResponse>"
        );
        &*text.leak()
    };
    let mixed = "<PublishBatchResponse xmlns=\"http://sns.amazonaws.com/doc/2010-03-31/\"><PublishBatchResult>\
        <Successful><member><Id>0</Id><MessageId>m</MessageId></member></Successful><Failed><member><Id>1</Id>\
        <Code>InternalError</Code><Message>by the test</Message><SenderFault>false</SenderFault></member></Failed>\
        </PublishBatchResult><ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></PublishBatchResponse>";
    let faults = [throttled(FORM), Fault::DoneBut(503, error("ServiceUnavailable")), Fault::DoneBut(200, mixed)];
    proxy.script("PublishBatch", faults);
    let refused = Some((ErrorKind::RateLimited, Effect::NotDone));
    assert_eq!(outcomes(&bus, numbered(&name, 0..3)).await, [refused; 3]);
    let unknown = Some((ErrorKind::Unavailable, Effect::Unknown));
    assert_eq!(outcomes(&bus, numbered(&name, 10..13)).await, [unknown; 3]);
    let unmentioned = Some((ErrorKind::Unexpected, Effect::Unknown));
    assert_eq!(outcomes(&bus, numbered(&name, 20..23)).await, [None, unknown, unmentioned]);
    assert!(proxy.is_spent());
    assert_eq!(arrive(&mut subscriber, 6).await, (10..13).chain(20..23).collect());
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
}
