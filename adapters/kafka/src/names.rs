//! Logical names and Kafka's: topics hold only letters, digits, `.`, `_` and `-`, at most 249 of them.
//!
//! `a.b` and `a_b` cannot both exist, because Kafka's metric names turn dots into underscores and the broker refuses the
//! second one. So underscores are escaped like any other character that a topic cannot hold.

use anybroker_core::{Destination, Group, naming};

/// Kafka's limit (`org.apache.kafka.common.internals.Topic.MAX_NAME_LENGTH`).
const LONGEST: usize = 249;
/// What is kept readable of a name that is too long; the rest is a hash.
const READABLE: usize = 150;

/// The topic of a destination. Injective: names of letters, digits, dots and single dashes stay what they are; all
/// others have every other byte written as `--` and two hexadecimal digits.
pub(crate) fn topic(destination: &Destination) -> String {
    shortened(escaped(destination))
}

/// The topic that holds the dead letters of a group. `--dlq--` cannot come out of [`topic`]: `l` is no such digit.
pub(crate) fn dead_letters(destination: &Destination, group: &Group) -> String {
    shortened(format!("{}--dlq--{}", escaped(destination), escaped(group)))
}

/// The topic that holds what comes back to a group and to no other: failed messages and redriven letters.
pub(crate) fn retries(destination: &Destination, group: &Group) -> String {
    shortened(format!("{}--retry--{}", escaped(destination), escaped(group)))
}

/// The `group.id`. Kafka's group spans topics: one that read two would rebalance both when a member of one comes, could
/// not fix where it starts on the second, and could not be deleted for one of them. A topic holds no slash.
pub(crate) fn group(topic: &str, group: &Group) -> String {
    format!("{topic}/{group}")
}

/// The destination with that topic; `None` where the name does not tell.
pub(crate) fn destination(topic: &str) -> Option<Destination> {
    let found = naming::unescape(topic, "--").map(Destination::from)?;
    (self::topic(&found) == topic).then_some(found)
}

fn escaped(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.';
    let is_dots = name.bytes().all(|byte| byte == b'.');
    if !is_dots && !name.contains("--") && name.bytes().all(|byte| plain(byte) || byte == b'-') {
        return name.to_owned();
    }
    // `.` and `..` alone are no legal topics.
    naming::escape(name, "--", |byte| plain(byte) && !is_dots)
}

fn shortened(name: String) -> String {
    if name.len() <= LONGEST {
        return name;
    }
    naming::shorten(&name, "--", READABLE, &name)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_stay_apart_and_legal() {
        let long = "x".repeat(300);
        let names = [
            "orders",
            "orders.created",
            "orders_created",
            "orders-created",
            "orders--created",
            "orders--5fcreated",
            "Orders",
            ".",
            "..",
            "a b",
            "ключ",
            "a/b",
            &long,
            &format!("{long}y"),
        ];
        let topics: HashSet<String> = names.iter().map(|name| topic(&Destination::from(*name))).collect();
        assert_eq!(topics.len(), names.len());
        for topic in &topics {
            assert!(topic.len() <= LONGEST && topic != "." && topic != "..", "{topic}");
            assert!(topic.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte)), "{topic}");
            let told = destination(topic);
            assert!(told.is_some_and(|told| names.contains(&told.as_str())) || topic.contains("--h"), "{topic}");
        }
        assert_eq!(destination("foreign_topic"), None);
    }

    #[test]
    fn ordinary_names_are_kept() {
        assert_eq!(topic(&"orders.created-v1".into()), "orders.created-v1");
        assert_eq!(topic(&"my_topic".into()), "my--5ftopic");
    }

    #[test]
    fn dead_letters_of_two_groups_lie_apart() {
        let names = [("a", "b"), ("a--dlq--b", "c"), ("a", "b--dlq--c"), ("a.dlq", "b"), ("a", "dlq.b")];
        let topics: HashSet<String> = names
            .iter()
            .flat_map(|(d, g)| [dead_letters(&(*d).into(), &(*g).into()), retries(&(*d).into(), &(*g).into())])
            .collect();
        assert_eq!(topics.len(), names.len() * 2);
        assert!(topics.iter().all(|topic| destination(topic).is_none()));
    }
}
