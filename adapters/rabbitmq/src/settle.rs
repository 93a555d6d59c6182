//! Settling: acks are handed to the client in the call; what has to be stored first is stored and confirmed before its
//! source is acked.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, Effect, Error, ErrorKind, Lane, Nack, Result, SettleError, SettleOutcome, Settlement, Settler,
    Settling, Token, Verdict,
};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::desk::Desk;
use crate::state::{Key, Taken};

pub(crate) struct RabbitSettler {
    pub(crate) desk: Arc<Desk>,
    pub(crate) runtime: Handle,
}

/// A delivery on its way to be settled.
struct Job {
    index: usize,
    delivery: Delivery,
    taken: Taken,
    then: Then,
}

enum Then {
    Retry(Nack),
    Letter(Box<Verdict>),
}

/// A delivery that failed and keeps its place, once that is noted.
struct Noting {
    index: usize,
    delivery: Delivery,
    key: Key,
    told: oneshot::Receiver<()>,
}

#[async_trait]
impl Settler for RabbitSettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        // Nearly every batch.
        if batch.iter().all(|(_, settlement)| matches!(settlement, Settlement::Ack)) {
            return Settling::ready(self.ack(batch));
        }
        let mut outcomes: Vec<Option<SettleOutcome>> = Vec::with_capacity(batch.len());
        let (mut acks, mut stored_first, mut noted) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (delivery, settlement)) in batch.into_iter().enumerate() {
            let (token, lane) = (delivery.token().clone(), delivery.lane());
            if matches!(settlement, Settlement::Release) {
                let is_given_back = self.desk.shared.give_back(&token, lane, false);
                outcomes.push(Some(if is_given_back { Ok(AckLevel::Recorded) } else { Err(stale(delivery)) }));
                continue;
            }
            let Some(taken) = self.desk.shared.begin(&token, lane) else {
                outcomes.push(Some(Err(stale(delivery))));
                continue;
            };
            outcomes.push(None);
            match settlement {
                Settlement::Nack(nack) => match self.desk.shared.failing(&taken, nack.delay) {
                    Some(told) => noted.push(Noting { index, delivery, key: taken.key, told }),
                    None => stored_first.push(Job { index, delivery, taken, then: Then::Retry(nack) }),
                },
                Settlement::DeadLetter(verdict) => {
                    stored_first.push(Job { index, delivery, taken, then: Then::Letter(verdict) });
                }
                Settlement::Ack | Settlement::Release => acks.push((index, delivery, taken.key)),
            }
        }
        let keys: Vec<_> = acks.iter().map(|(_, _, key)| *key).collect();
        for ((index, delivery, _), is_sent) in acks.into_iter().zip(self.desk.shared.ack(&keys)) {
            outcomes[index] = Some(if is_sent { Ok(ack_level(&self.desk)) } else { Err(stale(delivery)) });
        }
        if stored_first.is_empty() && noted.is_empty() {
            return Settling::ready(outcomes.into_iter().flatten().collect());
        }
        let desk = Arc::clone(&self.desk);
        let work = self.runtime.spawn(async move {
            let (stored, noted) = tokio::join!(store(&desk, stored_first), note(&desk, noted));
            for (index, outcome) in stored.into_iter().chain(noted) {
                outcomes[index] = Some(outcome);
            }
            outcomes.into_iter().flatten().collect()
        });
        Settling::waiting(async move { work.await.expect("settling cannot panic, and nobody aborts it") })
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let extend = |delivery: &&Delivery| match self.desk.shared.extend(delivery.token(), delivery.lane(), lease) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::StaleDelivery, "extend", "its lease or its channel is gone")
                .with("id", delivery.message().id())),
        };
        deliveries.iter().map(extend).collect()
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        self.desk.shared.give_back(token, lane, true);
    }
}

/// An ack of what is in a stream is noted here, and stored on the server a moment later.
fn ack_level(desk: &Desk) -> AckLevel {
    if desk.topology.queue.is_log() { AckLevel::Recorded } else { AckLevel::Sent }
}

