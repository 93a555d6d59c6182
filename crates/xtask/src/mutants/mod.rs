//! `cargo xtask mutants`: faults in the sources of real adapters, each of which a named case has to find on the live broker.

mod matrix;
mod patch;
mod tree;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Deserialize;

use crate::brokers::{self, How, PrivateInstance};
use crate::child::{self, cargo};
use crate::conform::modes::{MODES, Mode};
use crate::conform::{disturb, revision};
use crate::workspace;
use matrix::{Entry, Matrix};
use patch::Patch;
use tree::Tree;

const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
/// One case of one mutant, which may wait for what never comes.
const CASE_LIMIT: Duration = Duration::from_secs(10 * 60);
/// Break adapters on purpose, and see the conformance suite find it
///
/// Each file `conformance/mutants/ADAPTER/NAME.patch` is one fault in the sources of an adapter, with the case that has to
/// fail on it. All are applied in a copy of the tree below the target folder, each behind a switch, and built once. Then each is
/// switched on by itself, and its case is run; before that, an adapter has to pass the cases with all switches off. What was
/// found goes into conformance/mutants/matrix.json and the table of conformance/mutants/README.md.
#[derive(Debug, Args)]
pub(crate) struct Mutants {
    /// Only these, as ADAPTER/NAME or ADAPTER
    names: Vec<String>,
    /// Only print them
    #[arg(long)]
    list: bool,
    /// Leave out those that were killed at this revision already
    #[arg(long)]
    resume: bool,
    /// Where the brokers come from
    #[arg(long, value_enum, default_value = "auto")]
    how: How,
}

/// What `anybroker conform` writes, as far as it is of interest.
#[derive(Deserialize)]
struct Report {
    endpoint: Endpoint,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Endpoint {
    server: String,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    outcome: String,
    detail: String,
    #[serde(default)]
    anomalies: Vec<Anomaly>,
}

#[derive(Deserialize)]
struct Anomaly {
    name: String,
    detail: String,
}

impl Case {
    /// What it found, as one text.
    fn found(&self) -> String {
        let anomalies = self.anomalies.iter().map(|anomaly| format!("{}: {}", anomaly.name, anomaly.detail));
        std::iter::once(self.detail.clone())
            .chain(anomalies)
            .filter(|text| !text.is_empty())
            .collect::<Vec<_>>()
            .join("; ")
    }
}

/// An adapter's server, and how the suite is run on it.
struct Stage {
    mode: &'static Mode,
    url: String,
    /// How connections to it and its process are disturbed, in the cases about that.
    faults: Vec<String>,
}

/// The mutants that are run on it.
type Act<'a> = (&'a [&'a Patch], Stage);

/// The theme of those cases.
const FAULTS: &str = "faults/";
/// What happens in them.
const SEED: &str = "1";

impl Mutants {
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        let all = Patch::all()?;
        let revision = revision()?;
        let mut matrix = Matrix::read(&all)?;
        let mut chosen = self.chosen(&all)?;
        if self.list {
            chosen.iter().for_each(|patch| println!("{:60} {}", patch.name(), patch.killed_by));
            return Ok(());
        }
        if self.resume {
            chosen.retain(|patch| !matrix.has_killed(patch, &revision));
        }
        let folder = workspace::target()?.join("mutants");
        let tree = Tree::new(&folder, &all)?;
        let mut instance = PrivateInstance::new()?;
        let survivors = self.judge(&chosen, (&tree, &folder), &mut instance, &revision, &mut matrix)?;
        instance.down()?;
        let mut table = cargo(["test", "--package", "anybroker-conformance", "--test", "adapter_mutants"]);
        child::run(table.env("UPDATE", "1"), BUILD_LIMIT)?;
        ensure!(survivors.is_empty(), "not killed as they should be: {}", survivors.join(", "));
        Ok(())
    }

    fn chosen<'a>(&self, all: &'a [Patch]) -> Result<Vec<&'a Patch>> {
        let matches = |patch: &Patch, name: &str| patch.name() == name || patch.adapter == name;
        for name in &self.names {
            ensure!(all.iter().any(|patch| matches(patch, name)), "no mutant is called `{name}`; see --list");
        }
        let is_chosen = |patch: &&Patch| self.names.is_empty() || self.names.iter().any(|name| matches(patch, name));
        Ok(all.iter().filter(is_chosen).collect())
    }

    /// Runs them, and answers what is not killed.
    fn judge(
        &self,
        chosen: &[&Patch],
        (tree, folder): (&Tree, &Path),
        instance: &mut PrivateInstance,
        revision: &str,
        matrix: &mut Matrix,
    ) -> Result<Vec<String>> {
        if chosen.is_empty() {
            return Ok(Vec::new());
        }
        let mut chosen = chosen.to_vec();
        chosen.sort_by_key(|patch| (&patch.adapter, &patch.mode));
        let adapters: Vec<&[&Patch]> = chosen.chunk_by(|one, other| one.mode == other.mode).collect();
        let stages = self.stages(&adapters, instance)?;
        let acts: Vec<Act<'_>> = adapters.into_iter().zip(stages).collect();
        let command = build(tree, folder)?;
        // They wait for different servers.
        let survivors = Mutex::new(Vec::new());
        let matrix = Mutex::new(matrix);
        std::thread::scope(|scope| {
            let act = |(patches, stage): &Act<'_>| -> Result<()> {
                let reports = folder.join("reports").join(stage.mode.name);
                stage.control(&command, patches, &reports)?;
                for patch in *patches {
                    let report = stage.run(&command, Some(patch), &[&patch.killed_by], &reports.join(&patch.stem))?;
                    let case = report.cases.first().context("a report without a case")?;
                    let entry = Entry::new(patch, &case.outcome, &case.found(), &report.endpoint.server, revision);
                    println!("{:9} {:55} {}", entry.outcome(), patch.name(), entry.verdict);
                    if !entry.killed {
                        survivors.lock().expect("no thread panics with it").push(patch.name());
                    }
                    let mut matrix = matrix.lock().expect("no thread panics with it");
                    matrix.put(entry);
                    matrix.write()?;
                }
                Ok(())
            };
            // Those of one server after one another: a case may kill it.
            let servers: Vec<&[Act<'_>]> =
                acts.chunk_by(|(_, one), (_, other)| one.mode.broker == other.mode.broker).collect();
            let threads: Vec<_> =
                servers.into_iter().map(|acts| scope.spawn(move || acts.iter().try_for_each(act))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("a run that panics is a mistake here"))
        })?;
        Ok(survivors.into_inner().expect("no thread panics with it"))
    }

    fn stages(&self, adapters: &[&[&Patch]], instance: &mut PrivateInstance) -> Result<Vec<Stage>> {
        let mut stages = Vec::new();
        let mut names = Vec::new();
        for patches in adapters {
            let Patch { adapter, mode: name, .. } = patches[0];
            let mode = MODES.iter().find(|mode| mode.name == *name && mode.feature == Some(adapter));
            let mode = mode.with_context(|| format!("{adapter} has no mode `{name}` that mutants can be run in"))?;
            names.push(mode.broker.context("an adapter with a server")?.to_owned());
            stages.push((mode, String::new()));
        }
        let endpoints = instance.up(&brokers::recipes(&names)?, self.how)?;
        let stages = stages.into_iter().zip(&names).map(|((mode, _), name)| {
            let variable = brokers::url_variable(name);
            let server = endpoints.iter().find(|endpoint| endpoint.variable == variable);
            let server = server.context("a server that was started has an address")?;
            Ok(Stage {
                mode,
                url: mode.url(Some(&server.url_of_the_suite), ""),
                faults: disturb::arguments(instance, Some(name), false)?,
            })
        });
        stages.collect()
    }
}

