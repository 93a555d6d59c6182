//! Mutants that settle wrongly.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, DeliveryFacts, ErrorKind, Lane, Nack, Received, Result, Settlement, Settling, Token,
};
use async_trait::async_trait;
use parking_lot::Mutex;

use super::Mutant;
use super::tampered::{Entries, Fault, Inner, Tap};

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "drop-on-nack",
        fault: "a nack acks",
        killed_by: "redelivery/a-nacked-message-comes-back-with-the-next-attempt",
        make: || {
            Arc::new(Settles(|settlement| match settlement {
                Settlement::Nack(_) => Settlement::Ack,
                other => other,
            }))
        },
    },
    Mutant {
        name: "ack-before-dead-letter",
        fault: "the source is acked, and the dead letter is then not stored",
        killed_by: "dead-letter/a-letter-is-readable-when-its-settle-has-returned",
        make: || {
            Arc::new(Settles(|settlement| match settlement {
                Settlement::DeadLetter(_) => Settlement::Ack,
                other => other,
            }))
        },
    },
    Mutant {
        name: "early-delay",
        fault: "a nack's delay is halved",
        killed_by: "redelivery/a-delayed-nack-is-never-early",
        make: || {
            Arc::new(Settles(|settlement| match settlement {
                Settlement::Nack(nack) => Settlement::Nack(Nack { delay: nack.delay / 2, ..nack }),
                other => other,
            }))
        },
    },
    Mutant {
        name: "release-counts-as-attempt",
        fault: "giving back is a nack",
        killed_by: "settle/what-was-released-comes-back-with-the-same-attempt",
        make: || {
            Arc::new(Settles(|settlement| match settlement {
                Settlement::Release => Settlement::Nack(Nack::default()),
                other => other,
            }))
        },
    },
    Mutant {
        name: "verdict-loses-error-type",
        fault: "the class of the failure is not kept",
        killed_by: "dead-letter/the-last-failure-is-what-the-letter-tells",
        make: || {
            Arc::new(Settles(|settlement| match settlement {
                Settlement::DeadLetter(mut verdict) => {
                    verdict.error_type = None;
                    Settlement::DeadLetter(verdict)
                }
                other => other,
            }))
        },
    },
    Mutant {
        name: "ack-on-drop",
        fault: "a delivery that is dropped unsettled is acked",
        killed_by: "settle/what-was-dropped-unsettled-comes-back-uncounted",
        make: || Arc::new(AckOnDrop),
    },
    Mutant {
        name: "drop-is-a-nack",
        fault: "a delivery that is dropped unsettled counts as a failure",
        killed_by: "settle/what-was-dropped-unsettled-comes-back-uncounted",
        make: || Arc::new(NackOnDrop),
    },
    Mutant {
        name: "commit-highest",
        fault: "an ack settles everything that was delivered before as well",
        killed_by: "lifecycle/an-ack-hole-before-a-close-brings-back-the-hole-or-the-rest-of-its-lane",
        make: || Arc::new(CommitHighest::default()),
    },
    Mutant {
        name: "forget-ack-on-close",
        fault: "acks are sent with the next settle, and at a close the last are forgotten",
        killed_by: "lifecycle/what-was-acked-right-before-a-close-is-not-redelivered-and-the-rest-is",
        make: || Arc::new(ForgetAckOnClose::default()),
    },
    Mutant {
        name: "nack-all-on-close",
        fault: "a close nacks what is unsettled",
        killed_by: "lifecycle/what-a-close-gives-back-is-not-counted-as-an-attempt",
        make: || Arc::new(NackAllOnClose::default()),
    },
    Mutant {
        name: "hang-on-close",
        fault: "a close never ends",
        killed_by: "lifecycle/prefetched-messages-go-back-at-a-close",
        make: || Arc::new(HangOnClose),
    },
    Mutant {
        name: "stale-ack-accepted",
        fault: "a settle that is refused as stale answers Ok",
        killed_by: "lease/a-late-ack-is-refused-as-stale-or-accepted-as-the-record-says",
        make: || Arc::new(StaleAccepted),
    },
    Mutant {
        name: "batch-tail-ignored",
        fault: "of a settle batch only ten entries are sent; the rest answers Ok",
        killed_by: "lifecycle/what-was-acked-right-before-a-close-is-not-redelivered-and-the-rest-is",
        make: || Arc::new(BatchTailIgnored),
    },
    Mutant {
        name: "ack-acks-its-whole-batch",
        fault: "settling one delivery acks those that were received with it",
        killed_by: "settle/nacking-one-of-a-published-batch-brings-back-only-that-one",
        make: || Arc::new(BatchIsAckUnit::default()),
    },
    Mutant {
        name: "settle-on-poll",
        fault: "a settle is handed over when its answer is polled, not in the call",
        killed_by: "settle/a-dropped-settle-still-settles",
        make: || Arc::new(SettleOnPoll),
    },
    Mutant {
        name: "extends-once",
        fault: "a lease is extended once; later extensions answer Ok and do nothing",
        killed_by: "long/a-delivery-is-kept-for-as-long-as-it-is-extended",
        make: || Arc::new(ExtendsOnce(AtomicBool::new(false))),
    },
    Mutant {
        name: "extend-no-op",
        fault: "extending a lease answers Ok and does nothing",
        killed_by: "lease/an-extended-lease-holds",
        make: || Arc::new(ExtendNoOp),
    },
    Mutant {
        name: "off-by-one",
        fault: "a message has one attempt more than its limit",
        killed_by: "redelivery/a-failing-message-is-seen-exactly-n-times-then-is-one-dead-letter",
        make: || Arc::new(OffByOne),
    },
];

