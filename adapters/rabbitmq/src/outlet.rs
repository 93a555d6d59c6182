//! A channel with publisher confirms: many messages on their way, each with its own outcome.
//!
//! Three things of the client are guarded against here. It numbers a publish and hands its frames over in two steps, so
//! that publishes from two tasks could be told each other's confirm: one lock covers both. It attaches a returned
//! message to whichever confirm is completed next (lapin #289), which is another's when one ack covers many: returns are
//! matched by message id. And a confirm may stay open when a channel fails (lapin #246): every batch has a deadline.

use std::collections::HashMap;
use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anybroker_core::{Bytes, Effect, Error, ErrorKind, Result};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};

use crate::error::{failed, late};
use crate::link::{Link, bounded, passes};

/// KiB on their way before publishers wait; every message counts as one at least.
const MOST_KIB: u32 = 65_536;
/// How often is looked whether the server takes messages again.
const BLOCKED_STEP: std::time::Duration = std::time::Duration::from_millis(20);

/// What the server said to one message.
#[derive(Debug)]
pub(crate) enum Answer {
    /// It is stored in every queue that it was routed to.
    Stored,
    /// It was routed to no queue.
    Unroutable,
    /// It is not, or may not be stored.
    Failed(Error),
}

/// The answers to the messages of one batch.
pub(crate) struct Board {
    answers: Mutex<Vec<Option<Answer>>>,
    missing: AtomicUsize,
    complete: Notify,
}

impl Board {
    pub(crate) fn new(count: usize) -> Arc<Self> {
        let answers = Mutex::new((0..count).map(|_| None).collect());
        Arc::new(Self { answers, missing: AtomicUsize::new(count), complete: Notify::new() })
    }

    pub(crate) fn note(&self, index: usize, answer: Answer) {
        let place = &mut self.answers.lock()[index];
        if place.is_none() {
            *place = Some(answer);
            if self.missing.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.complete.notify_waiters();
            }
        }
    }

    /// Waits until every answer is there; false at the deadline.
    pub(crate) async fn wait(&self, deadline: Instant) -> bool {
        loop {
            let complete = self.complete.notified();
            tokio::pin!(complete);
            complete.as_mut().enable();
            if self.missing.load(Ordering::Acquire) == 0 {
                return true;
            }
            if timeout_at(deadline, complete).await.is_err() {
                return false;
            }
        }
    }

    /// The answer to one; a missing one is late.
    pub(crate) fn take(&self, index: usize, operation: &'static str) -> Answer {
        self.answers.lock()[index].take().unwrap_or_else(|| Answer::Failed(late(operation)))
    }
}

type Publishing = Pin<Box<dyn Future<Output = lapin::Result<Confirmation>> + Send>>;

/// A message on its way.
struct Sent {
    publishing: Publishing,
    board: Arc<Board>,
    index: usize,
    /// A digest of its message id.
    mark: u64,
    room: OwnedSemaphorePermit,
}

struct Told {
    result: lapin::Result<Confirmation>,
    board: Arc<Board>,
    index: usize,
    mark: u64,
}

impl Sent {
    async fn told(self) -> Told {
        let result = self.publishing.await;
        drop(self.room);
        Told { result, board: self.board, index: self.index, mark: self.mark }
    }
}

struct Live {
    channel: Arc<Channel>,
    sent: mpsc::UnboundedSender<Sent>,
    /// Held while a message is numbered, handed over and noted.
    handing: Arc<Mutex<()>>,
}

/// What is to be published.
pub(crate) struct Parcel {
    pub(crate) exchange: ShortString,
    pub(crate) routing_key: ShortString,
    pub(crate) properties: BasicProperties,
    pub(crate) payload: Bytes,
}

/// One channel at a time, opened anew when it fails.
pub(crate) struct Outlet {
    link: Arc<Link>,
    operation: &'static str,
    live: tokio::sync::Mutex<Option<Arc<Live>>>,
    room: Arc<Semaphore>,
    marks: Arc<RandomState>,
}

impl Outlet {
    pub(crate) fn new(link: Arc<Link>, operation: &'static str) -> Self {
        let room = Arc::new(Semaphore::new(MOST_KIB as usize));
        Self { link, operation, live: tokio::sync::Mutex::default(), room, marks: Arc::default() }
    }

    /// Whether nothing is on its way.
    pub(crate) fn is_idle(&self) -> bool {
        self.room.available_permits() == MOST_KIB as usize
    }

    /// Whether the connection was made anew a moment ago.
    pub(crate) fn is_young(&self) -> bool {
        self.link.is_young()
    }

    async fn live(&self, deadline: Instant) -> Result<Arc<Live>> {
        let Ok(mut live) = timeout_at(deadline, self.live.lock()).await else { return Err(late(self.operation)) };
        if let Some(live) = live.as_ref().filter(|live| live.channel.status().connected()) {
            return Ok(Arc::clone(live));
        }
        *live = None;
        let channel = loop {
            let channel = self.link.channel_until(self.operation, deadline).await?;
            let selecting = channel.confirm_select(ConfirmSelectOptions::default());
            match bounded(self.operation, deadline, selecting).await {
                Ok(()) => break channel,
                Err(error) if passes(&error) && Instant::now() < deadline => {}
                Err(error) => return Err(error),
            }
        };
        let (sent, incoming) = mpsc::unbounded_channel();
        let handing = Arc::new(Mutex::new(()));
        tokio::spawn(collect(incoming, Arc::clone(&handing), Arc::clone(&self.marks), self.operation));
        let opened = Arc::new(Live { channel: Arc::new(channel), sent, handing });
        *live = Some(Arc::clone(&opened));
        Ok(opened)
    }

