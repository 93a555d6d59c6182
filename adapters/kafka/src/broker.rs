//! One connection to a Kafka cluster.

use std::sync::{Arc, Weak};
use std::time::Duration;

use anybroker_core::gate::{Gate, Pass};
use anybroker_core::{
    Broker, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description, Destination,
    Endpoint, Error, ErrorKind, Group, Lag, Message, PublishTerms, Result, SubscribeSpec, Subscription, TopologySpec,
    Transaction,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use rdkafka::producer::Producer;
use tokio::time::Instant;

use crate::capabilities::capabilities;
use crate::config::Settings;
use crate::dead_letter::Letters;
use crate::publisher::{Publisher, unavailable};
use crate::state::Shared;
use crate::subscription::KafkaSubscription;
use crate::topology::Topology;
use crate::transaction::KafkaTransaction;
use crate::transactions::Transactions;
use crate::{describe, lag};

pub(crate) struct KafkaBroker {
    endpoint: Endpoint,
    capabilities: Capabilities,
    settings: Settings,
    publisher: Arc<Publisher>,
    transactions: Arc<Transactions>,
    topology: Arc<Topology>,
    letters: Letters,
    turn: tokio::sync::Mutex<()>,
    subscriptions: Mutex<Vec<Weak<Shared>>>,
    gate: Gate,
}

impl KafkaBroker {
    pub(crate) async fn connect(settings: Settings) -> Result<Self> {
        settings.check_login().await?;
        let publisher = Arc::new(Publisher::new(&settings)?);
        let brokers =
            reach(&publisher, settings.connect_timeout).await.map_err(|error| error.with("url", &settings.url))?;
        let server = format!("Kafka, {brokers} broker(s); its version is not told to clients");
        let topology = Arc::new(Topology::new(&settings, &publisher)?);
        let transactions = Transactions::new(&settings, &publisher);
        let letters = Letters::new(&publisher, &topology);
        let endpoint = Endpoint { scheme: "kafka", mode: settings.mode().into(), url: settings.url.clone(), server };
        let capabilities = capabilities(&settings);
        let (turn, subscriptions, gate) = Default::default();
        Ok(Self {
            endpoint,
            capabilities,
            settings,
            publisher,
            transactions,
            topology,
            letters,
            turn,
            subscriptions,
            gate,
        })
    }

    fn open(&self, operation: &'static str) -> Result<()> {
        self.enter(operation).map(drop)
    }

    /// As long as the pass lives, a close waits.
    fn enter(&self, operation: &'static str) -> Result<Pass<'_>> {
        self.gate.enter().ok_or_else(|| Error::closed(operation).with("endpoint", &self.endpoint))
    }
}

/// Waits for the cluster's answer; tells how many brokers it has. Being refused is told at once: the client would try for
/// ever, and say only that it timed out.
async fn reach(publisher: &Arc<Publisher>, timeout: Duration) -> Result<usize> {
    let publisher = Arc::clone(publisher);
    let asked = tokio::task::spawn_blocking(move || -> Result<usize> {
        let deadline = std::time::Instant::now() + timeout;
        let mut step = Duration::from_millis(250);
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let client = publisher.client();
            let answer = client.client().fetch_metadata(None, left.min(step));
            // Short, to look for a refusal; not always, because an answer may take longer than that.
            step = (step * 2).min(Duration::from_secs(2));
            match answer {
                Ok(metadata) => return Ok(metadata.brokers().len()),
                Err(error) => {
                    if let Some(refusal) = publisher.final_refusal() {
                        return Err(refusal);
                    }
                    if std::time::Instant::now() >= deadline {
                        return Err(publisher.refusal().unwrap_or_else(|| unavailable(&error)));
                    }
                    // Without a single connection it answers at once.
                    std::thread::sleep(Duration::from_millis(20).min(left));
                }
            }
        }
    });
    asked.await.expect("asking for metadata cannot panic")
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
        // One that has begun before a close is handed over whole: who collects reports ends with the close.
        let _inside = match self.enter("publish") {
            Ok(inside) => inside,
            Err(error) => return Confirms::ready(batch.iter().map(|_| Err(error.duplicate())).collect()),
        };
        // The transaction does not end before the batch has been handed over.
        let joined = match &terms.options.transaction {
            None => None,
            Some(transaction) => {
                match KafkaTransaction::of(transaction, &self.transactions).and_then(|open| open.busy("publish")) {
                    Ok(joined) => Some(joined),
                    Err(error) => return Confirms::ready(batch.iter().map(|_| Err(error.duplicate())).collect()),
                }
            }
        };
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
        let line = joined.as_ref().map(|(_, line)| &**line);
        self.publisher.publish(&batch, &terms, &routes, deadline, line).await
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        self.open("subscribe")?;
        let subscription = KafkaSubscription::open(&spec, &self.settings, &self.topology, &self.transactions).await?;
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
        self.letters.page(scope, from.as_ref(), max).await
    }

    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        match self.open("redrive") {
            Ok(()) => self.letters.redrive(scope, ids).await,
            Err(error) => ids.iter().map(|_| Err(error.duplicate())).collect(),
        }
    }

    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        match self.open("purge") {
            Ok(()) => self.letters.purge(scope, ids).await,
            Err(error) => ids.iter().map(|_| Err(error.duplicate())).collect(),
        }
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.open("declare")?;
        self.topology.declare(spec).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.open("verify")?;
        self.topology.verify(spec).await
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        self.open("describe")?;
        describe::describe(&self.topology, &self.letters, destination).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        self.open("list")?;
        self.topology.list(prefix).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.open("delete")?;
        self.topology.delete(destination, group).await
    }

    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        self.open("lag")?;
        lag::lag(&self.topology, destination, group).await
    }

    async fn begin(&self) -> Result<Arc<dyn Transaction>> {
        self.open("begin")?;
        Ok(Arc::new(self.transactions.begin().await?))
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        if !self.gate.close() {
            return Ok(());
        }
        let deadline = Instant::now() + grace;
        let aborted = self.transactions.close(deadline).await;
        for subscription in std::mem::take(&mut *self.subscriptions.lock()) {
            if let Some(shared) = subscription.upgrade() {
                shared.close();
            }
        }
        let handed_over = self.gate.empty(deadline).await;
        let flushed = self.publisher.flush(deadline.saturating_duration_since(Instant::now())).await;
        let flushed = flushed.and_then(|()| match handed_over {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Timeout, "close", "a publish is not handed over yet")),
        });
        for reporter in self.publisher.stop().into_iter().chain(self.transactions.stop()) {
            // It ends within its poll.
            let joined = tokio::task::spawn_blocking(move || reporter.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                return Err(Error::new(ErrorKind::Unexpected, "close", "the client's thread panicked"));
            }
        }
        flushed.and(aborted)
    }
}
