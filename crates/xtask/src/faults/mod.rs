//! `cargo xtask faults`: the suite's fault cases on one mode, with one seed after the other.

mod tally;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::brokers::{Endpoint, How, PrivateInstance};
use crate::child;
use crate::conform::modes::{Mode, every};
use crate::conform::{build, disturb, suite};
use crate::workspace;
use tally::{Kind, Tally};

/// One seed of all cases takes a minute or two; one that takes that long hangs.
const SEED_LIMIT: Duration = Duration::from_secs(15 * 60);
/// So many seeds of each kind are of all cases; the later ones of those that can count.
const WHOLE_SEEDS: usize = 3;
/// One run in so many is on the server: it is killed, frozen and so on, while connections are left alone.
const ON_SERVER: usize = 10;

/// Run the suite's fault cases on modes, seed after seed
///
/// A run is one case with one seed. It counts when it had 2,000 messages or more and at least one fault met an operation in
/// flight. One run in ten is on the server, where that can be disturbed, the others on connections; each kind has consecutive
/// seeds. From the fourth seed on only cases are run that have counted before. What is found is written after every seed, so that an interrupted command goes on with --resume. A mode that fails does
/// not keep the next one from being run.
#[derive(Debug, Args)]
pub(crate) struct Faults {
    /// Modes on servers, by their names in `cargo xtask conform --list`, such as kafka; the default mode of each broker when none
    /// is named
    modes: Vec<String>,
    /// How many runs that count, for each mode
    #[arg(long, default_value_t = 200)]
    runs: usize,
    /// The first seed, of either kind
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Go on where an earlier command with the same report folder stopped
    #[arg(long)]
    resume: bool,
    /// Where the summaries and the reports of all seeds go, in a folder for each mode; target/faults when not given
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Where the broker comes from
    #[arg(long, value_enum, default_value = "auto")]
    how: How,
}

impl Faults {
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        let modes = self.modes()?;
        let folder = match &self.report {
            Some(folder) => std::path::absolute(folder)?,
            None => workspace::target()?.join("faults"),
        };
        let command = build(&modes.iter().map(|(mode, _)| *mode).collect::<Vec<_>>())?;
        let mut failed = Vec::new();
        for (mode, broker) in modes {
            let ended = self.run_mode(mode, broker, &folder.join(mode.name), &command.path);
            crate::interrupt::check()?;
            failed.extend(ended.err().map(|error| format!("{}: {error:#}", mode.name)));
        }
        ensure!(failed.is_empty(), "failed:\n{}", failed.join("\n"));
        Ok(())
    }

    fn run_mode(&self, mode: &'static Mode, broker: &'static str, folder: &Path, command: &Path) -> Result<()> {
        let mut tally = Tally::begin(folder, mode.name, self.seed, self.resume)?;
        let mut instance = PrivateInstance::new()?;
        let server = instance.up_one(broker, self.how)?;
        let on_server = disturb::of_server(&instance, broker)?;
        let wanted = Wanted::of(self.runs, !on_server.is_empty());
        let on_connections = disturb::of_connections(&instance, broker)?;
        while let Some(kind) = wanted.next(&tally) {
            let seed = tally.next_seed(kind);
            let report = folder.join("seeds").join(kind.folder()).join(seed.to_string());
            let faults = match kind {
                Kind::Connections => &on_connections,
                Kind::Server => &on_server,
            };
            let cases =
                if tally.seeds(kind) < WHOLE_SEEDS { vec!["faults/*".to_owned()] } else { tally.counting(kind) };
            let ended = one(mode, &server, faults, &cases, seed, &report, command);
            crate::interrupt::check()?;
            let found = tally::read(&report).with_context(|| match ended {
                Ok(()) => format!("seed {seed} left no report"),
                Err(error) => format!("seed {seed}: {error:#}"),
            })?;
            ensure!(!found.is_empty(), "seed {seed}: no case about faults {} was run on {}", kind.words(), mode.name);
            tally.add(kind, seed, found)?;
            println!("{}", tally.line(kind));
            ensure!(tally.counted(kind) > 0, "seed {seed}: no run {} counts on {}", kind.words(), mode.name);
        }
        println!("\n{}", tally.text());
        println!("{}", folder.join("summary.md").display());
        let failed = tally.failed();
        ensure!(failed.is_empty(), "{}", failed.join(", "));
        Ok(())
    }

    /// The modes asked for, with their brokers.
    fn modes(&self) -> Result<Vec<(&'static Mode, &'static str)>> {
        let on_servers = every().filter_map(|mode| Some((mode, mode.broker?)));
        if self.modes.is_empty() {
            return Ok(on_servers.filter(|(mode, _)| mode.is_default).collect());
        }
        let find = |name: &String| match on_servers.clone().find(|(mode, _)| mode.name == *name) {
            Some(found) => Ok(found),
            None => {
                let names: Vec<&str> = on_servers.clone().map(|(mode, _)| mode.name).collect();
                bail!("no mode on a server is called `{name}`; there are: {}", names.join(", "))
            }
        };
        self.modes.iter().map(find).collect()
    }
}

/// How many runs of each kind are to count.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    on_connections: usize,
    on_server: usize,
}

impl Wanted {
    fn of(runs: usize, has_server: bool) -> Self {
        let on_server = if has_server { runs.div_ceil(ON_SERVER) } else { 0 };
        Self { on_connections: runs - on_server, on_server }
    }

    /// Of which kind the next seed is: of the one that is further from its end, so that neither comes late.
    fn next(&self, tally: &Tally) -> Option<Kind> {
        let (connections, server) = (tally.counted(Kind::Connections), tally.counted(Kind::Server));
        let server_is_behind = server * self.on_connections <= connections * self.on_server;
        match (connections < self.on_connections, server < self.on_server) {
            (true, true) if server_is_behind => Some(Kind::Server),
            (true, _) => Some(Kind::Connections),
            (false, true) => Some(Kind::Server),
            (false, false) => None,
        }
    }
}

fn one(
    mode: &Mode,
    server: &Endpoint,
    faults: &[String],
    cases: &[String],
    seed: u64,
    report: &Path,
    command: &Path,
) -> Result<()> {
    let url = mode.url(Some(&server.url_of_the_suite), "");
    let mut run = suite(mode, &url, server.stands_in_for.as_deref(), mode.pace.trials, command)?;
    run.args(["--level", "reliability", "--seed", &seed.to_string()]);
    run.args(cases.iter().flat_map(|case| ["--case", case]));
    run.args(faults).arg("--report").arg(report);
    // That a case failed stands in the report.
    child::watched(&mut run, SEED_LIMIT).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modes(modes: &[&str]) -> Result<Vec<(&'static Mode, &'static str)>> {
        let modes = modes.iter().map(|mode| (*mode).to_owned()).collect();
        Faults { modes, runs: 1, seed: 1, resume: false, report: None, how: How::Auto }.modes()
    }

    #[test]
    fn a_mode_is_found_by_its_name_and_one_without_a_server_is_refused() {
        assert_eq!(modes(&["kafka-in-place"]).unwrap()[0].1, "kafka");
        let told = modes(&["kafka", "memory"]).map(|_| ()).unwrap_err().to_string();
        assert!(told.contains("`memory`") && told.contains("rabbitmq"), "{told}");
    }

    #[test]
    fn without_a_name_each_broker_is_run_in_its_default_mode() {
        let brokers: Vec<&str> = modes(&[]).unwrap().into_iter().map(|(_, broker)| broker).collect();
        assert_eq!(brokers, ["kafka", "rabbitmq", "nats", "sqs", "pulsar"]);
    }
}
