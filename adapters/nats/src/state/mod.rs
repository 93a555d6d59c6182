//! What one subscription holds: messages that look their record up, that are ready, that are out, that are being settled.
//!
//! Every one of them counts against `max_in_flight`, and so does what a pull has asked the server for.

mod delivery;
mod entry;
mod lane;
mod lease;
mod slots;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Error, Message, SubscriptionEvent};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

pub(crate) use entry::{Arrival, FeedState, Key, Looking, Renewal, Surrendered, Taken};
use slots::Slot;

use crate::numbers::Numbers;
use crate::record::Record;

/// Failures that this member remembers so that it need not read them back.
const REMEMBERED: usize = 10_000;

/// A message whose time to live has ended.
pub(crate) type Expired = (Taken, Arc<Message>);

/// What a subscription does beside receiving and settling.
pub(crate) struct Tasks {
    /// Deliveries whose lease is to be renewed.
    pub(crate) renewed: mpsc::UnboundedReceiver<Renewal>,
    pub(crate) expired: mpsc::UnboundedReceiver<Expired>,
    /// What may have failed, before it is handed out again.
    pub(crate) looking: mpsc::UnboundedReceiver<Looking>,
}

/// Shared by the subscription, its feeds and its settler.
pub(crate) struct Shared {
    state: Mutex<State>,
    pub(crate) lease: Duration,
    pub(crate) max_in_flight: usize,
    /// Something can be received.
    pub(crate) arrived: Notify,
    /// There is room for more, or something about pulling changed.
    pub(crate) room: Notify,
    /// Where leases are renewed.
    renewals: mpsc::UnboundedSender<Renewal>,
    /// Where messages go whose time to live has ended.
    expiries: mpsc::UnboundedSender<Expired>,
    /// Where messages go whose record is to be read again.
    lookups: mpsc::UnboundedSender<Looking>,
    /// Set when the subscription closes: until when it may take.
    pub(crate) closing: watch::Sender<Option<Instant>>,
    /// How many feeds work.
    pub(crate) working: watch::Sender<usize>,
}

#[derive(Default)]
pub(crate) struct State {
    slots: Vec<Slot>,
    free: Vec<u32>,
    count: usize,
    /// How many of them the server does not know to be here.
    unknown: usize,
    places: HashMap<(u32, u64), u32, Numbers>,
    pub(crate) feeds: Vec<FeedState>,
    pub(crate) events: VecDeque<SubscriptionEvent>,
    pub(crate) failure: Option<Error>,
    pub(crate) is_paused: bool,
    pub(crate) is_closing: bool,
    is_receiving: bool,
    received: Option<Instant>,
    remembered: HashMap<(u32, u64), (Record, u64), Numbers>,
    next_feed: usize,
    /// How many have arrived.
    arrivals: u64,
}

impl Shared {
    pub(crate) fn new(lease: Duration, max_in_flight: usize, feeds: Vec<FeedState>) -> (Self, Tasks) {
        let (renewals, renewed) = mpsc::unbounded_channel();
        let (expiries, expired) = mpsc::unbounded_channel();
        let (lookups, looking) = mpsc::unbounded_channel();
        let working = watch::Sender::new(feeds.len());
        let state = Mutex::new(State { feeds, received: Some(Instant::now()), ..State::default() });
        let (arrived, room, closing) = (Notify::new(), Notify::new(), watch::Sender::new(None));
        let shared = Self { state, lease, max_in_flight, arrived, room, renewals, expiries, lookups, closing, working };
        (shared, Tasks { renewed, expired, looking })
    }

    /// Stops pulling and receiving; what is here goes back until `deadline`. Idempotent.
    pub(crate) fn close(&self, deadline: Instant) {
        self.lock().is_closing = true;
        self.closing.send_if_modified(|closing| {
            let is_first = closing.is_none();
            *closing = Some(closing.unwrap_or(deadline));
            is_first
        });
        self.arrived.notify_one();
        self.room.notify_waiters();
    }

    /// Waits until no feed works any more; false at the deadline.
    pub(crate) async fn ended(&self, deadline: Instant) -> bool {
        let mut working = self.working.subscribe();
        let ended = working.wait_for(|working| *working == 0);
        tokio::time::timeout_at(deadline, ended).await.is_ok()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Ends the subscription with an error that every receive answers from now on.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.lock();
        if state.failure.is_none() && !state.is_closing {
            state.failure = Some(error);
        }
        drop(state);
        self.arrived.notify_one();
    }

    pub(crate) fn tell(&self, event: SubscriptionEvent) {
        self.lock().events.push_back(event);
        self.arrived.notify_one();
    }
}
