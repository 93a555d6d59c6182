//! Failures of messages that keep their place (`OnFailure::Block`): one message in a quorum queue of the group's, replaced by each
//! next one, as progress in a stream is (`progress.rs`).
//!
//! A message that failed stays unacked, with what is behind it, so that whatever happens to its member the server gives all of it
//! out again in order. A queue keeps nothing but a count of hand-overs beside a message; so what has to outlive the member stands
//! here: how often it failed, and when it may come again. Only the member whose turn it is writes, on the channel of its stand:
//! whoever comes next finds what was written.

use std::fmt::{self, Write as _};
use std::time::Duration;

use anybroker_core::naming::fnv1a;
use anybroker_core::{Error, ErrorKind, Message, Result};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lapin::Channel;
use lapin::options::{BasicGetOptions, BasicNackOptions, ConfirmSelectOptions};
use tokio::time::Instant;

use crate::link::bounded;
use crate::names::Names;
use crate::progress::write;
use crate::state::Shared;
use crate::topology::SETTLES;

/// How long after the last one, or after one that failed, it is written again when nobody waits for that.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a write may take.
const REQUEST: Duration = Duration::from_secs(10);
/// How soon is looked again for what is written.
const STEP: Duration = Duration::from_millis(50);

/// What is kept of one message that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Note {
    /// Whether it came of the stream, rather than of the queue.
    pub(crate) of_stream: bool,
    /// Which message.
    pub(crate) mark: u128,
    pub(crate) failures: u32,
    /// When it may come again, in milliseconds of Unix time; 0 for at once.
    pub(crate) until: i64,
    /// When the group first received it, in milliseconds; 0 where that is not known.
    pub(crate) first: i64,
    /// Hand-overs that the server does not count.
    pub(crate) deliveries: u32,
}

/// Which message it is. Of two with the same id and key the one that comes first is the one that failed: the other was behind it.
pub(crate) fn mark(message: &Message, redrives: u32) -> u128 {
    let mut bytes = redrives.to_le_bytes().to_vec();
    message.id().with_str(|id| bytes.extend_from_slice(id.as_bytes()));
    bytes.push(0);
    bytes.extend_from_slice(message.key().unwrap_or_default());
    fnv1a(&bytes)
}

impl Note {
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.split(' ');
        let note = Self {
            of_stream: match parts.next()? {
                "q" => false,
                "s" => true,
                _ => return None,
            },
            mark: u128::from_str_radix(parts.next()?, 16).ok()?,
            failures: parts.next()?.parse().ok()?,
            until: parts.next()?.parse().ok()?,
            first: parts.next()?.parse().ok()?,
            deliveries: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(note)
    }

    fn parse_all(data: &[u8]) -> Option<Vec<Self>> {
        std::str::from_utf8(data).ok()?.lines().map(Self::parse).collect()
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { of_stream, mark, failures, until, first, deliveries } = self;
        let source = if *of_stream { 's' } else { 'q' };
        write!(f, "{source} {mark:x} {failures} {until} {first} {deliveries}")
    }
}

fn text(notes: &[Note]) -> String {
    notes.iter().fold(String::new(), |mut text, note| {
        let _ = writeln!(text, "{note}");
        text
    })
}

/// What the member whose turn it is writes.
pub(crate) struct Ledger {
    channel: Channel,
    queue: String,
    /// Up to which change it is written.
    written: u64,
    writing: Option<(u64, BoxFuture<'static, Result<()>>)>,
    next_write: Instant,
    has_failed: bool,
}

impl Ledger {
    /// What is written, and the means to replace it. `stand` is the channel of the member's stand. `is_first` tells that this
    /// member has made the queue, and left it alone for a while.
    pub(crate) async fn open(
        queue: &str,
        stand: &Channel,
        is_first: bool,
        deadline: Instant,
    ) -> Result<(Self, Vec<Note>)> {
        let (operation, name) = ("receive", Names::failures(queue));
        if !stand.status().confirm() {
            bounded(operation, deadline, stand.confirm_select(ConfirmSelectOptions::default())).await?;
        }
        // It is missing when another member has just made the queue, which is left alone for a while; or for a moment, when
        // whoever looked at it before has died.
        let patience = Instant::now() + if is_first { Duration::ZERO } else { SETTLES };
        let notes = loop {
            let getting = stand.basic_get(name.as_str().into(), BasicGetOptions::default());
            if let Some(got) = bounded(operation, deadline, getting).await? {
                let options = BasicNackOptions { multiple: false, requeue: true };
                bounded(operation, deadline, stand.basic_nack(got.delivery.delivery_tag, options)).await?;
                break Note::parse_all(&got.delivery.data).ok_or_else(|| {
                    let text = "what is kept of the group's failures is not what this library wrote";
                    Error::new(ErrorKind::Unexpected, operation, text).with("queue", &name)
                })?;
            }
            if Instant::now() >= patience {
                write(stand.clone(), name.clone(), text(&[]), deadline).await?;
                break Vec::new();
            }
            tokio::time::sleep(STEP).await;
        };
        let ledger = Self {
            channel: stand.clone(),
            queue: name,
            written: 0,
            writing: None,
            next_write: Instant::now(),
            has_failed: false,
        };
        Ok((ledger, notes))
    }

