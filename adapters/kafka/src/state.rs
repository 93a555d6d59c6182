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

use crate::codec::Chunk;
use crate::lanes::{Partition, Stage};

/// See the module's documentation.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// There is something to receive.
    pub(crate) arrived: Notify,
    /// A record of a leaving partition was settled.
    settled: Condvar,
    pub(crate) is_closing: AtomicBool,
    pub(crate) is_paused: AtomicBool,
    /// Ready and out together never exceed it.
    max_in_flight: usize,
    /// Bound of what is held back.
    held_retries: usize,
    /// The threads that fetch, to be woken when there is room again.
    feeders: Mutex<Vec<std::thread::Thread>>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) partitions: Vec<Partition>,
    by_name: HashMap<(usize, i32), u32>,
    /// Fetched records in order; may name ones that have been lost since.
    ready: VecDeque<(Lane, i64)>,
    /// Given back without a failure; they go first.
    returned: BinaryHeap<Reverse<(u32, i64, u32)>>,
    held: BinaryHeap<Reverse<(Instant, u32, i64, u32)>>,
    events: VecDeque<SubscriptionEvent>,
    /// Why the subscription ended.
    failure: Option<Error>,
    /// Records that are ready or out.
    unsettled: usize,
    held_count: usize,
    is_revoking: bool,
    is_degraded: bool,
    is_starving: bool,
    is_retry_next: bool,
}

