//! Mutants that publish and keep dead letters wrongly.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anybroker_core::{
    Broker, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Destination, Group, Headers, Lag, Message,
    PublishOptions, PublishOrder, PublishTerms, Receipt, Result,
};
use async_trait::async_trait;

use super::Mutant;
use super::tampered::Fault;

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "swallow-publish-error",
        fault: "a publish that fails answers Ok",
        killed_by: "publish/a-client-that-creates-nothing-finds-no-missing-destination",
        make: || Arc::new(SwallowPublishError),
    },
    Mutant {
        name: "ok-before-confirm",
        fault: "now and then a message is confirmed and not stored",
        killed_by: "delivery/concurrent-publishers-lose-nothing",
        make: || Arc::new(OkBeforeConfirm(AtomicU64::new(0))),
    },
    Mutant {
        name: "publishes-twice",
        fault: "now and then a message is stored twice",
        killed_by: "delivery/a-fresh-client-gets-what-was-stored-before-it-came",
        make: || Arc::new(PublishesTwice(AtomicU64::new(0))),
    },
    Mutant {
        name: "receipts-shifted",
        fault: "a receipt tells the position of its neighbour in the batch",
        killed_by: "delivery/what-is-published-arrives-once-and-unchanged",
        make: || Arc::new(ReceiptsShifted),
    },
    Mutant {
        name: "publish-on-poll",
        fault: "a batch is handed over when its confirms are polled, not in the call",
        killed_by: "publish/a-dropped-confirm-loses-only-its-answer",
        make: || Arc::new(PublishOnPoll),
    },
    Mutant {
        name: "delay-ignored",
        fault: "a delayed publish is not held back",
        killed_by: "time/a-delayed-publish-is-never-early",
        make: || {
            Arc::new(Publishes(|message| match message.ttl() {
                Some(ttl) => message.without_instructions().with_ttl(ttl),
                None => message.without_instructions(),
            }))
        },
    },
    Mutant {
        name: "ttl-ignored",
        fault: "nothing ever expires",
        killed_by: "time/what-is-not-settled-within-its-time-to-live-becomes-a-dead-letter",
        make: || {
            Arc::new(Publishes(|message| match message.delay() {
                Some(delay) => message.without_instructions().with_delay(delay),
                None => message.without_instructions(),
            }))
        },
    },
    Mutant {
        name: "dlq-drops-metadata",
        fault: "a dead letter has lost its headers",
        killed_by: "dead-letter/a-letter-holds-the-message-untouched-and-why-it-died",
        make: || Arc::new(DlqDropsMetadata),
    },
    Mutant {
        name: "letters-listed-twice",
        fault: "each letter is listed twice",
        killed_by: "dead-letter/letters-are-listed-oldest-first-and-paged-without-gaps",
        make: || Arc::new(ListedTwice),
    },
    Mutant {
        name: "redrive-to-all-groups",
        fault: "a redrive publishes the message again, to every group",
        killed_by: "dead-letter/a-redrive-returns-only-to-the-group-that-failed-at-attempt-one-with-its-id",
        make: || Arc::new(RedriveToAll),
    },
    Mutant {
        name: "redrive-keeps-the-letter",
        fault: "a redriven letter stays among the dead",
        killed_by: "dead-letter/a-redrive-returns-only-to-the-group-that-failed-at-attempt-one-with-its-id",
        make: || Arc::new(RedriveNoOp),
    },
    Mutant {
        name: "purge-no-op",
        fault: "purging answers Ok and does nothing",
        killed_by: "dead-letter/a-purge-deletes-what-it-chooses-for-good",
        make: || Arc::new(PurgeNoOp),
    },
    Mutant {
        name: "delete-no-op",
        fault: "deleting answers Ok and does nothing",
        killed_by: "topology/a-deleted-group-is-gone-and-others-stay",
        make: || Arc::new(DeleteNoOp),
    },
    Mutant {
        name: "lag-counts-unsettled-as-ready",
        fault: "lag tells what is in flight as ready",
        killed_by: "lag/the-figures-equal-what-is-known",
        make: || Arc::new(LagWrong),
    },
];

fn terms() -> PublishTerms {
    PublishTerms { timeout: Duration::from_secs(10), order: PublishOrder::None, options: PublishOptions::default() }
}

struct Publishes(fn(Message) -> Message);

#[async_trait]
impl Fault for Publishes {
    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        broker.publish(batch.into_iter().map(self.0).collect(), terms).await
    }
}

