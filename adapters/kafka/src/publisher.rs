//! Publishing: entries are handed to librdkafka in call order, and its delivery reports are collected on a board.
//! No task, no channel and no allocation of ours for a message; one slot of the board for a batch.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::Duration;

use anybroker_core::{
    Bytes, Confirms, Destination, Effect, Error, ErrorKind, Message, Position, PublishOrder, PublishOutcome,
    PublishTerms, Receipt, Result, Timestamp,
};
use parking_lot::{Mutex, RwLock};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Message as _, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext, PurgeConfig};
use rdkafka::{ClientConfig, ClientContext};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::codec;
use crate::config::Settings;
use crate::error::{failed, unpublished};

type Client = BaseProducer<Reports>;

/// The producer of an endpoint, shared by everything that publishes on it.
pub(crate) struct Publisher {
    current: Arc<Current>,
    board: Arc<Board>,
    stopping: Arc<AtomicBool>,
    reporter: Mutex<Option<JoinHandle<()>>>,
}

/// The client of the moment. One that has met a fatal error (a sequence of the idempotent producer was broken) takes
/// nothing any more, and is replaced.
struct Current {
    config: ClientConfig,
    board: Arc<Board>,
    faults: Arc<Faults>,
    client: RwLock<Arc<Client>>,
}

impl Current {
    fn client(&self) -> Arc<Client> {
        Arc::clone(&self.client.read())
    }

    /// Serves reports and errors, and replaces the client after a fatal one.
    fn serve(&self) {
        let client = self.client();
        client.poll(Duration::from_millis(50));
        if !self.faults.is_fatal.swap(false, Ordering::AcqRel) {
            return;
        }
        let Some((code, reason)) = client.client().fatal_error() else { return };
        let context = Reports { board: Arc::clone(&self.board), faults: Arc::clone(&self.faults) };
        match Client::from_config_and_context(&self.config, context) {
            Ok(fresh) => {
                tracing::warn!(%code, reason, "the producer was replaced after a fatal error");
                *self.client.write() = Arc::new(fresh);
            }
            Err(error) => {
                tracing::error!(%error, "the producer could not be replaced after a fatal error");
                self.faults.is_fatal.store(true, Ordering::Release);
            }
        }
        // What it still held certainly or possibly is not stored; each gets its outcome.
        client.purge(PurgeConfig::default().queue().inflight());
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while client.in_flight_count() > 0 && std::time::Instant::now() < deadline {
            client.poll(Duration::from_millis(20));
        }
    }
}

impl Publisher {
    pub(crate) fn new(settings: &Settings) -> Result<Self> {
        let (board, faults) = (Arc::new(Board::default()), Arc::new(Faults::default()));
        let context = Reports { board: Arc::clone(&board), faults: Arc::clone(&faults) };
        let config = settings.producer();
        let client = Client::from_config_and_context(&config, context).map_err(|error| failed("connect", &error))?;
        let client = RwLock::new(Arc::new(client));
        let current = Arc::new(Current { config, board: Arc::clone(&board), faults, client });
        let stopping = Arc::new(AtomicBool::new(false));
        let reporter = {
            let (current, stopping) = (Arc::clone(&current), Arc::clone(&stopping));
            let work = move || {
                while !stopping.load(Ordering::Acquire) {
                    current.serve();
                }
            };
            std::thread::Builder::new().name("anybroker-kafka-reports".into()).spawn(work)
        };
        let reporter = reporter.map_err(|error| {
            Error::new(ErrorKind::Unavailable, "connect", "no thread could be started").with_source(error)
        })?;
        Ok(Self { current, board, stopping, reporter: Mutex::new(Some(reporter)) })
    }

    /// The client, for metadata.
    pub(crate) fn client(&self) -> Arc<Client> {
        self.current.client()
    }

    /// Why the cluster does not let this client in, if that is what happened.
    pub(crate) fn refusal(&self) -> Option<Error> {
        self.current.faults.refusal.lock().as_ref().map(|(_, refusal)| refusal.duplicate())
    }

