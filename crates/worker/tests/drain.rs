//! Stopping loses nothing and burns no attempt.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anybroker_core::{Bus, DeadLetterFilter};
use anybroker_worker::{Outcome, RetryPolicy, Worker, boxed};
use support::faulty::Faults;
use support::{Gated, QUIET, Recorder, Running, bus, keyed, message, options, publish, spec, turned, until, within};

/// What the group gets afterwards: text and attempt of each message, in order.
async fn left(bus: &Bus) -> Vec<String> {
    let handler = Recorder::ok();
    let worker = Running::start(Worker::new(bus.clone()).handle(options(keyed()).with_concurrency(1), handler.clone()));
    support::drained(bus).await;
    worker.stop().await;
    handler.trail()
}

async fn dead(bus: &Bus) -> usize {
    bus.dead_letters("orders", "payments").unwrap().peek(&DeadLetterFilter::all(), 10).await.unwrap().len()
}

#[tokio::test]
async fn a_drain_waits_for_running_handlers_and_gives_the_rest_back_uncounted() {
    let bus = bus();
    publish(&bus, (0..10).map(|n| message(&n.to_string()))).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus.clone()).handle(options(spec()).with_concurrency(2), handler.clone()));
    until("two handlers", || handler.begun().len() == 2).await;
    worker.shutdown.drain();
    publish(&bus, [message("late")]).await;
    tokio::time::sleep(QUIET).await;
    assert!(!worker.is_over(), "it waits for its handlers");
    assert_eq!(handler.begun().len(), 2, "nothing begins any more");
    handler.open(2);
    let total = worker.end().await.total();
    assert_eq!((total.processed, total.released, total.cancelled, total.retried), (2, 8, 0, 0));
    let left = left(&bus).await;
    let expected: Vec<String> = (2..10).map(|n| format!("{n}/1")).chain(["late/1".into()]).collect();
    assert_eq!(left, expected, "everything else comes, in order, as a first attempt");
}

#[tokio::test]
async fn a_handler_that_is_cut_off_at_the_end_of_the_grace_settles_nothing_and_burns_no_attempt() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    publish(&bus, [message("quick"), message("slow")]).await;
    let handler = Gated::new();
    let worker = Worker::new(bus)
        .with_clock(clock.clone())
        .with_grace(Duration::from_secs(10))
        .handle(options(spec()).with_retry(RetryPolicy::immediate()), handler.clone());
    let worker = Running::start(worker);
    until("both run", || handler.begun().len() == 2).await;
    handler.open(1);
    until("one ends", || handler.ended().len() == 1).await;
    worker.shutdown.drain();
    until("the drain has begun", || handler.drains.load(Ordering::SeqCst) == 1).await;
    clock.advance(Duration::from_millis(9_999));
    tokio::time::sleep(QUIET).await;
    assert!(handler.dropped().is_empty(), "the grace is not over");
    clock.advance(Duration::from_millis(1));
    let total = worker.end().await.total();
    assert_eq!(handler.dropped(), ["slow"]);
    assert_eq!((total.processed, total.cancelled, total.retried, total.dead_letters()), (1, 1, 0, 0));
    let settled: Vec<String> = faults.batches().into_iter().flatten().collect();
    assert!(!settled.iter().any(|entry| entry.starts_with("nack") || entry.starts_with("dead")), "{settled:?}");
    assert!(!settled.contains(&"ack slow".into()), "{settled:?}");
    assert_eq!(left(&inner).await, ["slow/1"]);
    assert_eq!(dead(&inner).await, 0);
}

#[tokio::test]
async fn cutting_the_grace_short_drops_handlers_at_once() {
    let bus = bus();
    publish(&bus, [message("slow")]).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus.clone()).handle(spec(), handler.clone()));
    until("it runs", || handler.begun().len() == 1).await;
    worker.shutdown.drain();
    worker.shutdown.cut_short();
    assert_eq!(worker.end().await.total().cancelled, 1);
    assert_eq!(left(&bus).await, ["slow/1"]);
}

#[tokio::test]
async fn a_handler_can_see_the_drain_and_is_not_disturbed_by_it() {
    let bus = bus();
    publish(&bus, [message("x")]).await;
    let (began, saw) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let handler = {
        let (began, saw) = (Arc::clone(&began), Arc::clone(&saw));
        boxed(move |ctx| {
            let (began, saw) = (Arc::clone(&began), Arc::clone(&saw));
            Box::pin(async move {
                assert!(!ctx.is_draining());
                began.store(true, Ordering::SeqCst);
                ctx.draining().await;
                assert!(ctx.is_draining());
                tokio::task::yield_now().await;
                saw.store(true, Ordering::SeqCst);
                Outcome::Ok(())
            })
        })
    };
    let worker = Running::start(Worker::new(bus).handle(spec(), handler));
    until("it runs", || began.load(Ordering::SeqCst)).await;
    assert_eq!(worker.stop().await.total().processed, 1);
    assert!(saw.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_handler_that_never_yields_is_left_behind_and_its_message_comes_back() {
    let bus = bus();
    publish(&bus, [message("stuck")]).await;
    let (began, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let handler = {
        let (began, stop) = (Arc::clone(&began), Arc::clone(&stop));
        boxed(move |_| {
            began.store(true, Ordering::SeqCst);
            while !stop.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Box::pin(async { Ok(()) })
        })
    };
    // It holds its thread; so it gets a runtime with another one.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let worker = Worker::new(bus.clone()).with_grace(Duration::from_millis(1)).handle(spec(), handler);
    let shutdown = worker.shutdown_handle();
    let running = runtime.spawn(worker.run_until(std::future::pending()));
    until("it runs", || began.load(Ordering::SeqCst)).await;
    shutdown.drain();
    let report = within("the worker ends nevertheless", running).await.unwrap().unwrap();
    assert_eq!(report.total().processed, 0);
    let left = left(&bus).await;
    stop.store(true, Ordering::SeqCst);
    runtime.shutdown_background();
    assert_eq!(left, ["stuck/1"]);
}

#[tokio::test]
async fn a_worker_that_is_dropped_where_it_stands_gives_everything_back_uncounted() {
    let bus = bus();
    publish(&bus, (0..5).map(|n| message(&n.to_string()))).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus.clone()).handle(options(spec()).with_concurrency(2), handler.clone()));
    until("two run", || handler.begun().len() == 2).await;
    worker.kill().await;
    let mut left = left(&bus).await;
    left.sort();
    assert_eq!(left, ["0/1", "1/1", "2/1", "3/1", "4/1"]);
}

#[tokio::test]
async fn what_was_acked_before_a_drain_is_not_seen_again() {
    let bus = bus();
    publish(&bus, (0..1_000).map(|n| message(&n.to_string()))).await;
    let handler = Recorder::ok();
    let worker = Running::start(Worker::new(bus.clone()).handle(spec(), handler.clone()));
    until("some are handled", || handler.count() >= 300).await;
    let total = worker.stop().await.total();
    let (seen, left) = (handler.count(), left(&bus).await);
    assert_eq!(total.processed, seen as u64);
    assert_eq!(seen + left.len(), 1_000, "each exactly once");
}
