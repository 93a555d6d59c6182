//! The thread that fetches one destination for a subscription. It polls all the time, so that rebalances are served
//! and the member is not taken for dead (rust-rdkafka #413, #433), whatever the application does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anybroker_core::{Destination, Error, ErrorKind, Result, Start};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::Message as _;
use rdkafka::{ClientContext, Offset, TopicPartitionList};
use tokio::sync::oneshot;

use crate::codec::Filling;
use crate::config::Settings;
use crate::error::failed;
use crate::state::Shared;
use crate::topology;

/// A chunk ends at this size, so that a single unsettled record keeps little else in memory.
const CHUNK_BYTES: usize = 256 * 1024;
const CHUNK_RECORDS: usize = 512;
/// How long a full subscription just does not poll before its partitions are paused. Pausing throws away what librdkafka
/// has fetched ahead, which is not worth it for a moment.
const BRIEFLY_FULL: Duration = Duration::from_millis(300);
/// How long one poll waits. Closing and committing wait for it.
const POLL: Duration = Duration::from_millis(20);
/// How long the last commit is tried while the group rebalances.
const FLUSH: Duration = Duration::from_secs(10);
/// How long joining the group may take when the subscription has to be a member before it counts.
const JOIN: Duration = Duration::from_secs(20);

/// What a feeder needs.
pub(crate) struct Feeder {
    pub(crate) number: usize,
    pub(crate) destination: Destination,
    pub(crate) topic: String,
    pub(crate) partitions: i32,
    pub(crate) group: String,
    pub(crate) start: Start,
    /// Whether where a new group starts is committed. Not under `TopologyMode::Leave`.
    pub(crate) fixes_start: bool,
    pub(crate) settings: Settings,
    pub(crate) shared: Arc<Shared>,
}

impl Feeder {
    /// Joins the group, says so through `started`, and fetches until the subscription closes; says through `ended` how
    /// the last commit went.
    pub(crate) fn run(self, started: oneshot::Sender<Result<()>>, ended: oneshot::Sender<Result<()>>) {
        let consumer = match self.join() {
            Ok(consumer) => consumer,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        if started.send(Ok(())).is_err() {
            // Nobody wants it any more.
            self.shared.close();
        }
        let mut fetching = Fetching { feeder: &self, consumer: &consumer, is_paused: false, full_since: None };
        let mut last_commit = Instant::now();
        while !self.shared.is_closing.load(Ordering::Acquire) {
            fetching.step();
            if last_commit.elapsed() >= self.settings.commit_interval {
                // A failure is logged, and what was not committed is committed next time.
                let _ = self.commit(&consumer, None, CommitMode::Async);
                last_commit = Instant::now();
            }
        }
        let _ = ended.send(self.flush(&consumer));
        // Leaving the group may take as long as a rebalance: after the answer, on this thread (rust-rdkafka #509).
        drop(consumer);
    }

    /// Commits for the last time. While the group rebalances, Kafka refuses commits of the generation before; this member
    /// follows by polling, and what it loses meanwhile was committed by its rebalance.
    fn flush(&self, consumer: &BaseConsumer<Member>) -> Result<()> {
        let deadline = Instant::now() + FLUSH;
        loop {
            match self.commit(consumer, None, CommitMode::Sync) {
                Err(error) if error.kind() == ErrorKind::StaleDelivery && Instant::now() < deadline => {
                    // Whatever it brings is fetched again by the next owner.
                    drop(consumer.poll(POLL));
                }
                flushed => return flushed,
            }
        }
    }

    fn join(&self) -> Result<BaseConsumer<Member>> {
        let config = self.settings.consumer(&self.group);
        let member = Member {
            shared: Arc::clone(&self.shared),
            number: self.number,
            topic: self.topic.clone(),
            revoke_wait: self.settings.revoke_wait,
            has_joined: AtomicBool::new(false),
            has_changed: AtomicBool::new(false),
        };
        let consumer: BaseConsumer<Member> =
            config.create_with_context(member).map_err(|error| failed("subscribe", &error))?;
        let is_new =
            self.fixes_start && topology::fix_start(&consumer, &self.topic, self.partitions, self.start, "subscribe")?;
        consumer.subscribe(&[&self.topic]).map_err(|error| failed("subscribe", &error))?;
        // As long as nobody is in the group, another first member could fix another start after this one returned.
        let deadline = Instant::now() + JOIN;
        while is_new && !consumer.context().has_joined.load(Ordering::Acquire) {
            if Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::Timeout, "subscribe", "the group did not take the member in"));
            }
            if self.shared.is_closing.load(Ordering::Acquire) {
                return Err(Error::closed("subscribe"));
            }
            // Nothing is assigned before it has joined, so no record is lost here.
            if let Some(Ok(record)) = consumer.poll(POLL) {
                self.add(record.partition(), Filling::one(&record));
            }
        }
        Ok(consumer)
    }

    fn add(&self, partition: i32, filling: Filling) {
        if !filling.is_empty() {
            let chunk = filling.finish(self.destination.clone(), format!("{}/{partition}", self.topic));
            self.shared.add(self.number, partition, &Arc::new(chunk));
        }
    }

    /// Commits the prefix of each partition that moved (or of those named).
    fn commit(&self, consumer: &BaseConsumer<Member>, only: Option<&[i32]>, mode: CommitMode) -> Result<()> {
        commit(&self.shared, consumer, self.number, &self.topic, only, mode)
    }
}

