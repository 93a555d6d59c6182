//! What a subscription holds of its lanes: which records are unsettled, and thereby which prefix may be committed. Its
//! size follows what is unsettled, never how much was acked behind a hole.

use std::collections::VecDeque;
use std::sync::Arc;

use anybroker_core::Lane;

use crate::codec::Chunk;
use crate::progress::{Commit, Progress};

/// Which log a record stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Log {
    /// The destination's topic.
    Main,
    /// The group's retry topic.
    Retry,
}

impl Log {
    pub(crate) const BOTH: [Self; 2] = [Self::Main, Self::Retry];
}

/// What became of a record so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Fetched, not handed out.
    Ready,
    /// With the application, or its retry or dead letter is on its way.
    Out,
    /// Settled in that open transaction: done when it commits, and back when it does not.
    Joined(u32),
    /// Held back until its delay ends, or behind a failed one of its key.
    Held,
    /// Acked, dead-lettered, or copied to the retry topic.
    Settled,
}

/// A record that is not settled.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) offset: i64,
    pub(crate) stage: Stage,
    pub(crate) attempt: u32,
    /// When it was handed out for the first time here, in milliseconds since 1970.
    pub(crate) first_at: Option<i64>,
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

    pub(crate) fn weight(&self) -> usize {
        self.record().map_or(0, |(chunk, index)| chunk.weight(index))
    }
}

/// The records of one log of a lane.
#[derive(Debug, Default)]
pub(crate) struct Track {
    /// By offset; settled ones stand among them until they reach the front or are swept.
    entries: VecDeque<Entry>,
    settled_inside: usize,
    /// Behind the last record that was fetched.
    next: Option<i64>,
    /// Where the group was when the lane was assigned, and what it had settled above that.
    start: Option<i64>,
    restored: VecDeque<(i64, i64)>,
    /// What was last committed, and whether the broker is known to have it.
    committed: Option<Commit>,
    is_confirmed: bool,
    /// What a transaction commits that has no outcome yet.
    in_transaction: Option<Commit>,
}

impl Track {
    fn assign(&mut self, progress: Option<Progress>) {
        *self = Self::default();
        if let Some(progress) = progress {
            self.start = Some(progress.offset);
            self.restored = progress.settled.into();
        }
    }

    /// A record was fetched. `false` when it is here or settled already.
    pub(crate) fn push(&mut self, chunk: &Arc<Chunk>, index: usize, stage: Stage, attempt: u32) -> bool {
        let offset = chunk.offset(index);
        if self.next.is_some_and(|next| offset < next) {
            return false;
        }
        if self.start.take().is_some_and(|start| offset < start) {
            // The log is not the one that was committed for: it lost its end, and is read from its beginning.
            self.restored.clear();
        }
        self.next = Some(offset + 1);
        while self.restored.front().is_some_and(|(_, end)| *end <= offset) {
            self.restored.pop_front();
        }
        if self.restored.front().is_some_and(|(begin, _)| *begin <= offset) {
            return false;
        }
        let index = u32::try_from(index).expect("a chunk has few records");
        let chunk = Some(Arc::clone(chunk));
        self.entries.push_back(Entry { offset, stage, attempt, first_at: None, index, chunk });
        true
    }

    /// The unsettled record at `offset`.
    pub(crate) fn find(&mut self, offset: i64) -> Option<&mut Entry> {
        // Nearly always nothing is missing between the first one and this one.
        let likely = usize::try_from(offset - self.entries.front()?.offset).ok()?;
        let place = match self.entries.get(likely) {
            Some(entry) if entry.offset == offset => likely,
            _ => self.entries.binary_search_by_key(&offset, |entry| entry.offset).ok()?,
        };
        self.entries.get_mut(place).filter(|entry| entry.stage != Stage::Settled)
    }

    /// The record at `offset` is done.
    pub(crate) fn settle(&mut self, offset: i64) {
        self.settle_if(offset, |_| true);
    }

    /// The record at `offset` is done if it is unsettled and in such a stage; tells whether it was.
    pub(crate) fn settle_if(&mut self, offset: i64, is_right: impl FnOnce(Stage) -> bool) -> bool {
        let Some(entry) = self.find(offset).filter(|entry| is_right(entry.stage)) else { return false };
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
        true
    }

    /// Up to where (exclusive) everything is settled; `None` when nothing is known.
    pub(crate) fn prefix(&self) -> Option<i64> {
        self.entries.front().map(|entry| entry.offset).or(self.next).or(self.start)
    }

    fn count(&self, stage: Stage) -> usize {
        self.entries.iter().filter(|entry| entry.stage == stage).count()
    }

    /// What there is to commit. At the end nothing is out any more: it comes again.
    pub(crate) fn commit(&self, is_last: bool) -> Option<Commit> {
        let prefix = self.prefix()?;
        let unsettled = self.entries.iter().filter(|entry| entry.stage != Stage::Settled).map(|entry| entry.offset);
        let out = if is_last { 0 } else { self.count(Stage::Out) };
        let read = self.next.unwrap_or(prefix);
        Some(Commit::new(prefix, out, self.count(Stage::Held), unsettled, read, self.restored.iter().copied()))
    }

