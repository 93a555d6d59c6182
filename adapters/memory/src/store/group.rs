//! A group's place in a lane: what it has seen, what is out, what waits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anybroker_core::{Figure, Lag, OnFailure, Order, Precision, Start, Timestamp};
use tokio::sync::Notify;

use super::duty::{Duty, LaneEvent};
use super::flight::{Flight, Leases, NONE, Slot};
use super::keys::Keys;
use super::letters::Letters;
use super::log::Log;
use super::pending::Pending;
use super::settled::Return;
use crate::profile::Manner;

/// One group of one lane. Everything behind `cursor` has been looked at; what of it is not settled is out, waits, or is a
/// dead letter.
#[derive(Debug)]
pub(crate) struct GroupState {
    pub(crate) uid: u64,
    pub(super) order: Order,
    pub(super) on_failure: OnFailure,
    /// A subscription has said which order it keeps.
    ordered: bool,
    pub(super) cursor: u64,
    /// At or behind the cursor to come, and dealt with already: delayed, expired, or not there.
    pub(super) skip: BTreeSet<u64>,
    pub(super) flight: Flight,
    pub(super) members: Vec<Option<Member>>,
    /// Came back, may go out again, has no order to keep.
    pub(super) returned: BTreeMap<u64, Pending>,
    pub(super) delayed: BTreeMap<(Timestamp, u64), Pending>,
    pub(super) expiring: BTreeSet<(Timestamp, u64)>,
    pub(super) keys: Keys,
    pub(super) letters: Letters,
    /// Redriven letters that are not settled; the log does not count them.
    pub(super) redriven: usize,
    /// Whose turn it is when only one message is asked for.
    pub(super) new_first: bool,
    pub(super) manner: Manner,
    /// Who works on the lane, where one member does.
    pub(super) duty: Option<Duty>,
    /// Members that held something too long, where that costs them their lanes.
    pub(super) suspects: Vec<u32>,
    /// Acked above something unsettled, where only the prefix counts.
    pub(super) above: BTreeMap<u64, Pending>,
}

/// One subscription in a group.
#[derive(Debug)]
pub(crate) struct Member {
    pub(super) leases: Leases,
    /// Keys of this member that have something to deliver.
    pub(super) keys: std::collections::VecDeque<u32>,
    events: Vec<LaneEvent>,
    /// It gets no lanes until it receives again.
    dead: bool,
    pub(super) epoch: u32,
    wake: Arc<Notify>,
    waiting: bool,
}

impl GroupState {
    /// A new group that starts at `start`, which opens the messages from there on.
    pub(crate) fn new(uid: u64, letters: Letters, log: &mut Log, start: Start, manner: Manner, now: Timestamp) -> Self {
        let cursor = match start {
            _ if !manner.kept_before_group => log.next(),
            Start::Latest => log.next(),
            Start::Time(moment) => log.first_at(moment),
            Start::Position(position) => position.major.clamp(log.base(), log.next()),
            _ => log.base(),
        };
        let mut group = Self {
            uid,
            order: Order::None,
            on_failure: OnFailure::GoPast,
            ordered: false,
            cursor,
            skip: BTreeSet::new(),
            flight: Flight::default(),
            members: Vec::new(),
            returned: BTreeMap::new(),
            delayed: BTreeMap::new(),
            expiring: BTreeSet::new(),
            keys: Keys::default(),
            letters,
            redriven: 0,
            new_first: false,
            manner,
            duty: (manner.lanes > 1).then(Duty::default),
            suspects: Vec::new(),
            above: BTreeMap::new(),
        };
        log.open_from(cursor, now, |sequence, wanted, instructions| {
            if wanted {
                let not_before = instructions.not_before.filter(|moment| *moment > now);
                group.stored(sequence, not_before, instructions.expires);
            } else {
                group.skip.insert(sequence);
            }
        });
        group
    }

    /// Notes what the publisher of a new message asked for.
    pub(crate) fn stored(&mut self, sequence: u64, not_before: Option<Timestamp>, expires: Option<Timestamp>) {
        if let Some(moment) = not_before {
            self.skip.insert(sequence);
            self.delayed.insert((moment, sequence), Pending::unseen(sequence, moment));
        }
        if let Some(moment) = expires {
            self.expiring.insert((moment, sequence));
        }
    }

    /// Whether a subscription with that order may join: it must agree with those that are open.
    pub(crate) fn agrees(&self, order: Order, on_failure: OnFailure) -> bool {
        !self.ordered
            || self.members.iter().flatten().next().is_none()
            || (self.order, self.on_failure) == (order, on_failure)
    }

