//! What happened to one message in one group.

mod loss;
mod settling;
mod verdict;

use std::ops::RangeInclusive;

use anybroker_core::{AttemptCount, Position};

use crate::history::Verb;
pub(super) use loss::{Claim, Forgetting};

/// A delivery that is with a member.
#[derive(Debug, Clone)]
pub(super) struct Held {
    /// When it was delivered.
    pub(super) at: u64,
    pub(super) delivery: u64,
    pub(super) member: u64,
    /// From when on it may be somebody else's, in microseconds of the history: when its lease ends, or its connection.
    pub(super) until: u64,
    /// The end of its lease alone.
    pub(super) lease_end: u64,
    pub(super) lane: u32,
    pub(super) position: Option<Position>,
    pub(super) attempt: u32,
    /// It was handed out of a connection that is gone, when it had come to another member already.
    pub(super) is_stale: bool,
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

/// How long what was handed out before the server had a settle may lie at another member before it is seen.
const UNDER_WAY: u64 = 5_000_000;

/// A delivery whose settling was asked for.
#[derive(Debug, Clone)]
struct Settling {
    held: Held,
    verb: Verb,
    /// A nack of the last attempt: a dead letter.
    buries: bool,
    /// As a burial it counts in `maybe_buried`.
    is_doubted: bool,
    /// It was asked for after the lease had ended.
    late: bool,
    /// Its connection was lost, or may have been, before there was an answer.
    in_doubt: bool,
    /// Until when that may show. An answer of the server ends the doubt but for what was under way.
    doubt_ends: Option<u64>,
    /// It has come again meanwhile: whatever becomes of this settling, it is somebody else's.
    has_come: bool,
    /// Likewise an ack that had no answer when the message came again, for whatever reason: who has it then says what becomes of it.
    is_void: bool,
    /// It is a nack that counts in `uncertain`.
    is_uncertain: bool,
    /// That it may come again, although its settling was told as done, is counted in `excused` already: it comes so once.
    is_excused: bool,
    /// When it was confirmed.
    ok_at: Option<u64>,
    /// It was an ack above a hole, at that moment.
    above_hole: Option<u64>,
}

/// What a member asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) delivery: u64,
    pub(super) verb: Verb,
    /// How long a nack is to be held back, in microseconds.
    pub(super) delay: u64,
    /// Faults that hit it at once.
    pub(super) hits: u32,
    /// A server that goes by leases was killed, and has forgotten what it had delivered.
    pub(super) is_forgotten: bool,
}

impl Settling {
    /// It is the end of the message in its group, if it arrives: an ack, or a burial.
    fn ends(&self) -> bool {
        self.verb == Verb::Ack || self.buries
    }

    /// The message comes again all the same, beside the letter that there may be; how many burials that puts in doubt.
    fn doubts(&mut self) -> u32 {
        u32::from(self.buries && !std::mem::replace(&mut self.is_doubted, true))
    }
}

