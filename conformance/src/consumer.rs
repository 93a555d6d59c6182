//! Subscriptions that record, and the deliveries they bring.

use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, Error, ErrorKind, Message, Nack, Settlement, Subscriber, SubscriptionEvent, Verdict,
};
use futures_util::FutureExt;
use tokio::time::Instant;

use crate::case::{Breach, Proof, ensure};
use crate::client::Client;
use crate::env::Env;
use crate::history::{Seen, What, digest, micros};

/// A subscription that records.
pub(crate) struct Consumer<'e> {
    env: &'e Env,
    client: u32,
    pub(crate) subscription: u64,
    pub(crate) subscriber: Subscriber,
    /// Lanes that were taken away, or were about to be.
    pub(crate) lanes_lost: usize,
}

impl<'e> Consumer<'e> {
    pub(crate) fn new(env: &'e Env, client: u32, subscription: u64, subscriber: Subscriber) -> Self {
        Self { env, client, subscription, subscriber, lanes_lost: 0 }
    }

    fn record(&self, what: What) {
        self.env.history.record(self.client, what);
    }

    /// What a receive brings.
    pub(crate) async fn receive(&mut self, max: usize, wait: Duration) -> Proof<Vec<Held<'e>>> {
        Ok(self.try_receive(max, wait).await??)
    }

    pub(crate) async fn try_receive(&mut self, max: usize, wait: Duration) -> Proof<Result<Vec<Held<'e>>, Error>> {
        let deadline = Instant::now() + wait;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let received = match self.env.in_time("receive", left, self.subscriber.receive_all(max, left)).await? {
                Err(error) => return Ok(Err(error)),
                Ok(received) => received,
            };
            let subscription = self.subscription;
            for event in received.events {
                match event {
                    SubscriptionEvent::Assigned { lane, .. } => {
                        self.record(What::Assigned { subscription, lane: lane.index });
                    }
                    SubscriptionEvent::Revoking { lane, .. } | SubscriptionEvent::Lost { lane } => {
                        self.lanes_lost += 1;
                        self.record(What::LaneLost { subscription, lane: lane.index });
                    }
                    SubscriptionEvent::Degraded { .. } => self.record(What::Degraded { subscription }),
                    SubscriptionEvent::Recovered => self.record(What::Recovered { subscription }),
                    _ => {}
                }
            }
            if !received.deliveries.is_empty() || Instant::now() >= deadline {
                return Ok(Ok(received.deliveries.into_iter().map(|delivery| self.hold(delivery)).collect()));
            }
        }
    }

    fn hold(&self, delivery: Delivery) -> Held<'e> {
        let number = self.env.history.number();
        let (message, facts) = (delivery.message(), delivery.facts());
        let excerpt: Vec<u8> = message.bytes().iter().copied().take(160).collect();
        self.record(What::Deliver(Seen {
            delivery: number,
            subscription: self.subscription,
            id: message.id().clone(),
            destination: message.destination().clone(),
            digest: digest(message),
            attempt: facts.attempt,
            deliveries: facts.deliveries,
            lane: facts.lane.index,
            epoch: facts.lane.epoch,
            position: facts.position,
            excerpt: String::from_utf8_lossy(&excerpt).into_owned(),
        }));
        Held { env: self.env, client: self.client, number, delivery: Some(Box::new(delivery)) }
    }

    /// Exactly `count` deliveries, in the order they came.
    pub(crate) async fn take(&mut self, count: usize) -> Proof<Vec<Held<'e>>> {
        let deadline = Instant::now() + self.env.patience();
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            let more = self.receive(count - taken.len(), left).await?;
            if more.is_empty() && Instant::now() >= deadline {
                let ids: Vec<String> = taken.iter().map(|held: &Held<'_>| held.id()).collect();
                let patience = self.env.patience();
                return Err(Breach::Failed(format!(
                    "{} of {count} deliveries came within {patience:?}: {ids:?}",
                    taken.len()
                )));
            }
            taken.extend(more);
        }
        Ok(taken)
    }

    /// The next delivery.
    pub(crate) async fn one(&mut self) -> Proof<Held<'e>> {
        Ok(self.take(1).await?.remove(0))
    }

    /// Nothing comes for the quiet window. Not a proof by itself: a canary must follow.
    pub(crate) async fn silence(&mut self, why: &str) -> Proof {
        let quiet = self.env.quiet();
        let came = self.receive(10, quiet).await?;
        let ids: Vec<String> = came.iter().map(|held| format!("{} (attempt {})", held.id(), held.attempt())).collect();
        ensure!(came.is_empty(), "{why}: expected nothing for {quiet:?}, came {ids:?}");
        Ok(())
    }

    /// Nothing comes for the quiet window, and then a canary does: something could have come.
    pub(crate) async fn silence_then_canary(&mut self, client: &Client<'e>, why: &str) -> Proof {
        self.silence(why).await?;
        let destination = self.subscriber.spec().destinations[0].clone();
        let canary = client.message(&destination, "canary");
        let leased = self.env.now();
        client.publish_ok(vec![canary.clone()]).await?;
        let held = self.one().await?;
        let id = held.message().id().clone();
        ensure!(id == *canary.id(), "{why}: expected the canary next, came {id}");
        self.ack_in_time(held, leased).await
    }

    /// Acks a delivery that cannot have been leased before `leased`. On a machine that stood still for so long its lease
    /// may have ended in truth; then it comes again, and is acked then.
    pub(crate) async fn ack_in_time(&mut self, mut held: Held<'e>, leased: u64) -> Proof {
        let (id, lease) = (held.id(), self.subscriber.spec().lease);
        loop {
            let Err((_, error)) = held.settle(Settlement::Ack).await? else { return Ok(()) };
            if error.kind() != ErrorKind::StaleDelivery || !self.env.has_waited(leased, lease) {
                return Err(error.into());
            }
            held = self.one().await?;
            ensure!(held.id() == id, "the lease of {id} had ended, then came {}", held.id());
        }
    }

    /// Stops or resumes deliveries.
    pub(crate) async fn pause(&mut self, paused: bool) -> Proof {
        Ok(self.env.bounded("pause", self.subscriber.pause(paused)).await??)
    }

    /// Closes the subscription.
    pub(crate) async fn close(self) -> Proof {
        let grace = self.env.patience();
        Ok(self.try_close(grace).await??)
    }

    pub(crate) async fn try_close(self, grace: Duration) -> Proof<Result<(), Error>> {
        let Self { env, client, subscription, subscriber, .. } = self;
        env.history.record(client, What::CloseInvoke { subscription });
        let closed = env.bounded("close the subscription", subscriber.close(grace)).await?;
        env.history.record(client, What::Closed { subscription });
        Ok(closed)
    }

    /// Goes away without a close.
    pub(crate) fn vanish(self) {
        self.record(What::Vanished { subscription: self.subscription });
        drop(self.subscriber);
    }
}

