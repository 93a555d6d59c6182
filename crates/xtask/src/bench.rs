//! `cargo xtask bench`

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::brokers::{self, How, PrivateInstance, Recipe};
use crate::child::{self, cargo};
use crate::workspace;

const LIMIT: Duration = Duration::from_secs(6 * 60 * 60);
/// What the benchmark of the brokers measures.
const MEASURED: &[&str] = &["kafka", "nats", "pulsar", "rabbitmq", "sqs"];
/// Where its results go.
const RESULTS: &str = "bench";

/// Run the benchmarks; all arguments go to them
///
/// `cargo xtask bench [FILTER]` measures memory and the embedded broker. `cargo xtask bench brokers [NAMES] [--pairs N]
/// [--quick]` measures adapters beside their bare clients, on the brokers that the environment names or else on its own,
/// and writes bench/RESULTS.md.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// For the benchmarks, as after `cargo bench --package anybroker-bench`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

impl Bench {
    /// Forwards to `cargo bench`, or to the benchmark of the brokers.
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        ensure!(Path::new("crates/bench/Cargo.toml").is_file(), "there are no benchmarks yet: crates/bench is missing");
        if let Some((first, rest)) = self.arguments.split_first()
            && first == "brokers"
        {
            return with_brokers(rest);
        }
        let mut command = cargo(["bench", "--package", "anybroker-bench"]);
        child::run(command.args(&self.arguments), LIMIT)
    }
}

/// The names come first; whatever follows them is for the benchmark.
fn with_brokers(arguments: &[String]) -> Result<()> {
    let names = arguments.iter().take_while(|argument| !argument.starts_with('-')).cloned().collect::<Vec<_>>();
    if let Some(name) = names.iter().find(|name| !MEASURED.contains(&name.as_str())) {
        bail!("no benchmark is called `{name}`; there are: {}", MEASURED.join(", "));
    }
    let (chosen, left_out) = match names.is_empty() {
        true => brokers::startable(How::Auto)?,
        false => (brokers::recipes(&names)?, Vec::new()),
    };
    let chosen: Vec<&'static dyn Recipe> =
        chosen.into_iter().filter(|recipe| MEASURED.contains(&recipe.name())).collect();
    left_out.iter().for_each(|obstacle| println!("not run: {obstacle}"));
    // Only the clients that are measured are built.
    let clients: Vec<&str> = chosen.iter().map(|recipe| recipe.name()).collect();
    let build = ["build", "--release", "--package", "anybroker-bench", "--bin", "brokers", "--no-default-features"];
    child::run(cargo(build).arg("--features").arg(clients.join(",")), LIMIT)?;
    let mut instance = PrivateInstance::new()?;
    let endpoints = instance.up(&chosen, How::Auto)?;
    let mut command = std::process::Command::new(workspace::target()?.join("release").join("brokers"));
    command.args(arguments).args(["--out", RESULTS]);
    for (recipe, endpoint) in chosen.iter().zip(&endpoints) {
        command.env(&endpoint.variable, &endpoint.url);
        // One that the environment names may be of another version.
        if std::env::var_os(&endpoint.variable).is_none() {
            command.arg("--server").arg(format!("{}={}", recipe.name(), recipe.version()));
        }
    }
    let measured = child::run(&mut command, LIMIT);
    let ended = instance.down()?;
    if !ended.is_empty() {
        println!("ended {}", ended.join(", "));
    }
    measured
}
