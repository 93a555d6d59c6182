//! The receiving side that services hold.

use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use tokio::time::Instant;

use crate::burials::Burials;
use crate::{Delivery, DeliveryContext, Error, ErrorKind, Received, Result, SubscribeSpec, Subscription};

/// An open subscription: one member of a group. Deliveries are received in batches and settled by themselves.
///
/// The bound `max_in_flight` and the `crash_limit` are kept here, once for all adapters. What met the crash limit and
/// cannot become a dead letter is held, in flight, and tried again while the subscription receives; it comes back when its
/// lease or lane is gone, or when the subscription is.
pub struct Subscriber {
    // Dropped first: what is held is given back while the subscription is there.
    burials: Burials,
    subscription: Box<dyn Subscription>,
    context: Arc<DeliveryContext>,
    spec: SubscribeSpec,
}

impl Subscriber {
    pub(crate) fn new(subscription: Box<dyn Subscription>, spec: SubscribeSpec) -> Self {
        let context = Arc::clone(subscription.context());
        Self { burials: Burials::new(spec.crash_limit), subscription, context, spec }
    }

    /// What it was opened with.
    #[must_use]
    pub fn spec(&self) -> &SubscribeSpec {
        &self.spec
    }

    /// How many deliveries are out, unsettled.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.context.in_flight()
    }

    /// Waits up to `wait` and brings at most `max` deliveries; returns early when something is there, empty when
    /// the wait is over. Events of the subscription are dropped; [`receive_all`](Self::receive_all) brings them too.
    ///
    /// Cancel-safe: a dropped future loses nothing and burns no attempt.
    ///
    /// # Errors
    /// `NotFound` when destination or group were deleted, `Closed`, `PermissionDenied`, `Unauthenticated`.
    pub async fn receive(&mut self, max: usize, wait: Duration) -> Result<Vec<Delivery>> {
        let deadline = deadline(wait);
        loop {
            let received = self.receive_until(max, deadline).await?;
            // Events alone do not end the wait.
            if !received.deliveries.is_empty() || received.events.is_empty() || Instant::now() >= deadline {
                return Ok(received.deliveries);
            }
        }
    }

    /// As [`receive`](Self::receive), with the subscription's events.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub async fn receive_all(&mut self, max: usize, wait: Duration) -> Result<Received> {
        self.receive_until(max, deadline(wait)).await
    }

    async fn receive_until(&mut self, max: usize, deadline: Instant) -> Result<Received> {
        loop {
            let room = self.room(deadline).await.min(max);
            if room == 0 {
                return Ok(Received::default());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let receiving = self.subscription.receive(room, left);
            let mut received = match self.burials.is_empty() {
                true => receiving.await?,
                false => self.burials.meanwhile(receiving).await?,
            };
            let brought = received.deliveries.len();
            debug_assert!(brought <= room, "the adapter brought {brought} deliveries, {room} were asked for");
            if !self.burials.is_empty() {
                self.burials.follow(&received.events);
            }
            self.bury_crashers(&mut received.deliveries);
            if received.deliveries.is_empty() && brought > 0 && received.events.is_empty() {
                continue; // Everything it brought was buried: the wait goes on.
            }
            received.deliveries.iter_mut().for_each(Delivery::hand_out);
            Delivery::count_handed_out(&self.context, received.deliveries.len());
            return Ok(received);
        }
    }

    /// How many more deliveries may be out; waits until there is room for one, or the deadline.
    async fn room(&mut self, deadline: Instant) -> usize {
        loop {
            let settled = self.context.settled();
            let room = self.spec.max_in_flight.saturating_sub(self.context.in_flight());
            if room > 0 || self.context.is_closed() {
                return room.max(1);
            }
            if tokio::time::timeout_at(deadline, self.burials.meanwhile(settled)).await.is_err() {
                return 0;
            }
        }
    }

    /// Dead-letters what was handed over too often without any outcome, instead of handing it over once more.
    fn bury_crashers(&mut self, deliveries: &mut Vec<Delivery>) {
        let Some(limit) = self.spec.crash_limit else { return };
        let crashed = |delivery: &Delivery| {
            let facts = delivery.facts();
            facts.deliveries.is_some_and(|deliveries| deliveries.saturating_sub(facts.attempt) >= limit)
        };
        if !deliveries.iter().any(crashed) {
            return;
        }
        let (mut crashers, healthy): (Vec<_>, Vec<_>) = deliveries.drain(..).partition(crashed);
        *deliveries = healthy;
        crashers.iter_mut().for_each(Delivery::hand_out);
        Delivery::count_handed_out(&self.context, crashers.len());
        self.burials.bury(crashers);
    }

    /// Stops (or resumes) deliveries. Those that are out stay valid.
    ///
    /// # Errors
    /// `Unavailable` when the broker cannot be told.
    pub async fn pause(&mut self, paused: bool) -> Result<()> {
        self.subscription.pause(paused).await
    }

    /// The deliveries one by one, received in batches of up to `batch`. It ends with the first error.
    pub fn into_stream(self, batch: usize) -> impl Stream<Item = Result<Delivery>> + Send {
        let state = (self, std::collections::VecDeque::new(), false);
        futures_util::stream::unfold(state, move |(mut subscriber, mut ready, failed)| async move {
            if failed {
                return None;
            }
            loop {
                if let Some(delivery) = ready.pop_front() {
                    return Some((Ok(delivery), (subscriber, ready, false)));
                }
                match subscriber.receive(batch.max(1), Duration::from_secs(3600)).await {
                    Ok(deliveries) => ready.extend(deliveries),
                    Err(error) => return Some((Err(error), (subscriber, ready, true))),
                }
            }
        })
    }

    /// Closes: flushes acks, gives back what is unsettled without counting an attempt. Deliveries that are still out
    /// are stale afterwards.
    ///
    /// # Errors
    /// `Timeout` when it did not end within `grace`.
    pub async fn close(self, grace: Duration) -> Result<()> {
        // An adapter may wait for what is out: nobody settles what is held.
        drop(self.burials);
        let bound = grace.saturating_add(Duration::from_secs(1));
        let closed = tokio::time::timeout(bound, self.subscription.close(grace)).await;
        self.context.close();
        closed.unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "close", format!("not closed within {grace:?}"))))
    }
}

fn deadline(wait: Duration) -> Instant {
    // Far enough for "for ever", near enough not to overflow.
    Instant::now() + wait.min(Duration::from_secs(365 * 24 * 3600))
}

impl std::fmt::Debug for Subscriber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscriber").field("spec", &self.spec).field("context", &self.context).finish_non_exhaustive()
    }
}
