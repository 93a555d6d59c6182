//! What becomes of deliveries: settled for good, back, or dead.

use std::sync::Arc;

use anybroker_core::{AttemptCount, ByteString, LateAck, Message, OnFailure, Reason, Timestamp, Verdict};

use super::flight::{NONE, Slot};
use super::group::GroupState;
use super::letters::Letter;
use super::log::Log;
use super::pending::{History, Pending};

/// How a delivery comes back.
#[derive(Debug, Clone)]
pub(crate) enum Return {
    /// The handler failed.
    Failed { until: Option<Timestamp>, error_type: Option<ByteString> },
    /// Given back on purpose: as if it had not been handed out.
    Released,
    /// Its lease ended, or it was dropped: a hand-over without an outcome.
    Lost,
    /// Its member, or its lane, is gone.
    Gone,
}

impl Slot {
    pub(super) fn redriven(&self) -> Option<&Arc<Message>> {
        self.history.as_ref()?.redriven.as_ref()
    }
}

impl GroupState {
    /// Takes a delivery back, where it is still out.
    pub(crate) fn claim(&mut self, number: u32, generation: u64) -> Option<Slot> {
        let member = self.flight.find(number, generation)?.member;
        let leases = &mut self.members[member as usize].as_mut()?.leases;
        Some(self.flight.remove(leases, number))
    }

    /// Done.
    pub(crate) fn ack(&mut self, log: &mut Log, slot: Slot, now: Timestamp) {
        self.key_freed(&slot, now);
        if self.manner.prefix_acks && slot.redriven().is_none() {
            self.ack_above(slot);
        } else {
            self.settled(log, slot.sequence, slot.redriven().is_some());
        }
    }

    /// An ack of a delivery that is not out any more. Whether it is accepted.
    pub(crate) fn late_ack(&mut self, log: &mut Log, sequence: u64, now: Timestamp) -> bool {
        if self.manner.late_ack == LateAck::Refused {
            return false;
        }
        if let Some((pending, key)) = self.take_waiting(sequence) {
            self.settled(log, sequence, pending.redriven().is_some());
            if key != NONE {
                self.list(key, now);
                self.wake();
            }
            return true;
        }
        if self.manner.late_ack == LateAck::Possible {
            return false;
        }
        let again =
            self.flight.iter().find(|(_, slot)| slot.sequence == sequence).map(|(number, slot)| (number, slot.member));
        if let Some((number, member)) = again
            && let Some(Some(member)) = self.members.get_mut(member as usize)
        {
            let slot = self.flight.remove(&mut member.leases, number);
            self.ack(log, slot, now);
        }
        sequence < self.cursor
    }

    /// What a batch of settles leaves to do.
    pub(crate) fn after_settling(&mut self, log: &mut Log, now: Timestamp) {
        self.commit(log);
        self.move_lane(log, now);
    }

    /// The handler failed; it comes back at once, or at that moment.
    pub(crate) fn nack(
        &mut self,
        log: &mut Log,
        slot: Slot,
        error_type: Option<ByteString>,
        until: Option<Timestamp>,
        now: Timestamp,
    ) {
        self.come_back(log, slot, &Return::Failed { until, error_type }, now);
    }

    /// Never again here. The letter and its source change together, under the lane's lock.
    pub(crate) fn dead_letter(&mut self, log: &mut Log, slot: Slot, verdict: Verdict, now: Timestamp) {
        let (key, attempts) = (slot.key, slot.attempt);
        if key != NONE {
            self.keys.key_mut(key).take_back(slot.sequence);
        }
        let pending = returning(slot);
        self.bury(log, pending, verdict, attempts, key, now);
        if key != NONE {
            self.list(key, now);
            self.wake();
        }
    }

    /// Keeps the lease until then. Whether the delivery is still out.
    pub(crate) fn extend(&mut self, number: u32, generation: u64, until: Timestamp) -> bool {
        let Some(slot) = self.flight.find(number, generation) else { return false };
        let Some(Some(member)) = self.members.get_mut(slot.member as usize) else { return false };
        self.flight.extend(&mut member.leases, number, until);
        true
    }

