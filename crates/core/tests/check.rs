//! The check layer: what an endpoint cannot carry or refuses never reaches its adapter.

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use anybroker_core::{
    Bus, Bytes, Capabilities, Config, Effect, ErrorKind, Limits, Message, OnFailure, Order, PublishOptions,
    PublishOrder, RedriveOptions, Registry, Retry, Start, Support, TopologySpec,
};
use common::{TestBroker, TestDriver, record};

fn limited() -> Capabilities {
    let mut record = record();
    record.limits = Limits {
        payload: Some(10),
        key: Some(4),
        headers: Some(40),
        header_name: Some(20),
        header_count: Some(3),
        delay_max_ms: Some(1_000),
        lease_min_ms: Some(1_000),
        lease_max_ms: Some(60_000),
        ..Limits::default()
    };
    record
}

/// The kind with which the message is refused; the broker must not have seen it.
async fn refusal(record: Capabilities, message: Message) -> ErrorKind {
    let broker = TestBroker::new(record);
    let error = broker.bus().send(message).await.expect_err("refused");
    assert_eq!(error.effect(), Effect::NotDone);
    assert_eq!(error.retry(), Retry::Never);
    assert_eq!(broker.calls.load(Ordering::SeqCst), 0, "it reached the adapter");
    error.kind()
}

#[tokio::test]
async fn a_message_at_its_limits_passes_and_one_byte_more_does_not() {
    let header = |count: usize| (0..count).fold(Message::new("d", "x"), |message, _| message.with_header("n", "v"));
    let fits = [
        Message::new("d", vec![0; 10]),
        Message::new("d", "x").with_key("1234"),
        header(3),
        Message::new("d", "x").with_header("n".repeat(20), "v".repeat(20)),
        Message::new("d", ""),
        Message::new("d", "x").with_key(""),
        Message::new("d", "x").with_delay(Duration::from_secs(1)),
    ];
    for message in fits {
        let broker = TestBroker::new(limited());
        broker.bus().send(message.clone()).await.expect("within the limits");
        assert_eq!(*broker.published.lock(), [message]);
    }
    let message = || Message::new("d", "x");
    assert_eq!(refusal(limited(), Message::new("d", vec![0; 11])).await, ErrorKind::TooLarge);
    assert_eq!(refusal(limited(), message().with_key("12345")).await, ErrorKind::InvalidMessage);
    assert_eq!(refusal(limited(), header(4)).await, ErrorKind::InvalidMessage);
    let name = message().with_header("n".repeat(21), "v");
    assert_eq!(refusal(limited(), name).await, ErrorKind::InvalidMessage);
    let value = message().with_header("n", "v".repeat(40));
    assert_eq!(refusal(limited(), value).await, ErrorKind::TooLarge);
    let delayed = message().with_delay(Duration::from_millis(1_001));
    assert_eq!(refusal(limited(), delayed).await, ErrorKind::InvalidMessage);
}

#[tokio::test]
async fn names_that_no_endpoint_takes_are_refused() {
    let message = || Message::new("d", "x");
    for invalid in [
        message().with_id(""),
        message().with_destination(""),
        message().with_header("", "v"),
        message().with_header("anybroker-attempt", "1"),
        message().with_header("AnyBroker-Attempt", "1"),
        message().with_header("ANYBROKER-", "1"),
        message().with_header("fine", "v").with_header("anybroker-x", "1"),
    ] {
        assert_eq!(refusal(record(), invalid).await, ErrorKind::InvalidMessage);
    }
    let broker = TestBroker::new(record());
    broker.bus().send(message().with_header("anybroker", "v").with_header("any", "v")).await.expect("not reserved");
    broker.bus().send(message().with_header("аниброкер-я", "v")).await.expect("not reserved");
}

