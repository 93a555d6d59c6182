//! The rows that every adapter has: publish, and receive with ack, in two sizes and four batch sizes, beside something
//! bare that does the same work.

use std::time::{Duration, Instant};

use anybroker_core::{Bus, Delivery, Headers, Message, Subscriber};
use bytes::Bytes;
use hdrhistogram::Histogram;

use crate::allocations;
use crate::report::{Report, Row};

/// How many keys messages are spread over.
pub const KEYS: usize = 1_000;
const ROUNDS: usize = 5;
const SIZES: [(&str, usize); 2] = [("256 B", 256), ("16 KiB", 16 * 1024)];
const BATCHES: [usize; 4] = [1, 10, 100, 1_000];

/// Something bare that moves the same messages: what a service would write by hand.
#[allow(async_fn_in_trait, reason = "used in this crate, on one thread")]
pub trait Bare {
    /// Stores a batch.
    async fn publish(&mut self, batch: Vec<Message>);
    /// Takes up to `max` and settles them; tells how many.
    async fn receive_and_settle(&mut self, max: usize) -> usize;
}

/// Where messages of a benchmark come from: parts that are made once and shared, so that making a message costs the
/// library's work and not the caller's.
#[derive(Debug)]
pub struct Source {
    payload: Bytes,
    keys: Vec<Bytes>,
    next: usize,
}

impl Source {
    /// Messages with a payload of `size` bytes.
    #[must_use]
    pub fn new(size: usize) -> Self {
        let keys = (0..KEYS).map(|key| Bytes::from(format!("customer-{key:05}"))).collect();
        Self { payload: Bytes::from(vec![0x5a; size]), keys, next: 0 }
    }

    /// A message with id, key and four headers, as a service makes it.
    pub fn message(&mut self, destination: &anybroker_core::Destination) -> Message {
        self.next = (self.next + 1) % KEYS;
        let mut headers = Headers::with_capacity(160);
        headers
            .append("content-encoding", "identity")
            .append("tenant", "acme")
            .append("schema-version", "3")
            .append("correlation-id", "0191e2b4-0000-7000-8000-000000000000");
        Message::new(destination, self.payload.clone()).with_key(self.keys[self.next].clone()).with_headers(headers)
    }

    /// A batch of such messages.
    pub fn batch(&mut self, destination: &anybroker_core::Destination, size: usize) -> Vec<Message> {
        (0..size).map(|_| self.message(destination)).collect()
    }
}

/// How much work a round is: enough to last, little enough for memory.
fn work(size: usize, batch: usize, slow: usize) -> usize {
    let messages = if size > 1024 { 20_000 } else { 100_000 };
    (messages / slow).max(batch * 10).div_ceil(batch) * batch
}

struct Measured {
    took: Duration,
    calls: Histogram<u64>,
    allocations: usize,
    peak: usize,
}

impl Measured {
    fn new() -> Self {
        let calls = Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds are valid");
        Self { took: Duration::ZERO, calls, allocations: 0, peak: 0 }
    }

    async fn call<R>(&mut self, call: impl Future<Output = R>) -> R {
        let allocations = allocations::count();
        let start = Instant::now();
        let answer = call.await;
        let took = start.elapsed();
        self.allocations += allocations::count() - allocations;
        self.peak = self.peak.max(allocations::bytes());
        self.took += took;
        self.calls.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        answer
    }
}

/// Measures all rows of one adapter. `slow` divides the number of messages; `open` gives a fresh endpoint, `bare` what
/// stands beside it.
pub async fn run<B: Bare>(
    report: &mut Report,
    adapter: &str,
    slow: usize,
    mut open: impl AsyncFnMut() -> Bus,
    mut bare: impl AsyncFnMut() -> B,
) {
    for verb in ["publish", "receive+ack"] {
        for (label, size) in SIZES {
            for batch in BATCHES {
                let name = format!("{adapter} {verb} {label} x{batch}");
                if !report.wants(&name) {
                    continue;
                }
                let count = work(size, batch, slow);
                let mut ours = Vec::new();
                let mut theirs = Vec::new();
                for round in 0..=ROUNDS {
                    let (one, other) = if round % 2 == 0 {
                        let one = self::ours(&open().await, verb, size, batch, count).await;
                        (one, self::theirs(&mut bare().await, verb, size, batch, count).await)
                    } else {
                        let other = self::theirs(&mut bare().await, verb, size, batch, count).await;
                        (self::ours(&open().await, verb, size, batch, count).await, other)
                    };
                    // The first round warms up.
                    if round > 0 {
                        ours.push(one);
                        theirs.push(other);
                    }
                }
                report.row(&format!("{adapter}, messages per second"), &name, &summary(&ours, &theirs, count));
            }
        }
    }
}