/// Turns settlements into others.
struct Settles(fn(Settlement) -> Settlement);

impl Fault for Settles {
    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        let change = |(delivery, settlement)| (delivery, (self.0)(settlement));
        inner.settler.settle(batch.into_iter().map(change).collect())
    }
}

fn facts(token: &Token, lane: Lane) -> DeliveryFacts {
    DeliveryFacts { lane, ..DeliveryFacts::new(token.clone()) }
}

struct AckOnDrop;

impl Fault for AckOnDrop {
    fn abandoned(&self, inner: &Inner, token: &Token, lane: Lane) {
        inner.settle_quietly(facts(token, lane), Settlement::Ack);
    }
}

struct NackOnDrop;

impl Fault for NackOnDrop {
    fn abandoned(&self, inner: &Inner, token: &Token, lane: Lane) {
        inner.settle_quietly(facts(token, lane), Settlement::Nack(Nack::default()));
    }
}

/// What each subscription has handed out and not settled, in the order it was handed out.
#[derive(Default)]
struct Outstanding(Mutex<HashMap<u64, Vec<DeliveryFacts>>>);

impl Outstanding {
    fn handed_out(&self, number: u64, deliveries: &[Delivery]) {
        self.0.lock().entry(number).or_default().extend(deliveries.iter().map(|delivery| delivery.facts().clone()));
    }

    /// Forgets one, and tells what was handed out before it.
    fn settled(&self, number: u64, token: &Token) -> Vec<DeliveryFacts> {
        let mut all = self.0.lock();
        let mine = all.entry(number).or_default();
        match mine.iter().position(|facts| facts.token == *token) {
            Some(place) => {
                mine.remove(place);
                mine[..place].to_vec()
            }
            None => Vec::new(),
        }
    }

    fn take(&self, number: u64) -> Vec<DeliveryFacts> {
        self.0.lock().remove(&number).unwrap_or_default()
    }
}

#[derive(Default)]
struct CommitHighest(Outstanding);

#[async_trait]
impl Fault for CommitHighest {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let received = tap.inner.receive(max, wait).await?;
        self.0.handed_out(tap.side.number, &received.deliveries);
        Ok(received)
    }

    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        for (delivery, settlement) in &batch {
            let below = self.0.settled(inner.number, delivery.token());
            if matches!(settlement, Settlement::Ack) {
                for facts in below {
                    inner.settle_quietly(facts, Settlement::Ack);
                }
            }
        }
        inner.settler.settle(batch)
    }
}

#[derive(Default)]
struct NackAllOnClose(Outstanding);

