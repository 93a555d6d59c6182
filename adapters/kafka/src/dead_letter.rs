//! Dead letters: one record for each on a compacted topic of their source and group, which has one partition, so that the
//! oldest comes first. A letter is gone when a record without payload follows under its key.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    ByteString, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Delivery, Error, ErrorKind, Message,
    Position, Reason, Result, Timestamp, Verdict,
};
use parking_lot::Mutex;
use rdkafka::message::OwnedHeaders;
use tokio::time::Instant;

use crate::letters::{Found, Index};
use crate::names;
use crate::note::{self, Letter, Origin, Retry};
use crate::publisher::{OwnRecord, Publisher};
use crate::settle::{OwnTopics, own_headers, retry_record};
use crate::topology::Topology;

/// How long putting letters back or removing them may take.
const STORE: Duration = Duration::from_secs(30);
/// How long looking for letters waits for transactions that have put some there: as a rule they have ended, and readers see it
/// a moment later. One that stays open is not waited for any longer; its letters are not there yet.
const PATIENCE: Duration = Duration::from_secs(3);
/// Indexes of other scopes are forgotten beyond that; they are read again when they are needed.
const INDEXES: usize = 16;

/// The letter of a delivery.
pub(crate) fn record(topics: &OwnTopics, delivery: &Delivery, verdict: &Verdict, origin: Origin) -> OwnRecord {
    let message = delivery.message();
    let letter = Letter {
        origin,
        source: message.destination().to_string(),
        group: delivery.group().to_string(),
        reason: verdict.reason.as_str().to_owned(),
        error_type: verdict.error_type.as_ref().map(note::cut),
        detail: verdict.detail.as_ref().map(note::cut),
        attempts: delivery.attempt(),
        last_at: Timestamp::now().as_millis(),
        is_tombstone: message.payload().is_none(),
    };
    OwnRecord {
        topic: Arc::clone(&topics.letters),
        partition: 0,
        key: origin.key(),
        payload: Some(message.payload().cloned().unwrap_or_default()),
        headers: own_headers(message, &note::write(&letter)),
    }
}

/// The dead letters of a connection.
pub(crate) struct Letters {
    publisher: Arc<Publisher>,
    topology: Arc<Topology>,
    /// By topic.
    indexes: Mutex<HashMap<String, Arc<Mutex<Index>>>>,
}

impl Letters {
    pub(crate) fn new(publisher: &Arc<Publisher>, topology: &Arc<Topology>) -> Self {
        Self { publisher: Arc::clone(publisher), topology: Arc::clone(topology), indexes: Mutex::default() }
    }

