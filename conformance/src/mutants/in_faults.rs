//! Mutants that only cases about faults can tell from the real one: as they should be until a connection is lost, or until many things
//! happen at once.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Broker, Confirms, Effect, Message, PublishTerms, Receipt, Settlement, Settling};
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
        name: "delays-are-lost-in-batches",
        fault: "of several failures that are told at once only the first is held back",
        killed_by: "faults/a-mixed-schedule-buries-what-is-to-be-buried-and-loses-nothing",
        make: || Arc::new(OnlyTheFirstIsHeldBack),
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

struct OnlyTheFirstIsHeldBack;

impl Fault for OnlyTheFirstIsHeldBack {
    fn settle(&self, inner: &Inner, mut batch: Entries) -> Settling {
        let nacks = batch.iter_mut().filter_map(|(_, settlement)| match settlement {
            Settlement::Nack(nack) => Some(nack),
            _ => None,
        });
        nacks.skip(1).for_each(|nack| nack.delay = Duration::ZERO);
        inner.settler.settle(batch)
    }
}
