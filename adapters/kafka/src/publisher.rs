//! Publishing: entries are handed to librdkafka in call order, and its delivery reports are collected on a board.
//! No task, no channel and no allocation of ours for a message; one slot of the board for a batch.

use std::collections::HashSet;
use std::future::Future;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anybroker_core::{
    Bytes, Confirms, Destination, Effect, Error, ErrorKind, Message, PublishOrder, PublishOutcome, PublishTerms,
    Result, Timestamp,
};
use parking_lot::Mutex;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::{BaseRecord, Producer};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::board::{Answers, Board, Setbacks};
use crate::codec;
use crate::config::Settings;
use crate::error::{failed, unpublished};
use crate::line::{Client, Kind, Line, Recipe, is_of_topic};

/// librdkafka makes batches of up to so many bytes, unless it is told less (`batch.size`).
const BATCH: usize = 1_000_000;
/// In a transaction one client publishes to all topics: its batches are small enough for almost every one.
pub(crate) const TRANSACTION_BATCH: usize = 16_384;

/// The producers of an endpoint, shared by everything that publishes on it.
pub(crate) struct Publisher {
    settings: Settings,
    runtime: Handle,
    board: Arc<Board>,
    main: Arc<Line>,
    /// For topics that do not take batches of the usual size: what librdkafka may put into one, and who does.
    small: Mutex<Vec<(usize, Arc<Line>)>>,
}

impl Publisher {
    pub(crate) fn new(settings: &Settings) -> Result<Self> {
        let board = Board::new(settings.login().cloned());
        let runtime = Handle::current();
        let recipe = Recipe { settings: settings.clone(), kind: Kind::Plain(None), runtime: runtime.clone() };
        let main = Arc::new(Line::new(recipe, &board)?);
        Ok(Self { settings: settings.clone(), runtime, board, main, small: Mutex::default() })
    }

    /// The client, for metadata.
    pub(crate) fn client(&self) -> Arc<Client> {
        Arc::clone(&self.main.client())
    }

    /// Why the cluster does not let this client in, if that is what happened.
    pub(crate) fn refusal(&self) -> Option<Error> {
        self.main.refusal()
    }

    /// The same, where trying again is in vain.
    pub(crate) fn final_refusal(&self) -> Option<Error> {
        self.main.final_refusal()
    }

    /// Topics that are not as they were known, since this was asked.
    pub(crate) fn suspects(&self) -> HashSet<String> {
        self.board.suspects()
    }

    /// Who publishes to a topic that takes batches of up to `largest` bytes. librdkafka has one size for all topics of a
    /// client and does not divide a batch that was refused: its messages would fail together, each of them small
    /// enough. Powers of four, so that there are few clients.
    pub(crate) fn line(&self, largest: usize) -> Result<Arc<Line>> {
        if largest >= BATCH {
            return Ok(Arc::clone(&self.main));
        }
        let mut size = 1 << 18;
        while size > largest && size > 1 {
            size >>= 2;
        }
        let mut small = self.small.lock();
        if let Some((_, line)) = small.iter().find(|(known, _)| *known == size) {
            return Ok(Arc::clone(line));
        }
        let line = Arc::new(Line::new(self.recipe(Kind::Plain(Some(size))), &self.board)?);
        small.push((size, Arc::clone(&line)));
        Ok(line)
    }

    /// A client for transactions.
    pub(crate) fn transactional(&self, id: &str) -> Result<Line> {
        Line::new(self.recipe(Kind::Transactional(id.to_owned())), &self.board)
    }

    fn recipe(&self, kind: Kind) -> Recipe {
        Recipe { settings: self.settings.clone(), kind, runtime: self.runtime.clone() }
    }

