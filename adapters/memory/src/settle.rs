//! Settling. Everything is done in the call.

use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, Error, ErrorKind, Lane, Result, SettleError, Settlement, Settler, Settling, Timestamp, Token,
};
use async_trait::async_trait;
use parking_lot::MutexGuard;

use crate::store::{GroupState, LaneState, Log, Return, Seat};
use crate::subscription::Membership;

#[async_trait]
impl Settler for Membership {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let now = self.store.clock.now();
        let mut at = At::default();
        let mut outcomes = Vec::with_capacity(batch.len());
        let level = self.level();
        for (delivery, settlement) in batch {
            outcomes.push(self.settle_one(&mut at, delivery, settlement, now).map(|()| level));
        }
        at.leave(now);
        Settling::ready(outcomes)
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let (now, until) = (self.store.clock.now(), self.store.clock.deadline(lease));
        let mut at = At::default();
        let mut outcomes = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            let place = self.place(delivery.token());
            let kept = place.is_some_and(|(seat, slot, generation)| {
                let lane = at.enter(seat, now);
                lane.seated(seat).is_some_and(|(group, _)| group.extend(slot, generation, until))
            });
            outcomes.push(if kept { Ok(()) } else { Err(stale("extend", delivery)) });
        }
        at.leave(now);
        outcomes
    }

    fn abandoned(&self, token: &Token, _lane: Lane) {
        let Some((seat, slot, generation)) = self.place(token) else { return };
        let now = self.store.clock.now();
        let mut lane = seat.topic.lane(seat.lane);
        if let Some((group, log)) = lane.seated(seat)
            && let Some(slot) = group.claim(slot, generation)
        {
            group.come_back(log, slot, &Return::Lost, now);
        }
    }
}

impl Membership {
    fn settle_one<'a>(
        &'a self,
        at: &mut At<'a>,
        delivery: Delivery,
        settlement: Settlement,
        now: Timestamp,
    ) -> std::result::Result<(), SettleError> {
        let Some((seat, slot, generation)) = self.place(delivery.token()) else {
            let error = stale("settle", &delivery);
            return Err(SettleError::new(delivery, error));
        };
        let lane = at.enter(seat, now);
        let mut found = None;
        if let Some((group, log)) = lane.seated(seat) {
            found = match group.claim(slot, generation) {
                Some(slot) => Some((slot, group, log)),
                None if is_accepted_late(group, log, &delivery, &settlement, now) => return Ok(()),
                None => None,
            };
        }
        let Some((slot, group, log)) = found else {
            // Without the lock: the failed entry may be dropped, and that takes it again.
            at.leave(now);
            let error = stale("settle", &delivery);
            return Err(SettleError::new(delivery, error));
        };
        match settlement {
            Settlement::Ack => group.ack(log, slot, now),
            Settlement::Nack(nack) => {
                let until = (!nack.delay.is_zero()).then(|| self.store.clock.deadline(nack.delay));
                group.nack(log, slot, nack.error_type, until, now);
            }
            Settlement::Release => group.come_back(log, slot, &Return::Released, now),
            Settlement::DeadLetter(verdict) => group.dead_letter(log, slot, *verdict, now),
        }
        Ok(())
    }

    /// What `Ok` of a settle says.
    fn level(&self) -> AckLevel {
        let manner = self.store.settings.profile.manner();
        match (manner.prefix_acks, manner.acks_are_sent) {
            (true, _) => AckLevel::Recorded,
            (_, true) => AckLevel::Sent,
            _ => AckLevel::Confirmed,
        }
    }

    fn place(&self, token: &Token) -> Option<(&Seat, u32, u64)> {
        let Token::Pair(place, generation) = token else { return None };
        let seat = self.seats.get(usize::try_from(place >> 32).ok()?)?;
        Some((seat, u32::try_from(place & u64::from(u32::MAX)).ok()?, *generation))
    }
}

/// The lane that is locked at the moment: a batch of one lane takes its lock once.
#[derive(Default)]
struct At<'a>(Option<(&'a Seat, MutexGuard<'a, LaneState>)>);

impl<'a> At<'a> {
    fn enter(&mut self, seat: &'a Seat, now: Timestamp) -> &mut LaneState {
        if self.0.as_ref().is_none_or(|(other, _)| !std::ptr::eq(*other, seat)) {
            self.leave(now);
            let mut lane = seat.topic.lane(seat.lane);
            // Leases that have ended are over, whether or not anyone has looked since.
            if let Some((group, log)) = lane.seated(seat) {
                group.advance(log, now);
            }
            self.0 = Some((seat, lane));
        }
        &mut self.0.as_mut().expect("entered just above").1
    }

    fn leave(&mut self, now: Timestamp) {
        if let Some((seat, mut lane)) = self.0.take() {
            if let Some((group, log)) = lane.seated(seat) {
                group.after_settling(log, now);
            }
            seat.topic.tell_room(&mut lane);
        }
    }
}

/// Whether it is an ack that the profile accepts although the delivery is not out any more.
fn is_accepted_late(
    group: &mut GroupState,
    log: &mut Log,
    delivery: &Delivery,
    settlement: &Settlement,
    now: Timestamp,
) -> bool {
    matches!(settlement, Settlement::Ack)
        && delivery.position().is_some_and(|position| group.late_ack(log, position.major, now))
}

fn stale(operation: &'static str, delivery: &Delivery) -> Error {
    let text = "its lease, or its group, is gone; the message comes back or is settled by whoever has it now";
    Error::new(ErrorKind::StaleDelivery, operation, text)
        .with("group", delivery.group())
        .with("id", delivery.message().id())
}
