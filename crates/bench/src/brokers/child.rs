//! The measuring process: one job in, one line of figures out.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::process::Command;

use super::job::{Job, Measured, Side, Task, peak_mib};
use super::{adapter, bare};

/// The first argument of a measuring process.
pub(crate) const WORD: &str = "measure";
/// A measurement that takes longer has failed.
const LONGEST: Duration = Duration::from_secs(90);

/// Does the job and prints what was found.
pub(crate) fn main(job: &str) -> Result<()> {
    let job: Job = serde_json::from_str(job).context("a job")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut measured = runtime.block_on(async {
        match (job.side, job.task) {
            (Side::Bare | Side::BareAgain, _) => bare::measure(&job).await,
            (Side::ByHand, _) => bare::measure_by_hand(&job).await,
            (Side::Adapter, Task::Publish) => adapter::publish(&job).await,
            (Side::Adapter, Task::Consume) => adapter::consume(&job).await,
            (Side::Adapter, Task::Latency) => adapter::latency(&job).await,
            (Side::Worker, _) => adapter::work(&job).await,
        }
    })?;
    measured.peak_mib = peak_mib()?;
    println!("{}", serde_json::to_string(&measured)?);
    // Threads of clients that are still on their way out have nothing to add.
    std::process::exit(0);
}

/// Has a process of its own do the job.
pub(crate) async fn measure(job: &Job) -> Result<Measured> {
    let program = std::env::current_exe()?;
    let text = serde_json::to_string(job)?;
    let mut command = Command::new(Path::new(&program));
    command.arg(WORD).arg(&text).stdin(Stdio::null()).kill_on_drop(true);
    let Ok(output) = tokio::time::timeout(LONGEST, command.output()).await else {
        bail!("no figures within {LONGEST:?}: {text}");
    };
    let output = output?;
    if !output.status.success() {
        bail!("{}: {}: {text}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("the figures of a measurement")
}
