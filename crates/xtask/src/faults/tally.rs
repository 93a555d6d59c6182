//! What many seeds have shown, kept in the report's folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::conform::{Counts, revision};

/// A run with fewer messages is too small to count.
const MESSAGES: u64 = 2_000;

/// What is disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Connections, and the suite's own processes.
    Connections,
    /// The server.
    Server,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Connections, Self::Server];

    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Connections => "on connections",
            Self::Server => "on the server",
        }
    }

    pub(super) fn folder(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Server => "server",
        }
    }
}

/// One case with one seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    name: String,
    outcome: String,
    detail: String,
    counts: Counts,
}

impl Run {
    fn counts(&self) -> bool {
        let messages = self.counts.published_ok + self.counts.published_failed + self.counts.published_unknown;
        match self.outcome.as_str() {
            "pass" => messages >= MESSAGES && self.counts.faults_met > 0,
            "fail" => true,
            _ => false,
        }
    }
}

/// The part of a report that is of interest.
#[derive(Deserialize)]
struct Report {
    cases: Vec<Run>,
}

/// The runs of a report; those that were not run are left out.
pub(super) fn read(folder: &Path) -> Result<Vec<Run>> {
    let file = folder.join("report.json");
    let text = std::fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
    let report: Report = serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display()))?;
    Ok(report.cases.into_iter().filter(|run| run.outcome != "not_run").collect())
}

/// All seeds of a folder.
#[derive(Debug)]
pub(super) struct Tally {
    folder: PathBuf,
    kept: Kept,
}

/// What `runs.json` holds.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    broker: String,
    /// The commit, and whether there were changes beyond it.
    revision: String,
    first_seed: u64,
    on_connections: BTreeMap<u64, Vec<Run>>,
    on_server: BTreeMap<u64, Vec<Run>>,
}

impl Kept {
    fn seeds(&self, kind: Kind) -> &BTreeMap<u64, Vec<Run>> {
        match kind {
            Kind::Connections => &self.on_connections,
            Kind::Server => &self.on_server,
        }
    }
}

impl Tally {
    /// Begins, or goes on: seeds of another revision are not mixed with these.
    pub(super) fn begin(folder: &Path, broker: &str, seed: u64, resume: bool) -> Result<Self> {
        Self::begin_as(folder, broker, &revision()?, seed, resume)
    }

