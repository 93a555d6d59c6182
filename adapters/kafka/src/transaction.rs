//! One transaction: what is published and settled in it, and its end.
//!
//! An end is worked on elsewhere, so that a dropped future loses only the answer. A client that has not ended its transaction
//! well is given up; whoever takes its id next has the rest taken back. That goes around librdkafka's states after a failed
//! commit: a local timeout becomes an error that asks for an abort, which the broker then refuses (librdkafka #3297, #4016).

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anybroker_core::{Effect, Error, ErrorKind, Result, Transaction};
use async_trait::async_trait;
use parking_lot::{Condvar, Mutex};
use rdkafka::config::FromClientConfig;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaError;
use rdkafka::producer::Producer;
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;

use crate::groups;
use crate::joined::Offsets;
use crate::line::{Client, Line};
use crate::state::{Place, Shared};
use crate::transactions::{Slot, Transactions, fenced, is_fencing, is_retriable, refused};

/// How long one step of finding out what became of a commit may take.
const STEP: Duration = Duration::from_secs(10);
/// How long is waited before the next one.
const PAUSE: Duration = Duration::from_millis(200);

/// What the application holds.
pub(crate) struct KafkaTransaction(Arc<Open>);

/// The transaction itself. Work on it keeps it, also when the application has dropped its handle.
pub(crate) struct Open {
    pub(crate) id: u32,
    transactions: Arc<Transactions>,
    runtime: Handle,
    begun: Instant,
    state: Mutex<State>,
    /// Nobody is settling in it any more.
    idle: Condvar,
}

/// What was settled in it, by subscription.
type Settled = Vec<(Arc<Shared>, Vec<Place>)>;

struct State {
    /// Taken by its end.
    slot: Option<Slot>,
    settled: Settled,
    /// Who is publishing or settling in it at the moment.
    busy: usize,
    /// What was settled in it has been taken.
    is_over: bool,
    /// Why it cannot be committed: nobody knows whether something is part of it.
    doubt: Option<Error>,
    /// Counts among the open ones.
    permit: Option<OwnedSemaphorePermit>,
}

/// What one subscription has in the transaction, while it is committed.
struct Frozen {
    shared: Arc<Shared>,
    offsets: Vec<Offsets>,
}

/// How a commit went.
enum Committed {
    Yes,
    /// And whether the client may be asked to abort.
    No(Error, bool),
    Unknown(Error),
}

impl KafkaTransaction {
    pub(crate) fn new(transactions: &Arc<Transactions>, slot: Slot, id: u32, permit: OwnedSemaphorePermit) -> Self {
        let state =
            State { slot: Some(slot), settled: Vec::new(), busy: 0, is_over: false, doubt: None, permit: Some(permit) };
        Self(Arc::new(Open {
            id,
            transactions: Arc::clone(transactions),
            runtime: Handle::current(),
            begun: Instant::now(),
            state: Mutex::new(state),
            idle: Condvar::new(),
        }))
    }

    pub(crate) fn open(&self) -> &Arc<Open> {
        &self.0
    }

    /// The transaction of that connection behind a handle.
    pub(crate) fn of(handle: &Arc<dyn Transaction>, transactions: &Arc<Transactions>) -> Result<Arc<Open>> {
        let any: &dyn Any = &**handle;
        let own = any.downcast_ref::<Self>().filter(|own| Arc::ptr_eq(&own.0.transactions, transactions));
        own.map(|own| Arc::clone(&own.0))
            .ok_or_else(|| Error::unsupported("transaction", "it was begun on another connection"))
    }

    async fn end(&self, operation: &'static str, end: fn(&Open, Slot) -> Result<()>) -> Result<()> {
        if self.0.transactions.is_closing.load(Ordering::Acquire) {
            return Err(Error::closed(operation));
        }
        let slot = self.0.take().ok_or_else(|| over(operation))?;
        let open = Arc::clone(&self.0);
        let ending = self.0.runtime.spawn_blocking(move || end(&open, slot));
        ending.await.unwrap_or_else(|error| {
            Err(Error::new(ErrorKind::Unexpected, operation, error.to_string()).with_effect(Effect::Unknown))
        })
    }
}

