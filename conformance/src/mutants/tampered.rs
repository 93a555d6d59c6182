//! The wrapper that a fault sits in.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anybroker_core::{
    Broker, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Delivery, DeliveryContext,
    DeliveryFacts, Description, Destination, Endpoint, Error, Group, Lag, Lane, Message, PublishTerms, Received,
    Result, SettleError, Settlement, Settler, Settling, SubscribeSpec, Subscription, Token, TopologySpec,
};
use async_trait::async_trait;

use crate::ServerControl;

pub(super) type Entries = Vec<(Delivery, Settlement)>;

/// What a mutant may do otherwise. Everything not overridden is as it should be.
#[async_trait]
pub(super) trait Fault: Send + Sync + 'static {
    fn record(&self, record: Capabilities) -> Capabilities {
        record
    }

    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        broker.publish(batch, terms).await
    }

    /// What is subscribed to in truth.
    fn spec(&self, spec: SubscribeSpec) -> SubscribeSpec {
        spec
    }

    fn max_attempts(&self, max_attempts: Option<u32>) -> Option<u32> {
        max_attempts
    }

    /// Whether subscribing waits for the first receive.
    fn is_lazy(&self) -> bool {
        false
    }

    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        tap.inner.receive(max, wait).await
    }

    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        inner.settler.settle(batch)
    }

    async fn extend(&self, inner: &Inner, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        inner.settler.extend(deliveries, lease).await
    }

    fn abandoned(&self, inner: &Inner, token: &Token, lane: Lane) {
        inner.settler.abandoned(token, lane);
    }

    async fn pause(&self, tap: &mut Tap, paused: bool) -> Result<()> {
        tap.inner.pause(paused).await
    }

    /// Before the inner subscription is closed.
    async fn closing(&self, inner: &Inner) {
        let _ = inner;
    }

    /// Closes the inner subscription.
    async fn close(&self, inner: Box<dyn Subscription>, grace: Duration) -> Result<()> {
        let context = Arc::clone(inner.context());
        let closed = inner.close(grace).await;
        context.close();
        closed
    }

    async fn dead_letters(
        &self,
        broker: &Arc<dyn Broker>,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        broker.dead_letters(scope, from, max).await
    }

    async fn redrive(
        &self,
        broker: &Arc<dyn Broker>,
        scope: &DeadLetterScope,
        ids: &[DeadLetterId],
    ) -> Vec<Result<()>> {
        broker.redrive(scope, ids).await
    }

    async fn purge(&self, broker: &Arc<dyn Broker>, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        broker.purge(scope, ids).await
    }

    async fn delete(&self, broker: &Arc<dyn Broker>, destination: &Destination, group: Option<&Group>) -> Result<()> {
        broker.delete(destination, group).await
    }

    async fn lag(&self, broker: &Arc<dyn Broker>, destination: &Destination, group: &Group) -> Result<Lag> {
        broker.lag(destination, group).await
    }

    /// A server of its own, in the place of the harness'.
    fn server(&self) -> Option<Arc<dyn ServerControl>> {
        None
    }
}

/// No fault.
pub(super) struct Faultless;

impl Fault for Faultless {}

/// Publishes that take so long.
#[cfg(test)]
pub(super) struct Slow(pub(super) std::time::Duration);

#[cfg(test)]
#[async_trait]
impl Fault for Slow {
    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        tokio::time::sleep(self.0).await;
        broker.publish(batch, terms).await
    }
}

/// The inner subscription's side of settling.
pub(super) struct Inner {
    pub(super) context: Arc<DeliveryContext>,
    pub(super) settler: Arc<dyn Settler>,
    /// A number that no other subscription has.
    pub(super) number: u64,
}

impl Inner {
    /// Something that settles what `facts` tell of, whoever holds the delivery itself.
    pub(super) fn stand_in(&self, facts: DeliveryFacts) -> Delivery {
        Delivery::new(Message::new("stand-in", ""), facts, &self.context)
    }

    /// Settles it, and does not care for the answer.
    pub(super) fn settle_quietly(&self, facts: DeliveryFacts, settlement: Settlement) {
        drop(self.settler.settle(vec![(self.stand_in(facts), settlement)]));
    }
}

/// The inner subscription.
pub(super) struct Tap {
    pub(super) inner: Box<dyn Subscription>,
    pub(super) side: Arc<Inner>,
    /// Deliveries that a fault keeps for the next receive.
    pub(super) kept: Vec<Delivery>,
}

/// A broker with a fault in it.
pub(super) struct Tampered {
    inner: Arc<dyn Broker>,
    fault: Arc<dyn Fault>,
    record: Capabilities,
}

impl Tampered {
    pub(super) fn new(inner: Arc<dyn Broker>, fault: Arc<dyn Fault>) -> Self {
        let record = fault.record(inner.capabilities().clone());
        Self { inner, fault, record }
    }
}