/// A settling of a delivery that had come to somebody else already. It may have an effect all the same, where the member
/// could not know: an ack settles it, a nack stores a copy of it, or its count.
#[derive(Debug, Clone)]
struct TooLate {
    delivery: u64,
    verb: Verb,
    buries: bool,
    /// A release of what a killed server has forgotten to have delivered, under a lease: who had it has it still, and hands it out
    /// again.
    is_kept: bool,
    has_come: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Story {
    pub(super) deliveries: u32,
    /// Returns that have not come again yet.
    owed: Vec<Returned>,
    returns: u32,
    /// Deliveries beyond those that are owed which are no anomaly. Of those that have a connection to be lost as their
    /// cause: whose, and since when.
    excused: Vec<Option<(u64, u64)>>,
    /// Returns that are no failure of a handler, and may be counted as one where counting is approximate.
    uncounted: u32,
    /// Members that went away: a volatile count may start anew.
    forgotten: bool,
    nacks: u32,
    /// Nacks whose effect is unknown.
    uncertain: u32,
    /// It was redriven although its burial may not have settled it: the attempt with which the source may come still.
    beside_redriven: u32,
    /// Of such nacks their delivery, and its attempt: what they may have left behind comes with that number, however often the
    /// copy beside it fails meanwhile.
    sources: Vec<(u64, u32)>,
    /// The same of copies that come beside what others make of the message, because who failed or released it had it no more: that they
    /// may come with this number says nothing else.
    late_copies: Vec<(u64, u32)>,
    /// Such a nack left its source behind, or a copy: they are two, and one may be acked and the other one buried.
    doubled: bool,
    held: Vec<Held>,
    /// Deliveries that came to others because a connection or a server was lost, and when their leases end.
    lost: Vec<(u64, u64)>,
    /// What was given back without being settled and has not come again: where it stood, nothing is settled.
    left: Vec<Held>,
    settling: Vec<Settling>,
    pub(super) acked: u32,
    /// Some ack of it was told as done: it need not come again, whatever becomes of others that were under way.
    was_acked: bool,
    /// The same by who had it alone then, as far as could be seen.
    was_acked_alone: bool,
    pub(super) buried: u32,
    /// At which attempts it was, or may have been, since it was redriven last.
    burials: Vec<u32>,
    was_buried: bool,
    /// How often a fault met one of them that had no answer: each time there may be a letter more.
    pub(super) burial_hits: u32,
    /// Attempts that failed, and from when on the next one is due.
    failures: Vec<(u32, u64)>,
    /// How many deliveries had an outcome that was told as done, or were before the last redrive.
    concluded: u32,
    /// Each delivery with its attempt.
    handed_out: Vec<(u64, u32)>,
    /// Burials whose effect is unknown: there may be a letter, or the message may come again.
    pub(super) maybe_buried: u32,
    pub(super) redriven: bool,
    /// How many deliveries there were when it was redriven by somebody who was not told, where its letter was not redriven since.
    maybe_redriven: Option<u32>,
    pub(super) purged: bool,
    /// An ack was asked for whose effect nobody knows.
    maybe_acked: bool,
    /// What was asked for when the delivery was somebody else's already, and was not refused.
    too_late: Vec<TooLate>,
    last_scan: Option<(u64, u32)>,
    back_at: u64,
    /// Members that have handed out what they had from a connection that was lost, and since when it may have been.
    stale: Vec<(u64, u64)>,
    /// Deliveries whose only cause is that a connection was lost.
    pub(super) claims: Vec<Claim>,
}

impl Story {
    /// Whether one more delivery has a cause; takes it.
    pub(super) fn justify(
        &mut self,
        at: u64,
        copies: u32,
        moved: Option<u64>,
        is_told: impl Fn(u64, u64, u64) -> bool,
    ) -> bool {
        let justified = self.has_cause(at, copies, moved, is_told);
        if justified && copies == 1 {
            // It is to be settled anew: an ack before is void.
            self.acked = 0;
            for settling in self.settling.iter_mut().filter(|settling| settling.ok_at.is_none()) {
                settling.is_void = true;
            }
        }
        justified
    }

    fn has_cause(&mut self, at: u64, copies: u32, moved: Option<u64>, is_told: impl Fn(u64, u64, u64) -> bool) -> bool {
        if self.deliveries.saturating_sub(self.returns) < copies {
            // Of this copy it is the first; or it came back, which the returns have counted.
            self.owed.pop();
            return true;
        }
        // First what has a cause of its own; what needs a connection to be lost has to show that it was.
        self.comes_by_itself(at, moved) || self.comes_by_loss(at, is_told)
    }

    fn comes_by_itself(&mut self, at: u64, moved: Option<u64>) -> bool {
        let is_over =
            |held: &Held| held.until <= at && held.lease_end <= at || moved.is_some_and(|moved| held.at <= moved);
        if let Some(place) = self.held.iter().position(is_over) {
            self.back_at = self.held.remove(place).until;
            self.returns += 1;
            self.uncounted += 1;
            return true;
        }
        if self.comes_in_doubt(at, |_| false) {
            return true;
        }
        let is_copied = |late: &&mut TooLate| (late.verb == Verb::Nack || late.is_kept) && !late.has_come;
        if let Some(late) = self.too_late.iter_mut().find(is_copied) {
            late.has_come = true;
            self.doubled = true;
            self.returns += 1;
            return true;
        }
        if let Some(place) = self.excused.iter().position(Option::is_none) {
            self.excused.remove(place);
            self.returns += 1;
            return true;
        }
        let forgotten =
            |settling: &Settling| settling.above_hole.zip(moved).is_some_and(|(acked, moved)| acked <= moved);
        if let Some(place) = self.settling.iter().position(forgotten) {
            let doubted = self.settling.remove(place).doubts();
            self.doubt_burials(doubted);
            self.returns += 1;
            self.uncounted += 1;
            return true;
        }
        false
    }

