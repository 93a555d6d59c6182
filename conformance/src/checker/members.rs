//! Members that come and go, and what they may have forgotten.

use std::collections::HashMap;

use anybroker_core::{AckGranularity, Destination, Group, OnFailure, Order};

use super::Checker;
use super::publishes::Publish;
use super::story::{Forgetting, Story};

/// How long lanes may be on the move after members came or went.
const MOVING: u64 = 5_000_000;

pub(super) struct Member {
    pub(super) client: u32,
    pub(super) group: Group,
    pub(super) destinations: Vec<Destination>,
    pub(super) order: Order,
    pub(super) on_failure: OnFailure,
    /// When it came, in microseconds of the history.
    pub(super) since: u64,
    pub(super) lease: u64,
    pub(super) max_attempts: Option<u32>,
    pub(super) crash_limit: Option<u32>,
    /// Closed, or gone: it holds nothing any more.
    pub(super) gone: bool,
    /// Since when, and until when, what it holds may be lost with a connection that a fault has hit.
    pub(super) exposed: Option<(u64, u64)>,
    /// Since when it may have lost a connection that it was not told of.
    pub(super) untold: Option<u64>,
    /// When it said that its connection or a lane was lost, or went.
    pub(super) losses: Vec<u64>,
}

impl Member {
    /// Whether it has said so in that time.
    pub(super) fn has_lost_between(&self, since: u64, until: u64) -> bool {
        self.losses.iter().any(|loss| (since..=until).contains(loss))
    }
}

impl Checker {
    /// A member is gone: what it held comes back, and where only prefixes are kept, so may what it acked above a hole.
    pub(super) fn leave(&mut self, at: u64, subscription: u64, crash: bool) {
        self.recovered(at, subscription);
        self.change_of(at, subscription);
        let Some(member) = self.members.get_mut(&subscription) else { return };
        member.gone = true;
        member.losses.push(at);
        // Whoever ends without a word forgets no more than whoever loses a connection: what was on its way, and what waited to be.
        let forgetting = self.forgetting(at, subscription).filter(|_| crash);
        let forgetting = forgetting.map(|lost| Forgetting { in_a_fault: false, is_gone: true, ..lost });
        self.forget_acks(subscription, None, forgetting);
        self.each_story(subscription, |story| story.leave(at, subscription, crash));
    }

    /// A member says that its connection or a lane was lost.
    pub(super) fn has_lost(&mut self, at: u64, subscription: u64, lane: Option<u32>) {
        if let Some(member) = self.members.get_mut(&subscription) {
            member.losses.push(at);
            // A fault that goes on may hit the next connection as well.
            member.untold = self.faults.is_hit(member.client).then_some(at);
        }
        self.lose(at, subscription, lane, true);
    }

    /// What was out of a connection or lane that is lost, or that a fault hits, may come again, and may still be settled
    /// where the broker does not mind.
    pub(super) fn lose(&mut self, at: u64, subscription: u64, lane: Option<u32>, ends: bool) {
        self.change_of(at, subscription);
        let forgetting = self.forgetting(at, subscription);
        self.forget_acks(subscription, lane, forgetting);
        self.each_story(subscription, |story| story.lose(at, subscription, lane, ends));
    }

    /// A member comes or goes: lanes move, where there are others.
    pub(super) fn change(&mut self, at: u64, subscription: u64, group: Group) {
        let mut others = self.members.iter().filter(|(number, _)| **number != subscription);
        if others.any(|(_, member)| !member.gone && member.group == group) {
            self.changed.insert(group, at);
        }
    }

    pub(super) fn change_of(&mut self, at: u64, subscription: u64) {
        if let Some(group) = self.members.get(&subscription).map(|member| member.group.clone()) {
            self.change(at, subscription, group);
        }
    }

    /// Where members own lanes: until when a delivery may be somebody else's, or an ack above a hole forgotten,
    /// because members came or went. A member is told when it receives next, which may be later.
    pub(super) fn lanes_moved(&self, group: &Group) -> Option<u64> {
        let changed = self.rules.lanes.then(|| self.changed.get(group).copied()).flatten()?;
        Some(changed.saturating_add(MOVING))
    }

    /// Where only prefixes are kept: whether something before this delivery of its lane is unsettled.
    pub(super) fn is_above_hole(&self, delivery: u64) -> bool {
        let Some((place, id, _)) = self.deliveries.get(&delivery) else { return false };
        let Some(stories) = self.stories.get(place).filter(|_| self.rules.granularity == AckGranularity::Prefix) else {
            return false;
        };
        let Some((lane, rank)) = stories.get(id).and_then(|story| story.place_of(delivery)) else { return false };
        // What was published before and has not been delivered yet is a hole too, should it be in the same lane.
        let is_undelivered = |publish: &Publish| {
            publish.destination == place.1
                && publish.outcome != Some(false)
                && stories.get(&publish.id).is_none_or(|story| story.deliveries == 0)
        };
        let mut before = self.publishes.iter().take_while(|publish| publish.id != *id);
        stories.values().any(|story| story.is_hole_below(lane, rank)) || before.any(is_undelivered)
    }

    pub(super) fn each_story(&mut self, subscription: u64, mut change: impl FnMut(&mut Story)) {
        let Some(member) = self.members.get(&subscription) else { return };
        for destination in &member.destinations {
            if let Some(stories) = self.stories.get_mut(&(member.group.clone(), destination.clone())) {
                stories.values_mut().for_each(&mut change);
            }
        }
    }

    /// Which acks of a member that goes may be forgotten: what was told of since then, or those above a hole of their lane.
    fn forget_acks(&mut self, subscription: u64, lane: Option<u32>, forgetting: Option<Forgetting>) {
        let prefix = self.rules.granularity == AckGranularity::Prefix;
        let mut holes: HashMap<u32, u64> = HashMap::new();
        self.each_story(subscription, |story| {
            for (lane, place) in story.holes(subscription) {
                holes.entry(lane).and_modify(|lowest| *lowest = place.min(*lowest)).or_insert(place);
            }
        });
        self.each_story(subscription, |story| {
            story.forget_acks(subscription, lane, forgetting, |lane, place| {
                prefix && holes.get(&lane).is_some_and(|hole| place > *hole)
            });
        });
    }
}
