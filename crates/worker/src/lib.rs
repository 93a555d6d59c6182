//! Runs message handlers over a [`Bus`](anybroker_core::Bus): concurrency, key lanes, retry, dead letters, time limits,
//! a circuit breaker, middleware, and a drain that loses nothing.
//!
//! ```no_run
//! use anybroker_core::{Bus, Message, SubscribeSpec};
//! use anybroker_worker::{Classify, Context, ErrorClass, Outcome, Worker, handler};
//!
//! async fn pay(ctx: &Context) -> Outcome {
//!     let order = std::str::from_utf8(ctx.message().bytes()).class(ErrorClass::SCHEMA_MISMATCH)?;
//!     // Carries on the correlation id, the causation and the trace.
//!     ctx.send(Message::new("payments", format!("paid: {order}"))).await?;
//!     Ok(())
//! }
//!
//! # async fn example(bus: Bus) -> anybroker_core::Result<()> {
//! let report = Worker::new(bus).handle(SubscribeSpec::new("orders", "payments"), handler(pay)).run().await?;
//! println!("{report}");
//! # Ok(()) }
//! ```
//!
//! # What becomes of a message
//!
//! | the handler | the message |
//! |---|---|
//! | answers `Ok` | is acked |
//! | fails with a class that is retried (`TIMEOUT`, `SERVICE_UNAVAILABLE`, `RATE_LIMITED`, `DATABASE_DEADLOCK`, and every class that is not listed) | comes back after the [policy's](RetryPolicy) delay; after `max_attempts` it is a dead letter, `attempts_exhausted` |
//! | fails with a class that is not (`VALIDATION_ERROR`, `DUPLICATE_MESSAGE`, `SCHEMA_MISMATCH`) | is a dead letter at once, `rejected` |
//! | answers [`HandlerError::dead_letter`] | is a dead letter at once, with that reason |
//! | panics | has failed, class `PANIC` |
//! | runs into its time limit | has failed, class `TIMEOUT` |
//! | is dropped (end of the grace, lane taken away) | comes back, uncounted |
//!
//! The delay is the broker's: a message that waits for its next attempt takes no place among the handlers, and
//! survives this process.
//!
//! # Order
//!
//! Under [`Order::Key`](anybroker_core::Order::Key) a worker runs one message of a key at a time, in order, and
//! other keys beside it; messages without a key have no order. Under [`Order::Total`](anybroker_core::Order::Total) it
//! runs one message of a destination at a time. When a message fails and later ones have to wait for it
//! ([`OnFailure::Block`](anybroker_core::OnFailure::Block), [`Park`](anybroker_core::OnFailure::Park)), those that the
//! worker holds go back uncounted, behind the failed one, and the broker delivers them in order.
//!
//! # Cost
//!
//! Handlers run in as many tasks as the subscription has concurrency. A handler that never waits for anything runs in a
//! task that is awake already, without a wake-up or a spawn for each message; when one waits, the next task is
//! woken. The library allocates once per message (the handler's boxed future; once more for each middleware), and
//! a timer for those handlers that wait. Settlements are collected and handed over when nothing is ready any
//! more, when a handler waits, after [`batch`](HandlerOptions::with_batch) of them or after a millisecond of
//! work; no timer delays them.
//!
//! # Log events and metrics
//!
//! Events go to `tracing`, metrics to the `metrics` facade: both are facades that cost next to nothing until the
//! program installs a subscriber or recorder, both have exporters for OpenTelemetry and Prometheus, and neither makes
//! every user of this crate build an exporter. (The OpenTelemetry API would do for both, but binds its users to one
//! SDK version at a time and looks instruments up by attribute set on every record, where a `metrics` handle is
//! registered once for each subscription.)
//!
//! Events, with `topic`, `partition`, `offset`, `consumer_group` and `latency_ms` where they apply: `message_produced`,
//! `message_consumed`, `message_acked` (debug), `message_nacked` (warn), `message_dlq` (error), `consumer_lag`,
//! `rebalance` (info), `message_unsettled` (warn), `message_unburied` (error: a dead letter
//! cannot be stored; told once for each delivery), `dlq_alert` (error).
//!
//! Metrics: `messages_produced_total{topic,partition}` (what handlers publish through their [`Context`]; the partition is
//! empty, since receipts do not tell it), `messages_consumed_total{topic,consumer_group,status}` (status `success`,
//! `retry`, `dead_letter`, `released`, `stale`, `unsettled`), `consumer_lag{topic,consumer_group,partition}`,
//! `message_processing_duration_seconds{topic,consumer_group}`, `dlq_messages_total{topic,error_type}`, and
//! `dlq_alert{topic,consumer_group}`. Set [`DURATION_BUCKETS`] for the histogram in the recorder.

mod breaker;
mod conclude;
mod context;
mod drain;
mod handler;
mod handling;
mod lanes;
mod leases;
mod middleware;
mod options;
mod outcome;
mod report;
mod retry;
mod rules;
mod settle;
mod slot;
mod state;
mod subscription;
mod telemetry;
mod watch;
mod worker;

pub use async_trait::async_trait;
pub use breaker::CircuitBreaker;
pub use context::Context;
pub use drain::ShutdownHandle;
pub use handler::{BatchHandler, BoxFuture, Handler, HandlerFn, StateHandlerFn, boxed, handler, handler_with};
pub use middleware::{Middleware, Next};
pub use options::HandlerOptions;
pub use outcome::{Classify, ErrorClass, ErrorClasses, HandlerError, Outcome};
pub use report::{Counts, Report, SubscriptionReport};
pub use retry::RetryPolicy;
pub use watch::DeadLetterAlert;
pub use worker::Worker;

/// The buckets of `message_processing_duration_seconds`, in seconds.
pub const DURATION_BUCKETS: [f64; 5] = [0.001, 0.01, 0.1, 1.0, 10.0];
