//! Reads a whole history and says what is wrong with it. Names follow Jepsen where it has one.

mod deliveries;
mod ends;
mod faults;
mod letters;
mod members;
mod order;
mod positions;
mod publishes;
mod recovery;
mod story;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Capabilities, DeadLetterAtomicity, Destination, Group, MessageId,
    Parallelism, Support,
};
use serde::{Deserialize, Serialize};

use crate::faults::{KILLED, NODES};
use crate::history::{Event, What};
use crate::report::interned;
use faults::Faults;
pub(crate) use faults::may_be_under_way;
use letters::Letter;
use members::Member;
use positions::Positions;
use publishes::Publish;
use recovery::Recovery;
use story::{Returned, Story};

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
    /// The longest that a client which a fault had hit took, from the end of the fault, until a publish was confirmed to it or a message
    /// came to it, in milliseconds; none where there was no fault, or none of them did that again. An upper bound: a client that had
    /// nothing to do waits as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_ms: Option<u64>,
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
    /// What a member has is given to another when the broker's own lease ends, and not with a connection.
    pub(crate) by_lease: bool,
    /// Hand-overs without an outcome are counted as the history shows them, and not what was only fetched as well.
    pub(crate) hand_overs: bool,
    /// A dead letter and the end of its source are one step: no fault doubles the letter.
    pub(crate) atomic_burials: bool,
    /// A server that is killed may forget acks that it has just confirmed, and what it has just delivered.
    pub(crate) forgets: bool,
    /// How long the broker remembers ids and stores none of them twice, in microseconds.
    pub(crate) dedup: Option<u64>,
}

impl Rules {
    pub(crate) fn of(record: &Capabilities) -> Self {
        Self {
            granularity: record.ack_granularity,
            level: record.ack_level,
            attempts: record.attempt_count,
            kept_before_group: record.kept_before_group.is_given(),
            lanes: matches!(record.parallelism, Parallelism::Lanes(_)),
            by_lease: matches!(record.lease, Support::Native),
            hand_overs: matches!(record.crash_count, Support::Native),
            atomic_burials: record.dead_letter_atomicity == DeadLetterAtomicity::Atomic,
            forgets: matches!(record.survives_process_kill, Support::Emulated(_)),
            dedup: record.limits.dedup_window_ms.map(|millis| millis.saturating_mul(1_000)),
        }
    }
}

/// Everything that is wrong with a history, and what it is made of.
pub(crate) fn check(events: &[Event], rules: Rules) -> (Vec<Anomaly>, Counts) {
    let mut checker = Checker { rules, ..Checker::default() };
    for (index, event) in events.iter().enumerate() {
        checker.observe(index, event);
    }
    checker.never_recovered(events.last().map_or(0, |event| event.at));
    checker.reorders();
    checker.aborted_reads();
    checker.unproven_losses();
    checker.counts.faults_met = checker.faults.met();
    checker.counts.recovery_ms = checker.recovery.longest();
    (checker.anomalies, checker.counts)
}

/// Whether something of the group is missing in a history that ends here.
pub(crate) fn lacks(events: &[Event], group: &Group, rules: Rules) -> bool {
    let is_loss = |anomaly: &Anomaly| anomaly.group == group.as_str() && matches!(anomaly.name, "lost" | "nack-lost");
    check(events, rules).0.iter().any(is_loss)
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
            by_lease: false,
            hand_overs: true,
            atomic_burials: false,
            forgets: false,
            dedup: None,
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
    /// What was delivered for the first time, of each producer and key where that has an order.
    firsts: BTreeMap<Stream, Vec<MessageId>>,
    positions: Positions,
    faults: Faults,
    recovery: Recovery,
    anomalies: Vec<Anomaly>,
    counts: Counts,
}

impl Checker {
    fn observe(&mut self, index: usize, event: &Event) {
        if matches!(event.what, What::PublishOk { .. } | What::Deliver(_)) {
            self.recovery.works(event.at, event.client);
        }
        match &event.what {
            What::PublishInvoke { .. }
            | What::PublishOk { .. }
            | What::PublishFail { .. }
            | What::PublishInfo { .. } => self.published(index, event),
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
                crash_limit,
            } => {
                self.change(event.at, *subscription, group.clone());
                for destination in destinations {
                    let since = Since { index, earliest: *earliest };
                    self.since.entry((group.clone(), destination.clone())).or_insert(since);
                }
                let exposed = self.faults.exposure(event.at, event.client);
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
                        crash_limit: *crash_limit,
                        gone: false,
                        exposed,
                        untold: exposed.map(|(since, _)| since),
                        losses: Vec::new(),
                    },
                );
            }
            What::Deliver(seen) => self.deliver(event.at, seen),
            What::SettleInvoke { delivery, verb, delay } => self.settle(event.at, *delivery, *verb, *delay),
            What::SettleOk { delivery, level } => {
                self.settled(event.at, *delivery, *level);
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
            What::LaneLost { subscription, lane } => self.has_lost(event.at, *subscription, Some(*lane)),
            What::Degraded { subscription } => {
                self.positions.degraded(event.at, *subscription);
                self.has_lost(event.at, *subscription, None);
            }
            What::Recovered { subscription } => self.recovered(event.at, *subscription),
            What::CloseInvoke { subscription } => self.leave(event.at, *subscription, false),
            What::Vanished { subscription } => self.leave(event.at, *subscription, true),
            What::Letter { scan, destination, group, id, digest, reason, attempts } => {
                self.counts.letters_read += 1;
                let letter = Letter { at: event.at, id, digest: *digest, reason, attempts: *attempts };
                self.letter(*scan, &(group.clone(), destination.clone()), &letter);
            }
            What::RedriveInvoke { destination, group, ids } => {
                for id in ids {
                    self.story_of(&(group.clone(), destination.clone()), id).redrive(event.at);
                }
            }
            What::RedriveInfo { destination, group, ids } => {
                if !ids.is_empty() {
                    self.faults.redrives(event.client);
                }
                for id in ids {
                    self.story_of(&(group.clone(), destination.clone()), id).redrive_unknown();
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
            What::FaultBegin { fault, kind, clients, .. } => {
                if kind == KILLED && self.rules.forgets {
                    self.server_killed(event.at, *fault);
                }
                if kind.starts_with(NODES) && self.rules.forgets {
                    self.leaders_change(event.at, *fault);
                }
                self.fault_begins(event.at, *fault, clients);
            }
            What::FaultEnd { fault, .. } => self.fault_ends(event.at, *fault),
            What::Hang { operation } => self.anomaly("hang", "", "", format!("`{operation}` did not end in time")),
        }
    }

    fn anomaly(&mut self, name: &'static str, group: &str, id: &(impl ToString + ?Sized), detail: String) {
        self.anomalies.push(Anomaly { name, group: group.to_owned(), id: id.to_string(), detail });
    }

    fn story_of(&mut self, place: &Place, id: &MessageId) -> &mut Story {
        let stories = self.stories.entry(place.clone()).or_default();
        stories.entry(id.clone()).or_default()
    }

    fn story(&mut self, delivery: u64) -> Option<&mut Story> {
        let (place, id, _) = self.deliveries.get(&delivery)?;
        self.stories.get_mut(place)?.get_mut(id)
    }
}
