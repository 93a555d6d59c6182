//! A destination: lanes, each with a log and the groups' places in it.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anybroker_core::{Clock, Destination, Group, Lag, Message, Start, SubscribeSpec, Timestamp};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::group::GroupState;
use super::letters::Letters;
use super::log::Log;
use crate::config::Settings;
use crate::profile::Manner;

/// A destination.
#[derive(Debug)]
pub(crate) struct Topic {
    pub(crate) name: Destination,
    lanes: Vec<Mutex<LaneState>>,
    /// The groups, in the same places as in each lane.
    groups: Mutex<Vec<Option<GroupEntry>>>,
    letter_numbers: Arc<AtomicU64>,
    manner: Manner,
    /// Told when a full lane has room again.
    pub(crate) room: Notify,
}

#[derive(Debug)]
struct GroupEntry {
    uid: u64,
    name: Group,
}

/// One lane, under one lock with all its groups.
#[derive(Debug)]
pub(crate) struct LaneState {
    pub(crate) log: Log,
    groups: Vec<Option<GroupState>>,
    pub(crate) capacity: usize,
    pub(crate) dedup: crate::publisher::Dedup,
    /// A publisher waits for room.
    pub(crate) full: bool,
    /// The destination was deleted.
    pub(crate) removed: bool,
}

/// A member's place in one lane of one of its destinations.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) topic: Arc<Topic>,
    pub(crate) lane: usize,
    group: usize,
    uid: u64,
    pub(crate) member: u32,
}

impl Topic {
    pub(super) fn new(name: Destination, settings: &Settings) -> Self {
        let manner = settings.profile.manner();
        let lanes = manner.lanes;
        let lane = || {
            Mutex::new(LaneState {
                log: Log::new(settings.retention.div_ceil(lanes)),
                groups: Vec::new(),
                capacity: settings.max_messages.div_ceil(lanes),
                dedup: crate::publisher::Dedup::default(),
                full: false,
                removed: false,
            })
        };
        Self {
            name,
            lanes: (0..lanes).map(|_| lane()).collect(),
            groups: Mutex::default(),
            letter_numbers: Arc::new(AtomicU64::new(1)),
            manner,
            room: Notify::new(),
        }
    }

    pub(crate) fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// The lane of a message: all of one key share one.
    pub(crate) fn lane_of(&self, message: &Message) -> usize {
        if self.lanes.len() == 1 {
            return 0;
        }
        // The same for every run, so that a seed tells the whole story.
        let fixed = foldhash::fast::FixedState::with_seed(0);
        let hash = match message.key() {
            Some(key) => fixed.hash_one(key),
            None => fixed.hash_one(message.id()),
        };
        (hash % self.lanes.len() as u64) as usize
    }

