//! Logical names and JetStream's: stream and consumer names hold no white space, `.`, `*`, `>` or path separators and end
//! at 255 bytes (nats-server `JSMaxNameLen`); subject tokens hold no white space, `.`, `*` or `>`.

use anybroker_core::{Destination, Group, naming};

/// What a name may be long before it is hashed: two of them and their prefix stay below 255.
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

    /// The stream of a destination.
    pub(crate) fn stream(&self, destination: &Destination) -> String {
        format!("{}-{}", self.prefix, token(destination))
    }

    /// The subjects of the streams of all destinations.
    pub(crate) fn all_subjects(&self) -> String {
        format!("{}.d.>", self.prefix)
    }

    /// The destination with that stream; `None` where the name does not tell.
    pub(crate) fn destination(&self, stream: &str) -> Option<Destination> {
        name_of(stream.strip_prefix(&self.prefix)?.strip_prefix('-')?).map(Destination::from)
    }

    /// The subject that messages of a destination are published to.
    pub(crate) fn subject(&self, destination: &Destination) -> String {
        format!("{}.d.{}.m", self.prefix, token(destination))
    }

    /// The subject that brings messages back to one group of the destination, and to no other.
    pub(crate) fn back(&self, destination: &Destination, group: &Group) -> String {
        format!("{}.d.{}.b.{}", self.prefix, token(destination), token(group))
    }

    /// The subject where a message of the destination waits for its time: one for each, no group reads it.
    pub(crate) fn scheduled(&self, destination: &Destination) -> String {
        format!("{}.d.{}.s.{}", self.prefix, token(destination), uuid::Uuid::now_v7().simple())
    }

    /// The subjects of a destination's stream.
    pub(crate) fn subjects(&self, destination: &Destination) -> String {
        format!("{}.d.{}.>", self.prefix, token(destination))
    }

    /// The durable consumer of a group.
    pub(crate) fn consumer(group: &Group) -> String {
        token(group)
    }

    /// The stream of a group's own records: dead letters, failures, who works in order. `=g=` comes out of no name.
    pub(crate) fn records(&self, destination: &Destination, group: &Group) -> String {
        format!("{}-{}=g={}", self.prefix, token(destination), token(group))
    }

    /// What the subjects of a group's records begin with.
    pub(crate) fn record(&self, destination: &Destination, group: &Group) -> String {
        format!("{}.g.{}.{}", self.prefix, token(destination), token(group))
    }

    /// The subject of a mark among a group's records: up to where a reader has to come.
    pub(crate) fn mark(&self, destination: &Destination, group: &Group) -> String {
        format!("{}.m.{}", self.record(destination, group), uuid::Uuid::now_v7().simple())
    }

    /// The subjects of the records of all groups of a destination.
    pub(crate) fn all_records(&self, destination: &Destination) -> String {
        format!("{}.g.{}.>", self.prefix, token(destination))
    }
}

/// Injective: letters, digits, `-` and `_` stay, every other byte is `=` and two hexadecimal digits.
fn token(name: &str) -> String {
    let text = naming::escape(name, "=", |byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
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
        let names =
            ["orders", "orders.a", "orders=2ea", "orders-a", "orders_a", "Orders", ".", "*", ">", "a b", "ключ", "a/b"]
                .into_iter()
                .map(str::to_owned)
                .chain([long.clone(), format!("{long}y")]);
        let all = Names::new("anybroker");
        let mut streams = HashSet::new();
        for name in names {
            let stream = all.stream(&name.as_str().into());
            assert!(stream.len() < 255 && !stream.contains(['.', '*', '>', ' ', '/', '\\']), "{stream}");
            let told = all.destination(&stream);
            assert!(told.is_some_and(|told| told == *name) || stream.contains("=h"), "{name}");
            assert!(streams.insert(stream), "{name}");
        }
    }

    #[test]
    fn the_records_of_two_groups_lie_apart() {
        let all = Names::new("anybroker");
        let pairs = [("a", "b"), ("a=g=b", "c"), ("a", "b=g=c"), ("a-b", "c"), ("a", "b-c")];
        let streams: HashSet<String> = pairs.iter().map(|(d, g)| all.records(&(*d).into(), &(*g).into())).collect();
        assert_eq!(streams.len(), pairs.len());
        assert!(pairs.iter().all(|(d, _)| !streams.contains(&all.stream(&(*d).into()))));
        assert!(streams.iter().all(|records| all.destination(records).is_none()));
    }
}
