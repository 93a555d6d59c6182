//! How messages come, and how they are handed out.

use std::sync::Arc;

use anybroker_core::{DeliveryContext, Error, Received, Timestamp};
use tokio::time::Instant;

use super::{Arrival, Entry, Phase, Shared, Taken};

impl Shared {
    /// Takes messages in, all of them under one lock; answers those that nobody may be handed any more, because their time
    /// to live is over.
    pub(crate) fn arrive(&self, arrivals: &mut Vec<Arrival>) -> Vec<Taken> {
        let (now, mut over) = (Timestamp::now(), Vec::new());
        let mut state = self.lock();
        for arrival in arrivals.drain(..) {
            let (feed, tag) = (arrival.feed as usize, arrival.tag);
            let entry = Entry {
                feed: arrival.feed,
                tag,
                message: arrival.message,
                hop: arrival.hop,
                offset: arrival.offset,
                delivered: arrival.delivered,
                arrived_at: now,
                again: 0,
                was_out: false,
                has_failed: false,
                not_before: 0,
                recording: None,
                phase: Phase::Ready,
            };
            let is_over = entry.is_over(now);
            let key = state.insert(entry);
            let own = &mut state.feeds[feed];
            own.unacked.insert(tag, key.0);
            if let (Some(offset), Some(log)) = (arrival.offset, &mut own.log) {
                log.next = offset + 1;
            }
            if state.was_failing(key.0) {
                continue;
            }
            if is_over {
                over.extend(state.take(key));
            } else {
                state.make_ready(key);
            }
        }
        drop(state);
        self.arrived.notify_one();
        over
    }

    /// Hands out up to `max`; an error ends the subscription, `None` is nothing at the moment.
    pub(crate) fn take(&self, max: usize, context: &Arc<DeliveryContext>) -> Result<Option<Received>, Error> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut received = Received { deliveries: Vec::new(), events: state.events.drain(..).collect() };
        let mut is_any_over = false;
        if state.failure.is_none() && !state.is_paused {
            let now = Timestamp::now();
            let (until, lease_until) = (Instant::now() + self.lease, now.after(self.lease));
            let feeds = state.feeds.len();
            for offset in 0..feeds {
                let feed = (state.next_feed + offset) % feeds;
                while received.deliveries.len() < max
                    && !state.feeds[feed].is_full()
                    && let Some((_, slot)) = state.feeds[feed].ready.pop_first()
                {
                    // Since it became ready one before it may have failed, or its time to live have ended.
                    if state.keeps_back(slot) {
                        continue;
                    }
                    if let Some(over) = state.take_over(slot, now) {
                        state.feeds[feed].over.push(over);
                        is_any_over = true;
                        continue;
                    }
                    received.deliveries.push(state.hand_out(slot, until, lease_until, context));
                }
            }
            state.next_feed = state.next_feed.wrapping_add(1) % feeds;
        }
        if is_any_over {
            self.changed.notify_waiters();
        }
        if received.deliveries.is_empty() && received.events.is_empty() {
            return state.failure.as_ref().map_or(Ok(None), |failure| Err(failure.duplicate()));
        }
        Ok(Some(received))
    }

    /// What has to be buried, because it was over when it was to be handed out.
    pub(crate) fn over(&self, feed: u32) -> Vec<Taken> {
        std::mem::take(&mut self.lock().feeds[feed as usize].over)
    }
}
