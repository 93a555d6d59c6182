//! Logical names and Pulsar's. A topic's local name may hold nearly anything, but it travels in URLs, and `-partition-`
//! in it names a partition (TopicName.java); a subscription's name travels in URLs too.

use anybroker_core::{Destination, Group, naming};

use crate::config::Settings;

/// What a name may be long before it is hashed.
const LONGEST: usize = 120;
/// What is kept readable of a longer one.
const READABLE: usize = 80;

/// The subscription of every topic of dead letters: what it has acked is purged.
pub(crate) const LETTERS_SUBSCRIPTION: &str = "anybroker-letters";

/// The names of one connection, all in its namespace.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    space: String,
}

impl Names {
    pub(crate) fn new(settings: &Settings) -> Self {
        Self { space: format!("{}/{}", settings.tenant, settings.namespace) }
    }

    /// `tenant/namespace`.
    pub(crate) fn space(&self) -> &str {
        &self.space
    }

    /// The local name of a destination's topic.
    pub(crate) fn topic(destination: &Destination) -> String {
        token(destination)
    }

    /// The destination with that topic, by its whole name or that of one of its partitions; `None` where the name does not
    /// tell.
    pub(crate) fn destination(&self, full: &str) -> Option<Destination> {
        let local = full.strip_prefix("persistent://")?.strip_prefix(&self.space)?.strip_prefix('/')?;
        let whole = local.rsplit_once("-partition-").map_or(local, |(whole, _)| whole);
        name_of(whole).map(Destination::from)
    }

    /// The local name of the topic that brings messages back to one group.
    pub(crate) fn back(destination: &Destination, group: &Group) -> String {
        format!("{}=b={}", token(destination), token(group))
    }

    /// The local name of the topic of a group's dead letters.
    pub(crate) fn letters(destination: &Destination, group: &Group) -> String {
        format!("{}=l={}", token(destination), token(group))
    }

    /// The local name of the topic on which a group's hand-overs are counted.
    pub(crate) fn hand_overs(destination: &Destination, group: &Group) -> String {
        format!("{}=c={}", token(destination), token(group))
    }

    /// The subscription of a group.
    pub(crate) fn subscription(group: &Group) -> String {
        token(group)
    }

    /// The whole name of a local one.
    pub(crate) fn full(&self, local: &str) -> String {
        format!("persistent://{}/{local}", self.space)
    }
}

/// Injective: letters, digits, `-`, `_` and `.` stay, every other byte is `=` and two hexadecimal digits.
fn token(name: &str) -> String {
    let reserved = name.contains("-partition-") || name == "." || name == ".." || name.starts_with("__");
    let text = naming::escape(name, "=", |byte| {
        byte.is_ascii_alphanumeric() || (!reserved && matches!(byte, b'-' | b'_' | b'.'))
    });
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
    fn names_stay_apart_and_legal() {
        let long = "x".repeat(300);
        let names = ["orders", "orders.a", "orders=2ea", "orders-a", "orders_a", ".", "..", "*", "a b", "ключ", "a/b"]
            .into_iter()
            .map(str::to_owned)
            .chain(["a-partition-1".to_owned(), "a=2dpartition=2d1".to_owned(), "__change_events".to_owned()])
            .chain([long.clone(), format!("{long}y")]);
        let mut topics = HashSet::new();
        let all = Names { space: "public/default".into() };
        for name in names {
            let topic = Names::topic(&name.as_str().into());
            let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.=".contains(&byte);
            assert!(topic.len() < 200 && topic.bytes().all(is_legal) && !topic.contains("-partition-"), "{topic}");
            let told = all.destination(&all.full(&topic));
            assert!(told.is_some_and(|told| told == *name) || topic.contains("=h"), "{name}");
            assert_eq!(all.destination(&all.full(&format!("{topic}-partition-2"))), all.destination(&all.full(&topic)));
            assert!(topics.insert(topic), "{name}");
        }
    }

    #[test]
    fn what_belongs_to_two_groups_lies_apart() {
        let pairs = [("a", "b"), ("a=b=b", "c"), ("a", "b=l=c"), ("a-b", "c"), ("a", "b-c")];
        let all = pairs.iter().flat_map(|(destination, group)| {
            let (destination, group) = ((*destination).into(), (*group).into());
            let counts = Names::hand_overs(&destination, &group);
            [Names::back(&destination, &group), Names::letters(&destination, &group), counts]
        });
        let found: HashSet<String> = all.collect();
        assert_eq!(found.len(), 3 * pairs.len());
        let all = Names { space: "public/default".into() };
        assert!(found.iter().all(|topic| all.destination(&all.full(topic)).is_none()));
        assert!(pairs.iter().all(|(destination, _)| !found.contains(&Names::topic(&(*destination).into()))));
    }
}
