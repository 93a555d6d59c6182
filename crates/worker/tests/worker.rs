//! Middleware, the breaker, several subscriptions, receive errors, what handlers publish, the dead-letter alert.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::lineage::{TRACEPARENT, TraceContext};
use anybroker_core::{Browse, Error, ErrorKind, Message, SubscribeSpec, Support};
use anybroker_worker::{
    CircuitBreaker, Context, ErrorClass, HandlerError, HandlerOptions, Middleware, Next, Outcome, RetryPolicy, Worker,
    async_trait, handler, handler_with,
};
use parking_lot::Mutex;
use support::faulty::Faults;
use support::{Gated, QUIET, Recorder, Running, bus, drained, message, options, publish, spec, turned, until};

struct Skin(&'static str, Arc<Mutex<Vec<String>>>);

#[async_trait]
impl Middleware for Skin {
    async fn handle(&self, ctx: &Context, next: Next<'_>) -> Outcome {
        self.1.lock().push(format!("> {}", self.0));
        let outcome = next.run(ctx).await;
        self.1.lock().push(format!("< {} {}", self.0, outcome.is_ok()));
        outcome
    }
}

#[tokio::test]
async fn middleware_wraps_the_handler_from_the_workers_first_to_the_subscriptions_last() {
    let bus = bus();
    publish(&bus, [message("x")]).await;
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let skin = |name| Skin(name, Arc::clone(&log));
    async fn inner(log: &Arc<Mutex<Vec<String>>>, _: &Context) -> Outcome {
        log.lock().push("handler".into());
        Ok(())
    }
    let worker = Worker::new(bus.clone())
        .with_middleware(skin("a"))
        .with_middleware(skin("b"))
        .handle(options(spec()).with_middleware(skin("c")), handler_with(Arc::clone(&log), inner));
    let worker = Running::start(worker);
    drained(&bus).await;
    worker.stop().await;
    assert_eq!(*log.lock(), ["> a", "> b", "> c", "handler", "< c true", "< b true", "< a true"]);
}

struct Refuses;

#[async_trait]
impl Middleware for Refuses {
    async fn handle(&self, ctx: &Context, next: Next<'_>) -> Outcome {
        match ctx.message().headers().get_str("tenant") {
            Some("acme") => next.run(ctx).await,
            Some("panic") => panic!("in the middleware"),
            _ => Err(HandlerError::dead_letter("wrong_tenant", "")),
        }
    }
}

#[tokio::test]
async fn middleware_may_answer_by_itself_and_its_panics_are_caught_as_well() {
    let bus = bus();
    let of = |tenant| message(tenant).with_header("tenant", tenant);
    publish(&bus, [of("acme"), of("other"), of("panic")]).await;
    let handler = Recorder::ok();
    let options = options(spec().with_max_attempts(1)).with_middleware(Refuses);
    let worker = Running::start(Worker::new(bus.clone()).handle(options, handler.clone()));
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!(handler.trail(), ["acme/1"]);
    assert_eq!((total.processed, total.panics, total.dead_letters()), (1, 1, 2));
}

#[tokio::test]
async fn an_open_breaker_pauses_consumption_and_burns_no_attempt() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    let up = Arc::new(AtomicUsize::new(0));
    let handler = {
        let up = Arc::clone(&up);
        Recorder::new(move |_| match up.load(Ordering::SeqCst) {
            0 => Err(HandlerError::new(ErrorClass::SERVICE_UNAVAILABLE, "down")),
            _ => Ok(()),
        })
    };
    publish(&inner, (0..50).map(|n| message(&n.to_string()))).await;
    let options = options(spec())
        .with_concurrency(1)
        .with_retry(RetryPolicy::fixed(Duration::from_secs(1)))
        .with_breaker(CircuitBreaker::default());
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(options, handler.clone()));
    until("it pauses", || faults.pauses() == [true]).await;
    assert_eq!(handler.count(), 10, "ten failures in a row");
    let released = || faults.batches().iter().flatten().filter(|entry| entry.starts_with("release")).count();
    until("what waited for a handler goes to others", || released() == 40).await;
    // Half-open after a minute: one attempt, which fails.
    for round in 1..=3 {
        clock.advance(Duration::from_millis(59_999));
        tokio::time::sleep(QUIET).await;
        assert_eq!(handler.count(), 9 + round, "nothing runs while it is open");
        clock.advance(Duration::from_millis(1));
        until("the probe", || handler.count() == 10 + round).await;
        until("it pauses again", || faults.pauses().len() == 1 + 2 * round).await;
    }
    up.store(1, Ordering::SeqCst);
    clock.advance(Duration::from_secs(60));
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert_eq!(total.breaker_opened, 4);
    assert_eq!((total.processed, total.dead_letters()), (50, 0), "nothing was buried by the outage");
    assert_eq!(total.retried, 13);
}

