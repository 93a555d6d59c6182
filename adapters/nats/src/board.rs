//! Where answers to what was sent are noted.
//!
//! This is what keeps many publishes and acks on their way at once: one subscription for all answers, one slot for a
//! batch, no task and no channel for a message.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use anybroker_core::Bytes;
use async_nats::Subject;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Answers that may be missing before publishers wait: half of what the client buffers for one subscription.
const MOST_ON_THEIR_WAY: usize = 32_768;

/// An answer of the server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) payload: Bytes,
    /// Nobody was there to receive what was sent (status 503).
    pub(crate) is_unserved: bool,
    /// The user may not publish to this subject.
    pub(crate) denied: Option<Subject>,
}

pub(crate) struct Board {
    inbox: String,
    next: AtomicU64,
    slots: Mutex<HashMap<u64, Slot>>,
    on_their_way: AtomicUsize,
    room: Notify,
    /// No answer comes any more.
    is_ended: AtomicBool,
}

#[derive(PartialEq, Eq)]
enum Place {
    Unsent,
    Missing,
    Here(Reply),
    Taken,
}

struct Slot {
    replies: Vec<Place>,
    /// Where entries went: from each index on, to that subject.
    subjects: Vec<(usize, Subject)>,
    /// Entries that are not done, sent or not.
    missing: usize,
    waker: Option<Waker>,
    /// Until when the answers matter.
    until: Instant,
    /// Nobody waits for the answers.
    is_detached: bool,
}

impl Slot {
    fn on_their_way(&self) -> usize {
        if self.missing == 0 { 0 } else { self.replies.iter().filter(|place| **place == Place::Missing).count() }
    }
}

impl Board {
    pub(crate) fn new(inbox: String) -> Self {
        let (next, slots, on_their_way, room, is_ended) = Default::default();
        Self { inbox, next, slots, on_their_way, room, is_ended }
    }

    /// Room for the answers of a batch.
    pub(crate) fn open(self: &Arc<Self>, count: usize, until: Instant) -> Answers {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let replies = (0..count).map(|_| Place::Unsent).collect();
        self.slots
            .lock()
            .insert(id, Slot { replies, subjects: Vec::new(), missing: count, waker: None, until, is_detached: false });
        Answers { board: Arc::clone(self), id }
    }

    pub(crate) fn on_their_way(&self) -> usize {
        self.on_their_way.load(Ordering::Acquire)
    }

    /// Waits until fewer answers are missing; false at the deadline.
    pub(crate) async fn room(&self, deadline: Instant) -> bool {
        self.fewer(MOST_ON_THEIR_WAY, deadline).await
    }

    /// Waits until at most `most` answers are missing; false at the deadline.
    pub(crate) async fn fewer(&self, most: usize, deadline: Instant) -> bool {
        while self.on_their_way() > most {
            let settled = self.room.notified();
            // The wake-up comes once for many answers; nobody waits for it alone.
            let step = (Instant::now() + Duration::from_millis(5)).min(deadline);
            let _ = tokio::time::timeout_at(step, settled).await;
            self.sweep();
            if Instant::now() >= deadline {
                return self.on_their_way() <= most;
            }
        }
        true
    }

    /// The connection is closed: who still waits for an answer is told that there is none.
    pub(crate) fn end(&self) {
        self.is_ended.store(true, Ordering::Release);
        for slot in self.slots.lock().values_mut() {
            if let Some(waker) = slot.waker.take() {
                waker.wake();
            }
        }
    }

    /// The server refuses what is published to a subject, and sends no answer to it.
    pub(crate) fn deny(&self, subject: &str) {
        let mut denied = Vec::new();
        for (id, slot) in self.slots.lock().iter() {
            for (run, (from, to)) in slot.subjects.iter().enumerate() {
                if to.as_str() == subject {
                    let end = slot.subjects.get(run + 1).map_or(slot.replies.len(), |(next, _)| *next);
                    let missing = (*from..end).filter(|index| slot.replies[*index] == Place::Missing);
                    denied.extend(missing.map(|index| (*id, index, to.clone())));
                }
            }
        }
        for (id, index, to) in denied {
            self.report(id, index, Some(Reply { payload: Bytes::new(), is_unserved: false, denied: Some(to) }));
        }
    }

