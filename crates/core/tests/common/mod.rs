//! A broker that only remembers what reached it, and a driver whose settings are of every kind.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share")]

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Broker, Browse, Bus, BusOptions, Capabilities, Confirms,
    DeadLetterAtomicity, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Delivery, DeliveryContext,
    DeliveryFacts, Description, Destination, Driver, Endpoint, Error, ErrorKind, Group, Lag, LagPrecision, Lane,
    LateAck, Limits, Message, Parallelism, Precision, PublishTerms, Receipt, Received, Result, SettleError, Settlement,
    Settler, Settling, SubscribeSpec, Subscription, SubscriptionEvent, Support, Token, TopologySpec,
};
use async_trait::async_trait;
use parking_lot::Mutex;

/// A record that gives everything and limits nothing.
pub fn record() -> Capabilities {
    Capabilities {
        at_least_once: Support::Native,
        key_order: Support::Native,
        total_order: Support::Native,
        block_on_failure: Support::Native,
        park_on_failure: Support::Native,
        parallelism: Parallelism::Any,
        ack_granularity: AckGranularity::Individual,
        ack_level: AckLevel::Confirmed,
        late_ack: LateAck::Refused,
        nack: Support::Native,
        nack_delay: Support::Native,
        release: Support::Native,
        lease: Support::Native,
        lease_extension: Support::Native,
        attempt_count: AttemptCount::Exact,
        crash_count: Support::Native,
        dead_letter: Support::Native,
        dead_letter_atomicity: DeadLetterAtomicity::Atomic,
        dead_letter_browse: Browse::NonDestructive,
        redrive: Support::Native,
        purge: Support::Native,
        groups: Support::Native,
        kept_before_group: Support::Native,
        replay: Support::Native,
        start_position: Support::Native,
        start_latest: Support::Native,
        patterns: Support::Native,
        delayed_publish: Support::Native,
        ttl: Support::Native,
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        publish_dedup: Support::Native,
        transactions: Support::Native,
        tombstones: Support::Native,
        declare: Support::Native,
        describe: Support::Native,
        delete: Support::Native,
        lag: LagPrecision { ready: Some(Precision::Exact), ..LagPrecision::default() },
        admin_needed: false,
        survives_process_kill: Support::Native,
        survives_power_loss: Support::Native,
        limits: Limits::default(),
    }
}

/// Everything that got past the core, and what the next receives bring.
pub struct TestBroker {
    endpoint: Endpoint,
    record: Capabilities,
    pub published: Mutex<Vec<Message>>,
    pub terms: Mutex<Option<PublishTerms>>,
    pub calls: AtomicUsize,
    /// What each receive brings: message, attempt, hand-overs.
    pub ready: Arc<Mutex<VecDeque<(Message, u32, u32)>>>,
    /// What the next receive tells.
    pub events: Arc<Mutex<Vec<SubscriptionEvent>>>,
    pub settler: Arc<TestSettler>,
    pub letters: Mutex<Vec<anybroker_core::DeadLetter>>,
    pub redriven: Mutex<Vec<Vec<DeadLetterId>>>,
    /// How long letters are back and not gone yet.
    pub redrive_takes: Mutex<Duration>,
    /// The sizes of the pages that were asked for.
    pub pages: Mutex<Vec<usize>>,
}

/// What reached the adapter's side of settling.
#[derive(Default)]
pub struct TestSettler {
    pub settled: Mutex<Vec<(String, Settlement)>>,
    pub abandoned: AtomicUsize,
    /// Fails every settlement with this kind.
    pub fail: Mutex<Option<ErrorKind>>,
    /// While true, outcomes take a second.
    pub slow: AtomicBool,
    /// While true, what is dropped is ready again at once, before everything else, as at most brokers. Not more than
    /// twenty times, so that a loop fails instead of running for ever.
    pub brings_back: AtomicBool,
    /// What was handed out, by token.
    out: Mutex<HashMap<u64, (Message, u32, u32)>>,
    ready: Arc<Mutex<VecDeque<(Message, u32, u32)>>>,
}