    /// Hands one message to the client; waits only for a channel and for room. What it answers was not sent.
    pub(crate) async fn send(
        &self,
        parcel: Parcel,
        (board, index): (&Arc<Board>, usize),
        deadline: Instant,
    ) -> Result<()> {
        let not_done = |error: Error| error.with_effect(Effect::NotDone);
        let live = self.live(deadline).await.map_err(not_done)?;
        self.unblocked(deadline).await?;
        let kib = u32::try_from(parcel.payload.len() / 1_024).unwrap_or(u32::MAX).saturating_add(1).min(MOST_KIB / 2);
        let room = timeout_at(deadline, Arc::clone(&self.room).acquire_many_owned(kib)).await;
        let Ok(Ok(room)) = room else {
            let text = "the client's buffers stayed full: the server does not take messages";
            return Err(not_done(Error::new(ErrorKind::RateLimited, self.operation, text)));
        };
        let mark = parcel.properties.message_id().as_ref().map_or(0, |id| self.marks.hash_one(id.as_str()));
        let channel = Arc::clone(&live.channel);
        let mut publishing: Publishing = Box::pin(async move {
            // Mandatory: a message that no queue takes is returned, not dropped.
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let Parcel { exchange, routing_key, properties, payload } = parcel;
            channel.basic_publish(exchange, routing_key, options, &payload, properties).await?.await
        });
        let _handing = live.handing.lock();
        let was_open = live.channel.status().connected();
        // The first poll numbers the message and hands its frames over.
        match publishing.as_mut().now_or_never() {
            None => {}
            Some(Err(error)) if !was_open => return Err(not_done(failed(self.operation, &error))),
            // Told already: this thread was not running for a while. What failed may have been written, and stored, before its
            // connection was lost.
            Some(told) => publishing = Box::pin(std::future::ready(told)),
        }
        let sent = Sent { publishing, board: Arc::clone(board), index, mark, room };
        // The collector ends with the last sender, which is here.
        let _ = live.sent.send(sent);
        Ok(())
    }

    /// Waits while a memory or disk alarm keeps the server from taking messages.
    async fn unblocked(&self, deadline: Instant) -> Result<()> {
        while self.link.is_blocked().await {
            if Instant::now() + BLOCKED_STEP >= deadline {
                let text = "the server takes no messages at the moment: a memory or disk alarm blocks the connection";
                return Err(Error::new(ErrorKind::RateLimited, self.operation, text));
            }
            tokio::time::sleep(BLOCKED_STEP).await;
        }
        Ok(())
    }
}

/// Notes what the server says. A message's return is in the client before its confirm, but it may hang on the confirm of
/// another one: nothing is told before everything that was completed by then has been seen.
async fn collect(
    mut incoming: mpsc::UnboundedReceiver<Sent>,
    handing: Arc<Mutex<()>>,
    marks: Arc<RandomState>,
    operation: &'static str,
) {
    let mut pending = FuturesUnordered::new();
    let mut told: Vec<Told> = Vec::new();
    let mut returned: HashMap<u64, usize> = HashMap::new();
    let mut is_open = true;
    loop {
        if told.is_empty() {
            tokio::select! {
                biased;
                Some(next) = pending.next(), if !pending.is_empty() => told.push(next),
                next = incoming.recv(), if is_open => match next {
                    Some(sent) => {
                        pending.push(sent.told());
                        continue;
                    }
                    None => is_open = false,
                },
                else => return,
            }
        }
        while let Some(Some(next)) = pending.next().now_or_never() {
            told.push(next);
        }
        let count = told.len();
        // Whoever has handed a message over has noted it by then.
        drop(handing.lock());
        while let Ok(sent) = incoming.try_recv() {
            pending.push(sent.told());
        }
        while let Some(Some(next)) = pending.next().now_or_never() {
            told.push(next);
        }
        for next in &mut told {
            if let Ok(Confirmation::Ack(message) | Confirmation::Nack(message)) = &mut next.result
                && let Some(message) = message.take()
            {
                let mark = message.properties.message_id().as_ref().map_or(0, |id| marks.hash_one(id.as_str()));
                *returned.entry(mark).or_default() += 1;
            }
        }
        for next in told.drain(..count) {
            let answer = answer(&next, &mut returned, operation);
            next.board.note(next.index, answer);
        }
    }
}

fn answer(told: &Told, returned: &mut HashMap<u64, usize>, operation: &'static str) -> Answer {
    let error = match &told.result {
        Ok(Confirmation::Ack(_)) => {
            let Some(count) = returned.get_mut(&told.mark) else { return Answer::Stored };
            *count -= 1;
            if *count == 0 {
                returned.remove(&told.mark);
            }
            return Answer::Unroutable;
        }
        Ok(Confirmation::Nack(_)) => {
            // One of several queues may have it.
            Error::new(ErrorKind::Unavailable, operation, "the server could not store it in every queue")
        }
        Ok(Confirmation::NotRequested) => Error::new(ErrorKind::Unexpected, operation, "the channel has no confirms"),
        // The channel is gone with all that was on its way: which of them the server had taken is not known.
        Err(error) => failed(operation, error),
    };
    Answer::Failed(error.with_effect(Effect::Unknown))
}
