//! The worker: subscriptions with their handlers, run until told to stop.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Bus, Clock, DeadLetterScope, Effect, Error, ErrorKind, LagPrecision, Result, Subscriber, SystemClock,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use crate::breaker::Breaker;
use crate::context::Scope;
use crate::drain::{ShutdownHandle, Signals, Stage, drain_after, obey};
use crate::middleware::Onion;
use crate::rules::Rules;
use crate::slot::{Handlers, Shared};
use crate::state::State;
use crate::subscription::{Loop, Work};
use crate::telemetry::Telemetry;
use crate::watch::{AlertHook, DeadLetterWatch, Letters, lag};
use crate::{BatchHandler, DeadLetterAlert, Handler, HandlerOptions, Middleware, Report};

/// Runs handlers over the subscriptions of one connection.
///
/// ```no_run
/// use std::time::Duration;
/// use anybroker_core::{Bus, Order, SubscribeSpec};
/// use anybroker_worker::{Context, HandlerOptions, Outcome, Worker, handler};
///
/// async fn pay(ctx: &Context) -> Outcome {
///     println!("{} (attempt {})", ctx.message().id(), ctx.attempt());
///     Ok(())
/// }
///
/// async fn count(_: &Context) -> Outcome {
///     Ok(())
/// }
///
/// # async fn example(bus: Bus) -> anybroker_core::Result<()> {
/// let report = Worker::new(bus)
///     .handle(SubscribeSpec::new("orders", "payments"), handler(pay))
///     .handle(
///         HandlerOptions::new(SubscribeSpec::new("orders", "totals").with_order(Order::Key)).with_concurrency(4),
///         handler(count),
///     )
///     .with_grace(Duration::from_secs(10))
///     .run() // until SIGTERM or Ctrl-C
///     .await?;
/// println!("{report}");
/// # Ok(()) }
/// ```
pub struct Worker {
    bus: Bus,
    handlers: Vec<(HandlerOptions, Kind)>,
    middleware: Vec<Arc<dyn Middleware>>,
    grace: Duration,
    clock: Arc<dyn Clock>,
    hook: Option<AlertHook>,
    shutdown: ShutdownHandle,
}

enum Kind {
    Single(Arc<dyn Handler>),
    Batches(Arc<dyn BatchHandler>),
}

impl Worker {
    /// A worker without handlers, with a grace of 25 s (five less than what Kubernetes gives a pod by default).
    #[must_use]
    pub fn new(bus: Bus) -> Self {
        Self {
            bus,
            handlers: Vec::new(),
            middleware: Vec::new(),
            grace: Duration::from_secs(25),
            clock: Arc::new(SystemClock::new()),
            hook: None,
            shutdown: ShutdownHandle::new(),
        }
    }

    /// Adds a subscription (a [`SubscribeSpec`](anybroker_core::SubscribeSpec), or [`HandlerOptions`] around one) and
    /// its handler.
    #[must_use]
    pub fn handle(mut self, options: impl Into<HandlerOptions>, handler: impl Handler) -> Self {
        self.handlers.push((options.into(), Kind::Single(Arc::new(handler))));
        self
    }

    /// Adds a subscription and a handler that takes its messages in batches.
    #[must_use]
    pub fn handle_batches(mut self, options: impl Into<HandlerOptions>, handler: impl BatchHandler) -> Self {
        self.handlers.push((options.into(), Kind::Batches(Arc::new(handler))));
        self
    }

    /// Wraps the handlers of all subscriptions (batch handlers excepted), outside of their own middleware and inside of what was added before.
    #[must_use]
    pub fn with_middleware(mut self, middleware: impl Middleware) -> Self {
        self.middleware.push(Arc::new(middleware));
        self
    }