impl TestSettler {
    pub fn abandoned(&self) -> usize {
        self.abandoned.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl Settler for TestSettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let fail = *self.fail.lock();
        for (delivery, settlement) in &batch {
            self.settled.lock().push((delivery.message().id().to_string(), settlement.clone()));
        }
        let outcome = move |(delivery, _)| match fail {
            None => Ok(AckLevel::Confirmed),
            Some(kind) => Err(SettleError::new(delivery, Error::new(kind, "settle", "told to"))),
        };
        if !self.slow.load(Ordering::SeqCst) {
            return Settling::ready(batch.into_iter().map(outcome).collect());
        }
        Settling::waiting(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            batch.into_iter().map(outcome).collect()
        })
    }

    async fn extend(&self, deliveries: &[&Delivery], _lease: Duration) -> Vec<Result<()>> {
        deliveries.iter().map(|_| Ok(())).collect()
    }

    fn abandoned(&self, token: &Token, _lane: Lane) {
        let before = self.abandoned.fetch_add(1, Ordering::SeqCst);
        let Token::Pair(token, _) = token else { return };
        if let Some(again) = self.out.lock().remove(token)
            && before < 20
            && self.brings_back.load(Ordering::SeqCst)
        {
            self.ready.lock().push_front(again);
        }
    }
}

impl TestBroker {
    pub fn new(record: Capabilities) -> Arc<Self> {
        let endpoint = Endpoint {
            scheme: "test",
            mode: "default".into(),
            url: "test://here".into(),
            server: "none, in the test".into(),
        };
        let settler = Arc::new(TestSettler::default());
        Arc::new(Self {
            endpoint,
            record,
            published: Mutex::default(),
            terms: Mutex::default(),
            calls: AtomicUsize::new(0),
            ready: Arc::clone(&settler.ready),
            events: Arc::default(),
            settler,
            letters: Mutex::default(),
            redriven: Mutex::default(),
            redrive_takes: Mutex::default(),
            pages: Mutex::default(),
        })
    }

    pub fn bus(self: &Arc<Self>) -> Bus {
        Bus::new(Arc::clone(self) as Arc<dyn Broker>, BusOptions::default())
    }

    fn called(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Broker for TestBroker {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn capabilities(&self) -> &Capabilities {
        &self.record
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        self.called();
        *self.terms.lock() = Some(terms);
        let outcomes = batch.iter().map(|_| Ok(Receipt { position: None, duplicate: false })).collect();
        self.published.lock().extend(batch);
        Confirms::ready(outcomes)
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        self.called();
        let settler = Arc::clone(&self.settler);
        let context = DeliveryContext::new(spec.group, spec.max_attempts, Arc::clone(&settler) as Arc<dyn Settler>);
        Ok(Box::new(TestSubscription { context, settler, events: Arc::clone(&self.events), handed_out: 0 }))
    }

    async fn dead_letters(
        &self,
        _scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        self.called();
        self.pages.lock().push(max);
        let letters = self.letters.lock();
        let rest: Vec<_> =
            letters.iter().filter(|letter| from.as_ref().is_none_or(|from| letter.id >= *from)).collect();
        let next = rest.get(max).map(|letter| letter.id.clone());
        Ok(DeadLetterPage { letters: rest.into_iter().take(max).cloned().collect(), next })
    }

    async fn redrive(&self, _scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.called();
        self.redriven.lock().push(ids.to_vec());
        let takes = *self.redrive_takes.lock();
        tokio::time::sleep(takes).await;
        self.letters.lock().retain(|letter| !ids.contains(&letter.id));
        ids.iter().map(|_| Ok(())).collect()
    }

    async fn purge(&self, _scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.called();
        self.letters.lock().retain(|letter| !ids.contains(&letter.id));
        ids.iter().map(|_| Ok(())).collect()
    }

    async fn declare(&self, _spec: &TopologySpec) -> Result<Declared> {
        self.called();
        Ok(Declared::Created)
    }

    async fn verify(&self, _spec: &TopologySpec) -> Result<()> {
        self.called();
        Ok(())
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        self.called();
        Err(Error::new(ErrorKind::NotFound, "describe", "nothing is here").with("destination", destination))
    }

    async fn delete(&self, _destination: &Destination, _group: Option<&Group>) -> Result<()> {
        self.called();
        Ok(())
    }

    async fn lag(&self, _destination: &Destination, _group: &Group) -> Result<Lag> {
        self.called();
        Ok(Lag::default())
    }

    async fn close(&self, _grace: Duration) -> Result<()> {
        Ok(())
    }
}

struct TestSubscription {
    context: Arc<DeliveryContext>,
    settler: Arc<TestSettler>,
    events: Arc<Mutex<Vec<SubscriptionEvent>>>,
    handed_out: u64,
}

#[async_trait]
impl Subscription for TestSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        if self.settler.ready.lock().is_empty() && self.events.lock().is_empty() {
            tokio::time::sleep(wait).await;
        }
        let mut ready = self.settler.ready.lock();
        let count = ready.len().min(max);
        let deliveries = ready
            .drain(..count)
            .map(|(message, attempt, deliveries)| {
                self.handed_out += 1;
                self.settler.out.lock().insert(self.handed_out, (message.clone(), attempt, deliveries + 1));
                let mut facts = DeliveryFacts::new(Token::Pair(self.handed_out, 0));
                facts.attempt = attempt;
                facts.deliveries = Some(deliveries);
                Delivery::new(message, facts, &self.context)
            })
            .collect();
        Ok(Received { deliveries, events: std::mem::take(&mut *self.events.lock()) })
    }

