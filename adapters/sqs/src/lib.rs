//! Amazon SQS adapter of AnyBroker.
//!
//! Standard and FIFO queues, and fan-out by SNS. What each word of the contract means here, the modes, the permissions
//! that are needed and what is not done: see the README beside this crate.

mod broker;
mod capabilities;
mod clients;
mod codec;
mod config;
mod dead_letter;
mod error;
mod inbox;
mod leases;
mod letters;
mod login;
mod names;
mod parcel;
mod publisher;
mod queues;
mod requests;
mod retry;
mod settle;
mod source;
mod subscription;
mod topics;
mod topology;

use std::sync::Arc;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Broker, Driver, Result};
use async_trait::async_trait;

/// Connects `sqs://` URLs.
#[derive(Debug, Clone, Copy, Default)]
pub struct SqsDriver;

#[async_trait]
impl Driver for SqsDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["sqs"]
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
        Ok(Arc::new(broker::SqsBroker::connect(config::Settings::read(&section)).await?))
    }
}
