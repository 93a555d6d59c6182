//! `cargo xtask conform`: the conformance suite on every mode of every adapter, one report of all.

mod counts;
pub(crate) mod disturb;
pub(crate) mod modes;
mod state;
mod summary;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use tempfile::TempDir;

use crate::brokers::{Endpoint, How, PrivateInstance};
use crate::child::{self, cargo};
use crate::workspace;
pub(crate) use counts::Counts;
use modes::{CLUSTERS, MODES, Mode, every};
use state::State;
pub(crate) use state::revision;

/// A mode takes minutes; one that takes that long hangs.
const MODE_LIMIT: Duration = Duration::from_secs(60 * 60);
const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);

/// Run the conformance suite on every mode of every adapter
///
/// Brings the servers up one after the other, runs the suite on each mode, and puts all reports side by side. What a mode's
/// run finds is written as soon as it ends, so that an interrupted command goes on with --resume.
#[derive(Debug, Args)]
pub(crate) struct Conform {
    /// Which modes
    #[arg(long, value_enum, default_value = "all")]
    modes: Choice,
    /// Only these, by name; separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Only print the modes
    #[arg(long)]
    list: bool,
    /// Go on where an earlier run with the same report folder stopped
    #[arg(long)]
    resume: bool,
    /// Where the reports go; target/conformance when not given
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Up to this level: conformance, reliability or long. From reliability on, connections are disturbed by proxies, and
    /// servers that this command started are killed, frozen, filled and locked
    #[arg(long, default_value = "conformance")]
    level: String,
    /// Only cases whose name matches; may be repeated
    #[arg(long = "case", value_name = "GLOB")]
    cases: Vec<String>,
    /// Where the brokers come from
    #[arg(long, value_enum, default_value = "auto")]
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// Every mode
    All,
    /// The default mode of each adapter
    Default,
    /// Those on clusters of three nodes
    Clusters,
}

/// What became of a mode.
enum Ended {
    Green,
    NotGreen,
    Before,
    NotRun(String),
}

impl Conform {
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        let chosen = self.chosen()?;
        if self.list {
            for mode in chosen {
                println!("{:22} {:10} {}", mode.name, mode.broker.unwrap_or("-"), mode.settings);
            }
            return Ok(());
        }
        let folder = match &self.report {
            Some(folder) => std::path::absolute(folder)?,
            None => workspace::target()?.join("conformance"),
        };
        let state = State::begin(&folder, self.resume, &self.level, &self.cases)?;
        let command = build(&chosen)?;
        let ended = self.modes(&chosen, &state, &command.path)?;
        self.conclude(&folder, &state, &command.path, &ended)
    }

    fn chosen(&self) -> Result<Vec<&'static Mode>> {
        for name in &self.only {
            ensure!(
                every().any(|mode| mode.name == name),
                "no mode is called `{name}`; see cargo xtask conform --list"
            );
        }
        if !self.only.is_empty() {
            return Ok(every().filter(|mode| self.only.iter().any(|name| name == mode.name)).collect());
        }
        Ok(match self.modes {
            Choice::All => MODES.iter().collect(),
            Choice::Default => MODES.iter().filter(|mode| mode.is_default).collect(),
            Choice::Clusters => CLUSTERS.iter().collect(),
        })
    }

    /// Runs those that have no report yet, server by server.
    fn modes(
        &self,
        chosen: &[&'static Mode],
        state: &State,
        command: &Path,
    ) -> Result<Vec<(&'static Mode, Ended, Duration)>> {
        let mut instance = PrivateInstance::new()?;
        let mut ended = Vec::new();
        for share in chosen.chunk_by(|one, other| one.broker.is_some() && one.broker == other.broker) {
            let open: Vec<_> = share.iter().filter(|mode| !state.has(mode.name)).copied().collect();
            ended.extend(
                share.iter().filter(|mode| state.has(mode.name)).map(|mode| (*mode, Ended::Before, Duration::ZERO)),
            );
            if open.is_empty() {
                continue;
            }
            let server = match share[0].broker.map(|name| instance.up_one(name, self.how)).transpose() {
                Ok(server) => server,
                Err(error) => {
                    crate::interrupt::check()?;
                    let why = format!("{error:#}");
                    println!("{why}");
                    ended.extend(open.into_iter().map(|mode| (mode, Ended::NotRun(why.clone()), Duration::ZERO)));
                    continue;
                }
            };
            for mode in open {
                println!("\n==> {}", mode.name);
                let since = Instant::now();
                let faults = match self.level.as_str() {
                    "conformance" => Vec::new(),
                    _ => disturb::arguments(&instance, mode.broker, self.level == "long")?,
                };
                let how = self.mode(mode, server.as_ref(), &faults, state, command)?;
                ended.push((mode, how, since.elapsed()));
            }
            instance.down()?;
        }
        Ok(ended)
    }

    fn mode(
        &self,
        mode: &Mode,
        server: Option<&Endpoint>,
        faults: &[String],
        state: &State,
        command: &Path,
    ) -> Result<Ended> {
        let folder = tempfile::tempdir()?;
        let address = server.map(|server| server.url_of_the_suite.as_str());
        let url = mode.url(address, folder.path().to_str().context("a temporary folder with a name in UTF-8")?);
        let at_once = match self.level.as_str() {
            "conformance" => mode.pace.parallel,
            _ => mode.pace.parallel.min(mode.pace.trials),
        };
        let stands_in_for = server.and_then(|server| server.stands_in_for.as_deref());
        let mut run = suite(mode, &url, stands_in_for, at_once, command)?;
        run.args(["--level", &self.level]).args(faults).arg("--report").arg(state.folder_of(mode.name));
        for case in &self.cases {
            run.args(["--case", case]);
        }
        let status = child::watched(&mut run, MODE_LIMIT)?;
        Ok(match (status.success(), state.has(mode.name)) {
            (true, true) => Ended::Green,
            (false, true) => Ended::NotGreen,
            (_, false) => Ended::NotRun(format!("the suite ended without a report ({status})")),
        })
    }

    /// Merges all reports there are, also those of other modes that earlier runs left in the folder.
    fn conclude(&self, folder: &Path, state: &State, command: &Path, ended: &[(&Mode, Ended, Duration)]) -> Result<()> {
        let reports: Vec<PathBuf> =
            every().filter(|mode| state.has(mode.name)).map(|mode| state.report_of(mode.name)).collect();
        let mut green = false;
        if !reports.is_empty() {
            println!("\n==> all reports side by side");
            let mut merge = Command::new(command);
            merge.args(["conform", "report", "merge"]).args(&reports).arg("--to").arg(folder);
            green = child::watched(&mut merge, BUILD_LIMIT)?.success();
            let merged = std::fs::read_to_string(folder.join("report.json")).context("the reports were not merged")?;
            std::fs::write(folder.join("summary.md"), summary::text(&state.run, &merged)?)?;
            println!("{}", folder.join("report.html").display());
        }
        println!();
        let mut missing = Vec::new();
        for (mode, how, time) in ended {
            let said = match how {
                Ended::Green => "green".to_owned(),
                Ended::NotGreen => "NOT GREEN".to_owned(),
                Ended::Before => "from an earlier run".to_owned(),
                Ended::NotRun(why) => {
                    missing.push(mode.name);
                    format!("not run: {why}")
                }
            };
            println!("{:22} {:>8.1} s  {said}", mode.name, time.as_secs_f64());
        }
        if !missing.is_empty() {
            bail!("not run: {}; the same command with --resume goes on", missing.join(", "));
        }
        ensure!(green, "not every mode is green; see {}", folder.join("report.html").display());
        Ok(())
    }
}

