//! Dead letters, and what must be accounted for when nothing more comes.

use anybroker_core::MessageId;

use super::{Checker, Place};

impl Checker {
    pub(super) fn letter(&mut self, scan: u64, place: &Place, id: &MessageId, digest: u64, reason: &str) {
        let group = place.0.to_string();
        let calls = self.by_id.get(&(place.1.clone(), id.clone())).cloned().unwrap_or_default();
        if calls.is_empty() {
            return self.anomaly("phantom", &group, id, "a dead letter that was never published here".into());
        }
        if !calls.iter().any(|call| self.publishes[*call].digest == digest) {
            self.anomaly("altered", &group, id, "the dead letter differs from what was published".into());
        }
        let copies = self.copies(&place.1, id);
        let story = self.story_of(place, id);
        let times = story.letter(scan);
        let buried = story.buried + story.maybe_buried;
        let allowed = buried.max(copies);
        if times > allowed {
            let detail = format!("{times} letters of one message in one reading, {buried} were buried");
            self.anomaly("dead-letter-duplicate", &group, id, detail);
        } else if buried == 0 && matches!(reason, "attempts_exhausted" | "rejected") {
            let detail = format!("a dead letter (reason {reason}) that nobody buried");
            self.anomaly("unjustified-dead-letter", &group, id, detail);
        }
    }

    /// Nothing more comes: every confirmed message of the group must be accounted for.
    pub(super) fn drained(&mut self, index: usize, place: &Place, scan: Option<u64>) {
        let Some(since) = self.since.get(place).copied() else { return };
        let group = place.0.to_string();
        let mut found = Vec::new();
        for publish in &self.publishes {
            if publish.destination != place.1 || publish.outcome != Some(true) || publish.index > index {
                continue;
            }
            if publish.index < since.index && !(since.earliest && self.rules.kept_before_group) {
                continue;
            }
            let story = self.stories.get(place).and_then(|stories| stories.get(&publish.id));
            let verdict = match story {
                None => Some(("lost", "published, and neither delivered nor a dead letter".to_owned())),
                Some(story) => story.verdict(scan),
            };
            if let Some((name, detail)) = verdict {
                found.push((name, publish.id.clone(), detail));
            }
        }
        found.dedup();
        for (name, id, detail) in found {
            self.anomaly(name, &group, &id, detail);
        }
    }
}
