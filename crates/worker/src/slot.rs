//! A slot runs handlers, one at a time; there are as many as the subscription's concurrency.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anybroker_core::{Clock, Delivery, Destination, Lane, Settlement};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};

use crate::context::Scope;
use crate::drain::Stage;
use crate::handler::BatchHandler;
use crate::handling::Handling;
use crate::lanes::{Held, Job, LaneId};
use crate::middleware::Onion;
use crate::rules::{Cause, Decision, Ended, Rules};
use crate::state::{Concluded, Next, State};
use crate::telemetry::Topic;
use crate::{Context, HandlerError, Outcome};

/// A slot hands over what it has concluded at the latest after that long.
const FLUSH_AFTER: Duration = Duration::from_millis(1);

/// What slots hand over to the subscription's loop.
#[allow(clippy::large_enum_variant, reason = "moved, not kept: a box would be an allocation per message")]
pub(crate) enum Concluding {
    /// To be settled, in order; nothing waits for the outcome.
    Plain(Batch),
    /// A failure under `OnFailure::Block` or `Park`: its lane goes on when it is settled.
    Holding(Held, Settlement, Option<Box<Cause>>, LaneId),
    /// Its lease is being extended at this moment; to be settled as soon as that is over.
    Shared(Arc<Delivery>, Settlement, Option<Box<Cause>>),
    /// There is room again, or the breaker's gate has moved.
    Nudge,
}

/// Deliveries with what becomes of them, and, for those that are not acked, why.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) entries: Vec<(Delivery, Settlement)>,
    /// By index, ascending.
    pub(crate) causes: Vec<(usize, Box<Cause>)>,
}

impl Batch {
    pub(crate) fn push(&mut self, delivery: Delivery, settlement: Settlement, cause: Option<Box<Cause>>) {
        self.causes.extend(cause.map(|cause| (self.entries.len(), cause)));
        self.entries.push((delivery, settlement));
    }

    pub(crate) fn append(&mut self, other: Self) {
        let before = self.entries.len();
        if before == 0 {
            *self = other;
            return;
        }
        self.causes.extend(other.causes.into_iter().map(|(index, cause)| (before + index, cause)));
        self.entries.extend(other.entries);
    }
}

/// What runs.
pub(crate) enum Handlers {
    Single(Onion),
    Batches(Arc<dyn BatchHandler>),
}

/// What the slots of a subscription share.
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) wakers: Vec<Notify>,
    /// Rung when a lane is taken away, for slots with a waiting handler.
    pub(crate) interrupts: Vec<Notify>,
    /// Lanes that were taken away, by index with the last epoch that is gone.
    pub(crate) cut: Mutex<BTreeMap<u32, u32>>,
    pub(crate) concluding: mpsc::UnboundedSender<Concluding>,
    pub(crate) handlers: Handlers,
    pub(crate) scope: Arc<Scope>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) rules: Rules,
}

impl Shared {
    /// Wakes slots for what is ready.
    pub(crate) fn wake(&self) {
        loop {
            let slot = self.state.lock().wake();
            match slot {
                Some(slot) => self.wakers[slot].notify_one(),
                None => return,
            }
        }
    }

    /// Drops the handlers that are at a lane of the broker's.
    pub(crate) fn interrupt(&self, lane: Lane) {
        self.cut.lock().insert(lane.index, lane.epoch);
        self.interrupts.iter().for_each(Notify::notify_one);
    }

    /// The lane is this member's again.
    pub(crate) fn restore(&self, lane: Lane) {
        let mut cut = self.cut.lock();
        if cut.get(&lane.index).is_some_and(|epoch| *epoch >= lane.epoch) {
            cut.remove(&lane.index);
        }
    }

    pub(crate) fn is_cut(&self, lane: Lane) -> bool {
        self.cut.lock().get(&lane.index).is_some_and(|epoch| *epoch >= lane.epoch)
    }
}

/// Runs until the subscription stops.
pub(crate) async fn run(shared: Arc<Shared>, id: usize) {
    let mut slot = Slot {
        stage: shared.scope.stage.clone(),
        done: Batch::default(),
        last: 1,
        job: None,
        concluded: Vec::with_capacity(1),
        shared: &shared,
        id,
        topic: None,
    };
    shared.wakers[id].notified().await;
    let mut now = Instant::now();
    let mut flushed = now;
    loop {
        match slot.next() {
            Next::Run => {
                now = match &shared.handlers {
                    Handlers::Single(onion) => slot.work_one(onion, now).await,
                    Handlers::Batches(handler) => slot.work_batch(&**handler, now).await,
                };
                if slot.done.entries.len() >= shared.rules.batch || now.duration_since(flushed) >= FLUSH_AFTER {
                    slot.flush();
                    flushed = now;
                    // Handlers that never wait must not keep the loop from settling and receiving.
                    tokio::task::yield_now().await;
                }
            }
            Next::Wait => {
                slot.flush();
                shared.wakers[id].notified().await;
                now = Instant::now();
                flushed = now;
            }
            Next::End => {
                slot.flush();
                return;
            }
        }
    }
}

struct Slot<'a> {
    shared: &'a Arc<Shared>,
    id: usize,
    stage: watch::Receiver<Stage>,
    done: Batch,
    /// How many were handed over last time: room for as many is made next time.
    last: usize,
    /// What was asked for and has not begun.
    job: Option<Job>,
    /// What has ended since then.
    concluded: Vec<Concluded>,
    topic: Option<Arc<Topic>>,
}

