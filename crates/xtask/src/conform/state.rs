//! What a folder of reports holds of a run: which revision it is of, and which modes are done.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::child::output_of;

/// The folder of a run.
#[derive(Debug)]
pub(super) struct State {
    folder: PathBuf,
    pub(super) run: Run,
}

/// What all reports of one folder have in common; kept in `run.json`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    /// The commit, and whether there were changes beyond it.
    pub(super) revision: String,
    pub(super) level: String,
    pub(super) cases: Vec<String>,
}

impl State {
    /// Begins a run, or goes on with one: reports of other revisions or other cases are not mixed with this one's.
    pub(super) fn begin(folder: &Path, resume: bool, level: &str, cases: &[String]) -> Result<Self> {
        let run = Run { revision: revision()?, level: level.to_owned(), cases: cases.to_vec() };
        Self::begin_as(folder, resume, run)
    }

    fn begin_as(folder: &Path, resume: bool, run: Run) -> Result<Self> {
        let (file, modes) = (folder.join("run.json"), folder.join("modes"));
        let earlier = match std::fs::read_to_string(&file) {
            Ok(text) => {
                Some(serde_json::from_str::<Run>(&text).with_context(|| format!("{} is damaged", file.display()))?)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("could not read {}", file.display())),
        };
        match earlier {
            Some(earlier) if resume => {
                ensure!(
                    earlier == run,
                    "{} holds a run of {} (level {}, cases {:?}), and this one is of {} (level {}, cases {:?}): run it without \
                     --resume",
                    folder.display(),
                    earlier.revision,
                    earlier.level,
                    earlier.cases,
                    run.revision,
                    run.level,
                    run.cases
                );
            }
            Some(_) if modes.is_dir() => std::fs::remove_dir_all(&modes)?,
            Some(_) => {}
            // Only what a run has left behind is deleted, so a folder of something else must not be taken for one.
            None if folder.is_dir() && std::fs::read_dir(folder)?.next().is_some() => {
                bail!("{} holds something else than the reports of a run", folder.display())
            }
            None => {}
        }
        std::fs::create_dir_all(&modes)?;
        std::fs::write(&file, format!("{:#}\n", serde_json::to_value(&run)?))?;
        Ok(Self { folder: folder.to_owned(), run })
    }

    pub(super) fn folder_of(&self, mode: &str) -> PathBuf {
        self.folder.join("modes").join(mode)
    }

    pub(super) fn report_of(&self, mode: &str) -> PathBuf {
        self.folder_of(mode).join("report.json")
    }

    /// Whether the mode ran to its end: its report is written last.
    pub(super) fn has(&self, mode: &str) -> bool {
        self.report_of(mode).is_file()
    }
}

/// The commit, and whether there are changes beyond it.
pub(crate) fn revision() -> Result<String> {
    let commit = output_of(Command::new("git").args(["rev-parse", "--short=12", "HEAD"]))?;
    let changed = output_of(Command::new("git").args(["status", "--porcelain"]))?;
    Ok(format!("{}{}", commit.trim(), if changed.is_empty() { "" } else { " with changes" }))
}

/// `name version` of packages in a lock file, separated by commas.
pub(super) fn versions(lock: &Path, packages: &[&str]) -> Result<String> {
    let text = std::fs::read_to_string(lock).with_context(|| format!("could not read {}", lock.display()))?;
    let version_of = |package: &str| {
        let entry = text.split("[[package]]").find(|entry| entry.contains(&format!("\nname = \"{package}\"\n")))?;
        let version = entry.lines().find_map(|line| line.strip_prefix("version = "))?;
        Some(format!("{package} {}", version.trim_matches('"')))
    };
    let found: Option<Vec<String>> = packages.iter().map(|package| version_of(package)).collect();
    Ok(found.with_context(|| format!("not all of {packages:?} are in {}", lock.display()))?.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(revision: &str) -> Run {
        Run { revision: revision.to_owned(), level: "conformance".to_owned(), cases: Vec::new() }
    }

    fn finish(state: &State, mode: &str) {
        std::fs::create_dir_all(state.folder_of(mode)).unwrap();
        std::fs::write(state.report_of(mode), "{}").unwrap();
    }

    #[test]
    fn a_resumed_run_keeps_what_is_done_and_a_new_one_begins_from_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::begin_as(folder.path(), false, run("a")).unwrap();
        finish(&state, "memory");
        assert!(State::begin_as(folder.path(), true, run("a")).unwrap().has("memory"));
        assert!(!State::begin_as(folder.path(), false, run("a")).unwrap().has("memory"));
    }

    #[test]
    fn reports_of_another_revision_are_not_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let state = State::begin_as(folder.path(), false, run("a")).unwrap();
        finish(&state, "memory");
        let refused = State::begin_as(folder.path(), true, run("b")).unwrap_err().to_string();
        assert!(refused.contains("without --resume"), "{refused}");
        assert!(state.has("memory"), "nothing is deleted");
    }

    #[test]
    fn a_folder_of_something_else_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("thesis.txt"), "dear").unwrap();
        assert!(State::begin_as(folder.path(), false, run("a")).is_err());
        assert!(folder.path().join("thesis.txt").is_file());
    }

    #[test]
    fn versions_are_read_from_the_lock_file() {
        let folder = tempfile::tempdir().unwrap();
        let lock = folder.path().join("Cargo.lock");
        std::fs::write(
            &lock,
            "[[package]]\nname = \"a-b\"\nversion = \"1.0.0\"\n\n[[package]]\nname = \"a\"\nversion = \"2.1.0\"\n",
        )
        .unwrap();
        assert_eq!(versions(&lock, &["a", "a-b"]).unwrap(), "a 2.1.0, a-b 1.0.0");
        assert_eq!(versions(&lock, &[]).unwrap(), "");
        assert!(versions(&lock, &["b"]).is_err());
    }
}
