//! Deliveries and what becomes of them: each has a cause, its attempt number, its place.

use std::time::Duration;

use anybroker_core::{AckLevel, AttemptCount, OnFailure, Order};

use super::Checker;
use super::members::Member;
use super::story::{Asked, Held};
use crate::history::{Seen, Verb};

/// Leases are told in whole milliseconds: one may end that much early.
const PRECISION: u64 = 1_000;

/// How long after a message came again the member that had it may be told that its connection was lost.
const NOTICED: u64 = 15_000_000;

impl Checker {
    pub(super) fn deliver(&mut self, at: u64, seen: &Seen) {
        self.counts.delivered += 1;
        let Some(member) = self.members.get(&seen.subscription) else { return };
        let place = (member.group.clone(), seen.destination.clone());
        let (group, lease, order) = (member.group.to_string(), member.lease, member.order);
        // Where the broker's own lease gives deliveries to others, a lost connection does not; a server that forgets does.
        let exposed = (!self.rules.by_lease || self.faults.is_forgotten(at))
            && member.exposed.is_some_and(|(_, until)| at <= until);
        // Until it is told of the loss it hands out what it has from that connection, whoever has got that meanwhile.
        let untold = member.untold.filter(|_| exposed);
        let since = member.since;
        self.faults.meet(member.client);
        let (max_attempts, on_failure) = (member.max_attempts, member.on_failure);
        if !member.destinations.contains(&seen.destination)
            && member.destinations.iter().all(|name| !name.contains('*'))
        {
            let detail = format!("the subscription reads {:?}, came from {}", member.destinations, seen.destination);
            self.anomaly("phantom", &group, &seen.id, detail);
        }
        let copies = self.copies(&seen.destination, &seen.id);
        let with_resent = copies + self.resent(&seen.destination, &seen.id);
        let Some(first) = self.by_id.get(&(seen.destination.clone(), seen.id.clone())).and_then(|calls| calls.first())
        else {
            let detail = format!("never published here by this case; its payload begins {:?}", seen.excerpt);
            return self.anomaly("phantom", &group, &seen.id, detail);
        };
        let published = &self.publishes[*first];
        let published_at = published.at;
        let (key, producer, sequence) = (published.key.clone(), published.producer, published.sequence);
        let instructed = published.instructed;
        let same = self.by_id[&(seen.destination.clone(), seen.id.clone())]
            .iter()
            .any(|call| self.publishes[*call].digest == seen.digest);
        if !same {
            let detail = format!("body, key, headers, content type or time differ; payload begins {:?}", seen.excerpt);
            self.anomaly("altered", &group, &seen.id, detail);
        }

        let (rules, number) = (self.rules, self.counts.delivered);
        let moved = self.lanes_moved(&place.0);
        // A broker's own count counts what a member had fetched and never handed out, before it went or the lease ended; or before
        // a fault hit its connection, whether it tells that or not.
        let is_hit = |member: &Member| member.exposed.is_some_and(|(_, until)| published_at <= until);
        let is_gone = |member: &Member| {
            member.group == place.0 && (is_hit(member) || member.losses.iter().any(|loss| *loss >= published_at))
        };
        let had_others = rules.attempts == AttemptCount::Approximate && self.members.values().any(is_gone);
        let members = &self.members;
        let story = self.stories.entry(place.clone()).or_default().entry(seen.id.clone()).or_default();
        // What it had before another one failed shows the number from then; the return that is under way is still to come.
        let of_before = untold.filter(|_| with_resent == 1 && story.is_before(seen.attempt, at, rules.attempts));
        let was_stale = of_before.is_some_and(|since| story.comes_stale(at, seen.subscription, since));
        let has_cause = !was_stale
            && story.justify(at, with_resent, moved, |member, since, until| {
                members.get(&member).is_some_and(|member| member.has_lost_between(since, until))
            });
        let is_stale =
            was_stale || !has_cause && untold.is_some_and(|since| story.comes_stale(at, seen.subscription, since));
        let justified = has_cause || is_stale;
        let (again, acked) = (story.deliveries > 0, story.acked > 0);
        let gone_before = story.outstanding_summary();
        let first_delivery = !again;
        let is_as_published = first_delivery && !story.redriven;
        // It cannot have been leased before it was there, and neither can it have been before the member was.
        let leased = story.back_at().max(published_at).max(since);
        let lease_end = leased.saturating_add(lease).saturating_sub(PRECISION);
        // An attempt is due when a failure of the one before has been held back for as long as was asked.
        let due = (rules.attempts != AttemptCount::Approximate).then(|| story.due(seen.attempt)).flatten();
        let mut attempts = story.attempts(at, rules.attempts);
        if rules.attempts == AttemptCount::Approximate && (had_others || at >= lease_end) {
            attempts = *attempts.start()..=u32::MAX;
        }
        story.deliver(Held {
            at,
            delivery: seen.delivery,
            member: seen.subscription,
            // On a connection that a fault has hit it may be lost at once; what is another one's already brings nothing.
            until: if exposed && !is_stale { at } else { lease_end },
            lease_end,
            lane: seen.lane,
            position: seen.position,
            attempt: seen.attempt,
            is_stale,
            order: number,
        });
        self.deliveries.insert(seen.delivery, (place.clone(), seen.id.clone(), seen.subscription));
        self.positioned(at, &group, seen, is_as_published);

        if again && justified {
            self.counts.duplicates_justified += 1;
        } else if !justified {
            self.counts.duplicates_unjustified += 1;
            let name = if acked { "ack-lost" } else { "unjustified-duplicate" };
            let detail = format!("delivered again (attempt {}) without a cause: {gone_before}", seen.attempt);
            self.anomaly(name, &group, &seen.id, detail);
        }
        if with_resent == 1 && has_cause && !attempts.contains(&seen.attempt) {
            let detail = format!("attempt {}, expected {attempts:?} ({:?})", seen.attempt, rules.attempts);
            self.anomaly("attempt-mismatch", &group, &seen.id, detail);
        }
        if let Some(due) = due.filter(|due| at.saturating_add(PRECISION) < *due) {
            let early = Duration::from_micros(due - at);
            let detail = format!("attempt {} comes {early:?} before the delay of the nack has passed", seen.attempt);
            self.anomaly("early-redelivery", &group, &seen.id, detail);
        }
        // Where hand-overs count too, the number may pass the limit: a message that nobody failed is not buried for it.
        let counts_failures = rules.attempts != AttemptCount::Approximate;
        if counts_failures && max_attempts.is_some_and(|max| seen.attempt > max) {
            let detail = format!("attempt {} of at most {}", seen.attempt, max_attempts.unwrap_or_default());
            self.anomaly("attempt-mismatch", &group, &seen.id, detail);
        }
        if instructed {
            return;
        }
        let is_ordered = order == Order::Total || order == Order::Key && key.is_some();
        if first_delivery && is_ordered {
            let lane = if order == Order::Total { None } else { key.clone() };
            self.firsts.entry((place.clone(), producer, lane)).or_default().push(seen.id.clone());
        }
        if copies != 1 {
            return;
        }
        if is_ordered && on_failure != OnFailure::GoPast {
            self.overtaken(&place, &group, producer, &key, sequence, order, seen);
        }
        // Whoever has not been told of a loss has its keys still, and cannot know who else has them by now.
        if untold.is_none() {
            self.held_by_another(at, &place, &group, &key, order, seen);
        }
    }

