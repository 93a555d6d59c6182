//! What an adapter of a peer gives.

use std::time::Duration;

use anybroker_core::capability::{
    AckGranularity, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Support,
};
use anybroker_core::{
    AckLevel, Declared, Destination, Endpoint, Error, ErrorKind, Group, Message, Receipt, Result, SubscribeSpec,
    TopologySpec,
};
use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::Parcel;

/// One connection through a peer's public API.
#[async_trait]
pub trait Peer: Send + Sync + 'static {
    /// Its name, versions and address.
    fn endpoint(&self) -> &Endpoint;

    /// What the peer's documentation says that it gives, and what its API has no word for.
    fn record(&self) -> &Capabilities;

    /// Whether the peer's documentation says that it carries such a header.
    fn carries(&self, name: &str, value: &[u8]) -> bool;

    /// How many headers the peer's documentation says that it carries, less what this adapter adds.
    fn room(&self) -> usize {
        usize::MAX
    }

    /// Publishes one message, and says what the peer says about it.
    async fn publish(&self, message: &Message, parcel: Parcel) -> Result<Receipt>;

    /// Whether a publish to a destination that is not there answers [`ErrorKind::NotFound`]. After another error it need not be declared
    /// again then, with requests that are not the peer's.
    fn tells_missing(&self) -> bool {
        false
    }

    /// Opens the peer's consumer of one destination; it sends what comes until the receiver is gone.
    async fn consume(&self, destination: &Destination, spec: &SubscribeSpec, into: Sender) -> Result<Deliveries>;

    /// How many deliveries the consumer may take from the peer before the suite asks for them: 1, so that what a peer fetches ahead
    /// stays with the peer. More where the adapter bounds what is out, and a consumer that nobody polls holds others up.
    fn ahead(&self, _spec: &SubscribeSpec) -> usize {
        1
    }

    /// Creates what is missing.
    async fn declare(&self, spec: &TopologySpec) -> Result<Declared>;

    /// Checks that it is there.
    async fn verify(&self, spec: &TopologySpec) -> Result<()>;

    /// Deletes a destination or a group of it.
    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()>;

    /// Closes the peer's connection as its documentation tells.
    async fn close(&self) -> Result<()>;
}

/// Where a consumer sends what comes. There is room for as many as [`Peer::ahead`] says.
pub type Sender = mpsc::Sender<Result<Box<dyn Held>>>;

/// A consumer that runs; dropped, it ends.
pub struct Deliveries(tokio::task::JoinHandle<()>);

impl Deliveries {
    /// Drives the peer's consumer.
    pub fn driven_by(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(work))
    }

    /// Ends it, and waits until the peer's consumer is dropped.
    pub(crate) async fn end(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Deliveries {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A delivery of the peer's.
#[async_trait]
pub trait Held: Send {
    /// What came.
    fn parcel(&self) -> Parcel;

    /// The peer's own count of this message's deliveries, 1 for the first. Where it tells none, this process counts the nacks
    /// of each message, so that cases about other things can be run; the record then says `volatile`.
    fn count(&self) -> Option<u32> {
        None
    }

    /// The peer's ack.
    async fn ack(self: Box<Self>) -> Result<()>;

    /// The peer's way to keep it for longer, where the record gives one.
    async fn extend(&mut self, _lease: Duration) -> Result<()> {
        Err(Error::unsupported("extend", "the peer has no word for it"))
    }

    /// The peer's nack. A delay is asked for only where the record gives one.
    async fn nack(self: Box<Self>, delay: Duration) -> Result<()>;
}

/// An error of a peer's, whose own words are kept.
pub fn failed(kind: ErrorKind, operation: &'static str, error: impl std::fmt::Display) -> Error {
    Error::new(kind, operation, error.to_string())
}

/// What the peer's API has no word for.
#[must_use]
pub fn refused(why: &str) -> Support {
    Support::refused(why)
}

/// A record that gives the least that a peer can give; adapters add what their peer's documentation promises.
#[must_use]
pub fn modest(peer: &str) -> Capabilities {
    let no_word = || Support::refused(format!("the API of {peer} has no word for it"));
    Capabilities {
        at_least_once: Support::Native,
        key_order: no_word(),
        total_order: no_word(),
        block_on_failure: no_word(),
        park_on_failure: no_word(),
        parallelism: Parallelism::Any,
        ack_granularity: AckGranularity::Individual,
        ack_level: AckLevel::Sent,
        late_ack: LateAck::Possible,
        nack: no_word(),
        nack_delay: no_word(),
        release: no_word(),
        lease: no_word(),
        lease_extension: no_word(),
        attempt_count: AttemptCount::Volatile,
        crash_count: no_word(),
        dead_letter: no_word(),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::Leasing,
        redrive: no_word(),
        purge: no_word(),
        groups: no_word(),
        kept_before_group: no_word(),
        replay: no_word(),
        start_position: no_word(),
        start_latest: no_word(),
        patterns: no_word(),
        delayed_publish: no_word(),
        ttl: no_word(),
        publish_confirm: no_word(),
        unroutable_detected: no_word(),
        publish_dedup: no_word(),
        transactions: no_word(),
        tombstones: no_word(),
        declare: Support::emulated("by the broker's bare client, beside the peer"),
        describe: no_word(),
        delete: Support::emulated("by the broker's bare client, beside the peer"),
        lag: LagPrecision::default(),
        admin_needed: false,
        survives_process_kill: Support::Native,
        survives_power_loss: no_word(),
        limits: Limits::default(),
    }
}
