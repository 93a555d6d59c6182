//! Benchmarks of AnyBroker. Each adapter's rows stand beside something bare that does the same work, interleaved in the
//! same run, so that the ratio means something on a busy machine too.

pub mod allocations;
#[cfg(feature = "brokers")]
pub mod brokers;
#[cfg(feature = "local")]
pub mod embedded;
#[cfg(feature = "local")]
pub mod headline;
#[cfg(feature = "local")]
pub mod memory;
#[cfg(feature = "local")]
pub mod report;
#[cfg(feature = "local")]
pub mod rows;

#[cfg(feature = "local")]
use std::process::ExitCode;

#[cfg(feature = "local")]
use crate::report::Report;

/// Runs the rows whose name contains the filter. Arguments: `[filter] [--json]`.
#[cfg(feature = "local")]
#[must_use]
pub fn run(arguments: impl Iterator<Item = String>) -> ExitCode {
    let mut filter = String::new();
    let mut json = false;
    for argument in arguments {
        match argument.as_str() {
            "--json" => json = true,
            "--bench" => {} // Cargo's own.
            other if other.starts_with('-') => {
                eprintln!("unknown option {other}; usage: [filter] [--json]");
                return ExitCode::from(2);
            }
            other => filter = other.to_owned(),
        }
    }
    let mut report = Report::new(filter, json);
    memory::run(&mut report);
    embedded::run(&mut report);
    report.finish()
}
