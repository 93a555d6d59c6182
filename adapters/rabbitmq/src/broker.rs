//! One endpoint: a connection for publishing and one for consuming, so that a server that blocks publishers still takes acks.

use std::sync::{Arc, Weak};
use std::time::Duration;

use anybroker_core::gate::{Gate, Pass};
use anybroker_core::{
    Broker, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description, Destination,
    Endpoint, Error, ErrorKind, Group, Lag, Message, PublishTerms, Result, SubscribeSpec, Subscription, TopologySpec,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::capabilities::capabilities;
use crate::config::Settings;
use crate::dead_letter::Letters;
use crate::link::Link;
use crate::outlet::Outlet;
use crate::publisher::Publisher;
use crate::state::Shared;
use crate::subscription::RabbitSubscription;
use crate::topology::Topology;

/// How often is looked whether everything is on the server, while closing.
const CLOSING_STEP: Duration = Duration::from_millis(5);

pub(crate) struct RabbitBroker {
    endpoint: Endpoint,
    capabilities: Capabilities,
    settings: Arc<Settings>,
    publishing: Arc<Link>,
    consuming: Arc<Link>,
    topology: Arc<Topology>,
    publisher: Publisher,
    copies: Arc<Outlet>,
    letters: Letters,
    subscriptions: Mutex<Vec<Weak<Shared>>>,
    gate: Gate,
}

impl RabbitBroker {
    pub(crate) async fn connect(settings: Settings) -> Result<Self> {
        let settings = Arc::new(settings);
        let publishing = Arc::new(Link::new(Arc::clone(&settings)));
        let consuming = Arc::new(Link::new(Arc::clone(&settings)));
        let deadline = Instant::now() + settings.connect_timeout;
        let named = |error: Error| error.with("url", &settings.url);
        publishing.connection("connect", deadline).await.map_err(named)?;
        let topology = Arc::new(Topology::new(&settings, Arc::clone(&publishing)).map_err(named)?);
        let server = match &topology.admin {
            Some(admin) => format!("RabbitMQ {}", admin.version().await.map_err(named)?),
            None => "RabbitMQ".to_owned(),
        };
        let endpoint =
            Endpoint { scheme: "amqp", mode: settings.queue.name().into(), url: settings.url.clone(), server };
        let publisher = Publisher::new(Arc::clone(&publishing), Arc::clone(&topology), settings.create_destinations);
        let copies = Arc::new(Outlet::new(Arc::clone(&publishing), "settle"));
        let letters = Letters::new(Arc::clone(&consuming), Arc::clone(&topology), Arc::clone(&copies));
        let (subscriptions, gate) = (Mutex::default(), Gate::default());
        let capabilities = capabilities(&settings);
        Ok(Self {
            endpoint,
            capabilities,
            settings,
            publishing,
            consuming,
            topology,
            publisher,
            copies,
            letters,
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

#[async_trait]
impl Broker for RabbitBroker {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        // One that has begun before a close is handed over whole.
        let _inside = match self.enter("publish") {
            Ok(inside) => inside,
            Err(error) => return Confirms::ready(batch.iter().map(|_| Err(error.duplicate())).collect()),
        };
        self.publisher.publish(batch, &terms).await
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        self.open("subscribe")?;
        let subscription =
            RabbitSubscription::open(&spec, &self.settings, &self.topology, &self.consuming, &self.copies).await?;
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
        self.topology.verify(spec, "verify").await
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        self.open("describe")?;
        self.topology.describe(destination).await
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
        // The server cannot tell what is prefetched from what is in flight; this process's own members can.
        let open: Vec<_> = self.subscriptions.lock().iter().filter_map(Weak::upgrade).collect();
        let share = open.iter().find_map(|member| member.share(destination, group));
        let mut lag = self.topology.lag(destination, group, share).await?;
        for member in open {
            let prefetched = member.prefetched(destination, group);
            lag.ready = lag.ready.map(|(count, precision)| (count + prefetched, precision));
            lag.in_flight = lag.in_flight.map(|(count, precision)| (count.saturating_sub(prefetched), precision));
        }
        Ok(lag)
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        if !self.gate.close() {
            return Ok(());
        }
        let deadline = Instant::now() + grace;
        let open: Vec<_> = std::mem::take(&mut *self.subscriptions.lock()).iter().filter_map(Weak::upgrade).collect();
        for shared in &open {
            shared.close(deadline);
        }
        let mut is_done = true;
        for shared in open {
            is_done &= shared.ended(deadline).await;
        }
        is_done &= self.gate.empty(deadline).await;
        let is_idle = || self.publisher.is_idle() && self.copies.is_idle();
        while !is_idle() && Instant::now() < deadline {
            tokio::time::sleep(CLOSING_STEP).await;
        }
        is_done &= is_idle();
        let end = deadline.max(Instant::now() + Duration::from_millis(200));
        tokio::join!(self.publishing.close(end), self.consuming.close(end));
        if is_done {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Timeout, "close", "something had no outcome yet"))
    }
}
