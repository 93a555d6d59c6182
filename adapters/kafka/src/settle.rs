//! Settling: acks move a partition's prefix, failures are held back in memory, dead letters are stored first.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, Error, ErrorKind, Lane, Result, SettleError, SettleOutcome, Settlement, Settler, Settling,
    Token, Verdict,
};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::dead_letter;
use crate::names;
use crate::publisher::{Answers, Publisher};
use crate::state::Shared;

/// How long a dead letter may take to be stored.
const LETTER: Duration = Duration::from_secs(30);

pub(crate) struct KafkaSettler {
    pub(crate) shared: Arc<Shared>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) runtime: Handle,
}

#[async_trait]
impl Settler for KafkaSettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let mut outcomes: Vec<Option<SettleOutcome>> = Vec::with_capacity(batch.len());
        let mut letters = Vec::new();
        let mut state = self.shared.lock();
        for (index, (delivery, settlement)) in batch.into_iter().enumerate() {
            let (lane, token) = (delivery.lane(), delivery.token());
            let applied = match settlement {
                Settlement::Ack => {
                    self.shared.with_entry_locked(&mut state, lane, token, |state, offset| state.done(lane, offset))
                }
                Settlement::Nack(nack) => self
                    .shared
                    .with_entry_locked(&mut state, lane, token, |state, offset| state.hold(lane, offset, nack.delay)),
                Settlement::Release => self
                    .shared
                    .with_entry_locked(&mut state, lane, token, |state, offset| state.give_back(lane, offset)),
                Settlement::DeadLetter(verdict) => {
                    if self.shared.with_entry_locked(&mut state, lane, token, |_, _| ()).is_some() {
                        letters.push((index, delivery, verdict));
                        outcomes.push(None);
                        continue;
                    }
                    None
                }
            };
            outcomes.push(Some(match applied {
                Some(()) => Ok(AckLevel::Recorded),
                None => Err(stale(delivery)),
            }));
        }
        drop(state);
        self.shared.arrived.notify_one();
        if letters.is_empty() {
            return Settling::ready(outcomes.into_iter().flatten().collect());
        }
        self.bury(outcomes, letters)
    }

    async fn extend(&self, deliveries: &[&Delivery], _lease: Duration) -> Vec<Result<()>> {
        let refusal =
            || Error::unsupported("extend", "Kafka leases nothing: a partition is its member's while it lives");
        deliveries.iter().map(|_| Err(refusal())).collect()
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        self.shared.with_entry(lane, token, |state, offset| state.give_back(lane, offset));
        self.shared.arrived.notify_one();
    }
}

impl KafkaSettler {
    /// Hands the dead letters to the client in this call; each source is settled when its letter is confirmed, whether or
    /// not somebody waits for the answer.
    fn bury(
        &self,
        mut outcomes: Vec<Option<SettleOutcome>>,
        letters: Vec<(usize, Delivery, Box<Verdict>)>,
    ) -> Settling {
        let deadline = Instant::now() + LETTER;
        let mut sent: Vec<(usize, Delivery, Answers)> = Vec::with_capacity(letters.len());
        for (index, delivery, verdict) in letters {
            let topic = names::dead_letters(delivery.message().destination(), delivery.group());
            let headers = dead_letter::encode(&delivery, &verdict);
            match self.publisher.try_publish(&topic, delivery.message(), headers) {
                Ok(answers) => sent.push((index, delivery, answers)),
                Err(error) => outcomes[index] = Some(Err(SettleError::new(delivery, unburied(&error)))),
            }
        }
        let shared = Arc::clone(&self.shared);
        let work = self.runtime.spawn(async move {
            for (index, delivery, answers) in sent {
                let stored = answers.wait(deadline).await.pop().expect("one outcome per letter");
                outcomes[index] = Some(match stored {
                    Err(error) => Err(SettleError::new(delivery, unburied(&error))),
                    Ok(_) => {
                        let lane = delivery.lane();
                        let done = shared.with_entry(lane, delivery.token(), |state, offset| state.done(lane, offset));
                        done.map(|()| AckLevel::Recorded).ok_or_else(|| stale(delivery))
                    }
                });
            }
            outcomes.into_iter().flatten().collect()
        });
        Settling::waiting(async move { work.await.expect("burying cannot panic, and nobody aborts it") })
    }
}

fn stale(delivery: Delivery) -> SettleError {
    let text = "the partition belongs to another member now; the message comes back there";
    let error = Error::new(ErrorKind::StaleDelivery, "settle", text)
        .with("group", delivery.group())
        .with("id", delivery.message().id())
        .with("lane", delivery.lane().index);
    SettleError::new(delivery, error)
}

fn unburied(error: &Error) -> Error {
    Error::new(error.kind(), "dead_letter", format!("the dead letter could not be stored: {}", error.message()))
        .with_effect(error.effect())
        .with_retry(error.retry())
}
