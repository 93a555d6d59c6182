//! Benchmarks of AnyBroker. Each adapter's rows stand beside something bare that does the same work, interleaved in the
//! same run, so that the ratio means something on a busy machine too.

pub mod allocations;
pub mod embedded;
pub mod headline;
pub mod memory;
pub mod report;
pub mod rows;

use std::process::ExitCode;

use crate::report::Report;

/// Runs the rows whose name contains the filter. Arguments: `[filter] [--json]`.
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
