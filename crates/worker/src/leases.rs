//! How a subscription's loop keeps the leases of what waits for a handler.

use anybroker_core::{Delivery, ErrorKind, Timestamp};

use crate::settle::Again;
use crate::subscription::{Loop, Renewed};

impl Loop {
    pub(crate) fn schedule_renewal(&mut self) {
        if self.shared.rules.leases {
            self.work.renew_at = Some(self.shared.clock.now().after(self.shared.rules.lease / 4));
        }
    }

    /// Keeps the leases of what waits for a handler, and of what waits to be settled once more; handlers that run keep
    /// their own.
    pub(crate) fn renew(&mut self, now: Timestamp) {
        let lease = self.shared.rules.lease;
        if self.shared.rules.extends {
            let (before, until) = (now.after(lease / 2), now.after(lease));
            let mut shared = self.shared.state.lock().lanes.share_leased(before, until);
            let share = |again: Again| {
                if again.until > before {
                    return again;
                }
                let (again, delivery) = again.share(until);
                shared.push(delivery);
                again
            };
            self.work.again = std::mem::take(&mut self.work.again).into_iter().map(share).collect();
            if !shared.is_empty() {
                self.work.renewal = Some(Box::pin(async move {
                    let deliveries: Vec<&Delivery> = shared.iter().map(|delivery| &**delivery).collect();
                    let outcomes = anybroker_core::extend(&deliveries, lease).await;
                    shared.into_iter().zip(outcomes).collect()
                }));
            }
        } else {
            let expired = self.shared.state.lock().lanes.take_expired(now);
            self.work.counts.stale += expired.len() as u64;
            // Nothing has extended it: it is what the endpoint said.
            self.forget(|again| again.held.delivery().lease_until().is_some_and(|until| until <= now));
        }
        self.schedule_renewal();
    }

    pub(crate) fn renewed(&mut self, renewed: Renewed) {
        for (delivery, outcome) in renewed {
            let Err(error) = outcome else { continue };
            if error.kind() == ErrorKind::StaleDelivery {
                if self.shared.state.lock().lanes.take_one(&delivery).is_some() {
                    self.work.counts.stale += 1;
                }
                self.forget(|again| again.is(&delivery));
            }
            self.shared.scope.telemetry.unsettled(&delivery, &error);
        }
        self.unshare();
        if self.work.last {
            // What was to be settled a last time, and was being extended.
            self.settle_again();
        }
    }

    /// Gives up what was to be settled once more, and is not this member's any more.
    pub(crate) fn forget(&mut self, mut is_gone: impl FnMut(&Again) -> bool) {
        let (gone, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.work.again).into_iter().partition(|again| is_gone(again));
        self.work.again = kept;
        for again in gone {
            self.work.counts.stale += 1;
            if let Some(lane) = again.lane {
                self.go_back(lane, again.held.delivery().message().id());
            }
        }
    }
}
