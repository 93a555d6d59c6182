//! How events are named.

use std::fmt;

/// What is wrong with the name of an event type.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NamingProblem {
    /// It has fewer than three parts.
    TooShort,
    /// A part is empty, or holds something else than lower-case ASCII letters, digits, `-` and `_`, or does not begin
    /// with a letter.
    Part(String),
    /// Its verb is not in the past tense: it reads like a command. An event tells what has happened.
    Imperative(String),
}

impl fmt::Display for NamingProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected <domain>.<aggregate>.<past-tense-verb>, such as com.example.order.created: ")?;
        match self {
            Self::TooShort => f.write_str("it has fewer than three parts"),
            Self::Part(part) => {
                write!(f, "the part `{part}` does not consist of lower-case letters, digits, - and _")
            }
            Self::Imperative(verb) => {
                write!(f, "`{verb}` reads like a command; an event tells what has happened")
            }
        }
    }
}

impl std::error::Error for NamingProblem {}

/// Checks that an event type is named `<domain>.<aggregate>.<past-tense-verb>`. A version may follow (`.v2`), for
/// two versions that are published side by side. The verb may have several words (`payment-failed`,
/// `checked_out`), one of which is in the past tense.
///
/// It is a lint for English: words in `-ed` and the usual irregular verbs pass.
///
/// # Errors
/// The first problem.
///
/// ```
/// use anybroker_events::{NamingProblem, check_event_type};
/// assert!(check_event_type("com.example.order.created").is_ok());
/// assert!(check_event_type("com.example.order.created.v2").is_ok());
/// assert_eq!(check_event_type("com.example.order.create"), Err(NamingProblem::Imperative("create".into())));
/// assert_eq!(check_event_type("order.created"), Err(NamingProblem::TooShort));
/// ```
pub fn check_event_type(event_type: &str) -> Result<(), NamingProblem> {
    let mut parts: Vec<&str> = event_type.split('.').collect();
    if parts.last().is_some_and(|part| is_version(part)) {
        parts.pop();
    }
    if let Some(part) = parts.iter().find(|part| !is_part(part)) {
        return Err(NamingProblem::Part((*part).to_owned()));
    }
    match parts.as_slice() {
        [_, _, .., verb] if verb.split(['-', '_']).any(is_past) => Ok(()),
        [_, _, .., verb] => Err(NamingProblem::Imperative((*verb).to_owned())),
        _ => Err(NamingProblem::TooShort),
    }
}

fn is_version(part: &str) -> bool {
    part.strip_prefix('v').is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

fn is_part(part: &str) -> bool {
    part.starts_with(|first: char| first.is_ascii_lowercase())
        && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte))
}

/// Past tense that does not end in `-ed`.
const IRREGULAR: &[&str] = &[
    "become",
    "begun",
    "bound",
    "bought",
    "broken",
    "brought",
    "built",
    "caught",
    "chosen",
    "cut",
    "done",
    "drawn",
    "driven",
    "fallen",
    "fed",
    "forgotten",
    "found",
    "frozen",
    "given",
    "gone",
    "grown",
    "held",
    "hidden",
    "hit",
    "kept",
    "known",
    "laid",
    "led",
    "left",
    "lent",
    "lost",
    "made",
    "met",
    "overdrawn",
    "overridden",
    "paid",
    "prepaid",
    "put",
    "quit",
    "read",
    "rebuilt",
    "redone",
    "repaid",
    "resent",
    "reset",
    "resold",
    "rewritten",
    "run",
    "seen",
    "sent",
    "set",
    "shown",
    "shut",
    "sold",
    "spent",
    "split",
    "spread",
    "stolen",
    "stood",
    "sunk",
    "taken",
    "thrown",
    "told",
    "torn",
    "undone",
    "upheld",
    "upset",
    "withdrawn",
    "withheld",
    "won",
    "woken",
    "written",
];

/// Words in `-ed` that are no past tense.
const NOT_PAST: &[&str] = &[
    "bleed", "breed", "embed", "exceed", "feed", "heed", "imbed", "need", "proceed", "seed", "shred", "sled", "speed",
    "succeed", "wed", "weed",
];

fn is_past(word: &str) -> bool {
    IRREGULAR.contains(&word) || (word.len() > 3 && word.ends_with("ed") && !NOT_PAST.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_that_tell_what_happened_pass() {
        for name in [
            "com.example.order.created",
            "com.example.payment.completed",
            "shop.order.paid",
            "shop.cart.checked-out",
            "shop.order.payment_failed",
            "shop.stock.reserved.v3",
            "acme2.b2b.quote.withdrawn",
        ] {
            assert_eq!(check_event_type(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn commands_are_caught() {
        for name in [
            "com.example.order.create",
            "com.example.order.send",
            "shop.order.proceed",
            "shop.order.embed",
            "shop.cart.check-out",
            "shop.order.payment",
            "shop.created.order",
        ] {
            assert!(matches!(check_event_type(name), Err(NamingProblem::Imperative(_))), "{name}");
        }
    }

    #[test]
    fn malformed_names_are_caught() {
        for name in ["", "created", "order.created", "order.created.v2"] {
            let problem = check_event_type(name).expect_err(name);
            assert!(matches!(problem, NamingProblem::TooShort | NamingProblem::Part(_)), "{name}");
        }
        for name in ["com..order.created", "com.example.Order.created", "com.example.order.created ", "a.b.c d.set"] {
            assert!(matches!(check_event_type(name), Err(NamingProblem::Part(_))), "{name}");
        }
    }
}
