//! Handlers that take messages in batches.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{ErrorKind, OnFailure};
use anybroker_worker::{
    BatchHandler, Context, HandlerError, Middleware, Next, Outcome, RetryPolicy, Worker, async_trait,
};
use parking_lot::Mutex;
use support::{Running, bus, drained, keyed, message, options, publish, seen, spec, turned, until};
use tokio::sync::Semaphore;

#[derive(Clone, Default)]
struct Batches {
    log: Arc<Mutex<Vec<Vec<String>>>>,
    gate: Option<Arc<Semaphore>>,
    short: bool,
}

impl Batches {
    fn log(&self) -> Vec<Vec<String>> {
        self.log.lock().clone()
    }
}

#[async_trait]
impl BatchHandler for Batches {
    async fn handle_batch(&self, batch: &[Context]) -> Vec<Outcome> {
        let seen: Vec<_> = batch.iter().map(seen).collect();
        self.log.lock().push(seen.iter().map(|seen| format!("{}/{}", seen.text, seen.attempt)).collect());
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        let outcomes = seen.iter().map(|seen| match (&*seen.text, seen.attempt) {
            ("panic", 1) => panic!("the whole batch"),
            ("bad", _) => Err(HandlerError::new("VALIDATION_ERROR", "bad")),
            ("retry", 1) => Err(HandlerError::new("TIMEOUT", "once")),
            _ => Ok(()),
        });
        outcomes.take(if self.short && seen[0].attempt == 1 { 1 } else { usize::MAX }).collect()
    }
}

#[tokio::test]
async fn a_batch_is_what_is_ready_and_each_message_has_its_own_outcome() {
    let bus = bus();
    publish(&bus, ["a", "bad", "retry", "b"].map(message)).await;
    let handler = Batches::default();
    let options = options(spec()).with_retry(RetryPolicy::immediate());
    let worker = Running::start(Worker::new(bus.clone()).handle_batches(options, handler.clone()));
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!(handler.log(), [vec!["a/1", "bad/1", "retry/1", "b/1"], vec!["retry/2"]]);
    assert_eq!((total.processed, total.retried, total.dead_letters()), (3, 1, 1));
}

#[tokio::test]
async fn a_batch_holds_one_message_of_a_key_and_keys_stay_in_order() {
    let bus = bus();
    publish(&bus, (0..30).map(|n| message(&n.to_string()).with_key(format!("k{}", n % 3)))).await;
    let handler = Batches::default();
    let options = options(keyed().with_on_failure(OnFailure::Block)).with_concurrency(1);
    let worker = Running::start(Worker::new(bus.clone()).handle_batches(options, handler.clone()));
    drained(&bus).await;
    assert_eq!(worker.stop().await.total().processed, 30);
    for batch in handler.log() {
        let mut keys: Vec<u32> =
            batch.iter().map(|entry| entry[..entry.len() - 2].parse::<u32>().unwrap() % 3).collect();
        let count = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), count, "{batch:?}");
    }
    let order: Vec<u32> =
        handler.log().concat().iter().map(|entry| entry[..entry.len() - 2].parse().unwrap()).collect();
    for key in 0..3 {
        let of: Vec<u32> = order.iter().copied().filter(|number| number % 3 == key).collect();
        assert!(of.is_sorted(), "{of:?}");
    }
}

#[tokio::test]
async fn a_panic_or_a_missing_answer_fails_those_it_concerns_and_they_are_retried() {
    let bus = bus();
    publish(&bus, ["x", "panic"].map(message)).await;
    let options = options(spec()).with_retry(RetryPolicy::immediate());
    let handler = Batches::default();
    let worker = Running::start(Worker::new(bus.clone()).handle_batches(options.clone(), handler));
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.panics, total.retried), (2, 2, 2));

    let bus = support::bus();
    publish(&bus, ["x", "y", "z"].map(message)).await;
    let handler = Batches { short: true, ..Batches::default() };
    let worker = Running::start(Worker::new(bus.clone()).handle_batches(options, handler));
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.retried), (3, 2));
}

#[tokio::test]
async fn a_batch_at_its_time_limit_has_failed_and_one_at_the_end_of_the_grace_has_not() {
    let (bus, clock) = turned();
    publish(&bus, ["x", "y"].map(message)).await;
    let handler = Batches { gate: Some(Arc::new(Semaphore::new(0))), ..Batches::default() };
    let options = options(spec()).with_retry(RetryPolicy::immediate()).with_timeout(Duration::from_secs(5));
    let worker = Worker::new(bus).with_clock(clock.clone()).handle_batches(options, handler.clone());
    let worker = Running::start(worker);
    until("it runs", || handler.log().len() == 1).await;
    clock.advance(Duration::from_secs(5));
    until("it runs again", || handler.log().concat().len() == 4).await;
    worker.shutdown.cut_short();
    let total = worker.end().await.total();
    assert_eq!((total.timeouts, total.retried, total.cancelled, total.released), (2, 2, 2, 2));
}

struct Skin;

#[async_trait]
impl Middleware for Skin {
    async fn handle(&self, ctx: &Context, next: Next<'_>) -> Outcome {
        next.run(ctx).await
    }
}

#[tokio::test]
async fn middleware_around_a_batch_handler_is_refused_rather_than_ignored() {
    let options = options(spec()).with_middleware(Skin);
    let worker = Worker::new(bus()).handle_batches(options, Batches::default());
    let error = worker.run_until(std::future::ready(())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
}
