//! Development commands of AnyBroker: real brokers on this machine, the test command, all
//! modes under the conformance suite, mutants of the adapters, peers, benchmarks.

mod bench;
mod brokers;
mod child;
mod conform;
mod faults;
mod folders;
mod interrupt;
mod lanes;
mod mutants;
mod peers;
mod report;
mod test;
mod tools;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Development commands of AnyBroker
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Brokers(brokers::command::Brokers),
    Test(test::Test),
    Bench(bench::Bench),
    Conform(conform::Conform),
    Mutants(mutants::Mutants),
    Faults(faults::Faults),
    Peers(peers::Peers),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    interrupt::install()?;
    match &cli.command {
        Command::Brokers(brokers) => brokers.run(),
        Command::Test(test) => test.run(),
        Command::Bench(bench) => bench.run(),
        Command::Conform(conform) => conform.run(),
        Command::Mutants(mutants) => mutants.run(),
        Command::Faults(faults) => faults.run(),
        Command::Peers(peers) => peers.run(),
    }
}
