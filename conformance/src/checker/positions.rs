//! Where messages lie, under which assignment of its lane a member has them, and that who serves again says so.

use std::collections::HashMap;

use anybroker_core::{Destination, MessageId, Position};

use super::Checker;
use crate::history::Seen;

/// How long after a member has shown that it is served it may take to say so. A part of what it reads (a destination, a lane) may be
/// served before the rest is, and it says so of the whole.
const SAYS_SO: u64 = 5_000_000;

#[derive(Default)]
pub(super) struct Positions {
    /// What each position of a member's lane holds.
    taken: HashMap<(u64, Destination, u32, Position), MessageId>,
    /// The epoch of each lane of a member.
    epochs: HashMap<(u64, u32), u32>,
    /// Members that have said that they are not served.
    degraded: HashMap<u64, Degraded>,
}

struct Degraded {
    since: u64,
    /// When it showed first that it is served, at least in part, and by which message of which group.
    served: Option<(u64, String, MessageId)>,
}

impl Positions {
    pub(super) fn degraded(&mut self, at: u64, subscription: u64) {
        // Said twice, it was not served in between either.
        self.degraded.entry(subscription).or_insert(Degraded { since: at, served: None });
    }
}

impl Checker {
    /// The member says that it is served again, or is gone.
    pub(super) fn recovered(&mut self, at: u64, subscription: u64) {
        self.unrecovered(at, subscription);
        self.positions.degraded.remove(&subscription);
    }

    /// The history ends here.
    pub(super) fn never_recovered(&mut self, at: u64) {
        let members: Vec<u64> = self.positions.degraded.keys().copied().collect();
        members.into_iter().for_each(|subscription| self.unrecovered(at, subscription));
    }

    /// Whether the member should have said by now that it is served again; once.
    fn unrecovered(&mut self, at: u64, subscription: u64) {
        let Some(degraded) = self.positions.degraded.get_mut(&subscription) else { return };
        let is_late = |served: &mut (u64, String, MessageId)| at > served.0.saturating_add(SAYS_SO);
        let Some((served, group, id)) = degraded.served.take_if(is_late) else { return };
        let detail = format!(
            "published and delivered at {served} µs, after its member said at {} µs that it is not served, and within {} s it has \
             not said that it is again",
            degraded.since,
            SAYS_SO / 1_000_000
        );
        self.anomaly("unrecovered", &group, &id, detail);
    }

    /// A delivery tells where the message lies: where its receipt said, and where no other one does.
    pub(super) fn positioned(&mut self, at: u64, group: &str, seen: &Seen, is_first: bool) {
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
        self.unrecovered(at, seen.subscription);
        // What was published later was not there to be fetched before.
        let since = self.positions.degraded.get(&seen.subscription).map(|degraded| degraded.since);
        let is_served =
            since.is_some_and(|since| self.possible(&seen.destination, &seen.id).all(|call| call.at > since));
        if is_served && let Some(degraded) = self.positions.degraded.get_mut(&seen.subscription) {
            degraded.served.get_or_insert_with(|| (at, group.to_owned(), seen.id.clone()));
        }
        for (name, detail) in found {
            self.anomaly(name, group, &seen.id, detail);
        }
    }
}
