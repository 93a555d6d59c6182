//! Reads a whole history and says what is wrong with it. Names follow Jepsen where it has one.

mod faults;
mod order;
mod story;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Capabilities, Destination, Group, MessageId, OnFailure, Order, Parallelism,
};
use serde::{Deserialize, Serialize};

use crate::history::{Event, Seen, Verb, What};
use crate::report::interned;
use faults::Faults;
use story::{Held, Returned, Story};

/// Something that must not be in a history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anomaly {
    /// Its class: `lost`, `phantom`, `unjustified-duplicate`, ….
    #[serde(deserialize_with = "interned::text")]
    pub name: interned::Text,
    /// The group it was seen in; empty where it concerns none.
    pub group: String,
    /// The message.
    pub id: String,
    /// What was expected and what was found.
    pub detail: String,
}

/// What a history is made of: evidence that something was observed at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Messages whose publish was confirmed.
    pub published_ok: u64,
    /// Messages that certainly were not stored.
    pub published_failed: u64,
    /// Messages that may have been stored.
    pub published_unknown: u64,
    /// Deliveries, each counted.
    pub delivered: u64,
    /// Deliveries of a message after an earlier one in the same group, each with a cause (nack, lease, close, …).
    pub duplicates_justified: u64,
    /// Those without a cause.
    pub duplicates_unjustified: u64,
    /// Confirmed acks.
    pub acked: u64,
    /// Confirmed nacks.
    pub nacked: u64,
    /// Settles that failed.
    pub settle_failed: u64,
    /// Dead letters read, each reading counted.
    pub letters_read: u64,
    /// Faults of connections or of the server.
    pub faults: u64,
    /// Those that met an operation in flight: a publish without an answer, a delivery that was not settled.
    pub faults_met: u64,
}

/// What of the capability record decides whether a history is a good one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) granularity: AckGranularity,
    pub(crate) level: AckLevel,
    pub(crate) attempts: AttemptCount,
    pub(crate) kept_before_group: bool,
    /// Members own lanes, which move when members come and go.
    pub(crate) lanes: bool,
}

impl Rules {
    pub(crate) fn of(record: &Capabilities) -> Self {
        Self {
            granularity: record.ack_granularity,
            level: record.ack_level,
            attempts: record.attempt_count,
            kept_before_group: record.kept_before_group.is_given(),
            lanes: matches!(record.parallelism, Parallelism::Lanes(_)),
        }
    }
}

/// Everything that is wrong with a history, and what it is made of.
pub(crate) fn check(events: &[Event], rules: Rules) -> (Vec<Anomaly>, Counts) {
    let mut checker = Checker { rules, ..Checker::default() };
    for (index, event) in events.iter().enumerate() {
        checker.observe(index, event);
    }
    checker.aborted_reads();
    checker.counts.faults_met = checker.faults.met();
    (checker.anomalies, checker.counts)
}

/// How long lanes may be on the move after members came or went.
const MOVING: u64 = 5_000_000;

/// Leases are told in whole milliseconds: one may end that much early.
const PRECISION: u64 = 1_000;

/// A publish of one message.
struct Publish {
    id: MessageId,
    destination: Destination,
    key: Option<Vec<u8>>,
    producer: u32,
    sequence: u64,
    digest: u64,
    instructed: bool,
    at: u64,
    index: usize,
    outcome: Option<bool>,
    duplicate: bool,
    /// Its answer is there, whatever it says.
    answered: bool,
    /// Faults that met it on its way: the client may have sent it again by itself.
    hits: u32,
}

struct Member {
    client: u32,
    group: Group,
    destinations: Vec<Destination>,
    order: Order,
    on_failure: OnFailure,
    /// When it came, in microseconds of the history.
    since: u64,
    lease: u64,
    max_attempts: Option<u32>,
    /// Closed, or gone: it holds nothing any more.
    gone: bool,
    /// Since when, and until when, what it holds may be lost with a connection that a fault has hit.
    exposed: Option<(u64, u64)>,
}

/// From which event on a group keeps what is published.
#[derive(Clone, Copy)]
struct Since {
    index: usize,
    earliest: bool,
}

