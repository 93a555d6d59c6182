//! Settling: acks move a lane's prefix; failures and dead letters are stored on the group's own topics before their source
//! is settled.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, Effect, Error, ErrorKind, Lane, Nack, Result, SettleError, SettleOutcome, Settlement, Settler,
    Settling, Token, Transaction, Verdict,
};
use async_trait::async_trait;
use rdkafka::message::{Header, OwnedHeaders};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::codec;
use crate::dead_letter;
use crate::note::{self, Origin, Retry};
use crate::publisher::{OwnRecord, Publisher};
use crate::state::{Place, Shared};
use crate::transaction::KafkaTransaction;
use crate::transactions::Transactions;

/// Why a failure that is held in place has no delay: it would not survive its member.
pub(crate) const NO_DELAY: &str = "a delay that is kept in memory ends with its member; nack=retry_topic keeps it";
/// How long a retry or a dead letter may take to be stored.
const STORE: Duration = Duration::from_secs(30);

/// The group's own topics of one destination.
#[derive(Debug, Clone)]
pub(crate) struct OwnTopics {
    pub(crate) retries: Arc<str>,
    /// Zero: there is none, and nobody may create it.
    pub(crate) partitions: i32,
    pub(crate) letters: Arc<str>,
}

pub(crate) struct KafkaSettler {
    pub(crate) shared: Arc<Shared>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) transactions: Arc<Transactions>,
    pub(crate) runtime: Handle,
    /// By destination, in the order of the subscription.
    pub(crate) topics: Vec<(anybroker_core::Destination, OwnTopics)>,
    /// A nack is held back in memory, and its partition with it.
    pub(crate) in_place: bool,
}

/// What is stored before its source is settled.
enum Hop {
    Retry(Nack),
    Letter(Box<Verdict>),
}

/// What is about to be settled in a transaction by a record of it.
struct Joining {
    index: usize,
    delivery: Delivery,
    hop: Hop,
    origin: Origin,
    place: Place,
}

