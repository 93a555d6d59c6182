//! Publishing at a fixed rate, whatever the answers do. A message's time begins when it is due, not when it is sent: a
//! stall counts for everything that was due in it.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use tokio::sync::mpsc;

use super::job::{Job, Measured, Meter};

/// How often is looked what is due.
const STEP: Duration = Duration::from_millis(1);

/// When the messages of a loop are due.
#[derive(Clone)]
pub(crate) struct Schedule {
    begun: Instant,
    rate: f64,
    sent: usize,
    total: usize,
}

impl Schedule {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates and seconds are small")]
    pub(crate) fn new(job: &Job) -> Self {
        Self { begun: Instant::now(), rate: job.rate, sent: 0, total: (job.rate * job.seconds) as usize }
    }

    /// The messages that are due by now and were not sent; waits until there are some. `None` at the end.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates and seconds are small")]
    pub(crate) async fn due(&mut self) -> Option<std::ops::Range<usize>> {
        loop {
            if self.sent == self.total {
                return None;
            }
            let due = ((self.begun.elapsed().as_secs_f64() * self.rate) as usize).min(self.total);
            if due > self.sent {
                let first = std::mem::replace(&mut self.sent, due);
                return Some(first..due);
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// When a message was due.
    #[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub(crate) fn moment(&self, number: usize) -> Instant {
        self.begun + Duration::from_secs_f64(number as f64 / self.rate)
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }
}

/// Notes latencies, in microseconds.
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, 120_000_000, 3).expect("sound bounds"))
    }

    pub(crate) fn note(&mut self, due: Instant) {
        self.0.saturating_record(u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX));
    }

    #[allow(clippy::cast_precision_loss, reason = "latencies are far below 2^52 µs")]
    pub(crate) fn into(self, mut measured: Measured) -> Measured {
        let millis = |quantile| self.0.value_at_quantile(quantile) as f64 / 1_000.0;
        (measured.p50, measured.p99) = (millis(0.5), millis(0.99));
        measured
    }
}

/// Runs a loop. `send` hands the messages of a range over and answers, for each of its futures, the numbers that it
/// confirms. Confirms are awaited in order, which is the order in which they come.
pub(crate) async fn run<F, S>(job: &Job, settings: &str, mut send: S) -> Result<Measured>
where
    F: Future<Output = Result<()>> + Send + 'static,
    S: AsyncFnMut(std::ops::Range<usize>) -> Result<Vec<(std::ops::Range<usize>, F)>>,
{
    let meter = Meter::start();
    let mut schedule = Schedule::new(job);
    let total = schedule.total();
    let (confirms, mut incoming) = mpsc::unbounded_channel::<(Vec<Instant>, F)>();
    let noting = tokio::spawn(async move {
        let mut latencies = Latencies::new();
        while let Some((due, confirm)) = incoming.recv().await {
            confirm.await?;
            due.into_iter().for_each(|due| latencies.note(due));
        }
        Ok::<_, anyhow::Error>(latencies)
    });
    while let Some(range) = schedule.due().await {
        for (numbers, confirm) in send(range).await? {
            let due = numbers.map(|number| schedule.moment(number)).collect();
            // When noting has failed, it says so below.
            let _ = confirms.send((due, confirm));
        }
    }
    drop(confirms);
    let latencies = noting.await??;
    Ok(latencies.into(meter.stop(total, settings)))
}