type Place = (Group, Destination);

/// A place, a producer, and a key (none for all keys together).
type Stream = (Place, u32, Option<Vec<u8>>);

impl Default for Rules {
    fn default() -> Self {
        Self {
            granularity: AckGranularity::Individual,
            level: AckLevel::Confirmed,
            attempts: AttemptCount::Exact,
            kept_before_group: true,
            lanes: false,
        }
    }
}

#[derive(Default)]
struct Checker {
    rules: Rules,
    publishes: Vec<Publish>,
    /// Publish call to place in `publishes`.
    calls: HashMap<u64, usize>,
    by_id: HashMap<(Destination, MessageId), Vec<usize>>,
    members: HashMap<u64, Member>,
    since: HashMap<Place, Since>,
    /// When members of a group came or went last, or lanes of it moved.
    changed: HashMap<Group, u64>,
    stories: HashMap<Place, BTreeMap<MessageId, Story>>,
    /// Delivery to its place, message and member.
    deliveries: HashMap<u64, (Place, MessageId, u64)>,
    /// First deliveries per order: the highest sequence seen of a producer.
    highest: HashMap<Stream, (u64, MessageId)>,
    faults: Faults,
    anomalies: Vec<Anomaly>,
    counts: Counts,
}

impl Checker {
    fn observe(&mut self, index: usize, event: &Event) {
        match &event.what {
            What::PublishInvoke { call, id, destination, key, sequence, digest, instructed } => {
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
                    at: event.at,
                    index,
                    outcome: None,
                    duplicate: false,
                    answered: false,
                    hits,
                });
            }
            What::PublishOk { call, duplicate } => {
                self.counts.published_ok += 1;
                if let Some(publish) = self.publish(*call) {
                    (publish.outcome, publish.duplicate, publish.answered) = (Some(true), *duplicate, true);
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
            What::Declared { destination, group } => {
                let since = Since { index, earliest: true };
                self.since.entry((group.clone(), destination.clone())).or_insert(since);
            }
            What::SubscribeInvoke { subscription, group, .. } => self.change(event.at, *subscription, group.clone()),
            What::Assigned { subscription, .. } | What::Closed { subscription } => {
                self.change_of(event.at, *subscription);
            }
            What::Subscribed {
                subscription,
                group,
                destinations,
                order,
                on_failure,
                earliest,
                lease_micros,
                max_attempts,
            } => {
                self.change(event.at, *subscription, group.clone());
                for destination in destinations {
                    let since = Since { index, earliest: *earliest };
                    self.since.entry((group.clone(), destination.clone())).or_insert(since);
                }
                self.members.insert(
                    *subscription,
                    Member {
                        client: event.client,
                        group: group.clone(),
                        destinations: destinations.clone(),
                        order: *order,
                        on_failure: *on_failure,
                        since: event.at,
                        lease: *lease_micros,
                        max_attempts: *max_attempts,
                        gone: false,
                        exposed: self.faults.exposure(event.at, event.client),
                    },
                );
            }
            What::Deliver(seen) => self.deliver(event.at, seen),
            What::SettleInvoke { delivery, verb } => self.settle(event.at, *delivery, *verb),
            What::SettleOk { delivery, .. } => {
                self.settled(event.at, *delivery);
                self.settled_in_a_fault(event.at, *delivery);
            }
            What::SettleFail { delivery, kind, effect } => {
                self.counts.settle_failed += 1;
                if let Some(story) = self.story(*delivery) {
                    story.settle_failed(*delivery, *kind, *effect);
                }
            }
            What::Dropped { delivery } => {
                if let Some(story) = self.story(*delivery) {
                    story.give_back(event.at, *delivery, Returned::Dropped);
                }
            }
            What::Extended { delivery, until } => {
                if let Some(story) = self.story(*delivery) {
                    story.extend(*delivery, *until);
                }
            }
            What::LaneLost { subscription, lane } => self.lose(event.at, *subscription, Some(*lane)),
            What::Degraded { subscription } => self.lose(event.at, *subscription, None),
            What::CloseInvoke { subscription } => self.leave(event.at, *subscription, false),
            What::Vanished { subscription } => self.leave(event.at, *subscription, true),
            What::Letter { scan, destination, group, id, digest, reason, .. } => {
                self.counts.letters_read += 1;
                self.letter(*scan, &(group.clone(), destination.clone()), id, *digest, reason);
            }
            What::RedriveInvoke { destination, group, ids } => {
                for id in ids {
                    self.story_of(&(group.clone(), destination.clone()), id).redrive(event.at);
                }
            }
            What::PurgeInvoke { destination, group, ids } => {
                for id in ids {
                    self.story_of(&(group.clone(), destination.clone()), id).purged = true;
                }
            }
            What::Drained { destination, group, scan } => {
                self.drained(index, &(group.clone(), destination.clone()), *scan);
            }
            What::FaultBegin { fault, clients, .. } => self.fault_begins(event.at, *fault, clients),
            What::FaultEnd { fault, .. } => self.fault_ends(event.at, *fault),
            What::Hang { operation } => self.anomaly("hang", "", "", format!("`{operation}` did not end in time")),
        }
    }

