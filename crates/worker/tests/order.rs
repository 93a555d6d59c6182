//! One key at a time, in order; other keys in parallel; and what a failure does to later messages of its key.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{DeadLetterFilter, Message, OnFailure, Order, Reason};
use anybroker_worker::{Context, ErrorClass, Handler, HandlerError, Outcome, RetryPolicy, Worker, async_trait, boxed};
use parking_lot::Mutex;
use support::faulty::Faults;
use support::{
    Gated, QUIET, Recorder, Running, bus, drained, keyed, message, options, publish, spec, text, turned, until,
};

fn of(key: &str, text: &str) -> Message {
    message(text).with_key(key.to_owned())
}

#[tokio::test]
async fn messages_of_one_key_run_one_at_a_time_and_other_keys_beside_them() {
    let bus = bus();
    publish(&bus, [of("a", "a1"), of("a", "a2"), of("b", "b1"), of("a", "a3"), of("b", "b2"), of("c", "c1")]).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus).handle(keyed(), handler.clone()));
    until("one of each key", || handler.begun().len() == 3).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(handler.begun(), ["a1", "b1", "c1"]);
    for (step, count) in [(3, 5), (2, 6)] {
        handler.open(step);
        until("the next of each key", || handler.begun().len() == count).await;
    }
    handler.open(1);
    until("all", || handler.ended().len() == 6).await;
    let order: Vec<String> = handler.ended().into_iter().filter(|text| text.starts_with('a')).collect();
    assert_eq!(order, ["a1", "a2", "a3"]);
    assert_eq!(worker.stop().await.total().processed, 6);
}

#[tokio::test]
async fn messages_without_a_key_have_no_order_and_run_in_parallel() {
    let bus = bus();
    publish(&bus, (0..8).map(|n| message(&n.to_string()))).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus).handle(options(keyed()).with_concurrency(8), handler.clone()));
    until("all eight at once", || handler.begun().len() == 8).await;
    handler.open(8);
    assert_eq!(worker.stop().await.total().processed, 8);
}

#[tokio::test]
async fn concurrency_is_kept_to_the_number_and_reached() {
    let bus = bus();
    publish(&bus, (0..20).map(|n| message(&n.to_string()))).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus).handle(options(spec()).with_concurrency(10), handler.clone()));
    until("ten at once", || handler.begun().len() == 10).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(handler.begun().len(), 10);
    handler.open(20);
    until("all twenty", || handler.ended().len() == 20).await;
    assert_eq!(worker.stop().await.total().processed, 20);
}

#[tokio::test]
async fn a_small_batch_still_fills_every_handler() {
    let bus = bus();
    publish(&bus, (0..12).map(|n| message(&n.to_string()))).await;
    let handler = Gated::new();
    let options = options(spec()).with_concurrency(6).with_batch(1);
    let worker = Running::start(Worker::new(bus).handle(options, handler.clone()));
    until("six at once", || handler.begun().len() == 6).await;
    handler.open(12);
    until("all twelve", || handler.ended().len() == 12).await;
    worker.stop().await;
}

#[tokio::test]
async fn under_total_order_one_message_of_the_destination_runs_at_a_time() {
    let bus = bus();
    publish(&bus, (0..50).map(|n| of(&format!("k{n}"), &n.to_string()))).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus).handle(spec().with_order(Order::Total), handler.clone()));
    until("the first", || handler.begun().len() == 1).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(handler.begun(), ["0"]);
    handler.open(50);
    until("all", || handler.ended().len() == 50).await;
    let expected: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    assert_eq!(handler.ended(), expected);
    worker.stop().await;
}

/// Fails the first attempts of a message, and yields so that handlers are woken across threads.
struct Flaky {
    failures: u32,
    log: Arc<Mutex<Vec<(String, u64, u32)>>>,
    running: Arc<Mutex<HashMap<String, u32>>>,
}

