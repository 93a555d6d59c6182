//! Cases as data, and what becomes of them.

use anybroker_core::{Error, SettleError};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::Need;
use crate::env::Env;

/// One promise of the contract, and how it is put to the test.
#[derive(Clone, Copy)]
pub struct Case {
    /// `theme/what-it-says`.
    pub name: &'static str,
    /// What it takes to run it.
    pub level: Level,
    /// The sentence of the contract.
    pub proves: &'static str,
    /// What the endpoint must give. Where it refuses one of them, that refusal is verified instead.
    pub needs: &'static [Need],
    /// Whether it disturbs others that run at the same time.
    pub(crate) alone: bool,
    pub(crate) run: for<'a> fn(&'a Env) -> BoxFuture<'a, Proof>,
}

impl Case {
    /// The part of the name before the slash.
    #[must_use]
    pub fn theme(&self) -> &'static str {
        self.name.split_once('/').map_or(self.name, |(theme, _)| theme)
    }

    /// Whether a pattern, in which `*` stands for anything, chooses it by its name.
    ///
    /// ```
    /// let case = anybroker_conformance::cases().iter().find(|case| case.is_chosen_by("faults/a-mixed-schedule-*"));
    /// assert_eq!(case.map(|case| case.theme()), Some("faults"));
    /// ```
    #[must_use]
    pub fn is_chosen_by(&self, pattern: &str) -> bool {
        matches(pattern, self.name)
    }
}

/// Whether `name` matches a pattern in which `*` stands for anything.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name.strip_prefix(head).is_some_and(|rest| {
            (0..=rest.len()).filter(|at| rest.is_char_boundary(*at)).any(|at| matches(tail, &rest[at..]))
        }),
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Case").field("name", &self.name).field("level", &self.level).finish_non_exhaustive()
    }
}

/// What it takes to run a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// A live endpoint, without faults.
    Conformance,
    /// Faults: killed processes, cut connections.
    Reliability,
    /// Minutes of time: windows, heartbeats and many leases outlived; clusters whose nodes go one by one. By hand, or nightly.
    #[serde(alias = "cluster")]
    Long,
}

/// What became of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The promise held.
    Pass,
    /// It did not.
    Fail,
    /// The endpoint refuses what the case needs, and the refusal is a typed one without side effect.
    RefusedAndVerified,
    /// The run did not bring about what was to be observed.
    Inconclusive,
    /// It was not run; the report says why.
    NotRun,
}

impl Outcome {
    /// The name as it is printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::RefusedAndVerified => "refused-and-verified",
            Self::Inconclusive => "INCONCLUSIVE",
            Self::NotRun => "not run",
        }
    }
}

/// What a case returns: nothing, or why the promise is not shown to hold.
pub(crate) type Proof<T = ()> = Result<T, Breach>;

/// Why a case does not pass.
#[derive(Debug, Clone)]
pub(crate) enum Breach {
    /// The promise is broken.
    Failed(String),
    /// What was to be observed did not happen.
    Inconclusive(String),
    /// The harness cannot do what it takes.
    NotRun(String),
}

impl From<Error> for Breach {
    fn from(error: Error) -> Self {
        Self::Failed(format!("unexpected error: {error:?}"))
    }
}

impl From<SettleError> for Breach {
    fn from(error: SettleError) -> Self {
        Error::from(error).into()
    }
}

/// Fails the case with a message.
macro_rules! fail {
    ($($message:tt)+) => { return Err($crate::case::Breach::Failed(format!($($message)+))) };
}

/// Fails the case unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            $crate::case::fail!($($message)+);
        }
    };
}

/// Fails the case unless both are equal.
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($message:tt)+) => {{
        let (found, expected) = (&$found, &$expected);
        if *found != *expected {
            $crate::case::fail!("{}: expected {expected:?}, found {found:?}", format!($($message)+));
        }
    }};
}

pub(crate) use {ensure, ensure_eq, fail};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        for (pattern, name, expected) in [
            ("redelivery/*", "redelivery/a", true),
            ("*/nack-*", "settle/nack-a", true),
            ("*", "a/b", true),
            ("a/b", "a/b", true),
            ("a/b", "a/bc", false),
            ("*b", "a/bc", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
