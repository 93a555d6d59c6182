//! Settling: acks are confirmed by the broker; what comes back or is buried is stored, and confirmed, first.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, Effect, Error, ErrorKind, Lane, Result, SettleError, SettleOutcome, Settlement, Settler,
    Settling, Token, Verdict,
};
use async_trait::async_trait;
use futures_util::future::join_all;
use pulsar::message::Payload;
use pulsar::proto::{self, BaseCommand, MessageIdData, base_command::Type, command_ack::AckType};
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::batch::{Batch, weight};
use crate::codec::{self, Notes};
use crate::dead_letter;
use crate::error::refused;
use crate::hand_overs::HandOvers;
use crate::producer::Producer;
use crate::publisher::late;
use crate::state::{Attachment, Failing, Returned, Shared, Siblings, Taken};
use crate::topology::Topology;
use crate::wire::{Conn, command};

const LOST: &str = "its consumer was lost before the broker confirmed; the message may come back";

/// Messages that one ack carries at most.
const ACKS: usize = 5_000;
/// Failures that are stored in one message at most.
const NOTED: usize = 1_000;

/// Where what comes back, and what is buried, of one topic of the subscription goes.
#[derive(Clone)]
pub(crate) struct Ways {
    pub(crate) back: Arc<Producer>,
    pub(crate) letters: Arc<Producer>,
}

pub(crate) struct Desk {
    pub(crate) topology: Arc<Topology>,
    pub(crate) shared: Arc<Shared>,
    /// One for each feed.
    pub(crate) ways: Vec<Ways>,
    /// One for each feed, where hand-overs are counted.
    pub(crate) hand_overs: Vec<Option<Arc<HandOvers>>>,
    pub(crate) settle_timeout: Duration,
}

pub(crate) struct PulsarSettler {
    pub(crate) desk: Arc<Desk>,
    pub(crate) runtime: Handle,
}

/// A delivery on its way to be settled.
struct Job {
    index: usize,
    delivery: Delivery,
    taken: Taken,
}

enum Then {
    Back(Notes),
    Letter(Box<Verdict>),
}

#[async_trait]
impl Settler for PulsarSettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let mut outcomes: Vec<Option<SettleOutcome>> = Vec::with_capacity(batch.len());
        let (mut acks, mut stored_first, mut noted) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (delivery, settlement)) in batch.into_iter().enumerate() {
            let (token, lane) = (delivery.token().clone(), delivery.lane());
            if matches!(settlement, Settlement::Release) {
                let is_given_back = self.desk.shared.give_back(&token, lane, true);
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
                    let not_before = if nack.delay.is_zero() { 0 } else { codec::due(nack.delay) };
                    if let Some(failing) = self.desk.shared.failing(&taken, delivery.message(), not_before) {
                        noted.push((index, delivery, failing));
                        continue;
                    }
                    let notes = Notes {
                        failures: taken.notes.failures + 1,
                        not_before,
                        first_at: taken.first_at.as_millis(),
                        redrives: taken.notes.redrives,
                        origin: origin(&taken),
                        lost: taken.lost,
                    };
                    stored_first.push((Job { index, delivery, taken }, Then::Back(notes)));
                }
                Settlement::DeadLetter(verdict) => {
                    stored_first.push((Job { index, delivery, taken }, Then::Letter(verdict)));
                }
                Settlement::Ack | Settlement::Release => acks.push(Job { index, delivery, taken }),
            }
        }
        if acks.is_empty() && stored_first.is_empty() && noted.is_empty() {
            return Settling::ready(outcomes.into_iter().flatten().collect());
        }
        let desk = Arc::clone(&self.desk);
        let deadline = Instant::now() + desk.settle_timeout;
        let work = self.runtime.spawn(async move {
            let (acked, stored, noted) = tokio::join!(
                ack(&desk, acks, deadline),
                store(&desk, stored_first, deadline),
                note(&desk, noted, deadline)
            );
            for (index, outcome) in acked.into_iter().chain(stored).chain(noted) {
                outcomes[index] = Some(outcome);
            }
            outcomes.into_iter().flatten().collect()
        });
        Settling::waiting(async move { work.await.expect("settling cannot panic, and nobody aborts it") })
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let extend = |delivery: &&Delivery| match self.desk.shared.extend(delivery.token(), delivery.lane(), lease) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::StaleDelivery, "extend", "its lease or its consumer has ended")
                .with("id", delivery.message().id())),
        };
        deliveries.iter().map(extend).collect()
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        self.desk.shared.give_back(token, lane, false);
    }
}

