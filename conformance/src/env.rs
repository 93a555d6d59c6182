//! What a case works with: names of its own, clients that record, waits with deadlines.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anybroker_core::{Bus, Capabilities, Destination, Error, ErrorKind, Group, Parallelism, Start, SubscribeSpec};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::time::Instant;

use crate::case::{Breach, Proof};
use crate::client::Client;
use crate::faults::{Schedule, Watched};
use crate::history::{History, What};
use crate::punctual::{self, LATE};
use crate::{Harness, ServerControl};

/// The surroundings of one run of one case.
pub(crate) struct Env {
    pub(crate) harness: Arc<dyn Harness>,
    pub(crate) record: Arc<Capabilities>,
    pub(crate) history: History,
    /// Which faults are to happen.
    pub(crate) schedule: Schedule,
    /// The server, where cases may do something to it. It is restored after the case.
    server: Result<Arc<Watched>, String>,
    /// Begins every name; no other case, and no other run, has it.
    scope: String,
    seed: u64,
    clients: AtomicU32,
    created: Arc<Created>,
}

/// What a case has created, and those whose surroundings these are within: whatever a part of a case could not delete, because
/// it failed or was given up, is deleted after the case.
#[derive(Default)]
struct Created {
    names: Mutex<Vec<Destination>>,
    outer: Option<Arc<Created>>,
}

impl Created {
    fn add(&self, name: &Destination) {
        let mut names = self.names.lock();
        if !names.contains(name) {
            names.push(name.clone());
        }
        if let Some(outer) = &self.outer {
            outer.add(name);
        }
    }
}

impl Env {
    pub(crate) fn new(harness: Arc<dyn Harness>, record: Arc<Capabilities>, scope: String, seed: u64) -> Self {
        Self::part(harness, record, scope, seed, History::new(), 0)
    }

    /// With these faults of its schedule only, by their numbers from 1.
    pub(crate) fn with_schedule(mut self, only: Option<Vec<usize>>) -> Self {
        self.schedule = Schedule::only(only);
        self
    }

    /// The part of a case's surroundings that another process has: the names are the case's, and so is whatever is created.
    pub(crate) fn part(
        harness: Arc<dyn Harness>,
        record: Arc<Capabilities>,
        scope: String,
        seed: u64,
        history: History,
        client: u32,
    ) -> Self {
        let (clients, schedule, created) = (AtomicU32::new(client), Schedule::default(), Arc::default());
        let server = harness.server().map(|server| Arc::new(Watched::new(server)));
        Self { harness, record, history, schedule, server, scope, seed, clients, created }
    }

    /// Surroundings within these, with names and a history of their own.
    pub(crate) fn sub(&self, label: &str) -> Self {
        let scope = format!("{}.{label}", self.scope);
        let created = Arc::new(Created { names: Mutex::default(), outer: Some(Arc::clone(&self.created)) });
        let server = self.server.clone();
        Self { created, server, ..Self::new(Arc::clone(&self.harness), Arc::clone(&self.record), scope, self.seed) }
    }