    /// Adds a member, and takes over its order where it is the first.
    pub(crate) fn join(
        &mut self,
        log: &mut Log,
        order: Order,
        on_failure: OnFailure,
        wake: Arc<Notify>,
        now: Timestamp,
    ) -> u32 {
        if (self.order, self.on_failure) != (order, on_failure) {
            self.reorder(log, order, on_failure, now);
        }
        self.ordered = true;
        let member = Member {
            leases: Leases::default(),
            keys: Default::default(),
            events: Vec::new(),
            dead: false,
            epoch: 0,
            wake,
            waiting: false,
        };
        let place = self.members.iter().position(Option::is_none).unwrap_or_else(|| {
            self.members.push(None);
            self.members.len() - 1
        });
        self.members[place] = Some(member);
        u32::try_from(place).expect("fewer members than a u32 counts")
    }

    /// Nobody has anything out: what waits is sorted anew.
    fn reorder(&mut self, log: &mut Log, order: Order, on_failure: OnFailure, now: Timestamp) {
        (self.order, self.on_failure) = (order, on_failure);
        let (mut waiting, fresh) = self.keys.drain();
        waiting.extend(fresh.into_iter().map(|sequence| Pending::unseen(sequence, Timestamp::default())));
        waiting.extend(std::mem::take(&mut self.returned).into_values());
        waiting.sort_by_key(|pending| pending.sequence);
        if on_failure == OnFailure::Park {
            for letter in self.letters.iter().filter(|letter| letter.parks()) {
                let key = self.keys.of(order, &letter.message);
                if key != NONE {
                    self.keys.key_mut(key).queue_mut().letters.insert(letter.sequence);
                }
            }
        }
        waiting.into_iter().for_each(|pending| self.requeue(log, pending, None, now));
    }

    /// Lets a member go; what it has out comes back.
    pub(crate) fn leave(&mut self, log: &mut Log, member: u32, now: Timestamp) {
        self.dismiss(log, member, now);
        if let Some(place) = self.members.get_mut(member as usize)
            && let Some(gone) = place.take()
        {
            // Keys that were its own to take have no owner any more; they were listed anew when the last one came back.
            debug_assert!(gone.keys.iter().all(|key| self.keys.key(*key).owner != member));
        }
        self.wake();
    }

    /// Takes everything back that a member has out.
    pub(crate) fn recall(&mut self, log: &mut Log, member: u32, how: &Return, now: Timestamp) {
        while let Some(slot) = self.first_of(member, None) {
            self.come_back(log, slot, how, now);
        }
    }

    /// Takes the member's delivery whose lease ends first (by `due`, where that is asked for).
    fn first_of(&mut self, member: u32, due: Option<Timestamp>) -> Option<Slot> {
        let leases = &mut self.members.get_mut(member as usize)?.as_mut()?.leases;
        let (number, until) = self.flight.first(leases)?;
        due.is_none_or(|due| until <= due).then(|| self.flight.remove(leases, number))
    }

    /// Does what is due by `now`: leases that ended, delays that ended, messages that expired.
    pub(crate) fn advance(&mut self, log: &mut Log, now: Timestamp) {
        for member in 0..self.members.len() {
            let mut ended = false;
            while let Some(slot) = self.first_of(member as u32, Some(now)) {
                self.come_back(log, slot, &Return::Lost, now);
                ended = true;
            }
            if ended {
                self.suspect(member as u32);
            }
        }
        while self.delayed.first_key_value().is_some_and(|((moment, _), _)| *moment <= now) {
            if let Some((_, pending)) = self.delayed.pop_first() {
                self.requeue(log, pending, None, now);
            }
        }
        self.move_lane(log, now);
        while let Some(key) = self.keys.pop_timer(now) {
            self.list(key, now);
            self.wake();
        }
        while self.expiring.first().is_some_and(|(moment, _)| *moment <= now) {
            if let Some((moment, sequence)) = self.expiring.pop_first() {
                self.expire(log, sequence, moment);
            }
        }
    }

    /// The next moment at which something is to be done.
    pub(crate) fn next_due(&self) -> Option<Timestamp> {
        let leases = self.members.iter().flatten().filter_map(|member| self.flight.first(&member.leases));
        let delayed = self.delayed.first_key_value().map(|((moment, _), _)| *moment);
        let expiring = self.expiring.first().map(|(moment, _)| *moment);
        let moments = [delayed, expiring, self.keys.next_timer(), self.duty_ends()];
        leases.map(|(_, until)| until).chain(moments.into_iter().flatten()).min()
    }

