//! Failures that cannot be settled: they are tried again, and the handler does not run meanwhile.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{
    Bus, Clock, DeadLetter, DeadLetterFilter, Error, ErrorKind, ManualClock, Reason, Settlement, Support,
};
use anybroker_worker::{HandlerError, HandlerOptions, RetryPolicy, Worker};
use support::faulty::Faults;
use support::{Recorder, Running, drained, keyed, message, options, publish, spec, turned, until};

const LEASE: Duration = Duration::from_secs(30);
/// How long a test looks for a try that must not be made.
const MOMENT: Duration = Duration::from_millis(20);

/// Dead letters and nacks that fail while it says so, and how often they were tried.
#[derive(Clone, Default)]
struct Failing {
    on: Arc<AtomicBool>,
    tries: Arc<AtomicUsize>,
}

impl Failing {
    fn with(faults: &Faults, kind: ErrorKind) -> Self {
        let failing = Self::default();
        failing.on.store(true, Ordering::SeqCst);
        let Self { on, tries } = failing.clone();
        faults.fail_settles(move |_, settlement| {
            if !matches!(settlement, Settlement::Nack(_) | Settlement::DeadLetter(_)) {
                return None;
            }
            tries.fetch_add(1, Ordering::SeqCst);
            on.load(Ordering::SeqCst).then(|| Error::new(kind, "settle", "told to"))
        });
        failing
    }

    async fn tried(&self, tries: usize) {
        until(&format!("{tries} tries"), || self.tries.load(Ordering::SeqCst) == tries).await;
    }

    /// The next try comes when that pause is over, and not before.
    async fn tried_after(&self, pause: Duration, clock: &ManualClock) {
        let before = self.tries.load(Ordering::SeqCst);
        clock.advance(pause - Duration::from_millis(1));
        tokio::time::sleep(MOMENT).await;
        assert_eq!(self.tries.load(Ordering::SeqCst), before, "before {pause:?} were over");
        clock.advance(Duration::from_millis(1));
        self.tried(before + 1).await;
    }

    fn end(&self) {
        self.on.store(false, Ordering::SeqCst);
    }
}

fn at_once() -> HandlerOptions {
    options(spec().with_lease(LEASE)).with_retry(RetryPolicy::immediate())
}

fn rejecting() -> Recorder {
    Recorder::new(|_| Err(HandlerError::new("VALIDATION_ERROR", "no good")))
}

async fn letters(bus: &Bus) -> Vec<DeadLetter> {
    bus.dead_letters("orders", "payments").unwrap().peek(&DeadLetterFilter::all(), 10).await.unwrap()
}

#[tokio::test]
async fn a_letter_that_cannot_be_stored_is_tried_with_pauses_that_grow_and_the_handler_runs_once() {
    for kind in [ErrorKind::NotFound, ErrorKind::TooLarge, ErrorKind::PermissionDenied, ErrorKind::Unexpected] {
        let (inner, clock) = turned();
        let faults = Faults::default();
        let failing = Failing::with(&faults, kind);
        publish(&inner, [message("x")]).await;
        let handler = rejecting();
        let worker = Worker::new(faults.around(&inner)).with_clock(clock.clone()).handle(at_once(), handler.clone());
        let worker = Running::start(worker);
        failing.tried(1).await;
        for pause in [200, 400, 800] {
            failing.tried_after(Duration::from_millis(pause), &clock).await;
        }
        failing.end();
        failing.tried_after(Duration::from_millis(1_600), &clock).await;
        drained(&inner).await;
        let total = worker.stop().await.total();
        assert_eq!((total.dead_letters(), total.stale, total.unsettled), (1, 0, 0), "{kind}");
        assert_eq!(handler.trail(), ["x/1"], "{kind}");
        let letters = letters(&inner).await;
        assert_eq!((letters.len(), &letters[0].reason), (1, &Reason::Rejected));
        assert_eq!(letters[0].error_type.as_deref(), Some("VALIDATION_ERROR"));
    }
}

