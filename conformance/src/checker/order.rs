//! Order per key, and who holds a key.

use anybroker_core::Order;

use super::{Checker, Place};
use crate::history::Seen;

impl Checker {
    /// First deliveries of a key keep the order of publishing.
    #[allow(clippy::too_many_arguments, reason = "one caller, and a struct for it would say nothing more")]
    pub(super) fn first_delivery(
        &mut self,
        place: &Place,
        group: &str,
        producer: u32,
        lane: &Option<Vec<u8>>,
        sequence: u64,
        key: &Option<Vec<u8>>,
        seen: &Seen,
    ) {
        // Under total order sequences are compared by where the publish stands in the log.
        let rank = match lane {
            Some(_) => sequence,
            None => self.by_id[&(seen.destination.clone(), seen.id.clone())]
                .first()
                .map_or(0, |call| self.publishes[*call].index as u64),
        };
        let before = self.highest.get(&(place.clone(), producer, lane.clone())).cloned();
        match before {
            Some((highest, other)) if highest > rank => {
                let key = key.as_deref().map(|key| String::from_utf8_lossy(key).into_owned());
                let detail = format!("first delivered after {other}, which was published later (key {key:?})");
                self.anomaly("reorder", group, &seen.id, detail);
            }
            _ => {
                self.highest.insert((place.clone(), producer, lane.clone()), (rank, seen.id.clone()));
            }
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
        let passed = self.publishes.iter().find(|publish| {
            publish.destination == seen.destination
                && publish.producer == producer
                && publish.sequence < sequence
                && publish.key == *key
                && (order == Order::Total || key.is_some())
                && self
                    .stories
                    .get(place)
                    .and_then(|stories| stories.get(&publish.id))
                    .is_some_and(|story| story.waiting_to_come_back() && !story.redriven)
        });
        if let Some(passed) = passed {
            let detail = format!("delivered before {}, which was given back and must come first", passed.id);
            self.anomaly("reorder", group, &seen.id, detail);
        }
    }

    /// In ordered modes the unsettled deliveries of a key are with one member.
    pub(super) fn held_by_another(
        &mut self,
        at: u64,
        place: &Place,
        group: &str,
        key: &Option<Vec<u8>>,
        order: Order,
        seen: &Seen,
    ) {
        // Lanes that move may be with two members for as long as the old one has not been told.
        let moved = self.lanes_moved(&place.0);
        let members = &self.members;
        let other = self.stories.get(place).and_then(|stories| {
            stories.iter().find(|(id, story)| {
                let same_key = order == Order::Total
                    || self
                        .by_id
                        .get(&(seen.destination.clone(), (*id).clone()))
                        .is_some_and(|calls| calls.iter().any(|call| self.publishes[*call].key == *key));
                same_key
                    && story.held().any(|held| {
                        held.member != seen.subscription
                            && held.until > at
                            && moved.is_none_or(|moved| held.at > moved)
                            && members.get(&held.member).is_some_and(|member| !member.gone)
                    })
            })
        });
        if let Some((other, _)) = other {
            let detail = format!("delivered to one member while another holds {other} of the same key");
            self.anomaly("concurrent-key", group, &seen.id, detail);
        }
    }
}
