//! The receiving side: one member of a group, fed by one thread for each destination.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anybroker_core::{
    DeliveryContext, Destination, Error, ErrorKind, OnFailure, Received, Result, SubscribeSpec, Subscription,
    TopologyMode,
};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::config::Settings;
use crate::feeder::Feeder;
use crate::names;
use crate::pulse;
use crate::settle::{KafkaSettler, OwnTopics};
use crate::state::{Shared, Taken};
use crate::topology::{Shape, Topology};
use crate::transactions::Transactions;
use crate::trim::Trim;

pub(crate) struct KafkaSubscription {
    shared: Arc<Shared>,
    context: Arc<DeliveryContext>,
    ended: Vec<oneshot::Receiver<Result<()>>>,
    left: Vec<oneshot::Receiver<()>>,
}

/// How long a close waits until the cluster knows that the member has left, so that the next one gets its partitions at once.
const LEAVE: Duration = Duration::from_secs(3);

impl KafkaSubscription {
    pub(crate) async fn open(
        spec: &SubscribeSpec,
        settings: &Settings,
        topology: &Topology,
        transactions: &Arc<Transactions>,
    ) -> Result<Self> {
        let blocks = spec.on_failure == OnFailure::Block;
        let shared = Arc::new(Shared::new(spec.max_in_flight, settings, blocks));
        let mut prepared = Vec::with_capacity(spec.destinations.len());
        for destination in &spec.destinations {
            prepared.push(prepare(spec, topology, destination).await?);
        }
        let settler = KafkaSettler {
            shared: Arc::clone(&shared),
            publisher: Arc::clone(topology.publisher()),
            transactions: Arc::clone(transactions),
            runtime: Handle::current(),
            topics: prepared.iter().map(|ready| (ready.destination.clone(), ready.own.clone())).collect(),
            in_place: settings.nack_in_place,
        };
        let context = DeliveryContext::new(spec.group.clone(), spec.max_attempts, Arc::new(settler));
        // Dropped on the way, it ends what was started.
        let mut subscription = Self { shared, context, ended: Vec::new(), left: Vec::new() };
        pulse::keep_beating(&subscription.shared).map_err(no_thread)?;
        for (number, Prepared { destination, topic, partitions, own }) in prepared.into_iter().enumerate() {
            let feeder = Feeder {
                number,
                destination,
                group: names::group(&topic, &spec.group),
                topic,
                partitions,
                trim: Trim::new(topology.admins(), Handle::current(), &own.retries),
                own,
                start: spec.start,
                settings: settings.clone(),
                runtime: Handle::current(),
                shared: Arc::clone(&subscription.shared),
            };
            subscription.start(feeder).await?;
        }
        Ok(subscription)
    }

    async fn start(&mut self, feeder: Feeder) -> Result<()> {
        let ((start, started), (end, ended)) = (oneshot::channel(), oneshot::channel());
        let (leave, left) = oneshot::channel();
        let name = "anybroker-kafka-feeder".to_owned();
        let thread =
            std::thread::Builder::new().name(name).spawn(move || feeder.run(start, end, leave)).map_err(no_thread)?;
        self.shared.add_feeder(thread.thread().clone());
        started.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Unexpected, "subscribe", "its thread ended")))?;
        self.ended.push(ended);
        self.left.push(left);
        Ok(())
    }

    /// For closing the connection.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

fn no_thread(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, "subscribe", "no thread could be started").with_source(error)
}

/// One destination of a subscription, as the cluster has it.
struct Prepared {
    destination: Destination,
    topic: String,
    partitions: i32,
    own: OwnTopics,
}

/// Creates, verifies or only looks at what the subscription needs of one destination.
async fn prepare(spec: &SubscribeSpec, topology: &Topology, destination: &Destination) -> Result<Prepared> {
    let (topic, operation) = (names::topic(destination), "subscribe");
    let retries = names::retries(destination, &spec.group);
    let (partitions, own_partitions) = match spec.topology {
        TopologyMode::Declare => {
            let (_, partitions) = topology.ensure(&topic, Shape::Destination, operation).await?;
            (partitions, topology.ensure_own(destination, &spec.group, partitions, operation).await?)
        }
        TopologyMode::Verify => {
            let partitions = topology.expect(&topic, operation).await?;
            let own = topology.expect_own(destination, &spec.group, operation).await?;
            topology.expect_group(topic.clone(), partitions, &spec.group, operation).await?;
            (partitions, own)
        }
        // A topic that is missing cannot be read; the group's own may be, as long as nothing fails.
        TopologyMode::Leave => (topology.expect(&topic, operation).await?, topology.partitions(&retries).await?),
    };
    let own = OwnTopics {
        retries: retries.into(),
        partitions: own_partitions,
        letters: names::dead_letters(destination, &spec.group).into(),
    };
    Ok(Prepared { destination: destination.clone(), topic, partitions, own })
}

#[async_trait]
impl Subscription for KafkaSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        let deadline = Instant::now() + wait;
        loop {
            if self.shared.is_closing.load(Ordering::Acquire) {
                return Err(Error::closed("receive"));
            }
            let arrived = self.shared.arrived.notified();
            let due = match self.shared.take(max, &self.context) {
                Ok(received) => return Ok(received),
                Err(Taken::Failed(error)) => return Err(error),
                Err(Taken::Nothing(due)) => due,
            };
            let until = due.map_or(deadline, |due| Instant::from_std(due).min(deadline));
            let has_arrived = tokio::time::timeout_at(until, arrived).await.is_ok();
            if !has_arrived && until == deadline {
                return Ok(Received::default());
            }
        }
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        self.shared.is_paused.store(paused, Ordering::Release);
        self.shared.wake_feeders();
        if !paused {
            self.shared.arrived.notify_one();
        }
        Ok(())
    }

    async fn close(mut self: Box<Self>, grace: Duration) -> Result<()> {
        self.shared.close();
        let deadline = Instant::now() + grace;
        let mut result = Ok(());
        for ended in std::mem::take(&mut self.ended) {
            let flushed = match tokio::time::timeout_at(deadline, ended).await {
                Ok(Ok(flushed)) => flushed,
                Ok(Err(_)) => Err(Error::new(ErrorKind::Unexpected, "close", "its thread ended without an answer")),
                Err(_) => {
                    let text = format!("the last acks were not committed within {grace:?}; they may come again");
                    Err(Error::new(ErrorKind::Timeout, "close", text))
                }
            };
            result = result.and(flushed);
        }
        self.context.close();
        // Its sender is only ever dropped.
        let deadline = deadline.min(Instant::now() + LEAVE);
        for left in std::mem::take(&mut self.left) {
            let _ = tokio::time::timeout_at(deadline, left).await;
        }
        result
    }
}

impl Drop for KafkaSubscription {
    fn drop(&mut self) {
        // What was acked is still committed, by the feeders on their way out.
        self.shared.close();
        self.context.close();
    }
}
