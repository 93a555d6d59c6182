//! The in-process reference broker of AnyBroker: exact on every verb, with a clock that tests can turn.
//!
//! `memory://` is a fresh, private broker; `memory://name` is shared by everyone in this process who connects to that
//! name, and lives as long as the process. [`Memory`] is the same as a value.

mod broker;
mod capabilities;
mod config;
mod dead_letter;
mod memory;
mod profile;
mod publisher;
mod settle;
mod store;
mod subscription;
mod topology;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Broker, Driver, Error, ErrorKind, Result};
use async_trait::async_trait;
use parking_lot::Mutex;

pub use memory::{Memory, MemoryBuilder};
pub use profile::Profile;

use crate::config::Settings;

/// Connects `memory://` URLs.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemoryDriver;

/// The brokers that have a name.
static NAMED: LazyLock<Mutex<HashMap<String, Memory>>> = LazyLock::new(Mutex::default);

#[async_trait]
impl Driver for MemoryDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["memory"]
    }

    fn fields(&self) -> &'static [Field] {
        config::FIELDS
    }

    fn check(&self, section: &Section) -> Vec<Problem> {
        config::check(section)
    }

    async fn connect(&self, section: Section) -> Result<Arc<dyn Broker>> {
        let settings = Settings::from_section(&section);
        let url = section.url().to_string();
        let Some(name) = config::name(section.url()) else {
            return Ok(Memory::from_settings(settings).connect(url));
        };
        let mut named = NAMED.lock();
        let memory = named.entry(name.to_owned()).or_insert_with(|| Memory::from_settings(settings.clone()));
        if *memory.settings() != settings {
            let text = "a memory broker of this name is there already, with other settings";
            return Err(Error::new(ErrorKind::AlreadyExists, "connect", text).with("endpoint", url));
        }
        Ok(memory.connect(url))
    }
}
