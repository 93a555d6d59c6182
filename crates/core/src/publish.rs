//! What publishing takes and answers.

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;

use crate::{Destination, Effect, Error, MessageId, Position, Result};

/// What a confirmed publish returns: the broker has accepted responsibility for the message, as durably as the
/// endpoint's settings declare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Where the broker put it, where it says so.
    pub position: Option<Position>,
    /// The broker had this id already and kept one copy (publish dedup).
    pub duplicate: bool,
}

/// The outcome of one published message: a [`Receipt`], or an [`Error`] whose [`effect`](Error::effect) tells
/// *not done* (it certainly is not stored) from *unknown* (it may be).
pub type PublishOutcome = Result<Receipt>;

/// What a publish may be told. The default takes the endpoint's configuration.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct PublishOptions {
    /// The call ends by then, whatever the broker does. `None`: the configured `publish_timeout`.
    pub timeout: Option<Duration>,
    /// Keep order: after an entry of a key failed or is unknown, later entries of that key in the batch are not
    /// attempted (they answer *not done*). `None`: the configured `publish_order`.
    pub order: Option<PublishOrder>,
    /// The transaction that the messages belong to.
    pub transaction: Option<Arc<dyn Transaction>>,
}

impl fmt::Debug for PublishOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublishOptions")
            .field("timeout", &self.timeout)
            .field("order", &self.order)
            .field("transaction", &self.transaction.is_some())
            .finish()
    }
}

impl PublishOptions {
    /// Ends the call by `timeout`.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// States what a failure does to later entries of the same key.
    #[must_use]
    pub fn with_order(mut self, order: PublishOrder) -> Self {
        self.order = Some(order);
        self
    }

    /// Makes the messages part of a transaction.
    #[must_use]
    pub fn with_transaction(mut self, transaction: Arc<dyn Transaction>) -> Self {
        self.transaction = Some(transaction);
        self
    }
}

/// What the failure of one entry does to later entries of its key in the same batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PublishOrder {
    /// They are not attempted, so that order per key holds in what is stored.
    #[default]
    Key,
    /// Every entry stands for itself.
    None,
}

/// What is published and settled together, where the broker has it: started by [`Bus::begin`](crate::Bus::begin), published in
/// by [`PublishOptions::transaction`], settled in by [`settle_in`](crate::settle_in).
///
/// # Behavior
/// - Until the commit nobody sees anything of it; after it, everybody sees all of it. An `Ok` of a publish or a settle in it
///   says that it will be part of the commit.
/// - A commit that has answered is decided, and lasts. A subscription may see it a moment later; looking for dead letters waits
///   for that moment.
/// - What is refused before it is sent is no part of it, and harms it not. What fails at the broker lets the commit fail.
/// - Without a commit nothing of it becomes visible, and what was settled in it comes back as if it had been released:
///   after an abort, a failed commit, a drop, a close, a crash.
/// - Dropped without an end, it is aborted.
/// - Both ends happen at most once; later calls answer `Closed`. A dropped future of one loses only the answer.
#[async_trait]
pub trait Transaction: Any + Send + Sync {
    /// Makes everything published and settled in it visible at once.
    ///
    /// # Errors
    /// With effect *not done* when all of it was taken back, *unknown* when the answer is missing. `StaleDelivery` when what
    /// was settled in it belongs to somebody else by now, `AlreadyExists` when another process has taken its place
    /// (fencing), `Timeout`, `Unavailable`, `Closed`.
    async fn commit(&self) -> Result<()>;

    /// Takes everything back.
    ///
    /// # Errors
    /// When the broker does not confirm it. Nothing of it becomes visible all the same.
    async fn abort(&self) -> Result<()>;
}

/// The outcomes of a batch that is on its way: one per message, in the order given.
///
/// The batch is already in the client's hands, in call order; awaiting this tells what became of it, and
/// dropping it loses nothing but the answer.
#[must_use = "the outcomes tell whether the messages are stored"]
pub struct Confirms(State<Vec<PublishOutcome>>);

/// The outcomes of settled deliveries: one per delivery, in the order given. See [`Confirms`].
#[must_use = "the outcomes tell which deliveries are settled"]
pub struct Settling(State<Vec<crate::SettleOutcome>>);

enum State<T> {
    Ready(Option<T>),
    Waiting(Pin<Box<dyn Future<Output = T> + Send>>),
}

impl<T: Unpin> State<T> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<T> {
        match self {
            Self::Ready(value) => Poll::Ready(value.take().expect("polled after it was ready")),
            Self::Waiting(future) => future.as_mut().poll(context),
        }
    }
}

macro_rules! outcomes {
    ($name:ident, $outcome:ty) => {
        impl $name {
            /// Outcomes that are known already.
            pub fn ready(outcomes: Vec<$outcome>) -> Self {
                Self(State::Ready(Some(outcomes)))
            }

            /// Outcomes that `future` will tell. The work must not depend on the future being polled.
            pub fn waiting(future: impl Future<Output = Vec<$outcome>> + Send + 'static) -> Self {
                Self(State::Waiting(Box::pin(future)))
            }

            /// The outcomes, where they are known already; otherwise itself.
            ///
            /// # Errors
            /// Returns `self` when they are still on their way.
            pub fn try_ready(self) -> std::result::Result<Vec<$outcome>, Self> {
                match self.0 {
                    State::Ready(Some(outcomes)) => Ok(outcomes),
                    state => Err(Self(state)),
                }
            }
        }

        impl Future for $name {
            type Output = Vec<$outcome>;

            fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
                self.0.poll(context)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let ready = matches!(self.0, State::Ready(_));
                f.debug_struct(stringify!($name)).field("ready", &ready).finish_non_exhaustive()
            }
        }
    };
}

outcomes!(Confirms, PublishOutcome);
outcomes!(Settling, crate::SettleOutcome);

/// The error of an entry that was not attempted because an earlier one of its key failed (`Unavailable`, effect
/// `NotDone`): what an adapter answers under [`PublishOrder::Key`].
#[must_use]
pub fn held_back(id: &MessageId, destination: &Destination) -> Error {
    Error::new(
        crate::ErrorKind::Unavailable,
        "publish",
        "order: not attempted, because an earlier message of this key in the batch failed",
    )
    .with("id", id)
    .with("destination", destination)
    .with_effect(Effect::NotDone)
}
