//! The receiving side: one member of a group, over one queue for each destination.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anybroker_core::{Delivery, DeliveryContext, Error, ErrorKind, Received, Result, Subscription};
use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::sync::RwLock;
use tokio::time::Instant;

use crate::config::LONGEST_POLL;
use crate::inbox::Inbox;
use crate::parcel::BATCH;
use crate::source::{Source, UNTAKEN};

pub(crate) struct SqsSubscription {
    pub(crate) sources: Vec<Arc<Source>>,
    pub(crate) context: Arc<DeliveryContext>,
    pub(crate) inbox: Arc<Inbox>,
    /// Written only by closing: see [`SqsSettler`](crate::settle::SqsSettler).
    pub(crate) on_their_way: Arc<RwLock<()>>,
    pub(crate) receivers: usize,
    pub(crate) is_paused: bool,
    /// Where the next wish begins, so that no queue comes first always.
    pub(crate) turn: usize,
    pub(crate) max_in_flight: usize,
    /// When the caller took something last.
    pub(crate) taken_at: Option<Instant>,
}

impl SqsSubscription {
    fn take(&self, max: usize) -> Vec<Delivery> {
        let mut deliveries = Vec::new();
        // What is not here any more is out: nobody sees a message that is neither.
        let mut ready = self.inbox.ready.lock();
        while deliveries.len() < max {
            let Some(arrival) = ready.pop_front() else { break };
            let source = Source::of(&self.sources, &arrival);
            deliveries.extend(source.deliver(arrival, &self.context));
        }
        deliveries
    }

    /// Asks the queues for `wanted` messages, shared fairly.
    fn ask(&mut self, wanted: usize, wait: Duration) {
        let wanted = wanted.saturating_sub(self.inbox.ready.lock().len());
        let count = self.sources.len();
        self.turn = (self.turn + 1) % count;
        let share = wanted / count;
        for (number, source) in self.sources.iter().cycle().skip(self.turn).take(count).enumerate() {
            source.ask(share + usize::from(number < wanted % count), wait, self.receivers);
        }
    }

    /// Asks, while the caller is at work on `taken` messages, for those that it comes for next: of queues whose receives came
    /// back full, as much as it takes within [`UNTAKEN`] at its pace. A message that lies here is leased, and no other member
    /// gets it.
    fn read_ahead(&mut self, taken: usize) {
        let now = Instant::now();
        let Some(before) = self.taken_at.replace(now) else { return };
        if taken == 0 || self.is_paused || !self.sources.iter().any(|source| source.is_full()) {
            return;
        }
        let asked: usize = self.sources.iter().map(|source| source.asked.load(Ordering::Acquire)).sum();
        let coming = asked + self.inbox.ready.lock().len();
        let room = self.max_in_flight.saturating_sub(self.context.in_flight() + taken + coming);
        let wanted = ahead(taken, now - before, self.receivers).saturating_sub(coming).min(room);
        let full: Vec<_> = self.sources.iter().filter(|source| source.is_full()).collect();
        for source in &full {
            let own = source.asked.load(Ordering::Acquire);
            source.ask(own + wanted / full.len(), Duration::ZERO, self.receivers);
        }
    }
}

/// How many messages a caller takes within [`UNTAKEN`] who takes `taken` every `pace`; no more than the receivers bring at once.
fn ahead(taken: usize, pace: Duration, receivers: usize) -> usize {
    let times = usize::try_from(UNTAKEN.as_micros() / pace.as_micros().max(1)).unwrap_or(usize::MAX);
    taken.saturating_mul(times).min(receivers * BATCH)
}

#[async_trait]
impl Subscription for SqsSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        let deadline = Instant::now() + wait;
        loop {
            if self.inbox.is_closed() {
                return Err(Error::closed("receive"));
            }
            let inbox = Arc::clone(&self.inbox);
            let arrived = inbox.arrived.notified();
            let events: Vec<_> = self.inbox.events.lock().drain(..).collect();
            let deliveries = if self.is_paused { Vec::new() } else { self.take(max) };
            if !events.is_empty() || !deliveries.is_empty() {
                self.read_ahead(deliveries.len());
                return Ok(Received { deliveries, events });
            }
            if let Some(error) = self.inbox.failure() {
                return Err(error);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Received::default());
            }
            if !self.is_paused {
                self.ask(max, left.min(LONGEST_POLL));
            }
            let _ = tokio::time::timeout_at(deadline, arrived).await;
        }
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        self.is_paused = paused;
        Ok(())
    }

    async fn close(self: Box<Self>, grace: Duration) -> Result<()> {
        self.inbox.close();
        // From here on nothing is settled any more, so that nothing is given back and deleted at once.
        self.context.close();
        // It goes on when the grace is over.
        let closing = tokio::spawn(close(self.sources.clone(), Arc::clone(&self.on_their_way)));
        match tokio::time::timeout(grace, closing).await {
            Ok(_) => Ok(()),
            Err(_) => {
                let text = format!("not everything was given back within {grace:?}; it comes back by lease");
                Err(Error::new(ErrorKind::Timeout, "close", text))
            }
        }
    }
}

impl Drop for SqsSubscription {
    fn drop(&mut self) {
        if self.inbox.close() {
            return;
        }
        self.context.close();
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(close(std::mem::take(&mut self.sources), Arc::clone(&self.on_their_way)));
    }
}

/// Gives back what is left when nothing is on its way any more.
async fn close(sources: Vec<Arc<Source>>, on_their_way: Arc<RwLock<()>>) {
    let _flushed = on_their_way.write().await;
    join_all(sources.iter().map(|source| source.close())).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_read_ahead_than_the_caller_takes_before_it_would_be_given_back() {
        assert_eq!(ahead(10, UNTAKEN / 2, 8), 20);
        assert_eq!(ahead(1, UNTAKEN / 5, 8), 5);
        assert_eq!(ahead(10, UNTAKEN + Duration::from_millis(1), 8), 0, "it is the next receive that asks");
        assert_eq!(ahead(10, Duration::ZERO, 8), 80, "what the receivers bring at once");
        assert_eq!(ahead(10, UNTAKEN / 2, 1), 10);
    }
}