fn commit(
    shared: &Shared,
    consumer: &BaseConsumer<Member>,
    number: usize,
    topic: &str,
    only: Option<&[i32]>,
    mode: CommitMode,
) -> Result<()> {
    let offsets = match mode {
        CommitMode::Async => shared.to_commit(number),
        // At the end everything is committed once more: an asynchronous commit may have failed since.
        CommitMode::Sync => shared.all_prefixes(number, only),
    };
    if offsets.is_empty() {
        return Ok(());
    }
    let mut list = TopicPartitionList::with_capacity(offsets.len());
    for (partition, offset) in &offsets {
        list.add_partition_offset(topic, *partition, Offset::Offset(*offset))
            .map_err(|error| failed("commit", &error))?;
    }
    match consumer.commit(&list, mode) {
        Ok(()) => {
            shared.committed(number, &offsets);
            Ok(())
        }
        Err(error) => {
            tracing::warn!(%error, topic, "offsets could not be committed");
            Err(failed("commit", &error))
        }
    }
}

/// The state of fetching.
struct Fetching<'a> {
    feeder: &'a Feeder,
    consumer: &'a BaseConsumer<Member>,
    is_paused: bool,
    full_since: Option<Instant>,
}

impl Fetching<'_> {
    fn step(&mut self) {
        let shared = &self.feeder.shared;
        let is_stopped = shared.is_paused.load(Ordering::Acquire);
        let room = if is_stopped { 0 } else { shared.room() };
        if room > 0 {
            self.full_since = None;
            self.pause(false);
            self.fetch(room);
        } else if !is_stopped && self.full_since.get_or_insert_with(Instant::now).elapsed() < BRIEFLY_FULL {
            std::thread::park_timeout(POLL);
        } else {
            self.pause(true);
            // Only for rebalances and errors. What comes in spite of the pause is kept: dropping it would be a gap.
            if let Some(result) = self.consumer.poll(POLL) {
                self.take(result, &mut None);
            }
        }
        if shared.is_degraded() {
            self.probe();
        }
    }

    /// Fetches at most `room` records, in chunks of one partition.
    fn fetch(&self, room: usize) {
        let mut filling: Option<(i32, Filling)> = None;
        let mut wait = POLL;
        for _ in 0..room.min(CHUNK_RECORDS) {
            match self.consumer.poll(wait) {
                Some(result) => self.take(result, &mut filling),
                None => break,
            }
            wait = Duration::ZERO;
        }
        if let Some((partition, filling)) = filling {
            self.feeder.add(partition, filling);
        }
    }

    fn take(&self, result: KafkaResult<rdkafka::message::BorrowedMessage<'_>>, filling: &mut Option<(i32, Filling)>) {
        let record = match result {
            Ok(record) => record,
            Err(error) => return self.trouble(&error),
        };
        let partition = record.partition();
        let is_other = filling.as_ref().is_some_and(|(other, filling)| {
            *other != partition || filling.bytes() + record.payload_len() > CHUNK_BYTES
        });
        if is_other && let Some((partition, filled)) = filling.take() {
            self.feeder.add(partition, filled);
        }
        let size = || CHUNK_BYTES.min((record.payload_len() + 256) * 64).max(record.payload_len() + 256);
        filling.get_or_insert_with(|| (partition, Filling::with_capacity(size(), 64))).1.push(&record);
        self.feeder.shared.degraded(None);
    }

    fn trouble(&self, error: &KafkaError) {
        let shared = &self.feeder.shared;
        let Some(code) = error.rdkafka_error_code() else { return };
        match code {
            RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic => {
                // Also said of a topic that was created a moment ago.
                let topic = &self.feeder.topic;
                let metadata = self.consumer.fetch_metadata(Some(topic), Duration::from_secs(1));
                let is_gone = metadata.is_ok_and(|metadata| {
                    metadata.topics().iter().all(|found| {
                        let code = found.error().map(RDKafkaErrorCode::from);
                        found.name() == topic && code == Some(RDKafkaErrorCode::UnknownTopicOrPartition)
                    })
                });
                if is_gone {
                    let text = "the topic was deleted";
                    shared.fail(Error::new(ErrorKind::NotFound, "receive", text).with("topic", topic));
                }
            }
            _ => match crate::error::kind(code) {
                kind @ (ErrorKind::PermissionDenied | ErrorKind::Unauthenticated) => {
                    shared.fail(Error::new(kind, "receive", error.to_string()));
                }
                ErrorKind::Unavailable | ErrorKind::Timeout => shared.degraded(Some(error.to_string())),
                _ => tracing::warn!(%error, topic = self.feeder.topic, "kafka consumer"),
            },
        }
    }

    /// Whether the broker answers again; there is no event for it.
    fn probe(&self) {
        if self.consumer.fetch_metadata(Some(&self.feeder.topic), Duration::from_millis(200)).is_ok() {
            self.feeder.shared.degraded(None);
        }
    }

    /// Pauses (or resumes) what is assigned; again after each rebalance, since new partitions are not paused.
    fn pause(&mut self, pause: bool) {
        let has_changed = self.consumer.context().has_changed.swap(false, Ordering::AcqRel);
        if pause == self.is_paused && !(pause && has_changed) {
            return;
        }
        let Ok(assigned) = self.consumer.assignment() else { return };
        let done = if pause { self.consumer.pause(&assigned) } else { self.consumer.resume(&assigned) };
        match done {
            Ok(()) => self.is_paused = pause,
            Err(error) => tracing::warn!(%error, "partitions could not be paused or resumed"),
        }
    }
}

