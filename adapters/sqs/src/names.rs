//! Logical names and those of queues: letters, digits, dashes and underscores, at most 80 of them.

use std::fmt::Write;

use anybroker_core::Destination;

/// SQS's limit, suffix included.
const LONGEST: usize = 80;
/// What is kept readable of a name that is too long; the rest is a hash.
const READABLE: usize = 36;
const DEAD_LETTERS: &str = "_dlq";

/// The queue of a destination. Injective: letters, digits and dashes stay, every other byte is written as `_` and two
/// hexadecimal digits.
pub(crate) fn queue(destination: &Destination) -> String {
    let name = escaped(destination);
    // Room for the suffix of the dead letters, so that both names are hashed or neither.
    if name.len() + DEAD_LETTERS.len() <= LONGEST {
        return name;
    }
    // Everything in it is ASCII. `h` is no hexadecimal digit: no escaped name looks like this.
    format!("{}_h{:032x}", &name[..READABLE], fnv1a(name.as_bytes()))
}

/// The queue of a destination's dead letters. `_dlq` cannot come out of [`queue`]: `l` is no hexadecimal digit.
pub(crate) fn dead_letters(destination: &Destination) -> String {
    queue(destination) + DEAD_LETTERS
}

/// A text of letters, digits, dashes and underscores; also for the values of tags.
pub(crate) fn escaped(name: &str) -> String {
    let mut text = String::with_capacity(name.len() + 8);
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            text.push(char::from(byte));
        } else {
            write!(text, "_{byte:02x}").expect("writing to a string cannot fail");
        }
    }
    text
}

/// FNV-1a of 128 bits: not against an adversary, but far beyond chance for names.
fn fnv1a(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash: u128, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
    })
}

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
            .chain([long.clone(), format!("{long}y"), format!("{}_dlq", "orders")]);
        let names: Vec<String> = names.collect();
        let queue = |name: &String| queue(&Destination::from(name.clone()));
        let letters = |name: &String| dead_letters(&Destination::from(name.clone()));
        let queues: HashSet<String> = names.iter().map(queue).chain(names.iter().map(letters)).collect();
        assert_eq!(queues.len(), 2 * names.len());
        for queue in queues {
            assert!(queue.len() <= LONGEST, "{queue}");
            assert!(queue.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte)), "{queue}");
        }
    }
}