impl RabbitSettler {
    fn ack(&self, batch: Vec<(Delivery, Settlement)>) -> Vec<SettleOutcome> {
        let begun = self.desk.shared.begin_acks(batch.iter().map(|(delivery, _)| delivery));
        let keys: Vec<_> = begun.iter().flatten().copied().collect();
        let mut sent = self.desk.shared.ack(&keys).into_iter();
        let outcome =
            |((delivery, _), begun): ((Delivery, Settlement), Option<_>)| match begun.and_then(|_| sent.next()) {
                Some(true) => Ok(ack_level(&self.desk)),
                _ => Err(stale(delivery)),
            };
        batch.into_iter().zip(begun).map(outcome).collect()
    }
}

/// Stores copies and dead letters; the sources of those that are confirmed are then acked.
async fn store(desk: &Arc<Desk>, jobs: Vec<Job>) -> Vec<(usize, SettleOutcome)> {
    let deadline = Instant::now() + desk.settle_timeout;
    let mut copies = Vec::with_capacity(jobs.len());
    for job in &jobs {
        copies.push(match &job.then {
            Then::Retry(nack) => desk.retry(&job.taken, nack.delay, deadline).await,
            Then::Letter(verdict) => Ok(desk.letter(&job.taken, job.delivery.attempt(), verdict)),
        });
    }
    let (mut outcomes, mut stored) = (Vec::with_capacity(jobs.len()), Vec::with_capacity(jobs.len()));
    for (job, told) in jobs.into_iter().zip(desk.store(copies, deadline).await) {
        match told {
            Ok(()) => stored.push(job),
            Err(error) => {
                desk.shared.unsettled(job.taken.key);
                outcomes.push((job.index, Err(SettleError::new(job.delivery, not_stored(&error, &job.then)))));
            }
        }
    }
    let keys: Vec<_> = stored.iter().map(|job| job.taken.key).collect();
    for (job, is_sent) in stored.into_iter().zip(desk.shared.ack(&keys)) {
        outcomes.push((job.index, if is_sent { Ok(ack_level(desk)) } else { Err(stored_and_stale(job.delivery)) }));
    }
    outcomes
}

/// Waits until failures are noted.
async fn note(desk: &Desk, noted: Vec<Noting>) -> Vec<(usize, SettleOutcome)> {
    let deadline = Instant::now() + desk.settle_timeout;
    let mut outcomes = Vec::with_capacity(noted.len());
    for Noting { index, delivery, key, told } in noted {
        let outcome = match tokio::time::timeout_at(deadline, told).await {
            Ok(Ok(())) => Ok(ack_level(desk)),
            // Its channel was lost meanwhile: the failure may be noted.
            Ok(Err(_)) => Err(stored_and_stale(delivery)),
            Err(_) if desk.shared.unfail(key) => {
                let text = "the failure could not be stored: the server has not confirmed it in time";
                let error = Error::new(ErrorKind::Timeout, "settle", text).with_effect(Effect::Unknown);
                Err(SettleError::new(delivery, error))
            }
            Err(_) => Ok(ack_level(desk)),
        };
        outcomes.push((index, outcome));
    }
    outcomes
}

/// The copy is stored, and its source could not be acked any more: both are there. Found by the suite's faults.
fn stored_and_stale(delivery: Delivery) -> SettleError {
    let (delivery, error) = stale(delivery).into_parts();
    SettleError::new(delivery, error.with_effect(Effect::Unknown))
}

fn stale(delivery: Delivery) -> SettleError {
    let text = "its lease or its channel is gone; the message comes back, here or at another member";
    let error = Error::new(ErrorKind::StaleDelivery, "settle", text)
        .with("group", delivery.group())
        .with("id", delivery.message().id());
    SettleError::new(delivery, error)
}

fn not_stored(error: &Error, then: &Then) -> Error {
    let what = if matches!(then, Then::Letter(_)) { "dead letter" } else { "copy that comes back" };
    Error::new(error.kind(), "settle", format!("the {what} could not be stored: {}", error.message()))
        .with_effect(error.effect())
        .with_retry(error.retry())
}