#[async_trait]
impl Settler for KafkaSettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        // Nearly every batch.
        if batch.iter().all(|(_, settlement)| matches!(settlement, Settlement::Ack)) {
            return Settling::ready(self.ack(batch));
        }
        let mut outcomes: Vec<Option<SettleOutcome>> = Vec::with_capacity(batch.len());
        let mut hops = Vec::new();
        let mut state = self.shared.lock_awake();
        for (index, (delivery, settlement)) in batch.into_iter().enumerate() {
            let (lane, token) = (delivery.lane(), delivery.token());
            let hop = match settlement {
                Settlement::Ack => {
                    let done = self.shared.with_entry_locked(&mut state, lane, token, |state, place| state.done(place));
                    outcomes.push(Some(recorded(delivery, done)));
                    continue;
                }
                Settlement::Release => {
                    let back =
                        self.shared.with_entry_locked(&mut state, lane, token, |state, place| state.give_back(place));
                    outcomes.push(Some(recorded(delivery, back)));
                    continue;
                }
                Settlement::Nack(nack) if self.in_place && !nack.delay.is_zero() => {
                    outcomes.push(Some(Err(SettleError::new(delivery, Error::unsupported("settle", NO_DELAY)))));
                    continue;
                }
                Settlement::Nack(nack) if self.in_place => {
                    let held = self
                        .shared
                        .with_entry_locked(&mut state, lane, token, |state, place| state.hold(place, nack.delay));
                    outcomes.push(Some(recorded(delivery, held)));
                    continue;
                }
                Settlement::Nack(nack) => Hop::Retry(nack),
                Settlement::DeadLetter(verdict) => Hop::Letter(verdict),
            };
            let origin = self.shared.with_entry_locked(&mut state, lane, token, |state, place| state.origin(place));
            outcomes.push(match origin.flatten() {
                Some(origin) => {
                    hops.push((index, delivery, hop, origin));
                    None
                }
                None => Some(Err(stale(delivery))),
            });
        }
        drop(state);
        self.shared.arrived.notify_one();
        if hops.is_empty() {
            return Settling::ready(outcomes.into_iter().flatten().collect());
        }
        self.hop(outcomes, hops)
    }

    fn settle_in(&self, transaction: &Arc<dyn Transaction>, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let open = KafkaTransaction::of(transaction, &self.transactions);
        let (busy, line, open) = match open.and_then(|open| open.busy("settle").map(|(busy, line)| (busy, line, open)))
        {
            Ok(found) => found,
            Err(error) => {
                let refuse = |(delivery, _)| Err(SettleError::new(delivery, error.duplicate()));
                return Settling::ready(batch.into_iter().map(refuse).collect());
            }
        };
        let mut outcomes: Vec<Option<SettleOutcome>> = Vec::with_capacity(batch.len());
        let (mut acked, mut hops): (Vec<Place>, Vec<Joining>) = (Vec::new(), Vec::new());
        let mut state = self.shared.lock_awake();
        for (index, (delivery, settlement)) in batch.into_iter().enumerate() {
            let hop = match settlement {
                Settlement::Ack => None,
                Settlement::Nack(nack) if !self.in_place => Some(Hop::Retry(nack)),
                Settlement::DeadLetter(verdict) => Some(Hop::Letter(verdict)),
                Settlement::Nack(_) => {
                    let text = "what is held in its member's memory is in no transaction; nack=retry_topic writes it";
                    outcomes.push(Some(Err(SettleError::new(delivery, Error::unsupported("settle", text)))));
                    continue;
                }
                Settlement::Release => {
                    let text = "giving back is the same without a transaction";
                    outcomes.push(Some(Err(SettleError::new(delivery, Error::unsupported("settle", text)))));
                    continue;
                }
            };
            let (lane, token) = (delivery.lane(), delivery.token());
            let joined = self.shared.with_entry_locked(&mut state, lane, token, |state, place| {
                let origin = state.origin(place)?;
                state.join(open.id, place);
                Some((place, origin))
            });
            outcomes.push(match (joined.flatten(), hop) {
                (None, _) => Some(Err(stale(delivery))),
                (Some((place, _)), None) => {
                    acked.push(place);
                    Some(Ok(AckLevel::Recorded))
                }
                (Some((place, origin)), Some(hop)) => {
                    hops.push(Joining { index, delivery, hop, origin, place });
                    None
                }
            });
        }
        drop(state);
        open.settles(&self.shared, acked);
        if hops.is_empty() {
            return Settling::ready(outcomes.into_iter().flatten().collect());
        }
        // The transaction does not end before these are in it, or have failed.
        let mut sources = Vec::with_capacity(hops.len());
        let mut records = Vec::with_capacity(hops.len());
        for Joining { index, delivery, hop, origin, place } in hops {
            match self.record(&delivery, &hop, origin) {
                Ok(record) => {
                    records.push(record);
                    sources.push((index, delivery, place));
                }
                Err(error) => {
                    self.shared.leave_transaction(open.id, place);
                    outcomes[index] = Some(Err(SettleError::new(delivery, error)));
                }
            }
        }
        let stored = self.publisher.store_by(&line, records, Instant::now() + STORE);
        let shared = Arc::clone(&self.shared);
        let work = self.runtime.spawn(async move {
            for ((index, delivery, place), stored) in sources.into_iter().zip(stored.await) {
                outcomes[index] = Some(match stored {
                    Ok(_) => {
                        open.settles(&shared, vec![place]);
                        Ok(AckLevel::Recorded)
                    }
                    Err(error) => {
                        if error.effect() != Effect::NotDone {
                            open.doubts(&error);
                        }
                        shared.leave_transaction(open.id, place);
                        Err(SettleError::new(delivery, unstored(&error)))
                    }
                });
            }
            drop(busy);
            outcomes.into_iter().flatten().collect()
        });
        Settling::waiting(async move { work.await.expect("storing cannot panic, and nobody aborts it") })
    }

    async fn extend(&self, deliveries: &[&Delivery], _lease: Duration) -> Vec<Result<()>> {
        let refusal =
            || Error::unsupported("extend", "Kafka leases nothing: a partition is its member's while it lives");
        deliveries.iter().map(|_| Err(refusal())).collect()
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        self.shared.with_entry(lane, token, |state, place| state.give_back(place));
        self.shared.arrived.notify_one();
    }
}

impl KafkaSettler {
    fn ack(&self, batch: Vec<(Delivery, Settlement)>) -> Vec<SettleOutcome> {
        let mut state = self.shared.lock_awake();
        let acked: Vec<bool> = batch.iter().map(|(delivery, _)| state.ack(delivery.lane(), delivery.token())).collect();
        self.shared.has_settled(&mut state);
        // The messages are dropped without the lock.
        drop(state);
        let outcome = |((delivery, _), acked): ((Delivery, _), bool)| recorded(delivery, acked.then_some(()));
        batch.into_iter().zip(acked).map(outcome).collect()
    }

