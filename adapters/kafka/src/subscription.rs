//! The receiving side: one member of a group, fed by one thread for each destination.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anybroker_core::{DeliveryContext, Error, ErrorKind, Received, Result, SubscribeSpec, Subscription, TopologyMode};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::config::Settings;
use crate::feeder::Feeder;
use crate::names;
use crate::publisher::Publisher;
use crate::settle::KafkaSettler;
use crate::state::{Shared, Taken};
use crate::topology::Topology;

pub(crate) struct KafkaSubscription {
    shared: Arc<Shared>,
    context: Arc<DeliveryContext>,
    ended: Vec<oneshot::Receiver<Result<()>>>,
}

impl KafkaSubscription {
    pub(crate) async fn open(
        spec: &SubscribeSpec,
        settings: &Settings,
        topology: &Topology,
        publisher: &Arc<Publisher>,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::new(spec.max_in_flight, settings.held_retries));
        let settler =
            KafkaSettler { shared: Arc::clone(&shared), publisher: Arc::clone(publisher), runtime: Handle::current() };
        let context = DeliveryContext::new(spec.group.clone(), spec.max_attempts, Arc::new(settler));
        // Dropped on the way, it ends what was started.
        let mut subscription = Self { shared, context, ended: Vec::new() };
        for (number, destination) in spec.destinations.iter().enumerate() {
            let topic = names::topic(destination);
            let partitions = prepare(spec, topology, number, &topic).await?;
            let feeder = Feeder {
                number,
                destination: destination.clone(),
                group: names::group(&topic, &spec.group),
                topic,
                partitions,
                start: spec.start,
                fixes_start: spec.topology == TopologyMode::Declare,
                settings: settings.clone(),
                shared: Arc::clone(&subscription.shared),
            };
            subscription.start(feeder).await?;
        }
        Ok(subscription)
    }

    async fn start(&mut self, feeder: Feeder) -> Result<()> {
        let ((start, started), (end, ended)) = (oneshot::channel(), oneshot::channel());
        let name = "anybroker-kafka-feeder".to_owned();
        let thread = std::thread::Builder::new().name(name).spawn(move || feeder.run(start, end)).map_err(|error| {
            Error::new(ErrorKind::Unavailable, "subscribe", "no thread could be started").with_source(error)
        })?;
        self.shared.add_feeder(thread.thread().clone());
        started.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Unexpected, "subscribe", "its thread ended")))?;
        self.ended.push(ended);
        Ok(())
    }

    /// For closing the connection.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

/// Creates or verifies what the subscription needs of one destination; answers how many partitions it has.
async fn prepare(spec: &SubscribeSpec, topology: &Topology, number: usize, topic: &str) -> Result<i32> {
    let letters = names::dead_letters(&spec.destinations[number], &spec.group);
    match spec.topology {
        TopologyMode::Declare => {
            let (_, partitions) = topology.ensure(topic, "subscribe").await?;
            topology.ensure(&letters, "subscribe").await?;
            Ok(partitions)
        }
        TopologyMode::Verify => {
            let partitions = topology.expect(topic, "subscribe").await?;
            topology.expect_group(topic.to_owned(), partitions, &spec.group, "subscribe").await?;
            topology.expect(&letters, "subscribe").await?;
            Ok(partitions)
        }
        TopologyMode::Leave => Ok(0),
    }
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
