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

use crate::numbers::Numbers;

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
    slots: Mutex<HashMap<u64, Slot, Numbers>>,
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
        let (mut place, first) = (String::with_capacity(self.inbox.len() + 18), AtomicUsize::new(0));
        write!(place, "{}.{id:x}.", self.inbox).expect("writing to a string cannot fail");
        Answers { board: Arc::clone(self), id, place, first }
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

    /// Notes what has come, all of it under one lock.
    pub(crate) fn note(&self, answers: &mut Vec<async_nats::Message>) {
        let (mut noted, mut slots) = (0, self.slots.lock());
        for answer in answers.drain(..) {
            let Some((id, index)) = self.read(&answer.subject) else { continue };
            let is_unserved = answer.status.is_some_and(|status| status == async_nats::StatusCode::NO_RESPONDERS);
            let reply = Reply { payload: answer.payload, is_unserved, denied: None };
            noted += usize::from(report(&mut slots, id, index, Some(reply)));
        }
        drop(slots);
        self.arrived(noted);
    }

    /// The batch and entry that an answer is for.
    fn read(&self, subject: &str) -> Option<(u64, usize)> {
        let (id, index) = subject.get(self.inbox.len() + 1..)?.split_once('.')?;
        Some((u64::from_str_radix(id, 16).ok()?, usize::from_str_radix(index, 16).ok()?))
    }

    fn report(&self, id: u64, index: usize, reply: Option<Reply>) {
        let was_sent = report(&mut self.slots.lock(), id, index, reply);
        self.arrived(usize::from(was_sent));
    }

    /// So many answers less are on their way.
    fn arrived(&self, count: usize) {
        let before = self.on_their_way.fetch_sub(count, Ordering::AcqRel);
        // One wake-up for many answers, and one for the last.
        if count > 0 && (before / 256 != (before - count) / 256 || before == count) {
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

/// Notes what became of an entry; whether it was on its way.
fn report(slots: &mut HashMap<u64, Slot, Numbers>, id: u64, index: usize, reply: Option<Reply>) -> bool {
    let Some(slot) = slots.get_mut(&id) else { return false };
    let Some(place @ (Place::Missing | Place::Unsent)) = slot.replies.get_mut(index) else { return false };
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
    was_sent
}

/// The answers of one batch.
pub(crate) struct Answers {
    board: Arc<Board>,
    id: u64,
    /// What the subjects of its answers begin with.
    place: String,
    /// The first entry that was not handed to the client.
    first: AtomicUsize,
}

impl Answers {
    /// Says that the entries from `first` on, one for each subject, are sent now: they count as on their way.
    pub(crate) fn expect<'s>(&self, first: usize, subjects: impl Iterator<Item = &'s Subject>) {
        let mut slots = self.board.slots.lock();
        let Some(slot) = slots.get_mut(&self.id) else { return };
        let mut expected = 0;
        for (index, subject) in (first..).zip(subjects) {
            if let Some(place @ Place::Unsent) = slot.replies.get_mut(index) {
                *place = Place::Missing;
                expected += 1;
                if slot.subjects.last().is_none_or(|(_, last)| last != subject) {
                    slot.subjects.push((index, subject.clone()));
                }
            }
        }
        self.board.on_their_way.fetch_add(expected, Ordering::AcqRel);
    }

    /// Where the answer to an entry is to be sent that is expected, and handed to the client next.
    pub(crate) fn place(&self, index: usize) -> Subject {
        self.first.fetch_max(index + 1, Ordering::Relaxed);
        // Made for each message: by hand, and of exactly its length, because a longer buffer is moved or wrapped.
        let digits = (usize::BITS - index.leading_zeros()).div_ceil(4).max(1);
        let mut place = String::with_capacity(self.place.len() + digits as usize);
        place.push_str(&self.place);
        for digit in (0..digits).rev() {
            place.push(char::from(b"0123456789abcdef"[index >> (4 * digit) & 15]));
        }
        Subject::from(place)
    }

    /// Where the answer to an entry for `subject` is to be sent. From here on it counts as on its way.
    pub(crate) fn reply(&self, index: usize, subject: &Subject) -> Subject {
        self.expect(index, std::iter::once(subject));
        self.place(index)
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

    /// All answers that have come, by entry.
    pub(crate) fn take_all(&self) -> Vec<Option<Reply>> {
        let mut slots = self.board.slots.lock();
        let places = slots.get_mut(&self.id).map_or(&mut [][..], |slot| &mut slot.replies);
        let take = |place: &mut Place| match place {
            Place::Here(_) => match std::mem::replace(place, Place::Taken) {
                Place::Here(reply) => Some(reply),
                _ => None,
            },
            _ => None,
        };
        places.iter_mut().map(take).collect()
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let first = *self.first.get_mut();
        let mut slots = self.board.slots.lock();
        if let Some(slot) = slots.get_mut(&self.id) {
            // Nothing answers what was expected and never handed over.
            let mut unsent = 0;
            for place in slot.replies.iter_mut().skip(first).filter(|place| **place == Place::Missing) {
                *place = Place::Unsent;
                unsent += 1;
            }
            self.board.on_their_way.fetch_sub(unsent, Ordering::AcqRel);
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn answer(subject: Subject, payload: &'static str) -> async_nats::Message {
        let payload = Bytes::from_static(payload.as_bytes());
        async_nats::Message { subject, reply: None, payload, headers: None, status: None, description: None, length: 0 }
    }

    fn open(count: usize) -> (Arc<Board>, Answers) {
        let board = Arc::new(Board::new("_INBOX.me".to_owned()));
        let answers = board.open(count, Instant::now() + Duration::from_secs(60));
        (board, answers)
    }

    #[test]
    fn an_answer_is_noted_for_the_entry_whose_place_it_came_to() {
        let (board, answers) = open(70_000);
        let (subject, asked) = (Subject::from("there"), [0, 9, 15, 16, 255, 256, 4_095, 65_535, 69_999]);
        let mut came: Vec<_> = asked.iter().map(|index| answer(answers.reply(*index, &subject), "here")).collect();
        assert_eq!(board.on_their_way(), asked.len());
        board.note(&mut came);
        assert_eq!(board.on_their_way(), 0);
        let here: Vec<usize> =
            (0..).zip(answers.take_all()).filter_map(|(index, reply)| reply.map(|_| index)).collect();
        assert_eq!(here, asked);
    }

    #[test]
    fn nothing_is_waited_for_that_was_expected_and_never_handed_over() {
        let (board, answers) = open(3);
        let subjects = ["a", "b", "c"].map(Subject::from);
        answers.expect(0, subjects.iter());
        assert_eq!(board.on_their_way(), 3);
        let first = answers.place(0);
        drop(answers);
        assert_eq!(board.on_their_way(), 1, "only the first was handed over");
        board.note(&mut vec![answer(first, "")]);
        assert_eq!(board.on_their_way(), 0);
    }

    #[test]
    fn who_may_not_publish_is_told_for_each_entry_that_went_there() {
        let (board, answers) = open(3);
        let subjects = ["a", "b", "a"].map(Subject::from);
        answers.expect(0, subjects.iter());
        board.deny("a");
        let denied = answers.take_all().into_iter().map(|reply| reply.and_then(|reply| reply.denied).is_some());
        assert_eq!(denied.collect::<Vec<_>>(), [true, false, true]);
    }
}
