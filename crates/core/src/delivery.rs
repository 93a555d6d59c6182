//! Deliveries, and how they are settled.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use bytestring::ByteString;
use tokio::sync::Notify;

use crate::settle::{Rules, extend, settle};
use crate::{Error, Group, Message, Reason, Result, Settling, Timestamp, Transaction};

/// A place in a lane: one or two numbers that grow (offset, sequence, ledger and entry). Text form `7` or `7:3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The offset, sequence or ledger.
    pub major: u64,
    /// The entry below it; zero where there is none.
    pub minor: u64,
}

impl Position {
    /// A position of one number.
    #[must_use]
    pub const fn new(major: u64) -> Self {
        Self { major, minor: 0 }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.minor {
            0 => write!(f, "{}", self.major),
            minor => write!(f, "{}:{minor}", self.major),
        }
    }
}

impl FromStr for Position {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let (major, minor) = text.split_once(':').unwrap_or((text, "0"));
        Ok(Self { major: major.parse()?, minor: minor.parse()? })
    }
}

/// The lane of a delivery: the unit of order and of assignment (partition, message group, single-active queue),
/// numbered within its subscription, with the epoch of the assignment. A settle under an older epoch is stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Lane {
    /// The lane's number within the subscription.
    pub index: u32,
    /// Which assignment of the lane this was.
    pub epoch: u32,
}

/// How the adapter finds the delivery again when it is settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// Two numbers, such as a slot and its generation, or a delivery tag and its channel.
    Pair(u64, u64),
    /// Anything else, such as a receipt handle.
    Bytes(Bytes),
}

/// What becomes of a delivery.
#[derive(Debug, Clone)]
pub enum Settlement {
    /// Done, never again in this group.
    Ack,
    /// The handler failed: it comes back, not before the delay, with attempt + 1; after the subscription's
    /// `max_attempts` it becomes a dead letter instead.
    Nack(Nack),
    /// Given back without a failure (drain, pause): it comes back with the same attempt, at once where the
    /// broker can. It does not raise the count of hand-overs either, where the endpoint can tell, so that rolling
    /// restarts do not use up the `crash_limit`.
    Release,
    /// Never again here, readable in the dead-letter queue of this source and group.
    DeadLetter(Box<Verdict>),
}

/// How a failed delivery comes back.
#[derive(Debug, Clone, Default)]
pub struct Nack {
    /// Not before that long. Zero: as soon as the broker hands it out.
    pub delay: Duration,
    /// The class of the failure, such as `TIMEOUT`; kept for the dead letter where the endpoint can.
    pub error_type: Option<ByteString>,
}

/// Why a message became a dead letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The reason's class. A reason of the application is cut to 256 bytes when the message is settled.
    pub reason: Reason,
    /// The class of the failure, such as `VALIDATION_ERROR`. Adapters may cut it to 4,096 bytes.
    pub error_type: Option<ByteString>,
    /// What a person should read about it. Adapters may cut it to 4,096 bytes.
    pub detail: Option<ByteString>,
}

impl Verdict {
    /// A verdict without error type and detail.
    #[must_use]
    pub fn new(reason: Reason) -> Self {
        Self { reason, error_type: None, detail: None }
    }

    /// Names the class of the failure.
    #[must_use]
    pub fn with_error_type(mut self, error_type: impl Into<ByteString>) -> Self {
        self.error_type = Some(error_type.into());
        self
    }

    /// Says what a person should read.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<ByteString>) -> Self {
        self.detail = Some(detail.into());
        self
    }
}

/// What `Ok` of a settle says, from weakest to strongest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AckLevel {
    /// Kept by this process, to be sent with a later commit. A crash may bring the message back.
    Recorded,
    /// Sent to the broker, which does not answer.
    Sent,
    /// The broker has confirmed it: the message does not come back after a crash of this process.
    Confirmed,
}

/// The outcome of one settle.
pub type SettleOutcome = std::result::Result<AckLevel, SettleError>;