/// Where the message was stored when it was published: a copy that came back keeps it.
pub(crate) fn origin(taken: &Taken) -> (u64, u64) {
    match taken.notes.origin {
        (0, 0) => (taken.id.ledger_id, taken.id.entry_id),
        origin => origin,
    }
}

/// Stores copies and dead letters; those that are stored are then acked at their source.
async fn store(desk: &Arc<Desk>, jobs: Vec<(Job, Then)>, deadline: Instant) -> Vec<(usize, SettleOutcome)> {
    if jobs.is_empty() {
        return Vec::new();
    }
    let writings = jobs.iter().map(|(job, then)| {
        let ways = &desk.ways[job.taken.feed as usize];
        match then {
            Then::Back(notes) => (Arc::clone(&ways.back), codec::encode(job.delivery.message(), Some(*notes))),
            Then::Letter(verdict) => {
                (Arc::clone(&ways.letters), dead_letter::encode(&job.delivery, verdict, &job.taken))
            }
        }
    });
    let written = desk.topology.write(writings.collect(), deadline, "settle").await;
    let (mut outcomes, mut stored) = (Vec::new(), Vec::with_capacity(jobs.len()));
    for ((job, then), written) in jobs.into_iter().zip(written) {
        match written {
            Ok(()) => stored.push(job),
            Err(error) => {
                desk.shared.unsettled(job.taken.key);
                let what = if matches!(then, Then::Letter(_)) { "dead letter" } else { "copy that comes back" };
                let error =
                    Error::new(error.kind(), "settle", format!("the {what} is not stored: {}", error.message()))
                        .with_effect(error.effect())
                        .with_retry(error.retry());
                outcomes.push((job.index, Err(SettleError::new(job.delivery, error))));
            }
        }
    }
    outcomes.extend(ack(desk, stored, deadline).await);
    outcomes
}

/// Stores that messages failed which keep their place.
async fn note(
    desk: &Arc<Desk>,
    noted: Vec<(usize, Delivery, Failing)>,
    deadline: Instant,
) -> Vec<(usize, SettleOutcome)> {
    let told = desk.store_failures(noted.iter().map(|(_, _, failing)| failing), deadline).await;
    let conclude = |((index, delivery, failing), told): ((usize, Delivery, Failing), Result<()>)| {
        let outcome = match told {
            Ok(()) if desk.shared.failed(&failing) => Ok(AckLevel::Confirmed),
            Ok(()) => Err(stale_unknown(delivery)),
            Err(error) => {
                desk.shared.unfailed(failing.key);
                let text = format!("the failure is not stored: {}", error.message());
                let error =
                    Error::new(error.kind(), "settle", text).with_effect(error.effect()).with_retry(error.retry());
                Err(SettleError::new(delivery, error))
            }
        };
        (index, outcome)
    };
    noted.into_iter().zip(told).map(conclude).collect()
}

/// Acks at the broker, and waits for its confirmations.
async fn ack(desk: &Arc<Desk>, jobs: Vec<Job>, deadline: Instant) -> Vec<(usize, SettleOutcome)> {
    let mut shares: Vec<(Attachment, Vec<Job>)> = Vec::with_capacity(1);
    let mut outcomes = Vec::with_capacity(jobs.len());
    for job in jobs {
        if job.taken.siblings.as_ref().is_some_and(|siblings| !is_last(siblings)) {
            // The broker acks the entry of a batch as a whole, with the last of its messages.
            let was_here = desk.shared.settled(job.taken.key);
            outcomes.push((job.index, if was_here { Ok(AckLevel::Recorded) } else { Err(stale(job.delivery)) }));
            continue;
        }
        let attached = &job.taken.attached;
        match shares.iter_mut().find(|(other, share)| is_same(other, attached) && share.len() < ACKS) {
            Some((_, share)) => share.push(job),
            None => shares.push((attached.clone(), vec![job])),
        }
    }
    let acking = shares.into_iter().map(|((conn, consumer), share)| async move {
        let ids = share.iter().map(|job| entry_id(&job.taken.id)).collect();
        let told = tokio::time::timeout_at(deadline, tell_while_there(&conn, consumer, ids)).await;
        let told = told.unwrap_or_else(|_| Err(late("settle")));
        share.into_iter().map(|job| (job.index, conclude(desk, job, &told))).collect::<Vec<_>>()
    });
    outcomes.extend(join_all(acking).await.into_iter().flatten());
    desk.shared.room.notify_waiters();
    outcomes
}