    fn anomaly(&mut self, name: &'static str, group: &str, id: &(impl ToString + ?Sized), detail: String) {
        self.anomalies.push(Anomaly { name, group: group.to_owned(), id: id.to_string(), detail });
    }

    fn publish(&mut self, call: u64) -> Option<&mut Publish> {
        self.calls.get(&call).map(|place| &mut self.publishes[*place])
    }

    fn story_of(&mut self, place: &Place, id: &MessageId) -> &mut Story {
        let stories = self.stories.entry(place.clone()).or_default();
        stories.entry(id.clone()).or_default()
    }

    fn story(&mut self, delivery: u64) -> Option<&mut Story> {
        let (place, id, _) = self.deliveries.get(&delivery)?;
        self.stories.get_mut(place)?.get_mut(id)
    }

    /// How many copies of a message the destination may hold: publishes that did not certainly fail and were not
    /// deduplicated. One at least, because what failed certainly and is there all the same has a name of its own.
    fn copies(&self, destination: &Destination, id: &MessageId) -> u32 {
        let calls = self.by_id.get(&(destination.clone(), id.clone()));
        let count = calls.map_or(0, |calls| {
            let stored = |publish: &&Publish| publish.outcome != Some(false) && !publish.duplicate;
            calls.iter().filter(|call| stored(&&self.publishes[**call])).count()
        });
        u32::try_from(count).unwrap_or(u32::MAX).max(1)
    }

    /// How many more of them a client may have sent by itself, because a fault met it before it had the answer.
    fn resent(&self, destination: &Destination, id: &MessageId) -> u32 {
        let Some(calls) = self.by_id.get(&(destination.clone(), id.clone())) else { return 0 };
        calls
            .iter()
            .map(|call| &self.publishes[*call])
            .filter(|publish| publish.outcome != Some(false))
            .map(|publish| publish.hits)
            .sum()
    }

