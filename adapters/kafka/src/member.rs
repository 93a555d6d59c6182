//! The client's rebalances and commits, on the feeder's thread.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anybroker_core::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, Offset, TopicPartitionList};

use crate::error::failed;
use crate::feeder::commit_list;
use crate::groups;
use crate::lanes::Log;
use crate::progress::{Commit, Progress};
use crate::settle::OwnTopics;
use crate::state::{Scope, Shared};

/// A member of a group. Kafka hands out partitions of the destination; the same partition of the group's retry topic goes
/// with each of them, so that a key stays with one member.
pub(crate) struct Member {
    pub(crate) shared: Arc<Shared>,
    pub(crate) number: usize,
    pub(crate) group: String,
    pub(crate) topic: String,
    pub(crate) own: OwnTopics,
    pub(crate) revoke_wait: Duration,
    /// How long the group's offsets are waited for.
    pub(crate) patience: Duration,
    pub(crate) has_joined: AtomicBool,
    /// How often the process had stood still when it was made.
    pub(crate) stops: u64,
    /// The cluster does not take its credentials.
    pub(crate) is_refused: AtomicBool,
    /// Another one has taken its place: what it is told has no effect on what that one has.
    pub(crate) is_given_up: AtomicBool,
    /// The assignment is another one than the feeder knows.
    pub(crate) has_changed: AtomicBool,
    /// The partitions of the retry topic that are assigned.
    pub(crate) retries: Mutex<BTreeSet<i32>>,
}

impl Member {
    /// Commits the prefix of each lane, and what is settled above it. Answers how far the retry partitions are settled.
    pub(crate) fn commit(&self, consumer: &BaseConsumer<Self>, scope: &Scope<'_>) -> Result<Vec<(i32, i64)>> {
        // While a transaction makes sure that nothing is on its way, nobody waits for it but who commits for the last time.
        let patience = if *scope == Scope::Changed { Duration::ZERO } else { self.revoke_wait };
        let Some(_turn) = self.shared.joining.turn(patience) else {
            let text = "a transaction of the same group took too long";
            let late = || Error::new(ErrorKind::Unavailable, "commit", text);
            return if *scope == Scope::Changed { Ok(Vec::new()) } else { Err(late()) };
        };
        self.commit_in_turn(consumer, scope)
    }

    /// The same for who has the turn.
    pub(crate) fn commit_in_turn(&self, consumer: &BaseConsumer<Self>, scope: &Scope<'_>) -> Result<Vec<(i32, i64)>> {
        let commits = self.shared.to_commit(self.number, scope);
        if commits.is_empty() {
            return Ok(Vec::new());
        }
        let list = self.named(&commits);
        let mode = if *scope == Scope::Changed { CommitMode::Async } else { CommitMode::Sync };
        match commit_list(consumer, &list, mode) {
            Ok(()) => {
                let retries = commits.iter().filter(|(log, ..)| *log == Log::Retry);
                let retries = retries.map(|(_, partition, commit)| (*partition, commit.offset)).collect();
                self.shared.committed(self.number, commits);
                Ok(retries)
            }
            Err(error) => {
                tracing::warn!(%error, topic = self.topic, "offsets could not be committed");
                Err(failed("commit", &error))
            }
        }
    }

