//! What happened to one message in one group.

use std::ops::RangeInclusive;

use anybroker_core::{AttemptCount, Effect, ErrorKind, Position};

use crate::history::Verb;

/// A delivery that is with a member.
#[derive(Debug, Clone)]
pub(super) struct Held {
    /// When it was delivered.
    pub(super) at: u64,
    pub(super) delivery: u64,
    pub(super) member: u64,
    /// The end of its lease, in microseconds of the history.
    pub(super) until: u64,
    pub(super) lane: u32,
    pub(super) position: Option<Position>,
    pub(super) attempt: u32,
    /// Its place among all deliveries of the history.
    pub(super) order: u64,
}

/// Why a message may come again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Returned {
    Nacked,
    Released,
    Dropped,
    MemberGone,
    Redriven,
}

/// A delivery whose settling was asked for.
#[derive(Debug, Clone)]
struct Settling {
    held: Held,
    verb: Verb,
    /// A nack of the last attempt: a dead letter.
    buries: bool,
    /// It was asked for after the lease had ended.
    late: bool,
    /// Its connection was lost before there was an answer.
    in_doubt: bool,
    /// It has come again meanwhile: whatever becomes of this settling, it is somebody else's.
    has_come: bool,
    /// When it was confirmed.
    ok_at: Option<u64>,
    /// It was an ack above a hole, at that moment.
    above_hole: Option<u64>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Story {
    pub(super) deliveries: u32,
    /// Returns that have not come again yet.
    owed: Vec<Returned>,
    returns: u32,
    /// Deliveries beyond those that are owed which are no anomaly (acked above a hole, then a close).
    excused: u32,
    /// Returns that are no failure of a handler, and may be counted as one where counting is approximate.
    uncounted: u32,
    /// Members that went away: a volatile count may start anew.
    forgotten: bool,
    nacks: u32,
    /// Nacks whose effect is unknown.
    uncertain: u32,
    held: Vec<Held>,
    settling: Vec<Settling>,
    pub(super) acked: u32,
    pub(super) buried: u32,
    pub(super) redriven: bool,
    pub(super) purged: bool,
    /// An ack was asked for whose effect nobody knows.
    maybe_acked: bool,
    last_scan: Option<(u64, u32)>,
    back_at: u64,
}

impl Story {
    /// Whether one more delivery has a cause; takes it.
    pub(super) fn justify(&mut self, at: u64, copies: u32, moved: Option<u64>) -> bool {
        let justified = self.has_cause(at, copies, moved);
        if justified && copies == 1 {
            // It is to be settled anew: an ack before is void.
            self.acked = 0;
        }
        justified
    }

    fn has_cause(&mut self, at: u64, copies: u32, moved: Option<u64>) -> bool {
        if self.deliveries.saturating_sub(self.returns) < copies {
            // Of this copy it is the first; or it came back, which the returns have counted.
            self.owed.pop();
            return true;
        }
        // What was handed out in a fault may be lost; as long as there is another cause, its member is taken to hold it.
        let is_exposed = |held: &Held| held.until <= held.at;
        let lost = |held: &Held| held.until <= at || moved.is_some_and(|moved| held.at <= moved);
        if self.come_back(|held| lost(held) && !is_exposed(held)) {
            return true;
        }
        if let Some(late) = self.settling.iter_mut().find(|settling| settling.late || settling.in_doubt) {
            (late.late, late.in_doubt, late.has_come) = (false, false, true);
            self.returns += 1;
            self.uncounted += 1;
            return true;
        }
        if self.excused > 0 {
            self.excused -= 1;
            self.returns += 1;
            return true;
        }
        if self.come_back(lost) {
            return true;
        }
        let forgotten =
            |settling: &Settling| settling.above_hole.zip(moved).is_some_and(|(acked, moved)| acked <= moved);
        if let Some(place) = self.settling.iter().position(forgotten) {
            self.settling.remove(place);
            self.returns += 1;
            self.uncounted += 1;
            return true;
        }
        false
    }