    fn deliver(&mut self, at: u64, seen: &Seen) {
        self.counts.delivered += 1;
        let Some(member) = self.members.get(&seen.subscription) else { return };
        let place = (member.group.clone(), seen.destination.clone());
        let (group, lease, order) = (member.group.to_string(), member.lease, member.order);
        let (since, exposed) = (member.since, member.exposed.is_some_and(|(_, until)| at <= until));
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
        // It may have come to be stored behind what was published later.
        let is_unknown = published.answered && published.outcome.is_none();
        let same = self.by_id[&(seen.destination.clone(), seen.id.clone())]
            .iter()
            .any(|call| self.publishes[*call].digest == seen.digest);
        if !same {
            let detail = format!("body, key, headers, content type or time differ; payload begins {:?}", seen.excerpt);
            self.anomaly("altered", &group, &seen.id, detail);
        }

        let (rules, number) = (self.rules, self.counts.delivered);
        let moved = self.lanes_moved(&place.0);
        let story = self.story_of(&place, &seen.id);
        let justified = story.justify(at, with_resent, moved);
        let (again, acked) = (story.deliveries > 0, story.acked > 0);
        let attempts = story.attempts(rules.attempts);
        let gone_before = story.outstanding_summary();
        let first_delivery = !again;
        story.deliver(Held {
            at,
            delivery: seen.delivery,
            member: seen.subscription,
            // It cannot have been leased before it was there, and neither can it have been before the member was.
            // On a connection that a fault has hit it may be lost at once.
            until: match exposed {
                true => at,
                false => story.back_at().max(published_at).max(since).saturating_add(lease).saturating_sub(PRECISION),
            },
            lane: seen.lane,
            position: seen.position,
            attempt: seen.attempt,
            order: number,
        });
        self.deliveries.insert(seen.delivery, (place.clone(), seen.id.clone(), seen.subscription));

        if again && justified {
            self.counts.duplicates_justified += 1;
        } else if !justified {
            self.counts.duplicates_unjustified += 1;
            let name = if acked { "ack-lost" } else { "unjustified-duplicate" };
            let detail = format!("delivered again (attempt {}) without a cause: {gone_before}", seen.attempt);
            self.anomaly(name, &group, &seen.id, detail);
        }
        if with_resent == 1 && justified && !attempts.contains(&seen.attempt) {
            let detail = format!("attempt {}, expected {attempts:?} ({:?})", seen.attempt, rules.attempts);
            self.anomaly("attempt-mismatch", &group, &seen.id, detail);
        }
        // Where hand-overs count too, the number may pass the limit: a message that nobody failed is not buried for it.
        let counts_failures = rules.attempts != AttemptCount::Approximate;
        if counts_failures && max_attempts.is_some_and(|max| seen.attempt > max) {
            let detail = format!("attempt {} of at most {}", seen.attempt, max_attempts.unwrap_or_default());
            self.anomaly("attempt-mismatch", &group, &seen.id, detail);
        }
        if order == Order::None || (order == Order::Key && key.is_none()) || copies != 1 || instructed {
            return;
        }
        let lane = if order == Order::Total { None } else { key.clone() };
        if first_delivery && !is_unknown {
            self.first_delivery(&place, &group, producer, &lane, sequence, &key, seen);
        }
        if on_failure != OnFailure::GoPast {
            self.overtaken(&place, &group, producer, &key, sequence, order, seen);
        }
        self.held_by_another(at, &place, &group, &key, order, seen);
    }

    fn settle(&mut self, at: u64, delivery: u64, verb: Verb) {
        let Some((_, _, member)) = self.deliveries.get(&delivery) else { return };
        let max = self.members.get(member).and_then(|member| member.max_attempts);
        if let Some(story) = self.story(delivery) {
            story.settle(at, delivery, verb, max);
        }
    }

    fn settled(&mut self, at: u64, delivery: u64) {
        let is_above_hole = self.is_above_hole(delivery);
        match self.story(delivery).and_then(|story| story.settled(at, delivery, is_above_hole)) {
            Some(Verb::Ack) => self.counts.acked += 1,
            Some(Verb::Nack) => self.counts.nacked += 1,
            _ => {}
        }
    }

    /// A member is gone: what it held comes back, and where only prefixes are kept, so may what it acked above a hole.
    fn leave(&mut self, at: u64, subscription: u64, crash: bool) {
        self.change_of(at, subscription);
        let Some(member) = self.members.get_mut(&subscription) else { return };
        member.gone = true;
        let forgetful = crash && self.rules.level != AckLevel::Confirmed;
        self.forget_acks(subscription, None, forgetful.then_some(0));
        self.each_story(subscription, |story| story.leave(at, subscription));
    }

    /// A connection or a lane was lost: what was out of it may come again, and may still be settled where the broker
    /// does not mind.
    fn lose(&mut self, at: u64, subscription: u64, lane: Option<u32>) {
        self.change_of(at, subscription);
        let since = self.forgetful_since(at, subscription);
        self.forget_acks(subscription, lane, since);
        self.each_story(subscription, |story| story.lose(at, subscription, lane));
    }

    /// A member comes or goes: lanes move, where there are others.
    fn change(&mut self, at: u64, subscription: u64, group: Group) {
        let mut others = self.members.iter().filter(|(number, _)| **number != subscription);
        if others.any(|(_, member)| !member.gone && member.group == group) {
            self.changed.insert(group, at);
        }
    }