#[async_trait]
impl Transaction for KafkaTransaction {
    async fn commit(&self) -> Result<()> {
        self.end("commit", Open::commit).await
    }

    async fn abort(&self) -> Result<()> {
        self.end("abort", Open::abort).await
    }
}

impl Drop for KafkaTransaction {
    fn drop(&mut self) {
        if let Some(slot) = self.0.take() {
            let open = Arc::clone(&self.0);
            // Whoever waits for it is gone. When the runtime is gone too the broker does it, by its timeout.
            drop(self.0.runtime.spawn_blocking(move || open.abort(slot)));
        }
    }
}

/// Somebody publishes or settles in a transaction, which waits for him before it ends.
pub(crate) struct Busy(Arc<Open>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.state.lock().busy -= 1;
        self.0.idle.notify_all();
    }
}

impl Open {
    /// The client, for somebody who publishes or settles in the transaction. It does not end while he does: the client's next
    /// transaction would get what is meant for this one.
    pub(crate) fn busy(self: &Arc<Self>, operation: &'static str) -> Result<(Busy, Arc<Line>)> {
        let mut state = self.state.lock();
        let line = state.slot.as_ref().map(|slot| Arc::clone(&slot.line)).ok_or_else(|| over(operation))?;
        state.busy += 1;
        drop(state);
        Ok((Busy(Arc::clone(self)), line))
    }

    /// These are settled when it commits. They come back when it has not waited for them.
    pub(crate) fn settles(&self, shared: &Arc<Shared>, places: Vec<Place>) {
        if places.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        if state.is_over {
            drop(state);
            shared.finish(self.id, places.into_iter().map(|place| (place, false)));
            return;
        }
        match state.settled.iter_mut().find(|(other, _)| Arc::ptr_eq(other, shared)) {
            Some((_, settled)) => settled.extend(places),
            None => state.settled.push((Arc::clone(shared), places)),
        }
    }

    /// Nobody knows whether something is part of it: then it is not committed.
    pub(crate) fn doubts(&self, error: &Error) {
        self.state.lock().doubt.get_or_insert(error.duplicate());
    }

    fn take(&self) -> Option<Slot> {
        self.state.lock().slot.take()
    }

    /// Aborts it, unless it has ended.
    pub(crate) async fn abandon(self: &Arc<Self>) {
        if let Some(slot) = self.take() {
            let open = Arc::clone(self);
            if let Ok(Err(error)) = self.runtime.spawn_blocking(move || open.abort(slot)).await {
                tracing::warn!(%error, "a transaction was not taken back; the broker does it by its timeout");
            }
        }
    }

    /// What was settled in it, when nobody works in it any more, or the time is over: then it is not to be committed.
    fn settled(&self, deadline: Instant) -> (Settled, Result<()>) {
        let mut state = self.state.lock();
        let mut idle = Ok(());
        while state.busy > 0 && idle.is_ok() {
            if self.idle.wait_until(&mut state, deadline).timed_out() {
                let text = "something is still being published or settled in the transaction";
                idle = Err(Error::new(ErrorKind::Timeout, "commit", text).with_effect(Effect::NotDone));
            }
        }
        state.is_over = true;
        let mut settled = std::mem::take(&mut state.settled);
        // Every transaction asks in this order, so that none waits for one that waits for it.
        settled.sort_by_key(|(shared, _)| Arc::as_ptr(shared) as usize);
        (settled, idle)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.transactions.settings.transaction_timeout
    }

