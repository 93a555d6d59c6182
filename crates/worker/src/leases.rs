//! How a subscription's loop keeps the leases of what waits for a handler.

use anybroker_core::{Delivery, ErrorKind, Timestamp};

use crate::subscription::{Loop, Renewed};

impl Loop {
    pub(crate) fn schedule_renewal(&mut self) {
        if self.shared.rules.leases {
            self.work.renew_at = Some(self.shared.clock.now().after(self.shared.rules.lease / 4));
        }
    }

    /// Keeps the leases of what waits for a handler; handlers that run keep their own.
    pub(crate) fn renew(&mut self, now: Timestamp) {
        let lease = self.shared.rules.lease;
        if self.shared.rules.extends {
            let shared = self.shared.state.lock().lanes.share_leased(now.after(lease / 2), now.after(lease));
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
        }
        self.schedule_renewal();
    }

    pub(crate) fn renewed(&mut self, renewed: Renewed) {
        for (delivery, outcome) in renewed {
            let Err(error) = outcome else { continue };
            if error.kind() == ErrorKind::StaleDelivery && self.shared.state.lock().lanes.take_one(&delivery).is_some()
            {
                self.work.counts.stale += 1;
            }
            self.shared.scope.telemetry.unsettled(&delivery, &error);
        }
        self.unshare();
    }
}