    /// A delivery comes back.
    pub(crate) fn come_back(&mut self, log: &mut Log, slot: Slot, how: &Return, now: Timestamp) {
        let key = slot.key;
        if key != NONE {
            self.keys.key_mut(key).take_back(slot.sequence);
        }
        let mut pending = returning(slot);
        match how {
            Return::Failed { until, error_type } => {
                pending.attempt = pending.attempt.saturating_add(1);
                pending.not_before = until.unwrap_or(pending.not_before);
                if let Some(history) = pending.history.as_mut().filter(|_| error_type.is_some()) {
                    history.error_type.clone_from(error_type);
                }
            }
            Return::Released | Return::Gone if !self.manner.release_counts => {
                pending.deliveries = pending.deliveries.saturating_sub(1);
                if matches!(how, Return::Gone) && self.manner.attempts == AttemptCount::Volatile {
                    pending.attempt = 1;
                }
            }
            Return::Lost if self.manner.attempts != AttemptCount::Approximate => {}
            Return::Released | Return::Gone | Return::Lost => pending.attempt = pending.attempt.saturating_add(1),
        }
        self.requeue(log, pending, Some(key), now);
        if key != NONE {
            self.list(key, now);
            self.wake();
        }
    }

    /// Puts a message where it waits for its next hand-over.
    pub(super) fn requeue(&mut self, log: &mut Log, pending: Pending, key: Option<u32>, now: Timestamp) {
        let sequence = pending.sequence;
        if pending.redriven().is_none()
            && let Some(expires) = log.instructions(sequence).expires.filter(|expires| *expires <= now)
        {
            self.bury_expired(log, pending, expires);
            return;
        }
        let key = key.unwrap_or_else(|| self.key_of(log, &pending));
        if key != NONE && self.on_failure == OnFailure::Park && self.keys.key(key).parks(sequence) {
            self.bury_parked(log, pending, key, now);
            return;
        }
        let due = pending.not_before <= now;
        match (key, self.on_failure) {
            (NONE, _) if due => drop(self.returned.insert(sequence, pending)),
            (NONE, _) | (_, OnFailure::GoPast) if !due => {
                self.delayed.insert((pending.not_before, sequence), pending);
            }
            // Held back for the first time: not a failure, which later ones would have to wait for.
            _ if !due && pending.deliveries == 0 => drop(self.delayed.insert((pending.not_before, sequence), pending)),
            _ => {
                self.keys.key_mut(key).queue_mut().put(pending);
                self.list(key, now);
            }
        }
        self.wake();
    }

    /// A message that was not in flight has expired.
    pub(super) fn expire(&mut self, log: &mut Log, sequence: u64, moment: Timestamp) {
        if sequence >= self.cursor && self.skip.insert(sequence) {
            self.bury_expired(log, Pending::unseen(sequence, moment), moment);
        } else if let Some((pending, key)) = self.take_waiting(sequence) {
            self.bury_expired(log, pending, moment);
            if key != NONE {
                self.list(key, moment);
                self.wake();
            }
        }
        // Neither: it is in flight, and looked at when it comes back.
    }

    /// Takes a message that waits, with the key it waits in.
    fn take_waiting(&mut self, sequence: u64) -> Option<(Pending, u32)> {
        if let Some(pending) = self.returned.remove(&sequence) {
            return Some((pending, NONE));
        }
        let delayed = self.delayed.keys().find(|(_, other)| *other == sequence).copied();
        if let Some(pending) = delayed.and_then(|place| self.delayed.remove(&place)) {
            return Some((pending, NONE));
        }
        for (key, queue) in self.keys.queues_mut() {
            if let Some(place) = queue.returned.iter().position(|pending| pending.sequence == sequence) {
                return queue.returned.remove(place).map(|pending| (pending, key));
            }
            if let Ok(place) = queue.fresh.binary_search(&sequence) {
                queue.fresh.remove(place);
                return Some((Pending::unseen(sequence, Timestamp::default()), key));
            }
        }
        None
    }