    /// A fresh client.
    pub(crate) async fn client(&self) -> Proof<Client<'_>> {
        let bus = self.bounded("connect", self.harness.connect()).await??;
        Ok(self.wrap(bus))
    }

    /// A fresh client that creates no destinations.
    pub(crate) async fn strict_client(&self) -> Proof<Client<'_>> {
        match self.bounded("connect", self.harness.connect_strict()).await? {
            Some(bus) => Ok(self.wrap(bus?)),
            None => Err(Breach::NotRun("the harness has no client that creates no destinations".into())),
        }
    }

    pub(crate) fn wrap(&self, bus: Bus) -> Client<'_> {
        Client::new(self, bus, self.next_client())
    }

    /// What the history calls the next client.
    pub(crate) fn next_client(&self) -> u32 {
        self.clients.fetch_add(1, Ordering::Relaxed)
    }

    /// How many clients there have been.
    pub(crate) fn clients(&self) -> u32 {
        self.clients.load(Ordering::Relaxed)
    }

    /// A destination of this case, deleted after it.
    pub(crate) fn destination(&self, label: &str) -> Destination {
        let name = Destination::from(format!("{}.{label}", self.scope));
        self.created.add(&name);
        name
    }

    /// A group of this case.
    pub(crate) fn group(&self, label: &str) -> Group {
        Group::from(format!("{}.{label}", self.scope))
    }

    /// What begins every name of this case.
    pub(crate) fn scope(&self) -> &str {
        &self.scope
    }

    /// A spec with the longest lease that lets nothing expire during a case, and without limits on attempts.
    pub(crate) fn spec(&self, destination: &Destination, group: &Group) -> SubscribeSpec {
        let longest = self.record.limits.lease_max_ms.map_or(Duration::MAX, Duration::from_millis);
        SubscribeSpec::new(destination, group)
            .with_lease(Duration::from_secs(120).min(longest).max(self.lease()))
            .with_max_attempts(None)
            .with_crash_limit(None)
    }

    /// The start that passes over what is stored, where there is one.
    pub(crate) fn latest(&self) -> Start {
        if self.record.start_latest.is_given() { Start::Latest } else { Start::Earliest }
    }

    /// How many of `count` messages of one key a member can hold unsettled at a time: a queue that locks a key while some of
    /// it are out (message groups) brings what one receive brings.
    pub(crate) fn of_one_key(&self, count: usize) -> usize {
        let limit = self.record.limits.receive_batch.filter(|_| self.record.key_order.is_given());
        limit.and_then(|limit| usize::try_from(limit).ok()).map_or(count, |limit| limit.min(count))
    }

    /// How many of `count` messages of any keys a member can hold unsettled at a time: where one member works at a time, all of
    /// them are as those of one key.
    pub(crate) fn at_once(&self, count: usize) -> usize {
        if self.record.parallelism == Parallelism::One { self.of_one_key(count) } else { count }
    }

    /// A key for messages of which many are out at a time: none where a queue locks a key while some of it are out.
    pub(crate) fn loose_key(&self) -> Option<&'static str> {
        (self.of_one_key(usize::MAX) == usize::MAX).then_some("k")
    }

    /// A lease short enough to wait for.
    pub(crate) fn lease(&self) -> Duration {
        self.harness.lease().max(Duration::from_millis(self.record.limits.lease_min_ms.unwrap_or(0)))
    }

    pub(crate) fn quiet(&self) -> Duration {
        self.harness.quiet()
    }

    pub(crate) fn patience(&self) -> Duration {
        self.harness.patience()
    }

    /// What everything random starts from.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// A generator that depends on nothing but seed and case.
    pub(crate) fn rng(&self) -> StdRng {
        StdRng::seed_from_u64(self.seed)
    }

    /// Lets time go by on the broker's clock: turned by hand, or waited for.
    pub(crate) async fn pass(&self, duration: Duration) {
        match self.harness.clock() {
            Some(clock) => {
                self.history.turn(duration);
                clock.advance(duration);
            }
            None => tokio::time::sleep(duration).await,
        }
    }

    /// Microseconds on the broker's clock since the case began.
    pub(crate) fn now(&self) -> u64 {
        self.history.now()
    }

    /// Whether at least `least` has gone by since `start`.
    pub(crate) fn has_waited(&self, start: u64, least: Duration) -> bool {
        Duration::from_micros(self.now() - start) >= least
    }

    /// Bounds an operation: one that does not end is a hang, and fails the case.
    pub(crate) async fn bounded<T>(&self, operation: &str, future: impl Future<Output = T>) -> Proof<T> {
        self.within(operation, self.patience() + Duration::from_secs(5), future).await
    }

    /// Bounds an operation that may take so long.
    pub(crate) async fn within<T>(
        &self,
        operation: &str,
        bound: Duration,
        future: impl Future<Output = T>,
    ) -> Proof<T> {
        let ended = tokio::time::timeout(bound, future).await;
        ended.map_err(|_| self.hang(operation, &format!("did not end within {bound:?}")))
    }

    /// Bounds an operation that has a deadline, from now on: it has to keep that, whatever the broker does.
    pub(crate) async fn in_time<T>(
        &self,
        operation: &str,
        deadline: Duration,
        future: impl Future<Output = T>,
    ) -> Proof<T> {
        let ended = punctual::in_time(deadline, future).await;
        ended.ok_or_else(|| {
            self.hang(operation, &format!("had a deadline of {deadline:?}, and ended {LATE:?} later or not at all"))
        })
    }

    fn hang(&self, operation: &str, what: &str) -> Breach {
        self.history.record(0, What::Hang { operation: operation.to_owned() });
        Breach::Failed(format!("hang: `{operation}` {what}"))
    }

    /// The server that cases may kill, freeze, fill and lock.
    pub(crate) fn server(&self) -> Proof<Arc<dyn ServerControl>> {
        match &self.server {
            Ok(server) => Ok(Arc::<Watched>::clone(server)),
            Err(why) => Err(Breach::NotRun(why.clone())),
        }
    }

    /// Undoes what the case has done to the server and left as it is, because it failed or was given up: the next case would find
    /// it killed, frozen, without room or closed.
    ///
    /// # Errors
    /// How it is left.
    pub(crate) async fn restore(&self) -> Result<(), String> {
        match &self.server {
            Ok(server) => server.restore().await,
            Err(_) => Ok(()),
        }
    }

    /// Deletes what the case created. What cannot be deleted is left behind under a name of its own.
    ///
    /// What a case that was given up had on its way goes on without it, and may create a destination after it was deleted or
    /// was not found yet. Then it is looked at again after a quiet window, until nothing was there twice in a row.
    pub(crate) async fn clean_up(&self, given_up: bool) -> Result<(), Error> {
        let created = std::mem::take(&mut *self.created.names.lock());
        if created.is_empty() || !self.record.delete.is_given() {
            return Ok(());
        }
        let bus = self.harness.connect().await?;
        let deadline = Instant::now() + self.patience();
        let mut empty_looks = 0;
        let result = loop {
            let (mut found, mut result) = (false, Ok(()));
            for destination in &created {
                match bus.delete(destination, None).await {
                    Ok(()) => found = true,
                    Err(error) if error.kind() != ErrorKind::NotFound => result = Err(error),
                    Err(_) => {}
                }
            }
            empty_looks = if found { 0 } else { empty_looks + 1 };
            if !given_up || empty_looks == 2 || Instant::now() >= deadline {
                break result;
            }
            tokio::time::sleep(self.quiet()).await;
        };
        bus.close(self.harness.patience()).await?;
        result
    }
}
