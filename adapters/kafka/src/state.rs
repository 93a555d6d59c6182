//! The state of a subscription, shared by the threads that fetch, the application that receives and settles, and the
//! client's rebalances.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anybroker_core::{
    Delivery, DeliveryContext, DeliveryFacts, Error, Lane, Position, Received, SubscriptionEvent, Timestamp, Token,
};
use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::Notify;

use crate::blocks::Blocks;
use crate::codec::Chunk;
use crate::config::Settings;
use crate::joined::Joining;
use crate::lanes::{Log, Partition, Stage};
use crate::note::{self, Origin, Retry};
use crate::progress::{Commit, Progress};
use crate::pulse::Pulse;

/// More than any delay that this adapter writes: a note that says more is not its own.
const LONGEST_WAIT: Duration = Duration::from_secs(48 * 3600);

/// See the module's documentation.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// There is something to receive.
    pub(crate) arrived: Notify,
    /// A record of a leaving partition was settled.
    settled: Condvar,
    pub(crate) is_closing: AtomicBool,
    pub(crate) is_paused: AtomicBool,
    is_degraded: AtomicBool,
    /// Ready and out together never exceed it.
    max_in_flight: usize,
    /// Bounds of what is held back.
    held_retries: usize,
    held_bytes: usize,
    /// The threads that fetch, to be woken when there is room again.
    feeders: Mutex<Vec<std::thread::Thread>>,
    /// What transactions need of the subscription.
    pub(crate) joining: Joining,
    pub(crate) pulse: Pulse,
}

/// A record in a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) lane: Lane,
    pub(crate) log: Log,
    pub(crate) offset: i64,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) partitions: Vec<Partition>,
    by_name: HashMap<(usize, i32), u32>,
    /// Fetched records in order; may name ones that have been lost since.
    ready: VecDeque<Place>,
    /// Given back without a failure; they go first.
    returned: BinaryHeap<Reverse<Place>>,
    held: BinaryHeap<Reverse<(Instant, Place)>>,
    /// Keys that wait for a failed record of theirs.
    pub(crate) blocks: Blocks,
    events: VecDeque<SubscriptionEvent>,
    /// Why the subscription ended.
    failure: Option<Error>,
    /// Records that are ready or out.
    unsettled: usize,
    held_count: usize,
    held_bytes: usize,
    is_revoking: bool,
    is_starving: bool,
    is_retry_next: bool,
}