/// The suite on a mode at `url`, by the command. What runs there, in the place of which image, stands in the report.
pub(crate) fn suite(
    mode: &Mode,
    url: &str,
    stands_in_for: Option<&str>,
    at_once: u16,
    command: &Path,
) -> Result<Command> {
    let pace = mode.pace;
    let mut run = Command::new(command);
    run.args(["conform", "--url", url, "--name", mode.name])
        .args(["--lease", pace.lease, "--quiet", pace.quiet, "--patience", pace.patience])
        .args(["--parallel", &at_once.to_string()]);
    let clients = state::versions(Path::new("Cargo.lock"), mode.clients)?;
    if !clients.is_empty() {
        run.args(["--client", &clients]);
    }
    if let Some(emulated) = in_the_place_of(mode, stands_in_for) {
        run.args(["--emulated", &emulated]);
    }
    Ok(run)
}

/// What stands in for the product: an emulator, an image that was built here, or both.
fn in_the_place_of(mode: &Mode, stands_in_for: Option<&str>) -> Option<String> {
    let image =
        stands_in_for.map(|image| format!("a stand-in, built from packages, in the place of the image {image}"));
    let told: Vec<String> = mode.emulated.map(str::to_owned).into_iter().chain(image).collect();
    (!told.is_empty()).then(|| told.join("; "))
}

/// The command, in a folder of this run's own: another run in the same target folder may build it anew, with other features.
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    _folder: TempDir,
}

/// Builds the command with what the modes need.
pub(crate) fn build(chosen: &[&Mode]) -> Result<Program> {
    let mut features: Vec<&str> = chosen.iter().filter_map(|mode| mode.feature).collect();
    features.sort_unstable();
    features.dedup();
    let mut build = cargo(["build", "--package", "anybroker-cli"]);
    if !features.is_empty() {
        build.args(["--features", &features.join(",")]);
    }
    child::run(&mut build, BUILD_LIMIT)?;
    let target = workspace::target()?;
    let folder = tempfile::Builder::new().prefix("running-").tempdir_in(&target)?;
    let path = folder.path().join("anybroker");
    // The same file: what is built later is another one.
    std::fs::hard_link(target.join("debug").join("anybroker"), &path).context("keeping the command for this run")?;
    Ok(Program { path, _folder: folder })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_that_an_image_was_a_stand_in_beside_what_is_emulated_anyway() {
        let mode = |name: &str| MODES.iter().find(|mode| mode.name == name).unwrap();
        assert_eq!(in_the_place_of(mode("nats"), None), None);
        let nats = in_the_place_of(mode("nats"), Some("nats:2")).unwrap();
        assert!(nats.starts_with("a stand-in") && nats.ends_with("nats:2"), "{nats}");
        let sqs = in_the_place_of(mode("sqs"), Some("emq:1")).unwrap();
        assert!(sqs.starts_with("ElasticMQ") && sqs.ends_with("emq:1"), "{sqs}");
    }
}