    /// Works on the index of a scope, which is brought up to date first. Blocks elsewhere. An id comes from a page, so that who
    /// has one needs no patience.
    async fn with_index<R: Send + 'static>(
        &self,
        scope: &DeadLetterScope,
        patience: Duration,
        work: impl FnOnce(&mut Index) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        let topic = names::dead_letters(&scope.source, &scope.group);
        self.topology.expect(&topic, "dead letters").await?;
        let index = {
            let mut indexes = self.indexes.lock();
            if indexes.len() >= INDEXES && !indexes.contains_key(&topic) {
                indexes.clear();
            }
            let fresh = || Arc::new(Mutex::new(Index::new(scope, &topic, self.topology.settings())));
            Arc::clone(indexes.entry(topic.clone()).or_insert_with(fresh))
        };
        self.topology.settings().renew().await?;
        let read = tokio::task::spawn_blocking(move || {
            let mut index = index.lock();
            index.refresh(patience)?;
            work(&mut index)
        });
        read.await.expect("reading letters cannot panic")
    }

    pub(crate) async fn page(
        &self,
        scope: &DeadLetterScope,
        from: Option<&DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let from = match from {
            None => 0,
            Some(id) => offset(id).ok_or_else(|| missing(id).with("expected", "a number"))?,
        };
        let (found, next) = self.with_index(scope, PATIENCE, move |index| index.page(from, max)).await?;
        let letters = found.into_iter().map(|found| letter(scope, found).1).collect();
        Ok(DeadLetterPage { letters, next: next.map(|next| DeadLetterId(next.to_string().into())) })
    }

    /// How many there are.
    pub(crate) async fn count(&self, scope: &DeadLetterScope) -> Result<u64> {
        self.with_index(scope, PATIENCE, |index| Ok(index.len() as u64)).await
    }

    /// Each goes back to its group by the retry topic, confirmed, before it is removed here.
    pub(crate) async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let topics = match self.topics(scope).await {
            Ok(topics) => topics,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let found = match self.find(scope, ids).await {
            Ok(found) => found,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let mut outcomes: Vec<Result<()>> = Vec::with_capacity(ids.len());
        let (mut retries, mut removals) = (Vec::new(), Vec::new());
        for (index, (id, found)) in ids.iter().zip(found).enumerate() {
            let Some(found) = found else {
                outcomes.push(Err(missing(id)));
                continue;
            };
            let key = found.key.clone();
            let (origin, letter) = letter(scope, found);
            let origin = Origin { redrives: origin.redrives + 1, ..origin };
            retries.push(retry_record(&topics, &letter.message, &Retry { origin, attempt: 1, due: 0 }));
            removals.push((index, removal(&topics.letters, key)));
            outcomes.push(Ok(()));
        }
        let stored = self.publisher.store(retries, Instant::now() + STORE).await;
        let mut removing = Vec::new();
        for ((index, removal), stored) in removals.into_iter().zip(stored) {
            match stored {
                Ok(_) => removing.push((index, removal)),
                Err(error) => outcomes[index] = Err(named("redrive", &error)),
            }
        }
        self.remove(removing, &mut outcomes, "redrive").await;
        outcomes
    }

    pub(crate) async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let topic: Arc<str> = names::dead_letters(&scope.source, &scope.group).into();
        let wanted: Vec<Option<i64>> = ids.iter().map(offset).collect();
        let keys = self.with_index(scope, Duration::ZERO, move |index| {
            Ok(wanted.iter().map(|offset| offset.and_then(|offset| index.key(offset))).collect::<Vec<_>>())
        });
        let keys = match keys.await {
            Ok(keys) => keys,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let mut outcomes: Vec<Result<()>> = Vec::with_capacity(ids.len());
        let mut removing = Vec::new();
        for (index, (id, key)) in ids.iter().zip(keys).enumerate() {
            outcomes.push(match key {
                Some(key) => {
                    removing.push((index, removal(&topic, key)));
                    Ok(())
                }
                None => Err(missing(id)),
            });
        }
        self.remove(removing, &mut outcomes, "purge").await;
        outcomes
    }

    async fn remove(&self, removing: Vec<(usize, OwnRecord)>, outcomes: &mut [Result<()>], operation: &'static str) {
        let (places, records): (Vec<usize>, Vec<OwnRecord>) = removing.into_iter().unzip();
        let removed = self.publisher.store(records, Instant::now() + STORE).await;
        for (index, removed) in places.into_iter().zip(removed) {
            if let Err(error) = removed {
                outcomes[index] = Err(named(operation, &error));
            }
        }
    }

    async fn find(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Result<Vec<Option<Found>>> {
        let wanted: Vec<Option<i64>> = ids.iter().map(offset).collect();
        self.with_index(scope, Duration::ZERO, move |index| index.find(&wanted)).await
    }

    async fn topics(&self, scope: &DeadLetterScope) -> Result<OwnTopics> {
        let retries = names::retries(&scope.source, &scope.group);
        let partitions = self.topology.expect(&retries, "redrive").await?;
        let letters = names::dead_letters(&scope.source, &scope.group);
        Ok(OwnTopics { retries: retries.into(), partitions, letters: letters.into() })
    }
}

fn removal(topic: &Arc<str>, key: String) -> OwnRecord {
    OwnRecord { topic: Arc::clone(topic), partition: 0, key, payload: None, headers: OwnedHeaders::new() }
}

fn letter(scope: &DeadLetterScope, found: Found) -> (Origin, DeadLetter) {
    let note = found.note.unwrap_or_else(|| Letter {
        // Not written by this library; it is shown, and can be removed.
        origin: Origin { partition: 0, offset: found.offset, redrives: 0, first_at: None },
        source: scope.source.to_string(),
        group: scope.group.to_string(),
        reason: Reason::Malformed.as_str().to_owned(),
        error_type: None,
        detail: Some("its letter cannot be read".to_owned()),
        attempts: 0,
        last_at: 0,
        is_tombstone: false,
    });
    let message = if note.is_tombstone { without_payload(&found.message) } else { found.message };
    let letter = DeadLetter {
        id: DeadLetterId(found.offset.to_string().into()),
        message,
        group: scope.group.clone(),
        reason: Reason::from(note.reason.as_str()),
        error_type: note.error_type.map(ByteString::from),
        detail: note.detail.map(ByteString::from),
        attempts: note.attempts,
        first_at: note.origin.first_at.map(Timestamp::from_millis),
        last_at: Timestamp::from_millis(note.last_at),
        redrives: note.origin.redrives,
        position: Some(Position::new(note.origin.offset.unsigned_abs())),
    };
    (note.origin, letter)
}

fn without_payload(message: &Message) -> Message {
    let (id, time) = (message.id().clone(), message.timestamp());
    let mut bare = Message::from_parts(message.destination().clone(), id, time, None);
    if let Some(key) = message.key_bytes() {
        bare = bare.with_key(key.clone());
    }
    if let Some(content_type) = message.content_type() {
        bare = bare.with_content_type(ByteString::from(content_type));
    }
    bare.with_headers(message.headers().clone())
}

fn offset(id: &DeadLetterId) -> Option<i64> {
    id.0.parse().ok().filter(|offset| *offset >= 0)
}

fn missing(id: &DeadLetterId) -> Error {
    Error::new(ErrorKind::NotFound, "dead letters", "there is no such dead letter").with("id", id)
}

fn named(operation: &'static str, error: &Error) -> Error {
    Error::new(error.kind(), operation, error.message().to_owned())
        .with_effect(error.effect())
        .with_retry(error.retry())
}
