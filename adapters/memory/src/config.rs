//! Settings.

use std::ops::RangeInclusive;
use std::time::Duration;

use anybroker_core::config::{EndpointUrl, Field, Problem, Section};

use crate::profile::{self, Profile};

/// The settings of the section `memory`.
pub(crate) const FIELDS: &[Field] = &[
    Field::integer(
        "max_messages",
        "Messages a destination keeps for its groups, dead letters included; when it is full, publishers wait.",
        1,
        i64::MAX,
        "10000000",
    ),
    Field::integer("max_payload", "Bytes of the largest payload.", 1, i64::MAX, "16777216"),
    Field::integer(
        "retention",
        "Messages a destination keeps for replay after all its groups have settled them.",
        0,
        i64::MAX,
        "10000",
    ),
    Field::bool("create_destinations", "Whether publishing to a missing destination creates it.", "true"),
    Field::duration(
        "dedup_window",
        "How long an id is remembered, so that publishing it again stores nothing; 0s for not at all.",
        "0s",
    ),
    Field::choice(
        "profile",
        "Whose habits the broker takes on: what is awkward about each, declared in its capability record.",
        profile::WORDS,
        "exact",
    ),
    Field::integer("seed", "What a profile does at random; with 0 nothing goes wrong by itself.", 0, i64::MAX, "0"),
    Field::integer(
        "disturb_every",
        "With a seed: after about how many receives that brought something a profile lets something go wrong.",
        1,
        1_000_000,
        "150",
    ),
];

/// The settings of a memory broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) max_messages: usize,
    pub(crate) max_payload: u64,
    pub(crate) retention: usize,
    pub(crate) create_destinations: bool,
    pub(crate) dedup_window: Duration,
    pub(crate) profile: Profile,
    pub(crate) seed: u64,
    pub(crate) disturb_every: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_messages: 10_000_000,
            max_payload: 16 * 1024 * 1024,
            retention: 10_000,
            create_destinations: true,
            dedup_window: Duration::ZERO,
            profile: Profile::Exact,
            seed: 0,
            disturb_every: 150,
        }
    }
}

impl Settings {
    /// From checked settings.
    pub(crate) fn from_section(section: &Section) -> Self {
        let size = |name| usize::try_from(section.integer(name)).unwrap_or(usize::MAX);
        Self {
            max_messages: size("max_messages"),
            max_payload: section.integer("max_payload").unsigned_abs(),
            retention: size("retention"),
            create_destinations: section.bool("create_destinations"),
            dedup_window: section.duration("dedup_window"),
            profile: Profile::from_word(section.text("profile")),
            seed: section.integer("seed").unsigned_abs(),
            disturb_every: section.integer("disturb_every").unsigned_abs(),
        }
        .in_profile()
    }

    /// How many receives that bring something there are before the next disturbance: from two thirds to four thirds of
    /// the setting.
    pub(crate) fn undisturbed(&self) -> RangeInclusive<u64> {
        let third = self.disturb_every / 3;
        self.disturb_every - third..=self.disturb_every + third
    }

    /// The settings that a profile brings along where they are not set.
    pub(crate) fn in_profile(mut self) -> Self {
        if self.profile == Profile::JetStream && self.dedup_window.is_zero() {
            self.dedup_window = Duration::from_secs(120);
        }
        self
    }
}

/// The name in `memory://name`; `None` for a private broker.
pub(crate) fn name(url: &EndpointUrl) -> Option<&str> {
    url.hosts().first().map(String::as_str)
}

/// What is wrong with the URL itself.
pub(crate) fn check(section: &Section) -> Vec<Problem> {
    let url = section.url();
    let mut problems = Vec::new();
    let mut problem = |message: &str| {
        problems.push(Problem { key: "url".into(), origin: "url".into(), message: message.into() });
    };
    if url.hosts().len() > 1 {
        problem("expected memory:// or memory://name, found several names");
    }
    if !url.path().trim_start_matches('/').is_empty() {
        problem("expected memory:// or memory://name, found a path");
    }
    if url.username().is_some() || url.password().is_some() {
        problem("a memory broker has no users; leave the part before the @ out");
    }
    problems
}
