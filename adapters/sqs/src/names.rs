//! Logical names and those of queues and topics: letters, digits, dashes and underscores, at most 80 of them; FIFO ones end
//! in `.fifo`.

use anybroker_core::naming::{self, fnv1a};
use anybroker_core::{Destination, Group};

/// A queue's limit, suffixes included; a topic's is larger.
const LONGEST: usize = 80;
/// What is kept readable of a name that is too long; the rest is a hash.
const READABLE: usize = 36;
const DEAD_LETTERS: &str = "_dlq";
const RETRY: &str = "_retry";
const FIFO: &str = ".fifo";
/// The longest that comes behind a name: `_retry`, or `.fifo`.
const SUFFIX: usize = 6;

/// The names of one endpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    /// Destinations, and the queues of their groups, are FIFO ones.
    pub(crate) is_fifo: bool,
    /// A destination is a topic, and each group has a queue of its own; otherwise it is a queue with one group.
    pub(crate) has_topics: bool,
}

impl Names {
    /// The queue or topic that messages of a destination are published to.
    pub(crate) fn destination(self, destination: &Destination) -> String {
        self.main(short(escaped(destination)))
    }

    /// The queue that a group of a destination reads.
    pub(crate) fn queue(self, destination: &Destination, group: &Group) -> String {
        self.main(self.base(destination, group))
    }

    /// The queue of a group's dead letters: a standard one, because letters of a FIFO queue hide those behind them while
    /// they are read. `_dlq` cannot come out of a name: `l` is no hexadecimal digit.
    pub(crate) fn dead_letters(self, destination: &Destination, group: &Group) -> String {
        self.base(destination, group) + DEAD_LETTERS
    }

    /// The queue in which failed messages of a FIFO queue wait until their delay ends: a standard one.
    pub(crate) fn retry(self, destination: &Destination, group: &Group) -> String {
        self.base(destination, group) + RETRY
    }

    /// `_g` cannot come out of a name either.
    fn base(self, destination: &Destination, group: &Group) -> String {
        match self.has_topics {
            true => short(format!("{}_g{}", escaped(destination), escaped(group))),
            false => short(escaped(destination)),
        }
    }

    fn main(self, base: String) -> String {
        if self.is_fifo { base + FIFO } else { base }
    }
}

/// Hashed where it is too long with its suffixes.
fn short(name: String) -> String {
    if name.len() + SUFFIX <= LONGEST {
        return name;
    }
    naming::shorten(&name, "_", READABLE, &name)
}

/// A text of letters, digits, dashes and underscores; also for the values of tags. Injective: letters, digits and dashes
/// stay, every other byte is written as `_` and two hexadecimal digits.
pub(crate) fn escaped(name: &str) -> String {
    naming::escape(name, "_", |byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// The name that [`escaped`] made this text of; `None` where it made none.
pub(crate) fn unescaped(text: &str) -> Option<String> {
    naming::unescape(text, "_")
}

/// The message group of a key. SQS takes up to 128 letters, digits and punctuation marks: keys that are such texts stay as
/// they are, so that foreign readers see them; others are hashed, and two that shared a hash would only wait for
/// one another.
pub(crate) fn message_group(key: &[u8]) -> String {
    let is_plain = !key.is_empty() && key.len() <= 128 && key.iter().all(u8::is_ascii_graphic);
    match std::str::from_utf8(key) {
        Ok(text) if is_plain && !text.starts_with(OWN_GROUP) => text.to_owned(),
        _ => format!("{OWN_GROUP}h{:032x}", fnv1a(key)),
    }
}

/// The message group of a message without a key, which has no order: one of its own.
pub(crate) fn lone_group(id: &[u8]) -> String {
    format!("{OWN_GROUP}i{:032x}", fnv1a(id))
}

/// The message group of everything, where a destination is in total order.
pub(crate) const ONE_GROUP: &str = "anybroker.all";
const OWN_GROUP: &str = "anybroker.";

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_stay_apart_and_legal() {
        let long = "x".repeat(90);
        let names = ["orders", "orders.created", "orders_created", "orders-created", "orders_2ecreated", "ключ", "a b"]
            .map(str::to_owned)
            .into_iter()
            .chain([long.clone(), format!("{long}y"), "orders_dlq".to_owned(), "orders_retry".to_owned()]);
        let names: Vec<String> = names.collect();
        for has_topics in [false, true] {
            for is_fifo in [false, true] {
                let all = Names { is_fifo, has_topics };
                let mut queues = HashSet::new();
                let groups: &[&str] = if has_topics { &["g", "x_gg", "g.h", &long] } else { &["g"] };
                for name in &names {
                    let destination = Destination::from(name.clone());
                    assert_eq!(unescaped(&escaped(name)).as_ref(), Some(name));
                    for group in groups {
                        let group = Group::from(*group);
                        assert!(queues.insert(all.queue(&destination, &group)), "{name} {group}");
                        assert!(queues.insert(all.dead_letters(&destination, &group)), "{name} {group}");
                        assert!(queues.insert(all.retry(&destination, &group)), "{name} {group}");
                    }
                }
                for queue in queues {
                    assert!(queue.len() <= LONGEST, "{queue}");
                    let stem = queue.strip_suffix(FIFO).unwrap_or(&queue);
                    assert!(stem.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)), "{queue}");
                }
            }
        }
    }

    #[test]
    fn message_groups_are_legal_and_keys_that_fit_stay_readable() {
        assert_eq!(message_group(b"order-17"), "order-17");
        let long = [b'x'; 129];
        let keys: [&[u8]; 7] = [b"", b"a b", b"\xff", "ключ".as_bytes(), &long, b"anybroker.all", b"anybroker.x"];
        let groups: HashSet<String> = keys.iter().map(|key| message_group(key)).collect();
        assert_eq!(groups.len(), keys.len());
        assert!(groups.iter().all(|group| group.len() <= 128 && group.bytes().all(|byte| byte.is_ascii_graphic())));
        assert!(!groups.contains(ONE_GROUP));
    }
}