#[tokio::test]
async fn what_the_record_refuses_of_a_message_is_refused() {
    let mut without = record();
    without.tombstones = Support::refused("use another");
    assert_eq!(refusal(without, Message::tombstone("d", "k")).await, ErrorKind::InvalidMessage);
    let mut without = record();
    without.delayed_publish = Support::refused("use another");
    let delayed = Message::new("d", "x").with_delay(Duration::from_secs(1));
    assert_eq!(refusal(without.clone(), delayed).await, ErrorKind::Unsupported);
    let broker = TestBroker::new(without);
    broker.bus().send(Message::new("d", "x").with_delay(Duration::ZERO)).await.expect("no delay at all");
    let mut without = record();
    without.ttl = Support::refused("use another");
    let expiring = Message::new("d", "x").with_ttl(Duration::from_secs(1));
    assert_eq!(refusal(without, expiring).await, ErrorKind::Unsupported);
}

#[tokio::test]
async fn a_refused_message_is_named_in_its_error() {
    let mut record = limited();
    record.ttl = Support::refused("use another");
    for message in [Message::new("d", vec![0; 11]), Message::new("d", "x").with_ttl(Duration::from_secs(1))] {
        let error = TestBroker::new(record.clone()).bus().send(message.with_id("m-1")).await.expect_err("refused");
        let context: Vec<_> = error.context().collect();
        assert!(context.contains(&("id", "m-1")) && context.contains(&("destination", "d")), "{error}");
    }
}

fn bad(id: &str) -> Message {
    Message::new("d", vec![0; 11]).with_id(id)
}

fn good(id: &str) -> Message {
    Message::new("d", "x").with_id(id)
}

fn kinds(outcomes: &[anybroker_core::PublishOutcome]) -> Vec<Option<(ErrorKind, Effect)>> {
    outcomes.iter().map(|outcome| outcome.as_ref().err().map(|error| (error.kind(), error.effect()))).collect()
}

const TOO_LARGE: Option<(ErrorKind, Effect)> = Some((ErrorKind::TooLarge, Effect::NotDone));
const HELD_BACK: Option<(ErrorKind, Effect)> = Some((ErrorKind::Unavailable, Effect::NotDone));

#[tokio::test]
async fn one_bad_entry_does_not_spoil_its_batch_and_outcomes_keep_their_places() {
    let broker = TestBroker::new(limited());
    let outcomes = broker.bus().publish(vec![good("1"), bad("2"), good("3"), bad("4"), good("5")]).await;
    assert_eq!(kinds(&outcomes), [None, TOO_LARGE, None, TOO_LARGE, None]);
    let ids: Vec<String> = broker.published.lock().iter().map(|message| message.id().to_string()).collect();
    assert_eq!(ids, ["1", "3", "5"]);
}

#[tokio::test]
async fn entries_behind_a_refused_one_of_their_key_are_held_back() {
    let broker = TestBroker::new(limited());
    let batch = || {
        vec![
            good("before").with_key("k"),
            bad("bad").with_key("k"),
            good("other key").with_key("l"),
            good("behind").with_key("k"),
            good("no key"),
            good("same key elsewhere").with_key("k").with_destination("e"),
            good("behind too").with_key("k"),
        ]
    };
    let outcomes = broker.bus().publish(batch()).await;
    assert_eq!(kinds(&outcomes), [None, TOO_LARGE, None, HELD_BACK, None, None, HELD_BACK]);
    assert!(outcomes[3].as_ref().is_err_and(|error| error.retry() == Retry::Later(None)), "it may be sent again");
    assert_eq!(broker.published.lock().len(), 4);

    let broker = TestBroker::new(limited());
    let options = PublishOptions::default().with_order(PublishOrder::None);
    let outcomes = broker.bus().submit(batch(), &options).await.await;
    assert_eq!(kinds(&outcomes), [None, TOO_LARGE, None, None, None, None, None]);
}

