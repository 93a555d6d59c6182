//! What members ask for, and what they are told.

use anybroker_core::{AckLevel, Effect, ErrorKind};

use super::{Asked, Returned, Settling, Story, TooLate, UNDER_WAY};
use crate::history::Verb;

impl Story {
    pub(in crate::checker) fn settle(&mut self, at: u64, asked: Asked, max_attempts: Option<u32>) {
        let Asked { delivery, verb, delay, hits, is_forgotten } = asked;
        let attempt = self.handed_out.iter().find(|(of, _)| *of == delivery).map_or(0, |(_, attempt)| *attempt);
        let buries = verb == Verb::DeadLetter || (verb == Verb::Nack && max_attempts.is_some_and(|max| attempt >= max));
        if buries {
            self.burials.push(attempt);
            self.was_buried = true;
            self.burial_hits += hits;
        } else if verb == Verb::Nack {
            self.failures.push((attempt, at.saturating_add(delay)));
        }
        let Some(held) = self.take(delivery) else {
            self.maybe_buried += u32::from(buries);
            if verb == Verb::Nack && !buries {
                // Its copy counts on its own, beside what others have made of the message.
                self.late_copies.push((delivery, attempt.saturating_add(1)));
            }
            let is_leased = self.lost.iter().any(|(lost, lease_end)| *lost == delivery && at < *lease_end);
            let is_kept = verb == Verb::Release && is_forgotten && is_leased;
            return self.too_late.push(TooLate { delivery, verb, buries, is_kept, has_come: false });
        };
        match verb {
            // Likewise what was handed out of a connection that is gone.
            Verb::Nack if held.is_stale && !buries => self.late_copies.push((delivery, attempt.saturating_add(1))),
            Verb::Release if held.is_stale => self.late_copies.push((delivery, attempt)),
            _ => {}
        }
        let late = held.lease_end <= at;
        // The source of a nack may be somebody else's by now, with the count that it had.
        let is_elsewhere = held.until <= at;
        match verb {
            _ if buries => self.buried += 1,
            Verb::Nack => {
                self.returned(at, Returned::Nacked);
                if is_elsewhere {
                    self.uncertain += 1;
                    self.sources.push((delivery, held.attempt));
                }
            }
            Verb::Release => self.returned(at, Returned::Released),
            Verb::Ack | Verb::DeadLetter => {}
        }
        self.settling.push(Settling {
            held,
            verb,
            buries,
            is_doubted: false,
            late,
            in_doubt: is_elsewhere && !late,
            doubt_ends: None,
            has_come: false,
            is_void: false,
            is_uncertain: is_elsewhere && verb == Verb::Nack && !buries,
            is_excused: false,
            ok_at: None,
            above_hole: None,
        });
    }

    /// Told as done, at that level. `by_lease`: it is the broker's lease that gives deliveries to others, not a connection.
    pub(in crate::checker) fn settled(
        &mut self,
        at: u64,
        delivery: u64,
        is_above_hole: bool,
        level: AckLevel,
        by_lease: bool,
    ) -> Option<Verb> {
        let settling = self.settling.iter_mut().find(|settling| settling.held.delivery == delivery)?;
        self.concluded += 1;
        settling.ok_at = Some(at);
        if level == AckLevel::Confirmed {
            if by_lease && at < settling.held.lease_end {
                // The server had it while the lease held: it has given it to nobody else before, and does not afterwards.
                (settling.late, settling.in_doubt) = (false, false);
                if settling.is_uncertain {
                    self.uncertain = self.uncertain.saturating_sub(1);
                    self.sources.retain(|(of, _)| *of != delivery);
                }
                settling.is_uncertain = false;
            } else {
                settling.doubt_ends = Some(at.saturating_add(UNDER_WAY));
            }
        }
        if settling.ends() {
            settling.above_hole = is_above_hole.then_some(at);
        }
        if settling.verb == Verb::Ack {
            // Should it be somebody else's, that one says what becomes of it.
            let is_alone = !settling.has_come && !settling.is_void && !settling.held.is_stale;
            self.acked += u32::from(is_alone);
            self.was_acked = true;
            self.was_acked_alone |= is_alone;
        }
        Some(settling.verb)
    }

    /// The delivery is the application's again; what the settling was to do is undone as far as its effect is known.
    pub(in crate::checker) fn settle_failed(&mut self, delivery: u64, kind: ErrorKind, effect: Effect) {
        if effect != Effect::Unknown {
            self.late_copies.retain(|(of, _)| *of != delivery);
        }
        let Some(place) = self.settling.iter().position(|settling| settling.held.delivery == delivery) else {
            if effect != Effect::Unknown
                && let Some(place) = self.too_late.iter().position(|late| late.delivery == delivery && !late.has_come)
            {
                let late = self.too_late.remove(place);
                self.maybe_buried -= u32::from(late.buries);
            }
            return;
        };
        let mut settling = self.settling.remove(place);
        if effect == Effect::Unknown {
            return self.settled_unknown(&mut settling);
        }
        match settling.verb {
            _ if settling.is_doubted => self.maybe_buried -= 1,
            _ if settling.buries => self.buried -= 1,
            Verb::Nack | Verb::Release => {
                settling.has_come |= self.owed.pop().is_none();
                self.returns -= u32::from(!settling.has_come);
                match settling.verb {
                    Verb::Nack => {
                        self.nacks -= 1;
                        self.uncertain = self.uncertain.saturating_sub(u32::from(settling.is_uncertain));
                        self.sources.retain(|(of, _)| *of != delivery);
                    }
                    _ => self.uncounted = self.uncounted.saturating_sub(1),
                }
            }
            Verb::Ack | Verb::DeadLetter => {}
        }
        let stale = matches!(kind, ErrorKind::StaleDelivery | ErrorKind::Closed);
        if stale {
            self.uncounted += 1;
            self.forgotten = true;
        }
        match (settling.has_come, stale) {
            (true, _) => {}
            // It was not this member's any more: it comes to somebody.
            (false, true) => self.excused.push(None),
            (false, false) => self.held.push(settling.held),
        }
    }

    /// Nobody knows what became of it.
    fn settled_unknown(&mut self, settling: &mut Settling) {
        if settling.buries {
            self.doubt_burials(settling.doubts());
        } else if settling.verb == Verb::Nack {
            self.uncertain += u32::from(!settling.is_uncertain);
            self.sources.push((settling.held.delivery, settling.held.attempt));
        }
        if settling.verb == Verb::Ack {
            self.maybe_acked = true;
        }
        // It may come again; where a nack is a copy, source and copy may both. Should it have come, that was it.
        if !settling.has_come {
            self.excused.push(None);
        }
    }

    /// A fault meets the burials of that member which have no answer yet.
    pub(in crate::checker) fn burials_are_met(&mut self, member: u64) {
        let is_met =
            |settling: &&Settling| settling.held.member == member && settling.buries && settling.ok_at.is_none();
        let met = self.settling.iter().filter(is_met).count();
        self.burial_hits = self.burial_hits.saturating_add(u32::try_from(met).unwrap_or(u32::MAX));
    }

    /// So many burials may not have settled their source: there is a letter, and the message may come again beside it.
    pub(super) fn doubt_burials(&mut self, count: u32) {
        self.buried = self.buried.saturating_sub(count);
        self.maybe_buried += count;
    }
}
