//! The scenario that the memory broker must stand: 256 B payloads, 1,000 keys, 4 headers, two groups, leases on, batches
//! of 100, on one core; by hand, and through the worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anybroker_core::{Bus, Destination, Order};
use anybroker_memory::Memory;
use anybroker_worker::{Context, HandlerOptions, Outcome, Worker, handler_with};

use crate::allocations;
use crate::report::{Report, Row};
use crate::rows::{Source, median, receive_and_ack, sorted};

const MESSAGES: usize = 500_000;
const DELIVERIES: usize = MESSAGES * GROUPS.len();
const ROUNDS: usize = 5;
const BATCH: usize = 100;
const GROUPS: [&str; 2] = ["billing", "shipping"];
/// How far the publisher runs ahead of the worker.
const AHEAD: usize = 2_000;

/// Measures both, without order and with order per key, interleaved.
pub async fn run(report: &mut Report) {
    let orders = [("no order", Order::None), ("order per key", Order::Key)];
    let mut rows = Vec::new();
    for (label, order) in orders {
        for (way, worker) in [("by hand", false), ("worker", true)] {
            let name = format!("memory headline {way}, {label}");
            if report.wants(&name) {
                rows.push((name, order, worker, Vec::new()));
            }
        }
    }
    for _ in 0..ROUNDS {
        for (_, order, worker, runs) in &mut rows {
            runs.push(if *worker { through_worker(*order).await } else { by_hand(*order).await });
        }
    }
    for (name, _, _, runs) in rows {
        report.row("settled deliveries per second on one core, two groups", &name, &summary(&runs));
    }
}

/// One run of the scenario. Making the messages is in the time, and its allocations stand apart.
#[derive(Debug, Default)]
struct Run {
    wall: Duration,
    processor: Duration,
    making: usize,
    moving: usize,
}

/// The time since the scenario began.
struct Begun(Instant, Duration);

impl Begun {
    fn now() -> Self {
        Self(Instant::now(), allocations::processor())
    }

    fn end(self, making: usize, moving: usize) -> Run {
        Run { wall: self.0.elapsed(), processor: allocations::processor().saturating_sub(self.1), making, moving }
    }
}

async fn by_hand(order: Order) -> Run {
    let bus = Memory::new().bus();
    let destination = Destination::from("orders");
    let mut subscribers = Vec::new();
    for group in GROUPS {
        let spec = bus.subscription(&destination, group).with_order(order);
        subscribers.push(bus.subscribe(spec).await.expect("a fresh broker"));
    }
    let mut source = Source::new(256);
    let (begun, mut making, start) = (Begun::now(), 0, allocations::count());
    for _ in 0..MESSAGES / BATCH {
        making += publish(&bus, &mut source, &destination).await;
        for subscriber in &mut subscribers {
            assert_eq!(receive_and_ack(subscriber, BATCH).await, BATCH, "a batch is there at once");
        }
    }
    begun.end(making, allocations::count() - start - making)
}

async fn count(handled: &Arc<AtomicUsize>, _: &Context) -> Outcome {
    handled.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

async fn through_worker(order: Order) -> Run {
    let bus = Memory::new().bus();
    let destination = Destination::from("orders");
    let handled = Arc::new(AtomicUsize::new(0));
    let mut worker = Worker::new(bus.clone());
    for group in GROUPS {
        let options = HandlerOptions::new(bus.subscription(&destination, group).with_order(order)).with_batch(BATCH);
        worker = worker.handle(options, handler_with(Arc::clone(&handled), count));
    }
    let shutdown = worker.shutdown_handle();
    let worker = tokio::spawn(worker.run_until(std::future::pending()));
    // The groups exist once everything has started.
    while bus.describe(&destination).await.map_or(0, |found| found.groups.len()) < GROUPS.len() {
        tokio::task::yield_now().await;
    }
    let mut source = Source::new(256);
    let (begun, mut making, start) = (Begun::now(), 0, allocations::count());
    for batch in 1..=MESSAGES / BATCH {
        making += publish(&bus, &mut source, &destination).await;
        while batch * BATCH * GROUPS.len() > handled.load(Ordering::Relaxed) + AHEAD {
            tokio::task::yield_now().await;
        }
    }
    while handled.load(Ordering::Relaxed) < DELIVERIES {
        tokio::task::yield_now().await;
    }
    for group in GROUPS {
        while bus.lag(&destination, group).await.expect("the group is there").total() != Some(0) {
            tokio::task::yield_now().await;
        }
    }
    let run = begun.end(making, allocations::count() - start - making);
    shutdown.drain();
    worker.await.expect("no panic").expect("a worker that drained");
    run
}

/// Publishes a batch; tells how many allocations making it took.
async fn publish(bus: &Bus, source: &mut Source, destination: &Destination) -> usize {
    let before = allocations::count();
    let batch = source.batch(destination, BATCH);
    let making = allocations::count() - before;
    let outcomes = bus.publish(batch).await;
    assert!(outcomes.iter().all(Result::is_ok), "publishing failed");
    making
}

#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn summary(runs: &[Run]) -> Row {
    let deliveries = DELIVERIES as f64;
    let per_message = |count: fn(&Run) -> usize| median(runs.iter().map(|run| count(run) as f64 / MESSAGES as f64));
    let wall = sorted(runs.iter().map(|run| deliveries / run.wall.as_secs_f64()));
    Row::default()
        .rate("settled/s", wall[wall.len() / 2])
        .text("min–max", format!("{:.2}M–{:.2}M", wall[0] / 1e6, wall[wall.len() - 1] / 1e6))
        .rate("per CPU s", median(runs.iter().map(|run| deliveries / run.processor.as_secs_f64())))
        .number("alloc/msg", per_message(|run| run.moving))
        .number("making it", per_message(|run| run.making))
}
