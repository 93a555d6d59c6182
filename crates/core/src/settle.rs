//! Settling deliveries together, within what the endpoint's record allows.

use std::sync::Arc;
use std::time::Duration;

use crate::capability::millis;
use crate::{
    Capabilities, Delivery, DeliveryContext, Error, ErrorKind, Reason, Result, SettleError, SettleOutcome, Settlement,
    Settling, Support, Transaction, Verdict,
};

/// Settles deliveries together: the primitive behind [`Delivery::ack`] and its siblings. One outcome per entry,
/// in order; entries of several subscriptions may be mixed. The work is handed over in the call.
pub fn settle(batch: Batch) -> Settling {
    settle_with(None, batch)
}

/// Settles deliveries as part of a transaction: they are settled when it commits, and come back when it does not. As
/// [`settle`] otherwise.
///
/// What an endpoint cannot put into a transaction (its adapter says what) answers
/// [`Unsupported`](crate::ErrorKind::Unsupported), and gives the delivery back to be settled otherwise.
pub fn settle_in(transaction: &Arc<dyn Transaction>, batch: Batch) -> Settling {
    settle_with(Some(transaction), batch)
}

fn settle_with(transaction: Option<&Arc<dyn Transaction>>, mut batch: Batch) -> Settling {
    let Some((first, _)) = batch.first() else {
        return Settling::ready(Vec::new());
    };
    let context = Arc::clone(&first.context);
    if batch.iter().all(|(delivery, _)| Arc::ptr_eq(&delivery.context, &context)) {
        return settle_one_context(&context, transaction, batch);
    }
    // Rare: several subscriptions. Settle each share, then put the outcomes back in order.
    let mut order: Vec<usize> = (0..batch.len()).collect();
    order.sort_by_key(|index| Arc::as_ptr(&batch[*index].0.context) as usize);
    let mut indexed: Vec<Option<(Delivery, Settlement)>> = batch.drain(..).map(Some).collect();
    let mut shares: Vec<(Vec<usize>, Batch)> = Vec::new();
    for index in order {
        let entry = indexed[index].take().expect("each index once");
        match shares.last_mut() {
            Some((indices, share)) if Arc::ptr_eq(&share[0].0.context, &entry.0.context) => {
                indices.push(index);
                share.push(entry);
            }
            _ => shares.push((vec![index], vec![entry])),
        }
    }
    let settling: Vec<_> = shares
        .into_iter()
        .map(|(indices, share)| {
            let context = Arc::clone(&share[0].0.context);
            (indices, settle_one_context(&context, transaction, share))
        })
        .collect();
    Settling::waiting(async move {
        let mut outcomes = Vec::new();
        for (indices, share) in settling {
            outcomes.extend(indices.into_iter().zip(share.await));
        }
        outcomes.sort_by_key(|(index, _)| *index);
        outcomes.into_iter().map(|(_, outcome)| outcome).collect()
    })
}

type Batch = Vec<(Delivery, Settlement)>;

/// Settles one delivery past the check layer. For suites that probe whether an adapter does what its record refuses;
/// a service has no use for it.
pub async fn settle_unchecked(delivery: Delivery, settlement: Settlement) -> SettleOutcome {
    let context = Arc::clone(&delivery.context);
    hand_over(&context, None, vec![(delivery, settlement)]).await.pop().expect("one outcome per entry")
}

/// Acks deliveries together. See [`settle`].
pub fn ack(deliveries: Vec<Delivery>) -> Settling {
    settle(deliveries.into_iter().map(|delivery| (delivery, Settlement::Ack)).collect())
}

fn settle_one_context(
    context: &Arc<DeliveryContext>,
    transaction: Option<&Arc<dyn Transaction>>,
    mut batch: Batch,
) -> Settling {
    if context.is_closed() {
        return Settling::ready(batch.into_iter().map(|(delivery, _)| Err(stale_after_close(delivery))).collect());
    }
    for (delivery, settlement) in &mut batch {
        if let Settlement::Nack(nack) = settlement
            && context.max_attempts.is_some_and(|max| delivery.attempt() >= max)
        {
            let verdict =
                Verdict { reason: Reason::AttemptsExhausted, error_type: nack.error_type.take(), detail: None };
            *settlement = Settlement::DeadLetter(Box::new(verdict));
        }
        if let Settlement::DeadLetter(verdict) = settlement {
            verdict.reason.cut();
        }
    }
    match context.rules().get().filter(|rules| batch.iter().any(|(_, settlement)| rules.refuse(settlement).is_some())) {
        None => hand_over(context, transaction, batch),
        Some(rules) => hand_over_allowed(context, transaction, rules, batch),
    }
}