#[tokio::test]
async fn bad_messages_do_not_open_the_breaker() {
    let bus = bus();
    publish(&bus, (0..40).map(|n| message(&n.to_string()))).await;
    let handler = Recorder::new(|_| Err(HandlerError::new(ErrorClass::VALIDATION_ERROR, "bad")));
    let options = options(spec()).with_breaker(CircuitBreaker::default());
    let worker = Running::start(Worker::new(bus.clone()).handle(options, handler.clone()));
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!((total.breaker_opened, total.dead_letters()), (0, 40));
}

#[tokio::test]
async fn several_subscriptions_run_in_one_worker_each_with_its_own_concurrency() {
    let bus = bus();
    publish(&bus, (0..6).map(|n| message(&n.to_string()))).await;
    let (one, many) = (Gated::new(), Gated::new());
    let worker = Worker::new(bus)
        .handle(options(SubscribeSpec::new("orders", "one")).with_concurrency(1), one.clone())
        .handle(options(SubscribeSpec::new("orders", "many")).with_concurrency(6), many.clone());
    let worker = Running::start(worker);
    until("both fill up", || one.begun().len() == 1 && many.begun().len() == 6).await;
    one.open(6);
    many.open(6);
    until("all end", || one.ended().len() == 6 && many.ended().len() == 6).await;
    let report = worker.stop().await;
    assert_eq!(report.subscriptions.len(), 2);
    assert!(report.subscriptions.iter().all(|one| one.counts.processed == 6 && one.error.is_none()));
    assert_eq!(report.subscriptions[0].group, "one");
}

#[tokio::test]
async fn a_subscription_whose_destination_is_deleted_ends_with_a_typed_error_and_the_others_go_on() {
    let bus = bus();
    let (gone, stays) = (Recorder::ok(), Recorder::ok());
    publish(&bus, [message("x"), Message::new("bills", "y")]).await;
    let worker = Worker::new(bus.clone())
        .handle(spec(), gone.clone())
        .handle(SubscribeSpec::new("bills", "payments"), stays.clone());
    let worker = Running::start(worker);
    until("both work", || gone.count() == 1 && stays.count() == 1).await;
    bus.delete("orders", None).await.unwrap();
    publish(&bus, [Message::new("bills", "z")]).await;
    until("the other one works", || stays.count() == 2).await;
    let report = worker.stop().await;
    assert_eq!(report.subscriptions[0].error.as_ref().unwrap().kind(), ErrorKind::NotFound);
    assert!(report.subscriptions[1].error.is_none());
    assert_eq!(report.error().unwrap().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_worker_whose_subscriptions_have_all_ended_ends() {
    let faults = Faults::default();
    let bus = faults.around(&bus());
    let worker = Running::start(Worker::new(bus).handle(spec(), Recorder::ok()));
    faults.fail_receive(Error::new(ErrorKind::PermissionDenied, "receive", "revoked"));
    let report = worker.end().await;
    assert_eq!(report.error().unwrap().kind(), ErrorKind::PermissionDenied);
}

#[tokio::test]
async fn receive_errors_that_may_pass_are_retried_with_back_off() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let bus = faults.around(&inner);
    for kind in [ErrorKind::Unavailable, ErrorKind::Timeout, ErrorKind::RateLimited, ErrorKind::Unexpected] {
        faults.fail_receive(Error::new(kind, "receive", "for the moment"));
    }
    publish(&inner, [message("x")]).await;
    let handler = Recorder::ok();
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(spec(), handler.clone()));
    // 100, 200, 400 and 800 ms.
    clock.advance(Duration::from_millis(50));
    for _ in 0..14 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        clock.advance(Duration::from_millis(100));
        assert_eq!(handler.count(), 0, "not before its time");
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        clock.advance(Duration::from_millis(100));
    }
    until("it is handled", || handler.count() == 1).await;
    let report = worker.stop().await;
    assert!(report.error().is_none());
}

