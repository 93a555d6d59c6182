//! Publishing: entries are handed to the producers of their topics in call order; receipts are collected.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anybroker_core::{
    Bytes, Confirms, Destination, Effect, Error, ErrorKind, Message, PublishOrder, PublishOutcome, PublishTerms,
    Receipt, Result,
};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::batch::{Batch, weight};
use crate::codec::{self, Notes};
use crate::producer::Producer;
use crate::topology::{Route, Topology};

/// Under which opening of its producers a batch is sent: what was sent under one that ended may be lost, and nothing of the
/// batch may be stored behind it.
type Openings = Vec<(Arc<Producer>, u64)>;

type Routes = Vec<(Destination, Result<Arc<Route>>)>;

type Gate = Arc<tokio::sync::Mutex<()>>;

/// Publishes on one endpoint.
pub(crate) struct Publisher {
    topology: Arc<Topology>,
    gates: Mutex<HashMap<Destination, Gate>>,
}

impl Publisher {
    pub(crate) fn new(topology: Arc<Topology>) -> Self {
        Self { topology, gates: Mutex::default() }
    }

    pub(crate) async fn publish(&self, batch: Vec<Message>, terms: &PublishTerms) -> Confirms {
        let deadline = Instant::now() + terms.timeout;
        // Held until everything is handed over: what waits for a producer to be opened is not overtaken.
        let gates = self.gates(&batch);
        let mut passed = Vec::with_capacity(gates.len());
        for gate in &gates {
            match tokio::time::timeout_at(deadline, gate.lock()).await {
                Ok(pass) => passed.push(pass),
                Err(_) => {
                    let text = "earlier batches still wait for the broker of this topic";
                    let error = Error::new(ErrorKind::Unavailable, "publish", text);
                    let named = |message: &Message| Err(error.duplicate().with("id", message.id()));
                    return Confirms::ready(batch.iter().map(named).collect());
                }
            }
        }
        let routes = self.routes(&batch, deadline).await;
        let outcomes = Batch::new(batch.len());
        let mut failed_keys: HashSet<(Destination, Bytes)> = HashSet::new();
        let mut openings: Openings = Vec::new();
        for (index, message) in batch.iter().enumerate() {
            let place = || message.key_bytes().map(|key| (message.destination().clone(), key.clone()));
            let refusal = if !failed_keys.is_empty() && place().is_some_and(|place| failed_keys.contains(&place)) {
                Some(held_back())
            } else {
                match route(&routes, message.destination()) {
                    Err(error) => Some(error.duplicate()),
                    Ok(route) => {
                        self.hand_over(route, message, (&outcomes, index), &mut openings, deadline).await.err()
                    }
                }
            };
            if let Some(error) = refusal {
                outcomes.set(index, Err(error));
                if terms.order == PublishOrder::Key {
                    failed_keys.extend(place());
                }
            }
        }
        let named: Vec<_> = batch.iter().map(|message| (message.id().clone(), message.destination().clone())).collect();
        Confirms::waiting(async move {
            let outcomes = outcomes.wait(deadline, || late("publish")).await;
            let outcome = |(outcome, (id, destination)): (Result<_>, _)| -> PublishOutcome {
                match outcome {
                    Ok(position) => Ok(Receipt { position: Some(position), duplicate: false }),
                    Err(error) => Err(error.with("id", id).with("destination", destination)),
                }
            };
            outcomes.into_iter().zip(named).map(outcome).collect()
        })
    }

    /// One for each destination, always in the same order, so that no two batches wait for each other.
    fn gates(&self, batch: &[Message]) -> Vec<Gate> {
        let mut all = self.gates.lock();
        let mut found: Vec<(&Destination, Gate)> = Vec::with_capacity(1);
        for message in batch {
            let destination = message.destination();
            if !found.iter().rev().any(|(other, _)| *other == destination) {
                let gate = match all.get(destination) {
                    Some(gate) => Arc::clone(gate),
                    None => Arc::clone(all.entry(destination.clone()).or_default()),
                };
                found.push((destination, gate));
            }
        }
        found.sort_unstable_by(|one, other| one.0.cmp(other.0));
        found.into_iter().map(|(_, gate)| gate).collect()
    }

    async fn routes(&self, batch: &[Message], deadline: Instant) -> Routes {
        let mut routes: Routes = Vec::with_capacity(1);
        for message in batch {
            let destination = message.destination();
            if routes.iter().rev().any(|(other, _)| other == destination) {
                continue;
            }
            let found = self.topology.route(destination, deadline).await;
            routes.push((destination.clone(), found));
        }
        routes
    }

    async fn hand_over(
        &self,
        route: &Route,
        message: &Message,
        (outcomes, index): (&Arc<Batch>, usize),
        openings: &mut Openings,
        deadline: Instant,
    ) -> Result<()> {
        let delay = message.delay().filter(|delay| !delay.is_zero());
        let notes = delay.map(|delay| Notes { not_before: codec::due(delay), ..Notes::default() });
        let payload = codec::encode(message, notes);
        let weight = weight(payload.data.len());
        if !self.topology.window.enter(weight, deadline).await {
            let text = "too much stayed on its way: the broker does not take messages";
            return Err(Error::new(ErrorKind::RateLimited, "publish", text));
        }
        let producer = route.producer(payload.metadata.partition_key.as_deref());
        let known = openings.iter().find(|(other, _)| Arc::ptr_eq(other, producer)).map(|(_, opening)| *opening);
        let opening = producer.send(payload, weight, outcomes, index, known)?;
        if known.is_none() {
            openings.push((Arc::clone(producer), opening));
        }
        Ok(())
    }
}

fn route<'r>(routes: &'r Routes, destination: &Destination) -> &'r Result<Arc<Route>> {
    let found = routes.iter().find(|(other, _)| other == destination);
    &found.expect("every destination of the batch has been routed").1
}

/// No receipt by the deadline.
pub(crate) fn late(operation: &'static str) -> Error {
    Error::new(ErrorKind::Timeout, operation, "no receipt from the broker in time")
}

fn held_back() -> Error {
    let text = "order: not attempted, because an earlier message of this key in the batch failed";
    Error::new(ErrorKind::Unavailable, "publish", text).with_effect(Effect::NotDone)
}
