//! The dead letters of a group.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anybroker_core::{
    ByteString, DeadLetter, DeadLetterId, Error, ErrorKind, Group, Message, OnFailure, Position, Reason, Result,
    Timestamp,
};

use super::flight::NONE;
use super::group::GroupState;
use super::log::Log;
use super::pending::{History, Pending};

/// Dead letters by number. Numbers are drawn for the whole destination, so that they tell the age across lanes.
#[derive(Debug)]
pub(crate) struct Letters {
    letters: BTreeMap<u64, Letter>,
    numbers: Arc<AtomicU64>,
}

#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) sequence: u64,
    pub(crate) message: Arc<Message>,
    pub(crate) reason: Reason,
    pub(crate) error_type: Option<ByteString>,
    pub(crate) detail: Option<ByteString>,
    pub(crate) attempts: u32,
    pub(crate) first_at: Option<Timestamp>,
    pub(crate) last_at: Timestamp,
    pub(crate) redrives: u32,
    pub(crate) stored_at: Option<Timestamp>,
}

impl Letters {
    pub(crate) fn new(numbers: Arc<AtomicU64>) -> Self {
        Self { letters: BTreeMap::new(), numbers }
    }

    pub(crate) fn len(&self) -> usize {
        self.letters.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Letter> {
        self.letters.values()
    }

    pub(super) fn add(&mut self, letter: Letter) {
        self.letters.insert(self.numbers.fetch_add(1, Ordering::Relaxed), letter);
    }

    /// Up to `max` letters from number `from` on, oldest first.
    pub(crate) fn page(&self, group: &Group, from: u64, max: usize) -> Vec<(u64, DeadLetter)> {
        let letters = self.letters.range(from..).take(max);
        letters.map(|(number, letter)| (*number, letter.shown(*number, group))).collect()
    }
}

impl Letter {
    /// Whether later messages of its key are parked behind it. What expired has not failed: nothing waits for it.
    pub(super) fn parks(&self) -> bool {
        self.reason != Reason::Expired
    }

    fn shown(&self, number: u64, group: &Group) -> DeadLetter {
        DeadLetter {
            id: letter_id(number),
            message: Message::clone(&self.message),
            group: group.clone(),
            reason: self.reason.clone(),
            error_type: self.error_type.clone(),
            detail: self.detail.clone(),
            attempts: self.attempts,
            first_at: self.first_at,
            last_at: self.last_at,
            redrives: self.redrives,
            position: Some(Position::new(self.sequence)),
        }
    }
}

/// Letter numbers in their text form.
pub(crate) fn letter_id(number: u64) -> DeadLetterId {
    DeadLetterId(number.to_string().into())
}

/// The number of a letter; an id that is none of ours names no letter.
pub(crate) fn letter_number(id: &DeadLetterId) -> Option<u64> {
    id.0.parse().ok()
}

impl GroupState {
    /// Puts a letter back; `None` where this lane does not hold it.
    pub(crate) fn redrive(&mut self, log: &mut Log, number: u64, now: Timestamp) -> Option<Result<()>> {
        let letter = self.letters.letters.get(&number)?;
        let (sequence, message) = (letter.sequence, Arc::clone(&letter.message));
        let key = self.keys.of(self.order, &message);
        if key != NONE && self.keys.key(key).parks(sequence) {
            let text = "an earlier letter of this key is still in the queue; redrive or purge that one first";
            return Some(Err(Error::new(ErrorKind::Unavailable, "redrive", text).with("letter", number)));
        }
        let letter = self.take_letter(number, key)?;
        let history = History {
            redrives: letter.redrives + 1,
            redriven: Some(letter.message),
            stored_at: letter.stored_at,
            ..History::default()
        };
        self.redriven += 1;
        let pending = Pending { history: Some(Box::new(history)), ..Pending::unseen(sequence, Timestamp::default()) };
        self.requeue(log, pending, Some(key), now);
        Some(Ok(()))
    }

    /// Deletes a letter; whether this lane held it.
    pub(crate) fn purge(&mut self, number: u64) -> bool {
        let Some(letter) = self.letters.letters.get(&number) else { return false };
        let message = Arc::clone(&letter.message);
        let key = self.keys.of(self.order, &message);
        self.take_letter(number, key).is_some()
    }

    fn take_letter(&mut self, number: u64, key: u32) -> Option<Letter> {
        let letter = self.letters.letters.remove(&number)?;
        if key != NONE && self.on_failure == OnFailure::Park {
            self.keys.key_mut(key).queue_mut().letters.remove(&letter.sequence);
        }
        Some(letter)
    }
}