    /// The same, where trying again is in vain. A TLS handshake also fails when a server is just coming or going.
    pub(crate) fn final_refusal(&self) -> Option<Error> {
        let refusal = self.current.faults.refusal.lock();
        refusal.as_ref().filter(|(code, _)| *code != RDKafkaErrorCode::SSL).map(|(_, refusal)| refusal.duplicate())
    }

    /// Hands a batch over, in order; waits only while librdkafka's buffers are full. `routes` answers the topic of
    /// each destination, or why there is none.
    pub(crate) async fn publish(
        &self,
        batch: &[Message],
        terms: &PublishTerms,
        routes: &Routes,
        deadline: Instant,
    ) -> Confirms {
        let mut answers = self.board.open(batch.len());
        let mut failed_keys: HashSet<(Destination, Bytes)> = HashSet::new();
        let mut scratch = Vec::with_capacity(64);
        let now = Timestamp::now();
        let mut route = 0;
        for (index, message) in batch.iter().enumerate() {
            let place = || message.key_bytes().map(|key| (message.destination().clone(), key.clone()));
            let outcome = if !failed_keys.is_empty() && place().is_some_and(|place| failed_keys.contains(&place)) {
                Err(held_back())
            } else {
                match routes.topic(message.destination(), &mut route) {
                    Err(error) => Err(error.duplicate()),
                    Ok(topic) => {
                        let (headers, timestamp) = codec::encode(message, now, &mut scratch);
                        let (key, payload) = (message.key(), message.payload());
                        let record = Outgoing { topic, partition: None, key, payload, headers, timestamp };
                        self.enqueue(record, &mut answers, index, deadline).await
                    }
                }
            };
            if let Err(error) = outcome {
                if terms.order == PublishOrder::Key {
                    failed_keys.extend(place());
                }
                answers.refuse(index, error.with("id", message.id()).with("destination", message.destination()));
            }
        }
        answers.confirms(deadline)
    }

    async fn enqueue(
        &self,
        mut record: Outgoing<'_>,
        answers: &mut Answers,
        index: usize,
        deadline: Instant,
    ) -> Result<()> {
        loop {
            let room = self.board.room.notified();
            match self.send(record, answers, index) {
                Ok(()) => return Ok(()),
                Err((error, back)) => {
                    if !is_for_later(&error) {
                        return Err(unpublished(&error).with_effect(Effect::NotDone));
                    }
                    record = back;
                }
            }
            // The wake-up may go to another waiter, so nobody waits for it alone.
            let _ = tokio::time::timeout(Duration::from_millis(20), room).await;
            if Instant::now() >= deadline {
                let text = "the client's buffers stayed full: the broker does not take messages";
                return Err(Error::new(ErrorKind::RateLimited, "publish", text));
            }
        }
    }

