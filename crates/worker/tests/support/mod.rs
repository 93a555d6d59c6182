//! What the tests of the worker share.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "test code; not every test uses everything")]

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anybroker_core::{Bus, ManualClock, Message, Order, Result, SubscribeSpec};
use anybroker_memory::Memory;
use anybroker_worker::{Context, Handler, HandlerOptions, Outcome, Report, ShutdownHandle, Worker, async_trait};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// How long a test waits for something that has to happen.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// How long a test looks for something that must not happen.
pub const QUIET: Duration = Duration::from_millis(150);

pub fn bus() -> Bus {
    Memory::new().bus()
}

/// A broker whose time stands still until it is turned.
pub fn turned() -> (Bus, ManualClock) {
    let clock = ManualClock::new();
    (Memory::builder().clock(clock.clone()).build().bus(), clock)
}

pub fn spec() -> SubscribeSpec {
    SubscribeSpec::new("orders", "payments")
}

pub fn keyed() -> SubscribeSpec {
    spec().with_order(Order::Key)
}

pub async fn publish(bus: &Bus, messages: impl IntoIterator<Item = Message>) {
    for outcome in bus.publish(messages.into_iter().collect()).await {
        outcome.unwrap();
    }
}

pub fn message(text: &str) -> Message {
    Message::new("orders", text.to_owned())
}

pub fn text(message: &Message) -> String {
    String::from_utf8(message.bytes().to_vec()).unwrap()
}

/// Waits until `condition` holds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(tokio::time::timeout(DEADLINE, waiting).await.is_ok(), "not within {DEADLINE:?}: {what}");
}

/// Waits until the group has nothing left to do, however long that takes: as long as it becomes less.
pub async fn drained(bus: &Bus) {
    let (mut least, mut until) = (u64::MAX, Instant::now() + DEADLINE);
    loop {
        // The group may not be there yet.
        let left = bus.lag("orders", "payments").await.ok().and_then(|lag| lag.total());
        match left {
            Some(0) => return,
            Some(left) if left < least => (least, until) = (left, Instant::now() + DEADLINE),
            _ => assert!(Instant::now() < until, "nothing more is settled: {left:?} are left"),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Waits until the future is over.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {DEADLINE:?}: {what}"),
    }
}

/// A worker that runs.
pub struct Running {
    pub shutdown: ShutdownHandle,
    task: JoinHandle<Result<Report>>,
}

impl Running {
    pub fn start(worker: Worker) -> Self {
        let shutdown = worker.shutdown_handle();
        Self { shutdown, task: tokio::spawn(worker.run_until(std::future::pending())) }
    }

    /// Drains it.
    pub async fn stop(self) -> Report {
        self.shutdown.drain();
        self.end().await
    }

    /// Waits until it ends by itself.
    pub async fn end(self) -> Report {
        within("the worker ends", self.task).await.unwrap().unwrap()
    }

    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Drops it where it stands.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// What a handler saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub text: String,
    pub key: Option<String>,
    pub attempt: u32,
}

type Answer = dyn Fn(&Seen) -> Outcome + Send + Sync;

/// A handler that writes down what it sees, and answers as it was told.
#[derive(Clone)]
pub struct Recorder {
    log: Arc<Mutex<Vec<Seen>>>,
    answer: Arc<Answer>,
}

impl Recorder {
    pub fn new(answer: impl Fn(&Seen) -> Outcome + Send + Sync + 'static) -> Self {
        Self { log: Arc::default(), answer: Arc::new(answer) }
    }

    pub fn ok() -> Self {
        Self::new(|_| Ok(()))
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.log.lock().clone()
    }

    pub fn count(&self) -> usize {
        self.log.lock().len()
    }

    /// `text/attempt` in order.
    pub fn trail(&self) -> Vec<String> {
        self.seen().into_iter().map(|seen| format!("{}/{}", seen.text, seen.attempt)).collect()
    }
}

pub fn seen(ctx: &Context) -> Seen {
    Seen {
        text: text(ctx.message()),
        key: ctx.message().key().map(|key| String::from_utf8(key.to_vec()).unwrap()),
        attempt: ctx.attempt(),
    }
}

#[async_trait]
impl Handler for Recorder {
    async fn handle(&self, ctx: &Context) -> Outcome {
        let seen = seen(ctx);
        self.log.lock().push(seen.clone());
        (self.answer)(&seen)
    }
}

/// A handler that waits at a gate until it is let through.
#[derive(Clone)]
pub struct Gated {
    pub begun: Arc<Mutex<Vec<Seen>>>,
    pub ended: Arc<Mutex<Vec<Seen>>>,
    /// Handlers that were dropped at the gate.
    pub dropped: Arc<Mutex<Vec<Seen>>>,
    pub gate: Arc<Semaphore>,
    /// How many handlers at the gate have seen the drain.
    pub drains: Arc<AtomicUsize>,
}

impl Gated {
    pub fn new() -> Self {
        Self {
            begun: Arc::default(),
            ended: Arc::default(),
            dropped: Arc::default(),
            gate: Arc::new(Semaphore::new(0)),
            drains: Arc::default(),
        }
    }

    pub fn open(&self, handlers: usize) {
        self.gate.add_permits(handlers);
    }

    pub fn begun(&self) -> Vec<String> {
        self.begun.lock().iter().map(|seen| seen.text.clone()).collect()
    }

    pub fn ended(&self) -> Vec<String> {
        self.ended.lock().iter().map(|seen| seen.text.clone()).collect()
    }

    pub fn dropped(&self) -> Vec<String> {
        self.dropped.lock().iter().map(|seen| seen.text.clone()).collect()
    }
}

struct Dropping<'a>(&'a Gated, Option<Seen>);

impl Drop for Dropping<'_> {
    fn drop(&mut self) {
        self.0.dropped.lock().extend(self.1.take());
    }
}

#[async_trait]
impl Handler for Gated {
    async fn handle(&self, ctx: &Context) -> Outcome {
        let seen = seen(ctx);
        self.begun.lock().push(seen.clone());
        let mut dropping = Dropping(self, Some(seen.clone()));
        tokio::select! {
            biased;
            permit = self.gate.acquire() => permit.unwrap().forget(),
            () = ctx.draining() => {
                self.drains.fetch_add(1, Ordering::SeqCst);
                self.gate.acquire().await.unwrap().forget();
            }
        }
        dropping.1 = None;
        self.ended.lock().push(seen);
        Ok(())
    }
}

pub fn options(spec: SubscribeSpec) -> HandlerOptions {
    HandlerOptions::new(spec)
}

pub mod faulty;
pub mod scenario;
