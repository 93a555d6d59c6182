//! What a fault justifies: that comes twice what was in flight on a connection that it hit, and nothing else.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use anybroker_core::AckLevel;

use super::Checker;
use super::story::Forgetting;
use crate::history::micros;

/// How long after a fault a member may hand out what it had from the connection that is gone, because it has not been told.
const EXPOSED: u64 = 5_000_000;

/// Where an ack is sent without an answer: how long before a loss it may have been told of and still be on its way.
const SENT: Duration = Duration::from_secs(2);

/// Where it is only recorded, it may also wait until the client tells the broker of many at once.
const RECORDED: Duration = Duration::from_secs(15);

/// How long after it was told as done an ack of that level may still be forgotten with whoever made it.
pub(crate) fn may_be_under_way(level: AckLevel) -> Duration {
    match level {
        AckLevel::Confirmed => Duration::ZERO,
        AckLevel::Sent => SENT,
        _ => RECORDED,
    }
}

/// Where a killed server may forget acks: how long before its end it may have confirmed them. JetStream writes a consumer's
/// state behind the answers (nats-server, filestore.go, `consumerFileStore.flushLoop`), and Pulsar answers before the cursor is stored
/// (Consumer.java, `individualAckNormal`); both within a fraction of a second, on a busy machine later.
const UNWRITTEN: u64 = 1_000_000;

/// How long after nodes of a cluster are gone others may take to lead in their place. JetStream's followers wait up to 9 s for a leader
/// that is silent (nats-server, raft.go, `maxElectionTimeoutDefault`), Kafka's controller for a broker (`broker.session.timeout.ms`) as long.
const ELECTED: u64 = 10_000_000;

/// The faults of a history.
#[derive(Default)]
pub(super) struct Faults {
    /// Those that last, with the clients they hit, and since when.
    active: HashMap<u64, (Vec<u32>, u64)>,
    met: HashSet<u64>,
    /// Clients that have asked for a redrive and were told nothing.
    redriving: HashSet<u32>,
    /// Which of them is the end of a server that forgets, and when the next one was there.
    forgetful: Option<(u64, u64)>,
    /// Which of them is of a cluster's nodes, and when others lead at the latest.
    led_anew: Option<(u64, u64)>,
}

impl Faults {
    /// How many met an operation in flight.
    pub(super) fn met(&self) -> u64 {
        self.met.len() as u64
    }

    /// This client has something in flight now; how many faults that meets.
    pub(super) fn meet(&mut self, client: u32) -> u32 {
        let mut hits = 0;
        for (fault, (clients, _)) in &self.active {
            if clients.contains(&client) {
                self.met.insert(*fault);
                hits += 1;
            }
        }
        hits
    }

    /// This client has asked for a redrive, and is not told what became of it.
    pub(super) fn redrives(&mut self, client: u32) {
        self.redriving.insert(client);
        self.meet(client);
    }

    /// How many that last hit this client.
    pub(super) fn hits(&self, client: u32) -> u32 {
        let hits = self.active.values().filter(|(clients, _)| clients.contains(&client)).count();
        u32::try_from(hits).unwrap_or(u32::MAX)
    }

    /// Whether what members have may be forgotten by the server.
    pub(super) fn is_forgotten(&self, at: u64) -> bool {
        [self.forgetful, self.led_anew].into_iter().flatten().any(|(_, over)| at <= over.saturating_add(EXPOSED))
    }

    /// Whether a server was killed that forgets what it has delivered.
    pub(super) fn has_forgotten(&self) -> bool {
        self.forgetful.is_some()
    }

    /// Since when and until when a member that this client opens now is exposed.
    pub(super) fn exposure(&self, at: u64, client: u32) -> Option<(u64, u64)> {
        self.is_hit(client).then_some((at, u64::MAX))
    }

    /// Whether a fault that lasts hits this client.
    pub(super) fn is_hit(&self, client: u32) -> bool {
        self.hits(client) > 0
    }
}