#[tokio::test]
async fn what_a_handler_publishes_carries_on_correlation_causation_and_trace() {
    async fn relay(ctx: &Context) -> Outcome {
        ctx.send(Message::new("bills", "caused")).await?;
        Ok(())
    }
    let bus = bus();
    let mut bills = bus.subscribe(SubscribeSpec::new("bills", "test")).await.unwrap();
    let root = TraceContext::new_root();
    let cause = message("x").with_header("correlation-id", "process-7").with_header(TRACEPARENT, root.to_string());
    publish(&bus, [cause.clone()]).await;
    let worker = Running::start(Worker::new(bus.clone()).handle(spec(), handler(relay)));
    let caused = bills.receive(1, support::DEADLINE).await.unwrap().remove(0);
    worker.stop().await;
    let caused = caused.message();
    assert_eq!(caused.correlation_id(), "process-7".into());
    assert_eq!(caused.causation_id().as_ref(), Some(cause.id()));
    assert_eq!(TraceContext::of(caused).unwrap().trace_id, root.trace_id);
}

#[tokio::test]
async fn a_worker_that_cannot_keep_its_promises_does_not_start() {
    let inner = bus();
    let run = |bus: &anybroker_core::Bus, options: HandlerOptions| {
        Worker::new(bus.clone()).handle(options, Recorder::ok()).run_until(std::future::ready(()))
    };
    let kind = |outcome: anybroker_core::Result<_>| -> ErrorKind {
        let _: &anybroker_core::Result<anybroker_worker::Report> = &outcome;
        outcome.unwrap_err().kind()
    };
    let none = Worker::new(inner.clone()).run_until(std::future::ready(())).await;
    assert_eq!(kind(none), ErrorKind::ConfigInvalid);
    let wrong = options(spec()).with_concurrency(0).with_batch(0);
    let error = run(&inner, wrong).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert_eq!(error.context().count(), 2, "every bad field at once");
    assert_eq!(kind(run(&inner, options(spec().with_max_in_flight(0))).await), ErrorKind::ConfigInvalid);

    let mut record = inner.capabilities().clone();
    record.nack_delay = Support::refused("another broker");
    let bus = Faults::default().with_record(&inner, record);
    assert_eq!(kind(run(&bus, options(spec())).await), ErrorKind::Unsupported);
    assert!(run(&bus, options(spec()).with_retry(RetryPolicy::immediate())).await.is_ok());
    let mut record = inner.capabilities().clone();
    record.dead_letter = Support::refused("another broker");
    let bus = Faults::default().with_record(&inner, record);
    assert_eq!(kind(run(&bus, options(spec())).await), ErrorKind::Unsupported);
}

