//! `cargo xtask faults`: the suite's fault cases on one mode, with one seed after the other.

mod tally;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::brokers::{self, How, PrivateInstance};
use crate::child;
use crate::conform::modes::{MODES, Mode};
use crate::conform::{build, disturb, suite};
use crate::workspace;
use tally::Tally;

/// One seed of all cases takes a minute or two; one that takes that long hangs.
const SEED_LIMIT: Duration = Duration::from_secs(15 * 60);
/// One seed in so many also has its server killed and frozen: that makes about one run in ten.
const PROCESSES: u64 = 3;

/// Run the suite's fault cases on a mode, seed after seed
///
/// A run is one case with one seed. It counts when it had 2,000 messages or more and at least one fault met an operation in
/// flight. The seeds are consecutive. What is found is written after every seed, so that an interrupted command goes on with
/// --resume.
#[derive(Debug, Args)]
pub(crate) struct Faults {
    /// A mode on a server, by its name in `cargo xtask conform --list`, such as kafka
    mode: String,
    /// How many runs that count
    #[arg(long, default_value_t = 200)]
    runs: usize,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Go on where an earlier command with the same report folder stopped
    #[arg(long)]
    resume: bool,
    /// Where the summary goes, and the reports of all seeds; a folder of the mode in target/faults when not given
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Where the broker comes from
    #[arg(long, value_enum, default_value = "auto")]
    how: How,
}

impl Faults {
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        let (mode, broker) = self.mode()?;
        let folder = match &self.report {
            Some(folder) => std::path::absolute(folder)?,
            None => workspace::target()?.join("faults").join(mode.name),
        };
        let mut tally = Tally::begin(&folder, mode.name, self.seed, self.resume)?;
        let command = build(&[mode])?;
        let mut instance = PrivateInstance::new()?;
        let endpoints = instance.up(&brokers::recipes(&[broker.to_owned()])?, self.how)?;
        let url = mode.url(Some(&endpoints.first().context("a server that was started has an address")?.url), "");
        while tally.counted() < self.runs {
            let seed = tally.next_seed();
            let report = folder.join("seeds").join(seed.to_string());
            let faults = disturb::arguments(&instance, Some(broker), seed % PROCESSES == 0)?;
            let ended = one(mode, &url, &faults, seed, &report, &command);
            crate::interrupt::check()?;
            let found = tally::read(&report).with_context(|| match ended {
                Ok(()) => format!("seed {seed} left no report"),
                Err(error) => format!("seed {seed}: {error:#}"),
            })?;
            ensure!(!found.is_empty(), "seed {seed}: no case about faults was run on {}", mode.name);
            tally.add(seed, found)?;
            println!("{}", tally.line());
        }
        println!("\n{}", tally.text());
        println!("{}", folder.join("summary.md").display());
        let failed = tally.failed();
        ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
        Ok(())
    }

    fn mode(&self) -> Result<(&'static Mode, &'static str)> {
        let on_servers = MODES.iter().filter_map(|mode| Some((mode, mode.broker?)));
        match on_servers.clone().find(|(mode, _)| mode.name == self.mode) {
            Some(found) => Ok(found),
            None => {
                let names: Vec<&str> = on_servers.map(|(mode, _)| mode.name).collect();
                bail!("no mode on a server is called `{}`; there are: {}", self.mode, names.join(", "))
            }
        }
    }
}

fn one(mode: &Mode, url: &str, faults: &[String], seed: u64, report: &Path, command: &Path) -> Result<()> {
    let mut run = suite(mode, url, command)?;
    run.args(["--level", "reliability", "--case", "faults/*", "--seed", &seed.to_string()]);
    run.args(faults).arg("--report").arg(report);
    // That a case failed stands in the report.
    child::watched(&mut run, SEED_LIMIT).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(mode: &str) -> Faults {
        let mode = mode.to_owned();
        Faults { mode, runs: 1, seed: 1, resume: false, report: None, how: How::Auto }
    }

    #[test]
    fn a_mode_is_found_by_its_name_and_one_without_a_server_is_refused() {
        assert_eq!(faults("kafka-in-place").mode().unwrap().1, "kafka");
        let told = faults("memory").mode().map(|_| ()).unwrap_err().to_string();
        assert!(told.contains("`memory`") && told.contains("rabbitmq"), "{told}");
    }
}
