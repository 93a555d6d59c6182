//! The suite is safe on a broker that others use: it touches nothing that it did not create, and what it created is gone after
//! the run, whether the cases passed, failed or were interrupted.

#![allow(clippy::unwrap_used, reason = "test code")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_conformance::mutants::mutants;
use anybroker_conformance::{Harness, Options, Outcome, Stop, UrlHarness, run};
use anybroker_core::{
    Broker, Bus, BusOptions, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared,
    Description, Destination, Endpoint, ErrorKind, Group, Lag, Message, PublishTerms, Result, SubscribeSpec,
    Subscription, TopologySpec,
};
use anybroker_memory::Memory;
use async_trait::async_trait;
use futures_util::StreamExt;
use parking_lot::Mutex;

/// Every destination that a verb named.
type Named = Arc<Mutex<BTreeSet<Destination>>>;

/// A broker that writes down which destinations it is asked for.
struct Watched {
    inner: Arc<dyn Broker>,
    named: Named,
    /// How long a publish is on its way. It arrives whether or not anybody still waits for it, as on a network.
    latency: Duration,
}

impl Watched {
    fn note(&self, name: &Destination) {
        self.named.lock().insert(name.clone());
    }
}

#[async_trait]
impl Broker for Watched {
    fn endpoint(&self) -> &Endpoint {
        self.inner.endpoint()
    }

    fn capabilities(&self) -> &Capabilities {
        self.inner.capabilities()
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        batch.iter().for_each(|message| self.note(message.destination()));
        if self.latency.is_zero() {
            return self.inner.publish(batch, terms).await;
        }
        let (inner, latency) = (Arc::clone(&self.inner), self.latency);
        let arrival = tokio::spawn(async move {
            tokio::time::sleep(latency).await;
            inner.publish(batch, terms).await
        });
        arrival.await.unwrap()
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        spec.destinations.iter().for_each(|name| self.note(name));
        self.inner.subscribe(spec).await
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        self.note(&scope.source);
        self.inner.dead_letters(scope, from, max).await
    }

    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.note(&scope.source);
        self.inner.redrive(scope, ids).await
    }

    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.note(&scope.source);
        self.inner.purge(scope, ids).await
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.note(&spec.destination);
        self.inner.declare(spec).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.note(&spec.destination);
        self.inner.verify(spec).await
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        self.note(destination);
        self.inner.describe(destination).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.note(destination);
        self.inner.delete(destination, group).await
    }

    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        self.note(destination);
        self.inner.lag(destination, group).await
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        self.inner.close(grace).await
    }
}

/// A memory broker, and which destinations of it were named.
struct Shared {
    memory: Memory,
    named: Named,
    latency: Duration,
}

impl Shared {
    fn new() -> Self {
        Self::with_latency(Duration::ZERO)
    }

    fn with_latency(latency: Duration) -> Self {
        Self { memory: Memory::new(), named: Named::default(), latency }
    }

    fn harness(&self) -> Arc<dyn Harness> {
        let (memory, named, latency) = (self.memory.clone(), Arc::clone(&self.named), self.latency);
        let harness = UrlHarness::new("a shared broker", move || {
            let inner = Arc::clone(memory.bus().broker());
            let watched = Watched { inner, named: Arc::clone(&named), latency };
            Box::pin(async move { Ok(Bus::new(Arc::new(watched), BusOptions::default())) })
        });
        let harness = harness.with_lease(Duration::from_millis(500)).with_quiet(Duration::from_millis(100));
        Arc::new(harness.with_patience(Duration::from_secs(5)))
    }

    /// Each name is the suite's own, and none is there any more.
    async fn is_clean(&self) {
        let named = self.named.lock().clone();
        assert!(!named.is_empty(), "nothing was touched at all");
        let bus = self.memory.bus();
        for name in named {
            assert!(name.starts_with("conform-"), "{name} is not the suite's");
            let found = bus.describe(&name).await.map(|_| ()).map_err(|error| error.kind());
            assert_eq!(found, Err(ErrorKind::NotFound), "{name} is left behind");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_touches_only_what_it_created_and_leaves_nothing_behind() {
    let shared = Shared::new();
    let report = run(shared.harness(), Options::default().with_parallelism(16)).await.unwrap();
    assert!(report.is_green(), "{}", report.summary());
    shared.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cases_that_fail_leave_nothing_behind() {
    let shared = Shared::new();
    // One that cannot delete leaves things behind by its nature.
    let chosen = mutants().into_iter().filter(|mutant| mutant.name != "delete-no-op");
    let runs = chosen.map(|mutant| {
        let harness = Arc::new(mutant.harness(shared.harness()));
        async move { run(harness, Options::default().with_filter(mutant.killed_by)).await.unwrap().totals.fail }
    });
    let failed: usize = futures_util::stream::iter(runs).buffered(8).collect::<Vec<_>>().await.into_iter().sum();
    assert!(failed > 10, "only {failed} failed");
    shared.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_run_leaves_nothing_behind_and_says_what_it_did_not_run() {
    let shared = Shared::with_latency(Duration::from_millis(40));
    let (stop, done) = (Stop::new(), AtomicUsize::new(0));
    let asked = stop.clone();
    let options = Options::default().with_parallelism(8).with_stop(stop).with_progress(move |_| {
        if done.fetch_add(1, Ordering::Relaxed) == 10 {
            asked.request();
        }
    });
    let report = run(shared.harness(), options).await.unwrap();
    let interrupted =
        report.cases.iter().filter(|case| case.outcome == Outcome::NotRun && case.detail.contains("interrupted"));
    assert!(interrupted.count() > 50, "{}", report.summary());
    assert!(report.totals.pass >= 10, "{}", report.summary());
    shared.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_arrives_after_an_interrupt_and_was_not_there_at_the_first_look_is_deleted_too() {
    let shared = Shared::with_latency(Duration::from_millis(50));
    let (stop, named) = (Stop::new(), Arc::clone(&shared.named));
    let asked = stop.clone();
    let watching = tokio::spawn(async move {
        // The first verb of this case is a publish, which is still on its way then.
        while named.lock().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        asked.request();
    });
    let options =
        Options::default().with_filter("delivery/messages-published-before-the-group-exists*").with_stop(stop);
    let report = run(shared.harness(), options).await.unwrap();
    watching.await.unwrap();
    assert_eq!(report.totals.not_run, 1, "{}", report.summary());
    tokio::time::sleep(shared.latency).await;
    shared.is_clean().await;
}