    /// One that is held comes back, where there is one like that.
    fn come_back(&mut self, is_lost: impl Fn(&Held) -> bool) -> bool {
        let Some(place) = self.held.iter().position(is_lost) else { return false };
        self.back_at = self.held.remove(place).until;
        self.returns += 1;
        self.uncounted += 1;
        true
    }

    /// The attempt numbers that the next delivery may have.
    pub(super) fn attempts(&self, count: AttemptCount) -> RangeInclusive<u32> {
        let exact = 1 + self.nacks;
        let least = exact.saturating_sub(self.uncertain).max(1);
        match count {
            AttemptCount::Exact => least..=exact,
            AttemptCount::Approximate => least..=exact + self.uncounted + self.deliveries,
            AttemptCount::Volatile if self.forgotten => 1..=exact,
            AttemptCount::Volatile => least..=exact,
        }
    }

    pub(super) fn deliver(&mut self, held: Held) {
        self.deliveries += 1;
        self.held.push(held);
    }

    pub(super) fn held(&self) -> impl Iterator<Item = &Held> {
        self.held.iter()
    }

    pub(super) fn extend(&mut self, delivery: u64, until: u64) {
        if let Some(held) = self.held.iter_mut().find(|held| held.delivery == delivery) {
            held.until = until;
        }
    }

    fn take(&mut self, delivery: u64) -> Option<Held> {
        let place = self.held.iter().position(|held| held.delivery == delivery)?;
        Some(self.held.remove(place))
    }

    pub(super) fn give_back(&mut self, at: u64, delivery: u64, why: Returned) {
        if self.take(delivery).is_some() {
            self.returned(at, why);
        }
    }

    /// Since when it may be leased again: when it was given back last.
    pub(super) fn back_at(&self) -> u64 {
        self.back_at
    }

    fn returned(&mut self, at: u64, why: Returned) {
        self.back_at = at;
        self.owed.push(why);
        self.returns += 1;
        match why {
            Returned::Nacked => self.nacks += 1,
            Returned::Redriven => (self.nacks, self.uncounted, self.uncertain) = (0, 0, 0),
            _ => self.uncounted += 1,
        }
    }

    pub(super) fn settle(&mut self, at: u64, delivery: u64, verb: Verb, max_attempts: Option<u32>) {
        let Some(held) = self.take(delivery) else {
            // It has come to somebody again; where the broker does not mind, this settles it all the same.
            self.maybe_acked |= verb == Verb::Ack;
            return;
        };
        let late = held.until <= at;
        let buries =
            verb == Verb::DeadLetter || (verb == Verb::Nack && max_attempts.is_some_and(|max| held.attempt >= max));
        match verb {
            _ if buries => self.buried += 1,
            Verb::Nack => {
                self.returned(at, Returned::Nacked);
                // The source may be somebody else's by now, with the count that it had.
                self.uncertain += u32::from(late);
            }
            Verb::Release => self.returned(at, Returned::Released),
            Verb::Ack | Verb::DeadLetter => {}
        }
        self.settling.push(Settling {
            held,
            verb,
            buries,
            late,
            in_doubt: false,
            has_come: false,
            ok_at: None,
            above_hole: None,
        });
    }

    pub(super) fn settled(&mut self, at: u64, delivery: u64, is_above_hole: bool) -> Option<Verb> {
        let settling = self.settling.iter_mut().find(|settling| settling.held.delivery == delivery)?;
        settling.ok_at = Some(at);
        if settling.verb == Verb::Ack {
            self.acked += 1;
            settling.above_hole = is_above_hole.then_some(at);
        }
        Some(settling.verb)
    }