#[tokio::test]
async fn neither_a_nack_nor_the_last_letter_that_fails_makes_the_handler_run_more_often_than_it_may() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let failing = Failing::with(&faults, ErrorKind::PermissionDenied);
    publish(&inner, [message("x").with_key("a"), message("y").with_key("b")]).await;
    let handler = Recorder::new(|seen| match &*seen.text {
        "x" => Err(HandlerError::new("TIMEOUT", "always")),
        _ => Ok(()),
    });
    let spec = keyed().with_lease(LEASE).with_max_attempts(2).with_on_failure(anybroker_core::OnFailure::Block);
    let options = options(spec).with_retry(RetryPolicy::immediate());
    let worker = Worker::new(faults.around(&inner)).with_clock(clock.clone()).handle(options, handler.clone());
    let worker = Running::start(worker);
    failing.tried(1).await;
    failing.tried_after(Duration::from_millis(200), &clock).await;
    until("the other key", || handler.count() == 2).await;
    failing.end();
    clock.advance(Duration::from_millis(400));
    // The nack at last, and the letter of the second attempt.
    failing.tried(4).await;
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert_eq!((total.retried, total.dead_letters(), total.stale, total.unsettled), (1, 1, 0, 0));
    let mut trail = handler.trail();
    trail.sort();
    assert_eq!(trail, ["x/1", "x/2", "y/1"]);
    let letters = letters(&inner).await;
    assert_eq!((letters.len(), &letters[0].reason), (1, &Reason::AttemptsExhausted));
    assert_eq!(letters[0].error_type.as_deref(), Some("TIMEOUT"));
}

#[tokio::test]
async fn a_letter_is_tried_beyond_its_lease_which_is_extended_meanwhile() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let failing = Failing::with(&faults, ErrorKind::NotFound);
    publish(&inner, [message("x")]).await;
    let handler = rejecting();
    let worker = Worker::new(faults.around(&inner)).with_clock(clock.clone()).handle(at_once(), handler.clone());
    let half_is_left = || faults.extended_at(&clock).is_some_and(|at| at.after(LEASE / 2) >= Clock::now(&clock));
    assert!(!half_is_left());
    let worker = Running::start(worker);
    failing.tried(1).await;
    until("it is extended when it could not be buried", half_is_left).await;
    let tries = || failing.tries.load(Ordering::SeqCst);
    // Three leases.
    for _ in 0..12 {
        clock.advance(LEASE / 4);
        until("it is extended", half_is_left).await;
    }
    assert!((2..=13).contains(&tries()), "{} tries", tries());
    assert_eq!(handler.count(), 1);
    failing.end();
    let before = tries();
    while tries() == before {
        clock.advance(LEASE / 4);
        until("it is extended or stored", || tries() > before || half_is_left()).await;
    }
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert_eq!((total.dead_letters(), total.stale, total.unsettled), (1, 0, 0));
    assert_eq!(handler.count(), 1);
}

#[tokio::test]
async fn a_letter_whose_lease_ends_because_it_cannot_be_extended_is_given_up() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let failing = Failing::with(&faults, ErrorKind::NotFound);
    let mut record = inner.capabilities().clone();
    record.lease_extension = Support::refused("a broker that can");
    publish(&inner, [message("x")]).await;
    let handler = rejecting();
    let bus = faults.with_record(&inner, record);
    let worker = Running::start(Worker::new(bus).with_clock(clock.clone()).handle(at_once(), handler.clone()));
    failing.tried(1).await;
    failing.end();
    clock.advance(LEASE);
    until("it has come again", || handler.count() == 2).await;
    drained(&inner).await;
    let total = worker.stop().await.total();
    assert_eq!((total.dead_letters(), total.stale, total.unsettled), (1, 1, 0));
    assert_eq!(failing.tries.load(Ordering::SeqCst), 2, "nothing is tried after the lease");
}

#[tokio::test]
async fn a_drain_tries_letters_within_its_grace() {
    for stored in [true, false] {
        let (inner, clock) = turned();
        let faults = Faults::default();
        let failing = Failing::with(&faults, ErrorKind::NotFound);
        publish(&inner, [message("x")]).await;
        let handler = rejecting();
        let worker = Worker::new(faults.around(&inner)).with_clock(clock.clone()).with_grace(Duration::from_secs(10));
        let worker = Running::start(worker.handle(at_once(), handler.clone()));
        failing.tried(1).await;
        worker.shutdown.drain();
        // At once, whatever its pause was.
        failing.tried(2).await;
        tokio::time::sleep(MOMENT).await;
        assert!(!worker.is_over(), "the letter is not stored");
        if stored {
            failing.end();
            failing.tried_after(Duration::from_millis(400), &clock).await;
        } else {
            clock.advance(Duration::from_secs(10));
        }
        let report = worker.end().await;
        let total = report.total();
        assert_eq!((total.dead_letters(), total.unsettled, total.stale), (u64::from(stored), u64::from(!stored), 0));
        assert_eq!(report.to_string().contains("1 unsettled"), !stored, "{report}");
        assert_eq!((handler.count(), letters(&inner).await.len()), (1, usize::from(stored)));
    }
}
