//! A broker around another one whose receives and settles fail, and whose lanes move, as a test says.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{
    Broker, Bus, BusOptions, Capabilities, Clock, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared,
    Delivery, DeliveryContext, Description, Destination, Endpoint, Error, Group, Lag, Lane, ManualClock, Message,
    PublishTerms, Received, Result, SettleError, Settlement, Settler, Settling, SubscribeSpec, Subscription,
    SubscriptionEvent, Timestamp, Token, TopologySpec, settle,
};
use anybroker_worker::async_trait;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

type Choose = Box<dyn FnMut(&Delivery, &Settlement) -> Option<Error> + Send>;

/// What goes wrong.
#[derive(Clone, Default)]
pub struct Faults(Arc<Shared>);

#[derive(Default)]
struct Shared {
    receives: Mutex<VecDeque<Result<SubscriptionEvent>>>,
    arrived: Notify,
    settles: Mutex<Option<Choose>>,
    batches: Mutex<Vec<Vec<String>>>,
    extended: Mutex<Vec<String>>,
    clock: Mutex<Option<ManualClock>>,
    /// When leases were extended last, by that clock.
    extended_at: Mutex<Option<Timestamp>>,
    pauses: Mutex<Vec<bool>>,
    epoch: Mutex<u32>,
    /// While true, what was received stays on its way.
    holding: watch::Sender<bool>,
    held: AtomicUsize,
    /// While true, extensions of leases get no answer.
    mute: watch::Sender<bool>,
}

impl Faults {
    /// The next receive fails like that.
    pub fn fail_receive(&self, error: Error) {
        self.0.receives.lock().push_back(Err(error));
        self.0.arrived.notify_one();
    }

    /// The next receive brings that event.
    pub fn happens(&self, event: SubscriptionEvent) {
        self.0.receives.lock().push_back(Ok(event));
        self.0.arrived.notify_one();
    }

    /// Settles for which `choose` has an error fail with it, and leave the delivery as it is.
    pub fn fail_settles(&self, choose: impl FnMut(&Delivery, &Settlement) -> Option<Error> + Send + 'static) {
        *self.0.settles.lock() = Some(Box::new(choose));
    }

    /// Every settled batch, as texts like `ack 1`.
    pub fn batches(&self) -> Vec<Vec<String>> {
        self.0.batches.lock().clone()
    }

    /// Whose leases were extended.
    pub fn extended(&self) -> Vec<String> {
        self.0.extended.lock().clone()
    }

    /// When leases were extended last, by that clock.
    pub fn extended_at(&self, clock: &ManualClock) -> Option<Timestamp> {
        self.0.clock.lock().get_or_insert_with(|| clock.clone());
        *self.0.extended_at.lock()
    }

    pub fn pauses(&self) -> Vec<bool> {
        self.0.pauses.lock().clone()
    }

    /// Deliveries from now on are of lane 0 in this epoch.
    pub fn set_epoch(&self, epoch: u32) {
        *self.0.epoch.lock() = epoch;
    }

    /// What is received from now on stays on its way, as in a request to a broker, until it is let go.
    pub fn hold_receives(&self, holding: bool) {
        self.0.holding.send_replace(holding);
    }

    /// Extensions of leases get no answer until they may.
    pub fn hold_extensions(&self, holding: bool) {
        self.0.mute.send_replace(holding);
    }

    /// How many deliveries are on their way.
    pub fn held(&self) -> usize {
        self.0.held.load(Ordering::SeqCst)
    }

    pub fn around(&self, bus: &Bus) -> Bus {
        let record = bus.capabilities().clone();
        self.with_record(bus, record)
    }

    /// With another record than the broker's own.
    pub fn with_record(&self, bus: &Bus, record: Capabilities) -> Bus {
        let broker = Faulty { inner: Arc::clone(bus.broker()), faults: self.clone(), record };
        Bus::new(Arc::new(broker), BusOptions::default())
    }
}

struct Faulty {
    inner: Arc<dyn Broker>,
    faults: Faults,
    record: Capabilities,
}

#[async_trait]
impl Broker for Faulty {
    fn endpoint(&self) -> &Endpoint {
        self.inner.endpoint()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.record
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        self.inner.publish(batch, terms).await
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        let inner = self.inner.subscribe(spec).await?;
        let settler = FaultySettler { inner: Arc::clone(inner.context()), faults: self.faults.clone() };
        let (group, max) = (inner.context().group.clone(), inner.context().max_attempts);
        let context = DeliveryContext::new(group, max, Arc::new(settler));
        Ok(Box::new(FaultySubscription { inner, faults: self.faults.clone(), context, on_its_way: None }))
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        self.inner.dead_letters(scope, from, max).await
    }

    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.inner.redrive(scope, ids).await
    }

    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.inner.purge(scope, ids).await
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
        self.inner.delete(destination, group).await
    }

    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        self.inner.lag(destination, group).await
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        self.inner.close(grace).await
    }
}

