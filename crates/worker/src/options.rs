//! How the messages of one subscription are handled.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Capabilities, Error, ErrorKind, Result, SubscribeSpec};

use crate::{CircuitBreaker, ErrorClasses, Middleware, RetryPolicy};

/// A subscription and how its messages are handled. A bare [`SubscribeSpec`] turns into one with the defaults.
///
/// ```
/// use std::time::Duration;
/// use anybroker_core::{Order, SubscribeSpec};
/// use anybroker_worker::{CircuitBreaker, HandlerOptions, RetryPolicy};
/// let options = HandlerOptions::new(SubscribeSpec::new("orders", "payments").with_order(Order::Key))
///     .with_concurrency(32)
///     .with_timeout(Duration::from_secs(20))
///     .with_retry(RetryPolicy::default().with_first_delay(Duration::from_millis(200)))
///     .with_breaker(CircuitBreaker::default());
/// ```
#[derive(Clone)]
pub struct HandlerOptions {
    pub(crate) spec: SubscribeSpec,
    pub(crate) concurrency: usize,
    pub(crate) batch: usize,
    pub(crate) timeout: Option<Duration>,
    pub(crate) retry: RetryPolicy,
    pub(crate) classes: ErrorClasses,
    pub(crate) breaker: Option<CircuitBreaker>,
    pub(crate) lag_interval: Option<Duration>,
    pub(crate) dead_letter_threshold: usize,
    pub(crate) middleware: Vec<Arc<dyn Middleware>>,
}

impl HandlerOptions {
    /// The defaults: 16 handlers at once, batches of 100, a time limit of 5 minutes, the default retry policy and
    /// classes, no breaker, no periodic lag, an alert at 100 dead letters.
    #[must_use]
    pub fn new(spec: SubscribeSpec) -> Self {
        Self {
            spec,
            concurrency: 16,
            batch: 100,
            timeout: Some(Duration::from_secs(300)),
            retry: RetryPolicy::default(),
            classes: ErrorClasses::default(),
            breaker: None,
            lag_interval: None,
            dead_letter_threshold: 100,
            middleware: Vec::new(),
        }
    }

    /// How many handlers may run at once.
    #[must_use]
    pub fn with_concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency;
        self
    }

    /// How many deliveries are received at once, and about how many wait for a handler. Smaller ones leave more for
    /// the other members of the group; larger ones cost less per message.
    #[must_use]
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch;
        self
    }

    /// How long a handler may run; `None` for as long as it likes. Meanwhile its lease is extended where the endpoint
    /// can; at the limit it is dropped, and the attempt has failed with class `TIMEOUT`.
    #[must_use]
    pub fn with_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// How long failed messages wait.
    #[must_use]
    pub fn with_retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Which failures are retried.
    #[must_use]
    pub fn with_classes(mut self, classes: ErrorClasses) -> Self {
        self.classes = classes;
        self
    }

    /// Pauses consumption while everything fails. Default: none.
    #[must_use]
    pub fn with_breaker(mut self, breaker: impl Into<Option<CircuitBreaker>>) -> Self {
        self.breaker = breaker.into();
        self
    }

    /// Logs and measures the group's lag that often, where the endpoint tells it. Default: never.
    #[must_use]
    pub fn with_lag_interval(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.lag_interval = interval.into();
        self
    }

    /// At how many dead letters of this source and group the alert is raised. Default 100.
    #[must_use]
    pub fn with_dead_letter_threshold(mut self, letters: usize) -> Self {
        self.dead_letter_threshold = letters;
        self
    }

    /// Wraps this subscription's handler, inside of what the worker has for all of them and of what was added before.
    #[must_use]
    pub fn with_middleware(mut self, middleware: impl Middleware) -> Self {
        self.middleware.push(Arc::new(middleware));
        self
    }

    /// The subscription.
    #[must_use]
    pub fn spec(&self) -> &SubscribeSpec {
        &self.spec
    }

    /// Every bad field at once, and whatever the endpoint refuses that a worker cannot do without.
    ///
    /// # Errors
    /// `ConfigInvalid`, `Unsupported`.
    pub(crate) fn check(&self, record: &Capabilities) -> Result<()> {
        self.retry.validate()?;
        let positive = [
            ("concurrency", self.concurrency > 0),
            ("batch", self.batch > 0),
            ("timeout", self.timeout.is_none_or(|timeout| !timeout.is_zero())),
            ("lag_interval", self.lag_interval.is_none_or(|interval| !interval.is_zero())),
            ("dead_letter_threshold", self.dead_letter_threshold > 0),
        ];
        let error = Error::new(ErrorKind::ConfigInvalid, "worker", "handler options");
        let bad: Vec<_> = positive.into_iter().filter(|(_, good)| !good).collect();
        if !bad.is_empty() {
            return Err(bad.into_iter().fold(error, |error, (name, _)| error.with(name, "expected more than 0")));
        }
        record.nack.check("giving a failed message back", "worker")?;
        record.dead_letter.check("dead letters", "worker")?;
        if !self.retry.is_immediate() {
            record.nack_delay.check("delayed retries (RetryPolicy::immediate works without)", "worker")?;
        }
        Ok(())
    }
}

impl From<SubscribeSpec> for HandlerOptions {
    fn from(spec: SubscribeSpec) -> Self {
        Self::new(spec)
    }
}

impl std::fmt::Debug for HandlerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HandlerOptions")
            .field("spec", &self.spec)
            .field("concurrency", &self.concurrency)
            .field("batch", &self.batch)
            .field("timeout", &self.timeout)
            .field("retry", &self.retry)
            .field("classes", &self.classes)
            .field("breaker", &self.breaker)
            .field("lag_interval", &self.lag_interval)
            .field("dead_letter_threshold", &self.dead_letter_threshold)
            .field("middleware", &self.middleware.len())
            .finish()
    }
}