impl Slot<'_> {
    fn next(&mut self) -> Next {
        let shared = self.shared;
        let (next, nudge) =
            shared.state.lock().next(self.id, &mut self.concluded, &mut self.job, || shared.clock.now());
        if nudge {
            self.hand_over(Concluding::Nudge);
        }
        next
    }

    fn hand_over(&self, concluding: Concluding) {
        // The loop outlives its slots, except when the whole worker is dropped: then deliveries go back.
        let _ = self.shared.concluding.send(concluding);
    }

    fn flush(&mut self) {
        if !self.done.entries.is_empty() {
            self.last = self.done.entries.len();
            let done = std::mem::take(&mut self.done);
            self.hand_over(Concluding::Plain(done));
        }
    }

    /// Tells when it ended, which is when the next one begins.
    async fn work_one(&mut self, onion: &Onion, started: Instant) -> Instant {
        let Job { held, lane, until } = self.job.take().expect("it was asked for");
        let context = self.context(held);
        let (mut handling, ended) = Handling::begin(|| onion.handle(&context)).await;
        let ended = match ended {
            Some(ended) => ended,
            None => {
                self.park();
                let contexts = std::slice::from_ref(&context);
                let ended = handling.wait(self.shared, self.id, &mut self.stage, contexts, until).await;
                self.shared.state.lock().resumed();
                ended
            }
        };
        handling.end();
        let now = Instant::now();
        self.handled(context.message().destination(), now.duration_since(started));
        self.conclude(context.held, lane, ended);
        now
    }

    async fn work_batch(&mut self, handler: &dyn BatchHandler, started: Instant) -> Instant {
        let first = self.job.take().expect("it was asked for");
        let more = self.shared.state.lock().more(self.shared.rules.batch.saturating_sub(1));
        let mut lanes = Vec::with_capacity(1 + more.len());
        let mut contexts = Vec::with_capacity(1 + more.len());
        let mut until = first.until;
        for job in std::iter::once(first).chain(more) {
            until = until.min(job.until);
            lanes.push(job.lane);
            contexts.push(self.context(job.held));
        }
        let (mut handling, ended) = Handling::begin(|| handler.handle_batch(&contexts)).await;
        let ended = match ended {
            Some(ended) => ended,
            None => {
                self.park();
                let ended = handling.wait(self.shared, self.id, &mut self.stage, &contexts, until).await;
                self.shared.state.lock().resumed();
                ended
            }
        };
        handling.end();
        let now = Instant::now();
        let mut outcomes = share_out(ended, contexts.len()).into_iter();
        for (context, lane) in contexts.into_iter().zip(lanes) {
            self.handled(context.message().destination(), now.duration_since(started));
            let ended = outcomes.next().expect("one for each message");
            self.conclude(context.held, lane, ended);
        }
        now
    }

    fn context(&self, held: Held) -> Context {
        if tracing::enabled!(tracing::Level::DEBUG) {
            self.shared.scope.telemetry.consumed(held.delivery());
        }
        Context { held, scope: Arc::clone(&self.shared.scope) }
    }

    /// The handler waits for something: what is concluded is settled, and others run.
    fn park(&mut self) {
        self.flush();
        self.shared.state.lock().parked();
        self.shared.wake();
    }

    fn handled(&mut self, destination: &Destination, latency: Duration) {
        if self.topic.as_ref().is_none_or(|topic| topic.destination != *destination) {
            self.topic = Some(self.shared.scope.telemetry.topic(destination));
        }
        if let Some(topic) = &self.topic {
            topic.handled(latency);
        }
    }

    fn conclude(&mut self, held: Held, lane: Option<LaneId>, ended: Ended<Outcome>) {
        let Decision { settlement, cause, health } = self.shared.rules.decide(held.delivery().attempt(), ended);
        if let Some(lane) = lane.filter(|_| self.shared.rules.holds_its_key(&settlement)) {
            self.flush();
            self.hand_over(Concluding::Holding(held, settlement, cause, lane));
            self.concluded.push(Concluded { lane: None, health });
            return;
        }
        match held.into_own() {
            Ok(delivery) => {
                if self.done.entries.is_empty() {
                    self.done.entries.reserve(self.last);
                }
                self.done.push(delivery, settlement, cause);
            }
            Err(shared) => self.hand_over(Concluding::Shared(shared, settlement, cause)),
        }
        self.concluded.push(Concluded { lane, health });
    }
}

/// How each message of a batch ended.
fn share_out(ended: Ended<Vec<Outcome>>, count: usize) -> Vec<Ended<Outcome>> {
    match ended {
        Ended::Answered(mut outcomes) => {
            let answered = outcomes.len();
            outcomes.truncate(count);
            outcomes.resize_with(count, || {
                let text = format!("the batch handler answered for {answered} of {count} messages");
                Err(HandlerError::new(crate::ErrorClass::UNCLASSIFIED, text))
            });
            outcomes.into_iter().map(Ended::Answered).collect()
        }
        Ended::Panicked(text) => (0..count).map(|_| Ended::Panicked(text.clone())).collect(),
        Ended::TimedOut(limit) => (0..count).map(|_| Ended::TimedOut(limit)).collect(),
        Ended::Cancelled => (0..count).map(|_| Ended::Cancelled).collect(),
    }
}
