//! The settings of an endpoint.

use std::path::PathBuf;
use std::time::Duration;

use anybroker_core::config::{Field, Problem, Section};

/// The settings, as data: one list serves the URL, the file, the environment, the docs and the JSON Schema.
pub(crate) const FIELDS: &[Field] = &[
    Field::choice(
        "durability",
        "synced: every commit is on the disk before it is answered. grouped: commits are answered at once and synced \
         together every group_window; a power loss (not the kill of a process) may take the last window.",
        &["synced", "grouped"],
        "synced",
    ),
    Field::duration("group_window", "How often grouped commits are synced.", "50ms"),
    Field::duration("busy_timeout", "How long to wait for another process's lock on the file.", "10s"),
    Field::bool("create_destinations", "Whether publishing to a missing destination creates it.", "true"),
    Field::integer("max_payload", "Largest payload, in bytes.", 1, 512 << 20, "16777216"),
    Field::duration("retention", "How long settled messages are kept for replay.", "7d"),
    Field::integer(
        "retention_messages",
        "How many settled messages of a destination are kept for replay, at most.",
        0,
        i64::MAX,
        "100000",
    ),
    Field::integer(
        "max_file_size",
        "Publishes answer `unavailable` when the file would grow beyond this, in bytes; at least 1 MiB.",
        1 << 20,
        i64::MAX,
        "0",
    )
    .optional(),
    Field::integer(
        "buffer",
        "Bytes of published messages that may wait for their commit.",
        1 << 16,
        1 << 40,
        "67108864",
    ),
];

/// What `Ok` of a publish or settle is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Durability {
    /// On the disk: it survives a power loss.
    Synced,
    /// In the operating system's hands, and on the disk within the group window: it survives the kill of any
    /// process, and a power loss may take the last window.
    Grouped,
    /// Never synced. A power loss may destroy the file. Only there to prove that the test of the other two can fail.
    #[doc(hidden)]
    DangerUnsynced,
}

/// The settings of a broker that is opened by hand; a configured one takes them from URL, file and environment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settings {
    /// The file.
    pub path: PathBuf,
    /// What `Ok` is worth.
    pub durability: Durability,
    /// How often grouped commits are synced.
    pub group_window: Duration,
    /// How long to wait for another process's lock.
    pub busy_timeout: Duration,
    /// Whether publishing to a missing destination creates it.
    pub create_destinations: bool,
    /// Largest payload, in bytes.
    pub max_payload: u64,
    /// How long settled messages are kept for replay.
    pub retention: Duration,
    /// How many settled messages of a destination are kept for replay, at most.
    pub retention_messages: u64,
    /// How large the file may grow, in bytes.
    pub max_file_size: Option<u64>,
    /// Bytes of published messages that may wait for their commit.
    pub buffer: usize,
    /// How often a waiting receive looks by itself. Only there to prove that nothing hangs on it where the system
    /// notifies.
    #[doc(hidden)]
    pub look_every: Option<Duration>,
}

impl Settings {
    /// The defaults, for that file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            durability: Durability::Synced,
            group_window: Duration::from_millis(50),
            busy_timeout: Duration::from_secs(10),
            create_destinations: true,
            max_payload: 16 << 20,
            retention: Duration::from_secs(7 * 24 * 3600),
            retention_messages: 100_000,
            max_file_size: None,
            buffer: 64 << 20,
            look_every: None,
        }
    }

    pub(crate) fn from_section(section: &Section) -> Self {
        let whole = |field: &str| u64::try_from(section.integer(field)).unwrap_or(0);
        Self {
            path: PathBuf::from(section.url().path()),
            durability: if section.text("durability") == "grouped" { Durability::Grouped } else { Durability::Synced },
            group_window: section.duration("group_window"),
            busy_timeout: section.duration("busy_timeout"),
            create_destinations: section.bool("create_destinations"),
            max_payload: whole("max_payload"),
            retention: section.duration("retention"),
            retention_messages: whole("retention_messages"),
            max_file_size: section.optional_integer("max_file_size").and_then(|bytes| u64::try_from(bytes).ok()),
            buffer: usize::try_from(section.integer("buffer")).unwrap_or(usize::MAX),
            look_every: None,
        }
    }
}

/// What single fields cannot tell.
pub(crate) fn check(section: &Section) -> Vec<Problem> {
    let url = section.url();
    let mut problems = Vec::new();
    let mut refuse = |message: String| {
        problems.push(Problem { key: "url".into(), origin: "url".into(), message });
    };
    if !url.hosts().is_empty() {
        let host = url.hosts().join(",");
        refuse(format!(
            "expected an absolute path, embedded:///path/to/file.db (three slashes); found the host `{host}`"
        ));
    } else if url.path().is_empty() || url.path().ends_with('/') {
        refuse("expected an absolute path to a file, embedded:///path/to/file.db".into());
    }
    if url.username().is_some() || url.password().is_some() {
        refuse("a file needs no user; expected embedded:///path/to/file.db".into());
    }
    if section.duration("group_window").is_zero() {
        problems.push(Problem {
            key: "embedded.group_window".into(),
            origin: "settings".into(),
            message: "expected more than 0 s; durability=synced syncs every commit".into(),
        });
    }
    problems
}
