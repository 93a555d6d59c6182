//! What is wrong with a message when nothing more comes.

use super::{Returned, Story};
use crate::history::Verb;

impl Story {
    /// How often it was met in this reading, this time included.
    pub(in crate::checker) fn letter(&mut self, scan: u64) -> u32 {
        let times = self.last_scan.filter(|(last, _)| *last == scan).map_or(1, |(_, times)| times + 1);
        self.last_scan = Some((scan, times));
        times
    }

    /// Given back, and not delivered again yet. What somebody else has acked need not come.
    pub(in crate::checker) fn waiting_to_come_back(&self) -> bool {
        !self.owed.is_empty() && self.held.is_empty() && self.buried == 0 && !self.was_acked_alone
    }

    /// What is wrong when nothing more comes.
    pub(in crate::checker) fn verdict(&self, scan: Option<u64>) -> Option<(&'static str, String)> {
        let letters = self.last_scan.filter(|(last, _)| Some(*last) == scan).map_or(0, |(_, times)| times);
        let is_letter = letters > 0;
        if self.purged {
            return None;
        }
        if self.acked > 0
            && is_letter
            && self.maybe_buried == 0
            && !self.doubled
            && self.sources.is_empty()
            && self.deliveries - self.returns.min(self.deliveries) <= 1
        {
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
        // Of two who had it at once, one may settle what the other failed, where the server cannot tell them apart.
        let is_acked_late = self.too_late.iter().any(|late| late.verb == Verb::Ack);
        if self.was_acked || is_acked_late && matches!(self.owed.last(), Some(Returned::Nacked)) {
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
    pub(in crate::checker) fn outstanding_summary(&self) -> String {
        format!(
            "{} deliveries before, {} returned, {} acked, {} held",
            self.deliveries,
            self.returns,
            self.acked,
            self.held.len()
        )
    }
}