#[async_trait]
impl Broker for Tampered {
    fn endpoint(&self) -> &Endpoint {
        self.inner.endpoint()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.record
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        self.fault.publish(&self.inner, batch, terms).await
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        let spec = self.fault.spec(spec);
        let settler = Arc::new(TamperedSettler {
            fault: Arc::clone(&self.fault),
            inner: OnceLock::new(),
            outer: OnceLock::new(),
        });
        let max_attempts = self.fault.max_attempts(spec.max_attempts);
        let context = DeliveryContext::new(spec.group.clone(), max_attempts, Arc::clone(&settler) as Arc<dyn Settler>);
        let _ = settler.outer.set(Arc::downgrade(&context));
        let mut subscription = TamperedSubscription {
            fault: Arc::clone(&self.fault),
            broker: Arc::clone(&self.inner),
            spec,
            context,
            settler,
            tap: None,
        };
        if !self.fault.is_lazy() {
            subscription.open().await?;
        }
        Ok(Box::new(subscription))
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        self.fault.dead_letters(&self.inner, scope, from, max).await
    }

    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.fault.redrive(&self.inner, scope, ids).await
    }

    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.fault.purge(&self.inner, scope, ids).await
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.inner.declare(spec).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.inner.verify(spec).await
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        self.inner.describe(destination).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.fault.delete(&self.inner, destination, group).await
    }

    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        self.fault.lag(&self.inner, destination, group).await
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        self.inner.close(grace).await
    }
}

struct TamperedSubscription {
    fault: Arc<dyn Fault>,
    broker: Arc<dyn Broker>,
    spec: SubscribeSpec,
    context: Arc<DeliveryContext>,
    settler: Arc<TamperedSettler>,
    tap: Option<Tap>,
}

impl TamperedSubscription {
    async fn open(&mut self) -> Result<&mut Tap> {
        if self.tap.is_none() {
            let inner = self.broker.subscribe(self.spec.clone()).await?;
            let context = Arc::clone(inner.context());
            let settler = Arc::clone(context.settler());
            let number = Arc::as_ptr(&context) as usize as u64;
            let side = Arc::new(Inner { context, settler, number });
            let _ = self.settler.inner.set(Arc::clone(&side));
            self.tap = Some(Tap { inner, side, kept: Vec::new() });
        }
        self.tap.as_mut().ok_or_else(|| Error::closed("subscribe"))
    }
}

#[async_trait]
impl Subscription for TamperedSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        let (fault, context) = (Arc::clone(&self.fault), Arc::clone(&self.context));
        let tap = self.open().await?;
        let Received { deliveries, events } = fault.receive(tap, max, wait).await?;
        let deliveries = deliveries.into_iter().map(|delivery| delivery.with_context(&context)).collect();
        Ok(Received { deliveries, events })
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        let fault = Arc::clone(&self.fault);
        fault.pause(self.open().await?, paused).await
    }

    async fn close(self: Box<Self>, grace: Duration) -> Result<()> {
        let Some(tap) = self.tap else { return Ok(()) };
        self.fault.closing(&tap.side).await;
        self.fault.close(tap.inner, grace).await
    }
}

struct TamperedSettler {
    fault: Arc<dyn Fault>,
    inner: OnceLock<Arc<Inner>>,
    outer: OnceLock<Weak<DeliveryContext>>,
}

impl TamperedSettler {
    fn inner(&self) -> &Arc<Inner> {
        self.inner.get().expect("a delivery came from an inner subscription, which is open")
    }
}

#[async_trait]
impl Settler for TamperedSettler {
    fn settle(&self, batch: Entries) -> Settling {
        let inner = Arc::clone(self.inner());
        let batch = batch
            .into_iter()
            .map(|(delivery, settlement)| (delivery.with_context(&inner.context), settlement))
            .collect();
        let settling = self.fault.settle(&inner, batch);
        let outer = self.outer.get().and_then(Weak::upgrade);
        let give_back = move |outcome: anybroker_core::SettleOutcome| match (outcome, &outer) {
            (Err(failed), Some(outer)) => {
                let (delivery, error) = failed.into_parts();
                Err(SettleError::new(delivery.with_context(outer), error))
            }
            (outcome, _) => outcome,
        };
        match settling.try_ready() {
            Ok(outcomes) => Settling::ready(outcomes.into_iter().map(give_back).collect()),
            Err(waiting) => Settling::waiting(async move { waiting.await.into_iter().map(give_back).collect() }),
        }
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let inner = Arc::clone(self.inner());
        self.fault.extend(&inner, deliveries, lease).await
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        self.fault.abandoned(self.inner(), token, lane);
    }
}
