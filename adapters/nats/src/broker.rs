//! One connection to a NATS server or cluster.

use std::sync::{Arc, Weak};
use std::time::Duration;

use anybroker_core::gate::{Gate, Pass};
use anybroker_core::{
    Broker, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description, Destination,
    Endpoint, Error, ErrorKind, Group, Lag, Message, PublishTerms, Result, SubscribeSpec, Subscription, TopologySpec,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::time::Instant;

use crate::api::Api;
use crate::capabilities::{ENVELOPE, capabilities};
use crate::config::Settings;
use crate::dead_letter::Letters;
use crate::link::Link;
use crate::publisher::Publisher;
use crate::state::Shared;
use crate::subscription::NatsSubscription;
use crate::topology::Topology;

/// Since 2.10 consumers filter several subjects and carry metadata.
const OLDEST: (i64, i64, i64) = (2, 10, 0);

/// Since 2.12 messages are scheduled (ADR-51).
const SCHEDULES: (i64, i64, i64) = (2, 12, 0);

pub(crate) struct NatsBroker {
    endpoint: Endpoint,
    capabilities: Capabilities,
    settings: Settings,
    link: Arc<Link>,
    topology: Arc<Topology>,
    publisher: Publisher,
    letters: Letters,
    subscriptions: Mutex<Vec<Weak<Shared>>>,
    /// Closed once the broker is; every publish and redrive holds it while it hands over.
    gate: Gate,
}

impl NatsBroker {
    pub(crate) async fn connect(settings: Settings) -> Result<Self> {
        let link = Arc::new(Link::connect(&settings).await?);
        let info = link.client.server_info();
        let named = |error: Error| error.with("url", &settings.url).with("server", &info.version);
        if !link.client.is_server_compatible(OLDEST.0, OLDEST.1, OLDEST.2) {
            let text = "the server is too old; NATS 2.10 or later is needed";
            return Err(named(Error::unsupported("connect", text)));
        }
        let api = Api::new(&link);
        // Answered only where JetStream is enabled, and permitted, for this account.
        let asked = tokio::time::timeout(settings.connect_timeout, api.call::<Value>("connect", "INFO", &Value::Null));
        asked
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Timeout, "connect", "JetStream does not answer")))
            .map_err(named)?;
        let max_payload = info.max_payload as u64;
        if max_payload < 2 * ENVELOPE {
            let text = format!("the server's max_payload is {max_payload}; at least {} is needed", 2 * ENVELOPE);
            return Err(named(Error::unsupported("connect", text)));
        }
        // The server takes no bound that refuses together with scheduled messages.
        let is_new = link.client.is_server_compatible(SCHEDULES.0, SCHEDULES.1, SCHEDULES.2);
        let schedules = is_new && settings.max_bytes == 0;
        let topology = Arc::new(Topology::new(api, &settings, schedules));
        let server = format!("NATS {}", info.version);
        let endpoint = Endpoint { scheme: "nats", mode: "jetstream".into(), url: settings.url.clone(), server };
        let capabilities = capabilities(&settings, max_payload, is_new);
        let dedups = !settings.dedup_window.is_zero();
        let publisher = Publisher::new(Arc::clone(&link), Arc::clone(&topology), dedups);
        let letters = Letters { link: Arc::clone(&link), topology: Arc::clone(&topology) };
        let (subscriptions, gate) = (Mutex::default(), Gate::default());
        Ok(Self { endpoint, capabilities, settings, link, topology, publisher, letters, subscriptions, gate })
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
impl Broker for NatsBroker {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let _pass = match self.enter("publish") {
            Ok(pass) => pass,
            Err(error) => return Confirms::ready(batch.iter().map(|_| Err(error.duplicate())).collect()),
        };
        self.publisher.publish(batch, &terms).await
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        self.open("subscribe")?;
        let subscription = NatsSubscription::open(&spec, &self.settings, &self.topology, &self.link).await?;
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
        match self.enter("redrive") {
            Ok(_pass) => self.letters.redrive(scope, ids).await,
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
        // The server cannot tell what is prefetched or delayed from what is in flight; this process's own members can.
        let open: Vec<_> = self.subscriptions.lock().iter().filter_map(Weak::upgrade).collect();
        for member in open {
            let (prefetched, delayed) = member.kept_back(destination, group);
            lag.ready = lag.ready.map(|(count, precision)| (count + prefetched, precision));
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
        let mut is_done = true;
        for shared in open {
            is_done &= shared.ended(deadline).await;
        }
        // A publish that began before is handed over whole: its connection must not end under it.
        is_done &= self.gate.empty(deadline).await;
        is_done &= self.link.board.fewer(0, deadline).await;
        if self.link.is_connected() {
            is_done &= matches!(tokio::time::timeout_at(deadline, self.link.client.flush()).await, Ok(Ok(())));
        }
        let _ = self.link.client.drain().await;
        // What has no answer by now will get none.
        self.link.board.end();
        if is_done {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Timeout, "close", "something had no outcome yet"))
    }
}