const STORED: Receipt = Receipt { position: None, duplicate: false };

struct SwallowPublishError;

#[async_trait]
impl Fault for SwallowPublishError {
    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let outcomes = broker.publish(batch, terms).await.await;
        Confirms::ready(outcomes.into_iter().map(|outcome| Ok(outcome.unwrap_or(STORED))).collect())
    }
}

struct OkBeforeConfirm(AtomicU64);

#[async_trait]
impl Fault for OkBeforeConfirm {
    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let count = batch.len();
        let stored = batch.into_iter().filter(|_| self.0.fetch_add(1, Ordering::Relaxed) % 50 != 49).collect();
        drop(broker.publish(stored, terms).await.await);
        Confirms::ready((0..count).map(|_| Ok(STORED)).collect())
    }
}

struct PublishesTwice(AtomicU64);

#[async_trait]
impl Fault for PublishesTwice {
    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let again: Vec<_> = batch.iter().filter(|_| self.0.fetch_add(1, Ordering::Relaxed) % 5 == 4).cloned().collect();
        let outcomes = broker.publish(batch, terms.clone()).await.await;
        drop(broker.publish(again, terms).await.await);
        Confirms::ready(outcomes)
    }
}

struct ReceiptsShifted;

#[async_trait]
impl Fault for ReceiptsShifted {
    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let mut outcomes = broker.publish(batch, terms).await.await;
        outcomes.rotate_left(1);
        Confirms::ready(outcomes)
    }
}

struct PublishOnPoll;

#[async_trait]
impl Fault for PublishOnPoll {
    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let broker = Arc::clone(broker);
        Confirms::waiting(async move { broker.publish(batch, terms).await.await })
    }
}

struct DlqDropsMetadata;

#[async_trait]
impl Fault for DlqDropsMetadata {
    async fn dead_letters(
        &self,
        broker: &Arc<dyn Broker>,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let mut page = broker.dead_letters(scope, from, max).await?;
        for letter in &mut page.letters {
            letter.message = letter.message.clone().with_headers(Headers::new());
        }
        Ok(page)
    }
}

struct ListedTwice;

#[async_trait]
impl Fault for ListedTwice {
    async fn dead_letters(
        &self,
        broker: &Arc<dyn Broker>,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let page = broker.dead_letters(scope, from, max.div_ceil(2)).await?;
        let letters = page.letters.into_iter().flat_map(|letter| [letter.clone(), letter]).take(max).collect();
        Ok(DeadLetterPage { letters, next: page.next })
    }
}

struct RedriveToAll;

#[async_trait]
impl Fault for RedriveToAll {
    async fn redrive(
        &self,
        broker: &Arc<dyn Broker>,
        scope: &DeadLetterScope,
        ids: &[DeadLetterId],
    ) -> Vec<Result<()>> {
        let Ok(page) = broker.dead_letters(scope, None, 10_000).await else { return Vec::new() };
        let letters = page.letters.into_iter().filter(|letter| ids.contains(&letter.id));
        drop(broker.publish(letters.map(|letter| letter.message).collect(), terms()).await.await);
        broker.purge(scope, ids).await
    }
}

struct RedriveNoOp;

#[async_trait]
impl Fault for RedriveNoOp {
    async fn redrive(
        &self,
        broker: &Arc<dyn Broker>,
        scope: &DeadLetterScope,
        ids: &[DeadLetterId],
    ) -> Vec<Result<()>> {
        let _ = (broker, scope);
        ids.iter().map(|_| Ok(())).collect()
    }
}

struct PurgeNoOp;

#[async_trait]
impl Fault for PurgeNoOp {
    async fn purge(&self, _: &Arc<dyn Broker>, _: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        ids.iter().map(|_| Ok(())).collect()
    }
}

struct DeleteNoOp;

#[async_trait]
impl Fault for DeleteNoOp {
    async fn delete(&self, _: &Arc<dyn Broker>, _: &Destination, _: Option<&Group>) -> Result<()> {
        Ok(())
    }
}

struct LagWrong;

#[async_trait]
impl Fault for LagWrong {
    async fn lag(&self, broker: &Arc<dyn Broker>, destination: &Destination, group: &Group) -> Result<Lag> {
        let mut lag = broker.lag(destination, group).await?;
        if let (Some((ready, _)), Some((in_flight, _))) = (&mut lag.ready, &mut lag.in_flight) {
            *ready += std::mem::take(in_flight);
        }
        Ok(lag)
    }
}
