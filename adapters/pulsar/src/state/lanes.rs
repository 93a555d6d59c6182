//! Which topics, and parts of topics, this member works on: under order each is one member's at a time.

use std::ops::Range;
use std::sync::Arc;

use anybroker_core::{Lane, SubscriptionEvent};

use super::count::Count;
use super::{FeedState, Phase, Shared, State};
use crate::wire::Conn;

impl Shared {
    /// A consumer is there: from now on its feed can be served.
    pub(crate) fn attached(&self, feed: u32, conn: &Arc<Conn>, consumer: u64, assigned: Option<String>) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        own.epoch += 1;
        (own.attached, own.permits, own.is_leaving) = (Some((Arc::clone(conn), consumer)), 0, false);
        own.count.iter_mut().for_each(Count::attached);
        let lane = Lane { index: feed, epoch: own.epoch };
        if let Some(name) = assigned {
            state.events.push_back(SubscriptionEvent::Assigned { lane, name });
        }
        state.recovered(feed);
        drop(state);
        self.arrived.notify_one();
        self.room.notify_waiters();
    }

    /// The consumer is gone: the broker gives everything of it out again, and nothing of it can be settled here.
    pub(crate) fn detached(&self, feed: u32, is_lane: bool) {
        let mut state = self.lock();
        let own = &mut state.feeds[feed as usize];
        let was_attached = own.attached.take().is_some();
        (own.permits, own.share, own.held, own.is_leaving) = (0, 0, 0, false);
        own.ready.clear();
        let lane = Lane { index: feed, epoch: own.epoch };
        state.remember(feed);
        let gone: Vec<_> = state.entries.extract_if(|_, entry| entry.feed == feed).map(|(_, entry)| entry).collect();
        state.out = state.entries.values().filter(|entry| entry.is_out()).count();
        state.kept = state.entries.values().filter(|entry| entry.is_kept()).count();
        state.places.retain(|(other, _), _| *other != feed);
        gone.iter().for_each(|entry| state.leave(feed, entry.place(), &entry.message));
        if is_lane && was_attached && !state.is_closing {
            state.events.push_back(SubscriptionEvent::Lost { lane });
        }
        drop(state);
        self.arrived.notify_one();
        self.room.notify_waiters();
    }

    /// A feed is not served at the moment.
    pub(crate) fn degraded(&self, feed: u32, cause: &str) {
        let mut state = self.lock();
        let is_first = state.feeds.iter().all(|feed| !feed.is_degraded);
        state.feeds[feed as usize].is_degraded = true;
        if is_first && !state.is_closing {
            state.events.push_back(SubscriptionEvent::Degraded { cause: cause.to_owned() });
            drop(state);
            self.arrived.notify_one();
        }
    }

    /// The broker serves, and another member works on the feed.
    pub(crate) fn stands_by(&self, feed: u32) {
        if self.lock().recovered(feed) {
            self.arrived.notify_one();
        }
    }

    /// Whether this member works on what the feed brings: under order, who has the source has what comes back of it.
    pub(crate) fn may_work(&self, feed: u32) -> bool {
        let state = self.lock();
        self.keeps(&state, feed)
    }

    /// Whether the feed's consumer is to be closed now; from then on nothing of it is handed out.
    pub(crate) fn leaves(&self, feed: u32) -> bool {
        let mut state = self.lock();
        let leaves = !self.keeps(&state, feed);
        if leaves {
            state.feeds[feed as usize].is_leaving = true;
        }
        leaves
    }

    /// Of these feeds' sources `quota` are to be this member's: those that are too many are given up, and others are tried for
    /// as long as there are too few.
    pub(crate) fn balance(&self, feeds: Range<u32>, quota: usize) {
        let mut state = self.lock();
        let sources: Vec<u32> = feeds.filter(|feed| !state.feeds[*feed as usize].is_back).collect();
        let (mut held, others): (Vec<u32>, Vec<u32>) =
            sources.into_iter().partition(|feed| state.feeds[*feed as usize].attached.is_some());
        // What is being left anyway goes first, then what nothing is out of.
        held.sort_by_key(|feed| {
            let is_given_up = state.feeds[*feed as usize].is_given_up;
            (is_given_up, !is_given_up && !state.is_busy(*feed))
        });
        for (index, feed) in held.iter().enumerate() {
            state.feeds[*feed as usize].is_given_up = index >= quota;
        }
        for feed in others {
            state.feeds[feed as usize].is_given_up = held.len() >= quota;
        }
        drop(state);
        self.arrived.notify_one();
        self.room.notify_waiters();
    }
}

impl Shared {
    fn keeps(&self, state: &State, feed: u32) -> bool {
        let own = &state.feeds[feed as usize];
        if !self.keeps_order {
            return true;
        }
        if own.source != feed {
            let source = &state.feeds[own.source as usize];
            return source.attached.is_some() && !source.is_leaving;
        }
        // What is announced is handed out first, or its count would be one too high; unless nobody receives.
        let is_announcing = || state.is_announcing(feed) && !self.rests(state);
        !own.is_given_up || (own.attached.is_some() && (state.is_busy(feed) || is_announcing()))
    }
}

impl State {
    /// Whether other members shall have what the feed brings, or its source is being left.
    pub(super) fn is_given_up(&self, feed: u32) -> bool {
        let source = &self.feeds[self.feeds[feed as usize].source as usize];
        source.is_given_up || source.is_leaving
    }

    /// Whether anything of a source is out, or of what came back of it.
    fn is_busy(&self, source: u32) -> bool {
        self.entries.values().any(|entry| {
            self.feeds[entry.feed as usize].source == source
                && matches!(entry.phase, Phase::Out { .. } | Phase::Settling { .. })
        })
    }

    /// Whether a hand-over of a source is being stored, or of what came back of it, or is stored and not done. One that waits for
    /// a failed message may wait for long: its lane does not wait for it, and its count is one too high then.
    fn is_announcing(&self, source: u32) -> bool {
        let of_source = |feed: &FeedState| feed.source == source && feed.count.as_ref().is_some_and(Count::is_storing);
        self.feeds.iter().any(of_source)
            || self.entries.values().any(|entry| {
                self.feeds[entry.feed as usize].source == source && entry.is_announced() && !entry.is_kept()
            })
    }
}
