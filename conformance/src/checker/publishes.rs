//! What was published: how many copies of a message there may be, and which place it has in the order of its key.

use anybroker_core::{Destination, MessageId, Position};

use super::Checker;
use crate::history::{Event, What};

/// A publish of one message.
pub(super) struct Publish {
    pub(super) id: MessageId,
    pub(super) destination: Destination,
    pub(super) key: Option<Vec<u8>>,
    pub(super) producer: u32,
    pub(super) sequence: u64,
    pub(super) digest: u64,
    pub(super) instructed: bool,
    pub(super) expires: bool,
    pub(super) at: u64,
    pub(super) index: usize,
    pub(super) outcome: Option<bool>,
    pub(super) duplicate: bool,
    /// Where its receipt says that it lies.
    pub(super) position: Option<Position>,
    /// Its answer is there, whatever it says.
    pub(super) answered: bool,
    /// Faults that met it on its way: the client may have sent it again by itself.
    pub(super) hits: u32,
}

impl Checker {
    pub(super) fn published(&mut self, index: usize, event: &Event) {
        match &event.what {
            What::PublishInvoke { call, id, destination, key, sequence, digest, instructed, expires } => {
                self.calls.insert(*call, self.publishes.len());
                let known = self.by_id.entry((destination.clone(), id.clone())).or_default();
                known.push(self.publishes.len());
                let hits = self.faults.meet(event.client);
                self.publishes.push(Publish {
                    id: id.clone(),
                    destination: destination.clone(),
                    key: key.clone(),
                    producer: event.client,
                    sequence: *sequence,
                    digest: *digest,
                    instructed: *instructed,
                    expires: *expires,
                    at: event.at,
                    index,
                    outcome: None,
                    duplicate: false,
                    position: None,
                    answered: false,
                    hits,
                });
            }
            What::PublishOk { call, duplicate, position } => {
                self.counts.published_ok += 1;
                if let Some(publish) = self.publish(*call) {
                    (publish.outcome, publish.duplicate, publish.answered) = (Some(true), *duplicate, true);
                    publish.position = *position;
                }
            }
            What::PublishFail { call, .. } => {
                self.counts.published_failed += 1;
                if let Some(publish) = self.publish(*call) {
                    (publish.outcome, publish.answered) = (Some(false), true);
                }
            }
            What::PublishInfo { call, .. } => {
                self.counts.published_unknown += 1;
                if let Some(publish) = self.publish(*call) {
                    publish.answered = true;
                }
            }
            _ => {}
        }
    }

    fn publish(&mut self, call: u64) -> Option<&mut Publish> {
        self.calls.get(&call).map(|place| &mut self.publishes[*place])
    }

    /// The calls that published a message and may have stored it.
    pub(super) fn possible(&self, destination: &Destination, id: &MessageId) -> impl Iterator<Item = &Publish> {
        let calls = self.by_id.get(&(destination.clone(), id.clone())).map_or(&[][..], Vec::as_slice);
        calls.iter().map(|call| &self.publishes[*call]).filter(|publish| publish.outcome != Some(false))
    }

    /// How many copies of a message the destination may hold: publishes that did not certainly fail and were not
    /// deduplicated, whether or not the answer says so. One at least, because what failed certainly and is there all the same
    /// has a name of its own.
    pub(super) fn copies(&self, destination: &Destination, id: &MessageId) -> u32 {
        let (mut count, mut kept_since) = (0u32, None);
        for publish in self.possible(destination, id).filter(|publish| !publish.duplicate) {
            // The window begins when the first is stored, which is not before it was published.
            let is_within =
                |since: u64| self.rules.dedup.is_some_and(|window| publish.at < since.saturating_add(window));
            if !kept_since.is_some_and(is_within) {
                kept_since = Some(publish.at);
                count += 1;
            }
        }
        count.max(1)
    }

    /// How many more of them a client may have sent by itself, because a fault met it before it had the answer. None, where
    /// the broker knows what it has: what is sent again so soon has the same id.
    pub(super) fn resent(&self, destination: &Destination, id: &MessageId) -> u32 {
        match self.rules.dedup {
            Some(_) => 0,
            None => self.possible(destination, id).map(|publish| publish.hits).sum(),
        }
    }

    pub(super) fn aborted_reads(&mut self) {
        let mut found = Vec::new();
        for ((destination, id), calls) in &self.by_id {
            if calls.iter().any(|call| self.publishes[*call].outcome != Some(false)) {
                continue;
            }
            for ((group, other), stories) in &self.stories {
                if other == destination && stories.get(id).is_some_and(|story| story.deliveries > 0) {
                    found.push((group.to_string(), id.clone()));
                }
            }
        }
        for (group, id) in found {
            self.anomaly("aborted-read", &group, &id, "delivered, although its publish failed for certain".into());
        }
    }
}
