//! What becomes of a message, by what its handler does.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::time::Duration;

use anybroker_core::{Bus, DeadLetter, DeadLetterFilter, Reason};
use anybroker_worker::{
    BoxFuture, Context, ErrorClass, ErrorClasses, Handler, HandlerError, HandlerOptions, Outcome, RetryPolicy, Worker,
    boxed,
};
use support::{QUIET, Recorder, Running, bus, drained, message, options, publish, spec, turned, until};

async fn letters(bus: &Bus) -> Vec<DeadLetter> {
    bus.dead_letters("orders", "payments").unwrap().peek(&DeadLetterFilter::all(), 1_000).await.unwrap()
}

fn at_once() -> HandlerOptions {
    options(spec()).with_retry(RetryPolicy::immediate())
}

#[tokio::test]
async fn what_the_handler_answers_ok_to_is_acked_and_never_seen_again() {
    let bus = bus();
    publish(&bus, (0..250).map(|n| message(&n.to_string()))).await;
    let handler = Recorder::ok();
    let worker = Running::start(Worker::new(bus.clone()).handle(spec(), handler.clone()));
    until("all are handled", || handler.count() == 250).await;
    let report = worker.stop().await;
    assert_eq!(report.total().processed, 250);
    assert_eq!(handler.count(), 250);
    assert_eq!(bus.lag("orders", "payments").await.unwrap().total(), Some(0));
}

#[tokio::test]
async fn a_message_that_keeps_failing_is_seen_five_times_and_then_is_one_dead_letter() {
    let bus = bus();
    publish(&bus, [message("bad"), message("good")]).await;
    let handler = Recorder::new(|seen| match &*seen.text {
        "bad" => Err(HandlerError::new(ErrorClass::SERVICE_UNAVAILABLE, "the gateway is down")),
        _ => Ok(()),
    });
    let worker = Running::start(Worker::new(bus.clone()).handle(at_once(), handler.clone()));
    until("five attempts and the good one", || handler.count() == 6).await;
    tokio::time::sleep(QUIET).await;
    publish(&bus, [message("canary")]).await;
    until("the canary", || handler.count() == 7).await;
    let report = worker.stop().await;
    let attempts: Vec<u32> = handler.seen().iter().filter(|seen| seen.text == "bad").map(|seen| seen.attempt).collect();
    assert_eq!(attempts, [1, 2, 3, 4, 5]);
    let letters = letters(&bus).await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].reason, Reason::AttemptsExhausted);
    assert_eq!(letters[0].error_type.as_deref(), Some("SERVICE_UNAVAILABLE"));
    assert_eq!(letters[0].detail.as_deref(), Some("the gateway is down"));
    assert_eq!(letters[0].attempts, 5);
    let total = report.total();
    assert_eq!((total.processed, total.retried, total.dead_letters()), (2, 4, 1));
    assert_eq!(total.dead_letters_of(&ErrorClass::SERVICE_UNAVAILABLE), 1);
}

#[tokio::test]
async fn a_class_that_is_not_retried_is_a_dead_letter_at_once_with_class_and_detail() {
    let bus = bus();
    publish(&bus, ["VALIDATION_ERROR", "DUPLICATE_MESSAGE", "SCHEMA_MISMATCH", "CARD_DECLINED"].map(message)).await;
    let handler = Recorder::new(|seen| Err(HandlerError::new(seen.text.clone(), "no good")));
    let classes = ErrorClasses::default().not_retryable("CARD_DECLINED");
    let worker = Running::start(Worker::new(bus.clone()).handle(at_once().with_classes(classes), handler.clone()));
    until("all are handled", || handler.count() == 4).await;
    let report = worker.stop().await;
    assert_eq!(handler.count(), 4, "one attempt each");
    assert_eq!(report.total().dead_letters(), 4);
    for letter in letters(&bus).await {
        assert_eq!(letter.reason, Reason::Rejected);
        assert_eq!(letter.error_type.as_deref(), Some(&*support::text(&letter.message)));
        assert_eq!(letter.detail.as_deref(), Some("no good"));
        assert_eq!(letter.attempts, 1);
    }
}

#[tokio::test]
async fn an_explicit_dead_letter_keeps_its_own_reason_and_is_not_retried() {
    let bus = bus();
    publish(&bus, [message("x")]).await;
    let handler = Recorder::new(|_| Err(HandlerError::dead_letter("fraud", "see case 17").with_class("FRAUD")));
    let worker = Running::start(Worker::new(bus.clone()).handle(at_once(), handler.clone()));
    until("it is handled", || handler.count() == 1).await;
    let report = worker.stop().await;
    let letters = letters(&bus).await;
    assert_eq!(letters[0].reason, Reason::Other("fraud".into()));
    assert_eq!(letters[0].error_type.as_deref(), Some("FRAUD"));
    assert_eq!(letters[0].detail.as_deref(), Some("see case 17"));
    assert_eq!(report.total().dead_letters_of(&"FRAUD".into()), 1);
}