    async fn pause(&mut self, _paused: bool) -> Result<()> {
        Ok(())
    }

    async fn close(self: Box<Self>, _grace: Duration) -> Result<()> {
        Ok(())
    }
}

/// A driver with one setting of each kind; it remembers the settings that it was given.
#[derive(Clone, Default)]
pub struct TestDriver {
    pub sections: Arc<Mutex<Vec<Section>>>,
    pub brokers: Arc<Mutex<Vec<Arc<TestBroker>>>>,
    pub record: Option<Capabilities>,
}

pub const FIELDS: &[Field] = &[
    Field::choice("mode", "The mode.", &["fast", "safe"], "safe"),
    Field::integer("level", "The level.", 0, 9, "3"),
    Field::duration("linger", "How long.", "5ms"),
    Field::bool("compress", "Whether.", "false"),
    Field::list("tags", "Some words."),
    Field::secret("token", "The token."),
    Field::text("client", "The client's name.").or("anybroker"),
    Field::text("admin", "The admin endpoint."),
];

#[async_trait]
impl Driver for TestDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["test", "test+tls"]
    }

    fn fields(&self) -> &'static [Field] {
        FIELDS
    }

    fn takes_credentials(&self) -> bool {
        true
    }

    fn check(&self, section: &Section) -> Vec<Problem> {
        let mut problems = Vec::new();
        if section.url().hosts().is_empty() {
            let message = "a host is missing; expected test://host".to_owned();
            problems.push(Problem { key: "url".into(), origin: "url".into(), message });
        }
        if section.text("mode") == "fast" && section.integer("level") > 5 {
            let message = "mode fast has levels up to 5".to_owned();
            problems.push(Problem { key: "test.level".into(), origin: "settings".into(), message });
        }
        problems
    }

    async fn connect(&self, section: Section) -> Result<Arc<dyn Broker>> {
        self.sections.lock().push(section);
        let broker = TestBroker::new(self.record.clone().unwrap_or_else(record));
        self.brokers.lock().push(Arc::clone(&broker));
        Ok(broker)
    }
}

/// Another broker's driver, with a section of its own and no settings.
pub struct OtherDriver;

#[async_trait]
impl Driver for OtherDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["other"]
    }

    fn fields(&self) -> &'static [Field] {
        &[]
    }

    async fn connect(&self, _section: Section) -> Result<Arc<dyn Broker>> {
        Ok(TestBroker::new(record()))
    }
}
