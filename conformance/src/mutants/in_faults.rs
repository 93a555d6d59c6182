//! Mutants that are as they should be until a connection is lost.

use std::sync::Arc;

use anybroker_core::{
    Broker, Confirms, Effect, Message, PublishTerms, Receipt, SettleError, SettleOutcome, Settlement, Settling,
};
use async_trait::async_trait;

use super::Mutant;
use super::tampered::{Entries, Fault, Inner};

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "unknown-publish-is-done",
        fault: "a publish whose confirm was lost answers Ok",
        killed_by: "faults/connections-cut-while-publishing-lose-nothing-that-was-confirmed",
        make: || Arc::new(UnknownIs(true)),
    },
    Mutant {
        name: "unknown-publish-is-not-done",
        fault: "a publish whose confirm was lost answers that it is certainly not stored",
        killed_by: "faults/answers-that-are-lost-leave-outcomes-unknown-and-lose-nothing",
        make: || Arc::new(UnknownIs(false)),
    },
    Mutant {
        name: "unknown-burial-is-not-done",
        fault: "a burial whose answer was lost is told as one that certainly made no letter",
        killed_by: "faults/a-mixed-schedule-buries-what-is-to-be-buried-and-loses-nothing",
        make: || Arc::new(UnknownBurial),
    },
];

/// What becomes of an unknown outcome: done, or not done.
struct UnknownIs(bool);

#[async_trait]
impl Fault for UnknownIs {
    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let is_done = self.0;
        let outcomes = broker.publish(batch, terms).await.await.into_iter().map(|outcome| match outcome {
            Err(error) if error.effect() == Effect::Unknown => match is_done {
                true => Ok(Receipt { position: None, duplicate: false }),
                false => Err(error.with_effect(Effect::NotDone)),
            },
            outcome => outcome,
        });
        Confirms::ready(outcomes.collect())
    }
}

struct UnknownBurial;

impl Fault for UnknownBurial {
    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        let is_burial: Vec<bool> =
            batch.iter().map(|(_, settlement)| matches!(settlement, Settlement::DeadLetter(_))).collect();
        let settling = inner.settler.settle(batch);
        Settling::waiting(async move {
            let told = |(outcome, is_burial): (SettleOutcome, bool)| match outcome {
                Err(failed) if is_burial && failed.error().effect() == Effect::Unknown => {
                    let (delivery, error) = failed.into_parts();
                    Err(SettleError::new(delivery, error.with_effect(Effect::NotDone)))
                }
                outcome => outcome,
            };
            settling.await.into_iter().zip(is_burial).map(told).collect()
        })
    }
}