#[tokio::test]
async fn an_error_that_nobody_classified_is_retried() {
    let bus = bus();
    publish(&bus, [message("not a number")]).await;
    let handler = Recorder::new(|seen| {
        if seen.attempt < 3 {
            seen.text.parse::<u64>()?;
        }
        Ok(())
    });
    let worker = Running::start(Worker::new(bus).handle(at_once(), handler.clone()));
    until("the third attempt", || handler.count() == 3).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.retried), (1, 2));
}

#[tokio::test]
async fn a_panic_is_a_failed_attempt_and_the_worker_lives_on() {
    struct Panics;
    // By hand: it panics before it has a future, in its first poll, and after it has waited.
    impl Handler for Panics {
        fn handle<'l0, 'l1, 'a>(&'l0 self, ctx: &'l1 Context) -> BoxFuture<'a, Outcome>
        where
            'l0: 'a,
            'l1: 'a,
            Self: 'a,
        {
            assert!(ctx.attempt() != 1, "before the future");
            Box::pin(async move {
                assert!(ctx.attempt() != 2, "in the first poll");
                tokio::task::yield_now().await;
                assert!(ctx.attempt() != 3, "after waiting");
                Ok(())
            })
        }
    }
    let bus = bus();
    publish(&bus, (0..20).map(|n| message(&n.to_string()))).await;
    let worker = Running::start(Worker::new(bus.clone()).handle(at_once(), Panics));
    drained(&bus).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.panics, total.retried, total.dead_letters()), (20, 60, 60, 0));
}

#[tokio::test]
async fn a_message_that_always_panics_becomes_a_dead_letter_of_class_panic() {
    let bus = bus();
    publish(&bus, [message("x")]).await;
    let worker = Worker::new(bus.clone()).handle(at_once(), boxed(|_| Box::pin(async { panic!("out of {}", "luck") })));
    let worker = Running::start(worker);
    drained(&bus).await;
    assert_eq!(worker.stop().await.total().panics, 5);
    let letter = &letters(&bus).await[0];
    assert_eq!(letter.error_type.as_deref(), Some("PANIC"));
    assert_eq!(letter.detail.as_deref(), Some("out of luck"));
}

#[tokio::test]
async fn a_retry_comes_after_its_delay_and_takes_no_place_among_the_handlers_meanwhile() {
    let (bus, clock) = turned();
    let handler = Recorder::new(|seen| match &*seen.text {
        "bad" => Err(HandlerError::new(ErrorClass::TIMEOUT, "slow")),
        _ => Ok(()),
    });
    // One handler at a time, and the default policy.
    let options = options(spec()).with_concurrency(1);
    publish(&bus, [message("bad"), message("a")]).await;
    let worker = Worker::new(bus.clone()).with_clock(clock.clone()).handle(options, handler.clone());
    let worker = Running::start(worker);
    until("the first attempt, and the next message behind it", || handler.count() == 2).await;
    for (attempt, base) in [(2, 1_000), (3, 2_000), (4, 4_000), (5, 8_000)] {
        // Jitter is a fifth: never before 80 % of the delay, always by 120 %.
        clock.advance(Duration::from_millis(base * 8 / 10 - 1));
        tokio::time::sleep(QUIET).await;
        let before = handler.count();
        publish(&bus, [message("canary")]).await;
        until("the canary", || handler.count() == before + 1).await;
        assert!(handler.seen().iter().all(|seen| seen.attempt < attempt), "attempt {attempt} came early");
        clock.advance(Duration::from_millis(base * 4 / 10 + 1));
        until("the next attempt", || handler.seen().iter().any(|seen| seen.attempt == attempt)).await;
    }
    let report = worker.stop().await;
    assert_eq!(report.total().dead_letters_of(&ErrorClass::TIMEOUT), 1);
}

#[tokio::test]
async fn the_delay_that_a_handler_asks_for_is_kept() {
    let (bus, clock) = turned();
    publish(&bus, [message("x")]).await;
    let handler = Recorder::new(|seen| match seen.attempt {
        1 => Err(HandlerError::new(ErrorClass::RATE_LIMITED, "429").with_retry_after(Duration::from_secs(300))),
        _ => Ok(()),
    });
    let worker = Worker::new(bus.clone()).with_clock(clock.clone()).handle(spec(), handler.clone());
    let worker = Running::start(worker);
    until("the first attempt", || handler.count() == 1).await;
    clock.advance(Duration::from_millis(299_999));
    tokio::time::sleep(QUIET).await;
    assert_eq!(handler.count(), 1);
    clock.advance(Duration::from_millis(1));
    until("the second attempt", || handler.count() == 2).await;
    assert_eq!(worker.stop().await.total().processed, 1);
}

#[tokio::test]
async fn without_a_limit_a_message_is_retried_for_as_long_as_it_fails() {
    let bus = bus();
    publish(&bus, [message("x")]).await;
    let handler = Recorder::new(|seen| match seen.attempt {
        30 => Ok(()),
        _ => Err(HandlerError::new(ErrorClass::TIMEOUT, "again")),
    });
    let options = options(spec().with_max_attempts(None)).with_retry(RetryPolicy::immediate());
    let worker = Running::start(Worker::new(bus).handle(options, handler.clone()));
    until("thirty attempts", || handler.count() == 30).await;
    let total = worker.stop().await.total();
    assert_eq!((total.processed, total.retried), (1, 29));
}