/// A settle that failed gives the delivery back.
#[derive(Debug)]
pub struct SettleError(Box<(Delivery, Error)>);

impl SettleError {
    /// The delivery that is still unsettled, and why. From here on it is the application's again: dropped, it
    /// comes back.
    #[must_use]
    pub fn new(mut delivery: Delivery, error: Error) -> Self {
        if delivery.state == Hold::Lent {
            Delivery::count_handed_out(&delivery.context, 1);
            delivery.hand_out();
        }
        Self(Box::new((delivery, error)))
    }

    /// Why it failed.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.0.1
    }

    /// The delivery, to be settled again or dropped.
    #[must_use]
    pub fn into_delivery(self) -> Delivery {
        self.0.0
    }

    /// The delivery and the error.
    #[must_use]
    pub fn into_parts(self) -> (Delivery, Error) {
        *self.0
    }
}

impl fmt::Display for SettleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.1.fmt(f)
    }
}

impl std::error::Error for SettleError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.1.source()
    }
}

impl From<SettleError> for Error {
    fn from(error: SettleError) -> Self {
        error.0.1
    }
}

/// The adapter's side of settling, shared by all deliveries of a subscription.
#[async_trait]
pub trait Settler: Send + Sync + 'static {
    /// Settles a batch, which may mix settlements; one outcome per entry, in order. Batched towards the broker
    /// where it has batches; per-entry outcomes are read, never assumed.
    ///
    /// # Behavior
    /// - The work is handed over *in the call*: dropping the returned future loses only the answer, and never
    ///   turns into a nack.
    /// - Acks may come in any order.
    /// - A dead letter is stored (confirmed) before its source is settled. If it cannot be stored the source stays
    ///   and the entry fails.
    /// - A delivery whose lease, assignment or connection is gone fails with
    ///   [`StaleDelivery`](crate::ErrorKind::StaleDelivery) wherever that can be known, and harms no other entry.
    /// - The core has already turned a nack of the last attempt into a dead letter.
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling;

    /// Makes settlements part of a transaction that this connection began. They take effect with its commit; an entry that
    /// cannot be part of it is given back, with nothing done. Unless the adapter says otherwise, none can.
    fn settle_in(&self, transaction: &Arc<dyn Transaction>, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let _ = transaction;
        let refuse = |(delivery, _)| {
            Err(SettleError::new(delivery, Error::unsupported("settle", "this adapter settles in no transaction")))
        };
        Settling::ready(batch.into_iter().map(refuse).collect())
    }

    /// Keeps the leases for `lease` from now. One outcome per delivery. Needs
    /// [`lease_extension`](crate::Capabilities::lease_extension).
    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>>;

    /// A delivery was dropped unsettled. It must come back: at once where the broker can, when its lease ends
    /// otherwise. Must not block.
    fn abandoned(&self, token: &Token, lane: Lane) {
        let _ = (token, lane);
    }
}

/// What all deliveries of one subscription share.
pub struct DeliveryContext {
    /// The group they were received in.
    pub group: Group,
    /// After that many failed attempts a nack becomes a dead letter; `None` for never.
    pub max_attempts: Option<u32>,
    settler: Arc<dyn Settler>,
    rules: OnceLock<Rules>,
    in_flight: AtomicUsize,
    settled: Notify,
    closed: AtomicBool,
}

impl DeliveryContext {
    /// For adapters: one per subscription.
    #[must_use]
    pub fn new(group: Group, max_attempts: Option<u32>, settler: Arc<dyn Settler>) -> Arc<Self> {
        Arc::new(Self {
            group,
            max_attempts,
            settler,
            rules: OnceLock::new(),
            in_flight: AtomicUsize::new(0),
            settled: Notify::new(),
            closed: AtomicBool::new(false),
        })
    }

    /// For wrappers of adapters: the settler that the deliveries are settled by.
    #[must_use]
    pub fn settler(&self) -> &Arc<dyn Settler> {
        &self.settler
    }

    /// What the endpoint's record says of settling, set once by the check layer.
    pub(crate) fn rules(&self) -> &OnceLock<Rules> {
        &self.rules
    }