    fn change_of(&mut self, at: u64, subscription: u64) {
        if let Some(group) = self.members.get(&subscription).map(|member| member.group.clone()) {
            self.change(at, subscription, group);
        }
    }

    /// Where members own lanes: until when a delivery may be somebody else's, or an ack above a hole forgotten,
    /// because members came or went. A member is told when it receives next, which may be later.
    fn lanes_moved(&self, group: &Group) -> Option<u64> {
        let changed = self.rules.lanes.then(|| self.changed.get(group).copied()).flatten()?;
        Some(changed.saturating_add(MOVING))
    }

    /// Where only prefixes are kept: whether something before this delivery of its lane is unsettled.
    fn is_above_hole(&self, delivery: u64) -> bool {
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

    fn each_story(&mut self, subscription: u64, mut change: impl FnMut(&mut Story)) {
        let Some(member) = self.members.get(&subscription) else { return };
        for destination in &member.destinations {
            if let Some(stories) = self.stories.get_mut(&(member.group.clone(), destination.clone())) {
                stories.values_mut().for_each(&mut change);
            }
        }
    }

    /// Which acks of a member that goes may be forgotten: all of them that were told of since then, or those above a hole of
    /// their lane.
    fn forget_acks(&mut self, subscription: u64, lane: Option<u32>, since: Option<u64>) {
        let prefix = self.rules.granularity == AckGranularity::Prefix;
        let mut holes: HashMap<u32, u64> = HashMap::new();
        self.each_story(subscription, |story| {
            for (lane, place) in story.holes(subscription) {
                holes.entry(lane).and_modify(|lowest| *lowest = place.min(*lowest)).or_insert(place);
            }
        });
        self.each_story(subscription, |story| {
            story.forget_acks(subscription, lane, since, |lane, place| {
                prefix && holes.get(&lane).is_some_and(|hole| place > *hole)
            });
        });
    }

    fn letter(&mut self, scan: u64, place: &Place, id: &MessageId, digest: u64, reason: &str) {
        let group = place.0.to_string();
        let calls = self.by_id.get(&(place.1.clone(), id.clone())).cloned().unwrap_or_default();
        if calls.is_empty() {
            return self.anomaly("phantom", &group, id, "a dead letter that was never published here".into());
        }
        if !calls.iter().any(|call| self.publishes[*call].digest == digest) {
            self.anomaly("altered", &group, id, "the dead letter differs from what was published".into());
        }
        let copies = self.copies(&place.1, id);
        let story = self.story_of(place, id);
        let times = story.letter(scan);
        let (allowed, buried) = (story.buried.max(copies), story.buried);
        if times > allowed {
            let detail = format!("{times} letters of one message in one reading, {buried} were buried");
            self.anomaly("dead-letter-duplicate", &group, id, detail);
        } else if buried == 0 && matches!(reason, "attempts_exhausted" | "rejected") {
            let detail = format!("a dead letter (reason {reason}) that nobody buried");
            self.anomaly("unjustified-dead-letter", &group, id, detail);
        }
    }

    /// Nothing more comes: every confirmed message of the group must be accounted for.
    fn drained(&mut self, index: usize, place: &Place, scan: Option<u64>) {
        let Some(since) = self.since.get(place).copied() else { return };
        let group = place.0.to_string();
        let mut found = Vec::new();
        for publish in &self.publishes {
            if publish.destination != place.1 || publish.outcome != Some(true) || publish.index > index {
                continue;
            }
            if publish.index < since.index && !(since.earliest && self.rules.kept_before_group) {
                continue;
            }
            let story = self.stories.get(place).and_then(|stories| stories.get(&publish.id));
            let verdict = match story {
                None => Some(("lost", "published, and neither delivered nor a dead letter".to_owned())),
                Some(story) => story.verdict(scan),
            };
            if let Some((name, detail)) = verdict {
                found.push((name, publish.id.clone(), detail));
            }
        }
        found.dedup();
        for (name, id, detail) in found {
            self.anomaly(name, &group, &id, detail);
        }
    }

    fn aborted_reads(&mut self) {
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