    fn commit(&self, slot: Slot) -> Result<()> {
        let deadline = self.deadline();
        let client = Arc::clone(&slot.line.client());
        let mut frozen = Vec::new();
        let (settled, idle) = self.settled(deadline);
        let committed = match idle {
            Err(error) => Committed::No(error, true),
            Ok(()) => self.try_commit(&client, &settled, &mut frozen, deadline),
        };
        drop(client);
        match committed {
            Committed::Yes => {
                self.finish(&settled, true);
                self.transactions.reuse(slot);
                Ok(())
            }
            Committed::No(error, may_abort) => {
                if may_abort {
                    let _ = self.take_back(slot, deadline.max(Instant::now() + PAUSE));
                } else {
                    self.transactions.discard(slot);
                }
                self.finish(&settled, false);
                Err(error)
            }
            Committed::Unknown(error) => {
                self.resolve(slot, frozen);
                Err(error)
            }
        }
    }

    fn try_commit(
        &self,
        client: &Client,
        settled: &[(Arc<Shared>, Vec<Place>)],
        frozen: &mut Vec<Frozen>,
        deadline: Instant,
    ) -> Committed {
        if self.is_too_old() {
            return Committed::No(too_old(), false);
        }
        if let Some(doubt) = self.state.lock().doubt.take() {
            return Committed::No(doubt.with_effect(Effect::NotDone), true);
        }
        for (shared, places) in settled {
            match shared.freeze(self.id, places, deadline) {
                Ok(offsets) => frozen.push(Frozen { shared: Arc::clone(shared), offsets }),
                Err(error) => return Committed::No(error.with_effect(Effect::NotDone), true),
            }
        }
        if client.flush(left(deadline)).is_err() {
            let text = "not everything that was published in the transaction was stored in time";
            return Committed::No(Error::new(ErrorKind::Timeout, "commit", text).with_effect(Effect::NotDone), true);
        }
        for offsets in frozen.iter().flat_map(|frozen| &frozen.offsets) {
            let sent =
                again(deadline, || client.send_offsets_to_transaction(&offsets.list, &offsets.member, left(deadline)));
            if let Err(error) = sent {
                return Committed::No(self.failure(&error), !is_fatal(&error));
            }
        }
        if let Some((code, reason)) = client.client().fatal_error() {
            // The commit would not be sent.
            let error = self.failure(&KafkaError::Global(code));
            return Committed::No(error.with("reason", reason), false);
        }
        match again(deadline, || client.commit_transaction(left(deadline))) {
            Ok(()) => Committed::Yes,
            // An abort that is confirmed proves that the commit did not happen; without one it may have.
            Err(error) if requires_abort(&error) => {
                match again(deadline, || client.abort_transaction(left(deadline))) {
                    Ok(()) => Committed::No(self.failure(&error), false),
                    Err(_) => Committed::Unknown(unknown(&self.failure(&error))),
                }
            }
            Err(error) => Committed::Unknown(unknown(&self.failure(&error))),
        }
    }

    fn abort(&self, slot: Slot) -> Result<()> {
        let deadline = self.deadline();
        let (settled, _) = self.settled(deadline);
        let aborted = self.take_back(slot, deadline.max(Instant::now() + PAUSE));
        self.finish(&settled, false);
        aborted
    }

    /// Has the broker take everything back. Nothing of it becomes visible in any case: no commit was asked for.
    fn take_back(&self, slot: Slot, deadline: Instant) -> Result<()> {
        let client = Arc::clone(&slot.line.client());
        let aborted = match self.is_too_old() {
            true => Err(too_old()),
            false => again(deadline, || client.abort_transaction(left(deadline))).map_err(|error| self.failure(&error)),
        };
        drop(client);
        // Who works in it still has the client, whose next transaction is not his.
        match aborted.is_ok() && self.state.lock().busy == 0 {
            true => self.transactions.reuse(slot),
            false => self.transactions.discard(slot),
        }
        aborted
    }

    /// The broker has taken it back by itself, or is about to.
    fn is_too_old(&self) -> bool {
        self.begun.elapsed() >= self.transactions.settings.transaction_timeout
    }

    fn finish(&self, settled: &[(Arc<Shared>, Vec<Place>)], is_committed: bool) {
        for (shared, places) in settled {
            shared.finish(self.id, places.iter().map(|place| (*place, is_committed)));
        }
        self.state.lock().permit = None;
    }