#[async_trait]
impl Handler for Flaky {
    async fn handle(&self, ctx: &Context) -> Outcome {
        let key = String::from_utf8(ctx.message().key().unwrap().to_vec()).unwrap();
        let number: u64 = text(ctx.message()).parse().unwrap();
        let others = std::mem::replace(self.running.lock().entry(key.clone()).or_default(), 1);
        assert_eq!(others, 0, "two messages of {key} at once");
        if number.is_multiple_of(3) {
            tokio::task::yield_now().await;
        }
        self.log.lock().push((key.clone(), number, ctx.attempt()));
        self.running.lock().insert(key, 0);
        if number.is_multiple_of(7) && ctx.attempt() <= self.failures {
            return Err(HandlerError::new(ErrorClass::TIMEOUT, "flaky"));
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_blocked_key_goes_on_in_order_after_each_retry_whatever_the_threads_do() {
    let bus = bus();
    publish(&bus, (0..2_000_u64).map(|n| of(&format!("k{}", n % 20), &n.to_string()))).await;
    let log = Arc::new(Mutex::new(Vec::new()));
    let handler = Flaky { failures: 2, log: Arc::clone(&log), running: Arc::default() };
    let spec = keyed().with_on_failure(OnFailure::Block).with_crash_limit(None);
    let options = options(spec).with_retry(RetryPolicy::immediate()).with_concurrency(8);
    let worker = Running::start(Worker::new(bus.clone()).handle(options, handler));
    drained(&bus).await;
    let total = worker.stop().await.total();
    let failing = (0..2_000_u64).filter(|n| n % 7 == 0).count() as u64;
    assert_eq!((total.processed, total.retried, total.panics), (2_000, failing * 2, 0));
    let mut at: HashMap<String, (u64, u32)> = HashMap::new();
    for (key, number, attempt) in log.lock().iter() {
        let last = at.insert(key.clone(), (*number, *attempt));
        let expected = match last {
            None => (*number, 1),
            Some((last, attempt)) if last % 7 == 0 && attempt <= 2 => (last, attempt + 1),
            Some((last, _)) => (last + 20, 1),
        };
        assert_eq!((*number, *attempt), expected, "key {key}");
    }
    assert!(at.values().all(|(last, _)| *last >= 1_980));
}

#[tokio::test]
async fn what_the_worker_holds_of_a_blocked_key_goes_back_behind_the_failure_in_one_batch_uncounted() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    publish(&bus, [of("a", "1"), of("a", "2"), of("a", "3"), of("b", "x")]).await;
    let handler = Recorder::new(|seen| match (&*seen.text, seen.attempt) {
        ("1", 1) => Err(HandlerError::new(ErrorClass::TIMEOUT, "once")),
        _ => Ok(()),
    });
    let options = options(keyed().with_on_failure(OnFailure::Block));
    let worker = Worker::new(bus).with_clock(clock.clone()).handle(options, handler.clone());
    let worker = Running::start(worker);
    until("the failure and the other key", || handler.count() == 2).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(handler.trail(), ["1/1", "x/1"], "later ones of the key wait");
    clock.advance(std::time::Duration::from_secs(2));
    until("the whole key", || handler.count() == 5).await;
    assert_eq!(handler.trail()[2..], ["1/2", "2/1", "3/1"]);
    assert!(faults.batches().contains(&vec!["nack 1".into(), "release 2".into(), "release 3".into()]));
    assert_eq!(worker.stop().await.total().released, 2);
}

#[tokio::test]
async fn what_was_on_its_way_when_its_key_failed_goes_back_behind_the_failure_as_well() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    publish(&inner, [of("a", "1")]).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let handler = {
        let (gate, log) = (Arc::clone(&gate), Arc::clone(&log));
        boxed(move |ctx| {
            let (gate, log) = (Arc::clone(&gate), Arc::clone(&log));
            Box::pin(async move {
                log.lock().push(format!("{}/{}", text(ctx.message()), ctx.attempt()));
                if log.lock().len() == 1 {
                    gate.acquire().await.unwrap().forget();
                    return Err(HandlerError::new(ErrorClass::TIMEOUT, "once"));
                }
                Ok(())
            })
        })
    };
    let options = options(keyed().with_on_failure(OnFailure::Block));
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(options, handler));
    until("the first one runs", || log.lock().len() == 1).await;
    // The broker hands out the second one, and it arrives only after the first one has failed.
    faults.hold_receives(true);
    publish(&inner, [of("a", "2"), of("b", "x")]).await;
    until("the second one is on its way", || faults.held() > 0).await;
    gate.add_permits(1);
    until("the failure is settled", || faults.batches().contains(&vec!["nack 1".into()])).await;
    faults.hold_receives(false);
    until("the other key", || log.lock().contains(&"x/1".into())).await;
    tokio::time::sleep(QUIET).await;
    assert_eq!(*log.lock(), ["1/1", "x/1"], "the second one waits for the first");
    clock.advance(Duration::from_secs(2));
    until("all", || log.lock().len() == 4).await;
    assert_eq!(log.lock()[2..], ["1/2", "2/1"]);
    assert_eq!(worker.stop().await.total().processed, 3);
}

