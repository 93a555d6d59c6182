//! The thread that fetches one destination for a subscription. It polls all the time, so that rebalances are served
//! and the member is not taken for dead (rust-rdkafka #413, #433), whatever the application does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anybroker_core::{Destination, Error, ErrorKind, Result, Start};
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::codec::Filling;
use crate::config::Settings;
use crate::error::failed;
use crate::groups;
use crate::lanes::Log;
use crate::login::Made;
use crate::member::Member;
use crate::settle::OwnTopics;
use crate::state::{Scope, Shared};
use crate::trim::Trim;

/// A chunk ends at this size, so that a single unsettled record keeps little else in memory.
const CHUNK_BYTES: usize = 256 * 1024;
const CHUNK_RECORDS: usize = 512;
/// How long a full subscription just does not poll before its partitions are paused. Pausing throws away what librdkafka
/// has fetched ahead, which is not worth it for a moment.
const BRIEFLY_FULL: Duration = Duration::from_millis(300);
/// How long one poll waits. Closing, committing and retries wait for it.
const POLL: Duration = Duration::from_millis(20);
/// How long the last commit is tried while the group rebalances, or its coordinator is not there: longer than one request for
/// the coordinator may be without an answer (`socket.timeout.ms`).
const FLUSH: Duration = Duration::from_secs(20);
/// How long a member that leaves waits for its partitions to be given back; closing goes on with it.
const LEAVE: Duration = Duration::from_secs(5);
/// How long joining the group may take when the subscription has to be a member before it counts.
const JOIN: Duration = Duration::from_secs(20);
/// How long a member of a group that exists is waited for.
const REJOIN: Duration = Duration::from_secs(5);
/// How long it waits before it tries to join again.
const PAUSE: Duration = Duration::from_millis(500);

type Client = BaseConsumer<Member>;

/// What a feeder needs.
pub(crate) struct Feeder {
    pub(crate) number: usize,
    pub(crate) destination: Destination,
    pub(crate) topic: String,
    pub(crate) partitions: i32,
    pub(crate) own: OwnTopics,
    pub(crate) group: String,
    pub(crate) start: Start,
    pub(crate) settings: Settings,
    pub(crate) shared: Arc<Shared>,
    pub(crate) trim: Trim,
    pub(crate) runtime: Handle,
}

/// Why a feeder stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fed {
    Closing,
    ShutOut,
    /// The process stood still for so long that the member counts as gone.
    StoodStill,
}

impl Fed {
    /// What a close answers when there was no member any more that could commit.
    fn uncommitted(self) -> Error {
        let (kind, why) = match self {
            Self::StoodStill => {
                (ErrorKind::StaleDelivery, "the process stood still, and others may have its partitions")
            }
            _ => (ErrorKind::Unauthenticated, "the cluster refused the credentials"),
        };
        Error::new(kind, "close", format!("{why}: the last acks were not committed"))
    }
}