fn conclude(desk: &Desk, job: Job, told: &Result<()>) -> SettleOutcome {
    match told {
        Ok(()) => {
            desk.shared.settled(job.taken.key);
            Ok(AckLevel::Confirmed)
        }
        Err(error) if desk.shared.has(job.taken.key) => {
            if let Some(siblings) = &job.taken.siblings {
                siblings.fetch_add(1, Ordering::AcqRel);
            }
            desk.shared.unsettled(job.taken.key);
            let error = error.duplicate().with("group", job.delivery.group()).with("id", job.delivery.message().id());
            Err(SettleError::new(job.delivery, error))
        }
        Err(_) => Err(stale_unknown(job.delivery)),
    }
}

fn is_same(one: &Attachment, other: &Attachment) -> bool {
    one.1 == other.1 && Arc::ptr_eq(&one.0, &other.0)
}

fn is_last(siblings: &Siblings) -> bool {
    siblings.fetch_sub(1, Ordering::AcqRel) == 1
}

/// The id of the entry, whatever message of it.
pub(crate) fn entry_id(id: &MessageIdData) -> MessageIdData {
    MessageIdData { ledger_id: id.ledger_id, entry_id: id.entry_id, partition: id.partition, ..Default::default() }
}

/// Acks entries, and waits for the broker's receipt. The caller bounds the time.
pub(crate) async fn tell(
    conn: &Conn,
    consumer_id: u64,
    message_id: Vec<MessageIdData>,
    operation: &'static str,
) -> Result<()> {
    let ack = |request_id| BaseCommand {
        ack: Some(proto::CommandAck {
            consumer_id,
            ack_type: AckType::Individual as i32,
            message_id,
            request_id: Some(request_id),
            ..Default::default()
        }),
        ..command(Type::Ack)
    };
    let answer = conn.ask(operation, ack).await?;
    match answer.ack_response {
        Some(response) => match response.error {
            Some(code) => Err(refused(operation, code, response.message())),
            None => Ok(()),
        },
        None => Err(Error::new(ErrorKind::Unexpected, operation, "an ack was answered by something else")),
    }
}

/// Acks entries as long as their consumer is there: brokers answer nothing to an ack of one that they have closed (`handleAck`,
/// ServerCnx.java).
async fn tell_while_there(conn: &Conn, consumer: u64, ids: Vec<MessageIdData>) -> Result<()> {
    tokio::select! {
        biased;
        told = tell(conn, consumer, ids, "settle") => told,
        () = conn.consumer_lost(consumer) => {
            Err(Error::new(ErrorKind::StaleDelivery, "settle", LOST).with_effect(Effect::Unknown))
        }
    }
}

impl Desk {
    /// Stores that messages failed in their places, those of one destination together.
    pub(crate) async fn store_failures<'f>(
        &self,
        failing: impl Iterator<Item = &'f Failing>,
        deadline: Instant,
    ) -> Vec<Result<()>> {
        let (mut shares, mut outcomes): (Vec<(_, Vec<_>)>, Vec<_>) = Default::default();
        for (index, failing) in failing.enumerate() {
            let gone = || Error::new(ErrorKind::Unexpected, "settle", "failures are not kept for this topic");
            outcomes.push(Err(gone()));
            let Some(of) = &self.hand_overs[failing.feed as usize] else { continue };
            match shares.iter_mut().find(|(other, share)| Arc::ptr_eq(other, of) && share.len() < NOTED) {
                Some((_, share)) => share.push((index, failing)),
                None => shares.push((Arc::clone(of), vec![(index, failing)])),
            }
        }
        let storing = shares.into_iter().map(|(of, share)| async move {
            let told = of.fail(share.iter().map(|(_, failing)| *failing), deadline).await;
            share
                .into_iter()
                .map(|(index, _)| (index, told.as_ref().map_err(Error::duplicate).copied()))
                .collect::<Vec<_>>()
        });
        for (index, told) in join_all(storing).await.into_iter().flatten() {
            outcomes[index] = told;
        }
        outcomes
    }

    /// Gives messages back to the broker, for any member of the group.
    pub(crate) fn give_back(returned: Returned) {
        let mut shares: Vec<(Attachment, Vec<MessageIdData>)> = Vec::new();
        for (by, id) in returned {
            match shares.iter_mut().find(|(other, _)| is_same(other, &by)) {
                Some((_, share)) => share.push(id),
                None => shares.push((by, vec![id])),
            }
        }
        for ((conn, consumer_id), message_ids) in shares {
            let redeliver =
                proto::CommandRedeliverUnacknowledgedMessages { consumer_id, message_ids, ..Default::default() };
            conn.tell(BaseCommand {
                redeliver_unacknowledged_messages: Some(redeliver),
                ..command(Type::RedeliverUnacknowledgedMessages)
            });
        }
    }
}