    /// Hands a batch over, in order; waits only while librdkafka's buffers are full. `routes` answers where each
    /// destination's messages go, or why they cannot. In a transaction its client takes them all.
    pub(crate) async fn publish(
        &self,
        batch: &[Message],
        terms: &PublishTerms,
        routes: &Routes,
        deadline: Instant,
        transaction: Option<&Line>,
    ) -> Confirms {
        let mut answers = self.board.open(batch.len());
        answers.of_topics(routes.0.iter().filter_map(|(_, route)| Some(Arc::clone(&route.as_ref().ok()?.topic))));
        let mut keys = (terms.order == PublishOrder::Key).then(|| FailedKeys::new(&self.board, batch));
        let mut scratch = Vec::with_capacity(64);
        let now = Timestamp::now();
        let mut last = 0;
        for (index, message) in batch.iter().enumerate() {
            let outcome = match routes.route(message.destination(), &mut last) {
                Err(error) => Err(error.duplicate()),
                Ok(route) => loop {
                    if keys.as_mut().is_some_and(|keys| keys.hold_back(&self.board, &answers, index)) {
                        break Err(held_back());
                    }
                    let (headers, timestamp) = codec::encode(message, now, &mut scratch);
                    if let Err(error) = route.check(message, &headers) {
                        break Err(error);
                    }
                    if transaction.is_some() && route.largest < TRANSACTION_BATCH {
                        let text = "the topic takes smaller batches than a transaction's (max.message.bytes)";
                        break Err(Error::unsupported("publish", text).with("smallest", TRANSACTION_BATCH));
                    }
                    let line = transaction.unwrap_or(&route.line);
                    let (key, payload) = (message.key(), message.payload());
                    let record = Outgoing { topic: &route.topic, partition: None, key, payload, headers, timestamp };
                    let seen = keys.as_ref().map(|keys| keys.seen);
                    match self.enqueue(line, record, &mut answers, index, seen, deadline).await {
                        Ok(()) => break Ok(()),
                        Err(Unsent::Setback) => {}
                        Err(Unsent::Refused(error)) => break Err(error),
                    }
                },
            };
            if let Err(error) = outcome {
                if let Some(keys) = &mut keys {
                    keys.add(index);
                }
                answers.refuse(index, error.with("id", message.id()).with("destination", message.destination()));
            }
        }
        answers.confirms(deadline)
    }

    async fn enqueue(
        &self,
        line: &Line,
        mut record: Outgoing<'_>,
        answers: &mut Answers,
        index: usize,
        seen: Option<Setbacks>,
        deadline: Instant,
    ) -> Result<(), Unsent> {
        loop {
            let room = self.board.room.notified();
            match self.send(line, record, answers, index, seen) {
                Ok(()) => return Ok(()),
                Err((Refusal::Setback, _)) => return Err(Unsent::Setback),
                Err((Refusal::Client(error), back)) => {
                    if !is_for_later(line, &error) {
                        return Err(Unsent::Refused(unpublished(&error).with_effect(Effect::NotDone)));
                    }
                    record = back;
                }
            }
            // The wake-up may go to another waiter, so nobody waits for it alone.
            let _ = tokio::time::timeout(Duration::from_millis(20), room).await;
            if Instant::now() >= deadline {
                let text = "the client's buffers stayed full: the broker does not take messages";
                return Err(Unsent::Refused(Error::new(ErrorKind::RateLimited, "publish", text)));
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
        self.store_by(&self.main, records, deadline)
    }

    /// The same by another client: a transaction's.
    pub(crate) fn store_by(
        self: &Arc<Self>,
        line: &Arc<Line>,
        records: Vec<OwnRecord>,
        deadline: Instant,
    ) -> impl Future<Output = Vec<PublishOutcome>> + Send + 'static {
        let mut answers = self.board.open(records.len());
        let mut waiting = Vec::new();
        for (index, record) in records.into_iter().enumerate() {
            match self.send(line, record.outgoing(), &mut answers, index, None) {
                Ok(()) => {}
                Err((Refusal::Client(error), _)) if !is_for_later(line, &error) => {
                    answers.refuse(index, unpublished(&error).with_effect(Effect::NotDone));
                }
                Err(_) => waiting.push((index, record)),
            }
        }
        let (publisher, line) = (Arc::clone(self), Arc::clone(line));
        async move {
            for (index, record) in waiting {
                let record = record.outgoing();
                let sent = publisher.enqueue(&line, record, &mut answers, index, None, deadline).await;
                if let Err(Unsent::Refused(error)) = sent {
                    answers.refuse(index, error);
                }
            }
            answers.wait(deadline).await
        }
    }

    /// `seen` is what the caller knows to have gone wrong; when there is more, nothing is sent.
    #[allow(clippy::result_large_err, reason = "what could not be sent is tried again; boxing it would cost each time")]
    fn send<'a>(
        &self,
        line: &Line,
        outgoing: Outgoing<'a>,
        answers: &mut Answers,
        index: usize,
        seen: Option<Setbacks>,
    ) -> Result<(), (Refusal, Outgoing<'a>)> {
        // While it is held the client is not replaced: what is seen now holds for this record.
        let client = line.client();
        if seen.is_some_and(|seen| seen != self.board.setbacks()) {
            return Err((Refusal::Setback, outgoing));
        }
        let Outgoing { topic, partition, key, payload, headers, timestamp } = outgoing;
        let mut record: BaseRecord<'_, [u8], [u8], usize> =
            BaseRecord::with_opaque_to(topic, answers.opaque(index)).headers(headers);
        record.payload = payload.map(|payload| &payload[..]);
        (record.partition, record.key, record.timestamp) = (partition, key, timestamp);
        match client.send(record) {
            Ok(()) => {
                answers.unsent -= 1;
                Ok(())
            }
            Err((error, record)) => {
                match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::Fatal) => line.is_fatal(),
                    Some(code) if is_of_topic(code) => self.board.suspect(topic),
                    _ => {}
                }
                let headers = record.headers.unwrap_or_default();
                Err((Refusal::Client(error), Outgoing { topic, partition, key, payload, headers, timestamp }))
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

    /// Ends the threads that collect reports.
    pub(crate) fn stop(&self) -> Vec<JoinHandle<()>> {
        let small = self.small.lock();
        std::iter::once(&self.main).chain(small.iter().map(|(_, line)| line)).filter_map(|line| line.stop()).collect()
    }
}

/// Why a record was not handed over.
enum Refusal {
    Setback,
    Client(KafkaError),
}

/// Why an entry is not on its way.
enum Unsent {
    /// Something of the batch may have failed meanwhile.
    Setback,
    Refused(Error),
}

/// The keys of a batch of which an entry failed, or is unknown because its client was given up.
struct FailedKeys<'a> {
    batch: &'a [Message],
    keys: HashSet<(Destination, Bytes)>,
    seen: Setbacks,
}

