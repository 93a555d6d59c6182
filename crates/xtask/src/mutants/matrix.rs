//! Which mutants were killed, by which case, and what it said: kept in the repository.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::patch::{FOLDER, Patch};

/// What a case says beyond that is cut.
const LONGEST: usize = 200;

/// See the module's documentation.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Matrix {
    mutants: Vec<Entry>,
}

/// What was found of one mutant.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    adapter: String,
    name: String,
    breaks: String,
    killed_by: String,
    /// The case has failed, and said what it should.
    pub(super) killed: bool,
    /// What the case said.
    pub(super) verdict: String,
    server: String,
    /// Of the tree that it was run in.
    revision: String,
    /// Of the patch, as Git calls it.
    blob: String,
}

impl Entry {
    pub(super) fn new(patch: &Patch, outcome: &str, found: &str, server: &str, revision: &str) -> Self {
        let killed = outcome == "fail" && found.contains(&patch.says);
        let said = found.split_whitespace().collect::<Vec<_>>().join(" ");
        // What was expected to be said may stand further behind: it is shown.
        let begin = said.find(&patch.says).filter(|place| *place > LONGEST / 2).unwrap_or(0);
        let mut verdict: String = said[begin..].chars().take(LONGEST).collect();
        if !killed {
            verdict = format!("{outcome}: {verdict}");
        }
        Self {
            adapter: patch.adapter.clone(),
            name: patch.stem.clone(),
            breaks: patch.breaks.clone(),
            killed_by: patch.killed_by.clone(),
            killed,
            verdict,
            server: server.to_owned(),
            revision: revision.to_owned(),
            blob: patch.blob.clone(),
        }
    }

    pub(super) fn outcome(&self) -> &'static str {
        if self.killed { "killed" } else { "SURVIVED" }
    }
}

fn file() -> PathBuf {
    PathBuf::from(FOLDER).join("matrix.json")
}

impl Matrix {
    /// What was found before, of mutants that are still there.
    pub(super) fn read(all: &[Patch]) -> Result<Self> {
        let mut matrix: Self = match std::fs::read_to_string(file()) {
            Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is damaged", file().display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::default(),
            Err(error) => return Err(error.into()),
        };
        let is_there =
            |entry: &Entry| all.iter().any(|patch| patch.adapter == entry.adapter && patch.stem == entry.name);
        matrix.mutants.retain(is_there);
        Ok(matrix)
    }

    /// Whether this content was killed at this revision.
    pub(super) fn has_killed(&self, patch: &Patch, revision: &str) -> bool {
        self.mutants.iter().any(|entry| entry.killed && entry.blob == patch.blob && entry.revision == revision)
    }

    pub(super) fn put(&mut self, entry: Entry) {
        self.mutants.retain(|other| (&other.adapter, &other.name) != (&entry.adapter, &entry.name));
        self.mutants.push(entry);
        self.mutants.sort_by(|one, other| (&one.adapter, &one.name).cmp(&(&other.adapter, &other.name)));
    }

    pub(super) fn write(&self) -> Result<()> {
        Ok(std::fs::write(file(), format!("{:#}\n", serde_json::to_value(self)?))?)
    }
}
