//! How long clients take after a fault to do something again.

use std::collections::HashMap;

/// The clients that faults have hit.
#[derive(Default)]
pub(super) struct Recovery {
    /// Those that have done nothing since a fault was over, and when it was.
    waiting: HashMap<u32, u64>,
    longest: Option<u64>,
}

impl Recovery {
    /// What was over for these clients is not.
    pub(super) fn begins(&mut self, clients: &[u32]) {
        for client in clients {
            self.waiting.remove(client);
        }
    }

    /// A fault is over, and no other one hits this client.
    pub(super) fn ends(&mut self, at: u64, client: u32) {
        self.waiting.insert(client, at);
    }

    /// The client has published or received something.
    pub(super) fn works(&mut self, at: u64, client: u32) {
        if let Some(since) = self.waiting.remove(&client) {
            self.longest = self.longest.max(Some(at.saturating_sub(since)));
        }
    }

    /// The longest that any client took, in milliseconds, rounded up.
    pub(super) fn longest(&self) -> Option<u64> {
        self.longest.map(|micros| micros.div_ceil(1_000))
    }
}
