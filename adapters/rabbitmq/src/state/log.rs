//! What of a stream is here, and what of it was settled.

use anybroker_core::{Destination, Group};

use super::Shared;
use crate::progress::Place;

/// What came of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Log {
    /// The offset behind the last message that came.
    pub(super) next: u64,
    /// The offset behind the last one that was settled.
    settled_to: u64,
    /// How many were settled.
    settled: u64,
}

impl Log {
    pub(super) fn settle(&mut self, offset: u64) {
        self.settled += 1;
        self.settled_to = self.settled_to.max(offset + 1);
    }
}

/// What a member has of a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    /// The offset behind the last message that came.
    pub(crate) next: u64,
    pub(crate) ready: u64,
    pub(crate) out: u64,
}

impl Shared {
    /// What this member has of the destination's stream; `None` when it does not read it.
    pub(crate) fn share(&self, destination: &Destination, group: &Group) -> Option<Share> {
        let state = self.lock();
        let own = state.feeds.iter().find(|feed| feed.destination == *destination && feed.group == *group)?;
        let mut share = Share { next: own.log?.next, ready: 0, out: 0 };
        let entries = own.unacked.values().filter_map(|slot| state.entry_at(*slot));
        for entry in entries.filter(|entry| entry.offset.is_some()) {
            match entry.phase.is_waiting() {
                true => share.ready += 1,
                false => share.out += 1,
            }
        }
        Some(share)
    }

    /// The feed reads its stream from that offset on.
    pub(crate) fn begin_log(&self, feed: u32, from: u64) {
        self.lock().feeds[feed as usize].log = Some(Log { next: from, settled_to: 0, settled: 0 });
    }

    /// A message of the stream is nobody's.
    pub(crate) fn passed(&self, feed: u32, offset: u64) {
        if let Some(log) = &mut self.lock().feeds[feed as usize].log {
            log.next = offset + 1;
            log.settle(offset);
        }
    }

    /// How many messages of the stream were settled.
    pub(crate) fn settled(&self, feed: u32) -> u64 {
        self.lock().feeds[feed as usize].log.map_or(0, |log| log.settled)
    }

    /// What of the stream is settled, and how many that are since `began`. A channel numbers what it delivers, and a stream
    /// is delivered in order: so are offsets of what is unacked.
    pub(crate) fn place(&self, feed: u32, began: &Place) -> Option<(u64, Place)> {
        let state = self.lock();
        let own = &state.feeds[feed as usize];
        let log = own.log?;
        let next = log.settled_to.max(began.next);
        let offset = |slot: &u32| state.entry_at(*slot)?.offset;
        let mut open: Vec<u64> = own.unacked.values().filter_map(offset).take_while(|offset| *offset < next).collect();
        // What was open when it began and has not come yet.
        open.extend(began.open.iter().filter(|offset| **offset >= log.next));
        Some((log.settled, Place { group: began.group, next, open }))
    }

    /// Whether the feed may leave its stream to another member: nobody is to receive here, and nothing is out.
    pub(crate) fn is_idle(&self, feed: u32) -> bool {
        if !self.is_resting() {
            return false;
        }
        let state = self.lock();
        let mut entries = state.feeds[feed as usize].unacked.values().filter_map(|slot| state.entry_at(*slot));
        entries.all(|entry| entry.phase.is_waiting())
    }
}