    /// How long handlers may go on after the worker was told to stop, and failures that cannot be settled are tried.
    /// Default 25 s.
    #[must_use]
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Where time limits, leases, the breaker, back-off and the grace take their time from. For tests that turn the
    /// clock by hand, together with that of their broker.
    #[must_use]
    pub fn with_clock(mut self, clock: impl Clock) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Calls `hook` when the dead-letter queue of one of the subscriptions reaches its
    /// [threshold](HandlerOptions::with_dead_letter_threshold): once, and again only after it was below. Log event
    /// and metric (`dlq_alert`) come without it. Where reading dead letters leases them (SQS), the letters that this
    /// worker has written since it began are counted instead.
    #[must_use]
    pub fn on_dead_letter_alert(mut self, hook: impl Fn(&DeadLetterAlert) + Send + Sync + 'static) -> Self {
        self.hook = Some(Arc::new(hook));
        self
    }

    /// A handle by which it is told to stop.
    #[must_use]
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        self.shutdown.clone()
    }

    /// Runs until SIGTERM, Ctrl-C or the [handle](Self::shutdown_handle) stops it, or every subscription has ended by
    /// an error; then drains. A second signal ends the grace at once. A subscription that ends by an error (see
    /// [`SubscriptionReport::error`](crate::SubscriptionReport::error), logged when it happens) does not end the others.
    ///
    /// Dropping the future stops everything on the spot; deliveries come back uncounted.
    ///
    /// # Errors
    /// Nothing was started: `ConfigInvalid` for options or a worker without handlers, `Unsupported` for what the
    /// endpoint refuses, what [`Bus::subscribe`] says, `Unexpected` when signals cannot be listened to.
    pub async fn run(self) -> Result<Report> {
        // From here on a signal drains, even one that comes before everything has started.
        let signals = Signals::new().map_err(|error| {
            Error::new(ErrorKind::Unexpected, "worker", "signals cannot be listened to; run_until does without")
                .with_effect(Effect::NotDone)
                .with_source(error)
        })?;
        let mut side = JoinSet::new();
        side.spawn(obey(signals, self.shutdown.clone()));
        self.run_with(side).await
    }

    /// As [`run`](Self::run), until `stop` is over or the [handle](Self::shutdown_handle) stops it; signals are left
    /// alone.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn run_until(self, stop: impl Future<Output = ()> + Send + 'static) -> Result<Report> {
        let mut side = JoinSet::new();
        side.spawn(drain_after(self.shutdown.clone(), stop));
        self.run_with(side).await
    }

    async fn run_with(self, mut side: JoinSet<()>) -> Result<Report> {
        if self.handlers.is_empty() {
            return Err(Error::new(ErrorKind::ConfigInvalid, "worker", "no handlers; add one with Worker::handle"));
        }
        for (options, kind) in &self.handlers {
            options.check(self.bus.capabilities())?;
            if matches!(kind, Kind::Batches(_)) && !options.middleware.is_empty() {
                let text = "middleware cannot be wrapped around a batch handler";
                return Err(Error::new(ErrorKind::ConfigInvalid, "worker", text));
            }
        }
        let mut opened: Vec<(Subscriber, HandlerOptions, Kind)> = Vec::with_capacity(self.handlers.len());
        for (options, kind) in self.handlers {
            match self.bus.subscribe(options.spec.clone()).await {
                Ok(subscriber) => opened.push((subscriber, options, kind)),
                Err(refused) => {
                    for (subscriber, ..) in opened {
                        // The refusal is the answer; a failure to close adds nothing to it.
                        let _ = subscriber.close(Duration::from_secs(1)).await;
                    }
                    return Err(refused);
                }
            }
        }
        let mut loops = JoinSet::new();
        let count = opened.len();
        for (index, (subscriber, options, kind)) in opened.into_iter().enumerate() {
            let handlers = match kind {
                Kind::Single(handler) => {
                    let middleware = self.middleware.iter().chain(&options.middleware).cloned().collect();
                    Handlers::Single(Onion { middleware, handler })
                }
                Kind::Batches(handler) => Handlers::Batches(handler),
            };
            let telemetry = Arc::new(Telemetry::new(&options.spec.destinations, &options.spec.group));
            let letters: Vec<_> = options.spec.destinations.iter().map(Letters::new).collect();
            watch_over(&mut side, &self.bus, &options, &self.clock, &telemetry, &letters, self.hook.as_ref());
            let work = prepare(&self.bus, options, handlers, &self.clock, telemetry, letters, self.grace);
            let stage = self.shutdown.watch();
            loops.spawn(async move { (index, work.run(subscriber, stage).await) });
        }
        let mut reports: Vec<_> = (0..count).map(|_| None).collect();
        while let Some(ended) = loops.join_next().await {
            match ended {
                Ok((index, report)) => reports[index] = Some(report),
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                // Cancelled: the runtime is shutting down under it, and nobody will read a report.
                Err(_) => {}
            }
        }
        drop(side);
        Ok(Report { subscriptions: reports.into_iter().flatten().collect() })
    }
}

