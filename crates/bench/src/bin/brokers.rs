//! `cargo xtask bench brokers`: every broker's adapter beside its bare client.

use std::process::ExitCode;

/// Counts allocations, for looking into a difference; see the feature of that name.
#[cfg(feature = "allocations")]
#[global_allocator]
static ALLOCATOR: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

fn main() -> ExitCode {
    anybroker_bench::brokers::main()
}