    /// What an error of librdkafka says of this transaction. Kafka answers a transaction that it has timed out as a fenced one.
    fn failure(&self, error: &KafkaError) -> Error {
        match is_fencing(error) {
            true if self.is_too_old() => too_old(),
            true => {
                self.transactions.learn("commit", error);
                fenced("commit")
            }
            false => refused("commit", error),
        }
    }

    /// Finds out what became of a commit, on a thread of its own: the next client under this id waits until it is decided, and
    /// then the group's offsets tell. Until then what was settled neither comes back nor is done.
    fn resolve(&self, slot: Slot, frozen: Vec<Frozen>) {
        let Slot { number, line } = slot;
        drop(line);
        let (id, transactions) = (self.id, Arc::clone(&self.transactions));
        let permit = self.state.lock().permit.take();
        let work = move || {
            let is_over = || transactions.is_closing.load(Ordering::Acquire);
            let mut fresh = None;
            while !is_over() {
                match transactions.initialised(number, Instant::now() + STEP) {
                    Ok(line) => {
                        fresh = Some(line);
                        break;
                    }
                    // It was decided for the one who took the id.
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => break,
                    Err(error) => tracing::warn!(%error, "what became of a commit is not known yet"),
                }
                std::thread::sleep(PAUSE);
            }
            for Frozen { shared, offsets } in frozen {
                for offsets in offsets {
                    while !is_over() && !shared.is_closing.load(Ordering::Acquire) {
                        match transactions.read(&offsets) {
                            Ok(settled) => {
                                shared.finish(id, settled.into_iter());
                                break;
                            }
                            Err(error) => tracing::warn!(%error, "what became of a commit is not known yet"),
                        }
                        std::thread::sleep(PAUSE);
                    }
                }
            }
            match fresh {
                Some(line) => transactions.reuse(Slot { number, line: Arc::new(line) }),
                None => transactions.free(number),
            }
            drop(permit);
        };
        let thread = std::thread::Builder::new().name("anybroker-kafka-resolve".into()).spawn(work);
        if let Err(error) = thread {
            tracing::error!(%error, "what became of a commit is found out by the next owner of its partitions");
        }
    }
}

impl Transactions {
    /// Which of the records are settled, as the group's offsets tell; those of open transactions are waited for.
    fn read(&self, offsets: &Offsets) -> Result<Vec<(Place, bool)>> {
        let consumer: BaseConsumer = BaseConsumer::from_config(&self.settings.reader(&offsets.group))
            .map_err(|error| crate::error::failed("commit", &error))?;
        let progress = groups::progress_of(&consumer, &offsets.list, "commit")?;
        let is_settled = |place: &Place, index: usize| {
            progress.get(index).and_then(Option::as_ref).is_some_and(|progress| progress.holds(place.offset))
        };
        Ok(offsets.places.iter().map(|(place, index)| (*place, is_settled(place, *index))).collect())
    }
}

/// Makes a call again while librdkafka says that it may be.
fn again(deadline: Instant, mut call: impl FnMut() -> Result<(), KafkaError>) -> Result<(), KafkaError> {
    loop {
        match call() {
            Err(error) if is_retriable(&error) && Instant::now() < deadline => {}
            done => return done,
        }
    }
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn is_fatal(error: &KafkaError) -> bool {
    matches!(error, KafkaError::Transaction(error) if error.is_fatal())
}

fn requires_abort(error: &KafkaError) -> bool {
    matches!(error, KafkaError::Transaction(error) if error.txn_requires_abort())
}

fn over(operation: &'static str) -> Error {
    Error::new(ErrorKind::Closed, operation, "the transaction has ended").with_effect(Effect::NotDone)
}

fn too_old() -> Error {
    let text = "the transaction was open for longer than transaction_timeout, and has been taken back";
    Error::new(ErrorKind::Timeout, "commit", text).with_effect(Effect::NotDone)
}

fn unknown(error: &Error) -> Error {
    let text = format!("no answer to the commit: {}", error.message());
    Error::new(error.kind(), "commit", text).with_effect(Effect::Unknown)
}