/// A delivery in the hands of a case.
pub(crate) struct Held<'e> {
    env: &'e Env,
    client: u32,
    pub(crate) number: u64,
    /// Boxed, so that a failed settle is a small value.
    delivery: Option<Box<Delivery>>,
}

impl<'e> Held<'e> {
    pub(crate) fn delivery(&self) -> &Delivery {
        self.delivery.as_ref().expect("taken only by settling, which consumes it")
    }

    pub(crate) fn message(&self) -> &Message {
        self.delivery().message()
    }

    pub(crate) fn id(&self) -> String {
        self.message().id().to_string()
    }

    pub(crate) fn attempt(&self) -> u32 {
        self.delivery().attempt()
    }

    /// Acks; a failure fails the case.
    pub(crate) async fn ack(self) -> Proof {
        self.settle(Settlement::Ack).await?.map(drop).map_err(|(_, error)| error.into())
    }

    /// Nacks; a failure fails the case.
    pub(crate) async fn nack(self, delay: Duration) -> Proof {
        let nack = Nack { delay, error_type: None };
        self.settle(Settlement::Nack(nack)).await?.map(drop).map_err(|(_, error)| error.into())
    }

    /// Gives it back; a failure fails the case.
    pub(crate) async fn release(self) -> Proof {
        self.settle(Settlement::Release).await?.map(drop).map_err(|(_, error)| error.into())
    }

    /// Dead-letters; a failure fails the case.
    pub(crate) async fn dead_letter(self, verdict: Verdict) -> Proof {
        let settlement = Settlement::DeadLetter(Box::new(verdict));
        self.settle(settlement).await?.map(drop).map_err(|(_, error)| error.into())
    }

