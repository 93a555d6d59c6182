//! What a worker did.

use std::collections::BTreeMap;
use std::fmt;

use anybroker_core::{Destination, Error, Group};

use crate::ErrorClass;

/// What a worker did, told when it ends: one part for each subscription, in the order they were added.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// One for each subscription.
    pub subscriptions: Vec<SubscriptionReport>,
}

impl Report {
    /// The counts of all subscriptions together.
    #[must_use]
    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        for subscription in &self.subscriptions {
            total.add(&subscription.counts);
        }
        total
    }

    /// The first error that ended a subscription, if any did.
    #[must_use]
    pub fn error(&self) -> Option<&Error> {
        self.subscriptions.iter().find_map(|subscription| subscription.error.as_ref())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, subscription) in self.subscriptions.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{subscription}")?;
        }
        Ok(())
    }
}

/// What became of one subscription.
#[derive(Debug)]
#[non_exhaustive]
pub struct SubscriptionReport {
    /// Its destinations.
    pub destinations: Vec<Destination>,
    /// Its group.
    pub group: Group,
    /// What it did.
    pub counts: Counts,
    /// What ended it before it was told to stop: `NotFound` (deleted underneath), `Closed`, `PermissionDenied`,
    /// `Unauthenticated`.
    pub error: Option<Error>,
    /// What went wrong while it was closed; what was unsettled comes back by lease then.
    pub close_error: Option<Error>,
}

impl fmt::Display for SubscriptionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.destinations.iter().map(|name| name.as_str()).collect();
        write!(f, "{} [{}]: {}", names.join(", "), self.group, self.counts)?;
        if let Some(error) = &self.error {
            write!(f, "; ended by {error}")?;
        }
        Ok(())
    }
}

/// What was done, counted when the settlement was confirmed (not when the handler answered).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Processed and acked.
    pub processed: u64,
    /// Failed and given back for another attempt.
    pub retried: u64,
    /// Dead-lettered, by error class.
    pub dead_lettered: BTreeMap<ErrorClass, u64>,
    /// Given back uncounted: drain, revoked lanes, an open circuit breaker, keys that wait behind a failure.
    pub released: u64,
    /// Settled too late: the lease, the assignment or the connection was gone, and the message comes (or came) back.
    pub stale: u64,
    /// Settlements given up, after several tries or at the end; the messages come back when their leases end. Nacks and
    /// dead letters are tried, with pauses of up to 30 s, until they are done, the delivery is lost (then it is `stale`) or
    /// the grace of a drain is over; the handler does not see the message meanwhile.
    pub unsettled: u64,
    /// Attempts that ended in a panic (in `retried` or `dead_lettered` as well).
    pub panics: u64,
    /// Attempts that were cut off at the time limit (in `retried` or `dead_lettered` as well).
    pub timeouts: u64,
    /// Handlers that were dropped when the grace ended or their lane was taken away (in `released` as well).
    pub cancelled: u64,
    /// Lanes that were taken away: revoked, or lost without notice.
    pub revoked: u64,
    /// Times that the circuit breaker opened.
    pub breaker_opened: u64,
}

impl Counts {
    /// All dead letters.
    #[must_use]
    pub fn dead_letters(&self) -> u64 {
        self.dead_lettered.values().sum()
    }

    /// The dead letters of one class.
    #[must_use]
    pub fn dead_letters_of(&self, class: &ErrorClass) -> u64 {
        self.dead_lettered.get(class).copied().unwrap_or(0)
    }

    fn add(&mut self, other: &Self) {
        for (class, count) in &other.dead_lettered {
            *self.dead_lettered.entry(class.clone()).or_default() += count;
        }
        self.processed += other.processed;
        self.retried += other.retried;
        self.released += other.released;
        self.stale += other.stale;
        self.unsettled += other.unsettled;
        self.panics += other.panics;
        self.timeouts += other.timeouts;
        self.cancelled += other.cancelled;
        self.revoked += other.revoked;
        self.breaker_opened += other.breaker_opened;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} processed, {} retried, {} dead letters", self.processed, self.retried, self.dead_letters())?;
        let classes: Vec<String> = self.dead_lettered.iter().map(|(class, count)| format!("{count} {class}")).collect();
        if !classes.is_empty() {
            write!(f, " ({})", classes.join(", "))?;
        }
        write!(f, ", {} released, {} stale", self.released, self.stale)?;
        if self.unsettled > 0 {
            write!(f, ", {} unsettled", self.unsettled)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_settled_is_told_where_there_is_any() {
        let mut counts = Counts { processed: 3, ..Counts::default() };
        assert_eq!(counts.to_string(), "3 processed, 0 retried, 0 dead letters, 0 released, 0 stale");
        counts.unsettled = 2;
        assert_eq!(counts.to_string(), "3 processed, 0 retried, 0 dead letters, 0 released, 0 stale, 2 unsettled");
    }
}