    pub(crate) fn lane(&self, lane: usize) -> MutexGuard<'_, LaneState> {
        self.lanes[lane].lock()
    }

    /// Creates the group unless it is there; whether it is new.
    pub(crate) fn ensure_group(&self, uid: u64, name: &Group, start: Start, now: Timestamp) -> bool {
        let mut groups = self.groups.lock();
        if groups.iter().flatten().any(|entry| entry.name == *name) {
            return false;
        }
        let place = groups.iter().position(Option::is_none).unwrap_or_else(|| {
            groups.push(None);
            groups.len() - 1
        });
        groups[place] = Some(GroupEntry { uid, name: name.clone() });
        for lane in &self.lanes {
            let lane = &mut *lane.lock();
            let letters = Letters::new(Arc::clone(&self.letter_numbers));
            let group = GroupState::new(uid, letters, &mut lane.log, start, self.manner, now);
            lane.groups.resize_with(lane.groups.len().max(place + 1), || None);
            lane.groups[place] = Some(group);
        }
        true
    }

    pub(crate) fn has_group(&self, name: &Group) -> bool {
        self.groups.lock().iter().flatten().any(|entry| entry.name == *name)
    }

    pub(crate) fn group_names(&self) -> Vec<Group> {
        self.groups.lock().iter().flatten().map(|entry| entry.name.clone()).collect()
    }

    /// Takes a seat in every lane; `None` without such a group, `Some(None)` where another order is kept.
    pub(crate) fn join(
        self: &Arc<Self>,
        spec: &SubscribeSpec,
        wake: &Arc<Notify>,
        now: Timestamp,
    ) -> Option<Option<Vec<Seat>>> {
        let groups = self.groups.lock();
        let place = groups.iter().position(|entry| entry.as_ref().is_some_and(|entry| entry.name == spec.group))?;
        let uid = groups[place].as_ref()?.uid;
        let agrees = |lane: &Mutex<LaneState>| {
            lane.lock().groups[place].as_ref().is_some_and(|group| group.agrees(spec.order, spec.on_failure))
        };
        if !self.lanes.iter().all(agrees) {
            return Some(None);
        }
        let seats = self.lanes.iter().enumerate().filter_map(|(number, lane)| {
            let LaneState { log, groups, .. } = &mut *lane.lock();
            let member = groups[place].as_mut()?.join(log, spec.order, spec.on_failure, Arc::clone(wake), now);
            Some(Seat { topic: Arc::clone(self), lane: number, group: place, uid, member })
        });
        let seats = seats.collect();
        self.rebalance(place, 0, now);
        Some(Some(seats))
    }

    /// Gives seats up.
    pub(crate) fn leave<'a>(&self, seats: impl Iterator<Item = &'a Seat>, now: Timestamp) {
        // Under this lock members have the same numbers in every lane.
        let groups = self.groups.lock();
        let mut place = None;
        for seat in seats {
            let mut lane = self.lane(seat.lane);
            if let Some((group, log)) = lane.seated(seat) {
                group.leave(log, seat.member, now);
                place = Some(seat.group);
            }
            self.tell_room(&mut lane);
        }
        if let Some(place) = place {
            self.rebalance(place, 0, now);
        }
        drop(groups);
    }

    /// Moves every lane of a seat's group on to another member.
    pub(crate) fn shift(&self, seat: &Seat, by: usize, now: Timestamp) {
        let _groups = self.groups.lock();
        self.rebalance(seat.group, by, now);
    }

    /// Declares a member dead or alive, and spreads the lanes anew.
    pub(crate) fn set_dead(&self, seat: &Seat, member: u32, dead: bool, now: Timestamp) {
        let _groups = self.groups.lock();
        for lane in &self.lanes {
            if let Some((group, _)) = lane.lock().seated(seat) {
                group.set_dead(member, dead);
            }
        }
        self.rebalance(seat.group, 0, now);
    }

    /// Spreads the lanes over the members, where lanes belong to members. The groups are locked.
    fn rebalance(&self, place: usize, by: usize, now: Timestamp) {
        if self.lanes.len() == 1 {
            return;
        }
        let members = self.lane(0).groups[place].as_ref().map(GroupState::members).unwrap_or_default();
        for (number, lane) in self.lanes.iter().enumerate() {
            let LaneState { log, groups, .. } = &mut *lane.lock();
            let owner = members.get((number + by) % members.len().max(1)).copied();
            if let Some(group) = &mut groups[place] {
                group.assign(log, owner, now);
            }
        }
    }

    /// Deletes a group; whether it was there.
    pub(crate) fn remove_group(&self, name: &Group) -> bool {
        let mut groups = self.groups.lock();
        let Some(place) = groups.iter().position(|entry| entry.as_ref().is_some_and(|entry| entry.name == *name))
        else {
            return false;
        };
        groups[place] = None;
        for lane in &self.lanes {
            let mut lane = lane.lock();
            let LaneState { log, groups, .. } = &mut *lane;
            if let Some(group) = groups[place].take() {
                group.give_up(log);
            }
            self.tell_room(&mut lane);
        }
        true
    }

    pub(super) fn remove_all(&self) {
        for lane in &self.lanes {
            lane.lock().removed = true;
        }
        for name in self.group_names() {
            self.remove_group(&name);
        }
        for lane in &self.lanes {
            let mut lane = lane.lock();
            lane.log = Log::new(0);
            lane.full = false;
        }
        self.room.notify_waiters();
    }

    /// Wakes publishers that wait, where there is room.
    pub(crate) fn tell_room(&self, lane: &mut LaneState) {
        if lane.full && (lane.room() > 0 || lane.removed) {
            lane.full = false;
            self.room.notify_waiters();
        }
    }

    /// Calls `read` for the group in each lane, with everything due done; `None` without such a group.
    pub(crate) fn read_group<R>(
        &self,
        name: &Group,
        now: Timestamp,
        mut read: impl FnMut(usize, &mut GroupState, &mut Log) -> R,
    ) -> Option<Vec<R>> {
        let groups = self.groups.lock();
        let place = groups.iter().position(|entry| entry.as_ref().is_some_and(|entry| entry.name == *name))?;
        let answers = self.lanes.iter().enumerate().filter_map(|(number, lane)| {
            let mut lane = lane.lock();
            let LaneState { log, groups, .. } = &mut *lane;
            let group = groups[place].as_mut()?;
            group.advance(log, now);
            let answer = read(number, group, log);
            self.tell_room(&mut lane);
            Some(answer)
        });
        Some(answers.collect())
    }

    /// The lag of a group over all lanes.
    pub(crate) fn lag(&self, name: &Group, now: Timestamp) -> Option<Lag> {
        let mut lanes = self.read_group(name, now, |_, group, log| group.lag(log, now))?;
        if lanes.len() == 1 {
            return lanes.pop();
        }
        let sum = |figure: fn(&Lag) -> anybroker_core::Figure| {
            let counts = lanes.iter().filter_map(figure);
            Some(
                counts
                    .fold((0, anybroker_core::Precision::Exact), |sum, (count, precision)| (sum.0 + count, precision)),
            )
        };
        Some(Lag {
            ready: sum(|lag| lag.ready),
            in_flight: sum(|lag| lag.in_flight),
            delayed: sum(|lag| lag.delayed),
            oldest_age: lanes.iter().filter_map(|lag| lag.oldest_age).max_by_key(|(age, _)| *age),
            lanes: lanes.iter().enumerate().map(|(lane, lag)| (format!("{}/{lane}", self.name), lag.clone())).collect(),
        })
    }
}

