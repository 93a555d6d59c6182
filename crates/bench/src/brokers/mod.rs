//! Adapters beside the bare clients that they are built on: the same guarantee, settings and bytes on the wire, in turns.
//!
//! Each measurement is a process of its own, so that processor time and peak memory are of one side only.

mod adapter;
mod bare;
mod child;
mod job;
mod machine;
mod open_loop;
mod plan;
mod results;
mod run;
mod statistics;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

/// Measures what each adapter costs over its bare client
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench brokers", bin_name = "cargo xtask bench brokers")]
struct Arguments {
    /// Which brokers; all whose ANYBROKER_TEST_…_URL is set when none is given
    names: Vec<String>,
    /// Rounds that are measured. In each of them every side runs, in turns
    #[arg(long, default_value_t = 20)]
    pairs: usize,
    /// Rounds of the rows that are not at 256 B and not throughput; not more than `--pairs`
    #[arg(long, default_value_t = 8)]
    other_pairs: usize,
    /// A tenth of the messages and three rounds, to see that it works; the figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    rows: String,
    /// No broker is begun, and no further round, after so many minutes
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// The folder of RESULTS.md and the figures behind it. Without it the figures are printed only
    #[arg(long)]
    out: Option<PathBuf>,
    /// What a broker is, as `kafka=Apache Kafka 4.3.1`, where it does not tell its clients
    #[arg(long, value_name = "NAME=VERSION")]
    server: Vec<String>,
}

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let result = match arguments.next().as_deref() {
        Some(child::WORD) => child::main(&arguments.next().unwrap_or_default()),
        _ => parent(&Arguments::parse()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parent(arguments: &Arguments) -> anyhow::Result<()> {
    let options = run::Options {
        names: arguments.names.clone(),
        pairs: if arguments.quick { arguments.pairs.min(3) } else { arguments.pairs },
        other_pairs: if arguments.quick { 2 } else { arguments.other_pairs.min(arguments.pairs) },
        is_quick: arguments.quick,
        rows: arguments.rows.clone(),
        limit: Duration::from_secs(arguments.minutes * 60),
        // What is quick is not kept.
        out: arguments.out.clone().filter(|_| !arguments.quick),
        servers: arguments.server.clone(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run::run(&options))
}