struct FaultySubscription {
    inner: Box<dyn Subscription>,
    faults: Faults,
    context: Arc<DeliveryContext>,
    on_its_way: Option<Received>,
}

#[async_trait]
impl Subscription for FaultySubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        loop {
            if self.on_its_way.is_some() {
                let _ = self.faults.0.holding.subscribe().wait_for(|holding| !holding).await;
                self.faults.0.held.store(0, Ordering::SeqCst);
                return Ok(self.on_its_way.take().unwrap_or_default());
            }
            let arrived = self.faults.0.arrived.notified();
            let next = self.faults.0.receives.lock().pop_front();
            match next {
                Some(Err(error)) => return Err(error),
                Some(Ok(event)) => return Ok(Received { deliveries: Vec::new(), events: vec![event] }),
                None => {}
            }
            tokio::select! {
                biased;
                () = arrived => {}
                received = self.inner.receive(max, wait) => {
                    let mut received = received?;
                    let lane = Lane { index: 0, epoch: *self.faults.0.epoch.lock() };
                    received.deliveries = received
                        .deliveries
                        .into_iter()
                        .map(|delivery| {
                            let mut delivery = delivery.with_context(&self.context);
                            delivery.facts_mut().lane = lane;
                            delivery
                        })
                        .collect();
                    if *self.faults.0.holding.borrow() {
                        self.faults.0.held.store(received.deliveries.len(), Ordering::SeqCst);
                        self.on_its_way = Some(received);
                        continue;
                    }
                    return Ok(received);
                }
            }
        }
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        self.faults.0.pauses.lock().push(paused);
        self.inner.pause(paused).await
    }

    async fn close(self: Box<Self>, grace: Duration) -> Result<()> {
        let closed = self.inner.close(grace).await;
        self.context.close();
        closed
    }
}

struct FaultySettler {
    inner: Arc<DeliveryContext>,
    faults: Faults,
}

#[async_trait]
impl Settler for FaultySettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let mut outcomes: Vec<Option<SettleError>> = Vec::new();
        let mut good = Vec::new();
        let mut told = Vec::new();
        let mut faults = self.faults.0.settles.lock();
        let contexts: Vec<_> = batch.iter().map(|(delivery, _)| Arc::clone(delivery.context())).collect();
        for (delivery, settlement) in batch {
            let word = match &settlement {
                Settlement::Ack => "ack",
                Settlement::Nack(_) => "nack",
                Settlement::Release => "release",
                Settlement::DeadLetter(_) => "dead",
            };
            told.push(format!("{word} {}", super::text(delivery.message())));
            match faults.as_mut().and_then(|choose| choose(&delivery, &settlement)) {
                Some(error) => outcomes.push(Some(SettleError::new(delivery, error))),
                None => {
                    outcomes.push(None);
                    good.push((delivery.with_context(&self.inner), settlement));
                }
            }
        }
        self.faults.0.batches.lock().push(told);
        let settling = settle(good);
        Settling::waiting(async move {
            let mut good = settling.await.into_iter();
            outcomes
                .into_iter()
                .zip(contexts)
                .map(|(failed, context)| match failed {
                    Some(error) => Err(error),
                    None => good.next().unwrap().map_err(|error| {
                        let (delivery, error) = error.into_parts();
                        let facts = delivery.facts().clone();
                        SettleError::new(Delivery::new(delivery.message().clone(), facts, &context), error)
                    }),
                })
                .collect()
        })
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        *self.faults.0.extended_at.lock() = self.faults.0.clock.lock().as_ref().map(Clock::now);
        let mut outcomes = Vec::new();
        for delivery in deliveries {
            self.faults.0.extended.lock().push(super::text(delivery.message()));
            let twin = Delivery::new(delivery.message().clone(), delivery.facts().clone(), &self.inner);
            outcomes.push(twin.extend(lease).await);
        }
        let _ = self.faults.0.mute.subscribe().wait_for(|holding| !holding).await;
        outcomes
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        // Only the settler of the inner context knows what to do: a delivery that was handed out and is dropped.
        let _ = (token, lane);
    }
}