    fn bury_expired(&mut self, log: &mut Log, pending: Pending, moment: Timestamp) {
        let attempts = pending.attempt - 1;
        self.bury(log, pending, Verdict::new(Reason::Expired), attempts, NONE, moment);
    }

    pub(super) fn bury_parked(&mut self, log: &mut Log, pending: Pending, key: u32, now: Timestamp) {
        let attempts = pending.attempt - 1;
        self.bury(log, pending, Verdict::new(Reason::Parked), attempts, key, now);
    }

    /// Makes a dead letter of it; where keys are parked, later messages of its key follow.
    fn bury(&mut self, log: &mut Log, pending: Pending, verdict: Verdict, attempts: u32, key: u32, now: Timestamp) {
        let sequence = pending.sequence;
        let history = pending.history.map(|history| *history).unwrap_or_default();
        let redriven = history.redriven.is_some();
        let Some(message) = history.redriven.or_else(|| log.message(sequence).cloned()) else { return };
        let parked = verdict.reason == Reason::Parked;
        self.letters.add(Letter {
            sequence,
            message,
            reason: verdict.reason,
            error_type: verdict.error_type.or(history.error_type),
            detail: verdict.detail,
            attempts,
            first_at: history.first_at,
            last_at: now,
            redrives: history.redrives,
            stored_at: history.stored_at.or_else(|| log.stored_at(sequence)),
        });
        self.settled(log, sequence, redriven);
        if key == NONE || self.on_failure != OnFailure::Park {
            return;
        }
        let queue = self.keys.key_mut(key).queue_mut();
        queue.letters.insert(sequence);
        if parked {
            return; // The letter in front of it takes the rest along.
        }
        let mut behind = Vec::new();
        let first = queue.returned.partition_point(|other| other.sequence < sequence);
        behind.extend(queue.returned.drain(first..));
        let first = queue.fresh.partition_point(|other| *other < sequence);
        behind.extend(queue.fresh.drain(first..).map(|sequence| Pending::unseen(sequence, now)));
        behind.sort_by_key(|pending| pending.sequence);
        behind.into_iter().for_each(|pending| self.bury_parked(log, pending, key, now));
    }

    /// Counts it as settled for good.
    fn settled(&mut self, log: &mut Log, sequence: u64, redriven: bool) {
        if redriven {
            self.redriven -= 1;
            return;
        }
        if !self.expiring.is_empty()
            && let Some(moment) = log.instructions(sequence).expires
        {
            self.expiring.remove(&(moment, sequence));
        }
        log.settle(sequence);
    }

    fn key_freed(&mut self, slot: &Slot, now: Timestamp) {
        if slot.key == NONE {
            return;
        }
        let key = self.keys.key_mut(slot.key);
        key.take_back(slot.sequence);
        if key.queue().is_some() {
            self.list(slot.key, now);
            self.wake();
        }
    }

    fn key_of(&mut self, log: &Log, pending: &Pending) -> u32 {
        match pending.redriven().or_else(|| log.message(pending.sequence)) {
            Some(message) => self.keys.of(self.order, message),
            None => NONE,
        }
    }

    /// Makes a key known to those who may take its next message, once that may go out.
    pub(super) fn list(&mut self, number: u32, now: Timestamp) {
        let key = self.keys.key(number);
        if key.listed {
            return;
        }
        let Some((_, not_before)) = key.queue().and_then(super::keys::Queue::head) else { return };
        if not_before > now {
            self.keys.set_timer(not_before, number);
            return;
        }
        let owner = key.owner;
        match self.members.get_mut(owner as usize) {
            Some(Some(member)) => member.keys.push_back(number),
            _ => self.keys.ready.push_back(number),
        }
        self.keys.key_mut(number).listed = true;
    }
}

/// The waiting form of a delivery that comes back.
pub(super) fn returning(slot: Slot) -> Pending {
    let mut history = slot.history.unwrap_or_else(|| Box::new(History::default()));
    history.first_at.get_or_insert(slot.handed_at);
    Pending {
        sequence: slot.sequence,
        attempt: slot.attempt,
        deliveries: slot.deliveries,
        not_before: Timestamp::default(),
        history: Some(history),
    }
}