    /// How many deliveries are with the application, unsettled.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Waits until a delivery is settled or dropped. Create the future before reading
    /// [`in_flight`](Self::in_flight), or the wake-up may be missed.
    pub fn settled(&self) -> impl Future<Output = ()> + '_ {
        self.settled.notified()
    }

    /// For adapters: the subscription is gone; settles from now on answer
    /// [`StaleDelivery`](crate::ErrorKind::StaleDelivery) without reaching the adapter.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.settled.notify_waiters();
    }

    /// Whether the subscription is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn release(&self, count: usize) {
        self.in_flight.fetch_sub(count, Ordering::AcqRel);
        self.settled.notify_waiters();
    }
}

impl fmt::Debug for DeliveryContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryContext")
            .field("group", &self.group)
            .field("max_attempts", &self.max_attempts)
            .field("in_flight", &self.in_flight())
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

/// What an adapter knows about a delivery, beside its message.
#[derive(Debug, Clone)]
pub struct DeliveryFacts {
    /// How the adapter finds it again.
    pub token: Token,
    /// 1 + failed handler outcomes of this message in this group.
    pub attempt: u32,
    /// How often the broker has handed it out in this group, this time included, where that is known.
    pub deliveries: Option<u32>,
    /// Its lane and epoch.
    pub lane: Lane,
    /// Its place, where the broker tells.
    pub position: Option<Position>,
    /// Until when it is leased, where the endpoint has leases.
    pub lease_until: Option<Timestamp>,
}

impl DeliveryFacts {
    /// A first delivery with nothing known but its token.
    #[must_use]
    pub fn new(token: Token) -> Self {
        Self { token, attempt: 1, deliveries: None, lane: Lane::default(), position: None, lease_until: None }
    }
}

// Not boxed: an allocation for each delivery would cost more than moving it.
#[allow(clippy::large_enum_variant)]
enum Body {
    Owned(Message),
    Shared(Arc<Message>),
}

/// One hand-over of a message. It is settled once, by consuming it; dropped unsettled it comes back.
///
/// ```compile_fail
/// # async fn double(delivery: anybroker_core::Delivery) {
/// let _ = delivery.ack().await;
/// let _ = delivery.ack().await; // a delivery is settled once: this does not compile
/// # }
/// ```
pub struct Delivery {
    body: Body,
    facts: DeliveryFacts,
    pub(crate) context: Arc<DeliveryContext>,
    state: Hold,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hold {
    /// With the application: counted, and abandoned when dropped.
    Held,
    /// With an adapter, before it is handed out or while it is settled.
    Lent,
}

impl Delivery {
    /// For adapters: a delivery that owns its message.
    #[must_use]
    pub fn new(message: Message, facts: DeliveryFacts, context: &Arc<DeliveryContext>) -> Self {
        Self { body: Body::Owned(message), facts, context: Arc::clone(context), state: Hold::Lent }
    }

    /// For adapters that keep the message too and share it.
    #[must_use]
    pub fn shared(message: Arc<Message>, facts: DeliveryFacts, context: &Arc<DeliveryContext>) -> Self {
        Self { body: Body::Shared(message), facts, context: Arc::clone(context), state: Hold::Lent }
    }

    /// For wrappers of adapters (fault injection, mutants): the same delivery under another context, and
    /// thereby another settler. One that counts as in flight (it came back with a [`SettleError`]) is counted
    /// under the other context from here on.
    #[must_use]
    pub fn with_context(mut self, context: &Arc<DeliveryContext>) -> Self {
        if self.state == Hold::Held {
            Self::count_handed_out(context, 1);
            self.context.release(1);
        }
        self.context = Arc::clone(context);
        self
    }

    /// For wrappers of adapters: the facts, to be changed.
    pub fn facts_mut(&mut self) -> &mut DeliveryFacts {
        &mut self.facts
    }

