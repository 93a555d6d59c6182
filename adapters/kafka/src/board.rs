//! The outcomes of what is on its way, batch by batch.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use anybroker_core::{Confirms, Error, ErrorKind, Login, PublishOutcome};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::login::refused_meanwhile;

/// Where delivery reports are noted, batch by batch. An opaque number names batch and entry, so that nothing is
/// allocated for a message.
#[derive(Default)]
pub(crate) struct Board {
    slots: Mutex<Slots>,
    on_their_way: AtomicUsize,
    failures: AtomicU64,
    replacements: AtomicU64,
    /// Where the credentials come from: a refusal of them may pass.
    login: Option<Login>,
    /// Why the cluster lets this client in no more, until something is stored again.
    refusal: Mutex<Option<String>>,
    is_refused: AtomicBool,
    /// Topics that did not take what was sent to them: they are not as they were known.
    suspects: Mutex<HashSet<String>>,
    /// Something got its outcome: there is room in the buffers again.
    pub(crate) room: Notify,
}

/// How often something went wrong with what is on its way. When it has changed, later entries of a key may have to be
/// held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Setbacks {
    failures: u64,
    pub(crate) replacements: u64,
}

#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Slot {
    outcomes: Vec<Option<PublishOutcome>>,
    /// Entries that the broker or the client gave up on, since they were asked for.
    failed: Vec<usize>,
    /// Entries without an outcome.
    missing: usize,
    waker: Option<Waker>,
    /// Nobody waits for the answers.
    is_detached: bool,
}

impl Board {
    pub(crate) fn new(login: Option<Login>) -> Arc<Self> {
        Arc::new(Self { login, ..Self::default() })
    }

    pub(crate) fn open(self: &Arc<Self>, count: usize) -> Answers {
        let mut slots = self.slots.lock();
        let slot = match slots.free.pop() {
            Some(slot) => slot,
            None => {
                slots.slots.push(Slot::default());
                u32::try_from(slots.slots.len() - 1).expect("memory ends before 2^32 batches are on their way")
            }
        };
        let entry = &mut slots.slots[slot as usize];
        entry.outcomes.clear();
        entry.failed.clear();
        entry.outcomes.resize_with(count, || None);
        (entry.missing, entry.waker, entry.is_detached) = (count, None, false);
        self.on_their_way.fetch_add(count, Ordering::AcqRel);
        Answers { board: Arc::clone(self), slot, unsent: count, topics: Vec::new(), is_open: true }
    }

    pub(crate) fn on_their_way(&self) -> usize {
        self.on_their_way.load(Ordering::Acquire)
    }

    pub(crate) fn setbacks(&self) -> Setbacks {
        Setbacks {
            failures: self.failures.load(Ordering::Acquire),
            replacements: self.replacements.load(Ordering::Acquire),
        }
    }

    /// A client is about to be replaced, with what it has not told the outcome of.
    pub(crate) fn replaced(&self) {
        self.replacements.fetch_add(1, Ordering::AcqRel);
    }

    /// The cluster does not let this client in.
    pub(crate) fn refused(&self, reason: &str) {
        *self.refusal.lock() = Some(reason.to_owned());
        self.is_refused.store(true, Ordering::Release);
    }

    pub(crate) fn is_refused(&self) -> bool {
        self.is_refused.load(Ordering::Relaxed)
    }

    /// The outcome of what has none in time.
    fn late(&self) -> Error {
        match &*self.refusal.lock() {
            Some(refusal) => refused_meanwhile(refusal, self.login.as_ref()),
            None => Error::new(ErrorKind::Timeout, "publish", "no confirm from the broker in time"),
        }
    }

    pub(crate) fn suspect(&self, topic: &str) {
        self.suspects.lock().insert(topic.to_owned());
    }

    /// The topics that have become suspect since this was asked.
    pub(crate) fn suspects(&self) -> HashSet<String> {
        std::mem::take(&mut *self.suspects.lock())
    }

