//! What becomes of a message when the connection is lost that it is on, or may be.

use super::{Held, Settling, Story};
use crate::history::Verb;

/// A delivery whose only cause is that a member's connection was lost: shown by what that member says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::checker) struct Claim {
    pub(in crate::checker) member: u64,
    /// It was on the connection then.
    pub(in crate::checker) since: u64,
    /// It came again then.
    pub(in crate::checker) at: u64,
}

/// What of a member's acks and nacks may be forgotten with a connection.
#[derive(Debug, Clone, Copy)]
pub(in crate::checker) struct Forgetting {
    /// What was told as done since then.
    pub(in crate::checker) since: u64,
    /// In a fault, or near one: nacks too, where a copy comes again beside its source.
    pub(in crate::checker) in_a_fault: bool,
    /// The member is gone altogether: what it asked for without an answer, too.
    pub(in crate::checker) is_gone: bool,
}

impl Story {
    /// Whether it comes again because a connection was lost that it was on; takes that. A loss that has been told of (`is_told`,
    /// of a member, from and until when) goes first: what it explains needs no other one to be told of later.
    pub(super) fn comes_by_loss(&mut self, at: u64, is_told: impl Fn(u64, u64, u64) -> bool) -> bool {
        self.comes_by_a_loss_that(at, is_told) || self.comes_by_a_loss_that(at, |_, _, _| true)
    }

    fn comes_by_a_loss_that(&mut self, at: u64, fits: impl Fn(u64, u64, u64) -> bool) -> bool {
        let of_held = |held: &Held| held.until <= at && fits(held.member, held.at, at);
        if let Some(place) = self.held.iter().position(of_held) {
            let held = self.held.remove(place);
            self.claims.push(Claim { member: held.member, since: held.at, at });
            self.lost.push((held.delivery, held.lease_end));
            self.back_at = held.until;
            self.returns += 1;
            self.uncounted += 1;
            return true;
        }
        if self.comes_in_doubt(at, |held| fits(held.member, held.at, at)) {
            return true;
        }
        let of_excuse = |excuse: &Option<(u64, u64)>| excuse.is_none_or(|(member, since)| fits(member, since, at));
        let Some(place) = self.excused.iter().rposition(of_excuse) else { return false };
        if let Some((member, since)) = self.excused.remove(place) {
            self.claims.push(Claim { member, since, at });
        }
        self.returns += 1;
        true
    }

    /// Whether a member that has lost its connection since then, and has not been told, hands out what it had from it, when the
    /// message has come to another member already; takes that. The other one's settling stands.
    pub(in crate::checker) fn comes_stale(&mut self, at: u64, member: u64, since: u64) -> bool {
        if self.stale.contains(&(member, since)) {
            return false;
        }
        self.stale.push((member, since));
        self.claims.push(Claim { member, since, at });
        self.returns += 1;
        true
    }

    /// Whether it comes again although it is being settled, or was, while nobody could know whether that arrived; takes
    /// that. `by_loss`: of which deliveries also where a lost connection is the only reason.
    pub(super) fn comes_in_doubt(&mut self, at: u64, by_loss: impl Fn(&Held) -> bool) -> bool {
        // The lease ended before there was an answer.
        let is_unanswered = |settling: &Settling| {
            let lease_end = settling.held.lease_end;
            lease_end <= at && settling.ok_at.is_none_or(|ok| ok >= lease_end)
        };
        // A nack that a fault met may leave its source behind, beside the copy that comes back.
        let needs_loss = |settling: &Settling| settling.ends() && !is_unanswered(settling);
        let is_open = |settling: &&mut Settling| {
            settling.late
                || !settling.has_come
                    && (settling.in_doubt || is_unanswered(settling))
                    && (!needs_loss(settling) || by_loss(&settling.held))
                    && settling.doubt_ends.is_none_or(|until| at <= until)
        };
        let Some(settling) = self.settling.iter_mut().find(is_open) else { return false };
        if !settling.late && needs_loss(settling) {
            self.claims.push(Claim { member: settling.held.member, since: settling.held.at, at });
        }
        (settling.late, settling.in_doubt, settling.has_come) = (false, false, true);
        let doubted = settling.doubts();
        self.doubled |= settling.verb == Verb::Nack && !settling.buries;
        if settling.verb == Verb::Ack {
            // What is acked has no count any more.
            self.uncertain = self.uncertain.max(self.nacks);
        }
        self.doubt_burials(doubted);
        self.returns += 1;
        self.uncounted += 1;
        true
    }

    /// The member has lost its connection, or a lane, or a fault begins that may make it so. With `ends` what it held may
    /// come again, as after its lease.
    pub(in crate::checker) fn lose(&mut self, at: u64, member: u64, lane: Option<u32>, ends: bool) {
        self.forgotten |= self.deliveries > 0;
        let concerns = |held: &Held| held.member == member && lane.is_none_or(|lane| lane == held.lane);
        for held in self.held.iter_mut().filter(|held| ends && concerns(held)) {
            held.until = held.until.min(at);
        }
        // What is on its way to be settled may arrive or not; a nack that is a copy may leave its source behind.
        for settling in &mut self.settling {
            if concerns(&settling.held) && settling.ok_at.is_none() && !settling.has_come {
                settling.in_doubt = true;
                if settling.verb == Verb::Nack && !settling.buries && !settling.is_uncertain {
                    settling.is_uncertain = true;
                    self.uncertain += 1;
                    self.sources.push((settling.held.delivery, settling.held.attempt));
                }
            }
        }
    }

