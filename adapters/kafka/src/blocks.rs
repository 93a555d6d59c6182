//! Keys that wait for a failed record of theirs (`OnFailure::Block`).

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;

/// See the module's documentation. Empty, and free of cost, unless the subscription blocks.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    is_on: bool,
    keys: HashMap<(u32, Bytes), Waiting>,
    /// The keys of failed records, by lane and offset.
    failed: HashMap<(u32, i64), Bytes>,
}

/// Offsets of one key.
#[derive(Debug, Default)]
struct Waiting {
    /// Failed, and not settled for good.
    failed: BTreeSet<i64>,
    /// Behind a failed one.
    behind: BTreeSet<i64>,
}

impl Blocks {
    pub(crate) fn new(is_on: bool) -> Self {
        Self { is_on, ..Self::default() }
    }

    /// A record failed. Without a key it has nothing to keep in order.
    pub(crate) fn fail(&mut self, lane: u32, offset: i64, key: Option<Bytes>) {
        if let Some(key) = key.filter(|_| self.is_on) {
            self.failed.insert((lane, offset), key.clone());
            self.keys.entry((lane, key)).or_default().failed.insert(offset);
        }
    }

    /// Whether the record stands behind a failed one of its key; then it is noted.
    pub(crate) fn must_wait(&mut self, lane: u32, offset: i64, key: impl FnOnce() -> Option<Bytes>) -> bool {
        if self.keys.is_empty() {
            return false;
        }
        let Some(waiting) = key().and_then(|key| self.keys.get_mut(&(lane, key))) else { return false };
        let is_behind = waiting.failed.first().is_some_and(|first| *first < offset);
        if is_behind {
            waiting.behind.insert(offset);
        }
        is_behind
    }

    /// A record is settled for good: what waited for it may be tried again.
    pub(crate) fn release(&mut self, lane: u32, offset: i64) -> BTreeSet<i64> {
        if self.failed.is_empty() {
            return BTreeSet::new();
        }
        let Some(key) = self.failed.remove(&(lane, offset)) else { return BTreeSet::new() };
        let place = (lane, key);
        let Some(waiting) = self.keys.get_mut(&place) else { return BTreeSet::new() };
        waiting.failed.remove(&offset);
        let behind = std::mem::take(&mut waiting.behind);
        if waiting.failed.is_empty() {
            self.keys.remove(&place);
        }
        behind
    }

    /// The lane belongs to somebody else.
    pub(crate) fn lose(&mut self, lane: u32) {
        self.keys.retain(|(other, _), _| *other != lane);
        self.failed.retain(|(other, _), _| *other != lane);
    }
}