    pub(super) fn settle(&mut self, at: u64, delivery: u64, verb: Verb, delay: u64) {
        let Some(member) = self.deliveries.get(&delivery).and_then(|(_, _, member)| self.members.get(member)) else {
            return;
        };
        let (max, client) = (member.max_attempts, member.client);
        let hits = if self.rules.atomic_burials { 0 } else { self.faults.hits(client) };
        let is_forgotten = self.rules.by_lease && self.faults.has_forgotten();
        if let Some(story) = self.story(delivery) {
            story.settle(at, Asked { delivery, verb, delay, hits, is_forgotten }, max);
        }
    }

    pub(super) fn settled(&mut self, at: u64, delivery: u64, level: AckLevel) {
        let (is_above_hole, by_lease) = (self.is_above_hole(delivery), self.rules.by_lease);
        match self.story(delivery).and_then(|story| story.settled(at, delivery, is_above_hole, level, by_lease)) {
            Some(Verb::Ack) => self.counts.acked += 1,
            Some(Verb::Nack) => self.counts.nacked += 1,
            _ => {}
        }
    }

    /// Whoever had a message that came again because a connection was lost says that it was.
    pub(super) fn unproven_losses(&mut self) {
        let mut found = Vec::new();
        for ((group, _), stories) in &self.stories {
            for (id, story) in stories {
                let is_proven = |member: u64, since: u64, until: u64| {
                    self.members.get(&member).is_some_and(|member| member.has_lost_between(since, until))
                };
                let unproven =
                    story.claims.iter().filter(|claim| !is_proven(claim.member, claim.since, claim.at + NOTICED));
                found.extend(unproven.map(|_| (group.to_string(), id.clone())));
            }
        }
        for (group, id) in found {
            self.counts.duplicates_justified = self.counts.duplicates_justified.saturating_sub(1);
            self.counts.duplicates_unjustified += 1;
            let detail =
                "delivered again in a fault, before its lease had ended, and no connection that had it was lost";
            self.anomaly("unjustified-duplicate", &group, &id, detail.into());
        }
    }
}
