//! `cargo xtask faults`: the suite's fault cases on one broker, with one seed after the other.

mod tally;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Deserialize;

use crate::brokers::{self, How, PrivateInstance};
use crate::child::{self, cargo};
use crate::workspace;
use tally::Tally;

const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
/// One seed of all cases takes a minute or two; one that takes that long hangs.
const SEED_LIMIT: Duration = Duration::from_secs(15 * 60);

/// The brokers whose tests have fault cases.
const BROKERS: &[&str] = &["nats", "rabbitmq", "sqs"];
/// Those whose server forgets what it has when it is killed.
const FORGETFUL: &[&str] = &["sqs"];

/// Tests that take a seed and write a report: program, and name.
const OF_CONNECTIONS: (&str, &str) = ("conformance", "faults_of_connections_break_no_promise");
const OF_PROCESSES: (&str, &str) = ("crash", "a_killed_and_a_frozen_server_break_no_promise");
/// One seed in so many also has its server killed and frozen: that makes about one run in ten.
const PROCESSES: u64 = 3;

/// Run the suite's fault cases on a broker, seed after seed
///
/// A run is one case with one seed. It counts when it had 2,000 messages or more and at least one fault met an operation in
/// flight. The seeds are consecutive. What is found is written after every seed, so that an interrupted command goes on with
/// --resume.
#[derive(Debug, Args)]
pub(crate) struct Faults {
    /// nats, rabbitmq or sqs
    broker: String,
    /// How many runs that count
    #[arg(long, default_value_t = 200)]
    runs: usize,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Go on where an earlier command with the same report folder stopped
    #[arg(long)]
    resume: bool,
    /// Where the summary goes, and the histories of what failed; a folder of the broker in target/faults when not given
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Where the broker comes from
    #[arg(long, value_enum, default_value = "auto")]
    how: How,
}

impl Faults {
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        ensure!(BROKERS.contains(&self.broker.as_str()), "no fault cases for `{}`; there are {BROKERS:?}", self.broker);
        let folder = match &self.report {
            Some(folder) => std::path::absolute(folder)?,
            None => workspace::target()?.join("faults").join(&self.broker),
        };
        let mut tally = Tally::begin(&folder, &self.broker, self.seed, self.resume)?;
        let programs = Programs::build(&self.broker)?;
        let mut instance = PrivateInstance::new()?;
        let recipes = brokers::recipes(std::slice::from_ref(&self.broker))?;
        let endpoints = instance.up(&recipes, self.how)?;
        let endpoint = endpoints.first().context("a server that was started has an address")?;
        while tally.counted() < self.runs {
            let seed = tally.next_seed();
            let mut reports = vec![(&programs.conformance, OF_CONNECTIONS.1)];
            if let Some(crash) = programs.crash.as_ref().filter(|_| seed % PROCESSES == 0) {
                reports.push((crash, OF_PROCESSES.1));
            }
            let mut found = Vec::new();
            for (program, test) in reports {
                let report = folder.join("seeds").join(format!("{seed}-{test}"));
                let ended = self.one(program, test, seed, (&endpoint.variable, &endpoint.url), &report);
                crate::interrupt::check()?;
                found.extend(tally::read(&report).with_context(|| match ended {
                    Ok(()) => format!("seed {seed}: {test} left no report"),
                    Err(error) => format!("seed {seed}: {error:#}"),
                })?);
            }
            tally.add(seed, found)?;
            println!("{}", tally.line());
        }
        println!("\n{}", tally.text());
        println!("{}", folder.join("summary.md").display());
        let failed = tally.failed();
        ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
        Ok(())
    }

    fn one(&self, program: &Path, test: &str, seed: u64, server: (&str, &str), report: &Path) -> Result<()> {
        let mut run = Command::new(program);
        run.args(["--include-ignored", "--exact", test])
            .current_dir(Path::new("adapters").join(&self.broker))
            .env(server.0, server.1)
            .env("ANYBROKER_XTASK", std::env::current_exe()?)
            .env("ANYBROKER_TEST_REQUIRE_BROKERS", "1")
            .env("ANYBROKER_TEST_SEED", seed.to_string())
            .env("ANYBROKER_TEST_REPORT", report);
        // That a case failed stands in the report.
        child::watched(&mut run, SEED_LIMIT).map(drop)
    }
}

/// The built tests.
struct Programs {
    conformance: PathBuf,
    /// Where a server that is killed keeps what it has.
    crash: Option<PathBuf>,
}

/// A line of `cargo test --message-format=json`, as far as it is of interest.
#[derive(Deserialize)]
struct Line {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

impl Programs {
    fn build(broker: &str) -> Result<Self> {
        let package = format!("anybroker-{broker}");
        let mut command =
            cargo(["test", "--no-run", "--package", &package, "--message-format=json-render-diagnostics"]);
        command.args(["--test", OF_CONNECTIONS.0]);
        let keeps = !FORGETFUL.contains(&broker);
        if keeps {
            command.args(["--test", OF_PROCESSES.0]);
        }
        println!("building the tests of {package}");
        let text = built(&mut command)?;
        let crash = keeps.then(|| executable(&text, OF_PROCESSES.0)).transpose()?;
        Ok(Self { conformance: executable(&text, OF_CONNECTIONS.0)?, crash })
    }
}

fn built(command: &mut Command) -> Result<String> {
    use std::io::{Read as _, Seek as _};
    let mut lines = tempfile::tempfile()?;
    child::run(command.stdout(lines.try_clone()?), BUILD_LIMIT)?;
    let mut text = String::new();
    lines.rewind()?;
    lines.read_to_string(&mut text)?;
    Ok(text)
}

/// The program that cargo tells of.
fn executable(lines: &str, name: &str) -> Result<PathBuf> {
    for line in lines.lines() {
        let line: Line = serde_json::from_str(line).with_context(|| format!("cargo printed: {line}"))?;
        if let (Some(target), Some(executable)) = (line.target, line.executable)
            && target.name == name
        {
            return Ok(executable);
        }
    }
    bail!("cargo told of no test program `{name}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_of_a_test_is_found_among_what_cargo_prints() {
        let lines = [
            r#"{"reason":"compiler-artifact","target":{"name":"anybroker_nats"},"executable":null}"#,
            r#"{"reason":"compiler-artifact","target":{"name":"crash"},"executable":"/t/crash-1"}"#,
            r#"{"reason":"build-finished","success":true}"#,
        ]
        .join("\n");
        assert_eq!(executable(&lines, "crash").unwrap(), Path::new("/t/crash-1"));
        assert!(executable(&lines, "conformance").is_err());
    }
}