#[tokio::test]
async fn a_batch_without_any_good_entry_does_not_reach_the_adapter() {
    let broker = TestBroker::new(limited());
    assert_eq!(kinds(&broker.bus().publish(vec![bad("1"), bad("2")]).await), [TOO_LARGE, TOO_LARGE]);
    assert!(broker.bus().publish(Vec::new()).await.is_empty());
    assert_eq!(broker.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn every_unmet_requirement_is_named_with_endpoint_and_remedy() {
    let mut record = limited();
    record.key_order = Support::refused("set mode=fifo");
    record.nack_delay = Support::emulated("one more message");
    let driver = TestDriver { record: Some(record), ..TestDriver::default() };
    let registry = Registry::new().with(driver.clone());
    let connect = |require: &str| registry.connect(Config::from_url("test://a").with("require", require.to_owned()));
    connect("nack_delay,ttl,payload>=10,ack_individual").await.expect("all of it is given");

    let error = connect("key_order,nack_delay:native,ttl,payload>=11").await.expect_err("unmet");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(error.operation(), "connect");
    for part in
        ["`key_order`", "set mode=fifo", "`nack_delay:native`", "one more message", "`payload>=11`", "test://here"]
    {
        assert!(error.message().contains(part), "{part} is missing: {error}");
    }
    assert!(!error.message().contains("`ttl`"), "what is met is not named: {error}");
}

#[tokio::test]
async fn a_refused_verb_answers_unsupported_with_its_remedy_and_does_nothing() {
    let mut record = record();
    let refused = || Support::refused("take another broker");
    record.dead_letter = refused();
    record.declare = refused();
    record.describe = refused();
    record.delete = refused();
    record.transactions = refused();
    record.lag = anybroker_core::LagPrecision::default();
    let broker = TestBroker::new(record);
    let bus = broker.bus();
    let kinds = [
        bus.dead_letters("d", "g").expect_err("refused"),
        bus.declare(&TopologySpec::destination("d")).await.expect_err("refused"),
        bus.describe("d").await.expect_err("refused"),
        bus.delete("d", None).await.expect_err("refused"),
        bus.lag("d", "g").await.expect_err("refused"),
        bus.begin().await.err().expect("refused"),
        bus.subscribe(bus.subscription("d", "g")).await.expect_err("dead letters are refused, and max_attempts is 5"),
    ];
    for error in &kinds {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert_eq!((error.effect(), error.retry()), (Effect::NotDone, Retry::Never));
    }
    assert!(kinds[1].message().contains("take another broker"), "{}", kinds[1]);
    assert_eq!(broker.calls.load(Ordering::SeqCst), 0, "a refused verb reached the adapter");
}

#[tokio::test]
async fn redrive_and_purge_are_refused_one_by_one() {
    let mut record = record();
    record.redrive = Support::refused("take another broker");
    record.purge = Support::refused("take another broker");
    let broker = TestBroker::new(record);
    let letters = broker.bus().dead_letters("d", "g").expect("dead letters are given");
    let error = letters.redrive(&RedriveOptions::default()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let error = letters.purge(&Default::default()).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(broker.calls.load(Ordering::SeqCst), 0);
}

async fn subscribe_refusal(
    record: Capabilities,
    change: impl FnOnce(anybroker_core::SubscribeSpec) -> anybroker_core::SubscribeSpec,
) -> anybroker_core::Error {
    let broker = TestBroker::new(record);
    let bus: Bus = broker.bus();
    let error = bus.subscribe(change(bus.subscription("d", "g"))).await.expect_err("refused");
    assert_eq!(broker.calls.load(Ordering::SeqCst), 0, "it reached the adapter");
    error
}

#[tokio::test]
async fn options_of_a_subscription_that_the_record_refuses_are_refused() {
    let mut without = record();
    for support in [
        &mut without.key_order,
        &mut without.total_order,
        &mut without.block_on_failure,
        &mut without.park_on_failure,
        &mut without.replay,
        &mut without.start_position,
        &mut without.start_latest,
    ] {
        *support = Support::refused("take another broker");
    }
    let kind = async |change: fn(anybroker_core::SubscribeSpec) -> anybroker_core::SubscribeSpec| {
        subscribe_refusal(without.clone(), change).await.kind()
    };
    assert_eq!(kind(|spec| spec.with_order(Order::Key)).await, ErrorKind::Unsupported);
    assert_eq!(kind(|spec| spec.with_order(Order::Total)).await, ErrorKind::Unsupported);
    assert_eq!(kind(|spec| spec.with_start(Start::Time(Default::default()))).await, ErrorKind::Unsupported);
    assert_eq!(kind(|spec| spec.with_start(Start::Latest)).await, ErrorKind::Unsupported);
    let position = anybroker_core::Position::new(1);
    let error = subscribe_refusal(without.clone(), |spec| spec.with_start(Start::Position(position))).await;
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let mut ordered = without.clone();
    ordered.key_order = Support::Native;
    for on_failure in [OnFailure::Block, OnFailure::Park] {
        let change = |spec: anybroker_core::SubscribeSpec| spec.with_order(Order::Key).with_on_failure(on_failure);
        assert_eq!(subscribe_refusal(ordered.clone(), change).await.kind(), ErrorKind::Unsupported);
    }
    let error = TestBroker::new(without)
        .bus()
        .declare(&TopologySpec::group("d", "g").with_start(Start::Time(Default::default())))
        .await;
    assert_eq!(error.expect_err("refused").kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn every_bad_field_of_a_subscription_is_told_at_once() {
    let error = subscribe_refusal(record(), |mut spec| {
        spec.destinations = vec!["".into()];
        spec.group = "".into();
        spec.with_max_in_flight(0)
            .with_lease(Duration::ZERO)
            .with_max_attempts(0)
            .with_crash_limit(0)
            .with_on_failure(OnFailure::Block)
    })
    .await;
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    let fields: Vec<_> = error.context().map(|(name, _)| name).collect();
    let all = ["destinations", "group", "max_in_flight", "lease", "max_attempts", "crash_limit", "on_failure"];
    assert_eq!(fields, all);
}

#[tokio::test]
async fn a_lease_outside_what_the_endpoint_leases_is_refused() {
    for lease in [Duration::from_millis(999), Duration::from_millis(60_001)] {
        let error = subscribe_refusal(limited(), |spec| spec.with_lease(lease)).await;
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{lease:?}");
    }
    let bus = TestBroker::new(limited()).bus();
    for lease in [Duration::from_secs(1), Duration::from_secs(60)] {
        bus.subscribe(bus.subscription("d", "g").with_lease(lease)).await.expect("within the limits");
    }
}

#[tokio::test]
async fn declaring_something_without_a_name_is_refused() {
    let broker = TestBroker::new(record());
    for spec in [TopologySpec::destination(""), TopologySpec::group("d", "")] {
        let error = broker.bus().declare(&spec).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    }
    assert_eq!(broker.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn every_verb_answers_closed_after_close() {
    let broker = TestBroker::new(record());
    let bus = broker.bus();
    bus.close(Duration::from_secs(1)).await.expect("closed");
    bus.close(Duration::from_secs(1)).await.expect("closing twice is one close");
    let errors = [
        bus.send(Message::new("d", Bytes::new())).await.expect_err("closed"),
        bus.subscribe(bus.subscription("d", "g")).await.expect_err("closed"),
        bus.dead_letters("d", "g").expect_err("closed"),
        bus.declare(&TopologySpec::destination("d")).await.expect_err("closed"),
        bus.verify(&TopologySpec::destination("d")).await.expect_err("closed"),
        bus.describe("d").await.expect_err("closed"),
        bus.delete("d", None).await.expect_err("closed"),
        bus.lag("d", "g").await.expect_err("closed"),
        bus.begin().await.err().expect("closed"),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        assert_eq!(error.effect(), Effect::NotDone);
    }
    assert_eq!(broker.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_deadline_beyond_all_time_is_no_deadline() {
    let broker = TestBroker::new(record());
    let options = PublishOptions::default().with_timeout(Duration::MAX);
    let outcomes = broker.bus().submit(vec![good("1")], &options).await.await;
    assert_eq!(kinds(&outcomes), [None]);
    let timeouts = "test://a?connect_timeout=18446744073709551615s&publish_timeout=18446744073709551615s";
    let bus = Registry::new().with(TestDriver::default()).connect(Config::from_url(timeouts)).await.expect("connected");
    bus.send(good("1")).await.expect("published");
}

#[test]
fn an_error_is_one_line_whatever_a_sender_calls_his_message() {
    let error =
        anybroker_core::Error::new(ErrorKind::TooLarge, "publish", "text\nforged").with("id", "a\r\nforged\u{1b}[2J");
    assert_eq!(error.to_string(), "publish: too_large: text\\nforged (id=a\\r\\nforged\\u{1b}[2J)");
    assert_eq!(error.message(), "text\nforged", "the parts stay as they are");
}
