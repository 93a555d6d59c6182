//! Swap the broker, keep the guarantees: the crate that services add.
//!
//! ```no_run
//! use std::time::Duration;
//! use anybroker::{Message, Result};
//!
//! # async fn example() -> Result<()> {
//! let bus = anybroker::connect("embedded:///tmp/orders.db").await?;
//! let mut payments = bus.subscribe(bus.subscription("orders", "payments")).await?;
//! bus.send(Message::new("orders", r#"{"total": 12}"#).with_key("order-17")).await?;
//! for delivery in payments.receive(100, Duration::from_secs(5)).await? {
//!     println!("{} attempt {}", delivery.message().id(), delivery.attempt());
//!     delivery.ack().await?;
//! }
//! # Ok(()) }
//! ```
//!
//! # Features
//!
//! One per adapter (`memory`, `embedded`, `kafka`, `nats`, `pulsar`, `rabbitmq`, `sqs`), `worker` and `events`. A feature
//! adds an adapter and changes nothing else; without default features no broker client is built.

pub use anybroker_core::*;

#[cfg(feature = "embedded")]
pub use anybroker_embedded as embedded;
#[cfg(feature = "events")]
pub use anybroker_events as events;
#[cfg(feature = "kafka")]
pub use anybroker_kafka as kafka;
#[cfg(feature = "memory")]
pub use anybroker_memory as memory;
#[cfg(feature = "nats")]
pub use anybroker_nats as nats;
#[cfg(feature = "pulsar")]
pub use anybroker_pulsar as pulsar;
#[cfg(feature = "rabbitmq")]
pub use anybroker_rabbitmq as rabbitmq;
#[cfg(feature = "sqs")]
pub use anybroker_sqs as sqs;
#[cfg(feature = "worker")]
pub use anybroker_worker as worker;

/// The adapters of the enabled features. Add a scheme of your own with [`Registry::with`].
#[must_use]
pub fn registry() -> Registry {
    let registry = Registry::new();
    #[cfg(feature = "memory")]
    let registry = registry.with(memory::MemoryDriver);
    #[cfg(feature = "embedded")]
    let registry = registry.with(embedded::EmbeddedDriver);
    #[cfg(feature = "kafka")]
    let registry = registry.with(kafka::KafkaDriver);
    #[cfg(feature = "nats")]
    let registry = registry.with(nats::NatsDriver);
    #[cfg(feature = "pulsar")]
    let registry = registry.with(pulsar::PulsarDriver);
    #[cfg(feature = "rabbitmq")]
    let registry = registry.with(rabbitmq::RabbitDriver);
    #[cfg(feature = "sqs")]
    let registry = registry.with(sqs::SqsDriver);
    registry
}

/// Connects to a URL, with the adapters of the enabled features.
///
/// # Errors
/// As [`Registry::connect`].
pub async fn connect(url: impl Into<String>) -> Result<Bus> {
    registry().connect(Config::from_url(url)).await
}

/// Connects by a configuration (see [`Config::from_file`], [`Config::with_env`]), with the adapters of the enabled
/// features.
///
/// # Errors
/// As [`Registry::connect`].
pub async fn connect_with(config: Config) -> Result<Bus> {
    registry().connect(config).await
}
