//! What a measuring process is told, and what it answers.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Keys that messages have in turn.
pub(crate) const KEYS: usize = 1_000;
/// Payloads are slices of so many bytes that repeat nothing: the client's compression finds as much as in real ones.
const POOL: usize = 1 << 20;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Task {
    /// Publish `count`, each confirmed, `window` on their way.
    Publish,
    /// Receive `count` and ack each.
    Consume,
    /// Publish what is due, `rate` messages a second for `seconds`, and note how long each took until its confirm.
    Latency,
}

/// Who does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Side {
    /// The client library alone.
    Bare,
    /// The same again: what differs between the two is noise.
    BareAgain,
    /// Below the client library: the protocol by hand, where the library spends more than the protocol needs.
    ByHand,
    /// The adapter.
    Adapter,
    /// The adapter, through a worker with a handler that does nothing.
    Worker,
}

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) broker: String,
    pub(crate) task: Task,
    pub(crate) side: Side,
    /// The endpoint, as a service is configured with it.
    pub(crate) url: String,
    /// The logical names, for the adapter.
    pub(crate) destination: String,
    pub(crate) group: String,
    /// The broker's own names of both, for the bare client: the adapter has declared them, so both sides find the same
    /// settings at the broker.
    pub(crate) physical: String,
    pub(crate) physical_group: String,
    pub(crate) size: usize,
    pub(crate) count: usize,
    /// Messages on their way at most.
    pub(crate) window: usize,
    /// Messages that the adapter is given in one call, or asked for.
    pub(crate) batch: usize,
    /// Messages that are unsettled at most.
    pub(crate) in_flight: usize,
    pub(crate) rate: f64,
    pub(crate) seconds: f64,
}

impl Job {
    /// The host and port of the URL.
    pub(crate) fn host(&self) -> &str {
        let rest = self.url.split_once("://").map_or(self.url.as_str(), |(_, rest)| rest);
        let rest = rest.split(['/', '?']).next().unwrap_or_default();
        rest.rsplit_once('@').map_or(rest, |(_, host)| host)
    }
}

/// What one measurement found.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) count: usize,
    /// From the first message handed over to the last confirm, or from the first message received to the last ack.
    pub(crate) seconds: f64,
    /// Of all threads of the process, user and system, in that time.
    pub(crate) processor_seconds: f64,
    pub(crate) peak_mib: f64,
    /// Milliseconds; of the open loop only.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// How often memory was asked for; with the feature `allocations` only.
    pub(crate) allocations: usize,
    /// What the side is set to.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) settings: String,
}

impl Measured {
    /// Seconds for a message.
    #[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub(crate) fn each(&self) -> f64 {
        self.seconds / self.count as f64
    }

    /// Processor seconds for a message.
    #[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub(crate) fn processor_each(&self) -> f64 {
        self.processor_seconds / self.count as f64
    }
}

/// Time and processor time since it was started.
pub(crate) struct Meter {
    begun: Instant,
    processor: Duration,
    allocations: usize,
}

impl Meter {
    pub(crate) fn start() -> Self {
        Self { begun: Instant::now(), processor: processor(), allocations: crate::allocations::count() }
    }

    pub(crate) fn stop(&self, count: usize, settings: &str) -> Measured {
        let seconds = self.begun.elapsed().as_secs_f64();
        let processor_seconds = processor().saturating_sub(self.processor).as_secs_f64();
        let allocations = crate::allocations::count() - self.allocations;
        let settings = settings.to_owned();
        Measured { count, seconds, processor_seconds, allocations, settings, ..Measured::default() }
    }
}

/// User and system time of this process.
fn processor() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The most memory that this process ever had resident.
pub(crate) fn peak_mib() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("the kernel tells no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib / 1_024.0)
}

/// What the messages of a measurement are made of, the same for both sides.
pub(crate) struct Source {
    pool: Bytes,
    size: usize,
    pub(crate) keys: Vec<Bytes>,
}

impl Source {
    pub(crate) fn new(size: usize) -> Self {
        // Text, so that SQS carries it as it is. A multiplicative generator: nothing repeats within a window of lz4.
        const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            LETTERS[(state >> 58) as usize]
        };
        let pool: Vec<u8> = (0..POOL.max(size * 2)).map(|_| next()).collect();
        let keys = (0..KEYS).map(|key| Bytes::from(format!("key-{key}"))).collect();
        Self { pool: pool.into(), size, keys }
    }

    /// The payload of a message: a part of the pool, without a copy.
    pub(crate) fn payload(&self, number: usize) -> Bytes {
        let start = self.start(number);
        self.pool.slice(start..start + self.size)
    }

    /// The same, borrowed.
    pub(crate) fn bytes(&self, number: usize) -> &[u8] {
        let start = self.start(number);
        &self.pool[start..start + self.size]
    }

    pub(crate) fn key(&self, number: usize) -> &Bytes {
        &self.keys[number % KEYS]
    }

    fn start(&self, number: usize) -> usize {
        let slots = self.pool.len() / self.size;
        number % slots * self.size
    }
}

/// Milliseconds of Unix time.
pub(crate) fn unix_millis() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}