    /// What there would be to commit if those offsets were settled too. `None`: one of them is above a hole, and the metadata
    /// of a commit does not hold it, so it would come again although it was committed.
    pub(crate) fn commit_with(&self, joined: &[i64]) -> Option<Commit> {
        let is_joined = |entry: &&Entry| joined.binary_search(&entry.offset).is_ok();
        let unsettled = || self.entries.iter().filter(|entry| entry.stage != Stage::Settled && !is_joined(entry));
        let prefix = unsettled().next().map(|entry| entry.offset).or(self.next)?;
        let out = unsettled().filter(|entry| matches!(entry.stage, Stage::Out | Stage::Joined(_))).count();
        let (read, offsets) = (self.next.unwrap_or(prefix), unsettled().map(|entry| entry.offset));
        let commit = Commit::new(prefix, out, self.count(Stage::Held), offsets, read, self.restored.iter().copied());
        let told = Progress::read(commit.offset, &commit.metadata);
        joined.iter().all(|offset| told.holds(*offset)).then_some(commit)
    }

    /// What there is to commit, where it differs from what was. With `settled` only what is settled counts, not what is out.
    pub(crate) fn uncommitted(&self, settled: bool) -> Option<Commit> {
        let is_same = |commit: &Commit| {
            self.committed.as_ref().is_some_and(|last| last == commit || settled && last.settles_the_same(commit))
        };
        self.commit(false).filter(|commit| !is_same(commit))
    }

    /// It was committed; `None`: or was not, after all.
    pub(crate) fn committed(&mut self, commit: Option<Commit>) {
        (self.committed, self.is_confirmed) = (commit, false);
    }

    /// What was committed and may still be on its way.
    pub(crate) fn unconfirmed(&self) -> Option<&Commit> {
        self.committed.as_ref().filter(|_| !self.is_confirmed)
    }

    /// The broker has it.
    pub(crate) fn confirmed(&mut self) {
        self.is_confirmed = true;
    }

    pub(crate) fn transacted(&mut self, commit: Commit) {
        self.in_transaction = Some(commit);
    }

    /// A transaction has ended.
    pub(crate) fn end_transaction(&mut self, is_committed: bool) {
        if let Some(commit) = self.in_transaction.take().filter(|_| is_committed) {
            (self.committed, self.is_confirmed) = (Some(commit), true);
        }
    }
}

/// A partition of a destination, and the same partition of the group's retry topic, which goes with it.
#[derive(Debug)]
pub(crate) struct Partition {
    pub(crate) lane: Lane,
    pub(crate) feeder: usize,
    pub(crate) partition: i32,
    /// This member owns it now.
    pub(crate) is_owned: bool,
    /// It is being taken away: nothing of it is handed out any more.
    pub(crate) is_leaving: bool,
    /// That transaction commits offsets of it, and has no outcome yet: a commit beside it could undo what it says.
    pub(crate) frozen_by: Option<u32>,
    main: Track,
    retry: Track,
}

/// What a lane held when it was lost.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Ready or out.
    pub(crate) unsettled: usize,
    pub(crate) held: usize,
    pub(crate) held_bytes: usize,
}

impl Partition {
    pub(crate) fn new(index: u32, feeder: usize, partition: i32) -> Self {
        Self {
            lane: Lane { index, epoch: 0 },
            feeder,
            partition,
            is_owned: false,
            is_leaving: false,
            frozen_by: None,
            main: Track::default(),
            retry: Track::default(),
        }
    }

    /// It belongs to this member now.
    pub(crate) fn assign(&mut self, main: Option<Progress>, retry: Option<Progress>) {
        self.lane.epoch += 1;
        (self.is_owned, self.is_leaving, self.frozen_by) = (true, false, None);
        self.main.assign(main);
        self.retry.assign(retry);
    }

    /// It belongs to somebody else.
    pub(crate) fn lose(&mut self) -> Held {
        (self.is_owned, self.is_leaving, self.frozen_by) = (false, false, None);
        let mut lost = Held::default();
        for track in [&mut self.main, &mut self.retry] {
            for entry in &track.entries {
                match entry.stage {
                    Stage::Ready | Stage::Out | Stage::Joined(_) => lost.unsettled += 1,
                    Stage::Held => {
                        lost.held += 1;
                        lost.held_bytes += entry.weight();
                    }
                    Stage::Settled => {}
                }
            }
            track.assign(None);
        }
        lost
    }

    pub(crate) fn track(&mut self, log: Log) -> &mut Track {
        match log {
            Log::Main => &mut self.main,
            Log::Retry => &mut self.retry,
        }
    }

    pub(crate) fn has_out(&self) -> bool {
        let is_out = |entry: &Entry| matches!(entry.stage, Stage::Out | Stage::Joined(_));
        [&self.main, &self.retry].into_iter().any(|track| track.entries.iter().any(is_out))
    }
}
