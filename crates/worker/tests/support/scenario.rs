//! What both telemetry tests run: three messages that work out, one after a retry, and one that does not.

use std::time::Duration;

use anybroker_core::{Message, SubscribeSpec};
use anybroker_worker::{Context, HandlerError, Outcome, RetryPolicy, Worker, handler};

use super::{Running, bus, drained, message, options, publish, spec};

/// Fails `retry` once, buries `bury`, and publishes one message for each of the others.
async fn work(ctx: &Context) -> Outcome {
    match (&*super::text(ctx.message()), ctx.attempt()) {
        ("retry", 1) => Err(HandlerError::new("TIMEOUT", "slow")),
        ("bury", _) => Err(HandlerError::new("VALIDATION_ERROR", "bad")),
        _ => {
            ctx.send(Message::new("bills", "x")).await?;
            Ok(())
        }
    }
}

async fn scenario() {
    let bus = bus();
    bus.subscribe(SubscribeSpec::new("bills", "test")).await.unwrap();
    publish(&bus, ["a", "b", "retry", "bury"].map(message)).await;
    let options = options(spec()).with_retry(RetryPolicy::immediate()).with_lag_interval(Duration::from_millis(1));
    let worker = Running::start(Worker::new(bus.clone()).handle(options, handler(work)));
    drained(&bus).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    worker.stop().await;
}

/// On one thread: the one on which recorder and subscriber are set.
pub fn run() {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(scenario());
}