/// Rare: some settlements are refused by the record. Those never reach the adapter.
fn hand_over_allowed(
    context: &Arc<DeliveryContext>,
    transaction: Option<&Arc<dyn Transaction>>,
    rules: &Rules,
    batch: Batch,
) -> Settling {
    let mut outcomes: Vec<Option<SettleOutcome>> = Vec::with_capacity(batch.len());
    let mut allowed = Vec::with_capacity(batch.len());
    for (delivery, settlement) in batch {
        match rules.refuse(&settlement) {
            Some(error) => {
                let error = error.with("group", &context.group).with("id", delivery.message().id());
                outcomes.push(Some(Err(SettleError::new(delivery, error))));
            }
            None => {
                allowed.push((delivery, settlement));
                outcomes.push(None);
            }
        }
    }
    let settling = hand_over(context, transaction, allowed);
    let merge = |outcomes: Vec<Option<SettleOutcome>>, allowed: Vec<SettleOutcome>| {
        let mut allowed = allowed.into_iter();
        let next = |outcome: Option<SettleOutcome>| outcome.or_else(|| allowed.next());
        outcomes.into_iter().filter_map(next).collect::<Vec<_>>()
    };
    match settling.try_ready() {
        Ok(allowed) => Settling::ready(merge(outcomes, allowed)),
        Err(waiting) => Settling::waiting(async move { merge(outcomes, waiting.await) }),
    }
}

fn hand_over(context: &Arc<DeliveryContext>, transaction: Option<&Arc<dyn Transaction>>, mut batch: Batch) -> Settling {
    batch.iter_mut().for_each(|(delivery, _)| delivery.lend());
    // The entries count as in flight until the outcome is known, or nobody waits for it any more. Those that
    // fail are counted anew by `SettleError::new`.
    let counted = Counted { context: Arc::clone(context), count: batch.len() };
    let settling = match transaction {
        None => context.settler().settle(batch),
        Some(transaction) => context.settler().settle_in(transaction, batch),
    };
    match settling.try_ready() {
        Ok(outcomes) => {
            drop(counted);
            Settling::ready(outcomes)
        }
        Err(waiting) => Settling::waiting(async move {
            let outcomes = waiting.await;
            drop(counted);
            outcomes
        }),
    }
}

/// What the endpoint's record says of settling.
#[derive(Debug)]
pub(crate) struct Rules {
    nack: Support,
    nack_delay: Support,
    release: Support,
    dead_letter: Support,
    lease_extension: Support,
    delay_max_ms: Option<u64>,
}

impl Rules {
    pub(crate) fn of(record: &Capabilities) -> Self {
        Self {
            nack: record.nack.clone(),
            nack_delay: record.nack_delay.clone(),
            release: record.release.clone(),
            dead_letter: record.dead_letter.clone(),
            lease_extension: record.lease_extension.clone(),
            delay_max_ms: record.limits.delay_max_ms,
        }
    }

    /// Why the endpoint does not do that, if it does not.
    fn refuse(&self, settlement: &Settlement) -> Option<Error> {
        match settlement {
            Settlement::Ack => None,
            Settlement::Release => self.release.check("giving back uncounted", "settle").err(),
            Settlement::DeadLetter(_) => self.dead_letter.check("dead letters", "settle").err(),
            Settlement::Nack(nack) if nack.delay.is_zero() => self.nack.check("nack", "settle").err(),
            Settlement::Nack(nack) => {
                let refused =
                    self.nack.check("nack", "settle").and(self.nack_delay.check("nack with a delay", "settle"));
                refused.err().or_else(|| {
                    let limit = self.delay_max_ms.filter(|limit| millis(nack.delay) > *limit)?;
                    let text = format!("a delay of {:?}; this endpoint holds back {limit} ms at most", nack.delay);
                    Some(Error::unsupported("settle", text))
                })
            }
        }
    }
}

struct Counted {
    context: Arc<DeliveryContext>,
    count: usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.context.release(self.count);
    }
}

fn stale_after_close(delivery: Delivery) -> SettleError {
    let error = Error::new(ErrorKind::StaleDelivery, "settle", "the subscription was closed; the message comes back")
        .with("group", &delivery.context.group)
        .with("id", delivery.message().id());
    SettleError::new(delivery, error)
}

/// Extends the leases of deliveries of one subscription together.
///
/// One outcome per delivery; see [`Delivery::extend`].
///
/// # Panics
/// Never in a correct adapter: it must answer once per delivery.
pub async fn extend(deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
    let mut outcomes = Vec::with_capacity(deliveries.len());
    let mut rest = deliveries;
    while let Some(first) = rest.first() {
        let context = &first.context;
        let same = rest.iter().take_while(|delivery| Arc::ptr_eq(&delivery.context, context)).count();
        let (share, others) = rest.split_at(same);
        if let Some(Err(refusal)) =
            context.rules().get().map(|rules| rules.lease_extension.check("extending a lease", "extend"))
        {
            outcomes.extend(share.iter().map(|_| Err(refusal.duplicate())));
        } else if context.is_closed() {
            outcomes.extend(share.iter().map(|delivery| {
                Err(Error::new(ErrorKind::StaleDelivery, "extend", "the subscription was closed")
                    .with("id", delivery.message().id()))
            }));
        } else {
            outcomes.extend(context.settler().extend(share, lease).await);
        }
        rest = others;
    }
    outcomes
}