    /// The attempt numbers that a delivery may have now.
    pub(super) fn attempts(&self, at: u64, count: AttemptCount) -> RangeInclusive<u32> {
        let exact = 1 + self.nacks;
        // A nack that had no answer when its lease ended may not have arrived.
        let is_open = |settling: &&Settling| {
            settling.verb == Verb::Nack
                && !settling.buries
                && !settling.is_uncertain
                && settling.ok_at.is_none()
                && settling.held.lease_end <= at
        };
        let open = u32::try_from(self.settling.iter().filter(is_open).count()).unwrap_or(u32::MAX);
        let of_open = self.settling.iter().filter(is_open).map(|settling| settling.held.attempt);
        let source = self
            .sources
            .iter()
            .chain(&self.late_copies)
            .map(|(_, attempt)| *attempt)
            .chain(of_open)
            .min()
            .unwrap_or(u32::MAX);
        let least = exact.saturating_sub(self.uncertain.saturating_add(open)).min(source).max(1);
        let late = self.too_late.iter().filter(|late| late.verb == Verb::Nack).count();
        let exact = exact.saturating_add(u32::try_from(late).unwrap_or(u32::MAX)).max(self.beside_redriven);
        match count {
            AttemptCount::Exact => least..=exact,
            AttemptCount::Approximate => least..=exact + self.uncounted + self.deliveries,
            AttemptCount::Volatile if self.forgotten => 1..=exact,
            AttemptCount::Volatile => least..=exact,
        }
    }

    /// Whether that attempt of a message that was delivered is none that may come now any more.
    pub(super) fn is_before(&self, attempt: u32, at: u64, count: AttemptCount) -> bool {
        self.deliveries > 0 && attempt < *self.attempts(at, count).start()
    }

    pub(super) fn deliver(&mut self, held: Held) {
        self.deliveries += 1;
        if held.attempt > 1 + self.nacks {
            self.beside_redriven = 0;
        }
        self.handed_out.push((held.delivery, held.attempt));
        if self.owed.is_empty() {
            self.left.clear();
        }
        self.held.push(held);
    }

    /// From when on that attempt may come: the earliest, where several copies failed.
    pub(super) fn due(&self, attempt: u32) -> Option<u64> {
        self.failures.iter().filter(|(failed, _)| failed.saturating_add(1) == attempt).map(|(_, due)| *due).min()
    }

    /// How many hand-overs had no outcome that is known, since it was redriven last.
    pub(super) fn hand_overs(&self) -> u32 {
        self.deliveries.saturating_sub(self.concluded)
    }

    /// At which attempts it was buried, or may have been.
    pub(super) fn burials(&self) -> &[u32] {
        &self.burials
    }

    pub(super) fn was_buried(&self) -> bool {
        self.was_buried
    }

    pub(super) fn held(&self) -> impl Iterator<Item = &Held> {
        self.held.iter()
    }

    pub(super) fn extend(&mut self, delivery: u64, until: u64) {
        if let Some(held) = self.held.iter_mut().find(|held| held.delivery == delivery) {
            (held.until, held.lease_end) = (until, until);
        }
    }

    fn take(&mut self, delivery: u64) -> Option<Held> {
        let place = self.held.iter().position(|held| held.delivery == delivery)?;
        Some(self.held.remove(place))
    }

    pub(super) fn give_back(&mut self, at: u64, delivery: u64, why: Returned) {
        if let Some(held) = self.take(delivery) {
            self.left.push(held);
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
            Returned::Redriven => {
                if self.maybe_buried > 0 {
                    self.beside_redriven = self.beside_redriven.max(1 + self.nacks);
                }
                (self.nacks, self.uncounted, self.uncertain) = (0, 0, 0);
                self.sources.clear();
                self.late_copies.clear();
            }
            _ => self.uncounted += 1,
        }
    }

