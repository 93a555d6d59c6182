//! Apache Pulsar adapter of AnyBroker: persistent topics, Key_Shared, Shared and Exclusive subscriptions.
//!
//! What the words of the contract mean here, what is refused, and what is needed of the broker: see the README beside
//! this crate.

mod admin;
mod batch;
mod broker;
mod capabilities;
mod codec;
mod config;
mod dead_letter;
mod error;
mod feed;
mod hand_overs;
mod link;
mod members;
mod names;
mod producer;
mod publisher;
mod settle;
mod state;
mod subscription;
mod topology;
mod wire;

use std::sync::Arc;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Broker, Driver, Result};
use async_trait::async_trait;

/// Connects `pulsar://` URLs, and `pulsar+ssl://` ones, whose connections are encrypted.
#[derive(Debug, Clone, Copy, Default)]
pub struct PulsarDriver;

#[async_trait]
impl Driver for PulsarDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["pulsar", "pulsar+ssl"]
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
        Ok(Arc::new(broker::PulsarBroker::connect(config::Settings::read(&section)).await?))
    }
}