    /// What a member that goes has settled since then may be forgotten, and acks where `may` says so. Each of them once.
    pub(in crate::checker) fn forget_acks(
        &mut self,
        member: u64,
        lane: Option<u32>,
        forgetting: Option<Forgetting>,
        may: impl Fn(u32, u64) -> bool,
    ) {
        let concerns = |held: &Held| held.member == member && lane.is_none_or(|lane| lane == held.lane);
        let (mut doubled, mut may_come, mut doubted) = (None, None, 0);
        for settling in &mut self.settling {
            if !concerns(&settling.held) || settling.is_excused || settling.has_come {
                continue;
            }
            // Without an answer it is in doubt, which is another thing, unless the member is gone altogether.
            let is_forgotten = forgetting.is_some_and(|Forgetting { since, is_gone, .. }| match settling.ok_at {
                Some(at) => at >= since && !settling.in_doubt,
                None => is_gone,
            });
            let excuse = Some((member, settling.ok_at.unwrap_or(settling.held.at)));
            let is_above = settling.above_hole.is_some() || may(settling.held.lane, super::rank(&settling.held));
            match settling.verb {
                _ if settling.ends() && is_above => (settling.is_excused, may_come) = (true, Some(None)),
                _ if settling.ends() && is_forgotten => (settling.is_excused, may_come) = (true, Some(excuse)),
                _ if settling.ends() => continue,
                Verb::Nack if is_forgotten && forgetting.is_some_and(|forgetting| forgetting.in_a_fault) => {
                    (settling.is_excused, doubled) = (true, Some(excuse));
                    self.sources.push((settling.held.delivery, settling.held.attempt));
                }
                _ => continue,
            }
            doubted += settling.doubts();
        }
        self.doubt_burials(doubted);
        if let Some(excuse) = may_come.or(doubled) {
            self.excused.push(excuse);
            self.uncertain += u32::from(doubled.is_some());
        }
    }

    /// What was told as settled while its connection may be lost may come again. Where a nack is a copy, the source comes
    /// again beside it, with the count it had.
    pub(in crate::checker) fn may_be_forgotten(&mut self, at: u64, delivery: u64) {
        let Some(settling) = self.settling.iter_mut().find(|settling| settling.held.delivery == delivery) else {
            return;
        };
        let is_known = settling.is_excused || settling.in_doubt || settling.has_come;
        if is_known || settling.verb == Verb::Release {
            return;
        }
        settling.is_excused = true;
        self.excused.push(Some((settling.held.member, at)));
        if !settling.ends() {
            self.uncertain += 1;
            self.sources.push((delivery, settling.held.attempt));
        }
        let doubted = settling.doubts();
        self.doubt_burials(doubted);
    }

    /// Acks that the server has confirmed since then may be forgotten with it.
    pub(in crate::checker) fn server_forgets(&mut self, since: u64) {
        self.may_forget(|settling| settling.ok_at.is_some_and(|at| at >= since));
    }

    /// The ack of a delivery that was made until then may be forgotten. A nack or a release may meet what the server has delivered
    /// anew, and not handed out there: that comes beside it, with the count that it had.
    pub(in crate::checker) fn server_forgets_what_it_delivered(&mut self, delivery: u64, until: u64) {
        let is_meant = |settling: &Settling| settling.held.delivery == delivery && settling.held.at <= until;
        self.may_forget(is_meant);
        let is_open = |settling: &&mut Settling| {
            is_meant(settling) && !settling.ends() && !settling.is_excused && !settling.has_come
        };
        let Some(settling) = self.settling.iter_mut().find(is_open) else { return };
        settling.is_excused = true;
        self.excused.push(None);
        if settling.verb == Verb::Nack {
            self.uncertain += 1;
            self.sources.push((delivery, settling.held.attempt));
        }
    }

    fn may_forget(&mut self, is_meant: impl Fn(&Settling) -> bool) {
        let mut doubted = 0;
        for settling in &mut self.settling {
            let is_known = settling.is_excused || settling.has_come;
            if !is_known && settling.ends() && is_meant(settling) {
                settling.is_excused = true;
                doubted += settling.doubts();
                self.excused.push(None);
                // What is acked has no count any more.
                self.uncertain = self.uncertain.max(self.nacks);
            }
        }
        self.doubt_burials(doubted);
    }

    /// Whether something was with this member: held, or on its way to be settled.
    pub(in crate::checker) fn is_with(&self, member: u64) -> bool {
        self.held.iter().any(|held| held.member == member)
            || self.settling.iter().any(|settling| settling.held.member == member && settling.ok_at.is_none())
    }
}
