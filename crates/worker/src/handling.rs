//! One run of a handler, to its end: panics, time limit, lease, cancellation.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Poll;

use anybroker_core::{Clock, Delivery, ErrorKind, Timestamp};
use tokio::sync::watch;

use crate::Context;
use crate::drain::Stage;
use crate::handler::BoxFuture;
use crate::rules::Ended;
use crate::slot::Shared;

/// Calls a handler and polls it once. What it needs beyond that is in [`Handling::wait`].
pub(crate) struct Handling<'a, T> {
    future: Option<BoxFuture<'a, T>>,
}

impl<'a, T> Handling<'a, T> {
    /// Calls the handler, polls it once, and tells how it ended, unless it waits for something.
    pub(crate) async fn begin(call: impl FnOnce() -> BoxFuture<'a, T>) -> (Self, Option<Ended<T>>) {
        match catch_unwind(AssertUnwindSafe(call)) {
            Err(panic) => (Self { future: None }, Some(Ended::Panicked(panic_text(&*panic)))),
            Ok(mut future) => {
                let ended = match poll_fn(|cx| Poll::Ready(poll_caught(&mut future, cx))).await {
                    Poll::Ready(ended) => Some(ended),
                    Poll::Pending => None,
                };
                (Self { future: Some(future) }, ended)
            }
        }
    }

    /// Waits for its end, until the time limit, the end of the grace, or the loss of a lane; keeps the leases
    /// meanwhile.
    pub(crate) async fn wait(
        &mut self,
        shared: &Shared,
        slot: usize,
        stage: &mut watch::Receiver<Stage>,
        contexts: &[Context],
        leased_until: Timestamp,
    ) -> Ended<T> {
        let future = self.future.as_mut().expect("it waits, so it has not ended");
        let (rules, clock) = (&shared.rules, &shared.clock);
        let begun = clock.now();
        let limit = rules.timeout.map(|timeout| begun.after(timeout));
        let mut renewal = rules.extends.then(|| half_way(leased_until, rules.lease).max(begun));
        let mut renewing: Option<BoxFuture<'_, Option<Timestamp>>> = None;
        loop {
            let alarm = [limit, renewal.filter(|_| renewing.is_none())].into_iter().flatten().min();
            tokio::select! {
                biased;
                ended = poll_fn(|cx| poll_caught(future, cx)) => return ended,
                () = over(stage) => return Ended::Cancelled,
                () = shared.interrupts[slot].notified() => {
                    // A permit may be left from an earlier delivery of this slot.
                    if contexts.iter().any(|context| shared.is_cut(context.lane())) {
                        return Ended::Cancelled;
                    }
                }
                next = finished(&mut renewing) => (renewing, renewal) = (None, next),
                () = sleep_until(clock, alarm) => {
                    let now = clock.now();
                    if let (Some(limit), Some(timeout)) = (limit, rules.timeout) && now >= limit {
                        return Ended::TimedOut(timeout);
                    }
                    renewing = Some(Box::pin(extend(shared, contexts)));
                }
            }
        }
    }

    /// Drops what is left of it. A panic in there changes nothing about how it ended.
    pub(crate) fn end(self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(self.future))) {
            tracing::error!(panic = panic_text(&*panic), "a handler panicked while it was dropped");
        }
    }
}

/// Extends the leases of what a handler works on; tells when it has to be done again.
async fn extend(shared: &Shared, contexts: &[Context]) -> Option<Timestamp> {
    let lease = shared.rules.lease;
    let deliveries: Vec<&Delivery> = contexts.iter().map(Context::delivery).collect();
    let mut next = shared.rules.lease / 2;
    let mut lost = 0;
    for (delivery, outcome) in deliveries.iter().zip(anybroker_core::extend(&deliveries, lease).await) {
        let Err(error) = outcome else { continue };
        shared.scope.telemetry.unsettled(delivery, &error);
        match error.kind() {
            // Gone: the settle will tell.
            ErrorKind::StaleDelivery | ErrorKind::Unsupported => lost += 1,
            // Once more, soon.
            _ => next = lease / 10,
        }
    }
    (lost < deliveries.len()).then(|| shared.clock.now().after(next))
}

/// When half of the lease is left.
fn half_way(until: Timestamp, lease: std::time::Duration) -> Timestamp {
    let half = i64::try_from(lease.as_millis() / 2).unwrap_or(i64::MAX);
    Timestamp::from_millis(until.as_millis().saturating_sub(half))
}

async fn sleep_until(clock: &Arc<dyn Clock>, moment: Option<Timestamp>) {
    match moment {
        Some(moment) => clock.sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// The end of the grace.
async fn over(stage: &mut watch::Receiver<Stage>) {
    // An error means that the worker is gone.
    let _ = stage.wait_for(|stage| *stage == Stage::Over).await;
}

async fn finished<T>(future: &mut Option<BoxFuture<'_, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

fn poll_caught<T>(future: &mut BoxFuture<'_, T>, cx: &mut std::task::Context<'_>) -> Poll<Ended<T>> {
    match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(outcome)) => Poll::Ready(Ended::Answered(outcome)),
        Err(panic) => Poll::Ready(Ended::Panicked(panic_text(&*panic))),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a text".to_owned())
}
