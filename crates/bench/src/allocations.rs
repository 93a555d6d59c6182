//! What the allocator has seen, and what the processor has spent.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use stats_alloc::INSTRUMENTED_SYSTEM;

/// How often memory was asked for (a buffer that grows asks again).
#[must_use]
pub fn count() -> usize {
    let stats = INSTRUMENTED_SYSTEM.stats();
    stats.allocations + stats.reallocations
}

/// Bytes that are allocated now.
#[must_use]
pub fn bytes() -> usize {
    let stats = INSTRUMENTED_SYSTEM.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}

/// The processor time of this thread: unlike the wall clock's, it does not depend on who else is running.
#[must_use]
pub fn processor() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