    /// The delivery is the application's again; what the settling was to do is undone as far as its effect is known.
    pub(super) fn settle_failed(&mut self, delivery: u64, kind: ErrorKind, effect: Effect) {
        let Some(place) = self.settling.iter().position(|settling| settling.held.delivery == delivery) else { return };
        let mut settling = self.settling.remove(place);
        let stale = matches!(kind, ErrorKind::StaleDelivery | ErrorKind::Closed);
        if effect == Effect::Unknown {
            match settling.verb {
                // It comes again; where the nack is a copy, source and copy may both.
                Verb::Nack if !settling.buries => {
                    self.uncertain += 1;
                    self.excused += 1;
                }
                // It may or may not come again.
                _ => {
                    self.excused += 1;
                    self.maybe_acked = true;
                }
            }
            return;
        }
        match settling.verb {
            _ if settling.buries => self.buried -= 1,
            Verb::Nack | Verb::Release => {
                settling.has_come |= self.owed.pop().is_none();
                self.returns -= u32::from(!settling.has_come);
                match settling.verb {
                    Verb::Nack => {
                        self.nacks -= 1;
                        self.uncertain = self.uncertain.saturating_sub(u32::from(settling.late));
                    }
                    _ => self.uncounted = self.uncounted.saturating_sub(1),
                }
            }
            Verb::Ack | Verb::DeadLetter => {}
        }
        if stale {
            // It was not this member's any more: it comes to somebody, or has come already.
            self.excused += 1;
            self.uncounted += 1;
            self.forgotten = true;
        } else if !settling.has_come {
            self.held.push(settling.held);
        }
    }

    fn is_maybe_acked(&self) -> bool {
        self.maybe_acked || self.settling.iter().any(|settling| settling.verb == Verb::Ack && settling.ok_at.is_none())
    }

    /// How a delivery is being settled, or was.
    pub(super) fn verb_of(&self, delivery: u64) -> Option<Verb> {
        self.settling.iter().find(|settling| settling.held.delivery == delivery).map(|settling| settling.verb)
    }

    /// Lane and place of a delivery that is being settled.
    pub(super) fn place_of(&self, delivery: u64) -> Option<(u32, u64)> {
        let settling = self.settling.iter().find(|settling| settling.held.delivery == delivery)?;
        Some((settling.held.lane, rank(&settling.held)))
    }

    /// Whether it is unsettled and stands before that place of the lane.
    pub(super) fn is_hole_below(&self, lane: u32, place: u64) -> bool {
        let below = |held: &Held| held.lane == lane && rank(held) < place;
        self.held.iter().any(below)
            || (!self.owed.is_empty() && self.settling.iter().any(|settling| below(&settling.held)))
    }

    /// Lane and place of what a member left unsettled: what was acked above is above a hole.
    pub(super) fn holes(&self, member: u64) -> Vec<(u32, u64)> {
        let unsettled = self.held.iter().filter(|held| held.member == member);
        let returned = self
            .settling
            .iter()
            .filter(|settling| settling.held.member == member && !self.owed.is_empty() && settling.verb != Verb::Ack);
        unsettled
            .map(|held| (held.lane, rank(held)))
            .chain(returned.map(|settling| (settling.held.lane, rank(&settling.held))))
            .collect()
    }

    /// The member is gone: what it held comes back.
    pub(super) fn leave(&mut self, at: u64, member: u64) {
        self.forgotten |= self.deliveries > 0;
        let gone: Vec<u64> = self.held.iter().filter(|held| held.member == member).map(|held| held.delivery).collect();
        for delivery in gone {
            self.give_back(at, delivery, Returned::MemberGone);
        }
    }

    /// The member has lost its connection, or a lane: what it held may come again, as after its lease.
    pub(super) fn lose(&mut self, at: u64, member: u64, lane: Option<u32>) {
        self.forgotten |= self.deliveries > 0;
        for held in &mut self.held {
            if held.member == member && lane.is_none_or(|lane| lane == held.lane) {
                held.until = held.until.min(at);
            }
        }
        // What is on its way to be settled may arrive or not; a nack that is a copy may leave its source behind.
        for settling in &mut self.settling {
            let held = &settling.held;
            if held.member == member && lane.is_none_or(|lane| lane == held.lane) && settling.ok_at.is_none() {
                settling.in_doubt = true;
                self.uncertain += u32::from(settling.verb == Verb::Nack && !settling.buries);
            }
        }
    }