impl Shared {
    pub(crate) fn new(max_in_flight: usize, settings: &Settings, blocks: bool) -> Self {
        Self {
            state: Mutex::new(State { blocks: Blocks::new(blocks), ..State::default() }),
            arrived: Notify::new(),
            settled: Condvar::new(),
            is_closing: AtomicBool::new(false),
            is_paused: AtomicBool::new(false),
            is_degraded: AtomicBool::new(false),
            max_in_flight,
            held_retries: settings.held_retries,
            held_bytes: settings.held_bytes,
            feeders: Mutex::default(),
            joining: Joining::default(),
            pulse: Pulse::new(settings.session_timeout),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The same for who settles or receives: what the process has held for longer than it may stand still is lost before.
    pub(crate) fn lock_awake(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        if !self.is_closing.load(Ordering::Acquire) && self.pulse.beat() {
            let all: Vec<(usize, i32)> = state.by_name.keys().copied().collect();
            tracing::warn!(
                "the process has stood still for so long that others may have its partitions; it joins again"
            );
            for (feeder, partition) in all {
                self.lose_one(&mut state, feeder, partition);
            }
            self.arrived.notify_one();
            self.wake_feeders();
        }
        state
    }

    pub(crate) fn add_feeder(&self, thread: std::thread::Thread) {
        self.feeders.lock().push(thread);
    }

    pub(crate) fn wake_feeders(&self) {
        self.feeders.lock().iter().for_each(std::thread::Thread::unpark);
    }

    pub(crate) fn close(&self) {
        self.is_closing.store(true, Ordering::Release);
        self.settled.notify_all();
        self.wake_feeders();
        self.arrived.notify_one();
    }

    /// How many more records of destinations may be fetched.
    pub(crate) fn room(&self) -> usize {
        let mut state = self.lock();
        let room = match state.can_hold(self) {
            true => self.max_in_flight.saturating_sub(state.unsettled),
            false => 0,
        };
        state.is_starving = room == 0;
        room
    }

    /// How many more records of retry topics may be fetched.
    pub(crate) fn room_to_hold(&self) -> usize {
        let state = self.lock();
        if state.can_hold(self) { self.held_retries - state.held_count } else { 0 }
    }

    /// Fetched records of one partition.
    pub(crate) fn add(&self, feeder: usize, log: Log, partition: i32, chunk: &Arc<Chunk>) {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(index) = state.by_name.get(&(feeder, partition)) else { return };
        let owner = &mut state.partitions[*index as usize];
        if !owner.is_owned || owner.is_leaving {
            return;
        }
        let lane = owner.lane;
        let track = owner.track(log);
        for index in 0..chunk.len() {
            let place = Place { lane, log, offset: chunk.offset(index) };
            match log {
                Log::Main => {
                    if track.push(chunk, index, Stage::Ready, 1) {
                        state.ready.push_back(place);
                        state.unsettled += 1;
                    }
                }
                Log::Retry => {
                    let retry: Option<Retry> = note::read(chunk.note(index));
                    // Whoever wrote a record without a note: it is delivered, not lost.
                    let (attempt, due) = retry.map_or((1, 0), |retry| (retry.attempt, retry.due));
                    if track.push(chunk, index, Stage::Held, attempt) {
                        let wait = due.saturating_sub(Timestamp::now().as_millis()).max(0).unsigned_abs();
                        let wait = Duration::from_millis(wait).min(LONGEST_WAIT);
                        state.held.push(Reverse((Instant::now() + wait, place)));
                        state.held_count += 1;
                        state.held_bytes += chunk.weight(index);
                    }
                }
            }
        }
        self.arrived.notify_one();
    }

    pub(crate) fn fail(&self, error: Error) {
        self.lock().failure.get_or_insert(error);
        self.arrived.notify_one();
    }

    /// The broker does not serve (or serves again).
    pub(crate) fn degraded(&self, cause: Option<String>) {
        // Asked with each chunk, so not under the lock; only the feeders' threads say it.
        if self.is_degraded() == cause.is_some() {
            return;
        }
        let mut state = self.lock();
        if self.is_degraded.swap(cause.is_some(), Ordering::AcqRel) == cause.is_some() {
            return;
        }
        let event = cause.map_or(SubscriptionEvent::Recovered, |cause| SubscriptionEvent::Degraded { cause });
        state.events.push_back(event);
        self.arrived.notify_one();
    }

    pub(crate) fn is_degraded(&self) -> bool {
        self.is_degraded.load(Ordering::Acquire)
    }

    /// This member owns the partition now, and goes on where the group was in both of its logs.
    pub(crate) fn assign(
        &self,
        feeder: usize,
        partition: i32,
        name: String,
        progress: (Option<Progress>, Option<Progress>),
    ) {
        let mut state = self.lock();
        let state = &mut *state;
        let index = *state.by_name.entry((feeder, partition)).or_insert_with(|| {
            let index = u32::try_from(state.partitions.len()).expect("partitions are numbered in 32 bits");
            state.partitions.push(Partition::new(index, feeder, partition));
            index
        });
        let owned = &mut state.partitions[index as usize];
        owned.assign(progress.0, progress.1);
        state.events.push_back(SubscriptionEvent::Assigned { lane: owned.lane, name });
        self.arrived.notify_one();
    }

    /// Partitions are being taken away: waits, bounded, for what is out of them.
    pub(crate) fn leave(&self, feeder: usize, partitions: &[i32], wait: Duration) {
        let mut state = self.lock();
        let wall = Timestamp::now().after(wait);
        let leaving: Vec<u32> =
            partitions.iter().filter_map(|partition| state.by_name.get(&(feeder, *partition)).copied()).collect();
        for index in &leaving {
            let partition = &mut state.partitions[*index as usize];
            partition.is_leaving = true;
            let lane = partition.lane;
            if partition.has_out() {
                state.events.push_back(SubscriptionEvent::Revoking { lane, deadline: wall });
            }
        }
        self.arrived.notify_one();
        let deadline = Instant::now() + wait;
        state.is_revoking = true;
        while !self.is_closing.load(Ordering::Acquire)
            && leaving.iter().any(|index| state.partitions[*index as usize].has_out())
        {
            if self.settled.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.is_revoking = false;
    }

    /// Partitions are gone.
    pub(crate) fn lose(&self, feeder: usize, partitions: &[i32]) {
        let mut state = self.lock();
        for partition in partitions {
            self.lose_one(&mut state, feeder, *partition);
        }
        self.arrived.notify_one();
    }

    fn lose_one(&self, state: &mut State, feeder: usize, partition: i32) {
        let Some(index) = state.by_name.get(&(feeder, partition)).copied() else { return };
        let partition = &mut state.partitions[index as usize];
        if !partition.is_owned {
            return;
        }
        let lane = partition.lane;
        let lost = partition.lose();
        state.unsettled -= lost.unsettled;
        state.held_count -= lost.held;
        state.held_bytes -= lost.held_bytes;
        state.blocks.lose(lane.index);
        state.events.push_back(SubscriptionEvent::Lost { lane });
        if state.is_revoking {
            self.settled.notify_all();
        }
    }

    /// The feeder's member is gone, with all that it had.
    pub(crate) fn lose_all(&self, feeder: usize) {
        let partitions: Vec<i32> = {
            let state = self.lock();
            state.by_name.keys().filter(|(of, _)| *of == feeder).map(|(_, partition)| *partition).collect()
        };
        self.lose(feeder, &partitions);
    }

    /// What a feeder's partitions have to commit: what changed, or (at the end) everything.
    pub(crate) fn to_commit(&self, feeder: usize, scope: &Scope<'_>) -> Vec<(Log, i32, Commit)> {
        let mut state = self.lock();
        let mut commits = Vec::new();
        for owned in state
            .partitions
            .iter_mut()
            .filter(|owned| owned.feeder == feeder && owned.is_owned && owned.frozen_by.is_none())
        {
            if let Scope::Leaving(only) = scope
                && !only.contains(&owned.partition)
            {
                continue;
            }
            for log in Log::BOTH {
                let partition = owned.partition;
                let track = owned.track(log);
                let commit = if *scope == Scope::Changed {
                    track.uncommitted(self.joining.is_used())
                } else {
                    track.commit(true)
                };
                commits.extend(commit.map(|commit| (log, partition, commit)));
            }
        }
        commits
    }

    /// These were committed (or are on their way).
    pub(crate) fn committed(&self, feeder: usize, commits: Vec<(Log, i32, Commit)>) {
        let mut state = self.lock();
        for (log, partition, commit) in commits {
            if let Some(index) = state.by_name.get(&(feeder, partition)).copied() {
                state.partitions[index as usize].track(log).committed(Some(commit));
            }
        }
    }

    /// A commit failed: everything is to be committed again.
    pub(crate) fn uncommitted(&self, feeder: usize) {
        for partition in self.lock().partitions.iter_mut().filter(|partition| partition.feeder == feeder) {
            Log::BOTH.into_iter().for_each(|log| partition.track(log).committed(None));
        }
    }

    /// What there is to hand out now, at most `max`; or until when to wait for something held back.
    pub(crate) fn take(&self, max: usize, context: &Arc<DeliveryContext>) -> Result<Received, Taken> {
        let mut state = self.lock_awake();
        let events: Vec<SubscriptionEvent> = state.events.drain(..).collect();
        let is_paused = self.is_paused.load(Ordering::Acquire);
        if let Some(error) = state.failure.as_ref().filter(|_| events.is_empty()) {
            return Err(Taken::Failed(error.duplicate()));
        }
        let picked = if is_paused { Picked::default() } else { state.hand_out(max) };
        if events.is_empty() && picked.places.is_empty() {
            return Err(Taken::Nothing(state.next_due().filter(|_| !is_paused)));
        }
        // The messages are made without the lock, which those who fetch need.
        drop(state);
        Ok(Received { deliveries: picked.deliveries(context), events })
    }

    /// Applies `act` to the record of a delivery, unless it is stale.
    pub(crate) fn with_entry<R>(
        &self,
        lane: Lane,
        token: &Token,
        act: impl FnOnce(&mut State, Place) -> R,
    ) -> Option<R> {
        let mut state = self.lock_awake();
        self.with_entry_locked(&mut state, lane, token, act)
    }

    pub(crate) fn with_entry_locked<R>(
        &self,
        state: &mut State,
        lane: Lane,
        token: &Token,
        act: impl FnOnce(&mut State, Place) -> R,
    ) -> Option<R> {
        let place = Place::of(lane, token)?;
        if state.owned(lane)?.track(place.log).find(place.offset)?.stage != Stage::Out {
            return None;
        }
        let result = act(state, place);
        self.has_settled(state);
        Some(result)
    }

    /// Tells those who wait for it that something was settled or came back.
    pub(crate) fn has_settled(&self, state: &mut State) {
        if state.is_revoking {
            self.settled.notify_all();
        }
        if state.is_starving && state.unsettled <= self.max_in_flight - self.max_in_flight.div_ceil(4) {
            state.is_starving = false;
            self.wake_feeders();
        }
    }
}

impl Place {
    /// Where the record of a delivery stands.
    fn of(lane: Lane, token: &Token) -> Option<Self> {
        let Token::Pair(offset, log) = token else { return None };
        let log = if *log == 0 { Log::Main } else { Log::Retry };
        Some(Self { lane, log, offset: i64::try_from(*offset).ok()? })
    }
}

/// Which commits.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scope<'a> {
    /// What differs from the last commit.
    Changed,
    /// Those partitions, for the last time.
    Leaving(&'a [i32]),
    /// All, for the last time. Also what was committed: an asynchronous commit may have failed since.
    All,
}

/// Why there is nothing to hand out.
pub(crate) enum Taken {
    Failed(Error),
    Nothing(Option<Instant>),
}

impl State {
    fn can_hold(&self, bounds: &Shared) -> bool {
        self.held_count < bounds.held_retries && self.held_bytes < bounds.held_bytes
    }

    fn next_due(&self) -> Option<Instant> {
        self.held.peek().map(|Reverse((due, _))| *due)
    }

    fn hand_out(&mut self, max: usize) -> Picked {
        let (now, wall) = (Instant::now(), Timestamp::now().as_millis());
        let available = self.returned.len() + self.ready.len() + self.held.len();
        let mut picked = Picked { places: Vec::with_capacity(max.min(available)), chunks: Vec::new() };
        while picked.places.len() < max {
            // What was given back first, which keeps its place in the order.
            let returned = self.returned.pop().map(|Reverse(place)| place);
            let next = returned.or_else(|| self.in_turn(now));
            let Some(place) = next else { break };
            self.deliver(place, wall, &mut picked);
        }
        picked
    }

    /// A new record, or one that failed and is due again: in turns, because one that fails again and again must not keep the
    /// others out, nor they it.
    fn in_turn(&mut self, now: Instant) -> Option<Place> {
        let is_due = self.next_due().is_some_and(|due| due <= now);
        self.is_retry_next = !self.is_retry_next;
        if is_due && (self.is_retry_next || self.ready.is_empty()) {
            return self.held.pop().map(|Reverse((_, place))| place);
        }
        self.ready.pop_front()
    }

    fn deliver(&mut self, place: Place, wall: i64, picked: &mut Picked) -> Option<()> {
        let Place { lane, log, offset } = place;
        let owned = &mut self.partitions[lane.index as usize];
        if !owned.is_owned || owned.is_leaving || owned.lane.epoch != lane.epoch {
            return None;
        }
        let entry = owned.track(log).find(offset)?;
        let weight = entry.weight();
        let (chunk, index) = entry.record()?;
        if log == Log::Main && self.blocks.must_wait(lane.index, offset, || chunk.key(index)) {
            // Behind a failed one of its key. It waits among the held, so that other keys have room.
            if entry.stage == Stage::Ready {
                entry.stage = Stage::Held;
                self.unsettled -= 1;
                self.held_count += 1;
                self.held_bytes += weight;
            }
            return None;
        }
        let position = if log == Log::Main { offset } else { origin(chunk, index, (0, offset, log)).offset };
        let facts = DeliveryFacts {
            attempt: entry.attempt,
            lane,
            position: Some(Position::new(position.unsigned_abs())),
            ..DeliveryFacts::new(Token::Pair(offset.unsigned_abs(), u64::from(log == Log::Retry)))
        };
        picked.add(facts, chunk, index);
        if entry.stage == Stage::Held {
            self.held_count -= 1;
            self.held_bytes -= weight;
            self.unsettled += 1;
        }
        entry.stage = Stage::Out;
        entry.first_at.get_or_insert(wall);
        Some(())
    }

    /// Where the record of a delivery comes from, and what it has been through.
    pub(crate) fn origin(&mut self, place: Place) -> Option<Origin> {
        let owned = &mut self.partitions[place.lane.index as usize];
        let partition = owned.partition;
        let entry = owned.track(place.log).find(place.offset)?;
        let first_at = entry.first_at;
        let (chunk, index) = entry.record()?;
        let mut origin = origin(chunk, index, (partition, place.offset, place.log));
        origin.first_at = origin.first_at.or(first_at);
        Some(origin)
    }

    /// The partition of a lane, while it is that assignment's.
    fn owned(&mut self, lane: Lane) -> Option<&mut Partition> {
        let owned = self.partitions.get_mut(lane.index as usize)?;
        (owned.is_owned && owned.lane.epoch == lane.epoch).then_some(owned)
    }

    /// The record of a delivery is done, unless the delivery is stale: what nearly every settlement is.
    pub(crate) fn ack(&mut self, lane: Lane, token: &Token) -> bool {
        let Some(place) = Place::of(lane, token) else { return false };
        let Some(owned) = self.owned(lane) else { return false };
        let was_out = owned.track(place.log).settle_if(place.offset, |stage| stage == Stage::Out);
        if was_out {
            self.unsettled -= 1;
            self.unblock(place);
        }
        was_out
    }

    /// The record is done.
    pub(crate) fn done(&mut self, place: Place) {
        self.partitions[place.lane.index as usize].track(place.log).settle(place.offset);
        self.unsettled -= 1;
        self.unblock(place);
    }

    /// What waited for the record goes on, in order.
    fn unblock(&mut self, place: Place) {
        for offset in self.blocks.release(place.lane.index, place.offset) {
            self.returned.push(Reverse(Place { offset, ..place }));
        }
    }

    /// The record comes back without a failure.
    pub(crate) fn give_back(&mut self, place: Place) {
        if let Some(entry) = self.partitions[place.lane.index as usize].track(place.log).find(place.offset) {
            entry.stage = Stage::Ready;
            self.returned.push(Reverse(place));
        }
    }

    /// The record failed and comes back after `delay`, here.
    pub(crate) fn hold(&mut self, place: Place, delay: Duration) {
        if let Some(entry) = self.partitions[place.lane.index as usize].track(place.log).find(place.offset) {
            entry.stage = Stage::Held;
            entry.attempt += 1;
            let key = entry.record().and_then(|(chunk, index)| chunk.key(index));
            self.unsettled -= 1;
            self.held_count += 1;
            self.held_bytes += entry.weight();
            self.blocks.fail(place.lane.index, place.offset, key);
            self.held.push(Reverse((Instant::now() + delay, place)));
        }
    }
}

/// Records that are handed out, before their messages are made.
#[derive(Default)]
struct Picked {
    /// With the number of the chunk, and the record's place in it.
    places: Vec<(DeliveryFacts, usize, usize)>,
    chunks: Vec<Arc<Chunk>>,
}

impl Picked {
    fn add(&mut self, facts: DeliveryFacts, chunk: &Arc<Chunk>, index: usize) {
        // Neighbours mostly stand in the same one.
        if self.chunks.last().is_none_or(|last| !Arc::ptr_eq(last, chunk)) {
            self.chunks.push(Arc::clone(chunk));
        }
        self.places.push((facts, self.chunks.len() - 1, index));
    }

    fn deliveries(self, context: &Arc<DeliveryContext>) -> Vec<Delivery> {
        let Self { places, chunks } = self;
        let made =
            |(facts, chunk, index): (_, usize, usize)| Delivery::new(chunks[chunk].message(index), facts, context);
        places.into_iter().map(made).collect()
    }
}

/// What the record's note tells, or (on the destination's topic, where there is none) its place.
fn origin(chunk: &Chunk, index: usize, (partition, offset, log): (i32, i64, Log)) -> Origin {
    let retry: Option<Retry> = if log == Log::Retry { note::read(chunk.note(index)) } else { None };
    retry.map_or(Origin { partition, offset, redrives: 0, first_at: None }, |retry| retry.origin)
}
