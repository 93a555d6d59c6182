//! One connected endpoint: a Pulsar cluster, a tenant and a namespace.

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

use crate::admin::{Admin, Verb};
use crate::capabilities::{ENVELOPE, capabilities};
use crate::config::Settings;
use crate::dead_letter::Letters;
use crate::link::Link;
use crate::names::Names;
use crate::publisher::Publisher;
use crate::state::Shared;
use crate::subscription::PulsarSubscription;
use crate::topology::Topology;

pub(crate) struct PulsarBroker {
    endpoint: Endpoint,
    capabilities: Capabilities,
    settings: Settings,
    topology: Arc<Topology>,
    publisher: Publisher,
    letters: Letters,
    subscriptions: Mutex<Vec<Weak<Shared>>>,
    gate: Gate,
}

impl PulsarBroker {
    pub(crate) async fn connect(settings: Settings) -> Result<Self> {
        let connecting = Self::connect_now(&settings);
        match tokio::time::timeout(settings.connect_timeout, connecting).await {
            Ok(connected) => connected.map_err(|error| error.with("url", &settings.url)),
            Err(_) => {
                let text = format!("not connected within {:?}", settings.connect_timeout);
                Err(Error::new(ErrorKind::Unavailable, "connect", text).with("url", &settings.url))
            }
        }
    }

    async fn connect_now(settings: &Settings) -> Result<Self> {
        let operation = "connect";
        let names = Names::new(settings);
        let (link, hello) = Link::connect(settings).await?;
        let admin = Admin::new(settings, names.space())?;
        // Asks for the policies of the namespace: shows that the endpoint is one, and that the namespace exists.
        let found = admin.ask(operation, Verb::Get, &format!("/namespaces/{}", names.space())).await?;
        if found.status == 404 {
            let text = format!("there is no namespace {}", names.space());
            return Err(Error::new(ErrorKind::NotFound, operation, text));
        }
        // Forbidden to clients that are no administrators of the tenant; topics may be permitted nevertheless.
        if found.status != 403 {
            found.done(operation)?;
        }
        if hello.max_message < 2 * ENVELOPE {
            let text =
                format!("the broker's maxMessageSize is {}; at least {} is needed", hello.max_message, 2 * ENVELOPE);
            return Err(Error::unsupported(operation, text));
        }
        let version = admin.ask(operation, Verb::Get, "/brokers/version").await;
        let version = version.ok().filter(|answer| answer.status == 200).map_or(hello.server, |answer| answer.text());
        let endpoint = Endpoint {
            scheme: "pulsar",
            mode: "default".into(),
            url: settings.url.clone(),
            server: format!("Pulsar {}", version.trim_start_matches("Pulsar Server").trim()),
        };
        let capabilities = capabilities(settings, hello.max_message);
        let topology = Arc::new(Topology::new(admin, names, link, settings));
        let publisher = Publisher::new(Arc::clone(&topology));
        let letters = Letters { topology: Arc::clone(&topology) };
        let settings = settings.clone();
        let (subscriptions, gate) = (Mutex::default(), Gate::default());
        Ok(Self { endpoint, capabilities, settings, topology, publisher, letters, subscriptions, gate })
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
impl Broker for PulsarBroker {
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
        let subscription = PulsarSubscription::open(&spec, &self.settings, &self.topology).await?;
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
        let mut lag = self.topology.lag(destination, group).await?;
        // The broker counts as in flight what is prefetched; of this process's own members it is known better.
        let open: Vec<_> = self.subscriptions.lock().iter().filter_map(Weak::upgrade).collect();
        for member in open {
            let (prefetched, delayed) = member.kept_back(destination, group);
            lag.ready = lag.ready.map(|(count, precision)| (count + prefetched, precision));
            lag.delayed = lag.delayed.map(|(count, precision)| (count + delayed, precision));
            let less = prefetched + delayed;
            lag.in_flight = lag.in_flight.map(|(count, precision)| (count.saturating_sub(less), precision));
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
        let mut is_done = self.gate.empty(deadline).await;
        is_done &= self.topology.window.emptied(deadline).await;
        for shared in open {
            is_done &= shared.ended(deadline).await;
        }
        self.topology.link.close();
        if is_done {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Timeout, "close", "something had no outcome yet"))
    }
}
