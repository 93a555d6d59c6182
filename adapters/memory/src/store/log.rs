//! What was published, once for all groups.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use anybroker_core::{Clock, Message, Timestamp};

/// The messages of a lane by their sequence number. A message stays while a group has it open, and then for as long as
/// `retention` allows.
#[derive(Debug)]
pub(crate) struct Log {
    base: u64,
    entries: VecDeque<Entry>,
    /// Settled by every group and kept for replay, in the order in which that came about.
    settled: VecDeque<u64>,
    retention: usize,
    live: usize,
    /// Delays and times to live, of the few messages that have one.
    instructions: BTreeMap<u64, Instructions>,
}

/// Small on purpose: a settled entry behind an unsettled one stays as a gap of this size.
#[derive(Debug)]
struct Entry {
    message: Option<Arc<Message>>,
    stored_at: Timestamp,
    /// How many groups have not settled it.
    open: u32,
    /// Not settled yet, be it that no group has seen it.
    live: bool,
}

/// What the publisher asked for beside storing.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Instructions {
    pub(crate) not_before: Option<Timestamp>,
    pub(crate) expires: Option<Timestamp>,
}

impl Log {
    pub(crate) fn new(retention: usize) -> Self {
        Self {
            base: 0,
            entries: VecDeque::new(),
            settled: VecDeque::new(),
            retention,
            live: 0,
            instructions: BTreeMap::new(),
        }
    }

    /// The sequence number that the next message gets.
    pub(crate) fn next(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    /// The oldest sequence number that may still be there.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// How many messages are not settled by every group.
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// How many messages are stored, those kept for replay included.
    pub(crate) fn stored(&self) -> usize {
        self.entries.iter().filter(|entry| entry.message.is_some()).count()
    }

    /// Stores a message that `groups` groups have to settle.
    pub(crate) fn push(
        &mut self,
        message: Message,
        groups: u32,
        clock: &dyn Clock,
        now: Timestamp,
    ) -> (u64, Instructions) {
        let sequence = self.next();
        let mut instructions = Instructions::default();
        let mut message = message;
        if message.delay().is_some() || message.ttl().is_some() {
            instructions.not_before =
                message.delay().filter(|delay| !delay.is_zero()).map(|delay| clock.deadline(delay));
            instructions.expires = message.ttl().map(|ttl| clock.deadline(ttl));
            message = message.without_instructions();
            self.instructions.insert(sequence, instructions);
        }
        let message = Some(Arc::new(message));
        self.entries.push_back(Entry { message, stored_at: now, open: groups, live: true });
        self.live += 1;
        (sequence, instructions)
    }

    pub(crate) fn message(&self, sequence: u64) -> Option<&Arc<Message>> {
        self.entry(sequence)?.message.as_ref()
    }

    pub(crate) fn stored_at(&self, sequence: u64) -> Option<Timestamp> {
        self.entry(sequence).map(|entry| entry.stored_at)
    }

    pub(crate) fn instructions(&self, sequence: u64) -> Instructions {
        if self.instructions.is_empty() {
            return Instructions::default();
        }
        self.instructions.get(&sequence).copied().unwrap_or_default()
    }

    /// The first message that was stored at or after `moment`.
    pub(crate) fn first_at(&self, moment: Timestamp) -> u64 {
        self.base + self.entries.partition_point(|entry| entry.stored_at < moment) as u64
    }

    /// One group has settled it.
    pub(crate) fn settle(&mut self, sequence: u64) {
        let Some(entry) = self.entry_mut(sequence) else { return };
        debug_assert!(entry.open > 0, "settled more often than there are groups");
        entry.open -= 1;
        if entry.open == 0 {
            self.retire(sequence);
        }
    }

    /// Opens everything from `from` on for one more group, except what is gone, and what is kept for replay only and
    /// has expired meanwhile; `each` hears which it was. What no group has open after that is settled.
    pub(crate) fn open_from(&mut self, from: u64, now: Timestamp, mut each: impl FnMut(u64, bool, Instructions)) {
        let mut left_behind = Vec::new();
        for (sequence, entry) in (self.base..).zip(&mut self.entries) {
            if sequence >= from {
                let instructions = self.instructions.get(&sequence).copied().unwrap_or_default();
                let over = !entry.live && instructions.expires.is_some_and(|moment| moment <= now);
                let wanted = entry.message.is_some() && !over;
                if wanted {
                    entry.open += 1;
                    self.live += usize::from(!std::mem::replace(&mut entry.live, true));
                }
                each(sequence, wanted, instructions);
            } else if entry.live && entry.open == 0 {
                left_behind.push(sequence);
            }
        }
        left_behind.into_iter().for_each(|sequence| self.retire(sequence));
    }

    /// Every group has settled it: it is kept for replay, and the oldest such message goes.
    fn retire(&mut self, sequence: u64) {
        if let Some(entry) = self.entry_mut(sequence) {
            entry.live = false;
            self.live -= 1;
        }
        self.settled.push_back(sequence);
        while self.settled.len() > self.retention {
            let Some(oldest) = self.settled.pop_front() else { break };
            // A group that replays may have opened it again; then it is settled once more later.
            if let Some(entry) = self.entry_mut(oldest).filter(|entry| !entry.live) {
                entry.message = None;
                if !self.instructions.is_empty() {
                    self.instructions.remove(&oldest);
                }
            }
        }
        while self.entries.front().is_some_and(|entry| entry.message.is_none()) {
            self.entries.pop_front();
            self.base += 1;
        }
    }

    fn entry(&self, sequence: u64) -> Option<&Entry> {
        self.entries.get(usize::try_from(sequence.checked_sub(self.base)?).ok()?)
    }

    fn entry_mut(&mut self, sequence: u64) -> Option<&mut Entry> {
        self.entries.get_mut(usize::try_from(sequence.checked_sub(self.base)?).ok()?)
    }
}
