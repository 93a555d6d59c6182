//! Order per key, and who holds a key.

use anybroker_core::{MessageId, Order};

use super::publishes::Publish;
use super::{Checker, Place};
use crate::history::Seen;

impl Checker {
    /// First deliveries of a key keep the order of publishing.
    ///
    /// A message has its place by the calls that may have stored it: not before the first of them, and at the latest by the
    /// first that was told as done. One whose publishes are all unknown may be stored at any time after the first of them,
    /// behind what was published later, and not before what was done earlier.
    pub(super) fn reorders(&mut self) {
        let mut found = Vec::new();
        for (((group, destination), producer, key), ids) in &self.firsts {
            // Under total order places are compared by where the publish stands in the log.
            let rank = |publish: &Publish| if key.is_some() { publish.sequence } else { publish.index as u64 };
            let mut highest: Option<(u64, &MessageId)> = None;
            for id in ids {
                let calls = || self.possible(destination, id).filter(|publish| publish.producer == *producer);
                let Some(first) = calls().map(rank).min() else { continue };
                let last = calls().filter(|publish| publish.outcome == Some(true)).map(rank).min();
                match highest {
                    Some((highest, other)) if last.is_some_and(|last| last < highest) => {
                        let key = key.as_deref().map(|key| String::from_utf8_lossy(key).into_owned());
                        let detail = format!("first delivered after {other}, which was published later (key {key:?})");
                        found.push((group.to_string(), id.clone(), detail));
                    }
                    _ => highest = highest.max(Some((first, id))),
                }
            }
        }
        for (group, id, detail) in found {
            self.anomaly("reorder", &group, &id, detail);
        }
    }

    /// Where a failed message blocks its key, nothing of that key passes one that was given back.
    #[allow(clippy::too_many_arguments, reason = "one caller, and a struct for it would say nothing more")]
    pub(super) fn overtaken(
        &mut self,
        place: &Place,
        group: &str,
        producer: u32,
        key: &Option<Vec<u8>>,
        sequence: u64,
        order: Order,
        seen: &Seen,
    ) {
        // Of one that may be stored twice, what was given back may be the later one.
        let is_before = |id: &MessageId| {
            let stored = self.possible(&seen.destination, id).filter(|call| !call.duplicate);
            stored.filter(|call| call.producer == producer).all(|call| call.sequence < sequence)
        };
        let passed = self.publishes.iter().find(|publish| {
            publish.producer == producer
                && publish.sequence < sequence
                && publish.key == *key
                && publish.destination == seen.destination
                && (order == Order::Total || key.is_some())
                && self
                    .stories
                    .get(place)
                    .and_then(|stories| stories.get(&publish.id))
                    .is_some_and(|story| story.waiting_to_come_back() && !story.redriven)
                && is_before(&publish.id)
        });
        if let Some(passed) = passed {
            let detail = format!("delivered before {}, which was given back and must come first", passed.id);
            self.anomaly("reorder", group, &seen.id, detail);
        }
    }

    /// The unsettled deliveries of a key are with one member, where that or the one that holds them was promised an order.
    pub(super) fn held_by_another(
        &mut self,
        at: u64,
        place: &Place,
        group: &str,
        key: &Option<Vec<u8>>,
        order: Order,
        seen: &Seen,
    ) {
        // Lanes that move may be with two members for as long as the old one has not been told. Neither has a member its key by what it
        // has handed out of a connection that is gone.
        let moved = self.lanes_moved(&place.0);
        let members = &self.members;
        let other = self.stories.get(place).and_then(|stories| {
            stories.iter().find(|(id, story)| {
                // First what few of them are: this is asked of every story at every delivery.
                let holders = story.held().filter_map(|held| {
                    let is_held = held.member != seen.subscription
                        && held.until > at
                        && !held.is_stale
                        && moved.is_none_or(|moved| held.at > moved);
                    members.get(&held.member).filter(|member| is_held && !member.gone)
                });
                // What they have promised between them.
                let (mut total, mut keyed) = (false, false);
                for promised in holders.flat_map(|member| [member.order, order]) {
                    total |= promised == Order::Total;
                    keyed |= promised == Order::Key && key.is_some();
                }
                let of = || self.by_id.get(&(seen.destination.clone(), (*id).clone()));
                let has_its_key = |call: &usize| self.publishes[*call].key == *key;
                total || keyed && of().is_some_and(|calls| calls.iter().any(has_its_key))
            })
        });
        if let Some((other, _)) = other {
            let detail = format!("delivered to one member while another holds {other} of the same key");
            self.anomaly("concurrent-key", group, &seen.id, detail);
        }
    }
}
