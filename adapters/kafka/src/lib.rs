//! Apache Kafka (and Redpanda) adapter of AnyBroker.
//!
//! How each word of the contract is mapped, what it costs and what is refused: see the README beside this crate.

mod blocks;
mod board;
mod broker;
mod capabilities;
mod codec;
mod config;
mod dead_letter;
mod describe;
mod error;
mod feeder;
mod groups;
mod joined;
mod lag;
mod lanes;
mod letters;
mod line;
mod login;
mod member;
mod names;
mod note;
mod progress;
mod publisher;
mod pulse;
mod settle;
mod state;
mod subscription;
mod topology;
mod transaction;
mod transactions;
mod trim;

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

    fn takes_credentials(&self) -> bool {
        true
    }

    fn check(&self, section: &Section) -> Vec<Problem> {
        config::Settings::check(section)
    }

    async fn connect(&self, section: Section) -> Result<Arc<dyn Broker>> {
        Ok(Arc::new(broker::KafkaBroker::connect(config::Settings::read(&section)).await?))
    }
}
