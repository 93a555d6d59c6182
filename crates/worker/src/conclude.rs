//! How a subscription's loop settles what its slots have concluded.

use std::sync::Arc;

use anybroker_core::{MessageId, SettleOutcome, Settlement};

use crate::lanes::{Held, LaneId};
use crate::rules::{Cause, How};
use crate::settle::{Again, Flight, Notes, conclude, insists};
use crate::slot::{Batch, Concluding};
use crate::subscription::{Concluded, Loop};

impl Loop {
    /// Settles what slots have concluded: everything that is there, at once.
    pub(crate) fn concluding(&mut self, first: Concluding) {
        let mut batch = Batch::default();
        let mut next = Some(first);
        while let Some(concluding) = next {
            match concluding {
                Concluding::Plain(more) => batch.append(more),
                Concluding::Holding(held, settlement, cause, lane) => {
                    // What was concluded before it is settled before it.
                    self.settle(std::mem::take(&mut batch), None, 0);
                    self.hold(held, settlement, cause, lane);
                }
                Concluding::Shared(delivery, settlement, cause) => {
                    self.work.concluded.push(Concluded { delivery, settlement, cause, lane: None });
                    self.unshare();
                }
                Concluding::Nudge => {}
            }
            next = if batch.entries.len() < self.shared.rules.batch { self.concluding.try_recv().ok() } else { None };
        }
        self.settle(batch, None, 0);
    }

    /// A failure that later messages of its key wait for. Where the broker redelivers it first, what this worker holds
    /// of the key goes back behind it in the same batch.
    pub(crate) fn hold(&mut self, held: Held, settlement: Settlement, cause: Option<Box<Cause>>, lane: LaneId) {
        let delivery = match held.into_own() {
            Ok(delivery) => delivery,
            Err(delivery) => {
                self.work.concluded.push(Concluded { delivery, settlement, cause, lane: Some(lane) });
                return;
            }
        };
        let follows = self.shared.rules.sends_followers_back(&settlement);
        let mut batch = Batch::default();
        batch.push(delivery, settlement, cause);
        if follows {
            let waiting = self.shared.state.lock().lanes.take_waiting(lane);
            add_releases(&mut batch, waiting, &mut self.work.concluded);
        }
        self.settle(batch, Some(lane), 0);
    }

    /// Settles what was shared with an extension of its lease that is over.
    pub(crate) fn unshare(&mut self) {
        for Concluded { delivery, settlement, cause, lane } in std::mem::take(&mut self.work.concluded) {
            match (Arc::try_unwrap(delivery), lane) {
                (Err(delivery), lane) => self.work.concluded.push(Concluded { delivery, settlement, cause, lane }),
                (Ok(delivery), Some(lane)) => self.hold(Held::Own(delivery), settlement, cause, lane),
                (Ok(delivery), None) => {
                    let mut batch = Batch::default();
                    batch.push(delivery, settlement, cause);
                    self.settle(batch, None, 0);
                }
            }
        }
    }

    /// Gives back what never began.
    pub(crate) fn release(&mut self, waiting: Vec<Held>) {
        let mut batch = Batch::default();
        add_releases(&mut batch, waiting, &mut self.work.concluded);
        self.settle(batch, None, 0);
    }

    /// Hands a batch to the broker. `holder` is the lane that waits for the outcome of the first entry; `tries` how often
    /// it was tried before.
    pub(crate) fn settle(&mut self, batch: Batch, holder: Option<LaneId>, tries: u32) {
        if tries == 0 {
            for (_, cause) in &batch.causes {
                let counts = &mut self.work.counts;
                match cause.how {
                    How::Answered => {}
                    How::Panicked => counts.panics += 1,
                    How::TimedOut => counts.timeouts += 1,
                    How::Cancelled => counts.cancelled += 1,
                }
            }
        }
        self.hand_over(batch, holder, tries);
    }

    fn hand_over(&mut self, batch: Batch, holder: Option<LaneId>, tries: u32) {
        if batch.entries.is_empty() {
            return;
        }
        if !self.releases && batch.entries.iter().any(|(_, settlement)| matches!(settlement, Settlement::Release)) {
            return self.settle_without_releases(batch, holder, tries);
        }
        let mut flight = Flight::begin(batch, holder, tries, &self.shared.rules, &self.shared.scope.telemetry);
        // Most brokers of this process's own answer at once.
        match futures_util::FutureExt::now_or_never(&mut flight) {
            Some((outcomes, notes)) => self.settled(outcomes, notes),
            None => self.work.flights.push(flight),
        }
    }

