//! Logical names and RabbitMQ's: names of exchanges and queues are texts of at most 255 bytes.

use anybroker_core::{Destination, Group, naming};

/// What a name may be long before it is hashed: two of them, a prefix and a suffix stay below 255.
const LONGEST: usize = 96;
/// What is kept readable of a longer one.
const READABLE: usize = 60;

/// The names of one connection, all under its prefix.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    prefix: String,
}

impl Names {
    pub(crate) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// The fanout exchange of a destination.
    pub(crate) fn exchange(&self, destination: &Destination) -> String {
        format!("{}.{}", self.prefix, token(destination))
    }

    /// What the names of the exchanges of all destinations begin with.
    pub(crate) fn all_exchanges(&self) -> String {
        format!("{}.", self.prefix)
    }

    /// The destination with that exchange; `None` where the name does not tell.
    pub(crate) fn destination(&self, exchange: &str) -> Option<Destination> {
        name_of(exchange.strip_prefix(&self.prefix)?.strip_prefix('.')?).map(Destination::from)
    }

    /// The stream of the destination with that exchange.
    pub(crate) fn stream(exchange: &str) -> String {
        format!("{exchange}=stream")
    }

    /// An exchange to which nobody publishes: its bindings tell the groups that read the stream of that exchange.
    pub(crate) fn readers(exchange: &str) -> String {
        format!("{exchange}=readers")
    }

    /// The queue of a group. `=g=`, and what follows `=` below, come out of no name.
    pub(crate) fn queue(&self, destination: &Destination, group: &Group) -> String {
        format!("{}.{}=g={}", self.prefix, token(destination), token(group))
    }

    /// What the names of all queues of groups of the destination with that exchange begin with.
    pub(crate) fn all_groups(exchange: &str) -> String {
        format!("{exchange}=g=")
    }

    /// The dead letters of the group with that queue.
    pub(crate) fn letters(queue: &str) -> String {
        format!("{queue}=letters")
    }

    /// Where the members of the group with that queue agree who works under order.
    pub(crate) fn owner(queue: &str) -> String {
        format!("{queue}=owner")
    }

    /// How far the group with that queue is in its stream.
    pub(crate) fn progress(queue: &str) -> String {
        format!("{queue}=progress")
    }

    /// What failed in the group with that queue, and keeps its place.
    pub(crate) fn failures(queue: &str) -> String {
        format!("{queue}=failures")
    }

    /// Whoever consumes from it looks at the progress of the group with that queue.
    pub(crate) fn turn(queue: &str) -> String {
        format!("{queue}=turn")
    }

    /// The queue in which messages for `of` (an exchange or a group's queue) wait, of one range of delays.
    pub(crate) fn waiting(of: &str, range: &str) -> String {
        format!("{of}=wait={range}")
    }
}

/// Injective: letters, digits, `.`, `-` and `_` stay, every other byte is `=` and two hexadecimal digits.
fn token(name: &str) -> String {
    let text = naming::escape(name, "=", |byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if text.len() > LONGEST { naming::shorten(&text, "=", READABLE, name) } else { text }
}

/// The name of which a token was made, where it tells.
fn name_of(token: &str) -> Option<String> {
    naming::unescape(token, "=").filter(|name| self::token(name) == token)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_stay_apart_and_short_enough() {
        let long = "x".repeat(300);
        let names = ["orders", "orders.a", "orders=2ea", "orders-a", "Orders", "", ".", "*", "#", "a b", "ключ", "a/b"]
            .into_iter()
            .map(str::to_owned)
            .chain([long.clone(), format!("{long}y"), "ы".repeat(200)]);
        let all = Names::new(&"p".repeat(32));
        let mut seen = HashSet::new();
        for name in names {
            let queue = all.queue(&name.as_str().into(), &long.as_str().into());
            assert!(Names::waiting(&queue, "1234567890").len() <= 255, "{queue}");
            assert!(all.destination(&queue).is_none());
            assert!(Names::progress(&queue).len() <= 255 && Names::turn(&queue).len() <= 255, "{queue}");
            let exchange = all.exchange(&name.as_str().into());
            assert!(all.destination(&Names::stream(&exchange)).is_none());
            assert!(all.destination(&Names::readers(&exchange)).is_none());
            assert!(all.destination(&exchange).is_some_and(|told| told == *name) || exchange.contains("=h"), "{name}");
            assert!(seen.insert(queue), "{name}");
        }
    }

    #[test]
    fn what_belongs_to_two_groups_lies_apart() {
        let all = Names::new("anybroker");
        let pairs = [("a", "b"), ("a=g=b", "c"), ("a", "b=g=c"), ("a", "b=letters"), ("a.b", "c"), ("a", "b=owner")];
        let mut seen = HashSet::new();
        for (destination, group) in pairs {
            let queue = all.queue(&destination.into(), &group.into());
            assert!(seen.insert(all.exchange(&destination.into())) || destination == "a");
            assert!(seen.insert(Names::letters(&queue)) && seen.insert(Names::owner(&queue)));
            assert!(seen.insert(Names::progress(&queue)) && seen.insert(Names::turn(&queue)));
            assert!(seen.insert(Names::failures(&queue)));
            assert!(seen.insert(Names::waiting(&queue, "1")) && seen.insert(queue));
        }
    }
}