/// Serves the client's rebalances, on the feeder's thread.
pub(crate) struct Member {
    shared: Arc<Shared>,
    number: usize,
    topic: String,
    revoke_wait: Duration,
    has_joined: AtomicBool,
    has_changed: AtomicBool,
}

impl ClientContext for Member {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka consumer");
        if matches!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::AllBrokersDown)) {
            self.shared.degraded(Some(error.to_string()));
        }
    }
}

impl ConsumerContext for Member {
    fn pre_rebalance(&self, consumer: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        self.has_changed.store(true, Ordering::Release);
        match rebalance {
            Rebalance::Assign(assigned) => {
                self.has_joined.store(true, Ordering::Release);
                for element in assigned.elements() {
                    let name = format!("{}/{}", element.topic(), element.partition());
                    self.shared.assign(self.number, element.partition(), name);
                }
            }
            Rebalance::Revoke(revoked) => {
                let partitions: Vec<i32> = revoked.elements().iter().map(|element| element.partition()).collect();
                // A lost assignment is somebody else's already: waiting is in vain, and a commit would move its position.
                if !consumer.assignment_lost() {
                    self.shared.leave(self.number, &partitions, self.revoke_wait);
                    let _ =
                        commit(&self.shared, consumer, self.number, &self.topic, Some(&partitions), CommitMode::Sync);
                }
                self.shared.lose(self.number, &partitions);
            }
            Rebalance::Error(error) => tracing::warn!(%error, topic = self.topic, "rebalance"),
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result
            && error.rdkafka_error_code() != Some(RDKafkaErrorCode::NoOffset)
        {
            tracing::warn!(%error, topic = self.topic, "offsets could not be committed; they will be again");
            self.shared.uncommitted(self.number);
        }
    }
}