    /// Where the endpoint cannot give back, what is dropped comes back by itself.
    fn settle_without_releases(&mut self, batch: Batch, mut holder: Option<LaneId>, tries: u32) {
        let mut causes = batch.causes.into_iter().peekable();
        let mut rest = Batch::default();
        let mut back = None;
        for (index, (delivery, settlement)) in batch.entries.into_iter().enumerate() {
            let cause = causes.next_if(|(at, _)| *at == index).map(|(_, cause)| cause);
            if matches!(settlement, Settlement::Release) {
                self.work.counts.released += 1;
                if index == 0 {
                    back = holder.take().map(|lane| (lane, delivery.message().id().clone()));
                }
            } else {
                rest.push(delivery, settlement, cause);
            }
        }
        self.hand_over(rest, holder, tries);
        if let Some((lane, id)) = back {
            self.go_back(lane, &id);
        }
    }

    /// Settles once more what is due; at the end, all.
    pub(crate) fn settle_again(&mut self) {
        let (now, last) = (self.shared.clock.now(), self.work.last);
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.work.again).into_iter().partition(|again| again.at <= now || last);
        self.work.again = later;
        for again in due {
            let follows = self.shared.rules.sends_followers_back(again.settlement());
            match again.into_batch() {
                Ok((mut batch, lane, tries)) => {
                    if let Some(lane) = lane.filter(|_| follows) {
                        // What arrived of the key meanwhile goes back behind the failure as well.
                        let waiting = self.shared.state.lock().lanes.take_waiting(lane);
                        add_releases(&mut batch, waiting, &mut self.work.concluded);
                    }
                    self.settle(batch, lane, tries);
                }
                Err(shared) => self.work.again.push(shared),
            }
        }
    }

    /// Whether something is on its way, or waits, that is tried until it is done.
    pub(crate) fn insists(&self) -> bool {
        self.work.again.iter().any(Again::insists)
            || self.work.flights.iter().any(Flight::insists)
            || self.work.concluded.iter().any(|concluded| insists(&concluded.settlement))
    }

    pub(crate) fn settled(&mut self, outcomes: Vec<SettleOutcome>, notes: Notes) {
        let (now, last) = (self.shared.clock.now(), self.work.last);
        let telemetry = Arc::clone(&self.shared.scope.telemetry);
        let aftermath = conclude(outcomes, notes, &mut self.work.counts, &telemetry, now, last);
        if !aftermath.again.is_empty() && self.shared.rules.extends {
            // It may have taken as long as a lease to fail, and while it is on its way it cannot be extended.
            self.work.renew_at = Some(now);
        }
        self.work.again.extend(aftermath.again);
        aftermath.settled.into_iter().for_each(|lane| self.resume(lane));
        for (lane, id) in aftermath.back {
            self.go_back(lane, &id);
        }
        for source in aftermath.letters {
            if let Some(letters) = self.letters.iter().find(|letters| letters.source == source) {
                letters.written();
            }
        }
    }

    /// A lane's message is back at the broker; what comes after it goes back as well.
    pub(crate) fn go_back(&mut self, lane: LaneId, id: &MessageId) {
        let stragglers = self.shared.state.lock().lanes.go_back(lane, id);
        self.release(stragglers);
        self.shared.wake();
    }

    /// A lane that was held goes on.
    pub(crate) fn resume(&mut self, lane: LaneId) {
        self.shared.state.lock().lanes.advance(lane);
        self.shared.wake();
    }
}

/// Never began, and goes back uncounted. What is shared with an extension waits for its end.
pub(crate) fn add_releases(batch: &mut Batch, waiting: Vec<Held>, concluded: &mut Vec<Concluded>) {
    for held in waiting {
        match held.into_own() {
            Ok(delivery) => batch.push(delivery, Settlement::Release, None),
            Err(delivery) => {
                concluded.push(Concluded { delivery, settlement: Settlement::Release, cause: None, lane: None });
            }
        }
    }
}