impl Topology {
    /// Stores messages, many at a time, and waits for their receipts.
    pub(crate) async fn write(
        &self,
        writings: Vec<(Arc<Producer>, Payload)>,
        deadline: Instant,
        operation: &'static str,
    ) -> Vec<Result<()>> {
        let batch = Batch::new(writings.len());
        let mut failed: Vec<(Arc<Producer>, Error)> = Vec::new();
        for (index, (producer, payload)) in writings.into_iter().enumerate() {
            if let Some((_, error)) = failed.iter().find(|(other, _)| Arc::ptr_eq(other, &producer)) {
                batch.set(index, Err(error.duplicate()));
                continue;
            }
            let opened = tokio::time::timeout_at(deadline, self.open(&producer, operation)).await;
            if let Err(error) = opened.unwrap_or_else(|_| Err(late(operation).with_effect(Effect::NotDone))) {
                batch.set(index, Err(error.duplicate()));
                failed.push((producer, error));
                continue;
            }
            let weight = weight(payload.data.len());
            if !self.window.enter(weight, deadline).await {
                let text = "too much stayed on its way: the broker does not take messages";
                batch.set(index, Err(Error::new(ErrorKind::RateLimited, operation, text)));
                continue;
            }
            if let Err(error) = producer.send(payload, weight, &batch, index, None) {
                batch.set(index, Err(error));
            }
        }
        batch.wait(deadline, || late(operation)).await.into_iter().map(|outcome| outcome.map(drop)).collect()
    }

    /// Opens the producer of a topic that must exist.
    async fn open(&self, producer: &Arc<Producer>, operation: &'static str) -> Result<()> {
        if producer.is_open() {
            return Ok(());
        }
        if self.admin.partitions(operation, producer.local()).await?.is_none() {
            return Err(
                Error::new(ErrorKind::NotFound, operation, "the group was deleted").with("topic", producer.local())
            );
        }
        producer.open(&self.link, operation).await
    }
}

fn stale(delivery: Delivery) -> SettleError {
    let text = "its lease or its consumer has ended; the message comes back, here or at another member";
    let error = Error::new(ErrorKind::StaleDelivery, "settle", text)
        .with("group", delivery.group())
        .with("id", delivery.message().id());
    SettleError::new(delivery, error)
}

fn stale_unknown(delivery: Delivery) -> SettleError {
    let error = Error::new(ErrorKind::StaleDelivery, "settle", LOST)
        .with_effect(Effect::Unknown)
        .with("group", delivery.group())
        .with("id", delivery.message().id());
    SettleError::new(delivery, error)
}

#[cfg(test)]
mod tests {
    use pulsar::message::Message;

    use super::*;

    #[tokio::test]
    async fn an_ack_of_a_consumer_that_the_broker_closes_is_not_waited_for() {
        let conn = Arc::new(Conn::new(None));
        let _inbound = conn.add_consumer(1);
        let acking = tokio::spawn({
            let conn = Arc::clone(&conn);
            async move { tell_while_there(&conn, 1, Vec::new()).await }
        });
        tokio::task::yield_now().await;
        assert!(!acking.is_finished());
        let close = proto::CommandCloseConsumer { consumer_id: 1, ..Default::default() };
        let command = BaseCommand { close_consumer: Some(close), ..command(Type::CloseConsumer) };
        conn.take_in(Message { command, payload: None });
        let told = tokio::time::timeout(Duration::from_secs(60), acking).await;
        let error = told.expect("nothing else ends it").expect("it does not panic").expect_err("nobody confirmed");
        assert_eq!((error.kind(), error.effect()), (ErrorKind::StaleDelivery, Effect::Unknown));
    }
}
