//! Settling: acks and nacks are told to the server and confirmed by it; what is to be remembered is stored first.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, Effect, Error, ErrorKind, Lane, Nack, Reason, Result, SettleError, SettleOutcome, Settlement,
    Settler, Settling, Timestamp, Token, Verdict,
};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::dead_letter;
use crate::desk::{ACK, Desk, Telling, Writing, nak};
use crate::record::Record;
use crate::state::{Expired, Key, Taken};

pub(crate) struct NatsSettler {
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
    Ack,
    /// Its record, and until when it waits.
    Nack(Record, Duration),
    Letter(Box<Verdict>),
}

#[async_trait]
impl Settler for NatsSettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        if batch.iter().all(|(_, settlement)| matches!(settlement, Settlement::Ack)) {
            return self.ack(batch);
        }
        let mut outcomes: Vec<Option<SettleOutcome>> = Vec::with_capacity(batch.len());
        let (mut acks, mut stored_first) = (Vec::new(), Vec::new());
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
                Settlement::Nack(nack) => {
                    let (record, delay) = failed(&taken, &nack);
                    self.desk.shared.failing(taken.key);
                    stored_first.push(Job { index, delivery, taken, then: Then::Nack(record, delay) });
                }
                Settlement::DeadLetter(verdict) => {
                    stored_first.push(Job { index, delivery, taken, then: Then::Letter(verdict) });
                }
                Settlement::Ack | Settlement::Release => {
                    acks.push(Job { index, delivery, taken, then: Then::Ack });
                }
            }
        }
        if acks.is_empty() && stored_first.is_empty() {
            return Settling::ready(outcomes.into_iter().flatten().collect());
        }
        let desk = Arc::clone(&self.desk);
        let deadline = Instant::now() + desk.settle_timeout;
        let work = self.runtime.spawn(async move {
            let (acked, stored) = tokio::join!(tell(&desk, acks, deadline), store(&desk, stored_first, deadline));
            for (index, outcome) in acked.into_iter().chain(stored) {
                outcomes[index] = Some(outcome);
            }
            outcomes.into_iter().flatten().collect()
        });
        Settling::waiting(async move { work.await.expect("settling cannot panic, and nobody aborts it") })
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let extend = |delivery: &&Delivery| match self.desk.shared.extend(delivery.token(), delivery.lane(), lease) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::StaleDelivery, "extend", "its lease or assignment has ended")
                .with("id", delivery.message().id())),
        };
        deliveries.iter().map(extend).collect()
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        self.desk.shared.give_back(token, lane, true);
    }
}

impl NatsSettler {
    /// Nearly every batch: acks alone.
    fn ack(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let desk = Arc::clone(&self.desk);
        let begun = desk.shared.begin_acks(batch.iter().map(|(delivery, _)| delivery));
        let (mut tellings, mut acking) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()));
        for begun in begun {
            acking.push(begun.map(|(acking, ack)| {
                tellings.push(Telling { feed: acking.feed, key: Some(acking.key), ack, payload: ACK });
                acking
            }));
        }
        if tellings.is_empty() {
            return Settling::ready(batch.into_iter().map(|(delivery, _)| Err(stale(delivery))).collect());
        }
        let deadline = Instant::now() + desk.settle_timeout;
        let work = self.runtime.spawn(async move {
            let mut told = desk.tell(&mut tellings, deadline).await.into_iter();
            let mut settled = Vec::with_capacity(batch.len());
            let mut outcomes: Vec<SettleOutcome> = Vec::with_capacity(batch.len());
            for ((delivery, _), acking) in batch.into_iter().zip(acking) {
                let Some((acking, told)) = acking.and_then(|acking| Some((acking, told.next()?))) else {
                    outcomes.push(Err(stale(delivery)));
                    continue;
                };
                outcomes.push(match told {
                    Ok(()) => {
                        if let Some(place) = acking.record_at {
                            desk.forget_record(acking.feed, place).await;
                        }
                        settled.push(acking.key);
                        Ok(AckLevel::Confirmed)
                    }
                    Err(error) => Err(not_told(&desk, acking.key, delivery, error)),
                });
            }
            desk.shared.all_settled(settled.into_iter());
            outcomes
        });
        Settling::waiting(async move { work.await.expect("settling cannot panic, and nobody aborts it") })
    }
}

fn failed(taken: &Taken, nack: &Nack) -> (Record, Duration) {
    let now = Timestamp::now();
    let record = Record {
        failures: taken.record.failures + 1,
        spare: taken.record.spare,
        delivered: taken.delivered,
        not_before: if nack.delay.is_zero() { 0 } else { now.after(nack.delay).as_millis() + 1 },
        first: taken.first_at.map_or(0, Timestamp::as_millis),
    };
    (record, nack.delay)
}

