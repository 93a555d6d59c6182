//! Apache Kafka (and Redpanda) adapter of AnyBroker.
//!
//! **Incomplete**: a thin slice that shows that the traits fit. What it does holds the contract; everything else is
//! refused in its capability record. See the README beside this crate.

mod broker;
mod capabilities;
mod codec;
mod config;
mod dead_letter;
mod error;
mod feeder;
mod lanes;
mod names;
mod publisher;
mod settle;
mod state;
mod subscription;
mod topology;

use std::sync::Arc;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Broker, Driver, Result};
use async_trait::async_trait;

/// Connects `kafka://` URLs.
#[derive(Debug, Clone, Copy, Default)]
pub struct KafkaDriver;

#[async_trait]
impl Driver for KafkaDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["kafka"]
    }

    fn fields(&self) -> &'static [Field] {
        config::FIELDS
    }

    fn check(&self, section: &Section) -> Vec<Problem> {
        config::Settings::check(section)
    }

    async fn connect(&self, section: Section) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(broker::KafkaBroker::connect(config::Settings::read(&section)).await?))
    }
}