    /// Commits with the topics that they are of.
    pub(crate) fn named<'c>(&'c self, commits: &'c [(Log, i32, Commit)]) -> Vec<(&'c str, i32, i64, &'c str)> {
        let named = |(log, partition, commit): &'c (Log, i32, Commit)| {
            let topic = if *log == Log::Main { &*self.topic } else { &*self.own.retries };
            (topic, *partition, commit.offset, &*commit.metadata)
        };
        commits.iter().map(named).collect()
    }

    /// The partitions of the retry topic that go with those of the destination.
    fn companions(&self, partitions: &[i32]) -> Vec<i32> {
        partitions.iter().copied().filter(|partition| *partition < self.own.partitions).collect()
    }

    fn assign(&self, consumer: &BaseConsumer<Self>, assigned: &TopicPartitionList) {
        self.has_joined.store(true, Ordering::Release);
        let partitions: Vec<i32> = assigned.elements().iter().map(|element| element.partition()).collect();
        let companions = self.companions(&partitions);
        let mut both = TopicPartitionList::new();
        for partition in &partitions {
            both.add_partition(&self.topic, *partition);
        }
        for partition in &companions {
            both.add_partition(&self.own.retries, *partition);
        }
        let mut progress = Vec::new();
        if !partitions.is_empty() {
            progress = self.progress(consumer, &both);
        }
        progress.resize(partitions.len() + companions.len(), None);
        // Then the member is given up, and nothing of it is handed out.
        let is_new = !self.stood_still();
        for (index, partition) in partitions.iter().enumerate().filter(|_| is_new) {
            let name = format!("{}/{partition}", self.topic);
            let retry = companions.iter().position(|companion| companion == partition);
            let retry = retry.and_then(|place| progress[partitions.len() + place].take());
            self.shared.assign(self.number, *partition, name, (progress[index].take(), retry));
        }
        self.retries.lock().extend(companions);
        if let Err(error) = consumer.incremental_assign(&with_stored_offsets(&both)) {
            tracing::error!(%error, topic = self.topic, "an assignment could not be taken");
        }
        // One that was paused when it was taken away comes back paused: only the application ends its own pause
        // (rdkafka_assignment.c takes back the library's), and what was resumed meanwhile did not name it.
        if let Err(error) = consumer.resume(&both) {
            tracing::warn!(%error, topic = self.topic, "an assignment could not be resumed");
        }
    }

    /// Where the group is. The offsets of a transaction that has not ended are not told before it has (KIP-447): those of a process
    /// that died in it are waited for as long as the broker does.
    fn progress(&self, consumer: &BaseConsumer<Self>, partitions: &TopicPartitionList) -> Vec<Option<Progress>> {
        let deadline = Instant::now() + self.patience;
        loop {
            match groups::progress_of(consumer, partitions, "receive") {
                Ok(progress) => return progress,
                Err(error) => {
                    let is_transient = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout);
                    let is_over = self.shared.is_closing.load(Ordering::Acquire)
                        || consumer.assignment_lost()
                        || self.stood_still();
                    if !is_transient || is_over || Instant::now() >= deadline {
                        // What was settled above a prefix comes again: better than not to go on.
                        tracing::warn!(%error, topic = self.topic, "what was settled out of order could not be read");
                        return Vec::new();
                    }
                }
            }
        }
    }

    /// Whether the process has stood still since this member was made.
    pub(crate) fn stood_still(&self) -> bool {
        self.shared.pulse.stops() != self.stops
    }

    fn revoke(&self, consumer: &BaseConsumer<Self>, revoked: &TopicPartitionList) {
        let partitions: Vec<i32> = revoked.elements().iter().map(|element| element.partition()).collect();
        // A lost assignment is somebody else's already: waiting is in vain, and a commit would move its position.
        if !consumer.assignment_lost() {
            self.shared.leave(self.number, &partitions, self.revoke_wait);
            let _ = self.commit(consumer, &Scope::Leaving(&partitions));
        }
        self.shared.lose(self.number, &partitions);
        self.unassign(consumer, &partitions);
    }

    /// Takes partitions out, with their companions. What is assigned can be changed step by step only, by either side; a client that
    /// has something assigned never closes.
    fn unassign(&self, consumer: &BaseConsumer<Self>, partitions: &[i32]) {
        let mut both = TopicPartitionList::new();
        let mut retries = self.retries.lock();
        for partition in partitions {
            both.add_partition(&self.topic, *partition);
            if retries.remove(partition) {
                both.add_partition(&self.own.retries, *partition);
            }
        }
        drop(retries);
        if let Err(error) = consumer.incremental_unassign(&both) {
            tracing::warn!(%error, topic = self.topic, "a revocation could not be followed");
        }
    }
}

/// The client asks for the committed offsets by itself.
fn with_stored_offsets(partitions: &TopicPartitionList) -> TopicPartitionList {
    let mut list = partitions.clone();
    let _ = list.set_all_offsets(Offset::Invalid);
    list
}

impl ClientContext for Member {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka consumer");
        if self.is_given_up.load(Ordering::Acquire) {
            return;
        }
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => self.shared.degraded(Some(error.to_string())),
            Some(code) => {
                if let Some(refusal) = crate::error::refused(code, reason) {
                    self.is_refused.store(true, Ordering::Release);
                    self.shared.degraded(Some(refusal.message().to_owned()));
                }
            }
            None => {}
        }
    }
}

impl ConsumerContext for Member {
    /// Not the default: it takes and gives only what Kafka names, and the companions go with it in the same step.
    fn rebalance(&self, consumer: &BaseConsumer<Self>, code: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        if self.is_given_up.load(Ordering::Acquire) {
            if code == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
                let _ = consumer.incremental_assign(partitions);
            } else {
                let revoked: Vec<i32> = partitions.elements().iter().map(|element| element.partition()).collect();
                self.unassign(consumer, &revoked);
            }
            return;
        }
        self.has_changed.store(true, Ordering::Release);
        match code {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.assign(consumer, partitions),
            _ => self.revoke(consumer, partitions),
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result
            && error.rdkafka_error_code() != Some(RDKafkaErrorCode::NoOffset)
            && !self.is_given_up.load(Ordering::Acquire)
        {
            tracing::warn!(%error, topic = self.topic, "offsets could not be committed; they will be again");
            self.shared.uncommitted(self.number);
        }
    }
}
