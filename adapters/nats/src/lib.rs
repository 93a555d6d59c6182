//! NATS JetStream adapter of AnyBroker: streams and durable pull consumers, file storage.
//!
//! What the words of the contract mean here, what is refused, and what is needed of the server: see the README beside
//! this crate.

mod ack;
mod agreement;
mod api;
mod authentication;
mod board;
mod broker;
mod capabilities;
mod codec;
mod config;
mod dead_letter;
mod denials;
mod desk;
mod error;
mod feed;
mod inbox;
mod link;
mod lookup;
mod names;
mod numbers;
mod owner;
mod publisher;
mod record;
mod settle;
mod state;
mod subscription;
mod tls;
mod topology;

use std::sync::Arc;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Broker, Driver, Result};
use async_trait::async_trait;

/// Connects `nats://` URLs, and `nats+tls://` ones, whose connection must be encrypted.
#[derive(Debug, Clone, Copy, Default)]
pub struct NatsDriver;

#[async_trait]
impl Driver for NatsDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["nats", "nats+tls"]
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
        Ok(Arc::new(broker::NatsBroker::connect(config::Settings::read(&section)).await?))
    }
}