    /// What a member that goes has settled since then may be forgotten, and acks where `may` says so.
    pub(super) fn forget_acks(
        &mut self,
        member: u64,
        lane: Option<u32>,
        since: Option<u64>,
        may: impl Fn(u32, u64) -> bool,
    ) {
        let concerns = |held: &Held| held.member == member && lane.is_none_or(|lane| lane == held.lane);
        let forgotten = |settling: &Settling| since.is_some_and(|since| settling.ok_at.is_none_or(|at| at >= since));
        let mut settled = self.settling.iter().filter(|settling| concerns(&settling.held));
        let in_a_fault = since.is_some_and(|since| since > 0);
        let doubled = in_a_fault && settled.clone().any(|settling| settling.verb == Verb::Nack && forgotten(settling));
        let may_come = settled.any(|settling| {
            settling.verb == Verb::Ack
                && (settling.above_hole.is_some()
                    || forgotten(settling)
                    || may(settling.held.lane, rank(&settling.held)))
        });
        if doubled || may_come {
            self.may_be_forgotten(doubled);
        }
    }

    /// What was settled may come again. Where a nack is a copy, the source comes again beside it, with the count it had.
    pub(super) fn may_be_forgotten(&mut self, doubled: bool) {
        self.excused += 1;
        self.uncertain += u32::from(doubled);
    }

    /// Whether something was with this member: held, or on its way to be settled.
    pub(super) fn is_with(&self, member: u64) -> bool {
        self.held.iter().any(|held| held.member == member)
            || self.settling.iter().any(|settling| settling.held.member == member && settling.ok_at.is_none())
    }

    pub(super) fn redrive(&mut self, at: u64) {
        self.buried = self.buried.saturating_sub(1);
        self.redriven = true;
        // A letter that no handler ever saw (expired, parked) was never delivered: its first delivery is still due.
        if self.deliveries > 0 {
            self.returned(at, Returned::Redriven);
        }
    }

    /// How often it was met in this reading, this time included.
    pub(super) fn letter(&mut self, scan: u64) -> u32 {
        let times = self.last_scan.filter(|(last, _)| *last == scan).map_or(1, |(_, times)| times + 1);
        self.last_scan = Some((scan, times));
        times
    }

    /// Given back, and not delivered again yet.
    pub(super) fn waiting_to_come_back(&self) -> bool {
        !self.owed.is_empty() && self.held.is_empty() && self.buried == 0
    }

    /// What is wrong when nothing more comes.
    pub(super) fn verdict(&self, scan: Option<u64>) -> Option<(&'static str, String)> {
        let letters = self.last_scan.filter(|(last, _)| Some(*last) == scan).map_or(0, |(_, times)| times);
        let is_letter = letters > 0;
        if self.purged {
            return None;
        }
        if self.acked > 0 && is_letter && self.deliveries - self.returns.min(self.deliveries) <= 1 {
            return Some(("conservation", "acked, and a dead letter as well".into()));
        }
        if self.deliveries == 0 && !is_letter {
            return Some(("lost", "published, and neither delivered nor a dead letter".into()));
        }
        if self.buried > 0 && !is_letter && scan.is_some() {
            return Some(("lost", "buried, and not among the dead letters".into()));
        }
        if is_letter || self.buried > 0 {
            return None;
        }
        match self.owed.last() {
            Some(Returned::Nacked) => Some(("nack-lost", "nacked, and it never came again".into())),
            Some(why) => Some(("lost", format!("given back ({why:?}), and it never came again"))),
            None if self.acked == 0 && !self.is_maybe_acked() && self.held.is_empty() => {
                Some(("lost", "delivered, never acked, and it never came again".into()))
            }
            None => None,
        }
    }

    /// For messages: what became of earlier deliveries.
    pub(super) fn outstanding_summary(&self) -> String {
        format!(
            "{} deliveries before, {} returned, {} acked, {} held",
            self.deliveries,
            self.returns,
            self.acked,
            self.held.len()
        )
    }
}

/// Places within a lane are compared by position where the broker tells it, by the order of delivery otherwise.
fn rank(held: &Held) -> u64 {
    held.position.map_or(held.order, |position| position.major.saturating_mul(1 << 16).saturating_add(position.minor))
}
