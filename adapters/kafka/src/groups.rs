//! What the cluster keeps of a group: where it is in each partition. Everything here blocks.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use anybroker_core::{ErrorKind, Result, Start};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaResult, RDKafkaErrorCode};
use rdkafka::topic_partition_list::TopicPartitionListElem;
use rdkafka::{Offset, TopicPartitionList};

use crate::error::failed;
use crate::progress::Progress;
use crate::topology::REQUEST;

/// The partitions of topics, each with its number of partitions.
pub(crate) fn partitions_of(topics: &[(&str, i32)]) -> TopicPartitionList {
    let count: usize = topics.iter().map(|(_, partitions)| partitions.unsigned_abs() as usize).sum();
    let mut list = TopicPartitionList::with_capacity(count);
    for (topic, partitions) in topics {
        for partition in 0..*partitions {
            list.add_partition(topic, partition);
        }
    }
    list
}

/// Where the group is in each partition of the topics, topic by topic; `None` where it has committed nothing.
pub(crate) fn committed<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topics: &[(&str, i32)],
    operation: &'static str,
) -> Result<Vec<Option<Progress>>> {
    progress_of(consumer, &partitions_of(topics), operation)
}

/// The first offset of a partition and the one behind its last. A leader that has just been elected is waited for.
pub(crate) fn watermarks<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partition: i32,
    operation: &'static str,
) -> Result<(i64, i64)> {
    patiently(operation, || consumer.fetch_watermarks(topic, partition, REQUEST))
}

/// Asks again while the answer is that something is not there yet, for as long as a request may take.
fn patiently<T>(operation: &'static str, mut ask: impl FnMut() -> KafkaResult<T>) -> Result<T> {
    let deadline = Instant::now() + REQUEST;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                let error = failed(operation, &error);
                let is_transient = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout);
                if !is_transient || Instant::now() >= deadline {
                    return Err(error);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// Where the group is in each of these partitions.
pub(crate) fn progress_of<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partitions: &TopicPartitionList,
    operation: &'static str,
) -> Result<Vec<Option<Progress>>> {
    // The first group of a cluster waits for the offsets topic to be made.
    let offsets = patiently(operation, || consumer.committed_offsets(partitions.clone(), REQUEST))?;
    Ok(partitions
        .elements()
        .iter()
        .map(|asked| {
            let found = offsets.find_partition(asked.topic(), asked.partition())?;
            match found.offset() {
                Offset::Offset(offset) => Some(Progress::read(offset, &metadata(&found))),
                _ => None,
            }
        })
        .collect())
}

/// The same as the cluster has it, asked once.
pub(crate) fn found<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    partitions: &TopicPartitionList,
    timeout: Duration,
) -> KafkaResult<Vec<Option<(i64, String)>>> {
    let offsets = consumer.committed_offsets(partitions.clone(), timeout)?;
    let told = |asked: TopicPartitionListElem<'_>| {
        let found = offsets.find_partition(asked.topic(), asked.partition())?;
        match found.offset() {
            Offset::Offset(offset) => Some((offset, metadata(&found))),
            _ => None,
        }
    };
    Ok(partitions.elements().into_iter().map(told).collect())
}

/// rdkafka panics on metadata that is not UTF-8, which another program may have committed.
fn metadata(element: &TopicPartitionListElem<'_>) -> String {
    std::panic::catch_unwind(AssertUnwindSafe(|| element.metadata().to_owned())).unwrap_or_default()
}

/// Commits where a new group starts, so that everything published from now on belongs to it whoever joins first. One
/// that has offsets already goes on where it was. Tells whether it was new.
pub(crate) fn fix_start<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: i32,
    start: Start,
    operation: &'static str,
) -> Result<bool> {
    let present = committed(consumer, &[(topic, partitions)], operation)?;
    if present.iter().any(Option::is_some) {
        return Ok(false);
    }
    let at_time = match start {
        Start::Time(time) => Some(offsets_at(consumer, topic, partitions, time.as_millis(), operation)?),
        _ => None,
    };
    let mut offsets = TopicPartitionList::new();
    for partition in 0..partitions {
        let (low, high) = watermarks(consumer, topic, partition, operation)?;
        let offset = match start {
            Start::Latest => high,
            Start::Position(position) => i64::try_from(position.major).unwrap_or(i64::MAX).clamp(low, high),
            // Nothing that late: with what comes.
            Start::Time(_) => {
                let found = at_time.as_ref().and_then(|found| found[partition.unsigned_abs() as usize]);
                found.unwrap_or(high).clamp(low, high)
            }
            _ => low,
        };
        offsets
            .add_partition_offset(topic, partition, Offset::Offset(offset))
            .map_err(|error| failed(operation, &error))?;
    }
    match consumer.commit(&offsets, CommitMode::Sync) {
        Ok(()) => Ok(true),
        // Refused because somebody of the group is reading already: then its start is fixed.
        Err(error) => match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::UnknownMemberId | RDKafkaErrorCode::IllegalGeneration) => Ok(false),
            _ => Err(failed(operation, &error)),
        },
    }
}

/// The first offset of each partition whose record was stored at or after `millis`.
fn offsets_at<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: i32,
    millis: i64,
    operation: &'static str,
) -> Result<Vec<Option<i64>>> {
    let mut asked = partitions_of(&[(topic, partitions)]);
    asked.set_all_offsets(Offset::Offset(millis.max(0))).map_err(|error| failed(operation, &error))?;
    let found = patiently(operation, || consumer.offsets_for_times(asked.clone(), REQUEST))?;
    Ok((0..partitions)
        .map(|partition| match found.find_partition(topic, partition)?.offset() {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        })
        .collect())
}