    pub(crate) async fn settle(self, settlement: Settlement) -> Proof<Settled<'e>> {
        Ok(settle(vec![(self, settlement)]).await?.remove(0))
    }

    /// Settles past the check layer, at the adapter itself, which must refuse what its record refuses; whether it did.
    pub(crate) async fn refused_by_adapter(mut self, settlement: Settlement) -> Proof<bool> {
        self.record(What::settle_invoke(self.number, &settlement));
        let delivery = *self.delivery.take().expect("held until settled");
        let outcome = self.env.bounded("settle", anybroker_core::settle_unchecked(delivery, settlement)).await?;
        match outcome {
            Ok(level) => {
                self.record(What::SettleOk { delivery: self.number, level });
                Ok(false)
            }
            Err(failed) => {
                let (delivery, error) = failed.into_parts();
                let (kind, effect) = (error.kind(), error.effect());
                self.record(What::SettleFail { delivery: self.number, kind, effect });
                self.delivery = Some(Box::new(delivery));
                self.ack().await?;
                Ok(true)
            }
        }
    }

    /// Hands an ack over and drops the answer, unpolled or polled once. Its effect is unknown to this client.
    pub(crate) async fn settle_and_forget(mut self, is_polled: bool) {
        let delivery = *self.delivery.take().expect("held until settled");
        self.record(What::settle_invoke(self.number, &Settlement::Ack));
        let settling = anybroker_core::settle(vec![(delivery, Settlement::Ack)]);
        if is_polled {
            drop(settling.now_or_never());
        } else {
            drop(settling);
        }
        tokio::task::yield_now().await;
    }

    /// Extends the lease; the answer is the case's to judge.
    pub(crate) async fn extend(&self, lease: Duration) -> Proof<Result<(), Error>> {
        let until = self.env.now() + micros(lease);
        let extended = self.env.bounded("extend", self.delivery().extend(lease)).await?;
        if extended.is_ok() {
            let what = What::Extended { delivery: self.number, until };
            self.env.history.record(self.client, what);
        }
        Ok(extended)
    }

    /// Keeps it out of the case's hands without dropping it, as a frozen process does.
    pub(crate) fn freeze(mut self) {
        std::mem::forget(self.delivery.take());
    }

    /// Acks it in a way that must fail; the delivery comes back with the error.
    pub(crate) async fn refused_in(
        mut self,
        settle: impl FnOnce((Delivery, Settlement)) -> anybroker_core::Settling,
    ) -> Proof<(Self, Error)> {
        self.record(What::settle_invoke(self.number, &Settlement::Ack));
        let delivery = *self.delivery.take().expect("held until settled");
        let settling = settle((delivery, Settlement::Ack));
        match self.env.bounded("settle", settling).await?.pop().expect("one outcome per entry") {
            Ok(level) => {
                self.record(What::SettleOk { delivery: self.number, level });
                Err(Breach::Failed("an ack that must be refused answers Ok".into()))
            }
            Err(failed) => {
                let (delivery, error) = failed.into_parts();
                let (kind, effect) = (error.kind(), error.effect());
                self.record(What::SettleFail { delivery: self.number, kind, effect });
                self.delivery = Some(Box::new(delivery));
                Ok((self, error))
            }
        }
    }

    /// The delivery itself, for who records what becomes of it.
    pub(crate) fn take(mut self) -> (u32, u64, Delivery) {
        (self.client, self.number, *self.delivery.take().expect("held until settled"))
    }

    fn record(&self, what: What) {
        self.env.history.record(self.client, what);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(delivery) = self.delivery.take() {
            self.record(What::Dropped { delivery: self.number });
            drop(delivery);
        }
    }
}

/// How one entry was settled: the level, or the delivery with the error.
pub(crate) type Settled<'e> = Result<AckLevel, (Held<'e>, Error)>;

/// Settles a batch: one outcome per entry.
pub(crate) async fn settle<'e>(batch: Vec<(Held<'e>, Settlement)>) -> Proof<Vec<Settled<'e>>> {
    let Some(env) = batch.first().map(|(held, _)| held.env) else {
        return Ok(Vec::new());
    };
    let mut handles = Vec::with_capacity(batch.len());
    let mut entries = Vec::with_capacity(batch.len());
    for (mut held, settlement) in batch {
        held.record(What::settle_invoke(held.number, &settlement));
        handles.push((held.client, held.number));
        entries.push((*held.delivery.take().expect("held until settled"), settlement));
    }
    let outcomes = env.bounded("settle", anybroker_core::settle(entries)).await?;
    ensure!(outcomes.len() == handles.len(), "{} outcomes for {} settlements", outcomes.len(), handles.len());
    let conclude = |((client, number), outcome): ((u32, u64), anybroker_core::SettleOutcome)| match outcome {
        Ok(level) => {
            env.history.record(client, What::SettleOk { delivery: number, level });
            Ok(level)
        }
        Err(failed) => {
            let (delivery, error) = failed.into_parts();
            let what = What::SettleFail { delivery: number, kind: error.kind(), effect: error.effect() };
            env.history.record(client, what);
            Err((Held { env, client, number, delivery: Some(Box::new(delivery)) }, error))
        }
    };
    Ok(handles.into_iter().zip(outcomes).map(conclude).collect())
}

/// Acks them all; a failure fails the case.
pub(crate) async fn ack_all(batch: Vec<Held<'_>>) -> Proof {
    for outcome in settle(batch.into_iter().map(|held| (held, Settlement::Ack)).collect()).await? {
        outcome.map_err(|(_, error)| Breach::from(error))?;
    }
    Ok(())
}

/// The ids of messages, in their order.
pub(crate) fn ids<'m>(messages: impl IntoIterator<Item = &'m Message>) -> Vec<String> {
    messages.into_iter().map(|message| message.id().to_string()).collect()
}

/// The ids of deliveries, in their order.
pub(crate) fn held_ids(held: &[Held<'_>]) -> Vec<String> {
    held.iter().map(Held::id).collect()
}

/// Ids whose order means nothing.
pub(crate) fn sorted(mut ids: Vec<String>) -> Vec<String> {
    ids.sort_unstable();
    ids
}
