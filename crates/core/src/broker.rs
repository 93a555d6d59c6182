//! The traits that an adapter implements. Services use [`Bus`](crate::Bus), which checks every call against the
//! capability record before it reaches the adapter.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::{
    Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description, Destination, Error,
    Group, Lag, Message, PublishOptions, PublishOrder, Received, Result, SubscribeSpec, TopologySpec, Transaction,
};

/// What a configured endpoint is called, for errors, logs and reports. Never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The URL scheme of the adapter: `memory`, `embedded`, `kafka`, ….
    pub scheme: &'static str,
    /// The mode of the adapter, such as `quorum` or `fifo`; `default` where there is only one.
    pub mode: String,
    /// The URL without credentials.
    pub url: String,
    /// Product and version of the server, and "emulated" or "stand-in" where it is one, as found at connect.
    pub server: String,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.url)
    }
}

/// What a publish is held to: the options of the call over the endpoint's configuration.
#[derive(Debug, Clone)]
pub struct PublishTerms {
    /// The call ends within that time.
    pub timeout: Duration,
    /// What a failed entry does to later entries of its key.
    pub order: PublishOrder,
    /// What the caller asked for, transaction included.
    pub options: PublishOptions,
}

/// One configured endpoint of a broker. Object-safe; shared by all users of the connection.
///
/// The core has checked the arguments against [`capabilities`](Self::capabilities) (limits, refused verbs and
/// options) before any of these is called.
#[async_trait]
pub trait Broker: Send + Sync + 'static {
    /// What it is called.
    fn endpoint(&self) -> &Endpoint;

    /// What it gives. Settled at connect; it does not change while the connection lives.
    fn capabilities(&self) -> &Capabilities;

    /// Hands a batch to the client, in order; resolves as soon as the whole batch is in the client's (bounded)
    /// buffers. The answer comes with the [`Confirms`].
    ///
    /// # Behavior
    /// - One outcome per message, in the order given; destinations may be mixed.
    /// - `Ok` means that the broker has accepted responsibility, as durably as the endpoint declares.
    /// - An entry that certainly is not stored has effect *not done*; one that may be (timeout, cut connection,
    ///   missing confirm) *unknown*. One unknown attempt keeps it unknown unless a later attempt is done.
    /// - Under [`PublishOrder::Key`], entries behind a failed or unknown one of their key are not attempted.
    /// - A destination that is missing is created where the configuration says so, and `NotFound` otherwise.
    /// - Every entry has its outcome within `terms.timeout`, whatever the broker does. Full buffers make the caller
    ///   wait, within the same time.
    /// - Dropping either future loses nothing but the answer; later publishes are unaffected.
    /// - Many batches may be on their way; none waits for the one before.
    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms;

    /// Opens a subscription. When it returns, it is effective: everything confirmed afterwards belongs to the group,
    /// and `Start::Latest` is fixed.
    ///
    /// # Errors
    /// `NotFound` for missing topology under `TopologyMode::Verify`, `AlreadyExists` where the group exists
    /// with settings that contradict the spec, `Unsupported` for options that the record refuses.
    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>>;

    /// Reads dead letters, oldest first: up to `max` from `from` on (inclusive; `None`: the oldest).
    ///
    /// # Errors
    /// `NotFound` when source or group do not exist.
    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage>;

    /// Puts dead letters back to the group that failed them, and to no other: attempt 1 again, id kept, delivered
    /// before it is removed here (a crash in between may double it, never lose it). One outcome per id.
    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>>;

    /// Deletes dead letters. One outcome per id; one that is gone already is `NotFound`.
    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>>;

    /// Creates what is missing and verifies what exists. A declared group keeps everything that is published
    /// from then on.
    ///
    /// # Errors
    /// `AlreadyExists` where it exists with other settings.
    async fn declare(&self, spec: &TopologySpec) -> Result<Declared>;

    /// Checks that it exists as asked for; changes nothing.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists` with other settings.
    async fn verify(&self, spec: &TopologySpec) -> Result<()>;

    /// The destination as the broker has it, logical and physical names.
    ///
    /// # Errors
    /// `NotFound`.
    async fn describe(&self, destination: &Destination) -> Result<Description>;

    /// The destinations whose logical names begin with `prefix`, in order, as far as the broker's names tell them: one that was
    /// hashed because it is too long is left out, and so is what no name of this library belongs to.
    ///
    /// # Errors
    /// `Unsupported` unless the adapter says otherwise.
    async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        let _ = prefix;
        Err(Error::unsupported("list", "this adapter does not list destinations"))
    }

    /// Deletes a group with its dead letters, or (without a group) the destination with all its groups. Open
    /// subscriptions of it end with `NotFound`.
    ///
    /// # Errors
    /// `NotFound`.
    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()>;

    /// What the group has left to do.
    ///
    /// # Errors
    /// `NotFound`.
    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag>;

    /// Starts a transaction.
    ///
    /// # Errors
    /// `Unsupported` unless the adapter says otherwise.
    async fn begin(&self) -> Result<Arc<dyn Transaction>> {
        self.capabilities().transactions.check("transactions", "begin")?;
        Err(Error::unsupported("begin", "this adapter has no transactions"))
    }

    /// Closes the connection: outcomes of publishes on their way are waited for within `grace`, subscriptions are
    /// closed. Idempotent; every verb answers `Closed` afterwards.
    ///
    /// # Errors
    /// `Timeout` when something was still on its way after `grace`.
    async fn close(&self, grace: Duration) -> Result<()>;
}

/// An open subscription: one member of a group.
#[async_trait]
pub trait Subscription: Send {
    /// What all its deliveries share. The same for as long as it lives.
    fn context(&self) -> &Arc<crate::DeliveryContext>;

    /// Waits up to `wait` for deliveries, and brings at most `max` of them. Returns early when something (a
    /// delivery or an event) is there; empty when the wait is over.
    ///
    /// # Behavior
    /// - Cancel-safe: a dropped future loses nothing and burns no attempt.
    /// - Deliveries that were handed out and not settled, plus prefetched ones, never exceed the spec's
    ///   `max_in_flight`. (The core bounds what is handed out; the adapter what it prefetches.)
    /// - Under `OnFailure::Block` and `Park`, what is prefetched of a key (or of the destination, under total order)
    ///   is held back from the moment one of it is nacked; only a receive that is under way may still bring some.
    /// - Lost connections, restarted brokers and rebalances are recovered from, with `Degraded` and `Recovered`
    ///   events; what cannot be recovered (deleted topology, revoked permission) is an error.
    ///
    /// # Errors
    /// `NotFound` when destination or group were deleted, `Closed` after close, `PermissionDenied`,
    /// `Unauthenticated`.
    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received>;

    /// Stops (or resumes) deliveries of everything. Deliveries that are out stay valid.
    ///
    /// # Errors
    /// `Unavailable` when the broker cannot be told.
    async fn pause(&mut self, paused: bool) -> Result<()>;

    /// Closes: settles handed over so far are flushed (an ack that returned `Ok` is not redelivered), what was
    /// prefetched or is unsettled goes back, at once where the broker can, without counting as an attempt.
    ///
    /// # Errors
    /// `Timeout` when it did not end within `grace`; everything unsettled still comes back by lease.
    async fn close(self: Box<Self>, grace: Duration) -> Result<()>;
}

fn _object_safe(_: &dyn Broker, _: &dyn Subscription, _: &dyn crate::Settler) {}
