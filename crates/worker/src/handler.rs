//! What runs for each message.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;

use crate::{Context, Outcome};

/// A boxed future that may be sent between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Processes messages. Object-safe. For single functions see [`handler`], [`handler_with`] and [`boxed`].
///
/// # Behavior
/// - `Ok` acks the message; an error retries it or makes it a dead letter (see [`HandlerError`](crate::HandlerError)).
/// - It runs for up to `concurrency` messages at once; for one key at a time where the subscription keeps order.
/// - A panic is caught and counts as a failed attempt of class `PANIC`.
/// - It may be dropped at any `await`: at its time limit (a failed attempt of class `TIMEOUT`), when the grace of a
///   shutdown ends or its lane is taken away (no failed attempt: the message comes back uncounted).
/// - Code that computes for long without an `await` keeps a thread busy and cannot be cut off; hand it to
///   `tokio::task::spawn_blocking`.
/// - Any message may come more than once: processing has to be idempotent.
///
/// ```
/// use anybroker_worker::{Context, Handler, Outcome, async_trait};
///
/// struct Payments { gateway: String }
///
/// #[async_trait]
/// impl Handler for Payments {
///     async fn handle(&self, ctx: &Context) -> Outcome {
///         println!("{} pays {} (attempt {})", self.gateway, ctx.message().id(), ctx.attempt());
///         Ok(())
///     }
/// }
/// ```
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Processes one message.
    async fn handle(&self, ctx: &Context) -> Outcome;
}

#[async_trait]
impl<H: Handler + ?Sized> Handler for Arc<H> {
    async fn handle(&self, ctx: &Context) -> Outcome {
        (**self).handle(ctx).await
    }
}

/// Processes messages in batches: for work that costs about as much for a hundred as for one, such as a transaction.
///
/// # Behavior
/// - It gets what is ready at that moment, at most [`batch`](crate::HandlerOptions::with_batch) messages; nothing waits
///   for a batch to fill. Where the subscription keeps order, a batch holds at most one message of a key.
/// - It answers one outcome per message, in order. Messages it does not answer for have failed, class
///   `UNCLASSIFIED`.
/// - Time limit, panics and cancellation are as for [`Handler`], and concern the whole batch.
/// - Middleware is not wrapped around it.
#[async_trait]
pub trait BatchHandler: Send + Sync + 'static {
    /// Processes several messages.
    async fn handle_batch(&self, batch: &[Context]) -> Vec<Outcome>;
}

/// An `async fn(&Context) -> Outcome` as a handler.
///
/// ```
/// use anybroker_worker::{Context, Outcome, handler};
/// async fn print(ctx: &Context) -> Outcome {
///     println!("{}", ctx.message().id());
///     Ok(())
/// }
/// let print = handler(print);
/// ```
pub fn handler<F>(function: F) -> impl Handler
where
    F: for<'a> HandlerFn<'a> + Send + Sync + 'static,
{
    Plain(function)
}

/// An `async fn(&State, &Context) -> Outcome` with its state as a handler.
///
/// ```
/// use std::sync::Mutex;
/// use anybroker_worker::{Context, Outcome, handler_with};
/// async fn sum(total: &Mutex<usize>, ctx: &Context) -> Outcome {
///     *total.lock().unwrap() += ctx.message().bytes().len();
///     Ok(())
/// }
/// let sum = handler_with(Mutex::new(0), sum);
/// ```
pub fn handler_with<S, F>(state: S, function: F) -> impl Handler
where
    S: Send + Sync + 'static,
    F: for<'a> StateHandlerFn<'a, S> + Send + Sync + 'static,
{
    Stateful(state, function)
}

/// A closure that boxes its future as a handler: for closures that capture what they need.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
/// use anybroker_worker::boxed;
/// let seen = Arc::new(AtomicU64::new(0));
/// let counts = boxed(move |ctx| {
///     let seen = Arc::clone(&seen);
///     Box::pin(async move {
///         seen.fetch_add(u64::from(ctx.attempt()), Ordering::Relaxed);
///         Ok(())
///     })
/// });
/// ```
pub fn boxed<F>(closure: F) -> impl Handler
where
    F: for<'a> Fn(&'a Context) -> BoxFuture<'a, Outcome> + Send + Sync + 'static,
{
    Boxed(closure)
}

/// What [`handler`] takes: implemented by every `async fn(&Context) -> Outcome` whose future is `Send`.
pub trait HandlerFn<'a> {
    /// The function's future.
    type Future: Future<Output = Outcome> + Send + 'a;
    /// Calls it.
    fn call(&self, ctx: &'a Context) -> Self::Future;
}

impl<'a, F, Fut> HandlerFn<'a> for F
where
    F: Fn(&'a Context) -> Fut,
    Fut: Future<Output = Outcome> + Send + 'a,
{
    type Future = Fut;
    fn call(&self, ctx: &'a Context) -> Fut {
        self(ctx)
    }
}

/// What [`handler_with`] takes: implemented by every `async fn(&S, &Context) -> Outcome` whose future is `Send`.
pub trait StateHandlerFn<'a, S: 'a> {
    /// The function's future.
    type Future: Future<Output = Outcome> + Send + 'a;
    /// Calls it.
    fn call(&self, state: &'a S, ctx: &'a Context) -> Self::Future;
}

impl<'a, S: 'a, F, Fut> StateHandlerFn<'a, S> for F
where
    F: Fn(&'a S, &'a Context) -> Fut,
    Fut: Future<Output = Outcome> + Send + 'a,
{
    type Future = Fut;
    fn call(&self, state: &'a S, ctx: &'a Context) -> Fut {
        self(state, ctx)
    }
}

struct Plain<F>(F);
struct Stateful<S, F>(S, F);
struct Boxed<F>(F);

#[async_trait]
impl<F> Handler for Plain<F>
where
    F: for<'a> HandlerFn<'a> + Send + Sync + 'static,
{
    async fn handle(&self, ctx: &Context) -> Outcome {
        self.0.call(ctx).await
    }
}

#[async_trait]
impl<S, F> Handler for Stateful<S, F>
where
    S: Send + Sync + 'static,
    F: for<'a> StateHandlerFn<'a, S> + Send + Sync + 'static,
{
    async fn handle(&self, ctx: &Context) -> Outcome {
        self.1.call(&self.0, ctx).await
    }
}

// By hand: the closure has boxed its future already, so that `async_trait` would box it twice.
impl<F> Handler for Boxed<F>
where
    F: for<'a> Fn(&'a Context) -> BoxFuture<'a, Outcome> + Send + Sync + 'static,
{
    fn handle<'life0, 'life1, 'async_trait>(&'life0 self, ctx: &'life1 Context) -> BoxFuture<'async_trait, Outcome>
    where
        'life0: 'async_trait,
        'life1: 'async_trait,
        Self: 'async_trait,
    {
        (self.0)(ctx)
    }
}