    /// Hands records of a group's own topics over in this call, as far as the client has room; the rest follows in the
    /// future, which answers once for each record.
    pub(crate) fn store(
        self: &Arc<Self>,
        records: Vec<OwnRecord>,
        deadline: Instant,
    ) -> impl Future<Output = Vec<PublishOutcome>> + Send + 'static {
        let mut answers = self.board.open(records.len());
        let mut waiting = Vec::new();
        for (index, record) in records.into_iter().enumerate() {
            match self.send(record.outgoing(), &mut answers, index) {
                Ok(()) => {}
                Err((error, _)) if is_for_later(&error) => waiting.push((index, record)),
                Err((error, _)) => answers.refuse(index, unpublished(&error).with_effect(Effect::NotDone)),
            }
        }
        let publisher = Arc::clone(self);
        async move {
            for (index, record) in waiting {
                if let Err(error) = publisher.enqueue(record.outgoing(), &mut answers, index, deadline).await {
                    answers.refuse(index, error);
                }
            }
            answers.wait(deadline).await
        }
    }

    #[allow(clippy::result_large_err, reason = "what could not be sent is tried again; boxing it would cost each time")]
    fn send<'a>(
        &self,
        outgoing: Outgoing<'a>,
        answers: &mut Answers,
        index: usize,
    ) -> Result<(), (KafkaError, Outgoing<'a>)> {
        let Outgoing { topic, partition, key, payload, headers, timestamp } = outgoing;
        let mut record: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(topic, answers.opaque(index)).headers(headers);
        record.payload = payload.map(|payload| &payload[..]);
        (record.partition, record.key, record.timestamp) = (partition, key, timestamp);
        match self.current.client.read().send(record) {
            Ok(()) => {
                answers.unsent -= 1;
                Ok(())
            }
            Err((error, record)) => {
                if error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal) {
                    self.current.faults.is_fatal.store(true, Ordering::Release);
                }
                let headers = record.headers.unwrap_or_default();
                Err((error, Outgoing { topic, partition, key, payload, headers, timestamp }))
            }
        }
    }

    /// Waits until everything has its outcome.
    pub(crate) async fn flush(&self, grace: Duration) -> Result<()> {
        let deadline = Instant::now() + grace;
        while self.board.on_their_way() > 0 {
            let settled = self.board.room.notified();
            if self.board.on_their_way() == 0 {
                break;
            }
            let step = (Instant::now() + Duration::from_millis(20)).min(deadline);
            let _ = tokio::time::timeout_at(step, settled).await;
            if Instant::now() >= deadline {
                let text = format!("{} messages have no outcome yet", self.board.on_their_way());
                return Err(Error::new(ErrorKind::Timeout, "close", text));
            }
        }
        Ok(())
    }

    /// Ends the thread that collects reports.
    pub(crate) fn stop(&self) -> Option<JoinHandle<()>> {
        self.stopping.store(true, Ordering::Release);
        self.reporter.lock().take()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The topics of a batch's destinations, or why there is none.
pub(crate) struct Routes(pub(crate) Vec<(Destination, Result<Arc<str>>)>);

impl Routes {
    /// `last` is where the message before this one went; neighbours mostly go the same way.
    fn topic(&self, destination: &Destination, last: &mut usize) -> &Result<Arc<str>> {
        if self.0[*last].0 != *destination {
            let found = self.0.iter().position(|(other, _)| other == destination);
            *last = found.expect("every destination of the batch has been routed");
        }
        &self.0[*last].1
    }
}

struct Outgoing<'a> {
    topic: &'a str,
    partition: Option<i32>,
    key: Option<&'a [u8]>,
    payload: Option<&'a Bytes>,
    headers: OwnedHeaders,
    timestamp: Option<i64>,
}

/// A record of a group's own topics.
pub(crate) struct OwnRecord {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: i32,
    /// This library's; the message's key is among the headers.
    pub(crate) key: String,
    /// `None` removes the record of that key.
    pub(crate) payload: Option<Bytes>,
    pub(crate) headers: OwnedHeaders,
}

impl OwnRecord {
    fn outgoing(&self) -> Outgoing<'_> {
        Outgoing {
            topic: &self.topic,
            partition: Some(self.partition),
            key: Some(self.key.as_bytes()),
            payload: self.payload.as_ref(),
            headers: self.headers.clone(),
            timestamp: None,
        }
    }
}

/// Whether the client takes the record a moment later: its buffers are full, or it is about to be replaced.
fn is_for_later(error: &KafkaError) -> bool {
    matches!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::QueueFull | RDKafkaErrorCode::Fatal))
}

fn held_back() -> Error {
    let text = "order: not attempted, because an earlier message of this key in the batch failed";
    Error::new(ErrorKind::Unavailable, "publish", text).with_effect(Effect::NotDone)
}

/// Where delivery reports are noted, batch by batch. An opaque number names batch and entry, so that nothing is
/// allocated for a message.
#[derive(Default)]
struct Board {
    slots: Mutex<Slots>,
    on_their_way: AtomicUsize,
    /// Something got its outcome: there is room in the buffers again.
    room: Notify,
}

#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Slot {
    outcomes: Vec<Option<PublishOutcome>>,
    /// Entries without an outcome.
    missing: usize,
    waker: Option<Waker>,
    /// Nobody waits for the answers.
    is_detached: bool,
}

