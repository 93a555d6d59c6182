//! `cargo xtask test`: everything that must hold before a change goes in.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::brokers::{self, Endpoint, How, PrivateInstance};
use crate::child::{self, cargo, output_of};
use crate::folders;
use crate::lanes::Tests;
use crate::report::{Report, Verdict};
use crate::tools;
use crate::workspace;

const TOOLS: &str = "tools";
const FORMAT: &str = "format";
const LINTS: &str = "lints";
const DOCUMENTATION: &str = "documentation";
const DEPENDENCIES: &str = "dependencies";
const LICENCES: &str = "licences";
const ADVISORIES: &str = "advisories";
const BROKERS_UP: &str = "brokers up";
const TESTS: &str = "tests";
const BROKERS_DOWN: &str = "brokers down";
const FIRST_COMMAND: &str = "first command";

/// In this order: what is quick to fail comes first.
const STEPS: &[&str] = &[
    TOOLS,
    FORMAT,
    LINTS,
    DOCUMENTATION,
    DEPENDENCIES,
    LICENCES,
    ADVISORIES,
    BROKERS_UP,
    TESTS,
    BROKERS_DOWN,
    FIRST_COMMAND,
];

/// No step of a healthy run comes near it, even from nothing on a small machine.
const STEP_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Client libraries and databases: only features may bring them in.
const OPTIONAL_CLIENTS: &[&str] = &[
    "rdkafka",
    "rdkafka-sys",
    "aws-sdk-",
    "aws-config",
    "lapin",
    "async-nats",
    "pulsar",
    "rusqlite",
    "libsqlite3-sys",
];

/// Before the block of README.md that a newcomer runs first.
const FIRST_COMMAND_MARKER: &str = "<!-- first-command -->";

/// Run every check that a change has to pass
#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Leave out real brokers and the fresh checkout
    #[arg(long)]
    fast: bool,
    /// Leave out real brokers only
    #[arg(long)]
    no_brokers: bool,
    /// Where the brokers come from
    #[arg(long, value_enum, default_value = "auto")]
    how: How,
}

impl Test {
    /// Does the steps up to the first that fails, and prints the table in any case.
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        let mut report = Report::new(STEPS);
        let result = self.steps(&mut report);
        println!("\n{}", report.table());
        result
    }

    fn steps(&self, report: &mut Report) -> Result<()> {
        report.step(TOOLS, || tools::provide(!self.fast && !self.no_brokers))?;
        report.step(FORMAT, || passes(cargo(["fmt", "--all", "--check"])))?;
        report.step(LINTS, || {
            passes(cargo(["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"]))
        })?;
        report.step(DOCUMENTATION, || {
            let mut doc = cargo(["doc", "--workspace", "--no-deps", "--all-features"]);
            doc.env("RUSTDOCFLAGS", "-D warnings");
            passes(doc)
        })?;
        report.step(DEPENDENCIES, dependencies)?;
        report.step(LICENCES, licences)?;
        report.step(ADVISORIES, advisories)?;
        self.tests(report)?;
        report.step(FIRST_COMMAND, || if self.fast { not_run("--fast") } else { first_command() })
    }

    /// Unit, integration and documentation tests with the brokers that they look for in the environment.
    fn tests(&self, report: &mut Report) -> Result<()> {
        let mut tests = Tests { environment: BTreeMap::new(), servers: BTreeMap::new(), limit: STEP_LIMIT };
        if self.fast || self.no_brokers {
            let reason = if self.fast { "--fast" } else { "--no-brokers" };
            report.step(BROKERS_UP, || not_run(reason))?;
            report.step(TESTS, || tests.run().map(|()| Verdict::Passed))?;
            return report.step(BROKERS_DOWN, || not_run(reason));
        }
        let mut instance = PrivateInstance::new()?;
        let mut endpoints: Vec<Endpoint> = Vec::new();
        let mut all_up = false;
        report.step(BROKERS_UP, || {
            let (chosen, left_out) = brokers::startable(self.how)?;
            endpoints = instance.up(&chosen, self.how)?;
            all_up = left_out.is_empty();
            if all_up { Ok(Verdict::Passed) } else { not_run(&left_out.join("; ")) }
        })?;
        let tested = report.step(TESTS, || {
            if all_up {
                // Then a test that misses its broker has to fail, not to say that it was not run.
                tests.environment.insert("ANYBROKER_TEST_REQUIRE_BROKERS".to_owned(), "1".to_owned());
            }
            // So that a test can have its broker killed: $ANYBROKER_XTASK brokers kill kafka
            let xtask = std::env::current_exe()?.display().to_string();
            tests.servers.insert("ANYBROKER_XTASK".to_owned(), xtask);
            tests.servers.insert("ANYBROKER_INSTANCE".to_owned(), instance.name().to_owned());
            for Endpoint { variable, url, stands_in_for, .. } in &endpoints {
                let note = stands_in_for.as_ref().map_or_else(String::new, |image| format!(" (stand-in for {image})"));
                println!("{variable}={url}{note}");
                tests.servers.insert((*variable).to_owned(), url.clone());
            }
            tests.run().map(|()| Verdict::Passed)
        });
        let ended = report.step(BROKERS_DOWN, || {
            println!("ended {}", instance.down()?.join(", "));
            Ok(Verdict::Passed)
        });
        tested.and(ended)
    }
}

fn passes(mut command: Command) -> Result<Verdict> {
    child::run(&mut command, STEP_LIMIT)?;
    Ok(Verdict::Passed)
}

