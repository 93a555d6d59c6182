//! Messages that came back, and messages that wait.

use std::sync::Arc;

use anybroker_core::{ByteString, Message, Timestamp};

/// A message that was handed out before, or that waits for its moment.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) sequence: u64,
    /// 1 + failed outcomes.
    pub(crate) attempt: u32,
    /// Hand-overs so far.
    pub(crate) deliveries: u32,
    pub(crate) not_before: Timestamp,
    pub(crate) history: Option<Box<History>>,
}

impl Pending {
    /// One that nobody has seen yet.
    pub(crate) fn unseen(sequence: u64, not_before: Timestamp) -> Self {
        Self { sequence, attempt: 1, deliveries: 0, not_before, history: None }
    }

    /// Whether the message is the letter's own: redriven, no longer counted in the log.
    pub(crate) fn redriven(&self) -> Option<&Arc<Message>> {
        self.history.as_ref()?.redriven.as_ref()
    }
}

/// What only few messages have: kept aside, so that the others need not carry it.
#[derive(Debug, Default, Clone)]
pub(crate) struct History {
    pub(crate) first_at: Option<Timestamp>,
    pub(crate) error_type: Option<ByteString>,
    pub(crate) redrives: u32,
    /// The message of a redriven letter; the log may have forgotten it.
    pub(crate) redriven: Option<Arc<Message>>,
    pub(crate) stored_at: Option<Timestamp>,
}