    /// Hands retries and dead letters to the client in this call; each source is settled when its record is confirmed,
    /// whether or not somebody waits for the answer.
    fn hop(&self, mut outcomes: Vec<Option<SettleOutcome>>, hops: Vec<(usize, Delivery, Hop, Origin)>) -> Settling {
        let mut sources = Vec::with_capacity(hops.len());
        let mut records = Vec::with_capacity(hops.len());
        for (index, delivery, hop, origin) in hops {
            match self.record(&delivery, &hop, origin) {
                Ok(record) => {
                    records.push(record);
                    sources.push((index, delivery));
                }
                Err(error) => outcomes[index] = Some(Err(SettleError::new(delivery, error))),
            }
        }
        let stored = self.publisher.store(records, Instant::now() + STORE);
        let shared = Arc::clone(&self.shared);
        let work = self.runtime.spawn(async move {
            for ((index, delivery), stored) in sources.into_iter().zip(stored.await) {
                outcomes[index] = Some(match stored {
                    Err(error) => Err(SettleError::new(delivery, unstored(&error))),
                    Ok(_) => {
                        let lane = delivery.lane();
                        let done = shared.with_entry(lane, delivery.token(), |state, place| state.done(place));
                        done.map(|()| AckLevel::Recorded).ok_or_else(|| stale_with_copy(delivery))
                    }
                });
            }
            shared.arrived.notify_one();
            outcomes.into_iter().flatten().collect()
        });
        Settling::waiting(async move { work.await.expect("storing cannot panic, and nobody aborts it") })
    }

    fn record(&self, delivery: &Delivery, hop: &Hop, origin: Origin) -> Result<OwnRecord> {
        let message = delivery.message();
        let found = self.topics.iter().find(|(destination, _)| destination == message.destination());
        let (_, topics) = found.expect("a delivery is of a destination of its subscription");
        match hop {
            Hop::Letter(verdict) => Ok(dead_letter::record(topics, delivery, verdict, origin)),
            Hop::Retry(_) if topics.partitions == 0 => {
                let text = "the group has no retry topic, and its topology is left alone";
                Err(Error::new(ErrorKind::NotFound, "settle", text).with("topic", &topics.retries))
            }
            Hop::Retry(nack) => {
                let retry = Retry { origin, attempt: delivery.attempt() + 1, due: note::due(nack.delay) };
                Ok(retry_record(topics, message, &retry))
            }
        }
    }
}

/// The record that brings a message back to its group.
pub(crate) fn retry_record(topics: &OwnTopics, message: &anybroker_core::Message, retry: &Retry) -> OwnRecord {
    OwnRecord {
        topic: Arc::clone(&topics.retries),
        partition: retry.origin.partition % topics.partitions.max(1),
        key: retry.origin.key(),
        payload: message.payload().cloned(),
        headers: own_headers(message, &note::write(retry)),
    }
}

/// The headers of a record on the group's own topics: the message's, its key, and the note.
pub(crate) fn own_headers(message: &anybroker_core::Message, note: &[u8]) -> OwnedHeaders {
    // The record's own time is the broker's; the message keeps its timestamp inside.
    let (mut headers, _) = codec::encode(message, anybroker_core::Timestamp::from_millis(i64::MAX), &mut Vec::new());
    if let Some(key) = message.key() {
        headers = headers.insert(Header { key: codec::KEY, value: Some(key) });
    }
    headers.insert(Header { key: codec::NOTE, value: Some(note) })
}

fn recorded(delivery: Delivery, applied: Option<()>) -> SettleOutcome {
    applied.map(|()| AckLevel::Recorded).ok_or_else(|| stale(delivery))
}

fn stale(delivery: Delivery) -> SettleError {
    is_stale(delivery, Effect::NotDone, "the partition belongs to another member now; the message comes back there")
}

/// Its retry or dead letter is stored, its source not settled.
fn stale_with_copy(delivery: Delivery) -> SettleError {
    let text = "the partition went to another member while the retry or dead letter was being stored: the message comes back \
                there as well";
    is_stale(delivery, Effect::Unknown, text)
}

fn is_stale(delivery: Delivery, effect: Effect, text: &'static str) -> SettleError {
    let error = Error::new(ErrorKind::StaleDelivery, "settle", text)
        .with_effect(effect)
        .with("group", delivery.group())
        .with("id", delivery.message().id())
        .with("lane", delivery.lane().index);
    SettleError::new(delivery, error)
}

fn unstored(error: &Error) -> Error {
    let text = format!("its retry or dead letter could not be stored: {}", error.message());
    Error::new(error.kind(), "settle", text).with_effect(error.effect()).with_retry(error.retry())
}
