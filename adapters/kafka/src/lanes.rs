//! What a subscription holds of its partitions: which records are unsettled, and thereby which prefix may be
//! committed. Its size follows what is unsettled, never how much was acked behind a hole.

use std::collections::VecDeque;
use std::sync::Arc;

use anybroker_core::Lane;

use crate::codec::Chunk;

/// What became of a record so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Fetched, not handed out.
    Ready,
    /// With the application, or its dead letter is on its way.
    Out,
    /// Failed; held back until its delay ends.
    Held,
    /// Acked or dead-lettered.
    Settled,
}

/// A record that is not settled.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) offset: i64,
    pub(crate) stage: Stage,
    pub(crate) attempt: u32,
    index: u32,
    /// Kept so that the message can come back; dropped as soon as it is settled, so that one record at the head does
    /// not keep everything behind it in memory.
    chunk: Option<Arc<Chunk>>,
}

impl Entry {
    /// The chunk that holds it, and where.
    pub(crate) fn record(&self) -> Option<(&Arc<Chunk>, usize)> {
        self.chunk.as_ref().map(|chunk| (chunk, self.index as usize))
    }
}

/// A partition.
#[derive(Debug)]
pub(crate) struct Partition {
    pub(crate) lane: Lane,
    pub(crate) feeder: usize,
    pub(crate) partition: i32,
    /// This member owns it now.
    pub(crate) is_owned: bool,
    /// It is being taken away: nothing of it is handed out any more.
    pub(crate) is_leaving: bool,
    /// By offset; settled ones stand among them until they reach the front or are swept.
    entries: VecDeque<Entry>,
    settled_inside: usize,
    /// Behind the last record that was fetched.
    next: Option<i64>,
    /// What was last committed.
    pub(crate) committed: Option<i64>,
}

impl Partition {
    pub(crate) fn new(index: u32, feeder: usize, partition: i32) -> Self {
        Self {
            lane: Lane { index, epoch: 0 },
            feeder,
            partition,
            is_owned: false,
            is_leaving: false,
            entries: VecDeque::new(),
            settled_inside: 0,
            next: None,
            committed: None,
        }
    }

    /// It belongs to this member now.
    pub(crate) fn assign(&mut self) {
        self.lane.epoch += 1;
        (self.is_owned, self.is_leaving) = (true, false);
        (self.next, self.committed) = (None, None);
    }

    /// It belongs to somebody else. Answers how many records were ready or out, and how many held.
    pub(crate) fn lose(&mut self) -> (usize, usize) {
        let of = |stages: &[Stage]| self.entries.iter().filter(|entry| stages.contains(&entry.stage)).count();
        let counts = (of(&[Stage::Ready, Stage::Out]), of(&[Stage::Held]));
        (self.is_owned, self.is_leaving) = (false, false);
        self.entries.clear();
        self.settled_inside = 0;
        counts
    }

    /// A record was fetched. `false` when it is here already.
    pub(crate) fn push(&mut self, chunk: &Arc<Chunk>, index: usize) -> bool {
        let offset = chunk.offset(index);
        if self.next.is_some_and(|next| offset < next) {
            return false;
        }
        self.next = Some(offset + 1);
        let index = u32::try_from(index).expect("a chunk has few records");
        self.entries.push_back(Entry {
            offset,
            stage: Stage::Ready,
            attempt: 1,
            index,
            chunk: Some(Arc::clone(chunk)),
        });
        true
    }

    /// The unsettled record at `offset`.
    pub(crate) fn find(&mut self, offset: i64) -> Option<&mut Entry> {
        let place = self.entries.binary_search_by_key(&offset, |entry| entry.offset).ok()?;
        self.entries.get_mut(place).filter(|entry| entry.stage != Stage::Settled)
    }

    /// The record at `offset` is done.
    pub(crate) fn settle(&mut self, offset: i64) {
        let Some(entry) = self.find(offset) else { return };
        (entry.stage, entry.chunk) = (Stage::Settled, None);
        self.settled_inside += 1;
        while self.entries.front().is_some_and(|entry| entry.stage == Stage::Settled) {
            self.entries.pop_front();
            self.settled_inside -= 1;
        }
        // Each sweep removes more than it keeps, so that a settle costs the same on average.
        if self.settled_inside > 1024 && self.settled_inside > self.entries.len() / 2 {
            self.entries.retain(|entry| entry.stage != Stage::Settled);
            self.settled_inside = 0;
        }
    }

    /// Up to where (exclusive) everything is settled; `None` when nothing was fetched.
    pub(crate) fn prefix(&self) -> Option<i64> {
        self.entries.front().map(|entry| entry.offset).or(self.next)
    }

    /// The prefix, where it is ahead of what was committed.
    pub(crate) fn uncommitted(&self) -> Option<i64> {
        self.prefix().filter(|prefix| self.committed.is_none_or(|committed| committed < *prefix))
    }

    pub(crate) fn has_out(&self) -> bool {
        self.entries.iter().any(|entry| entry.stage == Stage::Out)
    }
}
