//! The embedded durable broker of AnyBroker: one SQLite file, several processes at once, no server.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> anybroker_core::Result<()> {
//! use std::time::Duration;
//! use anybroker_core::{Config, Message, Registry};
//! use anybroker_embedded::EmbeddedDriver;
//!
//! # let directory = tempfile::tempdir().expect("a directory");
//! # let path = directory.path().join("events.db");
//! let url = format!("embedded://{}", path.display());
//! let bus = Registry::new().with(EmbeddedDriver).connect(Config::from_url(&url)).await?;
//! bus.send(Message::new("orders", "one pizza")).await?;
//! let mut orders = bus.subscribe(bus.subscription("orders", "kitchen")).await?;
//! for delivery in orders.receive(10, Duration::from_secs(5)).await? {
//!     assert_eq!(delivery.message().bytes(), b"one pizza");
//!     delivery.ack().await?;
//! }
//! # bus.close(Duration::from_secs(5)).await
//! # }
//! ```

mod broker;
mod capabilities;
mod clock;
mod config;
mod dead_letter;
mod error;
mod fetch;
mod inbox;
mod lanes;
mod member;
mod process;
mod publisher;
mod retention;
mod schema;
mod settle;
mod store;
mod subscription;
mod topology;
mod wake;
mod writer;

use std::sync::Arc;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Broker, Driver, Result};
use async_trait::async_trait;

pub use broker::EmbeddedBroker;
pub use config::{Durability, Settings};

/// Connects `embedded:///absolute/path.db` URLs.
#[derive(Debug, Clone, Copy, Default)]
pub struct EmbeddedDriver;

#[async_trait]
impl Driver for EmbeddedDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["embedded"]
    }

    fn fields(&self) -> &'static [Field] {
        config::FIELDS
    }

    fn check(&self, section: &Section) -> Vec<Problem> {
        config::check(section)
    }

    async fn connect(&self, section: Section) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(EmbeddedBroker::open(Settings::from_section(&section)).await?))
    }
}
