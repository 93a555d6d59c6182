//! The handle that services hold: every call is checked against the endpoint's record before it reaches the adapter.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::check::{self, Screened};
use crate::config::Setting;
use crate::dead_letters::Moving;
use crate::settle::Rules;
use crate::{
    Broker, Capabilities, Confirms, DeadLetterScope, DeadLetters, Declared, Description, Destination, Effect, Endpoint,
    Error, ErrorKind, Group, Lag, Message, OnFailure, Order, PublishOptions, PublishOrder, PublishOutcome,
    PublishTerms, Receipt, Result, SubscribeSpec, Subscriber, TopologyMode, TopologySpec, Transaction,
};

/// How much later than its deadline a publish is cut off when the adapter did not end it by itself.
const OVERTIME: Duration = Duration::from_secs(1);

/// Far enough for "no deadline".
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// What a connection was configured with, beside the adapter's own settings.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BusOptions {
    /// How long a publish may take.
    pub publish_timeout: Duration,
    /// What a failed message does to later ones of its key.
    pub publish_order: PublishOrder,
    /// What subscriptions start from.
    pub subscribe: SubscribeDefaults,
}

impl Default for BusOptions {
    fn default() -> Self {
        Self {
            publish_timeout: Duration::from_secs(30),
            publish_order: PublishOrder::Key,
            subscribe: SubscribeDefaults(SubscribeSpec::new("*", "*")),
        }
    }
}

/// The configured defaults of subscriptions.
#[derive(Debug, Clone)]
pub struct SubscribeDefaults(SubscribeSpec);

impl SubscribeDefaults {
    pub(crate) fn from_settings(settings: &BTreeMap<&'static str, Option<Setting>>) -> Self {
        let mut spec = SubscribeSpec::new("*", "*");
        let number = |name: &str| match settings.get(name) {
            Some(Some(Setting::Integer(number))) => u32::try_from(*number).ok(),
            _ => None,
        };
        let word = |name: &str| match settings.get(name) {
            Some(Some(Setting::Text(text))) => text.clone(),
            _ => String::new(),
        };
        if let Some(max) = number("max_in_flight") {
            spec.max_in_flight = max as usize;
        }
        if let Some(Some(Setting::Duration(lease))) = settings.get("lease") {
            spec.lease = *lease;
        }
        spec.max_attempts = number("max_attempts").filter(|max| *max > 0);
        spec.crash_limit = number("crash_limit").filter(|max| *max > 0);
        spec.order = match word("order").as_str() {
            "key" => Order::Key,
            "total" => Order::Total,
            _ => Order::None,
        };
        spec.on_failure = match word("on_failure").as_str() {
            "block" => OnFailure::Block,
            "park" => OnFailure::Park,
            _ => OnFailure::GoPast,
        };
        spec.topology = match word("topology").as_str() {
            "verify" => TopologyMode::Verify,
            "leave" => TopologyMode::Leave,
            _ => TopologyMode::Declare,
        };
        Self(spec)
    }

    pub(crate) fn validate(&self) -> Result<()> {
        self.0.validate()
    }
}

/// A connection to one configured endpoint. Cheap to clone; all clones share the connection.
///
/// Nothing reaches the broker unchecked: refused verbs and options answer
/// [`Unsupported`](ErrorKind::Unsupported), and limits hold before the broker sees a message.
#[derive(Clone)]
pub struct Bus(Arc<Shared>);

struct Shared {
    broker: Arc<dyn Broker>,
    options: BusOptions,
    closed: AtomicBool,
    moving: Moving,
}

impl Bus {
    /// Wraps a broker that was built by hand; [`Registry::connect`](crate::Registry::connect) does it for
    /// configured ones.
    pub fn new(broker: Arc<dyn Broker>, options: BusOptions) -> Self {
        Self(Arc::new(Shared { broker, options, closed: AtomicBool::new(false), moving: Moving::default() }))
    }