impl LaneState {
    /// The group a seat is in, unless that was deleted, and the log.
    pub(crate) fn seated(&mut self, seat: &Seat) -> Option<(&mut GroupState, &mut Log)> {
        let group = self.groups.get_mut(seat.group)?.as_mut().filter(|group| group.uid == seat.uid)?;
        Some((group, &mut self.log))
    }

    pub(crate) fn has_groups(&self) -> bool {
        self.groups.iter().any(Option::is_some)
    }

    pub(crate) fn groups(&mut self) -> impl Iterator<Item = &mut GroupState> {
        self.groups.iter_mut().flatten()
    }

    /// How many messages it can take.
    pub(crate) fn room(&self) -> usize {
        let aside: usize = self.groups.iter().flatten().map(GroupState::kept_aside).sum();
        self.capacity.saturating_sub(self.log.live() + aside)
    }

    /// Stores a message for every group.
    pub(crate) fn store(&mut self, message: Message, clock: &dyn Clock, now: Timestamp) -> u64 {
        let groups = u32::try_from(self.groups.iter().flatten().count()).expect("fewer groups than a u32 counts");
        let (sequence, instructions) = self.log.push(message, groups, clock, now);
        if instructions.not_before.is_some() || instructions.expires.is_some() {
            self.groups().for_each(|group| group.stored(sequence, instructions.not_before, instructions.expires));
        }
        sequence
    }

    /// Does what is due in every group.
    pub(crate) fn advance(&mut self, now: Timestamp) {
        let Self { log, groups, .. } = self;
        groups.iter_mut().flatten().for_each(|group| group.advance(log, now));
    }

    pub(crate) fn next_due(&self) -> Option<Timestamp> {
        self.groups.iter().flatten().filter_map(GroupState::next_due).min()
    }
}
