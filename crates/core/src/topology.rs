//! Destinations and groups as the broker has them.

use std::collections::BTreeMap;

use crate::{Destination, Group, Lag, Start};

/// What is to be declared, verified or deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopologySpec {
    /// The destination.
    pub destination: Destination,
    /// The group, where one is meant. Declared, it keeps everything published from then on.
    pub group: Option<Group>,
    /// Where the group starts when it is new.
    pub start: Start,
}

impl TopologySpec {
    /// A destination.
    pub fn destination(destination: impl Into<Destination>) -> Self {
        Self { destination: destination.into(), group: None, start: Start::Earliest }
    }

    /// A group of a destination (which is declared with it).
    pub fn group(destination: impl Into<Destination>, group: impl Into<Group>) -> Self {
        Self { destination: destination.into(), group: Some(group.into()), start: Start::Earliest }
    }

    /// Where the group starts when it is new.
    #[must_use]
    pub fn with_start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }
}

/// What a declaration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// It was missing and is there now.
    Created,
    /// It was there, as asked for.
    Existed,
}

/// A destination as the broker has it.
#[derive(Debug, Clone)]
pub struct Description {
    /// The logical name.
    pub destination: Destination,
    /// The broker's own name for it.
    pub physical: String,
    /// Its groups with their lag.
    pub groups: Vec<GroupDescription>,
    /// How many messages are stored, where the broker tells.
    pub messages: Option<u64>,
    /// Settings as the broker tells them (partitions, retention, …).
    pub settings: BTreeMap<String, String>,
}

/// A group as the broker has it.
#[derive(Debug, Clone)]
pub struct GroupDescription {
    /// The logical name.
    pub group: Group,
    /// The broker's own name for it.
    pub physical: String,
    /// The broker's own name of its dead-letter queue.
    pub dead_letters: String,
    /// How many dead letters it has, where the broker tells.
    pub dead_letter_count: Option<u64>,
    /// What it has left to do.
    pub lag: Lag,
}
