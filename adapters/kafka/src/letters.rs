//! Which dead letters a topic holds. Read once, then only what came since; bodies are not kept.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use anybroker_core::{DeadLetterScope, Error, ErrorKind, Message, Result};
use rdkafka::config::FromClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::codec::Filling;
use crate::config::Settings;
use crate::error::failed;
use crate::groups;
use crate::names;
use crate::note::{self, Letter};

const OPERATION: &str = "dead letters";
/// How long reading may go on without a record.
const SILENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether a transaction has ended.
const LOOK: Duration = Duration::from_millis(10);

/// A letter as it is stored.
pub(crate) struct Found {
    pub(crate) offset: i64,
    pub(crate) key: String,
    pub(crate) note: Option<Letter>,
    pub(crate) message: Message,
}

/// The letters of one topic. Everything here blocks.
pub(crate) struct Index {
    scope: DeadLetterScope,
    topic: String,
    settings: Settings,
    /// Up to where it was read.
    next: i64,
    live: BTreeMap<i64, String>,
    by_key: HashMap<String, i64>,
}

impl Index {
    pub(crate) fn new(scope: &DeadLetterScope, topic: &str, settings: &Settings) -> Self {
        Self {
            scope: scope.clone(),
            topic: topic.to_owned(),
            settings: settings.clone(),
            next: 0,
            live: BTreeMap::new(),
            by_key: HashMap::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.live.len()
    }

    /// The key of the letter at that offset, unless it is gone.
    pub(crate) fn key(&self, offset: i64) -> Option<String> {
        self.live.get(&offset).cloned()
    }

    /// Reads what came since the last time. For what is there in a transaction its end is waited for, `patience` at most: Kafka
    /// answers a commit before readers see what it committed (the markers are written after the answer, KIP-98).
    pub(crate) fn refresh(&mut self, patience: Duration) -> Result<()> {
        let (committed, all) = (self.settings.reader(&self.group()), self.settings.reader_of_all(&self.group()));
        let (consumer, all) = (client(&committed)?, client(&all)?);
        let (_, end) = groups::watermarks(&all, &self.topic, 0, OPERATION)?;
        let deadline = Instant::now() + patience;
        let (low, high) = loop {
            // Of a reader of what is committed: up to the first open transaction.
            let (low, high) = groups::watermarks(&consumer, &self.topic, 0, OPERATION)?;
            if high >= end || Instant::now() >= deadline {
                break (low, high);
            }
            std::thread::sleep(LOOK);
        };
        if high < self.next {
            // It was deleted, and is another one.
            (self.next, self.live, self.by_key) = Default::default();
        }
        let gone: Vec<i64> = self.live.range(..low).map(|(offset, _)| *offset).collect();
        gone.into_iter().for_each(|offset| self.remove(offset));
        let from = self.next.max(low);
        self.scan(&consumer, from, high, |index, record| {
            let key = String::from_utf8_lossy(record.key().unwrap_or_default()).into_owned();
            if let Some(before) = index.by_key.get(&key).copied() {
                index.remove(before);
            }
            if record.payload().is_some() {
                index.live.insert(record.offset(), key.clone());
                index.by_key.insert(key, record.offset());
            }
        })?;
        self.next = self.next.max(high);
        if high < end {
            // Removals are in no transaction. Unseen behind an open one, they would let a letter be put back twice.
            self.scan(&all, high, end, |index, record| {
                if let (None, Some(key)) = (record.payload(), record.key()) {
                    let offset = index.by_key.get(&*String::from_utf8_lossy(key)).copied();
                    offset.into_iter().for_each(|offset| index.remove(offset));
                }
            })?;
        }
        Ok(())
    }

    fn remove(&mut self, offset: i64) {
        if let Some(key) = self.live.remove(&offset) {
            self.by_key.remove(&key);
        }
    }

    /// Letters from `from` on, at most `max`, and where the next page starts.
    pub(crate) fn page(&mut self, from: i64, max: usize) -> Result<(Vec<Found>, Option<i64>)> {
        let mut offsets: Vec<i64> = self.live.range(from..).take(max + 1).map(|(offset, _)| *offset).collect();
        let next = if offsets.len() > max { offsets.pop() } else { None };
        let wanted: Vec<Option<i64>> = offsets.into_iter().map(Some).collect();
        Ok((self.find(&wanted)?.into_iter().flatten().collect(), next))
    }

    /// The letters at those offsets, in their order; `None` for what is gone.
    pub(crate) fn find(&mut self, wanted: &[Option<i64>]) -> Result<Vec<Option<Found>>> {
        let mut found: Vec<Option<Found>> = wanted.iter().map(|_| None).collect();
        let is_live = |offset: &&i64| self.live.contains_key(offset);
        let places: HashMap<i64, usize> = wanted
            .iter()
            .enumerate()
            .filter_map(|(place, offset)| offset.as_ref().filter(is_live).map(|offset| (*offset, place)))
            .collect();
        let (Some(first), Some(last)) = (places.keys().min().copied(), places.keys().max().copied()) else {
            return Ok(found);
        };
        let consumer = client(&self.settings.reader(&self.group()))?;
        self.scan(&consumer, first, last + 1, |index, record| {
            let Some(place) = places.get(&record.offset()) else { return };
            let chunk = Filling::one(record, true).finish(index.scope.source.clone(), format!("{}/0", index.topic));
            found[*place] = Some(Found {
                offset: record.offset(),
                key: index.live.get(&record.offset()).cloned().unwrap_or_default(),
                note: note::read(chunk.note(0)),
                message: chunk.message(0),
            });
        })?;
        Ok(found)
    }

    fn group(&self) -> String {
        names::group(&names::topic(&self.scope.source), &self.scope.group)
    }

    /// Reads from `from` up to (exclusive) `end`. Compaction leaves gaps, the last of which only the end of the
    /// partition shows.
    fn scan(
        &mut self,
        consumer: &BaseConsumer,
        from: i64,
        end: i64,
        mut each: impl FnMut(&mut Self, &BorrowedMessage<'_>),
    ) -> Result<()> {
        if from >= end {
            return Ok(());
        }
        let mut place = TopicPartitionList::new();
        place
            .add_partition_offset(&self.topic, 0, Offset::Offset(from))
            .and_then(|()| consumer.assign(&place))
            .map_err(|error| failed(OPERATION, &error))?;
        let mut deadline = Instant::now() + SILENCE;
        loop {
            match consumer.poll(Duration::from_millis(100)) {
                Some(Ok(record)) => {
                    if record.offset() < end {
                        each(self, &record);
                    }
                    if record.offset() + 1 >= end {
                        break;
                    }
                    deadline = Instant::now() + SILENCE;
                }
                Some(Err(KafkaError::PartitionEOF(_))) => break,
                Some(Err(error)) => {
                    let error = failed(OPERATION, &error);
                    let is_transient = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout);
                    if !is_transient || Instant::now() >= deadline {
                        return Err(error);
                    }
                }
                None if Instant::now() >= deadline => {
                    return Err(Error::new(ErrorKind::Timeout, OPERATION, "the letters could not be read in time"));
                }
                None => {}
            }
        }
        consumer.unassign().map_err(|error| failed(OPERATION, &error))
    }
}

fn client(config: &ClientConfig) -> Result<BaseConsumer> {
    BaseConsumer::from_config(config).map_err(|error| failed(OPERATION, &error))
}