impl<'a> FailedKeys<'a> {
    fn new(board: &Board, batch: &'a [Message]) -> Self {
        Self { batch, keys: HashSet::new(), seen: board.setbacks() }
    }

    fn place(&self, index: usize) -> Option<(Destination, Bytes)> {
        let message = &self.batch[index];
        message.key_bytes().map(|key| (message.destination().clone(), key.clone()))
    }

    fn add(&mut self, index: usize) {
        let place = self.place(index);
        self.keys.extend(place);
    }

    /// Whether an earlier entry of the same key failed, as far as it is known by now.
    fn hold_back(&mut self, board: &Board, answers: &Answers, index: usize) -> bool {
        let setbacks = board.setbacks();
        if setbacks != self.seen {
            let were_replaced = setbacks.replacements != self.seen.replacements;
            let failed = if were_replaced { answers.unstored(index) } else { answers.failed() };
            for failed in failed {
                self.add(failed);
            }
            self.seen = setbacks;
        }
        !self.keys.is_empty() && self.place(index).is_some_and(|place| self.keys.contains(&place))
    }
}

/// Where the messages of a destination go, and what is taken there.
#[derive(Clone)]
pub(crate) struct Route {
    pub(crate) topic: Arc<str>,
    pub(crate) line: Arc<Line>,
    /// The largest batch; `usize::MAX` where the cluster does not tell.
    pub(crate) largest: usize,
    /// A compacted topic refuses what has no key, and the batch that it is in.
    pub(crate) needs_key: bool,
}

impl Route {
    /// What the broker would refuse is refused before, because librdkafka sends what is behind it all the same.
    fn check(&self, message: &Message, headers: &OwnedHeaders) -> Result<()> {
        let (key, payload) = (message.key(), message.payload());
        let texts = message.content_type().map_or(0, str::len) + message.id().with_str(str::len);
        // Headers twice: more than their lengths may take. An exact sum only where it may matter.
        let about = key.map_or(0, <[u8]>::len) + payload.map_or(0, Bytes::len) + texts;
        if about + 2 * message.headers().as_packed().len() + codec::OVERHEAD > self.largest {
            let size = codec::batch_size(key, payload.map(|payload| &payload[..]), headers);
            if size > self.largest {
                let text = format!("the topic takes {} bytes at most (max.message.bytes)", self.largest);
                return Err(Error::new(ErrorKind::TooLarge, "publish", text).with("bytes", size));
            }
        }
        if self.needs_key && key.is_none() {
            let text = "the topic is compacted, and takes no message without a key";
            return Err(Error::new(ErrorKind::InvalidMessage, "publish", text).with_effect(Effect::NotDone));
        }
        Ok(())
    }
}

/// The routes of a batch's destinations, or why there is none.
pub(crate) struct Routes(pub(crate) Vec<(Destination, Result<Route>)>);

impl Routes {
    /// `last` is where the message before this one went; neighbours mostly go the same way.
    fn route(&self, destination: &Destination, last: &mut usize) -> &Result<Route> {
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
fn is_for_later(line: &Line, error: &KafkaError) -> bool {
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::QueueFull) => true,
        Some(RDKafkaErrorCode::Fatal) => line.is_replaced(),
        _ => false,
    }
}

fn held_back() -> Error {
    let text = "order: not attempted, because an earlier message of this key in the batch failed";
    Error::new(ErrorKind::Unavailable, "publish", text).with_effect(Effect::NotDone)
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
