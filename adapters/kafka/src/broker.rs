//! One connection to a Kafka cluster.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anybroker_core::{
    Broker, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description, Destination,
    Endpoint, Error, ErrorKind, Group, Lag, Message, PublishTerms, Result, SubscribeSpec, Subscription, TopologyMode,
    TopologySpec,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use rdkafka::producer::Producer;
use tokio::time::Instant;

use crate::capabilities::capabilities;
use crate::config::Settings;
use crate::publisher::{Publisher, unavailable};
use crate::state::Shared;
use crate::subscription::KafkaSubscription;
use crate::topology::Topology;
use crate::{dead_letter, names};

pub(crate) struct KafkaBroker {
    endpoint: Endpoint,
    capabilities: Capabilities,
    settings: Settings,
    publisher: Arc<Publisher>,
    topology: Topology,
    turn: tokio::sync::Mutex<()>,
    subscriptions: Mutex<Vec<Weak<Shared>>>,
    is_closed: AtomicBool,
}

impl KafkaBroker {
    pub(crate) async fn connect(settings: Settings) -> Result<Self> {
        let publisher = Arc::new(Publisher::new(&settings)?);
        let server = {
            let (publisher, timeout) = (Arc::clone(&publisher), settings.connect_timeout);
            let asked = tokio::task::spawn_blocking(move || -> Result<String> {
                let client = publisher.client().client();
                let metadata = client.fetch_metadata(None, timeout).map_err(|error| unavailable(&error))?;
                Ok(format!("Kafka, {} broker(s); its version is not told to clients", metadata.brokers().len()))
            });
            asked.await.expect("asking for metadata cannot panic").map_err(|error| error.with("url", &settings.url))?
        };
        let topology = Topology::new(&settings, &publisher)?;
        let endpoint = Endpoint { scheme: "kafka", mode: "classic".into(), url: settings.url.clone(), server };
        let capabilities = capabilities(&settings);
        let (turn, subscriptions, is_closed) = Default::default();
        Ok(Self { endpoint, capabilities, settings, publisher, topology, turn, subscriptions, is_closed })
    }

    fn open(&self, operation: &'static str) -> Result<()> {
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::closed(operation).with("endpoint", &self.endpoint));
        }
        Ok(())
    }
}

fn unwritten(operation: &'static str) -> Error {
    Error::unsupported(operation, "not written yet in this adapter")
}

#[async_trait]
impl Broker for KafkaBroker {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let deadline = Instant::now() + terms.timeout;
        if let Err(error) = self.open("publish") {
            return Confirms::ready(batch.iter().map(|_| Err(error.duplicate())).collect());
        }
        let mut destinations: Vec<Destination> = Vec::with_capacity(1);
        for message in &batch {
            // Neighbours mostly go the same way.
            if destinations.last() != Some(message.destination()) && !destinations.contains(message.destination()) {
                destinations.push(message.destination().clone());
            }
        }
        // Calls are served in their order, also while the first of them looks a topic up or waits for room.
        let Ok(_turn) = tokio::time::timeout_at(deadline, self.turn.lock()).await else {
            let late = || Error::new(ErrorKind::RateLimited, "publish", "the calls before it took until the deadline");
            return Confirms::ready(batch.iter().map(|_| Err(late())).collect());
        };
        let routes = self.topology.route(destinations, deadline).await;
        self.publisher.publish(&batch, &terms, &routes, deadline).await
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        self.open("subscribe")?;
        if spec.topology == TopologyMode::Leave {
            return Err(Error::unsupported("subscribe", "topology left alone: not written yet in this adapter"));
        }
        let subscription = KafkaSubscription::open(&spec, &self.settings, &self.topology, &self.publisher).await?;
        let mut subscriptions = self.subscriptions.lock();
        subscriptions.retain(|other| other.strong_count() > 0);
        subscriptions.push(Arc::downgrade(subscription.shared()));
        Ok(Box::new(subscription))
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        self.open("dead letters")?;
        let topic = names::dead_letters(&scope.source, &scope.group);
        let partitions = self.topology.expect(&topic, "dead letters").await?;
        let (settings, scope) = (self.settings.clone(), scope.clone());
        let read = tokio::task::spawn_blocking(move || {
            dead_letter::page(&settings, &topic, partitions, &scope, from.as_ref(), max)
        });
        read.await.expect("reading letters cannot panic")
    }

    async fn redrive(&self, _scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        ids.iter().map(|_| Err(unwritten("redrive"))).collect()
    }

    async fn purge(&self, _scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        ids.iter().map(|_| Err(unwritten("purge"))).collect()
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.open("declare")?;
        self.topology.declare(spec).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.open("verify")?;
        self.topology.verify(spec).await
    }

    async fn describe(&self, _destination: &Destination) -> Result<Description> {
        Err(unwritten("describe"))
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.open("delete")?;
        self.topology.delete(destination, group).await
    }

    async fn lag(&self, _destination: &Destination, _group: &Group) -> Result<Lag> {
        Err(unwritten("lag"))
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        if self.is_closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        for subscription in std::mem::take(&mut *self.subscriptions.lock()) {
            if let Some(shared) = subscription.upgrade() {
                shared.close();
            }
        }
        let flushed = self.publisher.flush(grace).await;
        if let Some(reporter) = self.publisher.stop() {
            // It ends within its poll.
            let joined = tokio::task::spawn_blocking(move || reporter.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                return Err(Error::new(ErrorKind::Unexpected, "close", "the client's thread panicked"));
            }
        }
        flushed
    }
}
