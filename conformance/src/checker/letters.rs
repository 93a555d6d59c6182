//! Dead letters: each has somebody who buried it, or another cause that its reason names.

use anybroker_core::{AttemptCount, MessageId, OnFailure};

use super::members::Member;
use super::publishes::Publish;
use super::{Checker, Place};

/// A letter as it was read.
pub(super) struct Letter<'a> {
    pub(super) at: u64,
    pub(super) id: &'a MessageId,
    pub(super) digest: u64,
    pub(super) reason: &'a str,
    pub(super) attempts: u32,
}

impl Checker {
    pub(super) fn letter(&mut self, scan: u64, place: &Place, letter: &Letter<'_>) {
        let (group, id) = (place.0.to_string(), letter.id);
        let calls = self.by_id.get(&(place.1.clone(), id.clone())).cloned().unwrap_or_default();
        if calls.is_empty() {
            return self.anomaly("phantom", &group, id, "a dead letter that was never published here".into());
        }
        if !calls.iter().any(|call| self.publishes[*call].digest == letter.digest) {
            self.anomaly("altered", &group, id, "the dead letter differs from what was published".into());
        }
        let copies = self.copies(&place.1, id);
        let story = self.story_of(place, id);
        let times = story.letter(scan);
        let buried = story.buried + story.maybe_buried;
        // Whose letter a fault may have met on its way was stored once more to be sure.
        let allowed = buried.max(copies) + story.burial_hits;
        if times > allowed {
            let detail = format!("{times} letters of one message in one reading, {buried} were buried");
            return self.anomaly("dead-letter-duplicate", &group, id, detail);
        }
        let unjustified = match buried {
            0 => self.is_without_cause(place, letter, &calls),
            _ => None,
        };
        if let Some(why) = unjustified {
            let detail = format!("a dead letter (reason {}) {why}", letter.reason);
            return self.anomaly("unjustified-dead-letter", &group, id, detail);
        }
        self.attempts_of(place, letter);
    }

    /// What is missing that could have made this letter, which no member asked for.
    fn is_without_cause(&self, place: &Place, letter: &Letter<'_>, calls: &[usize]) -> Option<String> {
        let story = self.stories.get(place).and_then(|stories| stories.get(letter.id))?;
        let mut members = self.members.values().filter(|member| member.group == place.0);
        match letter.reason {
            "crash_limit" => {
                let Some(limit) = members.filter_map(|member| member.crash_limit).min() else {
                    return Some("where no hand-overs are limited".into());
                };
                let count = story.hand_overs();
                // What a broker's own count counts besides was with nobody: the limit is not known to be reached, and one was.
                let least = if self.rules.hand_overs { limit } else { 1 };
                (count < least).then(|| format!("of {limit} hand-overs without an outcome, and there were {count}"))
            }
            "expired" => {
                let expires = calls.iter().any(|call| self.publishes[*call].expires);
                (!expires).then(|| "of a message without a time to live".into())
            }
            "parked" => {
                let parks = |member: &Member| member.on_failure == OnFailure::Park;
                (!members.any(parks) || !self.is_behind_a_letter(place, calls))
                    .then(|| "behind no dead letter of its key".into())
            }
            // No case lets a broker have a limit of its own.
            "broker_limit" => Some("where the broker has no limit of its own".into()),
            _ => Some("that nobody buried".into()),
        }
    }

    /// Whether another message of its key was buried, now or earlier.
    fn is_behind_a_letter(&self, place: &Place, calls: &[usize]) -> bool {
        let keys: Vec<&Option<Vec<u8>>> = calls.iter().map(|call| &self.publishes[*call].key).collect();
        let id = &self.publishes[calls[0]].id;
        let is_another =
            |publish: &&Publish| publish.destination == place.1 && publish.id != *id && keys.contains(&&publish.key);
        let stories = self.stories.get(place);
        let was_buried = |publish: &Publish| {
            stories.and_then(|stories| stories.get(&publish.id)).is_some_and(super::story::Story::was_buried)
        };
        self.publishes.iter().filter(is_another).any(was_buried)
    }

    /// A letter tells the attempt at which it was buried; what no handler buried tells none that there cannot have been.
    fn attempts_of(&mut self, place: &Place, letter: &Letter<'_>) {
        let count = self.rules.attempts;
        let story = self.story_of(place, letter.id);
        let expected = match (story.burials(), count) {
            ([], AttemptCount::Approximate) => return,
            ([], _) => {
                let most = *story.attempts(letter.at, count).end();
                if letter.attempts <= most {
                    return;
                }
                format!("at most {most}")
            }
            (burials, AttemptCount::Approximate) => {
                let least = burials.iter().min().copied().unwrap_or_default();
                if letter.attempts >= least {
                    return;
                }
                format!("at least {least}")
            }
            (burials, _) if burials.contains(&letter.attempts) => return,
            (burials, _) => format!("one of {burials:?}"),
        };
        let detail = format!("a dead letter of {} attempts, expected {expected} ({count:?})", letter.attempts);
        self.anomaly("attempt-mismatch", place.0.as_ref(), letter.id, detail);
    }
}