/// Starts what watches the lag and the dead letters.
fn watch_over(
    side: &mut JoinSet<()>,
    bus: &Bus,
    options: &HandlerOptions,
    clock: &Arc<dyn Clock>,
    telemetry: &Arc<Telemetry>,
    letters: &[Arc<Letters>],
    hook: Option<&AlertHook>,
) {
    let spec = &options.spec;
    let tells_lag = bus.capabilities().lag != LagPrecision::default();
    for (destination, written) in spec.destinations.iter().zip(letters) {
        if let Some(interval) = options.lag_interval.filter(|_| tells_lag) {
            let (destination, group) = (destination.clone(), spec.group.clone());
            side.spawn(lag(bus.clone(), destination, group, interval, Arc::clone(clock), Arc::clone(telemetry)));
        }
        let watch = DeadLetterWatch {
            bus: bus.clone(),
            scope: DeadLetterScope::new(destination, &spec.group),
            threshold: options.dead_letter_threshold,
            written: Arc::clone(written),
            hook: hook.cloned(),
        };
        side.spawn(watch.run());
    }
}

fn prepare(
    bus: &Bus,
    options: HandlerOptions,
    handlers: Handlers,
    clock: &Arc<dyn Clock>,
    telemetry: Arc<Telemetry>,
    letters: Vec<Arc<Letters>>,
    grace: Duration,
) -> Loop {
    let record = bus.capabilities();
    let spec = options.spec;
    let threads = tokio::runtime::Handle::current().metrics().num_workers();
    let (concluding, concluded) = mpsc::unbounded_channel();
    let (stage, watched) = watch::channel(Stage::Running);
    let breaker = options.breaker.map(Breaker::new);
    let rules = Rules {
        order: spec.order,
        on_failure: spec.on_failure,
        max_attempts: spec.max_attempts,
        timeout: options.timeout,
        retry: options.retry,
        classes: options.classes,
        delay_max: record.limits.delay_max_ms.map(Duration::from_millis),
        lease: spec.lease,
        leases: record.lease.is_given(),
        extends: record.lease.is_given() && record.lease_extension.is_given(),
        batch: options.batch,
    };
    let shared = Shared {
        state: Mutex::new(State::new(spec.order, breaker, options.concurrency, threads, options.batch)),
        wakers: (0..options.concurrency).map(|_| Notify::new()).collect(),
        interrupts: (0..options.concurrency).map(|_| Notify::new()).collect(),
        cut: Mutex::default(),
        concluding,
        handlers,
        scope: Arc::new(Scope { bus: bus.clone(), stage: watched, telemetry }),
        clock: Arc::clone(clock),
        rules,
    };
    Loop {
        shared: Arc::new(shared),
        concluding: concluded,
        stage,
        releases: record.release.is_given(),
        grace,
        letters,
        work: Work::default(),
    }
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker")
            .field("bus", &self.bus)
            .field("handlers", &self.handlers.iter().map(|(options, _)| options).collect::<Vec<_>>())
            .field("middleware", &self.middleware.len())
            .field("grace", &self.grace)
            .finish_non_exhaustive()
    }
}