#[async_trait]
impl Fault for NackAllOnClose {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let received = tap.inner.receive(max, wait).await?;
        self.0.handed_out(tap.side.number, &received.deliveries);
        Ok(received)
    }

    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        for (delivery, _) in &batch {
            self.0.settled(inner.number, delivery.token());
        }
        inner.settler.settle(batch)
    }

    async fn closing(&self, inner: &Inner) {
        for facts in self.0.take(inner.number) {
            inner.settle_quietly(facts, Settlement::Nack(Nack::default()));
        }
    }
}

struct HangOnClose;

#[async_trait]
impl Fault for HangOnClose {
    async fn closing(&self, _: &Inner) {
        std::future::pending::<()>().await;
    }
}

#[derive(Default)]
struct BatchIsAckUnit(Mutex<HashMap<u64, Vec<DeliveryFacts>>>);

#[async_trait]
impl Fault for BatchIsAckUnit {
    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        let received = tap.inner.receive(max, wait).await?;
        if !received.deliveries.is_empty() {
            let batch = received.deliveries.iter().map(|delivery| delivery.facts().clone()).collect();
            self.0.lock().insert(tap.side.number, batch);
        }
        Ok(received)
    }

    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        if batch.iter().any(|(_, settlement)| matches!(settlement, Settlement::Ack)) {
            for facts in self.0.lock().remove(&inner.number).unwrap_or_default() {
                if batch.iter().all(|(delivery, _)| *delivery.token() != facts.token) {
                    inner.settle_quietly(facts, Settlement::Ack);
                }
            }
        }
        inner.settler.settle(batch)
    }
}

#[derive(Default)]
struct ForgetAckOnClose(Mutex<HashMap<u64, Entries>>);

#[async_trait]
impl Fault for ForgetAckOnClose {
    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        let waiting = self.0.lock().remove(&inner.number).unwrap_or_default();
        drop(inner.settler.settle(waiting));
        if batch.iter().all(|(_, settlement)| matches!(settlement, Settlement::Ack)) {
            let answers = batch.iter().map(|_| Ok(AckLevel::Confirmed)).collect();
            self.0.lock().insert(inner.number, batch);
            return Settling::ready(answers);
        }
        inner.settler.settle(batch)
    }

    async fn closing(&self, inner: &Inner) {
        self.0.lock().remove(&inner.number);
    }
}

struct StaleAccepted;

impl Fault for StaleAccepted {
    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        let settling = inner.settler.settle(batch);
        Settling::waiting(async move {
            let accept = |outcome: anybroker_core::SettleOutcome| match outcome {
                Err(failed) if failed.error().kind() == ErrorKind::StaleDelivery => Ok(AckLevel::Confirmed),
                outcome => outcome,
            };
            settling.await.into_iter().map(accept).collect()
        })
    }
}

struct SettleOnPoll;

impl Fault for SettleOnPoll {
    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        let settler = Arc::clone(&inner.settler);
        Settling::waiting(async move { settler.settle(batch).await })
    }
}

struct BatchTailIgnored;

impl Fault for BatchTailIgnored {
    fn settle(&self, inner: &Inner, mut batch: Entries) -> Settling {
        let tail = batch.split_off(batch.len().min(10));
        let settling = inner.settler.settle(batch);
        let ignored = tail.len();
        Settling::waiting(async move {
            let mut outcomes = settling.await;
            outcomes.extend((0..ignored).map(|_| Ok(AckLevel::Confirmed)));
            outcomes
        })
    }
}

struct ExtendNoOp;

#[async_trait]
impl Fault for ExtendNoOp {
    async fn extend(&self, _: &Inner, deliveries: &[&Delivery], _: Duration) -> Vec<Result<()>> {
        deliveries.iter().map(|_| Ok(())).collect()
    }
}

struct ExtendsOnce(AtomicBool);

#[async_trait]
impl Fault for ExtendsOnce {
    async fn extend(&self, inner: &Inner, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        if self.0.swap(true, Ordering::Relaxed) {
            return deliveries.iter().map(|_| Ok(())).collect();
        }
        inner.settler.extend(deliveries, lease).await
    }
}

struct OffByOne;

impl Fault for OffByOne {
    fn max_attempts(&self, max_attempts: Option<u32>) -> Option<u32> {
        max_attempts.map(|max| max + 1)
    }
}
