//! A broker that only remembers what reached it, and a driver whose settings are of every kind.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Broker, Browse, Bus, BusOptions, Capabilities, Confirms,
    DeadLetterAtomicity, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Delivery, DeliveryContext,
    DeliveryFacts, Description, Destination, Driver, Endpoint, Error, ErrorKind, Group, Lag, LagPrecision, Lane,
    LateAck, Limits, Message, Parallelism, Precision, PublishTerms, Receipt, Received, Result, Settlement, Settler,
    Settling, SubscribeSpec, Subscription, Support, Token, TopologySpec,
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
    pub settler: Arc<TestSettler>,
    pub letters: Mutex<Vec<anybroker_core::DeadLetter>>,
    pub redriven: Mutex<Vec<Vec<DeadLetterId>>>,
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
}

#[async_trait]
impl Settler for TestSettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let fail = *self.fail.lock();
        let outcomes = batch.into_iter().map(|(delivery, settlement)| {
            self.settled.lock().push((delivery.message().id().to_string(), settlement));
            match fail {
                None => Ok(AckLevel::Confirmed),
                Some(kind) => Err(anybroker_core::SettleError::new(delivery, Error::new(kind, "settle", "told to"))),
            }
        });
        Settling::ready(outcomes.collect())
    }

    async fn extend(&self, deliveries: &[&Delivery], _lease: Duration) -> Vec<Result<()>> {
        deliveries.iter().map(|_| Ok(())).collect()
    }

    fn abandoned(&self, _token: &Token, _lane: Lane) {
        self.abandoned.fetch_add(1, Ordering::SeqCst);
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
        Arc::new(Self {
            endpoint,
            record,
            published: Mutex::default(),
            terms: Mutex::default(),
            calls: AtomicUsize::new(0),
            ready: Arc::default(),
            settler: Arc::default(),
            letters: Mutex::default(),
            redriven: Mutex::default(),
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
        let settler = Arc::clone(&self.settler) as Arc<dyn Settler>;
        let context = DeliveryContext::new(spec.group, spec.max_attempts, settler);
        Ok(Box::new(TestSubscription { context, ready: Arc::clone(&self.ready) }))
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
    ready: Arc<Mutex<VecDeque<(Message, u32, u32)>>>,
}

#[async_trait]
impl Subscription for TestSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        if self.ready.lock().is_empty() {
            tokio::time::sleep(wait).await;
        }
        let mut ready = self.ready.lock();
        let count = ready.len().min(max);
        let deliveries = ready
            .drain(..count)
            .enumerate()
            .map(|(slot, (message, attempt, deliveries))| {
                let mut facts = DeliveryFacts::new(Token::Pair(slot as u64, 0));
                facts.attempt = attempt;
                facts.deliveries = Some(deliveries);
                Delivery::new(message, facts, &self.context)
            })
            .collect();
        Ok(Received { deliveries, events: Vec::new() })
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
