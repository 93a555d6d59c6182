//! What must be accounted for when nothing more comes.

use super::{Checker, Place};

impl Checker {
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