fn not_run(reason: &str) -> Result<Verdict> {
    Ok(Verdict::NotRun(reason.to_owned()))
}

/// The facade compiles without any feature, and what it then depends on is no broker's client and no database.
fn dependencies() -> Result<Verdict> {
    let mut tree = cargo(["tree", "--package", "anybroker", "--no-default-features"]);
    tree.args(["--edges", "normal,build", "--target", "all", "--prefix", "none", "--format", "{p}"]);
    let found = clients_in(&output_of(&mut tree)?)?;
    ensure!(found.is_empty(), "anybroker without features depends on {}", found.join(", "));
    passes(cargo(["check", "--package", "anybroker", "--no-default-features"]))
}

fn clients_in(tree: &str) -> Result<Vec<String>> {
    let names: Vec<&str> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    ensure!(names.contains(&"anybroker"), "cargo tree printed something unexpected: {tree}");
    let mut found: Vec<String> = names
        .into_iter()
        .filter(|name| OPTIONAL_CLIENTS.iter().any(|c| name == c || c.ends_with('-') && name.starts_with(c)))
        .map(str::to_owned)
        .collect();
    found.sort();
    found.dedup();
    Ok(found)
}

fn licences() -> Result<Verdict> {
    let Some(deny) = cargo_deny()? else {
        return not_run("cargo-deny is not installed");
    };
    let mut command = Command::new(deny);
    child::clean(command.args(["--all-features", "check", "--hide-inclusion-graph", "licenses", "bans", "sources"]));
    passes(command)
}

fn advisories() -> Result<Verdict> {
    let Some(deny) = cargo_deny()? else {
        return not_run("cargo-deny is not installed");
    };
    let mut fetch = Command::new(&deny);
    child::clean(fetch.args(["fetch", "db"]));
    match child::quietly(&mut fetch, Duration::from_secs(90)) {
        Ok(status) if status.success() => {}
        Ok(_) | Err(_) => {
            crate::interrupt::check()?;
            return not_run("the advisory database could not be fetched");
        }
    }
    let mut check = Command::new(deny);
    child::clean(check.args(["--all-features", "check", "--disable-fetch", "advisories"]));
    passes(check)
}

/// On the path or in the cache folder. Never installed from here: that takes longer than all other steps together.
fn cargo_deny() -> Result<Option<PathBuf>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let cache = folders::cache()?.join("bin");
    let found = std::env::split_paths(&path).chain([cache]).map(|folder| folder.join("cargo-deny"));
    Ok(found.into_iter().find(|file| file.is_file()))
}

/// Runs what README.md tells a newcomer to run first, in a clone of the last commit.
///
/// It has a target folder of its own. Cargo tells the members of two checkouts apart by their path *within* the
/// workspace and notices changes by time, so a checkout that shares its target folder with another one can be given the
/// other's binaries.
fn first_command() -> Result<Verdict> {
    let target = workspace::target()?.join("fresh-checkout");
    if !output_of(Command::new("git").args(["status", "--porcelain"]))?.is_empty() {
        println!("note: uncommitted changes are not part of this step");
    }
    let folder = tempfile::tempdir()?;
    let clone = folder.path().join("anybroker");
    output_of(Command::new("git").args(["clone", "--quiet", "--no-hardlinks", "."]).arg(&clone))?;
    let script = first_command_of(&clone)?;
    let mut shell = Command::new("sh");
    shell.args(["-euc", &script]).current_dir(&clone).env("CARGO_TARGET_DIR", target);
    child::clean(&mut shell);
    passes(shell)
}

fn first_command_of(checkout: &Path) -> Result<String> {
    let readme = checkout.join("README.md");
    let text = std::fs::read_to_string(&readme).context("the last commit has no README.md")?;
    shell_block_after_marker(&text)
}

fn shell_block_after_marker(text: &str) -> Result<String> {
    let mut lines = text.lines().skip_while(|line| line.trim() != FIRST_COMMAND_MARKER).skip(1);
    let fence = lines.find(|line| !line.trim().is_empty());
    if fence != Some("```sh") {
        bail!("README.md has no line `{FIRST_COMMAND_MARKER}` that is followed by a block of ```sh");
    }
    let block: Vec<&str> = lines.take_while(|line| *line != "```").collect();
    ensure!(block.iter().any(|line| !line.trim().is_empty()), "README.md's first command is empty");
    Ok(block.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_command_is_the_block_after_the_marker() {
        let readme = "# X\n```sh\nother\n```\n<!-- first-command -->\n\n```sh\ncargo run\ncargo test\n```\nmore\n";
        assert_eq!(shell_block_after_marker(readme).unwrap(), "cargo run\ncargo test");
    }

    #[test]
    fn a_readme_without_a_first_command_is_an_error() {
        for readme in
            ["", "```sh\nx\n```", "<!-- first-command -->\ntext\n```sh\nx\n```", "<!-- first-command -->\n```sh\n```"]
        {
            assert!(shell_block_after_marker(readme).is_err(), "{readme}");
        }
    }

    #[test]
    fn clients_are_found_in_a_tree_and_lookalikes_are_not() {
        let tree = "anybroker v0.1.0 (/x)\naws-sdk-sqs v1.0.0\npulsar v6.9.0\npulsar v6.9.0 (*)\npulsarish v1.0.0\n";
        assert_eq!(clients_in(tree).unwrap(), ["aws-sdk-sqs", "pulsar"]);
        assert!(clients_in("anybroker v0.1.0\nbytes v1.0.0\n").unwrap().is_empty());
        assert!(clients_in("").is_err(), "an empty tree proves nothing");
    }
}