    fn is_maybe_acked(&self) -> bool {
        self.maybe_acked
            || self.too_late.iter().any(|late| late.verb == Verb::Ack)
            || self.settling.iter().any(|settling| settling.verb == Verb::Ack && settling.ok_at.is_none())
    }

    /// Lane and place of a delivery that is being settled.
    pub(super) fn place_of(&self, delivery: u64) -> Option<(u32, u64)> {
        let settling = self.settling.iter().find(|settling| settling.held.delivery == delivery)?;
        Some((settling.held.lane, rank(&settling.held)))
    }

    /// Whether it is unsettled and stands before that place of the lane.
    pub(super) fn is_hole_below(&self, lane: u32, place: u64) -> bool {
        let below = |held: &Held| held.lane == lane && rank(held) < place;
        let settling = |is_forgotten: bool| {
            let mut settling = self.settling.iter().filter(|settling| !is_forgotten || settling.is_excused);
            settling.any(|settling| below(&settling.held))
        };
        let is_back = !self.owed.is_empty() && (self.left.iter().any(below) || settling(false));
        // Acked, and forgotten with a member that went: it may come again, and until then it is a hole.
        let is_forgotten = !self.excused.is_empty() && settling(true);
        self.held.iter().any(below) || is_back || is_forgotten
    }

    /// Lane and place of what a member left unsettled: what was acked above is above a hole.
    pub(super) fn holes(&self, member: u64) -> Vec<(u32, u64)> {
        let unsettled = self.held.iter().filter(|held| held.member == member);
        let returned = self
            .settling
            .iter()
            .filter(|settling| settling.held.member == member && !self.owed.is_empty() && settling.verb != Verb::Ack)
            .map(|settling| &settling.held);
        let left = self.left.iter().filter(|held| held.member == member);
        unsettled.chain(returned).chain(left).map(|held| (held.lane, rank(held))).collect()
    }

    /// The member is gone: what it held comes back. Where it was killed nobody was told of the burials that it had asked for: there
    /// may be a letter, and the message may come again.
    pub(super) fn leave(&mut self, at: u64, member: u64, crash: bool) {
        self.forgotten |= self.deliveries > 0;
        let unanswered = |settling: &&mut Settling| {
            crash && settling.held.member == member && settling.buries && settling.ok_at.is_none()
        };
        let mut doubted = 0;
        for settling in self.settling.iter_mut().filter(unanswered) {
            settling.in_doubt = true;
            doubted += settling.doubts();
        }
        self.doubt_burials(doubted);
        let gone: Vec<u64> = self.held.iter().filter(|held| held.member == member).map(|held| held.delivery).collect();
        for delivery in gone {
            self.give_back(at, delivery, Returned::MemberGone);
        }
    }

    /// Nobody was told whether a letter was put back: there may be one still, and the message may come once.
    pub(super) fn redrive_unknown(&mut self) {
        self.buried = self.buried.saturating_sub(1);
        self.maybe_buried += 1;
        (self.redriven, self.was_acked, self.concluded) = (true, false, self.deliveries);
        self.maybe_redriven = Some(self.deliveries);
        self.excused.push(None);
        (self.nacks, self.uncounted, self.uncertain) = (0, 0, 0);
        self.sources.clear();
    }

    pub(super) fn redrive(&mut self, at: u64) {
        self.buried = self.buried.saturating_sub(1);
        if self.maybe_redriven.take().is_some_and(|deliveries| self.deliveries > deliveries) {
            // The letter of a message that is back already: what is put back once more is the same hop, which is stored once where
            // the broker knows it again.
            self.excused.push(None);
            return;
        }
        (self.redriven, self.was_acked, self.concluded) = (true, false, self.deliveries);
        if self.buried + self.maybe_buried == 0 {
            self.burials.clear();
        }
        // A letter that no handler ever saw (expired, parked) was never delivered: its first delivery is still due.
        if self.deliveries > 0 {
            self.returned(at, Returned::Redriven);
        }
    }
}

/// Places within a lane are compared by position where the broker tells it, by the order of delivery otherwise.
fn rank(held: &Held) -> u64 {
    held.position.map_or(held.order, |position| position.major.saturating_mul(1 << 16).saturating_add(position.minor))
}
