//! What wraps around handlers.

use std::sync::Arc;

use async_trait::async_trait;

use crate::handler::BoxFuture;
use crate::{Context, Handler, Outcome};

/// Wraps the handler like the skin of an onion: sees each message before the handler and the outcome after it, and
/// may answer without calling on. Object-safe. The first one added is the outermost.
///
/// Panics and the time limit of the handler hold for the middleware around it too. Each layer costs one allocation
/// for each message (its boxed future).
///
/// Not a `tower::Layer`: a tower service owns its request and is called through `&mut self` after `poll_ready`; here the
/// request is borrowed from the worker (which settles it whatever the handler does) and readiness is the worker's
/// concurrency. An adapter would cost a clone of the message for each call.
///
/// ```
/// use anybroker_worker::{Context, Middleware, Next, Outcome, async_trait};
///
/// /// Counts what takes too long.
/// struct Slow(std::time::Duration);
///
/// #[async_trait]
/// impl Middleware for Slow {
///     async fn handle(&self, ctx: &Context, next: Next<'_>) -> Outcome {
///         let start = std::time::Instant::now();
///         let outcome = next.run(ctx).await;
///         if start.elapsed() > self.0 {
///             eprintln!("{} took {:?}", ctx.message().id(), start.elapsed());
///         }
///         outcome
///     }
/// }
/// ```
#[async_trait]
pub trait Middleware: Send + Sync + 'static {
    /// Processes one message, by calling on or by itself.
    async fn handle(&self, ctx: &Context, next: Next<'_>) -> Outcome;
}

/// What is further inside: the rest of the middleware and the handler.
pub struct Next<'a> {
    inner: &'a [Arc<dyn Middleware>],
    handler: &'a dyn Handler,
}

impl<'a> Next<'a> {
    /// Calls on.
    #[must_use = "the handler runs only when this is awaited"]
    pub fn run(self, ctx: &'a Context) -> BoxFuture<'a, Outcome> {
        match self.inner.split_first() {
            Some((middleware, inner)) => middleware.handle(ctx, Next { inner, handler: self.handler }),
            None => self.handler.handle(ctx),
        }
    }
}

impl std::fmt::Debug for Next<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Next").field("inner", &self.inner.len()).finish_non_exhaustive()
    }
}

/// The middleware with its handler.
pub(crate) struct Onion {
    pub(crate) middleware: Vec<Arc<dyn Middleware>>,
    pub(crate) handler: Arc<dyn Handler>,
}

impl Onion {
    pub(crate) fn handle<'a>(&'a self, ctx: &'a Context) -> BoxFuture<'a, Outcome> {
        Next { inner: &self.middleware, handler: &*self.handler }.run(ctx)
    }
}
