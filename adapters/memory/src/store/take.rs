//! Handing out.

use std::sync::Arc;

use anybroker_core::{
    AttemptCount, Delivery, DeliveryContext, DeliveryFacts, Lane, OnFailure, Order, Position, Timestamp, Token,
};

use super::flight::{NONE, Slot};
use super::group::GroupState;
use super::log::Log;
use super::pending::Pending;

/// Who takes, how much, and where it goes.
pub(crate) struct Taking<'a> {
    pub(crate) member: u32,
    /// The member's number for this lane, which its tokens carry.
    pub(crate) seat: u32,
    pub(crate) max_attempts: Option<u32>,
    pub(crate) now: Timestamp,
    pub(crate) lease_until: Timestamp,
    pub(crate) context: &'a Arc<DeliveryContext>,
    /// It is filled up to `limit`.
    pub(crate) out: &'a mut Vec<Delivery>,
    pub(crate) limit: usize,
}

impl Taking<'_> {
    fn room(&self) -> usize {
        self.limit.saturating_sub(self.out.len())
    }
}

impl GroupState {
    /// Hands out what there is, up to the limit. What came back takes at most half of the room while there is something
    /// new, so that a message which fails at once and for ever does not keep the others from going out.
    pub(crate) fn take(&mut self, log: &mut Log, taking: &mut Taking<'_>) {
        if !self.serves(taking.member) {
            return;
        }
        let back = !self.returned.is_empty() || self.has_ready_keys(taking.member);
        if back {
            let room = taking.room();
            let share = match self.manner.prefix_acks {
                true => room, // What is read again is read again before anything behind it.
                false if self.new_first => room / 2,
                false => room.div_ceil(2),
            };
            self.new_first = !self.new_first;
            self.take_returned(log, taking, share);
        }
        self.take_new(log, taking);
        if back || self.has_ready_keys(taking.member) {
            self.take_returned(log, taking, usize::MAX);
        }
    }

    fn has_ready_keys(&self, member: u32) -> bool {
        let own = self.members[member as usize].as_ref().is_some_and(|member| !member.keys.is_empty());
        own || !self.keys.ready.is_empty()
    }

    /// Up to `share` messages that came back or were held back.
    fn take_returned(&mut self, log: &Log, taking: &mut Taking<'_>, share: usize) {
        let end = taking.out.len().saturating_add(share).min(taking.limit);
        while taking.out.len() < end {
            if let Some((_, pending)) = self.returned.pop_first() {
                self.hand_over(log, taking, pending, NONE);
                continue;
            }
            let own = self.members[taking.member as usize].as_mut().and_then(|member| member.keys.pop_front());
            match own.or_else(|| self.keys.ready.pop_front()) {
                Some(key) => self.take_key(log, taking, key, end),
                None => return,
            }
        }
    }

    /// What may go out of a key that was listed.
    fn take_key(&mut self, log: &Log, taking: &mut Taking<'_>, number: u32, end: usize) {
        let key = self.keys.key_mut(number);
        if !key.listed || (key.owner != NONE && key.owner != taking.member) {
            return; // An old entry: the key was listed anew since.
        }
        key.listed = false;
        while taking.out.len() < end {
            let key = self.keys.key_mut(number);
            let may_go = key.queue().and_then(super::keys::Queue::head).is_some_and(|(_, moment)| moment <= taking.now);
            let Some(pending) = may_go.then(|| key.queue_mut().pop()).flatten() else { break };
            key.hand_out(taking.member);
            if pending.attempt > 1 && self.on_failure != OnFailure::GoPast {
                key.queue_mut().failed.push(pending.sequence);
            }
            self.hand_over(log, taking, pending, number);
        }
        self.list(number, taking.now);
    }

    /// What nobody has seen yet.
    fn take_new(&mut self, log: &mut Log, taking: &mut Taking<'_>) {
        while self.cursor < log.next() && taking.room() > 0 {
            let sequence = self.cursor;
            if !self.skip.is_empty() && self.skip.remove(&sequence) {
                self.cursor += 1;
                continue;
            }
            let mut key = NONE;
            if self.order != Order::None {
                key = match log.message(sequence) {
                    Some(message) => self.keys.of(self.order, message),
                    None => NONE,
                };
                if key != NONE && !self.admit(log, taking, sequence, key) {
                    if self.order == Order::Total && !self.keys.key(key).parks(sequence) {
                        return; // Nothing behind it can go out either.
                    }
                    continue;
                }
            }
            self.cursor += 1;
            self.hand_over(log, taking, Pending::unseen(sequence, taking.now), key);
        }
    }

    /// Whether the member may get this new message of a key; otherwise it is parked, or waits in the key.
    fn admit(&mut self, log: &mut Log, taking: &Taking<'_>, sequence: u64, number: u32) -> bool {
        let park = self.on_failure == OnFailure::Park;
        let key = self.keys.key_mut(number);
        if park && key.parks(sequence) {
            self.cursor += 1;
            self.bury_parked(log, Pending::unseen(sequence, taking.now), number, taking.now);
            return false;
        }
        if key.admits(taking.member) {
            key.hand_out(taking.member);
            return true;
        }
        if self.order == Order::Key {
            self.cursor += 1;
            key.queue_mut().fresh.push_back(sequence);
            self.list(number, taking.now);
            self.wake();
        }
        false
    }

    fn hand_over(&mut self, log: &Log, taking: &mut Taking<'_>, pending: Pending, key: u32) {
        let Some(message) = pending.redriven().or_else(|| log.message(pending.sequence)) else {
            debug_assert!(false, "an unsettled message is always there");
            return;
        };
        let message = Arc::clone(message);
        let (sequence, mut attempt) = (pending.sequence, pending.attempt);
        if self.manner.attempts != AttemptCount::Exact {
            // Counted too much, it gets its last attempt all the same: nobody is buried unseen.
            attempt = attempt.min(taking.max_attempts.unwrap_or(u32::MAX));
        }
        let deliveries = pending.deliveries.saturating_add(1);
        let mut slot = Slot::new(sequence, attempt, deliveries, pending.history);
        (slot.lease_until, slot.handed_at) = (taking.lease_until, taking.now);
        (slot.member, slot.key) = (taking.member, key);
        let hand_overs = self.manner.hand_overs.then_some(deliveries);
        let member = self.members[taking.member as usize].as_mut().expect("a member that takes has joined");
        let lane = Lane { index: taking.seat, epoch: member.epoch };
        let (number, generation) = self.flight.insert(&mut member.leases, slot);
        let facts = DeliveryFacts {
            token: Token::Pair(u64::from(taking.seat) << 32 | u64::from(number), generation),
            attempt,
            deliveries: hand_overs,
            lane,
            position: Some(Position::new(sequence)),
            lease_until: Some(taking.lease_until),
        };
        taking.out.push(Delivery::shared(message, facts, taking.context));
    }
}