impl Stage {
    /// Sees that all cases pass while no mutant is switched on: then it is the mutant that makes them fail.
    fn control(&self, command: &Path, patches: &[&Patch], folder: &Path) -> Result<()> {
        let mut cases: Vec<&str> = patches.iter().map(|patch| &*patch.killed_by).collect();
        cases.sort_unstable();
        cases.dedup();
        let (disturbed, calm): (Vec<&str>, Vec<&str>) = cases.iter().partition(|case| case.starts_with(FAULTS));
        for (cases, folder) in [(calm, folder.join("as-it-is")), (disturbed, folder.join("as-it-is-in-faults"))] {
            if cases.is_empty() {
                continue;
            }
            let report = self.run(command, None, &cases, &folder)?;
            ensure!(report.cases.len() == cases.len(), "of {cases:?} there are {}", report.cases.len());
            for case in &report.cases {
                let Case { name, outcome, detail, .. } = case;
                ensure!(outcome == "pass", "{} does not pass {name} as it is ({outcome}): {detail}", self.mode.name);
            }
        }
        println!("{:9} {:55} {} cases", "passes", self.mode.name, cases.len());
        Ok(())
    }

    /// Runs cases, and answers what was found; what that means is for the caller to judge.
    fn run(&self, command: &Path, mutant: Option<&Patch>, cases: &[&str], report: &Path) -> Result<Report> {
        if report.is_dir() {
            std::fs::remove_dir_all(report)?;
        }
        let pace = self.mode.pace;
        let mut run = Command::new(command);
        run.args(["conform", "--url", &self.url, "--name", self.mode.name, "--lease", pace.lease])
            .args(["--quiet", pace.quiet, "--patience", pace.patience, "--parallel", &pace.parallel.to_string()])
            .env_remove(tree::SWITCH)
            .arg("--report")
            .arg(report);
        for case in cases {
            run.args(["--case", case]);
        }
        if cases.iter().any(|case| case.starts_with(FAULTS)) {
            run.args(&self.faults).args(["--seed", SEED, "--shrink", "0"]);
        }
        if let Some(mutant) = mutant {
            run.env(tree::SWITCH, &mutant.stem);
        }
        std::fs::create_dir_all(report)?;
        let said = std::fs::File::create(report.join("output.txt"))?;
        run.stdout(said.try_clone()?).stderr(said);
        let status = child::wait(&mut run, CASE_LIMIT)?;
        let file = report.join("report.json");
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("{} wrote no report ({status}); see {}", self.mode.name, report.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not what was expected", file.display()))
    }
}

/// Builds the command in the copy of the tree, in a target folder of its own.
///
/// With all mutants, and all adapters, whichever are to be run: so it is built once.
fn build(tree: &Tree, folder: &Path) -> Result<PathBuf> {
    let mut features: Vec<&str> = MODES.iter().filter_map(|mode| mode.feature).collect();
    features.sort_unstable();
    features.dedup();
    let target = folder.join("build");
    let mut build = cargo(["build", "--quiet", "--package", "anybroker-cli", "--features", &features.join(",")]);
    build.current_dir(&tree.root).env("CARGO_TARGET_DIR", &target);
    child::run(&mut build, BUILD_LIMIT)?;
    Ok(target.join("debug").join("anybroker"))
}
