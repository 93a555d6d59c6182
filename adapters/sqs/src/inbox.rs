//! What has arrived for a subscription and is not handed out.

use std::sync::atomic::{AtomicBool, Ordering};

use anybroker_core::{Bytes, Error, Message, SubscriptionEvent};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::codec::Carried;
use crate::source::Arrivals;

/// What has arrived, of all sources of a subscription.
#[derive(Default)]
pub(crate) struct Inbox {
    pub(crate) ready: Mutex<Arrivals>,
    pub(crate) events: Mutex<Vec<SubscriptionEvent>>,
    failure: Mutex<Option<Error>>,
    pub(crate) arrived: Notify,
    is_closed: AtomicBool,
    is_degraded: AtomicBool,
}

/// A message that is leased and not handed out.
pub(crate) struct Arrival {
    pub(crate) lane: u32,
    /// See [`Lease::place`](crate::leases::Lease::place).
    pub(crate) place: u64,
    pub(crate) since: Instant,
    pub(crate) until: Instant,
    pub(crate) handle: Bytes,
    /// SQS's own id.
    pub(crate) message_id: String,
    /// Its message group, in a FIFO queue.
    pub(crate) group: Option<String>,
    /// How often SQS has handed it over.
    pub(crate) count: u32,
    pub(crate) carried: Carried,
    pub(crate) message: Message,
}

impl Inbox {
    /// Tells the subscriber that SQS does not serve, or serves again, once each.
    pub(crate) fn degraded(&self, cause: Option<String>) {
        if self.is_degraded.swap(cause.is_some(), Ordering::AcqRel) == cause.is_some() {
            return;
        }
        let event = cause.map_or(SubscriptionEvent::Recovered, |cause| SubscriptionEvent::Degraded { cause });
        self.events.lock().push(event);
        self.arrived.notify_one();
    }

    /// What the subscription has ended with.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.failure.lock().as_ref().map(Error::duplicate)
    }

    /// Ends the subscription, unless it has ended already.
    pub(crate) fn fail(&self, error: Error) {
        self.failure.lock().get_or_insert(error);
        self.arrived.notify_one();
    }

    /// The connection is closed: whatever else was wrong.
    pub(crate) fn disconnect(&self) {
        *self.failure.lock() = Some(Error::closed("receive"));
        self.arrived.notify_one();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Whether anybody receives here.
    pub(crate) fn is_alive(&self) -> bool {
        !self.is_closed() && self.failure.lock().is_none()
    }

    /// Nothing is put in from now on. Tells whether that was so before.
    pub(crate) fn close(&self) -> bool {
        self.is_closed.swap(true, Ordering::AcqRel)
    }

    /// Takes arrivals out.
    pub(crate) fn remove(&self, chosen: impl Fn(&Arrival) -> bool) -> Vec<Arrival> {
        Self::remove_of(&mut self.ready.lock(), chosen)
    }

    /// Takes arrivals out of those.
    pub(crate) fn remove_of(ready: &mut Arrivals, chosen: impl Fn(&Arrival) -> bool) -> Vec<Arrival> {
        if !ready.iter().any(&chosen) {
            return Vec::new();
        }
        let (removed, kept) = ready.drain(..).partition::<Arrivals, _>(chosen);
        *ready = kept;
        removed.into()
    }
}
