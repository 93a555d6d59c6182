//! Time limits, leases that are kept, and leases that are lost.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{DeadLetterFilter, Error, ErrorKind, Lane, Settlement, SubscriptionEvent, Support};
use anybroker_memory::Memory;
use anybroker_worker::{HandlerError, RetryPolicy, Worker, boxed};
use parking_lot::Mutex;
use support::faulty::Faults;
use support::{Gated, QUIET, Recorder, Running, drained, keyed, message, options, publish, seen, spec, turned, until};
use tokio::sync::Semaphore;

const LEASE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_handler_at_its_time_limit_is_dropped_and_has_failed_with_class_timeout() {
    let (bus, clock) = turned();
    publish(&bus, [message("slow")]).await;
    let handler = Gated::new();
    let options =
        options(spec().with_max_attempts(2)).with_retry(RetryPolicy::immediate()).with_timeout(Duration::from_secs(5));
    let worker = Running::start(Worker::new(bus.clone()).with_clock(clock.clone()).handle(options, handler.clone()));
    for attempt in 1..=2 {
        until("it runs", || handler.begun().len() == attempt).await;
        clock.advance(Duration::from_millis(4_999));
        tokio::time::sleep(QUIET).await;
        assert_eq!(handler.dropped().len(), attempt - 1, "not before its limit");
        clock.advance(Duration::from_millis(1));
        until("it is dropped", || handler.dropped().len() == attempt).await;
    }
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!((total.timeouts, total.retried, total.dead_letters_of(&"TIMEOUT".into())), (2, 1, 1));
    let letters = bus.dead_letters("orders", "payments").unwrap().peek(&DeadLetterFilter::all(), 10).await.unwrap();
    assert_eq!(letters[0].error_type.as_deref(), Some("TIMEOUT"));
}

#[tokio::test]
async fn leases_are_kept_while_handlers_run_and_while_messages_wait_for_one() {
    let (bus, clock) = turned();
    publish(&bus, (0..20).map(|n| message(&n.to_string()).with_key(format!("k{}", n % 3)))).await;
    let handler = Gated::new();
    let options = options(keyed().with_lease(LEASE)).with_concurrency(2).with_timeout(None);
    let worker = Running::start(Worker::new(bus.clone()).with_clock(clock.clone()).handle(options, handler.clone()));
    until("two run", || handler.begun().len() == 2).await;
    // Another member of the group would get whatever comes back.
    let mut other = bus.subscribe(keyed()).await.unwrap();
    for _ in 0..40 {
        clock.advance(LEASE / 8);
        assert!(other.receive(10, Duration::from_millis(5)).await.unwrap().is_empty(), "a lease was lost");
    }
    handler.open(20);
    until("all are handled", || handler.ended().len() == 20).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.stale), (20, 0));
    assert!(other.receive(10, QUIET).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_message_that_is_done_while_its_lease_is_being_extended_is_settled_when_that_is_over() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    publish(&bus, ["first", "waits", "fails"].map(|text| message(text).with_key("a"))).await;
    let gate = Arc::new(Semaphore::new(0));
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let handler = {
        let (gate, log) = (Arc::clone(&gate), Arc::clone(&log));
        boxed(move |ctx| {
            let (gate, log) = (Arc::clone(&gate), Arc::clone(&log));
            Box::pin(async move {
                let seen = seen(ctx);
                log.lock().push(format!("{}/{}", seen.text, seen.attempt));
                match (&*seen.text, seen.attempt) {
                    ("first", _) => gate.acquire().await.unwrap().forget(),
                    ("fails", 1) => return Err(HandlerError::new("TIMEOUT", "once")),
                    _ => {}
                }
                Ok(())
            })
        })
    };
    let spec = keyed().with_lease(LEASE).with_on_failure(anybroker_core::OnFailure::Block);
    let options = options(spec).with_retry(RetryPolicy::immediate()).with_timeout(None);
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(options, handler));
    until("one runs", || log.lock().len() == 1).await;
    faults.hold_extensions(true);
    for _ in 0..3 {
        clock.advance(LEASE / 4);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    until("those that wait are being extended", || faults.extended().contains(&"fails".into())).await;
    gate.add_permits(1);
    until("all have run", || log.lock().len() == 3).await;
    tokio::time::sleep(QUIET).await;
    let settled: Vec<String> = faults.batches().into_iter().flatten().collect();
    assert_eq!(settled, ["ack first"], "the others are still being extended");
    faults.hold_extensions(false);
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.retried, total.stale), (3, 1, 0));
    assert_eq!(*log.lock(), ["first/1", "waits/1", "fails/1", "fails/2"]);
}

#[tokio::test]
async fn a_lost_lease_is_counted_and_harms_no_other_message() {
    let (_, broker_clock) = turned();
    // The worker's own clock stands: it does not know that its leases have ended.
    let (_, worker_clock) = turned();
    let bus = Memory::builder().clock(broker_clock.clone()).build().bus();
    publish(&bus, [message("a"), message("b")]).await;
    let handler = Gated::new();
    let spec = spec().with_lease(LEASE);
    let worker = Worker::new(bus.clone()).with_clock(worker_clock).handle(options(spec.clone()), handler.clone());
    let worker = Running::start(worker);
    until("both run", || handler.begun().len() == 2).await;
    broker_clock.advance(LEASE * 2);
    // Their new deliveries, which this member gets as well, wait at the gate.
    until("both run again", || handler.begun().len() == 4).await;
    publish(&bus, [message("c")]).await;
    until("another one", || handler.begun().len() == 5).await;
    handler.open(5);
    until("all end", || handler.ended().len() == 5).await;
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.stale), (3, 2));
}