    /// What the endpoint is called.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        self.0.broker.endpoint()
    }

    /// What the endpoint gives.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        self.0.broker.capabilities()
    }

    /// The adapter itself, unchecked. For wrappers and tests.
    #[must_use]
    pub fn broker(&self) -> &Arc<dyn Broker> {
        &self.0.broker
    }

    /// Publishes one message and waits for its confirm.
    ///
    /// # Errors
    /// As one entry of [`publish`](Self::publish).
    pub async fn send(&self, message: Message) -> Result<Receipt> {
        self.publish(vec![message]).await.pop().expect("one outcome per message")
    }

    /// Publishes a batch and waits for the confirms: one outcome per message, in the order given. One bad entry
    /// does not spoil the others.
    pub async fn publish(&self, batch: Vec<Message>) -> Vec<PublishOutcome> {
        self.submit(batch, &PublishOptions::default()).await.await
    }

    /// Hands a batch to the client, in order, and returns as soon as it is there; the [`Confirms`] tell the
    /// outcomes. This is how many batches are kept on their way without one waiting for another.
    pub async fn submit(&self, batch: Vec<Message>, options: &PublishOptions) -> Confirms {
        if let Err(refusal) = self.publish_allowed(options) {
            return Confirms::ready(batch.iter().map(|_| Err(refusal.duplicate())).collect());
        }
        let terms = PublishTerms {
            timeout: options.timeout.unwrap_or(self.0.options.publish_timeout),
            order: options.order.unwrap_or(self.0.options.publish_order),
            options: options.clone(),
        };
        match check::screen(batch, self.capabilities(), terms.order) {
            Screened::Good(batch) => self.hand_over(batch, terms).await,
            Screened::Mixed { good, outcomes } => {
                let confirms = self.hand_over(good, terms).await;
                match confirms.try_ready() {
                    Ok(good) => Confirms::ready(check::merge(outcomes, good)),
                    Err(waiting) => Confirms::waiting(async move { check::merge(outcomes, waiting.await) }),
                }
            }
        }
    }

    fn publish_allowed(&self, options: &PublishOptions) -> Result<()> {
        self.open("publish")?;
        if options.transaction.is_some() {
            self.capabilities().transactions.check("transactions", "publish")?;
        }
        Ok(())
    }

    /// Gives the batch to the adapter, with a last bound on how long it may take.
    async fn hand_over(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let count = batch.len();
        if count == 0 {
            return Confirms::ready(Vec::new());
        }
        // Clamped: a deadline beyond what an `Instant` can hold would panic.
        let bound = terms.timeout.saturating_add(OVERTIME).min(FOREVER);
        let start = tokio::time::Instant::now();
        let late = move || -> Vec<PublishOutcome> {
            (0..count)
                .map(|_| Err(Error::new(ErrorKind::Timeout, "publish", format!("no outcome within {bound:?}"))))
                .collect()
        };
        match tokio::time::timeout(bound, self.0.broker.publish(batch, terms)).await {
            Err(_) => Confirms::ready(late()),
            Ok(confirms) => match confirms.try_ready() {
                Ok(outcomes) => Confirms::ready(outcomes),
                Err(waiting) => Confirms::waiting(async move {
                    tokio::time::timeout_at(start + bound, waiting).await.unwrap_or_else(|_| late())
                }),
            },
        }
    }

    /// What a subscription of that group starts from: the configured defaults.
    pub fn subscription(&self, destination: impl Into<Destination>, group: impl Into<Group>) -> SubscribeSpec {
        let mut spec = self.0.options.subscribe.0.clone();
        spec.destinations = vec![destination.into()];
        spec.group = group.into();
        spec
    }

    /// Opens a subscription. When it returns it is effective: everything confirmed afterwards belongs to the group.
    ///
    /// # Errors
    /// `ConfigInvalid` with every bad field of the spec; `Unsupported` for what the record refuses; what
    /// [`Broker::subscribe`] says.
    pub async fn subscribe(&self, mut spec: SubscribeSpec) -> Result<Subscriber> {
        self.open("subscribe")?;
        spec.validate()?;
        check::subscribe(&spec, self.capabilities())?;
        if !self.capabilities().dead_letter.is_given() {
            // There is nowhere to bury: the message would come back at once, for ever.
            spec.crash_limit = None;
        }
        let subscription = self.0.broker.subscribe(spec.clone()).await?;
        subscription.context().rules().get_or_init(|| Rules::of(self.capabilities()));
        Ok(Subscriber::new(subscription, spec))
    }

    /// The dead letters of a source and group.
    ///
    /// # Errors
    /// `Unsupported`, `Closed`.
    pub fn dead_letters(&self, source: impl Into<Destination>, group: impl Into<Group>) -> Result<DeadLetters> {
        self.open("dead letters")?;
        self.capabilities().dead_letter.check("dead letters", "dead letters")?;
        let (broker, moving) = (Arc::clone(&self.0.broker), Arc::clone(&self.0.moving));
        Ok(DeadLetters::new(broker, DeadLetterScope::new(source, group), moving))
    }

    /// Creates what is missing, verifies what exists.
    ///
    /// # Errors
    /// `Unsupported`; `AlreadyExists` with other settings; what the adapter says.
    pub async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.open("declare")?;
        self.capabilities().declare.check("declaring topology", "declare")?;
        check::start(spec.start, self.capabilities(), "declare")?;
        if spec.destination.is_empty() || spec.group.as_ref().is_some_and(|group| group.is_empty()) {
            return Err(Error::new(ErrorKind::ConfigInvalid, "declare", "expected names that are not empty"));
        }
        self.0.broker.declare(spec).await
    }

    /// Checks that it exists as asked for.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`.
    pub async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.open("verify")?;
        self.0.broker.verify(spec).await
    }

    /// The destination as the broker has it.
    ///
    /// # Errors
    /// `NotFound`, `Unsupported`.
    pub async fn describe(&self, destination: impl Into<Destination>) -> Result<Description> {
        self.open("describe")?;
        self.capabilities().describe.check("describing topology", "describe")?;
        self.0.broker.describe(&destination.into()).await
    }

    /// The destinations whose logical names begin with `prefix`, in order, as far as the broker's names tell them.
    ///
    /// # Errors
    /// `Unsupported` where the adapter does not list destinations.
    pub async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        self.open("list")?;
        self.0.broker.list(prefix).await
    }

    /// Deletes a group, or without one the destination with all its groups.
    ///
    /// # Errors
    /// `NotFound`, `Unsupported`.
    pub async fn delete(&self, destination: impl Into<Destination>, group: Option<&Group>) -> Result<()> {
        self.open("delete")?;
        self.capabilities().delete.check("deleting topology", "delete")?;
        self.0.broker.delete(&destination.into(), group).await
    }

    /// What the group has left to do.
    ///
    /// # Errors
    /// `NotFound`; `Unsupported` where the record has no figure at all.
    pub async fn lag(&self, destination: impl Into<Destination>, group: impl Into<Group>) -> Result<Lag> {
        self.open("lag")?;
        if self.capabilities().lag == crate::LagPrecision::default() {
            return Err(Error::unsupported("lag", "this endpoint tells no lag; configure its admin endpoint"));
        }
        self.0.broker.lag(&destination.into(), &group.into()).await
    }

    /// Starts a transaction.
    ///
    /// # Errors
    /// `Unsupported` where the record refuses transactions.
    pub async fn begin(&self) -> Result<Arc<dyn Transaction>> {
        self.open("begin")?;
        self.capabilities().transactions.check("transactions", "begin")?;
        self.0.broker.begin().await
    }

    /// Closes the connection within `grace`. Every verb answers `Closed` afterwards. Idempotent.
    ///
    /// # Errors
    /// `Timeout` when something was still on its way.
    pub async fn close(&self, grace: Duration) -> Result<()> {
        self.0.closed.store(true, Ordering::Release);
        let closing = async {
            let begin = tokio::time::Instant::now();
            // What is being redriven comes to its end first.
            let _ = tokio::time::timeout(grace, self.0.moving.write()).await;
            self.0.broker.close(grace.saturating_sub(begin.elapsed())).await
        };
        match tokio::time::timeout(grace.saturating_add(OVERTIME), closing).await {
            Ok(closed) => closed,
            Err(_) => Err(Error::new(ErrorKind::Timeout, "close", format!("not closed within {grace:?}"))
                .with_effect(Effect::Unknown)),
        }
    }

    fn open(&self, operation: &'static str) -> Result<()> {
        if self.0.closed.load(Ordering::Acquire) {
            return Err(Error::closed(operation).with("endpoint", self.endpoint()));
        }
        Ok(())
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bus").field("endpoint", self.endpoint()).finish_non_exhaustive()
    }
}
