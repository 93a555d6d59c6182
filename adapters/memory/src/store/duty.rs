//! Lanes that belong to one member each, and acks that only count as a prefix: what logs with partitions do.

use std::time::Duration;

use anybroker_core::Timestamp;

use super::flight::Slot;
use super::group::GroupState;
use super::log::Log;
use super::pending::Pending;
use super::settled::Return;

/// How long a member may settle what it holds of a lane that is taken away.
const GRACE: Duration = Duration::from_millis(500);

/// Who works on a lane.
#[derive(Debug, Default)]
pub(crate) struct Duty {
    owner: Option<u32>,
    epoch: u32,
    /// To whom it goes, as soon as nothing is out, at the latest at that moment.
    next: Option<(Option<u32>, Timestamp)>,
}

/// What a member is told about a lane.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LaneEvent {
    Assigned { epoch: u32 },
    Revoking { epoch: u32, deadline: Timestamp },
    Lost { epoch: u32 },
}

impl GroupState {
    /// Whether the member may take: lanes that are assigned serve their owner only, and nobody while they move.
    pub(super) fn serves(&self, member: u32) -> bool {
        self.duty.as_ref().is_none_or(|duty| duty.owner == Some(member) && duty.next.is_none())
    }

    pub(super) fn duty_ends(&self) -> Option<Timestamp> {
        self.duty.as_ref()?.next.map(|(_, deadline)| deadline)
    }

    /// Gives the lane to `owner`, once whoever has it has settled what is out.
    pub(crate) fn assign(&mut self, log: &mut Log, owner: Option<u32>, now: Timestamp) {
        let Some(duty) = &mut self.duty else { return };
        let (old, epoch, moving) = (duty.owner, duty.epoch, duty.next.take().is_some());
        if old == owner {
            if moving && let Some(member) = owner {
                self.tell(member, LaneEvent::Assigned { epoch });
            }
            return;
        }
        match old.filter(|old| self.flight.len() > 0 && self.is_member(*old)) {
            Some(old) => {
                let deadline = now.after(GRACE);
                if let Some(duty) = &mut self.duty {
                    duty.next = Some((owner, deadline));
                }
                self.tell(old, LaneEvent::Revoking { epoch, deadline });
            }
            None => self.hand_lane(log, owner, now),
        }
    }

    /// Moves the lane on, where that is due.
    pub(super) fn move_lane(&mut self, log: &mut Log, now: Timestamp) {
        let Some((owner, deadline)) = self.duty.as_ref().and_then(|duty| duty.next) else { return };
        if self.flight.len() == 0 || deadline <= now {
            self.hand_lane(log, owner, now);
        }
    }

    fn hand_lane(&mut self, log: &mut Log, owner: Option<u32>, now: Timestamp) {
        let Some(duty) = &mut self.duty else { return };
        let (old, epoch) = (duty.owner, duty.epoch);
        *duty = Duty { owner, epoch: epoch + 1, next: None };
        if let Some(old) = old {
            self.dismiss(log, old, now);
            self.tell(old, LaneEvent::Lost { epoch });
        }
        if let Some(owner) = owner {
            self.set_epoch(owner, epoch + 1);
            self.tell(owner, LaneEvent::Assigned { epoch: epoch + 1 });
        }
        self.wake();
    }

    /// Records an ack that only counts once everything before it is settled.
    pub(super) fn ack_above(&mut self, slot: Slot) {
        self.above.insert(slot.sequence, super::settled::returning(slot));
    }

    /// Commits the prefix.
    pub(super) fn commit(&mut self, log: &mut Log) {
        if self.above.is_empty() {
            return;
        }
        let lowest = self.lowest_unsettled(log);
        while self.above.first_key_value().is_some_and(|(sequence, _)| *sequence < lowest) {
            if let Some((sequence, _)) = self.above.pop_first() {
                log.settle(sequence);
            }
        }
    }

    /// A member that held a delivery for too long counts as dead, in all lanes, until it receives again: as one that
    /// exceeds its poll interval.
    pub(super) fn suspect(&mut self, member: u32) {
        if self.duty.is_some() && !self.suspects.contains(&member) {
            self.suspects.push(member);
        }
    }

    pub(crate) fn take_suspects(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.suspects)
    }

    /// Takes everything back from a member that goes. Was anything out, then whoever takes over knows only what is
    /// committed; otherwise everything is.
    pub(super) fn dismiss(&mut self, log: &mut Log, member: u32, now: Timestamp) {
        let held = self.holds(member);
        self.recall(log, member, &Return::Gone, now);
        self.commit(log);
        if held {
            for pending in std::mem::take(&mut self.above).into_values() {
                self.requeue(log, pending, None, now);
            }
        }
    }

    /// What has failed waits beside the lane (as in a retry topic) and keeps nothing from being committed.
    fn lowest_unsettled(&self, log: &Log) -> u64 {
        let in_log = |pending: &&Pending| pending.redriven().is_none() && pending.attempt == 1;
        let out =
            self.flight.iter().map(|(_, slot)| slot).filter(|slot| slot.redriven().is_none() && slot.attempt == 1);
        let returned = self.returned.values().filter(in_log).map(|pending| pending.sequence);
        let delayed = self.delayed.values().filter(in_log).map(|pending| pending.sequence);
        let waiting = out.map(|slot| slot.sequence).chain(returned).chain(delayed).chain(self.keys.sequences(in_log));
        waiting.chain(self.unseen(log).next()).min().unwrap_or(u64::MAX)
    }

    /// The member's connection is lost for a moment: what it has out comes back.
    pub(crate) fn disconnect(&mut self, log: &mut Log, member: u32, how: &Return, now: Timestamp) {
        let epoch = self.epoch(member);
        self.recall(log, member, how, now);
        self.tell(member, LaneEvent::Lost { epoch });
        self.set_epoch(member, epoch + 1);
        self.tell(member, LaneEvent::Assigned { epoch: epoch + 1 });
    }
}
