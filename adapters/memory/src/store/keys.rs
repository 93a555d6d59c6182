//! Order: the state of each key that has something out, waiting or dead.

use std::collections::{BTreeSet, HashMap, VecDeque};

use anybroker_core::{Bytes, Message, Order, Timestamp};

use super::flight::NONE;
use super::pending::Pending;

/// The keys of an ordered group. The unsettled deliveries of a key belong to one member at a time; what else there is
/// of the key waits here, in order.
#[derive(Debug)]
pub(crate) struct Keys {
    numbers: HashMap<Bytes, u32, foldhash::fast::RandomState>,
    states: Vec<Key>,
    free: Vec<u32>,
    /// Idle keys are forgotten when there are that many, all at once, so that a key that comes and goes costs no more
    /// than a look-up.
    sweep_at: usize,
    /// The one key of total order.
    total: u32,
    /// Keys without owner that have something to deliver.
    pub(crate) ready: VecDeque<u32>,
    /// Keys whose next message waits for its moment.
    timers: BTreeSet<(Timestamp, u32)>,
}

/// One key.
#[derive(Debug, Default)]
pub(crate) struct Key {
    /// The member that has deliveries of it, `NONE` without.
    pub(crate) owner: u32,
    /// How many.
    out: u32,
    /// It stands in the list of its owner, or in `ready`.
    pub(crate) listed: bool,
    queue: Option<Box<Queue>>,
}

/// What waits of a key. Most keys never need one.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// Came back, or was held back, by sequence.
    pub(crate) returned: VecDeque<Pending>,
    /// Never handed out, by sequence.
    pub(crate) fresh: VecDeque<u64>,
    /// Failed before and out again: later ones wait for them. Only where a failure blocks.
    pub(crate) failed: Vec<u64>,
    /// Dead letters that later ones are parked behind.
    pub(crate) letters: BTreeSet<u64>,
}

const FIRST_SWEEP: usize = 4096;

impl Default for Keys {
    fn default() -> Self {
        Self {
            numbers: HashMap::default(),
            states: Vec::new(),
            free: Vec::new(),
            sweep_at: FIRST_SWEEP,
            total: NONE,
            ready: VecDeque::new(),
            timers: BTreeSet::new(),
        }
    }
}

impl Keys {
    /// The key of a message under that order; `NONE` where it has none.
    pub(crate) fn of(&mut self, order: Order, message: &Message) -> u32 {
        match (order, message.key_bytes()) {
            (Order::None, _) | (Order::Key, None) => NONE,
            (Order::Total, _) => self.total(),
            (Order::Key, Some(key)) => match self.numbers.get(key) {
                Some(number) => *number,
                None => self.add(key),
            },
        }
    }

    /// The one key of total order.
    pub(crate) fn total(&mut self) -> u32 {
        if self.total == NONE {
            self.total = self.place();
        }
        self.total
    }

    fn add(&mut self, key: &Bytes) -> u32 {
        if self.numbers.len() >= self.sweep_at {
            let (states, free) = (&self.states, &mut self.free);
            self.numbers.retain(|_, number| {
                let idle = states[*number as usize].is_idle();
                if idle {
                    free.push(*number);
                }
                !idle
            });
            self.sweep_at = FIRST_SWEEP.max(self.numbers.len() * 2);
        }
        let number = self.place();
        // A key may be a slice of a large buffer, which must not live as long as the key does.
        self.numbers.insert(Bytes::copy_from_slice(key), number);
        number
    }

    fn place(&mut self) -> u32 {
        let fresh = Key { owner: NONE, ..Key::default() };
        match self.free.pop() {
            Some(number) => {
                self.states[number as usize] = fresh;
                number
            }
            None => {
                self.states.push(fresh);
                u32::try_from(self.states.len() - 1).expect("fewer keys than a u32 counts are busy at once")
            }
        }
    }

    pub(crate) fn key(&self, number: u32) -> &Key {
        &self.states[number as usize]
    }

    pub(crate) fn key_mut(&mut self, number: u32) -> &mut Key {
        &mut self.states[number as usize]
    }

    pub(crate) fn set_timer(&mut self, moment: Timestamp, number: u32) {
        self.timers.insert((moment, number));
    }

    pub(crate) fn next_timer(&self) -> Option<Timestamp> {
        self.timers.first().map(|(moment, _)| *moment)
    }

    pub(crate) fn pop_timer(&mut self, now: Timestamp) -> Option<u32> {
        self.timers.pop_first_if(now)
    }