impl Feeder {
    /// Joins the group, says so through `started`, and fetches until the subscription closes; says through `ended` how
    /// the last commit went, and drops `left` when the group has been left.
    pub(crate) fn run(
        mut self,
        started: oneshot::Sender<Result<()>>,
        ended: oneshot::Sender<Result<()>>,
        left: oneshot::Sender<()>,
    ) {
        let mut made = Made::now(&self.settings, &self.runtime);
        let mut consumer = match self.join() {
            Ok(consumer) => Arc::new(consumer),
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        if started.send(Ok(())).is_err() {
            // Nobody wants it any more.
            self.shared.close();
        }
        loop {
            match self.feed(&consumer, &made) {
                Fed::Closing => break,
                gone @ (Fed::ShutOut | Fed::StoodStill) => {
                    give_up(&self, consumer);
                    // What has come meanwhile is not passed over.
                    self.start = Start::Earliest;
                    match self.join_again(&mut made, gone) {
                        Some(fresh) => consumer = Arc::new(fresh),
                        None => {
                            let _ = ended.send(Err(gone.uncommitted()));
                            return;
                        }
                    }
                }
            }
        }
        let _ = ended.send(match consumer.context().stood_still() {
            true => Err(Fed::StoodStill.uncommitted()),
            false => self.flush(&consumer),
        });
        // Leaving the group may take as long as a rebalance: after the answer, on this thread (rust-rdkafka #509).
        leave(&consumer);
        drop(consumer);
        drop(left);
    }

    /// Fetches until the subscription closes, or there are other credentials than those that the cluster refuses.
    fn feed(&mut self, consumer: &Arc<Client>, made: &Made) -> Fed {
        self.shared.joining.reads(self.number, consumer);
        let mut fetching = Fetching { consumer, is_paused: false, full_since: None, queues: BTreeMap::new() };
        let (mut last_commit, mut is_refused) = (Instant::now(), false);
        while !self.shared.is_closing.load(Ordering::Acquire) {
            if consumer.context().stood_still() {
                return Fed::StoodStill;
            }
            fetching.step(self);
            if last_commit.elapsed() >= self.settings.commit_interval {
                // A failure is logged, and what was not committed is committed next time.
                let _ = self.commit(consumer, &Scope::Changed);
                last_commit = Instant::now();
            }
            // The client does not tell each time that it was refused.
            is_refused |= consumer.context().is_refused.swap(false, Ordering::AcqRel);
            is_refused &= self.shared.is_degraded();
            if is_refused {
                made.refused();
                if made.is_outdated() {
                    return Fed::ShutOut;
                }
            }
        }
        Fed::Closing
    }

    /// A member in the place of one that was not let in, or is gone; `None` when the subscription closes meanwhile.
    fn join_again(&self, made: &mut Made, gone: Fed) -> Option<Client> {
        loop {
            *made = Made::now(&self.settings, &self.runtime);
            let joined = self.join();
            if self.shared.is_closing.load(Ordering::Acquire) {
                // As it is for who closes while it is a member: joining tells that it was in vain.
                return joined.ok();
            }
            match joined {
                Ok(consumer) => return Some(consumer),
                Err(error) => {
                    tracing::warn!(%error, topic = self.topic, "the group could not be joined again");
                    let may_pass = gone == Fed::ShutOut || self.settings.may_be_let_in();
                    match error.kind() {
                        ErrorKind::NotFound => self.shared.fail(error),
                        ErrorKind::PermissionDenied | ErrorKind::Unauthenticated if !may_pass => {
                            self.shared.fail(error);
                        }
                        _ => {
                            self.shared.degraded(Some(error.message().to_owned()));
                            made.refused();
                        }
                    }
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Commits for the last time. While the group rebalances, Kafka refuses commits of the generation before; this member
    /// follows by polling, and what it loses meanwhile was committed by its rebalance. A connection that was lost a moment ago
    /// is waited for: librdkafka refuses to commit as long as it does not know the coordinator.
    fn flush(&mut self, consumer: &Client) -> Result<()> {
        let deadline = Instant::now() + FLUSH;
        loop {
            match self.commit(consumer, &Scope::All) {
                Err(error) if passes(&error) && Instant::now() < deadline => {
                    // Whatever it brings is fetched again by the next owner.
                    drop(consumer.poll(POLL));
                }
                flushed => return flushed,
            }
        }
    }

    fn join(&self) -> Result<Client> {
        let config = self.settings.consumer(&self.group);
        let member = Member {
            shared: Arc::clone(&self.shared),
            number: self.number,
            group: self.group.clone(),
            topic: self.topic.clone(),
            own: self.own.clone(),
            revoke_wait: self.settings.revoke_wait,
            patience: self.settings.transaction_timeout,
            has_joined: AtomicBool::new(false),
            stops: self.shared.pulse.stops(),
            is_refused: AtomicBool::new(false),
            is_given_up: AtomicBool::new(false),
            has_changed: AtomicBool::new(false),
            retries: parking_lot::Mutex::default(),
        };
        let consumer: Client = config.create_with_context(member).map_err(|error| failed("subscribe", &error))?;
        let is_new = groups::fix_start(&consumer, &self.topic, self.partitions, self.start, "subscribe")?;
        consumer.subscribe(&[&self.topic]).map_err(|error| failed("subscribe", &error))?;
        // As long as nobody is in the group, another first member could fix another start after this one returned. A
        // group that exists is joined a moment later anyway, where its rebalance takes that long.
        let deadline = Instant::now() + if is_new { JOIN } else { REJOIN };
        self.wait_until_joined(&consumer, is_new, deadline).inspect_err(|_| leave(&consumer))?;
        Ok(consumer)
    }

    fn wait_until_joined(&self, consumer: &Client, is_new: bool, deadline: Instant) -> Result<()> {
        while !consumer.context().has_joined.load(Ordering::Acquire) {
            if Instant::now() >= deadline {
                if !is_new {
                    break;
                }
                return Err(Error::new(ErrorKind::Timeout, "subscribe", "the group did not take the member in"));
            }
            if self.shared.is_closing.load(Ordering::Acquire) {
                return Err(Error::closed("subscribe"));
            }
            // Nothing is assigned before it has joined, so no record is lost here.
            if let Some(Ok(record)) = consumer.poll(POLL) {
                let log = self.log(&record);
                self.add(log, record.partition(), Filling::one(&record, log == Log::Retry));
            }
        }
        Ok(())
    }

    /// Which log a record stands in.
    fn log(&self, record: &BorrowedMessage<'_>) -> Log {
        if record.topic() == self.topic { Log::Main } else { Log::Retry }
    }

    fn add(&self, log: Log, partition: i32, filling: Filling) {
        if !filling.is_empty() {
            let topic = if log == Log::Main { &self.topic } else { &*self.own.retries };
            let chunk = filling.finish(self.destination.clone(), format!("{topic}/{partition}"));
            self.shared.add(self.number, log, partition, &Arc::new(chunk));
        }
    }

    fn add_all(&self, collected: Option<Collecting>) {
        if let Some(Collecting { log, handle: (_, partition), filling }) = collected {
            self.add(log, partition, filling);
        }
    }

    fn commit(&mut self, consumer: &Client, scope: &Scope<'_>) -> Result<()> {
        let committed = consumer.context().commit(consumer, scope)?;
        self.trim.settled(committed, *scope != Scope::Changed);
        Ok(())
    }
}

/// Gives all partitions back before the consumer is closed. librdkafka ends the whole process by an assertion when a close
/// meets certain moments of a rebalance (`rd_kafka_cgrp_terminated`, librdkafka #4792, open as of 2.12.1); a consumer that
/// has nothing assigned any more does not get there.
fn leave(consumer: &Client) {
    consumer.unsubscribe();
    let deadline = Instant::now() + LEAVE;
    while Instant::now() < deadline {
        // Serves the revocation, which unassigns.
        drop(consumer.poll(POLL));
        if consumer.assignment().is_ok_and(|assigned| assigned.count() == 0) {
            return;
        }
    }
}

/// Ends a member that the cluster does not let in, or has missed for too long. What is out of it comes again: nobody can commit for it any more.
fn give_up(feeder: &Feeder, consumer: Arc<Client>) {
    consumer.context().is_given_up.store(true, Ordering::Release);
    feeder.shared.lose_all(feeder.number);
    // Closing waits for a coordinator that does not answer.
    let work = move || {
        leave(&consumer);
        drop(consumer);
    };
    let thread = std::thread::Builder::new().name("kafka-closing".into()).spawn(work);
    if let Err(error) = thread {
        tracing::error!(%error, "no thread could be started to close a member");
    }
}

/// Whether a commit that failed so may succeed later.
fn passes(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::StaleDelivery | ErrorKind::Unavailable | ErrorKind::Timeout)
}

/// The state of fetching.
struct Fetching<'a> {
    consumer: &'a Arc<Client>,
    is_paused: bool,
    full_since: Option<Instant>,
    /// The partitions of the retry topic, read apart: what failed must not queue up behind what was fetched ahead.
    queues: BTreeMap<i32, PartitionQueue<Member>>,
}

impl Fetching<'_> {
    fn step(&mut self, feeder: &Feeder) {
        self.follow(feeder);
        let shared = &feeder.shared;
        self.fetch_retries(feeder);
        let is_stopped = shared.is_paused.load(Ordering::Acquire);
        let room = if is_stopped { 0 } else { shared.room() };
        if room > 0 {
            self.full_since = None;
            self.pause(feeder, false);
            self.fetch(feeder, room);
        } else if !is_stopped && self.full_since.get_or_insert_with(Instant::now).elapsed() < BRIEFLY_FULL {
            std::thread::park_timeout(POLL);
        } else {
            self.pause(feeder, true);
            // Only for rebalances and errors. What comes in spite of the pause, of a partition that the same poll assigned, is
            // kept: dropping it would be a gap.
            let mut filling = None;
            if let Some(result) = self.consumer.poll(POLL) {
                take(feeder, self.consumer, result, &mut filling);
            }
            feeder.add_all(filling);
        }
        if shared.is_degraded() {
            self.probe(feeder);
        }
    }

    /// Opens and closes the queues of retry partitions as they come and go.
    fn follow(&mut self, feeder: &Feeder) {
        let member = self.consumer.context();
        if !member.has_changed.load(Ordering::Acquire) {
            return;
        }
        let owned = member.retries.lock().clone();
        self.queues.retain(|partition, _| owned.contains(partition));
        for partition in owned {
            if !self.queues.contains_key(&partition)
                && let Some(queue) = self.consumer.split_partition_queue(&feeder.own.retries, partition)
            {
                self.queues.insert(partition, queue);
            }
        }
    }

    fn fetch_retries(&self, feeder: &Feeder) {
        for queue in self.queues.values() {
            let room = feeder.shared.room_to_hold();
            let mut filling = None;
            for _ in 0..room.min(CHUNK_RECORDS) {
                match queue.poll(Duration::ZERO) {
                    Some(result) => take(feeder, self.consumer, result, &mut filling),
                    None => break,
                }
            }
            feeder.add_all(filling);
        }
    }

    /// Fetches at most `room` records, in chunks of one partition.
    fn fetch(&self, feeder: &Feeder, room: usize) {
        let mut filling = None;
        let mut wait = POLL;
        for _ in 0..room.min(CHUNK_RECORDS) {
            match self.consumer.poll(wait) {
                Some(result) => take(feeder, self.consumer, result, &mut filling),
                None => break,
            }
            wait = Duration::ZERO;
        }
        feeder.add_all(filling);
    }

    /// Whether the broker answers again; there is no event for it.
    fn probe(&self, feeder: &Feeder) {
        if self.consumer.fetch_metadata(Some(&feeder.topic), Duration::from_millis(200)).is_ok() {
            feeder.shared.degraded(None);
        }
    }

    /// Pauses (or resumes) what is assigned of the destination; again after each rebalance, since new partitions are not
    /// paused.
    fn pause(&mut self, feeder: &Feeder, pause: bool) {
        let has_changed = self.consumer.context().has_changed.swap(false, Ordering::AcqRel);
        if pause == self.is_paused && !(pause && has_changed) {
            return;
        }
        let Ok(assigned) = self.consumer.assignment() else { return };
        let mut list = TopicPartitionList::new();
        for element in assigned.elements().iter().filter(|element| element.topic() == feeder.topic) {
            list.add_partition(element.topic(), element.partition());
        }
        let done = if pause { self.consumer.pause(&list) } else { self.consumer.resume(&list) };
        match done {
            Ok(()) => self.is_paused = pause,
            Err(error) => tracing::warn!(%error, "partitions could not be paused or resumed"),
        }
    }
}

/// Records of one partition on their way into a chunk.
struct Collecting {
    /// The client's handle of the topic, only to be compared, and the partition.
    handle: (*const (), i32),
    log: Log,
    filling: Filling,
}

fn take(
    feeder: &Feeder,
    consumer: &Client,
    result: KafkaResult<BorrowedMessage<'_>>,
    filling: &mut Option<Collecting>,
) {
    let record = match result {
        Ok(record) => record,
        Err(error) => return trouble(feeder, consumer, &error),
    };
    // Looking at the name for each record costs more than copying it.
    let handle = (record.topic_ptr().cast_const().cast(), record.partition());
    let is_full = |filling: &Filling| filling.bytes() + record.payload_len() > CHUNK_BYTES;
    if let Some(collected) = filling.take_if(|one| one.handle != handle || is_full(&one.filling)) {
        feeder.add_all(Some(collected));
    }
    let fresh = || {
        feeder.shared.degraded(None);
        let log = feeder.log(&record);
        let bytes = CHUNK_BYTES.min((record.payload_len() + 256) * 64).max(record.payload_len() + 256);
        Collecting { handle, log, filling: Filling::with_capacity(bytes, 64, log == Log::Retry) }
    };
    filling.get_or_insert_with(fresh).filling.push(&record);
}

fn trouble(feeder: &Feeder, consumer: &Client, error: &KafkaError) {
    let shared = &feeder.shared;
    let Some(code) = error.rdkafka_error_code() else { return };
    match code {
        RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic => {
            // Also said of a topic that was created a moment ago.
            let has_own = feeder.own.partitions > 0;
            let topics = [Some(&*feeder.topic), has_own.then_some(&*feeder.own.retries)];
            if let Some(topic) = topics.into_iter().flatten().find(|topic| is_gone(consumer, topic)) {
                let text = "the topic was deleted";
                shared.fail(Error::new(ErrorKind::NotFound, "receive", text).with("topic", topic));
            }
        }
        _ => match crate::error::kind(code) {
            // The provider may say others.
            ErrorKind::Unauthenticated if feeder.settings.may_be_let_in() => {
                consumer.context().is_refused.store(true, Ordering::Release);
                shared.degraded(Some(error.to_string()));
            }
            kind @ (ErrorKind::PermissionDenied | ErrorKind::Unauthenticated) => {
                shared.fail(Error::new(kind, "receive", error.to_string()));
            }
            ErrorKind::Unavailable | ErrorKind::Timeout => shared.degraded(Some(error.to_string())),
            _ => tracing::warn!(%error, topic = feeder.topic, "kafka consumer"),
        },
    }
}

fn is_gone(consumer: &Client, topic: &str) -> bool {
    let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(1));
    metadata.is_ok_and(|metadata| {
        metadata.topics().iter().all(|found| {
            let code = found.error().map(RDKafkaErrorCode::from);
            found.name() == topic && code == Some(RDKafkaErrorCode::UnknownTopicOrPartition)
        })
    })
}

/// One commit for the list.
pub(crate) fn commit_list(consumer: &Client, commits: &[(&str, i32, i64, &str)], mode: CommitMode) -> KafkaResult<()> {
    consumer.commit(&offsets(commits)?, mode)
}

/// Offsets of topics' partitions, with their metadata.
pub(crate) fn offsets(commits: &[(&str, i32, i64, &str)]) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::with_capacity(commits.len());
    for (topic, partition, offset, metadata) in commits {
        let mut element = list.add_partition(topic, *partition);
        element.set_offset(Offset::Offset(*offset))?;
        element.set_metadata(metadata);
    }
    Ok(list)
}