    /// The member waits for the next wake-up.
    pub(crate) fn wait(&mut self, member: u32) {
        if let Some(Some(member)) = self.members.get_mut(member as usize) {
            member.waiting = true;
        }
    }

    /// Wakes everyone who waits: one of them might be gone by the time it runs, so that waking one is not enough.
    pub(crate) fn wake(&mut self) {
        for member in self.members.iter_mut().flatten().filter(|member| member.waiting) {
            member.waiting = false;
            member.wake.notify_one();
        }
    }

    /// The members that get lanes, in a stable order.
    pub(crate) fn members(&self) -> Vec<u32> {
        let alive = |(number, member): (u32, &Option<Member>)| member.as_ref().filter(|it| !it.dead).map(|_| number);
        (0..).zip(&self.members).filter_map(alive).collect()
    }

    pub(crate) fn is_dead(&self, member: u32) -> bool {
        self.members.get(member as usize).and_then(Option::as_ref).is_some_and(|member| member.dead)
    }

    pub(crate) fn set_dead(&mut self, member: u32, dead: bool) {
        if let Some(Some(member)) = self.members.get_mut(member as usize) {
            member.dead = dead;
        }
    }

    pub(super) fn holds(&self, member: u32) -> bool {
        let leases = self.members.get(member as usize).and_then(Option::as_ref).map(|member| &member.leases);
        leases.is_some_and(|leases| self.flight.first(leases).is_some())
    }

    pub(super) fn is_member(&self, member: u32) -> bool {
        self.members.get(member as usize).is_some_and(Option::is_some)
    }

    /// What the member has not been told yet.
    pub(crate) fn events(&mut self, member: u32) -> Vec<LaneEvent> {
        self.members[member as usize].as_mut().map(|member| std::mem::take(&mut member.events)).unwrap_or_default()
    }

    pub(super) fn tell(&mut self, member: u32, event: LaneEvent) {
        if let Some(Some(member)) = self.members.get_mut(member as usize) {
            member.events.push(event);
        }
        self.wake();
    }

    pub(super) fn epoch(&self, member: u32) -> u32 {
        self.members.get(member as usize).and_then(Option::as_ref).map_or(0, |member| member.epoch)
    }

    pub(super) fn set_epoch(&mut self, member: u32, epoch: u32) {
        if let Some(Some(member)) = self.members.get_mut(member as usize) {
            member.epoch = epoch;
        }
    }

    /// What it has left to do.
    pub(crate) fn lag(&self, log: &Log, now: Timestamp) -> Lag {
        let (in_keys, held_back) = self.keys.waiting(now);
        let unseen = log.next() - self.cursor - self.skip.len() as u64;
        let exact = |count: u64| -> Figure { Some((count, Precision::Exact)) };
        let unseen_first = self.unseen(log).next();
        let oldest = self.seen().chain(unseen_first).min().and_then(|sequence| log.stored_at(sequence));
        Lag {
            ready: exact(unseen + self.returned.len() as u64 + in_keys),
            in_flight: exact(self.flight.len() as u64),
            delayed: exact(self.delayed.len() as u64 + held_back),
            oldest_age: oldest.map(|stored| (now.since(stored), Precision::Exact)),
            lanes: Vec::new(),
        }
    }

    /// Gives up everything: the group is deleted.
    pub(crate) fn give_up(mut self, log: &mut Log) {
        let unsettled: Vec<u64> = self.unseen(log).chain(self.seen()).collect();
        unsettled.into_iter().for_each(|sequence| log.settle(sequence));
        self.wake();
    }

    /// What nobody has looked at.
    pub(super) fn unseen(&self, log: &Log) -> impl Iterator<Item = u64> {
        (self.cursor..log.next()).filter(|sequence| !self.skip.contains(sequence))
    }

    /// What was looked at and is not settled for good.
    fn seen(&self) -> impl Iterator<Item = u64> {
        let in_log = |pending: &&Pending| pending.redriven().is_none();
        let out = self.flight.iter().map(|(_, slot)| slot).filter(|slot| slot.redriven().is_none());
        let returned = self.returned.values().filter(in_log).map(|pending| pending.sequence);
        let delayed = self.delayed.values().filter(in_log).map(|pending| pending.sequence);
        let acked = self.above.keys().copied();
        let out = out.map(|slot| slot.sequence);
        out.chain(returned).chain(delayed).chain(self.keys.sequences(in_log)).chain(acked)
    }

    pub(crate) fn letters(&self) -> &Letters {
        &self.letters
    }

    /// How many messages it keeps beside the log: dead letters, and redriven ones that are not settled.
    pub(crate) fn kept_aside(&self) -> usize {
        self.letters.len() + self.redriven
    }
}