    /// Everything that waits, and nothing is out: for a change of order.
    pub(crate) fn drain(&mut self) -> (Vec<Pending>, Vec<u64>) {
        let (mut returned, mut fresh) = (Vec::new(), Vec::new());
        for state in &mut self.states {
            if let Some(queue) = state.queue.take() {
                returned.extend(queue.returned);
                fresh.extend(queue.fresh);
            }
        }
        *self = Self::default();
        (returned, fresh)
    }

    /// How many messages wait in keys, and how many of them for their moment.
    pub(crate) fn waiting(&self, now: Timestamp) -> (u64, u64) {
        let mut counts = (0, 0);
        for queue in self.states.iter().filter_map(|state| state.queue.as_ref()) {
            let held_back = queue.returned.iter().filter(|pending| pending.not_before > now).count();
            counts.0 += (queue.fresh.len() + queue.returned.len() - held_back) as u64;
            counts.1 += held_back as u64;
        }
        counts
    }

    /// Every sequence number that waits, of those that came back only the chosen.
    pub(crate) fn sequences(&self, chosen: impl Fn(&&Pending) -> bool + Copy) -> impl Iterator<Item = u64> {
        let queues = self.states.iter().filter_map(|state| state.queue.as_ref());
        queues.flat_map(move |queue| {
            let returned = queue.returned.iter().filter(chosen);
            returned.map(|pending| pending.sequence).chain(queue.fresh.iter().copied())
        })
    }

    /// The states, to look for one message.
    pub(crate) fn queues_mut(&mut self) -> impl Iterator<Item = (u32, &mut Queue)> {
        (0..).zip(&mut self.states).filter_map(|(number, state)| Some((number, &mut **state.queue.as_mut()?)))
    }
}

trait PopFirstIf {
    fn pop_first_if(&mut self, now: Timestamp) -> Option<u32>;
}

impl PopFirstIf for BTreeSet<(Timestamp, u32)> {
    fn pop_first_if(&mut self, now: Timestamp) -> Option<u32> {
        (self.first()?.0 <= now).then(|| self.pop_first().map(|(_, number)| number))?
    }
}

impl Key {
    /// Whether `member` may get a message that nobody has seen, at once.
    pub(crate) fn admits(&self, member: u32) -> bool {
        (self.owner == NONE || self.owner == member) && self.queue.as_ref().is_none_or(|queue| queue.is_empty())
    }

    pub(crate) fn hand_out(&mut self, member: u32) {
        self.owner = member;
        self.out += 1;
    }

    /// One of its deliveries is back or settled. Whether it was the last.
    pub(crate) fn take_back(&mut self, sequence: u64) -> bool {
        self.out -= 1;
        if let Some(queue) = &mut self.queue {
            queue.failed.retain(|failed| *failed != sequence);
        }
        if self.out == 0 {
            self.owner = NONE;
            self.listed = false;
        }
        self.out == 0
    }

    pub(crate) fn queue(&self) -> Option<&Queue> {
        self.queue.as_deref()
    }

    pub(crate) fn queue_mut(&mut self) -> &mut Queue {
        self.queue.get_or_insert_default()
    }

    /// Whether messages behind `sequence` follow a dead letter of this key.
    pub(crate) fn parks(&self, sequence: u64) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.letters.first().is_some_and(|first| *first < sequence))
    }

    fn is_idle(&self) -> bool {
        self.out == 0 && self.queue.as_ref().is_none_or(|queue| queue.is_empty() && queue.letters.is_empty())
    }
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.returned.is_empty() && self.fresh.is_empty() && self.failed.is_empty()
    }

    /// The next message and its moment, unless it waits for a failed one.
    pub(crate) fn head(&self) -> Option<(u64, Timestamp)> {
        let returned = self.returned.front().map(|pending| (pending.sequence, pending.not_before));
        let fresh = self.fresh.front().map(|sequence| (*sequence, Timestamp::from_millis(i64::MIN)));
        let head = match (returned, fresh) {
            (Some(returned), Some(fresh)) => Some(if returned.0 < fresh.0 { returned } else { fresh }),
            (one, other) => one.or(other),
        };
        head.filter(|(sequence, _)| !self.failed.iter().any(|failed| failed < sequence))
    }

    /// Takes the next message.
    pub(crate) fn pop(&mut self) -> Option<Pending> {
        let fresh = self.fresh.front().copied().unwrap_or(u64::MAX);
        if self.returned.front().is_some_and(|pending| pending.sequence < fresh) {
            return self.returned.pop_front();
        }
        self.fresh.pop_front().map(|sequence| Pending::unseen(sequence, Timestamp::default()))
    }

    /// Puts a message back at its place.
    pub(crate) fn put(&mut self, pending: Pending) {
        let place = self.returned.partition_point(|other| other.sequence < pending.sequence);
        self.returned.insert(place, pending);
    }
}