#[tokio::test]
async fn messages_that_wait_behind_a_failing_one_are_never_taken_for_ones_that_kill_their_consumer() {
    let bus = bus();
    publish(&bus, [of("a", "1"), of("a", "2"), of("a", "3")]).await;
    let handler = Recorder::new(|seen| match (&*seen.text, seen.attempt) {
        ("1", ..40) => Err(HandlerError::new(ErrorClass::TIMEOUT, "again")),
        _ => Ok(()),
    });
    let spec = keyed().with_on_failure(OnFailure::Block).with_max_attempts(None).with_crash_limit(20);
    let options = options(spec).with_retry(RetryPolicy::immediate());
    let worker = Running::start(Worker::new(bus.clone()).handle(options, handler.clone()));
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!(handler.trail()[39..], ["1/40", "2/1", "3/1"]);
    assert_eq!((total.processed, total.retried), (3, 39));
}

#[tokio::test]
async fn under_go_past_later_messages_of_the_key_go_on() {
    let (bus, clock) = turned();
    publish(&bus, [of("a", "1"), of("a", "2"), of("a", "3")]).await;
    let handler = Recorder::new(|seen| match (&*seen.text, seen.attempt) {
        ("1", 1) => Err(HandlerError::new(ErrorClass::TIMEOUT, "once")),
        _ => Ok(()),
    });
    let worker = Worker::new(bus).with_clock(clock.clone()).handle(keyed(), handler.clone());
    let worker = Running::start(worker);
    until("all once", || handler.count() == 3).await;
    clock.advance(Duration::from_secs(2));
    until("the retry", || handler.count() == 4).await;
    assert_eq!(handler.trail(), ["1/1", "2/1", "3/1", "1/2"]);
    assert_eq!(worker.stop().await.total().released, 0);
}

#[tokio::test]
async fn a_parked_key_follows_its_dead_letter_in_order_and_other_keys_go_on() {
    let bus = bus();
    publish(&bus, [of("a", "1"), of("a", "2"), of("b", "x"), of("a", "3")]).await;
    let handler = Recorder::new(|seen| match &*seen.text {
        "1" => Err(HandlerError::new(ErrorClass::VALIDATION_ERROR, "never")),
        _ => Ok(()),
    });
    let worker = Worker::new(bus.clone()).handle(keyed().with_on_failure(OnFailure::Park), handler.clone());
    let worker = Running::start(worker);
    drained(&bus).await;
    worker.stop().await;
    assert_eq!(handler.trail(), ["1/1", "x/1"]);
    let letters = bus.dead_letters("orders", "payments").unwrap().peek(&DeadLetterFilter::all(), 10).await.unwrap();
    let letters: Vec<_> = letters.iter().map(|letter| (text(&letter.message), letter.reason.clone())).collect();
    assert_eq!(letters, [("1".into(), Reason::Rejected), ("2".into(), Reason::Parked), ("3".into(), Reason::Parked)]);
}

#[tokio::test]
async fn a_blocked_key_goes_on_when_its_message_has_become_a_dead_letter() {
    let bus = bus();
    publish(&bus, [of("a", "1"), of("a", "2")]).await;
    let handler = Recorder::new(|seen| match &*seen.text {
        "1" => Err(HandlerError::new(ErrorClass::TIMEOUT, "always")),
        _ => Ok(()),
    });
    let options = options(keyed().with_on_failure(OnFailure::Block)).with_retry(RetryPolicy::immediate());
    let worker = Running::start(Worker::new(bus.clone()).handle(options, handler.clone()));
    drained(&bus).await;
    worker.stop().await;
    assert_eq!(handler.trail(), ["1/1", "1/2", "1/3", "1/4", "1/5", "2/1"]);
}
