//! What the handlers of one subscription share: what waits, who is idle, and whether anything may begin.

use anybroker_core::{Delivery, Order, Timestamp};

use crate::breaker::{Breaker, Gate, Health};
use crate::lanes::{Held, Job, LaneId, Lanes};

/// What a slot brings when it asks for its next job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Concluded {
    /// The lane to go on with; `None` where there is none, or where the settlement decides.
    pub(crate) lane: Option<LaneId>,
    pub(crate) health: Health,
}

/// What a slot does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Its job lies where it asked for it.
    Run,
    Wait,
    End,
}

/// Kept under one lock, which is held for a few instructions at a time.
///
/// Slots wake one another: of those that are idle, only as many are woken as there are threads to run them. The next
/// one is woken when a handler is found waiting for something. Handlers that never wait thereby run one after another
/// in one task, without a wake-up for each message.
pub(crate) struct State {
    pub(crate) lanes: Lanes,
    pub(crate) breaker: Option<Breaker>,
    /// The loop waits for room.
    pub(crate) hungry: bool,
    /// How many deliveries may wait for a handler before no more are received.
    batch: usize,
    idle: Vec<usize>,
    /// Slots that are awake and not waiting for a handler.
    awake: usize,
    threads: usize,
    /// Deliveries with a handler.
    running: usize,
    stopping: bool,
}

impl State {
    pub(crate) fn new(order: Order, breaker: Option<Breaker>, slots: usize, threads: usize, batch: usize) -> Self {
        Self {
            lanes: Lanes::new(order),
            breaker,
            hungry: false,
            batch,
            idle: (0..slots).rev().collect(),
            awake: 0,
            threads,
            running: 0,
            stopping: false,
        }
    }

    /// Deliveries have arrived. Brings back those that have to be given back, because others of their key come first.
    pub(crate) fn arrive(&mut self, deliveries: Vec<Delivery>, until: Timestamp) -> Vec<Held> {
        let mut stragglers = Vec::new();
        for delivery in deliveries {
            let until = delivery.lease_until().map_or(until, |leased| leased.min(until));
            stragglers.extend(self.lanes.push(delivery, until));
        }
        stragglers
    }

    /// A slot has ended its jobs (if it had any) and wants the next, in `job` (a delivery is large: it is moved as seldom
    /// as possible). Also tells whether the loop must look: there is
    /// room again, or the gate has moved.
    pub(crate) fn next(
        &mut self,
        slot: usize,
        concluded: &mut Vec<Concluded>,
        job: &mut Option<Job>,
        now: impl Fn() -> Timestamp,
    ) -> (Next, bool) {
        let mut nudge = false;
        for concluded in concluded.drain(..) {
            self.running -= 1;
            if let Some(lane) = concluded.lane {
                self.lanes.advance(lane);
            }
            if let Some(breaker) = &mut self.breaker {
                nudge |= breaker.end(concluded.health, now());
            }
        }
        if self.stopping {
            self.awake -= 1;
            return (Next::End, nudge);
        }
        *job = self.begin();
        if job.is_some() {
            if self.hungry && self.room() > 0 {
                self.hungry = false;
                nudge = true;
            }
            return (Next::Run, nudge);
        }
        self.awake -= 1;
        self.idle.push(slot);
        (Next::Wait, nudge)
    }

    /// Up to `count` more jobs for a slot that has got one.
    pub(crate) fn more(&mut self, count: usize) -> Vec<Job> {
        let count = count.min(self.lanes.ready());
        (0..count).map_while(|_| self.begin()).collect()
    }

    fn begin(&mut self) -> Option<Job> {
        if self.lanes.ready() == 0 || !self.breaker.as_mut().is_none_or(Breaker::begin) {
            return None;
        }
        self.running += 1;
        self.lanes.pop()
    }

    /// A slot's handler waits for something.
    pub(crate) fn parked(&mut self) {
        self.awake -= 1;
    }

    /// It does not any more.
    pub(crate) fn resumed(&mut self) {
        self.awake += 1;
    }

    /// The slot to be woken now, if any; it counts as awake from here on.
    pub(crate) fn wake(&mut self) -> Option<usize> {
        let work = self.lanes.ready() > 0 && self.awake < self.threads && self.may_begin();
        let slot = if work || self.stopping { self.idle.pop() } else { None };
        self.awake += usize::from(slot.is_some());
        slot
    }

    fn may_begin(&self) -> bool {
        self.breaker.as_ref().is_none_or(|breaker| matches!(breaker.gate(), Gate::Closed | Gate::Probing))
    }

    /// How many deliveries may be asked for.
    pub(crate) fn room(&self) -> usize {
        match self.breaker.as_ref().map(Breaker::gate) {
            None | Some(Gate::Closed) => {
                if self.lanes.ready() < self.batch {
                    self.batch
                } else {
                    0
                }
            }
            Some(Gate::Probing) => usize::from(self.lanes.ready() == 0),
            // While it is open nothing is delivered (the subscription is paused), but its events are.
            Some(Gate::Open(_)) => 1,
            Some(Gate::Probe) => 0,
        }
    }

    /// Where the breaker is, if there is one.
    pub(crate) fn gate(&self) -> Option<Gate> {
        self.breaker.as_ref().map(Breaker::gate)
    }

    /// An open breaker whose time is over is half-open.
    pub(crate) fn half_open_if_due(&mut self, now: Timestamp) {
        if let Some(breaker) = &mut self.breaker
            && matches!(breaker.gate(), Gate::Open(until) if until <= now)
        {
            breaker.half_open();
        }
    }

    /// No job begins any more; slots end when they ask for the next.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
    }

    /// Deliveries with a handler.
    pub(crate) fn running(&self) -> usize {
        self.running
    }
}
