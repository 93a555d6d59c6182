//! The cases, by theme.

pub(crate) mod refusals;

mod answers;
mod at_rest;
mod burials;
mod cluster;
#[cfg(test)]
mod cluster_tests;
mod connections;
mod dead_letter;
mod delivery;
mod faults;
mod flow;
mod frozen;
mod groups;
mod idempotency;
mod lease;
mod lifecycle;
mod limits;
mod long;
mod modest;
mod native;
mod ordering;
mod processes;
mod processing;
mod publish;
mod random;
mod redelivery;
mod redrives;
mod server;
mod settle;
mod shapes;
mod sharing;
mod time;
mod topology;
mod transactions;

use std::sync::LazyLock;

use crate::Case;

/// The themes, in the order of the report.
const THEMES: &[&[Case]] = &[
    delivery::CASES,
    ordering::CASES,
    sharing::CASES,
    settle::CASES,
    redelivery::CASES,
    groups::CASES,
    dead_letter::CASES,
    redrives::CASES,
    idempotency::CASES,
    lifecycle::CASES,
    shapes::CASES,
    limits::CASES,
    flow::CASES,
    lease::CASES,
    time::CASES,
    publish::CASES,
    topology::CASES,
    modest::CASES,
    native::CASES,
    transactions::CASES,
    random::CASES,
    faults::CASES,
    burials::CASES,
    answers::CASES,
    connections::CASES,
    processing::CASES,
    server::CASES,
    frozen::CASES,
    at_rest::CASES,
    processes::CASES,
    long::CASES,
    cluster::CASES,
];

static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| THEMES.concat());

/// Every case there is.
#[must_use]
pub fn cases() -> &'static [Case] {
    &CASES
}

pub(crate) use modest::is_claimed;

/// A case of the first level.
macro_rules! case {
    ($name:literal, [$($need:expr),* $(,)?], $proves:literal, $run:path) => {
        $crate::Case {
            name: $name,
            level: $crate::Level::Conformance,
            proves: $proves,
            needs: &[$($need),*],
            alone: false,
            run: |env| Box::pin($run(env)),
        }
    };
}

use case;