    pub(crate) fn report(&self, opaque: usize, outcome: PublishOutcome) {
        let (slot, index) = ((opaque >> 32) as u32, opaque & 0xffff_ffff);
        let is_failure = outcome.is_err();
        if !is_failure && self.is_refused.load(Ordering::Relaxed) {
            self.is_refused.store(false, Ordering::Relaxed);
            *self.refusal.lock() = None;
        }
        let mut slots = self.slots.lock();
        let entry = &mut slots.slots[slot as usize];
        if is_failure && !entry.is_detached {
            entry.failed.push(index);
        }
        entry.outcomes[index] = Some(outcome);
        entry.missing -= 1;
        if entry.missing == 0 {
            if let Some(waker) = entry.waker.take() {
                waker.wake();
            }
            if entry.is_detached {
                slots.free.push(slot);
            }
        }
        drop(slots);
        if is_failure {
            self.failures.fetch_add(1, Ordering::AcqRel);
        }
        if self.on_their_way.fetch_sub(1, Ordering::AcqRel) % 1024 == 1 {
            self.room.notify_waiters();
        }
    }
}

/// The answers of one batch.
pub(crate) struct Answers {
    board: Arc<Board>,
    slot: u32,
    /// Entries that librdkafka has not got; they count as missing until they are refused or given up.
    pub(crate) unsent: usize,
    /// Where the entries go. A topic that does not confirm in time may be gone, which librdkafka does not always tell.
    topics: Vec<Arc<str>>,
    is_open: bool,
}

impl Answers {
    pub(crate) fn opaque(&self, index: usize) -> usize {
        (self.slot as usize) << 32 | index
    }

    pub(crate) fn of_topics(&mut self, topics: impl Iterator<Item = Arc<str>>) {
        self.topics.extend(topics);
    }

    /// The entries that failed since this was asked.
    pub(crate) fn failed(&self) -> Vec<usize> {
        std::mem::take(&mut self.board.slots.lock().slots[self.slot as usize].failed)
    }

    /// The entries among the first `count` that are not known to be stored.
    pub(crate) fn unstored(&self, count: usize) -> Vec<usize> {
        let slots = self.board.slots.lock();
        let outcomes = &slots.slots[self.slot as usize].outcomes;
        (0..count).filter(|&index| !matches!(outcomes[index], Some(Ok(_)))).collect()
    }

    pub(crate) fn refuse(&mut self, index: usize, error: Error) {
        self.unsent -= 1;
        self.board.on_their_way.fetch_sub(1, Ordering::AcqRel);
        let entry = &mut self.board.slots.lock().slots[self.slot as usize];
        entry.missing -= 1;
        entry.outcomes[index] = Some(Err(error));
    }

    pub(crate) fn confirms(self, deadline: Instant) -> Confirms {
        let is_done = self.board.slots.lock().slots[self.slot as usize].missing == 0;
        if is_done {
            return Confirms::ready(self.take());
        }
        Confirms::waiting(self.wait(deadline))
    }

    /// The outcomes; *unknown* for those that have none at the deadline.
    pub(crate) async fn wait(mut self, deadline: Instant) -> Vec<PublishOutcome> {
        let _ = tokio::time::timeout_at(deadline, Missing(&mut self)).await;
        self.take()
    }

    fn take(mut self) -> Vec<PublishOutcome> {
        let mut slots = self.board.slots.lock();
        let entry = &mut slots.slots[self.slot as usize];
        if entry.missing > 0 {
            self.topics.iter().for_each(|topic| self.board.suspect(topic));
        }
        let late = || Err(self.board.late());
        let outcomes = entry.outcomes.iter_mut().map(|outcome| outcome.take().unwrap_or_else(late)).collect();
        drop(slots);
        self.detach();
        outcomes
    }

    fn detach(&mut self) {
        if !std::mem::replace(&mut self.is_open, false) {
            return;
        }
        let mut slots = self.board.slots.lock();
        let entry = &mut slots.slots[self.slot as usize];
        (entry.is_detached, entry.waker) = (true, None);
        entry.missing -= self.unsent;
        self.board.on_their_way.fetch_sub(self.unsent, Ordering::AcqRel);
        if entry.missing == 0 {
            slots.free.push(self.slot);
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Ready when no report is missing.
struct Missing<'a>(&'a mut Answers);

impl Future for Missing<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let answers = &self.0;
        let mut slots = answers.board.slots.lock();
        let entry = &mut slots.slots[answers.slot as usize];
        if entry.missing == 0 {
            return Poll::Ready(());
        }
        entry.waker = Some(context.waker().clone());
        Poll::Pending
    }
}