    /// For wrappers of adapters: the same delivery with another message.
    #[must_use]
    pub fn with_message(mut self, message: Message) -> Self {
        self.body = Body::Owned(message);
        self
    }

    /// The message.
    #[must_use]
    pub fn message(&self) -> &Message {
        match &self.body {
            Body::Owned(message) => message,
            Body::Shared(message) => message,
        }
    }

    /// Everything known about it beside the message.
    #[must_use]
    pub fn facts(&self) -> &DeliveryFacts {
        &self.facts
    }

    /// How the adapter finds it again.
    #[must_use]
    pub fn token(&self) -> &Token {
        &self.facts.token
    }

    /// 1 + failed handler outcomes of this message in this group.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.facts.attempt
    }

    /// Its lane and epoch.
    #[must_use]
    pub fn lane(&self) -> Lane {
        self.facts.lane
    }

    /// Its place, where the broker tells.
    #[must_use]
    pub fn position(&self) -> Option<Position> {
        self.facts.position
    }

    /// Until when it is leased.
    #[must_use]
    pub fn lease_until(&self) -> Option<Timestamp> {
        self.facts.lease_until
    }

    /// The group it was received in.
    #[must_use]
    pub fn group(&self) -> &Group {
        &self.context.group
    }

    /// What all deliveries of the subscription share.
    #[must_use]
    pub fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    /// Done, never again in this group.
    ///
    /// # Errors
    /// [`StaleDelivery`](crate::ErrorKind::StaleDelivery) when lease, assignment or connection are gone; the broker's
    /// own failures. The delivery comes back with the error.
    pub async fn ack(self) -> SettleOutcome {
        self.settle(Settlement::Ack).await
    }

    /// The handler failed: it comes back after `delay`, with attempt + 1, or becomes a dead letter after the
    /// subscription's `max_attempts`.
    ///
    /// # Errors
    /// As [`ack`](Self::ack).
    pub async fn nack(self, delay: Duration) -> SettleOutcome {
        self.settle(Settlement::Nack(Nack { delay, error_type: None })).await
    }

    /// Gives it back without counting a failure.
    ///
    /// # Errors
    /// As [`ack`](Self::ack).
    pub async fn release(self) -> SettleOutcome {
        self.settle(Settlement::Release).await
    }

    /// Never again here, readable in the dead-letter queue.
    ///
    /// # Errors
    /// As [`ack`](Self::ack); the source stays when the dead letter cannot be stored.
    pub async fn dead_letter(self, verdict: Verdict) -> SettleOutcome {
        self.settle(Settlement::DeadLetter(Box::new(verdict))).await
    }

    /// Settles it.
    ///
    /// # Errors
    /// As [`ack`](Self::ack).
    pub async fn settle(self, settlement: Settlement) -> SettleOutcome {
        settle(vec![(self, settlement)]).await.pop().expect("one outcome per entry")
    }

    /// Keeps the lease for `lease` from now.
    ///
    /// # Errors
    /// [`StaleDelivery`](crate::ErrorKind::StaleDelivery) when it is gone already,
    /// [`Unsupported`](crate::ErrorKind::Unsupported) where the endpoint has no leases to extend.
    pub async fn extend(&self, lease: Duration) -> Result<()> {
        extend(&[self], lease).await.pop().expect("one outcome per entry")
    }

    /// Hands it to the application: from here on it is counted as in flight. Called by the core.
    pub(crate) fn hand_out(&mut self) {
        self.state = Hold::Held;
    }

    /// Hands it to the adapter, to be settled.
    pub(crate) fn lend(&mut self) {
        self.state = Hold::Lent;
    }

    pub(crate) fn count_handed_out(context: &DeliveryContext, count: usize) {
        context.in_flight.fetch_add(count, Ordering::AcqRel);
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.state == Hold::Held {
            if !self.context.is_closed() {
                self.context.settler.abandoned(&self.facts.token, self.facts.lane);
            }
            self.context.release(1);
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("message", self.message())
            .field("facts", &self.facts)
            .field("group", &self.context.group)
            .finish_non_exhaustive()
    }
}