    fn begin_as(folder: &Path, broker: &str, revision: &str, seed: u64, resume: bool) -> Result<Self> {
        let file = folder.join("runs.json");
        let fresh = Kept {
            broker: broker.into(),
            revision: revision.into(),
            first_seed: seed,
            on_connections: BTreeMap::new(),
            on_server: BTreeMap::new(),
        };
        let kept = match std::fs::read_to_string(&file) {
            Ok(text) if resume => {
                let kept: Kept =
                    serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display()))?;
                let is_same = kept.broker == broker && kept.revision == revision;
                ensure!(
                    is_same,
                    "{} holds runs of {} at {}, and this is {broker} at {revision}: run it without --resume",
                    folder.display(),
                    kept.broker,
                    kept.revision
                );
                kept
            }
            Ok(_) => {
                let seeds = folder.join("seeds");
                if seeds.is_dir() {
                    std::fs::remove_dir_all(seeds)?;
                }
                fresh
            }
            // Only what a run has left behind is written over.
            Err(_) if folder.is_dir() && std::fs::read_dir(folder)?.next().is_some() => {
                bail!("{} holds something else than fault runs", folder.display())
            }
            Err(_) => fresh,
        };
        std::fs::create_dir_all(folder)?;
        let tally = Self { folder: folder.to_owned(), kept };
        tally.write()?;
        Ok(tally)
    }

    pub(super) fn next_seed(&self, kind: Kind) -> u64 {
        self.kept.seeds(kind).keys().next_back().map_or(self.kept.first_seed, |last| last + 1)
    }

    pub(super) fn add(&mut self, kind: Kind, seed: u64, runs: Vec<Run>) -> Result<()> {
        let seeds = match kind {
            Kind::Connections => &mut self.kept.on_connections,
            Kind::Server => &mut self.kept.on_server,
        };
        seeds.insert(seed, runs);
        self.write()
    }

    /// How many runs of a kind count.
    pub(super) fn counted(&self, kind: Kind) -> usize {
        self.runs_of(kind).filter(|(_, run)| run.counts()).count()
    }

    /// How many seeds of a kind there are.
    pub(super) fn seeds(&self, kind: Kind) -> usize {
        self.kept.seeds(kind).len()
    }

    /// The cases of which some run of a kind counts.
    pub(super) fn counting(&self, kind: Kind) -> Vec<String> {
        let names: BTreeSet<&str> =
            self.runs_of(kind).filter(|(_, run)| run.counts()).map(|(_, run)| run.name.as_str()).collect();
        names.into_iter().map(str::to_owned).collect()
    }

    /// Those that failed, with their seeds.
    pub(super) fn failed(&self) -> Vec<String> {
        self.runs()
            .filter(|(_, run)| run.outcome == "fail")
            .map(|(seed, run)| format!("{} (seed {seed})", run.name))
            .collect()
    }

    /// What there is behind a seed of a kind.
    pub(super) fn line(&self, kind: Kind) -> String {
        let last = self.next_seed(kind).saturating_sub(1);
        let [connections, server] = Kind::ALL.map(|kind| self.counted(kind));
        format!(
            "{}: seed {last} {}: {connections} runs on connections and {server} on the server count, {} failed",
            self.kept.broker,
            kind.words(),
            self.failed().len()
        )
    }

    fn runs_of(&self, kind: Kind) -> impl Iterator<Item = (u64, &Run)> {
        self.kept.seeds(kind).iter().flat_map(|(seed, runs)| runs.iter().map(|run| (*seed, run)))
    }

    fn runs(&self) -> impl Iterator<Item = (u64, &Run)> {
        Kind::ALL.into_iter().flat_map(|kind| self.runs_of(kind))
    }

    /// How many seeds and runs of a kind there are, in words.
    fn share(&self, kind: Kind) -> String {
        let seeds = self.kept.seeds(kind);
        match (seeds.keys().next(), seeds.keys().next_back()) {
            (Some(first), Some(last)) => {
                format!("{} {} (seeds {first} to {last})", self.counted(kind), kind.words())
            }
            _ => format!("none {}", kind.words()),
        }
    }

    /// The summary, in Markdown.
    pub(super) fn text(&self) -> String {
        let mut cases: BTreeMap<&str, (u64, u64, u64, u64, Counts)> = BTreeMap::new();
        for (_, run) in self.runs() {
            let (counted, failed, inconclusive, small, sum) = cases.entry(&run.name).or_default();
            *counted += u64::from(run.counts());
            *failed += u64::from(run.outcome == "fail");
            *inconclusive += u64::from(run.outcome == "inconclusive");
            *small += u64::from(run.outcome == "pass" && !run.counts());
            *sum += run.counts;
        }
        let Kept { broker, revision, .. } = &self.kept;
        let [connections, server] = Kind::ALL.map(|kind| self.share(kind));
        let mut text = format!(
            "# Fault runs on {broker}\n\n`cargo xtask faults {broker}` at {revision}: {} runs that count, {connections} and {server}; {} failed.\n\n",
            Kind::ALL.into_iter().map(|kind| self.counted(kind)).sum::<usize>(),
            self.failed().len()
        );
        text += "A run is one case with one seed; it counts with at least 2,000 messages and a fault that met an operation in \
                 flight.\nPublished, delivered, duplicates and faults are sums over all \
                 runs. Recovery: from the end of a fault until a client that it hit published or received again.\n\n";
        text += "| case | count | failed | inconclusive | too small | published ok / failed / unknown | delivered | duplicates justified / \
                 not | faults / met | longest recovery, s |\n|---|---|---|---|---|---|---|---|---|---|\n";
        for (name, (counted, failed, inconclusive, small, sum)) in cases {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "| {name} | {counted} | {failed} | {inconclusive} | {small} | {} / {} / {} | {} | {} / {} | {} / {} | {} |",
                sum.published_ok,
                sum.published_failed,
                sum.published_unknown,
                sum.delivered,
                sum.duplicates_justified,
                sum.duplicates_unjustified,
                sum.faults,
                sum.faults_met,
                sum.recovery()
            );
        }
        let failed: Vec<_> = self.runs().filter(|(_, run)| run.outcome == "fail").collect();
        if !failed.is_empty() {
            text += "\nFailed:\n\n";
            for (seed, run) in failed {
                let detail: String = run.detail.chars().take(200).collect();
                let _ = writeln!(text, "- seed {seed}, {}: {detail}", run.name);
            }
        }
        text
    }

    fn write(&self) -> Result<()> {
        // Written beside and renamed, so that an interruption leaves the earlier one.
        let (file, new) = (self.folder.join("runs.json"), self.folder.join("runs.json.new"));
        std::fs::write(&new, format!("{}\n", serde_json::to_string(&self.kept)?))?;
        std::fs::rename(&new, &file)?;
        std::fs::write(self.folder.join("summary.md"), self.text())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(outcome: &str, published_ok: u64, faults_met: u64) -> Run {
        let counts = Counts { published_ok, faults_met, ..Counts::default() };
        Run { name: "faults/x".into(), outcome: outcome.into(), detail: "why".into(), counts }
    }

    #[test]
    fn a_run_that_no_fault_met_or_that_was_small_does_not_count_and_a_failure_always_does() {
        for (run, expected) in [
            (run("pass", 2_000, 1), true),
            (run("pass", 1_999, 1), false),
            (run("pass", 2_000, 0), false),
            (run("inconclusive", 2_000, 1), false),
            (run("fail", 10, 0), true),
        ] {
            assert_eq!(run.counts(), expected, "{run:?}");
        }
    }

    #[test]
    fn a_resumed_tally_goes_on_behind_its_last_seed_and_only_at_the_same_revision() {
        let folder = tempfile::tempdir().unwrap();
        let mut tally = Tally::begin_as(folder.path(), "nats", "a", 7, false).unwrap();
        assert_eq!(tally.next_seed(Kind::Server), 7);
        tally.add(Kind::Connections, 7, vec![run("pass", 2_000, 1), run("fail", 2_000, 1)]).unwrap();
        let resumed = Tally::begin_as(folder.path(), "nats", "a", 7, true).unwrap();
        assert_eq!(Kind::ALL.map(|kind| (resumed.next_seed(kind), resumed.counted(kind))), [(8, 2), (7, 0)]);
        assert_eq!(resumed.failed(), ["faults/x (seed 7)"]);
        assert_eq!(Kind::ALL.map(|kind| resumed.counting(kind)), [vec!["faults/x".to_owned()], vec![]]);
        assert!(resumed.text().contains("seed 7, faults/x: why"));
        assert!(Tally::begin_as(folder.path(), "nats", "b", 7, true).is_err());
        assert_eq!(Tally::begin_as(folder.path(), "nats", "b", 9, false).unwrap().counted(Kind::Connections), 0);
    }

    #[test]
    fn one_run_in_ten_is_on_the_server_and_neither_kind_waits_for_the_end_of_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let mut tally = Tally::begin_as(folder.path(), "nats", "a", 1, false).unwrap();
        let wanted = super::super::Wanted::of(200, true);
        let mut order = String::new();
        while let Some(kind) = wanted.next(&tally) {
            let (mark, many) = match kind {
                Kind::Connections => ('c', 9),
                Kind::Server => ('s', 5),
            };
            order.push(mark);
            tally.add(kind, tally.next_seed(kind), vec![run("pass", 2_000, 1); many]).unwrap();
        }
        assert_eq!(order, "scccccscccccscccccsccccc");
        assert_eq!(Kind::ALL.map(|kind| (tally.counted(kind), tally.seeds(kind))), [(180, 20), (20, 4)]);
        assert!(tally.text().contains(
            "200 runs that count, 180 on connections (seeds 1 to 20) and 20 on the server (seeds 1 to 4); 0"
        ));
        assert_eq!(super::super::Wanted::of(200, false), super::super::Wanted { on_connections: 200, on_server: 0 });
    }

    #[test]
    fn a_folder_of_something_else_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("thesis.txt"), "dear").unwrap();
        assert!(Tally::begin_as(folder.path(), "nats", "a", 1, false).is_err());
    }
}