#[tokio::test]
async fn where_nothing_can_be_released_a_drain_gives_back_by_dropping() {
    let inner = bus();
    let mut record = inner.capabilities().clone();
    record.release = Support::refused("another broker");
    let faults = Faults::default();
    let bus = faults.with_record(&inner, record);
    publish(&inner, (0..4).map(|n| message(&n.to_string()))).await;
    let handler = Gated::new();
    let worker = Running::start(Worker::new(bus).handle(options(spec()).with_concurrency(1), handler.clone()));
    until("one runs", || handler.begun().len() == 1).await;
    worker.shutdown.drain();
    handler.open(1);
    let total = worker.end().await.total();
    assert_eq!((total.processed, total.released), (1, 3));
    assert!(!faults.batches().iter().flatten().any(|entry| entry.starts_with("release")));
    // Closing the subscription gave them back.
    let rest = Recorder::ok();
    let worker = Running::start(Worker::new(inner.clone()).handle(spec(), rest.clone()));
    drained(&inner).await;
    worker.stop().await;
    assert_eq!(rest.trail(), ["1/1", "2/1", "3/1"]);
}

#[tokio::test]
async fn where_reading_dead_letters_takes_them_away_the_alert_counts_what_the_worker_wrote() {
    let inner = bus();
    let mut record = inner.capabilities().clone();
    record.dead_letter_browse = Browse::Leasing;
    let bus = Faults::default().with_record(&inner, record);
    let alerts: Arc<Mutex<Vec<(String, usize)>>> = Arc::default();
    let hook = {
        let alerts = Arc::clone(&alerts);
        move |alert: &anybroker_worker::DeadLetterAlert| {
            alerts.lock().push((alert.scope.source.to_string(), alert.letters));
        }
    };
    publish(&bus, (0..3).map(|n| Message::new("bills", n.to_string()))).await;
    publish(&bus, [message("x")]).await;
    let handler = Recorder::new(|_| Err(HandlerError::new(ErrorClass::VALIDATION_ERROR, "bad")));
    // Two destinations of one subscription: each has its own queue.
    let options = options(spec().and_destination("bills")).with_dead_letter_threshold(3);
    let worker = Running::start(Worker::new(bus).on_dead_letter_alert(hook).handle(options, handler));
    until("the alert", || !alerts.lock().is_empty()).await;
    worker.stop().await;
    assert_eq!(*alerts.lock(), [("bills".to_owned(), 3)]);
}

#[tokio::test]
async fn the_dead_letter_alert_is_raised_once_at_the_threshold_and_again_after_it_was_below() {
    let bus = bus();
    let alerts: Arc<Mutex<Vec<usize>>> = Arc::default();
    let handler = Recorder::new(|_| Err(HandlerError::new(ErrorClass::VALIDATION_ERROR, "bad")));
    let hook = {
        let alerts = Arc::clone(&alerts);
        move |alert: &anybroker_worker::DeadLetterAlert| {
            assert_eq!((alert.scope.source.as_str(), alert.scope.group.as_str()), ("orders", "payments"));
            alerts.lock().push(alert.letters);
        }
    };
    let worker = Worker::new(bus.clone())
        .on_dead_letter_alert(hook)
        .handle(options(spec()).with_dead_letter_threshold(5), handler.clone());
    let worker = Running::start(worker);
    publish(&bus, (0..4).map(|n| message(&n.to_string()))).await;
    drained(&bus).await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert!(alerts.lock().is_empty(), "four are not five");
    publish(&bus, [message("4"), message("5")]).await;
    until("the alert", || alerts.lock().len() == 1).await;
    publish(&bus, [message("6")]).await;
    drained(&bus).await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let letters = bus.dead_letters("orders", "payments").unwrap();
    letters.purge(&Default::default()).await.unwrap();
    publish(&bus, [message("7")]).await;
    drained(&bus).await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert_eq!(alerts.lock().len(), 1, "once");
    publish(&bus, (0..5).map(|n| message(&n.to_string()))).await;
    until("the second alert", || alerts.lock().len() == 2).await;
    worker.stop().await;
}
