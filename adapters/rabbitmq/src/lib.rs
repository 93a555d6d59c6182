//! RabbitMQ adapter of AnyBroker: a fanout exchange for each destination, and a quorum queue for each group (or a classic one,
//! or one stream for all groups).
//!
//! What the words of the contract mean here, what is refused, and what is needed of the server: see the README beside
//! this crate.

mod admin;
mod agreement;
mod broker;
mod capabilities;
mod codec;
mod config;
mod credentials;
mod dead_letter;
mod delay;
mod desk;
mod error;
mod feed;
mod ledger;
mod link;
mod names;
mod outlet;
mod owner;
mod progress;
mod publisher;
mod reader;
mod reading;
mod renewal;
mod settle;
mod state;
mod stream;
mod subscription;
mod topology;
mod waits;

use std::sync::Arc;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Broker, Driver, Result};
use async_trait::async_trait;

/// Connects `amqp://` URLs, and `amqps://` ones, whose connection is encrypted.
#[derive(Debug, Clone, Copy, Default)]
pub struct RabbitDriver;

#[async_trait]
impl Driver for RabbitDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["amqp", "amqps"]
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
        Ok(Arc::new(broker::RabbitBroker::connect(config::Settings::read(&section)).await?))
    }
}
