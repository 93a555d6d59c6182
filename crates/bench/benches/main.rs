//! `cargo bench -p anybroker-bench -- [filter] [--json]`: every row whose name contains the filter.

use std::alloc::System;
use std::process::ExitCode;

use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

/// Counts allocations; that costs a few nanoseconds each, which every figure includes.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

fn main() -> ExitCode {
    anybroker_bench::run(std::env::args().skip(1))
}