/// Stores records and dead letters; those that are stored are then told to the server.
async fn store(desk: &Arc<Desk>, jobs: Vec<Job>, deadline: Instant) -> Vec<(usize, SettleOutcome)> {
    if jobs.is_empty() {
        return Vec::new();
    }
    let writings: Vec<Writing> = jobs
        .iter()
        .map(|job| match &job.then {
            Then::Nack(record, _) => desk.record_of(job.taken.feed, job.taken.sequence, record),
            Then::Letter(verdict) => {
                let subject = desk.scopes[job.taken.feed as usize].letter(job.taken.sequence);
                let headers = dead_letter::encode(job.delivery.message(), job.delivery.attempt(), verdict, &job.taken);
                let payload = job.delivery.message().payload().cloned().unwrap_or_default();
                Writing { feed: job.taken.feed, subject, headers, payload }
            }
            Then::Ack => unreachable!("acks store nothing"),
        })
        .collect();
    let (mut outcomes, mut stored) = (Vec::new(), Vec::with_capacity(jobs.len()));
    for (mut job, written) in jobs.into_iter().zip(desk.write(writings, deadline).await) {
        match written {
            Ok(place) => {
                if let Then::Nack(record, delay) = job.then {
                    if desk.shared.keeps_failed(job.taken.feed) {
                        desk.shared.wait(job.taken.key, record, place, Instant::now() + delay);
                        outcomes.push((job.index, Ok(AckLevel::Confirmed)));
                        continue;
                    }
                    job.taken.record_at = Some(place);
                    desk.shared.leaving(job.taken.key, (record, place));
                }
                stored.push(job);
            }
            Err(error) => {
                let may_have_failed = matches!(job.then, Then::Nack(..)) && error.effect() != Effect::NotDone;
                desk.shared.unsettled(job.taken.key, may_have_failed);
                outcomes.push((job.index, Err(SettleError::new(job.delivery, not_stored(&error, &job.then)))));
            }
        }
    }
    // Apart, because acks are told again and nacks are not.
    let (nacks, letters): (Vec<_>, Vec<_>) = stored.into_iter().partition(|job| matches!(job.then, Then::Nack(..)));
    let (nacks, letters) = tokio::join!(tell(desk, nacks, deadline), tell(desk, letters, deadline));
    outcomes.extend(nacks.into_iter().chain(letters));
    outcomes
}

/// Tells the server what became of deliveries, and waits for its confirmations.
async fn tell(desk: &Arc<Desk>, jobs: Vec<Job>, deadline: Instant) -> Vec<(usize, SettleOutcome)> {
    if jobs.is_empty() {
        return Vec::new();
    }
    let (mut outcomes, mut here, mut tellings) = (Vec::new(), Vec::new(), Vec::new());
    for job in jobs {
        let payload = match &job.then {
            Then::Nack(_, delay) => nak(*delay),
            _ => ACK,
        };
        match desk.shared.ack_subject(job.taken.key) {
            Some(ack) => {
                tellings.push(Telling { feed: job.taken.feed, key: Some(job.taken.key), ack, payload });
                here.push(job);
            }
            // Its lane was lost while it was settled.
            None => outcomes.push((job.index, Err(stale(job.delivery)))),
        }
    }
    for (job, told) in here.into_iter().zip(desk.tell(&mut tellings, deadline).await) {
        // Its failure is stored. That the server was told or not only says when it comes back: at the latest when its lease
        // ends, and then not before its delay.
        let comes_back =
            matches!(&job.then, Then::Nack(..)) && told.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout);
        let outcome = match told {
            Err(_) if comes_back => {
                desk.shared.settled(job.taken.key);
                Ok(AckLevel::Confirmed)
            }
            Ok(()) => {
                if let (Then::Ack | Then::Letter(_), Some(place)) = (&job.then, job.taken.record_at) {
                    desk.forget_record(job.taken.feed, place).await;
                }
                desk.shared.settled(job.taken.key);
                Ok(AckLevel::Confirmed)
            }
            Err(error) => Err(not_told(desk, job.taken.key, job.delivery, error)),
        };
        outcomes.push((job.index, outcome));
    }
    outcomes
}

/// Makes dead letters of messages whose time to live has ended. What fails comes back when its lease ends.
pub(crate) async fn expire(desk: &Arc<Desk>, expired: Vec<Expired>) {
    let deadline = Instant::now() + desk.settle_timeout;
    let verdict = Verdict::new(Reason::Expired);
    let writings = expired
        .iter()
        .map(|(taken, message)| Writing {
            feed: taken.feed,
            subject: desk.scopes[taken.feed as usize].letter(taken.sequence),
            headers: dead_letter::encode(message, taken.record.failures, &verdict, taken),
            payload: message.payload().cloned().unwrap_or_default(),
        })
        .collect();
    let written = desk.write(writings, deadline).await;
    let (mut stored, mut tellings) = (Vec::new(), Vec::new());
    for ((taken, _), outcome) in expired.into_iter().zip(written) {
        match (outcome, desk.shared.ack_subject(taken.key)) {
            (Ok(_), Some(ack)) => {
                tellings.push(Telling { feed: taken.feed, key: Some(taken.key), ack, payload: ACK });
                stored.push(taken);
            }
            _ => desk.shared.settled(taken.key),
        }
    }
    for (taken, told) in stored.into_iter().zip(desk.tell(&mut tellings, deadline).await) {
        if let (Ok(()), Some(place)) = (told, taken.record_at) {
            desk.forget_record(taken.feed, place).await;
        }
        desk.shared.settled(taken.key);
    }
}

fn not_told(desk: &Desk, key: Key, delivery: Delivery, error: Error) -> SettleError {
    desk.shared.unsettled(key, false);
    let error = error.with("group", delivery.group()).with("id", delivery.message().id());
    SettleError::new(delivery, error)
}

fn stale(delivery: Delivery) -> SettleError {
    let text = "its lease or assignment has ended; the message comes back, here or at another member";
    let error = Error::new(ErrorKind::StaleDelivery, "settle", text)
        .with("group", delivery.group())
        .with("id", delivery.message().id());
    SettleError::new(delivery, error)
}

fn not_stored(error: &Error, then: &Then) -> Error {
    let what = if matches!(then, Then::Letter(_)) { "dead letter" } else { "failure" };
    Error::new(error.kind(), "settle", format!("the {what} could not be stored: {}", error.message()))
        .with_effect(error.effect())
        .with_retry(error.retry())
}
