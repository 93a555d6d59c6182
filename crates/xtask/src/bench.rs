//! `cargo xtask bench`

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use crate::child::{self, cargo};
use crate::workspace;

const LIMIT: Duration = Duration::from_secs(6 * 60 * 60);

/// Run the benchmarks; all arguments go to them
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// For the benchmarks, as after `cargo bench --package anybroker-bench`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

impl Bench {
    /// Forwards to `cargo bench`.
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        ensure!(Path::new("crates/bench/Cargo.toml").is_file(), "there are no benchmarks yet: crates/bench is missing");
        let mut command = cargo(["bench", "--package", "anybroker-bench"]);
        child::run(command.args(&self.arguments), LIMIT)
    }
}