impl Shared {
    pub(crate) fn new(max_in_flight: usize, held_retries: usize) -> Self {
        Self {
            state: Mutex::default(),
            arrived: Notify::new(),
            settled: Condvar::new(),
            is_closing: AtomicBool::new(false),
            is_paused: AtomicBool::new(false),
            max_in_flight,
            held_retries,
            feeders: Mutex::default(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
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

    /// How many more records may be fetched.
    pub(crate) fn room(&self) -> usize {
        let mut state = self.lock();
        let room = match state.held_count < self.held_retries {
            true => self.max_in_flight.saturating_sub(state.unsettled),
            false => 0,
        };
        state.is_starving = room == 0;
        room
    }

    /// Fetched records of one partition.
    pub(crate) fn add(&self, feeder: usize, partition: i32, chunk: &Arc<Chunk>) {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(index) = state.by_name.get(&(feeder, partition)) else { return };
        let owner = &mut state.partitions[*index as usize];
        if !owner.is_owned || owner.is_leaving {
            return;
        }
        for index in 0..chunk.len() {
            if owner.push(chunk, index) {
                state.ready.push_back((owner.lane, chunk.offset(index)));
                state.unsettled += 1;
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
        let mut state = self.lock();
        if state.is_degraded == cause.is_some() {
            return;
        }
        state.is_degraded = cause.is_some();
        let event = cause.map_or(SubscriptionEvent::Recovered, |cause| SubscriptionEvent::Degraded { cause });
        state.events.push_back(event);
        self.arrived.notify_one();
    }

    pub(crate) fn is_degraded(&self) -> bool {
        self.lock().is_degraded
    }

    /// This member owns the partition now.
    pub(crate) fn assign(&self, feeder: usize, partition: i32, name: String) {
        let mut state = self.lock();
        let state = &mut *state;
        let index = *state.by_name.entry((feeder, partition)).or_insert_with(|| {
            let index = u32::try_from(state.partitions.len()).expect("partitions are numbered in 32 bits");
            state.partitions.push(Partition::new(index, feeder, partition));
            index
        });
        let owned = &mut state.partitions[index as usize];
        owned.assign();
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
            let Some(index) = state.by_name.get(&(feeder, *partition)).copied() else { continue };
            let partition = &mut state.partitions[index as usize];
            if !partition.is_owned {
                continue;
            }
            let lane = partition.lane;
            let (unsettled, held) = partition.lose();
            state.unsettled -= unsettled;
            state.held_count -= held;
            state.events.push_back(SubscriptionEvent::Lost { lane });
        }
        self.arrived.notify_one();
    }

    /// The prefixes of a feeder's partitions that have not been committed.
    pub(crate) fn to_commit(&self, feeder: usize) -> Vec<(i32, i64)> {
        let state = self.lock();
        state
            .partitions
            .iter()
            .filter(|owned| owned.feeder == feeder && owned.is_owned)
            .filter_map(|owned| owned.uncommitted().map(|offset| (owned.partition, offset)))
            .collect()
    }

    /// The prefixes of a feeder's partitions, committed or not.
    pub(crate) fn all_prefixes(&self, feeder: usize, only: Option<&[i32]>) -> Vec<(i32, i64)> {
        let state = self.lock();
        let owned = state.partitions.iter().filter(|owned| owned.feeder == feeder && owned.is_owned);
        owned
            .filter(|owned| only.is_none_or(|only| only.contains(&owned.partition)))
            .filter_map(|owned| owned.prefix().map(|offset| (owned.partition, offset)))
            .collect()
    }

    /// These offsets were committed (or are on their way).
    pub(crate) fn committed(&self, feeder: usize, offsets: &[(i32, i64)]) {
        let mut state = self.lock();
        for (partition, offset) in offsets {
            if let Some(index) = state.by_name.get(&(feeder, *partition)).copied() {
                state.partitions[index as usize].committed = Some(*offset);
            }
        }
    }

    /// A commit failed: everything is to be committed again.
    pub(crate) fn uncommitted(&self, feeder: usize) {
        for partition in self.lock().partitions.iter_mut().filter(|partition| partition.feeder == feeder) {
            partition.committed = None;
        }
    }

    /// What there is to hand out now, at most `max`; or until when to wait for something held back.
    pub(crate) fn take(&self, max: usize, context: &Arc<DeliveryContext>) -> Result<Received, Taken> {
        let mut state = self.lock();
        if !state.events.is_empty() {
            let events = state.events.drain(..).collect();
            let deliveries =
                if self.is_paused.load(Ordering::Acquire) { Vec::new() } else { state.hand_out(max, context) };
            return Ok(Received { deliveries, events });
        }
        if let Some(error) = &state.failure {
            return Err(Taken::Failed(error.duplicate()));
        }
        if self.is_paused.load(Ordering::Acquire) {
            return Err(Taken::Nothing(None));
        }
        let deliveries = state.hand_out(max, context);
        if deliveries.is_empty() {
            return Err(Taken::Nothing(state.next_due()));
        }
        Ok(Received { deliveries, events: Vec::new() })
    }

    /// Applies `act` to the record of a delivery, unless it is stale.
    pub(crate) fn with_entry<R>(&self, lane: Lane, token: &Token, act: impl FnOnce(&mut State, i64) -> R) -> Option<R> {
        let mut state = self.lock();
        self.with_entry_locked(&mut state, lane, token, act)
    }

    pub(crate) fn with_entry_locked<R>(
        &self,
        state: &mut State,
        lane: Lane,
        token: &Token,
        act: impl FnOnce(&mut State, i64) -> R,
    ) -> Option<R> {
        let Token::Pair(offset, _) = token else { return None };
        let offset = i64::try_from(*offset).ok()?;
        let owned = state.partitions.get_mut(lane.index as usize)?;
        if !owned.is_owned || owned.lane.epoch != lane.epoch || owned.find(offset)?.stage != Stage::Out {
            return None;
        }
        let result = act(state, offset);
        if state.is_revoking {
            self.settled.notify_all();
        }
        if state.is_starving && state.unsettled <= self.max_in_flight - self.max_in_flight.div_ceil(4) {
            state.is_starving = false;
            self.wake_feeders();
        }
        Some(result)
    }
}

/// Why there is nothing to hand out.
pub(crate) enum Taken {
    Failed(Error),
    Nothing(Option<Instant>),
}

impl State {
    fn next_due(&self) -> Option<Instant> {
        self.held.peek().map(|Reverse((due, ..))| *due)
    }

    fn hand_out(&mut self, max: usize, context: &Arc<DeliveryContext>) -> Vec<Delivery> {
        let now = Instant::now();
        let mut deliveries = Vec::with_capacity(max.min(self.returned.len() + self.ready.len() + self.held.len()));
        while deliveries.len() < max {
            // What was given back first, which keeps its place in the order.
            let returned = self.returned.pop().map(|Reverse((index, offset, epoch))| (Lane { index, epoch }, offset));
            let next = returned.or_else(|| self.in_turn(now));
            let Some((lane, offset)) = next else { break };
            deliveries.extend(self.deliver(lane, offset, context));
        }
        deliveries
    }

    /// A new record, or one that failed and is due again: in turns, because one that fails again and again must not keep the
    /// others out, nor they it.
    fn in_turn(&mut self, now: Instant) -> Option<(Lane, i64)> {
        let is_due = self.next_due().is_some_and(|due| due <= now);
        self.is_retry_next = !self.is_retry_next;
        if is_due && (self.is_retry_next || self.ready.is_empty()) {
            return self.held.pop().map(|Reverse((_, index, offset, epoch))| (Lane { index, epoch }, offset));
        }
        self.ready.pop_front()
    }

    fn deliver(&mut self, lane: Lane, offset: i64, context: &Arc<DeliveryContext>) -> Option<Delivery> {
        let owned = &mut self.partitions[lane.index as usize];
        if !owned.is_owned || owned.is_leaving || owned.lane.epoch != lane.epoch {
            return None;
        }
        let entry = owned.find(offset)?;
        if entry.stage == Stage::Held {
            self.held_count -= 1;
            self.unsettled += 1;
        }
        entry.stage = Stage::Out;
        let (chunk, index) = entry.record()?;
        let number = offset.unsigned_abs();
        let facts = DeliveryFacts {
            attempt: entry.attempt,
            lane,
            position: Some(Position::new(number)),
            ..DeliveryFacts::new(Token::Pair(number, 0))
        };
        Some(Delivery::new(chunk.message(index), facts, context))
    }

    /// The record is done.
    pub(crate) fn done(&mut self, lane: Lane, offset: i64) {
        self.partitions[lane.index as usize].settle(offset);
        self.unsettled -= 1;
    }

    /// The record comes back without a failure.
    pub(crate) fn give_back(&mut self, lane: Lane, offset: i64) {
        if let Some(entry) = self.partitions[lane.index as usize].find(offset) {
            entry.stage = Stage::Ready;
            self.returned.push(Reverse((lane.index, offset, lane.epoch)));
        }
    }

    /// The record failed and comes back after `delay`.
    pub(crate) fn hold(&mut self, lane: Lane, offset: i64, delay: Duration) {
        if let Some(entry) = self.partitions[lane.index as usize].find(offset) {
            entry.stage = Stage::Held;
            entry.attempt += 1;
            self.unsettled -= 1;
            self.held_count += 1;
            self.held.push(Reverse((Instant::now() + delay, lane.index, offset, lane.epoch)));
        }
    }
}
