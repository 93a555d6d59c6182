//! A connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anybroker_core::{
    Broker, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description, Destination,
    Endpoint, Error, Group, Lag, Message, PublishTerms, Result, Start, SubscribeSpec, Subscription, TopologySpec,
};
use async_trait::async_trait;
use parking_lot::Mutex;

use crate::store::Store;
use crate::subscription::Membership;
use crate::{capabilities, dead_letter, publisher, subscription, topology};

/// One connection to a store.
pub(crate) struct Connection {
    store: Arc<Store>,
    endpoint: Endpoint,
    capabilities: Capabilities,
    closed: AtomicBool,
    members: Mutex<Vec<Weak<Membership>>>,
}

impl Connection {
    pub(crate) fn new(store: Arc<Store>, url: String) -> Self {
        let endpoint = Endpoint {
            scheme: "memory",
            mode: store.settings.profile.word().into(),
            url,
            server: concat!("memory ", env!("CARGO_PKG_VERSION")).into(),
        };
        let capabilities = capabilities::record(&store.settings);
        Self { store, endpoint, capabilities, closed: AtomicBool::new(false), members: Mutex::default() }
    }

    fn open(&self, operation: &'static str) -> Result<&Store> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::closed(operation).with("endpoint", &self.endpoint));
        }
        Ok(&self.store)
    }

    /// The core's check has seen to it already. A profile does without what its broker has not, also for who goes around that.
    fn refuses(&self, message: &Message) -> Result<()> {
        let Capabilities { delayed_publish, ttl, tombstones, .. } = &self.capabilities;
        if message.delay().is_some() {
            delayed_publish.check("delayed publish", "publish")?;
        }
        if message.ttl().is_some() {
            ttl.check("a time to live", "publish")?;
        }
        if message.is_tombstone() {
            tombstones.check("tombstones", "publish")?;
        }
        Ok(())
    }
}

#[async_trait]
impl Broker for Connection {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        if let Some(error) = batch.iter().find_map(|message| self.refuses(message).err()) {
            return Confirms::ready(batch.iter().map(|_| Err(error.duplicate())).collect());
        }
        match self.open("publish") {
            Ok(store) => publisher::publish(store, batch, terms).await,
            Err(error) => Confirms::ready(batch.iter().map(|_| Err(error.duplicate())).collect()),
        }
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        self.open("subscribe")?;
        match spec.start {
            Start::Time(_) => self.capabilities.replay.check("starting at a time", "subscribe")?,
            Start::Position(_) => self.capabilities.start_position.check("starting at a position", "subscribe")?,
            _ => {}
        }
        let subscription = subscription::subscribe(&self.store, spec)?;
        let mut members = self.members.lock();
        members.retain(|member| member.strong_count() > 0);
        members.push(subscription.member());
        drop(members);
        // Closed meanwhile: whoever closed may have looked at the members before this one was there.
        self.open("subscribe")?;
        Ok(Box::new(subscription))
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        dead_letter::page(self.open("dead letters")?, scope, from.as_ref(), max)
    }

    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        match self.open("redrive") {
            Ok(store) => dead_letter::redrive(store, scope, ids),
            Err(error) => ids.iter().map(|_| Err(error.duplicate())).collect(),
        }
    }

    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        match self.open("purge") {
            Ok(store) => dead_letter::purge(store, scope, ids),
            Err(error) => ids.iter().map(|_| Err(error.duplicate())).collect(),
        }
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        Ok(topology::declare(self.open("declare")?, spec))
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        topology::verify(self.open("verify")?, spec, "verify")
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        topology::describe(self.open("describe")?, destination)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        Ok(self.open("list")?.names(prefix))
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        topology::delete(self.open("delete")?, destination, group)
    }

    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        let lag = topology::lag(self.open("lag")?, destination, group)?;
        Ok(capabilities::shown(lag, &self.capabilities.lag))
    }

    async fn close(&self, _grace: Duration) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        let members = std::mem::take(&mut *self.members.lock());
        members.iter().filter_map(Weak::upgrade).for_each(|member| member.close());
        Ok(())
    }
}
