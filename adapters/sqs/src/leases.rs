//! What a member holds: receipt handles with their leases, and what it gave back without a failure.

use std::collections::{HashMap, VecDeque};

use anybroker_core::Bytes;
use tokio::time::Instant;

use crate::codec::Carried;
use crate::requests::Leased;

/// How many messages' uncounted hand-overs are remembered.
const REMEMBERED: usize = 10_000;

/// A message that goes back to its place in the queue.
#[derive(Debug)]
pub(crate) struct Back {
    /// See [`Lease::place`].
    pub(crate) place: u64,
    pub(crate) leased: Leased,
}

/// A message that is out.
#[derive(Debug, Clone)]
pub(crate) struct Lease {
    /// Where among all that this source has received: of a message group, the order of the queue.
    pub(crate) place: u64,
    pub(crate) until: Instant,
    /// SQS's own id of the message.
    pub(crate) message_id: String,
    /// Its message group, in a FIFO queue.
    pub(crate) group: Option<String>,
    /// What it brought along.
    pub(crate) carried: Carried,
}

impl Lease {
    /// The message that it is of, to be put back.
    pub(crate) fn back(&self, handle: Bytes) -> Back {
        Back { place: self.place, leased: (handle, self.until) }
    }
}

/// The messages that are out.
#[derive(Default)]
pub(crate) struct Leases {
    out: HashMap<Bytes, Lease>,
    /// How many of a message group are out.
    groups: HashMap<String, u32>,
    /// What goes back to its place as soon as nothing of its message group is out: SQS would hand it to another member
    /// while this one holds later messages of the key.
    returning: HashMap<String, Vec<Back>>,
}

impl Leases {
    pub(crate) fn hand_out(&mut self, handle: Bytes, lease: Lease) {
        if let Some(group) = &lease.group {
            match self.groups.get_mut(group) {
                Some(count) => *count += 1,
                None => drop(self.groups.insert(group.clone(), 1)),
            }
        }
        self.out.insert(handle, lease);
    }

    /// Takes the message from the member, unless its lease is over.
    pub(crate) fn take(&mut self, handle: &Bytes) -> Option<Lease> {
        let lease = self.out.remove(handle)?;
        if let Some(group) = &lease.group
            && let Some(count) = self.groups.get_mut(group)
        {
            *count -= 1;
            if *count == 0 {
                self.groups.remove(group);
            }
        }
        (lease.until > Instant::now()).then_some(lease)
    }

    /// The lease, unless it is over.
    pub(crate) fn held(&self, handle: &Bytes) -> Option<Leased> {
        let until = self.out.get(handle)?.until;
        (until > Instant::now()).then(|| (handle.clone(), until))
    }

    /// The lease was extended.
    pub(crate) fn extend(&mut self, handle: &Bytes, until: Instant) {
        if let Some(lease) = self.out.get_mut(handle) {
            lease.until = until;
        }
    }

    /// Whether anything is out.
    pub(crate) fn has_any_out(&self) -> bool {
        !self.out.is_empty()
    }

    /// Whether something of a message group is out.
    pub(crate) fn has_out(&self, group: &str) -> bool {
        self.groups.contains_key(group)
    }

    /// Remembers what goes back when the last of its message group is settled.
    pub(crate) fn return_later(&mut self, (group, back): (String, Back)) {
        self.returning.entry(group).or_default().push(back);
    }

    /// What can go back now, of these message groups.
    pub(crate) fn take_returning(&mut self, groups: &[String]) -> Vec<Back> {
        if self.returning.is_empty() {
            return Vec::new();
        }
        let free = groups.iter().filter(|group| !self.groups.contains_key(*group));
        let now = Instant::now();
        let backs = free.filter_map(|group| self.returning.remove(group)).flatten();
        // The others are back by themselves.
        backs.filter(|back| back.leased.1 > now).collect()
    }

    /// Everything that is out.
    pub(crate) fn drain(&mut self) -> Vec<(Bytes, Lease)> {
        self.groups.clear();
        self.out.drain().collect()
    }

    /// Everything that was to go back later.
    pub(crate) fn drain_returning(&mut self) -> Vec<Back> {
        self.returning.drain().flat_map(|(_, returning)| returning).collect()
    }
}

/// Hand-overs that were no failure, by SQS's id of the message: SQS counts them, and they are subtracted again. Shared by
/// the subscriptions of a connection.
#[derive(Default)]
pub(crate) struct Forgiven {
    counts: HashMap<String, u32>,
    order: VecDeque<String>,
}

impl Forgiven {
    /// How often a message was handed over, this time included, of which SQS has counted so many.
    pub(crate) fn handed_over(&self, message_id: &str, receive_count: u32) -> u32 {
        let forgiven = self.counts.get(message_id).copied().unwrap_or_default();
        receive_count.saturating_sub(forgiven).max(1)
    }

    /// This hand-over was no failure.
    pub(crate) fn forgive(&mut self, message_id: String) {
        if let Some(count) = self.counts.get_mut(&message_id) {
            *count += 1;
            return;
        }
        self.counts.insert(message_id.clone(), 1);
        self.order.push_back(message_id);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.counts.remove(&oldest);
        }
    }
}

/// The delays that this connection has set by visibility timeouts, by queue: SQS counts such messages as in flight. Those
/// that others have set are not known here.
#[derive(Default)]
pub(crate) struct Delays {
    ends: HashMap<String, Vec<Instant>>,
}

impl Delays {
    /// A message of that queue waits until then.
    pub(crate) fn add(&mut self, url: &str, until: Instant) {
        let now = Instant::now();
        if until <= now {
            return;
        }
        let ends = match self.ends.get_mut(url) {
            Some(ends) => ends,
            None => self.ends.entry(url.to_owned()).or_default(),
        };
        if ends.len() >= REMEMBERED {
            ends.retain(|end| *end > now);
        }
        if ends.len() < REMEMBERED {
            ends.push(until);
        }
    }

    /// How many messages of that queue wait.
    pub(crate) fn count(&mut self, url: &str) -> u64 {
        let now = Instant::now();
        self.ends.get_mut(url).map_or(0, |ends| {
            ends.retain(|end| *end > now);
            ends.len() as u64
        })
    }
}