#[tokio::test]
async fn a_settle_that_fails_for_the_moment_is_tried_again() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    let mut failures = 3;
    faults.fail_settles(move |_, settlement| {
        (matches!(settlement, Settlement::Ack) && failures > 0).then(|| {
            failures -= 1;
            Error::new(ErrorKind::Unavailable, "settle", "leader moving")
        })
    });
    publish(&bus, [message("x"), message("y")]).await;
    let handler = Recorder::ok();
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(spec(), handler.clone()));
    until("both are handled", || handler.count() == 2).await;
    for _ in 0..20 {
        clock.advance(Duration::from_millis(500));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.unsettled, total.stale), (2, 0, 0));
    assert_eq!(handler.count(), 2);
}

#[tokio::test]
async fn a_key_stays_blocked_while_its_failure_cannot_be_settled() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    let mut failures = 2;
    faults.fail_settles(move |_, settlement| {
        (matches!(settlement, Settlement::Nack(_)) && failures > 0).then(|| {
            failures -= 1;
            Error::new(ErrorKind::Unavailable, "settle", "leader moving")
        })
    });
    publish(&bus, (1..=3).map(|n| message(&n.to_string()).with_key("a"))).await;
    let handler = Recorder::new(|seen| match (&*seen.text, seen.attempt) {
        ("1", 1) => Err(HandlerError::new("TIMEOUT", "once")),
        _ => Ok(()),
    });
    let spec = keyed().with_on_failure(anybroker_core::OnFailure::Block);
    let options = options(spec).with_retry(RetryPolicy::immediate());
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(options, handler.clone()));
    until("the failure", || handler.count() == 1).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(handler.trail(), ["1/1"]);
    for _ in 0..10 {
        clock.advance(Duration::from_millis(500));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    until("the whole key", || handler.count() == 4).await;
    assert_eq!(handler.trail(), ["1/1", "1/2", "2/1", "3/1"]);
    assert_eq!(worker.stop().await.total().processed, 3);
}

#[tokio::test]
async fn a_settle_that_keeps_failing_is_given_up_and_the_worker_goes_on() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    faults.fail_settles(|delivery, _| {
        (delivery.message().bytes() == b"x").then(|| Error::new(ErrorKind::Unavailable, "settle", "no answer"))
    });
    publish(&bus, [message("x"), message("y")]).await;
    let handler = Recorder::ok();
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(spec(), handler.clone()));
    until("both are handled", || handler.count() == 2).await;
    let tries = || faults.batches().iter().flatten().filter(|entry| *entry == "ack x").count();
    let mut turns = 0;
    while tries() < 6 {
        clock.advance(Duration::from_millis(100));
        tokio::time::sleep(Duration::from_millis(1)).await;
        turns += 1;
        assert!(turns < 2_000, "{} tries", tries());
    }
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.unsettled), (1, 1));
}

#[tokio::test]
async fn where_leases_cannot_be_extended_what_has_waited_too_long_is_not_handled() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let mut record = inner.capabilities().clone();
    record.lease_extension = Support::refused("a broker that can");
    let bus = faults.with_record(&inner, record);
    publish(&bus, [message("runs"), message("waits")]).await;
    let handler = Gated::new();
    let options = options(spec().with_lease(LEASE)).with_concurrency(1);
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(options, handler.clone()));
    until("one runs", || handler.begun().len() == 1).await;
    clock.advance(LEASE + LEASE / 2);
    handler.open(10);
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert!(faults.extended().is_empty());
    // Each was delivered twice; of the first deliveries one ran (and was settled too late), one never began.
    assert_eq!((total.processed, total.stale), (2, 2));
    assert_eq!(handler.begun().iter().filter(|text| *text == "waits").count(), 1);
}

#[tokio::test]
async fn a_lane_that_is_being_revoked_gives_back_what_waits_and_may_finish_what_runs() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    publish(&bus, (0..4).map(|n| message(&n.to_string()))).await;
    let handler = Gated::new();
    let options = options(spec()).with_concurrency(2).with_retry(RetryPolicy::immediate());
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(options, handler.clone()));
    until("two run", || handler.begun().len() == 2).await;
    faults.set_epoch(1);
    let deadline = anybroker_core::Clock::now(&clock).after(Duration::from_secs(5));
    faults.happens(SubscriptionEvent::Revoking { lane: Lane { index: 0, epoch: 0 }, deadline });
    until("the two others go back", || {
        let settled: Vec<String> = faults.batches().into_iter().flatten().collect();
        settled.contains(&"release 2".into()) && settled.contains(&"release 3".into())
    })
    .await;
    handler.open(1);
    until("one ends in time", || handler.ended().len() == 1).await;
    assert!(handler.dropped().is_empty());
    clock.advance(Duration::from_secs(5));
    until("the other one is dropped at the deadline", || handler.dropped().len() == 1).await;
    handler.open(10);
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.cancelled, total.retried, total.revoked), (4, 1, 0, 1));
}

#[tokio::test]
async fn a_lost_lane_drops_its_handlers_at_once_and_nothing_counts_as_a_failure() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    publish(&bus, [message("x")]).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(spec(), handler.clone()));
    until("it runs", || handler.begun().len() == 1).await;
    faults.set_epoch(1);
    faults.happens(SubscriptionEvent::Lost { lane: Lane { index: 0, epoch: 0 } });
    until("it is dropped", || handler.dropped().len() == 1).await;
    handler.open(1);
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.cancelled, total.retried, total.revoked), (1, 1, 0, 1));
}
