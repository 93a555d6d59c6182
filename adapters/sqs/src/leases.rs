//! What a member holds: receipt handles with their leases, and what it gave back without a failure.

use std::collections::{HashMap, VecDeque};

use anybroker_core::Bytes;
use tokio::time::Instant;

use crate::codec::Carried;
use crate::parcel::BATCH;
use crate::requests::Leased;

/// How many messages' uncounted hand-overs are remembered.
const REMEMBERED: usize = 10_000;

/// A message that goes back to its place in the queue.
#[derive(Debug)]
pub(crate) struct Back {
    /// Its message group, in a FIFO queue.
    pub(crate) group: Option<String>,
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
        Back { group: self.group.clone(), place: self.place, leased: (handle, self.until) }
    }
}

/// Shares messages out to requests of ten: those of a message group, in the order of the queue, to one. A group of more has a share of
/// its own.
pub(crate) fn packed(mut backs: Vec<Back>) -> Vec<Vec<Back>> {
    backs.sort_unstable_by_key(|back| back.place);
    let mut places: HashMap<Option<String>, usize> = HashMap::new();
    let mut groups: Vec<Vec<Back>> = Vec::new();
    for back in backs {
        let place = *places.entry(back.group.clone()).or_insert(groups.len());
        if place == groups.len() {
            groups.push(Vec::new());
        }
        groups[place].push(back);
    }
    let mut parts: Vec<Vec<Back>> = Vec::new();
    for group in groups {
        match parts.last_mut() {
            Some(part) if part.len() + group.len() <= BATCH => part.extend(group),
            _ => parts.push(group),
        }
    }
    parts
}

/// What a member has of a message that it settles or drops.
pub(crate) enum Taken {
    Held(Lease),
    /// Its lease is over: it comes back, or is with another member. What waited for its message group to be free need not wait for it.
    Over(Option<String>),
    /// It is not out.
    Unknown,
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

    /// Takes the message from the member.
    pub(crate) fn take(&mut self, handle: &Bytes) -> Taken {
        let Some(lease) = self.out.remove(handle) else { return Taken::Unknown };
        if let Some(group) = &lease.group
            && let Some(count) = self.groups.get_mut(group)
        {
            *count -= 1;
            if *count == 0 {
                self.groups.remove(group);
            }
        }
        if lease.until > Instant::now() { Taken::Held(lease) } else { Taken::Over(lease.group) }
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

    /// Whether something of a message group is out, by leases that hold.
    pub(crate) fn has_out(&self, group: &str) -> bool {
        let now = Instant::now();
        let is_of = |lease: &Lease| lease.until > now && lease.group.as_deref() == Some(group);
        self.groups.contains_key(group) && self.out.values().any(is_of)
    }

    /// Remembers what goes back when the last of its message group is settled; what waits for nothing is answered.
    pub(crate) fn return_later(&mut self, back: Back) -> Option<Back> {
        let Some(group) = back.group.as_ref().filter(|group| self.has_out(group)) else { return Some(back) };
        self.returning.entry(group.clone()).or_default().push(back);
        None
    }

    /// What can go back now, of these message groups.
    pub(crate) fn take_returning(&mut self, groups: &[String]) -> Vec<Back> {
        if self.returning.is_empty() {
            return Vec::new();
        }
        let free: Vec<&String> = groups.iter().filter(|group| !self.has_out(group)).collect();
        free.into_iter().filter_map(|group| self.returning.remove(group)).flatten().collect()
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn back(group: &str, place: u64) -> Back {
        Back { group: Some(group.into()), place, leased: (Bytes::from(place.to_string()), Instant::now()) }
    }

    fn places(parts: &[Vec<Back>]) -> Vec<Vec<u64>> {
        parts.iter().map(|part| part.iter().map(|back| back.place).collect()).collect()
    }

    #[test]
    fn a_message_group_is_not_cut_in_two_by_requests_of_ten() {
        let mut backs: Vec<Back> = (0..8).map(|place| back(&format!("other {place}"), place)).collect();
        backs.extend([12, 10, 11].map(|place| back("k", place)));
        assert_eq!(places(&packed(backs)), [(0..8).collect(), vec![10, 11, 12]]);
        assert_eq!(places(&packed(vec![back("b", 4), back("a", 2), back("b", 1)])), [[1, 4, 2]]);
        let long: Vec<Back> = (0..12).rev().map(|place| back("long", place)).collect();
        assert_eq!(places(&packed(long)), [(0..12).collect::<Vec<_>>()], "one after the other");
        assert!(packed(Vec::new()).is_empty());
    }

    #[test]
    fn what_goes_back_waits_for_leases_of_its_group_that_hold_and_for_no_others() {
        let mut leases = Leases::default();
        let lease = |until| Lease {
            place: 0,
            until,
            message_id: String::new(),
            group: Some("k".into()),
            carried: Carried::default(),
        };
        let now = Instant::now();
        leases.hand_out("over".into(), lease(now));
        assert!(leases.return_later(back("k", 1)).is_some(), "nothing of it is out");
        leases.hand_out("holds".into(), lease(now + Duration::from_secs(60)));
        assert!(leases.return_later(back("k", 2)).is_none());
        assert!(leases.return_later(back("other", 3)).is_some());
        assert!(leases.take_returning(&["k".into()]).is_empty());
        assert!(matches!(leases.take(&"over".into()), Taken::Over(Some(_))));
        assert!(matches!(leases.take(&"holds".into()), Taken::Held(_)));
        assert!(matches!(leases.take(&"holds".into()), Taken::Unknown));
        let back: Vec<u64> = leases.take_returning(&["k".into()]).iter().map(|back| back.place).collect();
        assert_eq!(back, [2]);
    }
}