    /// Begins to write what has changed, at once where a settle waits for it; tells when to come again for it.
    pub(crate) fn note(&mut self, shared: &Shared, feed: u32) -> Option<Instant> {
        if self.writing.is_some() {
            return None;
        }
        let (changes, urgent) = shared.changes(feed);
        if changes == self.written {
            return None;
        }
        let now = Instant::now();
        if now < self.next_write && (self.has_failed || urgent <= self.written) {
            return Some(self.next_write);
        }
        self.next_write = now + PAUSE;
        let (changes, notes) = shared.notes(feed);
        let writing = write(self.channel.clone(), self.queue.clone(), text(&notes), now + REQUEST);
        self.writing = Some((changes, writing.boxed()));
        None
    }

    /// Returns when something was written, or could not be. Cancel-safe.
    pub(crate) async fn wrote(&mut self, shared: &Shared, feed: u32) {
        let Some((changes, writing)) = &mut self.writing else { return std::future::pending().await };
        let (changes, told) = (*changes, writing.await);
        self.writing = None;
        self.has_failed = told.is_err();
        match told {
            Ok(()) => {
                self.written = changes;
                shared.noted(feed, changes);
            }
            // It is written again while somebody waits for it.
            Err(error) => {
                self.next_write = Instant::now() + PAUSE;
                tracing::warn!(%error, "failures that block their keys could not be stored");
            }
        }
    }

    /// Writes the last of it.
    pub(crate) async fn finish(&mut self, shared: &Shared, feed: u32, deadline: Instant) {
        if self.writing.is_some() && tokio::time::timeout_at(deadline, self.wrote(shared, feed)).await.is_err() {
            return;
        }
        let (changes, notes) = shared.notes(feed);
        if changes != self.written {
            let written = write(self.channel.clone(), self.queue.clone(), text(&notes), deadline).await;
            if let Err(error) = written {
                // What is acked and still stands there names messages that do not come again.
                tracing::debug!(%error, "failures of the group could not be written at the end");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_read_as_they_were_written_and_nothing_else_is_one() {
        let note =
            Note { of_stream: true, mark: u128::MAX, failures: 3, until: -1, first: i64::MAX, deliveries: u32::MAX };
        for notes in [vec![], vec![note], vec![note, Note { of_stream: false, mark: 0, until: 0, ..note }]] {
            assert_eq!(Note::parse_all(text(&notes).as_bytes()), Some(notes));
        }
        for other in ["\n", "x", "q 1 2 3 4", "q 1 2 3 4 5 6", "q 1 -2 3 4 5", "q g 2 3 4 5", "x 1 2 3 4 5"] {
            assert_eq!(Note::parse_all(other.as_bytes()), None, "{other:?}");
        }
    }

    #[test]
    fn a_mark_tells_messages_apart_by_id_key_and_redrives() {
        let message = |id: &'static str, key: Option<&'static str>| {
            let message = Message::new("d", "").with_id(id);
            match key {
                Some(key) => message.with_key(key),
                None => message,
            }
        };
        let one = mark(&message("1", Some("a")), 0);
        assert_eq!(one, mark(&message("1", Some("a")), 0));
        for other in
            [mark(&message("2", Some("a")), 0), mark(&message("1", Some("b")), 0), mark(&message("1", Some("a")), 1)]
        {
            assert_ne!(one, other);
        }
    }
}