    pub(crate) fn note(&self, answer: async_nats::Message) {
        let rest = answer.subject.as_str().get(self.inbox.len() + 1..).and_then(|rest| rest.split_once('.'));
        let Some((id, index)) = rest
            .and_then(|(id, index)| Some((u64::from_str_radix(id, 16).ok()?, usize::from_str_radix(index, 16).ok()?)))
        else {
            return;
        };
        let is_unserved = answer.status.is_some_and(|status| status == async_nats::StatusCode::NO_RESPONDERS);
        self.report(id, index, Some(Reply { payload: answer.payload, is_unserved, denied: None }));
    }

    fn report(&self, id: u64, index: usize, reply: Option<Reply>) {
        let mut slots = self.slots.lock();
        let Some(slot) = slots.get_mut(&id) else { return };
        let Some(place @ (Place::Missing | Place::Unsent)) = slot.replies.get_mut(index) else { return };
        let was_sent = *place == Place::Missing;
        *place = reply.map_or(Place::Taken, Place::Here);
        slot.missing -= 1;
        if slot.missing == 0 {
            if let Some(waker) = slot.waker.take() {
                waker.wake();
            }
            if slot.is_detached {
                slots.remove(&id);
            }
        }
        drop(slots);
        if was_sent && self.on_their_way.fetch_sub(1, Ordering::AcqRel) % 256 == 1 {
            self.room.notify_waiters();
        }
    }

    pub(crate) fn sweep(&self) {
        let (mut given_up, now) = (0, Instant::now());
        self.slots.lock().retain(|_, slot| {
            let is_over = slot.is_detached && slot.until <= now;
            if is_over {
                given_up += slot.on_their_way();
            }
            !is_over
        });
        self.on_their_way.fetch_sub(given_up, Ordering::AcqRel);
    }
}

/// The answers of one batch.
pub(crate) struct Answers {
    board: Arc<Board>,
    id: u64,
}

impl Answers {
    /// Where the answer to an entry for `subject` is to be sent. From here on it counts as on its way.
    pub(crate) fn reply(&self, index: usize, subject: &Subject) -> Subject {
        let mut slots = self.board.slots.lock();
        if let Some(slot) = slots.get_mut(&self.id)
            && let Some(place @ Place::Unsent) = slot.replies.get_mut(index)
        {
            *place = Place::Missing;
            if slot.subjects.last().is_none_or(|(_, last)| last != subject) {
                slot.subjects.push((index, subject.clone()));
            }
            self.board.on_their_way.fetch_add(1, Ordering::AcqRel);
        }
        drop(slots);
        // With its room from the beginning: it is made for each message.
        let mut reply = String::with_capacity(self.board.inbox.len() + 26);
        write!(reply, "{}.{:x}.{index:x}", self.board.inbox, self.id).expect("writing to a string cannot fail");
        Subject::from(reply)
    }

    /// No answer will come to an entry: it was not sent.
    pub(crate) fn skip(&self, index: usize) {
        self.board.report(self.id, index, None);
    }

    /// Waits until all answers are there; false at the deadline.
    pub(crate) async fn wait(&self, deadline: Instant) -> bool {
        tokio::time::timeout_at(deadline, Missing(self)).await.is_ok()
    }

    /// The answer to an entry, where it has come.
    pub(crate) fn take(&self, index: usize) -> Option<Reply> {
        let mut slots = self.board.slots.lock();
        let place = slots.get_mut(&self.id)?.replies.get_mut(index)?;
        match std::mem::replace(place, Place::Taken) {
            Place::Here(reply) => Some(reply),
            other => {
                *place = other;
                None
            }
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let mut slots = self.board.slots.lock();
        if let Some(slot) = slots.get_mut(&self.id) {
            // What has no answer by then is told as unknown; a late one matters to nobody.
            if slot.missing == 0 || slot.until <= Instant::now() {
                let missing = slot.on_their_way();
                slots.remove(&self.id);
                self.board.on_their_way.fetch_sub(missing, Ordering::AcqRel);
            } else {
                (slot.is_detached, slot.waker) = (true, None);
            }
        }
    }
}

/// Ready when no answer is missing.
struct Missing<'a>(&'a Answers);

impl Future for Missing<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut slots = self.0.board.slots.lock();
        match slots.get_mut(&self.0.id) {
            Some(slot) if slot.missing > 0 && !self.0.board.is_ended.load(Ordering::Acquire) => {
                slot.waker = Some(context.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }
}
