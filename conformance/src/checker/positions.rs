//! Where messages lie, under which assignment of its lane a member has them, and that who serves again says so.

use std::collections::HashMap;

use anybroker_core::{Destination, MessageId, Position};

use super::Checker;
use crate::history::Seen;

#[derive(Default)]
pub(super) struct Positions {
    /// What each position of a member's lane holds.
    taken: HashMap<(u64, Destination, u32, Position), MessageId>,
    /// The epoch of each lane of a member.
    epochs: HashMap<(u64, u32), u32>,
    /// Since when a member has said that it is not served.
    degraded: HashMap<u64, u64>,
}

impl Positions {
    pub(super) fn degraded(&mut self, at: u64, subscription: u64) {
        // Said twice, it was not served in between either.
        self.degraded.entry(subscription).or_insert(at);
    }

    pub(super) fn recovered(&mut self, subscription: u64) {
        self.degraded.remove(&subscription);
    }
}

impl Checker {
    /// A delivery tells where the message lies: where its receipt said, and where no other one does.
    pub(super) fn positioned(&mut self, group: &str, seen: &Seen, is_first: bool) {
        let mut found = Vec::new();
        let epoch = self.positions.epochs.entry((seen.subscription, seen.lane)).or_insert(seen.epoch);
        if seen.epoch < *epoch {
            found
                .push(("epoch-fell", format!("lane {} in epoch {}, and was in {epoch} before", seen.lane, seen.epoch)));
        }
        *epoch = seen.epoch.max(*epoch);
        if let Some(position) = seen.position {
            let place = (seen.subscription, seen.destination.clone(), seen.lane, position);
            let holds = self.positions.taken.entry(place).or_insert_with(|| seen.id.clone());
            if *holds != seen.id {
                found.push(("position-conflict", format!("at {position} of lane {}, where {holds} was", seen.lane)));
            }
            let calls = || self.possible(&seen.destination, &seen.id);
            let told = || calls().filter_map(|publish| publish.position);
            let is_told = calls().all(|publish| publish.position.is_some() && publish.hits == 0 && !publish.instructed);
            if is_first && is_told && told().all(|told| told != position) {
                let told: Vec<String> = told().map(|told| told.to_string()).collect();
                found.push(("position-conflict", format!("at {position}, and its receipt says {told:?}")));
            }
        }
        // What was published later was not there to be fetched before.
        let since = self.positions.degraded.get(&seen.subscription).copied();
        if let Some(since) =
            since.filter(|since| self.possible(&seen.destination, &seen.id).all(|call| call.at > *since))
        {
            let detail = format!(
                "published and delivered after its member said at {since} µs that it is not served, and not that it is again"
            );
            found.push(("unrecovered", detail));
        }
        for (name, detail) in found {
            self.anomaly(name, group, &seen.id, detail);
        }
    }
}
