//! The state that all connections to one broker share.

mod duty;
mod flight;
mod group;
mod keys;
mod letters;
mod log;
mod pending;
mod settled;
mod take;
mod topic;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anybroker_core::{Clock, Destination, Error, ErrorKind, Group, Result};
use parking_lot::{Mutex, RwLock};
use rand::SeedableRng;
use rand::rngs::StdRng;

pub(crate) use duty::LaneEvent;
pub(crate) use group::GroupState;
pub(crate) use letters::{letter_id, letter_number};
pub(crate) use log::Log;
pub(crate) use settled::Return;
pub(crate) use take::Taking;
pub(crate) use topic::{LaneState, Seat, Topic};

use crate::config::Settings;

/// Destinations by name.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) settings: Settings,
    pub(crate) clock: Arc<dyn Clock>,
    topics: RwLock<HashMap<Destination, Arc<Topic>, foldhash::fast::RandomState>>,
    uids: AtomicU64,
    /// What a profile does at random, the same for the same seed.
    pub(crate) random: Mutex<StdRng>,
}

impl Store {
    pub(crate) fn new(settings: Settings, clock: Arc<dyn Clock>) -> Self {
        let random = Mutex::new(StdRng::seed_from_u64(settings.seed));
        Self { settings, clock, topics: RwLock::default(), uids: AtomicU64::new(1), random }
    }

    /// A number that nothing else of this store has.
    pub(crate) fn uid(&self) -> u64 {
        self.uids.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn topic(&self, name: &Destination, operation: &'static str) -> Result<Arc<Topic>> {
        self.topics.read().get(name).cloned().ok_or_else(|| no_destination(name, operation))
    }

    /// The destinations whose names begin with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Vec<Destination> {
        let mut found: Vec<Destination> =
            self.topics.read().keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        found.sort();
        found
    }

    /// The destination, and whether it is new.
    pub(crate) fn topic_or_new(&self, name: &Destination) -> (Arc<Topic>, bool) {
        if let Some(topic) = self.topics.read().get(name) {
            return (Arc::clone(topic), false);
        }
        let mut topics = self.topics.write();
        let mut created = false;
        let topic = topics.entry(name.clone()).or_insert_with(|| {
            created = true;
            Arc::new(Topic::new(name.clone(), &self.settings))
        });
        (Arc::clone(topic), created)
    }

    /// Removes a destination with everything in it.
    pub(crate) fn remove(&self, name: &Destination) -> Result<()> {
        let topic = self.topics.write().remove(name).ok_or_else(|| no_destination(name, "delete"))?;
        topic.remove_all();
        Ok(())
    }
}

pub(crate) fn no_destination(name: &Destination, operation: &'static str) -> Error {
    Error::new(ErrorKind::NotFound, operation, "there is no such destination").with("destination", name)
}

pub(crate) fn no_group(name: &Destination, group: &Group, operation: &'static str) -> Error {
    Error::new(ErrorKind::NotFound, operation, "there is no such group").with("destination", name).with("group", group)
}
