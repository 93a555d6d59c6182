//! The broker as a value.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Broker, Bus, BusOptions, Clock, SystemClock};

use crate::broker::Connection;
use crate::config::Settings;
use crate::profile::Profile;
use crate::store::Store;

/// A broker in this process. Cheap to clone; all clones are the same broker.
///
/// ```
/// use std::time::Duration;
/// use anybroker_core::{ManualClock, Message};
/// use anybroker_memory::Memory;
/// # async fn example() -> anybroker_core::Result<()> {
/// let clock = ManualClock::new();
/// let bus = Memory::builder().clock(clock.clone()).build().bus();
/// bus.send(Message::new("orders", "later").with_delay(Duration::from_secs(3600))).await?;
/// let mut payments = bus.subscribe(bus.subscription("orders", "payments")).await?;
/// assert!(payments.receive(10, Duration::ZERO).await?.is_empty());
/// clock.advance(Duration::from_secs(3600));
/// assert_eq!(payments.receive(10, Duration::ZERO).await?.len(), 1);
/// # Ok(()) }
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(example()).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Memory(Arc<Store>);

impl Memory {
    /// A new, empty broker with the default settings and the real clock.
    #[must_use]
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// A new broker with other settings.
    pub fn builder() -> MemoryBuilder {
        MemoryBuilder { settings: Settings::default(), clock: None }
    }

    /// A connection to it. Connections are closed by themselves; the messages stay while the broker or a connection does.
    #[must_use]
    pub fn broker(&self) -> Arc<dyn Broker> {
        self.connect("memory://".into())
    }

    /// A connection to it, behind the check layer.
    #[must_use]
    pub fn bus(&self) -> Bus {
        Bus::new(self.broker(), BusOptions::default())
    }

    pub(crate) fn from_settings(settings: Settings) -> Self {
        MemoryBuilder { settings, clock: None }.build()
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.0.settings
    }

    pub(crate) fn connect(&self, url: String) -> Arc<dyn Broker> {
        Arc::new(Connection::new(Arc::clone(&self.0), url))
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

/// The settings of a new [`Memory`]; the same as in its configuration section.
#[derive(Clone, Debug)]
#[must_use]
pub struct MemoryBuilder {
    settings: Settings,
    clock: Option<Arc<dyn Clock>>,
}

impl MemoryBuilder {
    /// Where leases, delays and times to live take their time from.
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Some(Arc::new(clock));
        self
    }

    /// Messages a destination keeps for its groups, dead letters included; when it is full, publishers wait. At least
    /// 1; default 10,000,000.
    pub fn max_messages(mut self, max_messages: usize) -> Self {
        self.settings.max_messages = max_messages.max(1);
        self
    }

    /// Bytes of the largest payload. Default 16 MiB.
    pub fn max_payload(mut self, bytes: u64) -> Self {
        self.settings.max_payload = bytes;
        self
    }

    /// Messages a destination keeps for replay after all its groups have settled them. Default 10,000.
    pub fn retention(mut self, messages: usize) -> Self {
        self.settings.retention = messages;
        self
    }

    /// Whether publishing to a missing destination creates it. Default true.
    pub fn create_destinations(mut self, create: bool) -> Self {
        self.settings.create_destinations = create;
        self
    }

    /// How long an id is remembered, so that publishing it again stores nothing. Default zero: not at all.
    pub fn dedup_window(mut self, window: Duration) -> Self {
        self.settings.dedup_window = window;
        self
    }

    /// Whose habits it takes on. Default: none, exact on every verb.
    pub fn profile(mut self, profile: Profile) -> Self {
        self.settings.profile = profile;
        self
    }

    /// What a profile does at random; with 0, the default, nothing goes wrong by itself.
    pub fn seed(mut self, seed: u64) -> Self {
        self.settings.seed = seed;
        self
    }

    /// With a seed: after about how many receives that brought something a profile lets something go wrong. At least 1;
    /// default 150.
    pub fn disturb_every(mut self, receives: u64) -> Self {
        self.settings.disturb_every = receives.max(1);
        self
    }

    /// The broker.
    #[must_use]
    pub fn build(self) -> Memory {
        let clock = self.clock.unwrap_or_else(|| Arc::new(SystemClock::new()));
        Memory(Arc::new(Store::new(self.settings.in_profile(), clock)))
    }
}