async fn ours(bus: &Bus, verb: &str, size: usize, batch: usize, count: usize) -> Measured {
    let destination = "orders".into();
    let mut subscriber = bus.subscribe(bus.subscription(&destination, "bench")).await.expect("a fresh endpoint");
    let (mut publish, mut settle) = (Measured::new(), Measured::new());
    let mut source = Source::new(size);
    for _ in 0..count / batch {
        let messages = source.batch(&destination, batch);
        let outcomes = publish.call(bus.publish(messages)).await;
        assert!(outcomes.iter().all(Result::is_ok), "publishing failed");
    }
    let mut left = count;
    while left > 0 {
        left -= settle.call(receive_and_ack(&mut subscriber, batch)).await;
    }
    bus.close(Duration::from_secs(5)).await.expect("nothing is on its way");
    if verb == "publish" { publish } else { settle }
}

async fn theirs(bare: &mut impl Bare, verb: &str, size: usize, batch: usize, count: usize) -> Measured {
    let destination = "orders".into();
    let (mut publish, mut settle) = (Measured::new(), Measured::new());
    let mut source = Source::new(size);
    for _ in 0..count / batch {
        let messages = source.batch(&destination, batch);
        publish.call(bare.publish(messages)).await;
    }
    let mut left = count;
    while left > 0 {
        left -= settle.call(bare.receive_and_settle(batch)).await;
    }
    if verb == "publish" { publish } else { settle }
}

/// Receives up to `max`, acks them, and tells how many.
pub async fn receive_and_ack(subscriber: &mut Subscriber, max: usize) -> usize {
    let deliveries: Vec<Delivery> = subscriber.receive(max, Duration::from_secs(60)).await.expect("an open endpoint");
    assert!(!deliveries.is_empty(), "messages are missing");
    let count = deliveries.len();
    let outcomes = anybroker_core::ack(deliveries).await;
    assert!(outcomes.iter().all(Result::is_ok), "an ack failed");
    count
}

#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn summary(ours: &[Measured], theirs: &[Measured], count: usize) -> Row {
    let rate = |measured: &Measured| count as f64 / measured.took.as_secs_f64();
    let ratios = sorted(ours.iter().zip(theirs).map(|(one, other)| rate(one) / rate(other)));
    let mut calls = Measured::new().calls;
    ours.iter().for_each(|one| calls.add(&one.calls).expect("the same bounds"));
    let per_message = |all: &[Measured]| median(all.iter().map(|one| one.allocations as f64 / count as f64));
    Row::default()
        .rate("msg/s", median(ours.iter().map(rate)))
        .rate("bare", median(theirs.iter().map(rate)))
        .number("ratio", ratios[ratios.len() / 2])
        .text("min–max", format!("{:.2}–{:.2}", ratios[0], ratios[ratios.len() - 1]))
        .micros("p50 µs/call", calls.value_at_quantile(0.5))
        .micros("p99 µs/call", calls.value_at_quantile(0.99))
        .number("alloc/msg", per_message(ours))
        .number("bare alloc", per_message(theirs))
        .mebibytes("peak MiB", median(ours.iter().map(|one| one.peak as f64)))
}

/// The figures, smallest first.
pub fn sorted(figures: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures
}

/// The middle one.
pub fn median(figures: impl Iterator<Item = f64>) -> f64 {
    let figures = sorted(figures);
    figures[figures.len() / 2]
}