impl Board {
    fn open(self: &Arc<Self>, count: usize) -> Answers {
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
        entry.outcomes.resize_with(count, || None);
        (entry.missing, entry.waker, entry.is_detached) = (count, None, false);
        self.on_their_way.fetch_add(count, Ordering::AcqRel);
        Answers { board: Arc::clone(self), slot, unsent: count, is_open: true }
    }

    fn on_their_way(&self) -> usize {
        self.on_their_way.load(Ordering::Acquire)
    }

    fn report(&self, opaque: usize, outcome: PublishOutcome) {
        let (slot, index) = ((opaque >> 32) as u32, opaque & 0xffff_ffff);
        let mut slots = self.slots.lock();
        let entry = &mut slots.slots[slot as usize];
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
    unsent: usize,
    is_open: bool,
}

impl Answers {
    fn opaque(&self, index: usize) -> usize {
        (self.slot as usize) << 32 | index
    }

    fn refuse(&mut self, index: usize, error: Error) {
        self.unsent -= 1;
        self.board.on_their_way.fetch_sub(1, Ordering::AcqRel);
        let entry = &mut self.board.slots.lock().slots[self.slot as usize];
        entry.missing -= 1;
        entry.outcomes[index] = Some(Err(error));
    }

    fn confirms(self, deadline: Instant) -> Confirms {
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
        let late = || Err(Error::new(ErrorKind::Timeout, "publish", "no confirm from the broker in time"));
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

/// What went wrong with a client beside single messages.
#[derive(Default)]
struct Faults {
    is_fatal: AtomicBool,
    refusal: Mutex<Option<(RDKafkaErrorCode, Error)>>,
}

/// Receives librdkafka's delivery reports.
pub(crate) struct Reports {
    board: Arc<Board>,
    faults: Arc<Faults>,
}

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka producer");
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::Fatal) => self.faults.is_fatal.store(true, Ordering::Release),
            Some(code) => {
                if let Some(refusal) = crate::error::refused(code, reason) {
                    *self.faults.refusal.lock() = Some((code, refusal));
                }
            }
            None => {}
        }
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        let outcome = match result {
            Ok(record) => {
                let position = u64::try_from(record.offset()).ok().map(Position::new);
                Ok(Receipt { position, duplicate: false })
            }
            Err((error, _)) => {
                if error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal) {
                    self.faults.is_fatal.store(true, Ordering::Release);
                }
                Err(unpublished(error))
            }
        };
        self.board.report(opaque, outcome);
    }
}

/// What the cluster says of a topic.
pub(crate) enum Found {
    Missing,
    /// Its partitions; not all of them may have a leader yet.
    Partitions {
        count: i32,
        is_ready: bool,
    },
}

impl Publisher {
    /// Looks a topic up. Blocks.
    pub(crate) fn look_up(&self, topic: &str, timeout: Duration) -> Result<Found> {
        let metadata =
            self.client().client().fetch_metadata(Some(topic), timeout).map_err(|error| unavailable(&error))?;
        let Some(found) = metadata.topics().iter().find(|found| found.name() == topic) else {
            return Ok(Found::Missing);
        };
        if let Some(error) = found.error().map(RDKafkaErrorCode::from) {
            return match crate::error::kind(error) {
                ErrorKind::NotFound => Ok(Found::Missing),
                // Created a moment ago.
                ErrorKind::Unavailable => Ok(Found::Partitions { count: 0, is_ready: false }),
                kind => Err(Error::new(kind, "look up", error.to_string()).with("topic", topic)),
            };
        }
        let partitions = found.partitions();
        let is_ready = !partitions.is_empty() && partitions.iter().all(|partition| partition.leader() >= 0);
        Ok(Found::Partitions { count: i32::try_from(partitions.len()).unwrap_or(i32::MAX), is_ready })
    }
}

/// No answer to a metadata request is a broker that cannot be reached.
pub(crate) fn unavailable(error: &KafkaError) -> Error {
    let error = failed("connect", error);
    match error.kind() {
        ErrorKind::Timeout => Error::new(ErrorKind::Unavailable, "connect", error.message()),
        _ => error,
    }
}