impl Checker {
    pub(super) fn fault_begins(&mut self, at: u64, fault: u64, clients: &[u32]) {
        self.counts.faults += 1;
        self.recovery.begins(clients);
        self.faults.active.insert(fault, (clients.to_vec(), at));
        let mut met = clients.iter().any(|client| self.faults.redriving.contains(client));
        for publish in self.publishes.iter_mut().filter(|publish| clients.contains(&publish.producer)) {
            if !publish.answered {
                publish.hits += 1;
                met = true;
            }
        }
        for subscription in self.members_of(clients) {
            met |= self.is_holding(subscription);
            if let Some(member) = self.members.get_mut(&subscription) {
                let exposed = member.exposed.filter(|(_, until)| at <= *until);
                member.exposed = Some((exposed.map_or(at, |(since, _)| since), u64::MAX));
                member.untold = Some(member.untold.filter(|_| exposed.is_some()).unwrap_or(at));
            }
            if !self.rules.atomic_burials {
                self.each_story(subscription, |story| story.burials_are_met(subscription));
            }
            // Nobody was told of a loss yet; where the broker's own lease gives deliveries to others, none ends.
            let ends = !self.rules.by_lease || self.faults.is_forgotten(at);
            self.lose(at, subscription, None, ends);
        }
        if met {
            self.faults.met.insert(fault);
        }
    }

    /// The server ends about now. It may forget the last acks that it has confirmed, each of which may come again once; and what
    /// it has delivered, which comes again before the lease ends.
    pub(super) fn server_killed(&mut self, at: u64, fault: u64) {
        self.faults.forgetful = Some((fault, u64::MAX));
        let stories = self.stories.values_mut().flat_map(BTreeMap::values_mut);
        stories.for_each(|story| story.server_forgets(at.saturating_sub(UNWRITTEN)));
    }

    /// Others lead soon what nodes of a cluster have led. They know what was confirmed, and may not know what was delivered, which
    /// comes again before the lease ends.
    pub(super) fn leaders_change(&mut self, at: u64, fault: u64) {
        self.faults.led_anew = Some((fault, at.saturating_add(ELECTED)));
    }

    pub(super) fn fault_ends(&mut self, at: u64, fault: u64) {
        let Faults { forgetful, led_anew, .. } = &mut self.faults;
        for (_, over) in [forgetful, led_anew].into_iter().flatten().filter(|(own, _)| *own == fault) {
            *over = at;
        }
        let Some((clients, _)) = self.faults.active.remove(&fault) else { return };
        for client in &clients {
            if !self.faults.is_hit(*client) {
                self.recovery.ends(at, *client);
            }
        }
        for subscription in self.members_of(&clients) {
            let client = self.members[&subscription].client;
            let still = self.faults.is_hit(client);
            if let Some((_, until)) = self.members.get_mut(&subscription).and_then(|member| member.exposed.as_mut()) {
                *until = if still { u64::MAX } else { at.saturating_add(EXPOSED) };
            }
        }
    }

    /// What is told as settled while a fault lasts may not have arrived, where the level does not say that it has.
    pub(super) fn settled_in_a_fault(&mut self, at: u64, delivery: u64) {
        if let Some((_, over)) = self.faults.forgetful
            && at <= over.saturating_add(EXPOSED)
            && let Some(story) = self.story(delivery)
        {
            // The event is noted before the server is killed; and of what the old server delivered the new one may know nothing,
            // and confirms an ack of it without effect.
            return story.server_forgets_what_it_delivered(delivery, over);
        }
        let Some((_, _, subscription)) = self.deliveries.get(&delivery) else { return };
        let Some(member) = self.members.get(subscription) else { return };
        let exposed = member.exposed.is_some_and(|(since, until)| (since..=until).contains(&at));
        if !exposed || self.rules.level == AckLevel::Confirmed {
            return;
        }
        if let Some(story) = self.story(delivery) {
            story.may_be_forgotten(at, delivery);
        }
    }

    /// What a member has settled and may be forgotten with its connection; `None` where the level says that it has arrived.
    pub(super) fn forgetting(&self, at: u64, subscription: u64) -> Option<Forgetting> {
        if self.rules.level == AckLevel::Confirmed {
            return None;
        }
        let on_its_way = micros(may_be_under_way(self.rules.level));
        let exposed = self.members.get(&subscription).and_then(|member| member.exposed);
        let exposed = exposed.filter(|(_, until)| at <= *until);
        let since = exposed.map_or(at, |(since, _)| since).saturating_sub(on_its_way);
        Some(Forgetting { since, in_a_fault: exposed.is_some(), is_gone: false })
    }

    fn members_of(&self, clients: &[u32]) -> Vec<u64> {
        let of = self.members.iter().filter(|(_, member)| !member.gone && clients.contains(&member.client));
        of.map(|(subscription, _)| *subscription).collect()
    }

    fn is_holding(&self, subscription: u64) -> bool {
        let member = &self.members[&subscription];
        member.destinations.iter().any(|destination| {
            let stories = self.stories.get(&(member.group.clone(), destination.clone()));
            stories.is_some_and(|stories| stories.values().any(|story| story.is_with(subscription)))
        })
    }
}
