//! rdkafka at its best. Publishing: a producer with a delivery callback that counts, no future for a message. Consuming: one
//! thread that polls, reads each record in place, and stores its offset; nothing is copied or handed to another thread.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use parking_lot::Mutex;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::message::{Header, Headers, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{ClientConfig, ClientContext};

use crate::brokers::job::{Job, Measured, Meter, Source, Task, unix_millis};
use crate::brokers::open_loop::{Latencies, Schedule};

/// Nothing takes longer.
const LONGEST: Duration = Duration::from_secs(60);
/// How long the sender sleeps when the window is full.
const FULL: Duration = Duration::from_micros(200);

const PRODUCER: &[(&str, &str)] = &[
    ("acks", "all"),
    ("enable.idempotence", "true"),
    ("compression.type", "lz4"),
    ("linger.ms", "5"),
    ("partitioner", "murmur2_random"),
    ("message.max.bytes", "1065536"),
    ("queue.buffering.max.kbytes", "65536"),
];

const CONSUMER: &[(&str, &str)] = &[
    ("enable.auto.commit", "true"),
    ("auto.commit.interval.ms", "100"),
    ("enable.auto.offset.store", "false"),
    ("auto.offset.reset", "earliest"),
    ("isolation.level", "read_committed"),
    ("partition.assignment.strategy", "cooperative-sticky"),
    ("session.timeout.ms", "10000"),
    ("heartbeat.interval.ms", "500"),
    ("fetch.queue.backoff.ms", "10"),
    ("fetch.wait.max.ms", "100"),
    ("queued.max.messages.kbytes", "16384"),
];

pub(super) async fn measure(job: &Job) -> Result<Measured> {
    let job = job.clone();
    // The client has threads of its own; it blocks this one, not the runtime.
    tokio::task::spawn_blocking(move || match job.task {
        Task::Publish => publish(&job),
        Task::Consume => consume(&job),
        Task::Latency => tokio::runtime::Handle::current().block_on(latency(&job)),
    })
    .await?
}

fn config(job: &Job, settings: &[(&str, &str)]) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", job.host());
    for (key, value) in settings {
        config.set(*key, *value);
    }
    config
}

fn text(settings: &[(&str, &str)]) -> String {
    settings.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

#[derive(Default)]
struct Reports {
    count: AtomicUsize,
    has_failed: AtomicBool,
    /// In the open loop: when each message was due, by the number that it was sent with.
    latencies: Mutex<Option<(Schedule, Latencies)>>,
}

impl ClientContext for Reports {}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        if result.is_err() {
            self.has_failed.store(true, Ordering::Release);
        }
        // Not contended: only the thread that serves reports is here.
        if let Some((schedule, latencies)) = &mut *self.latencies.lock() {
            latencies.note(schedule.moment(number));
        }
        self.count.fetch_add(1, Ordering::AcqRel);
    }
}

/// An id of its own for each message, as the adapter's have.
fn headers() -> OwnedHeaders {
    let mut meta = [1; 17];
    meta[1..].copy_from_slice(uuid::Uuid::now_v7().as_bytes());
    OwnedHeaders::new_with_capacity(1).insert(Header { key: "anybroker-meta", value: Some(&meta[..]) })
}

struct Sender {
    producer: ThreadedProducer<Reports>,
    source: Source,
    topic: String,
}

impl Sender {
    /// Connected and with a producer id before the clock runs, as the adapter is.
    fn connect(job: &Job) -> Result<Self> {
        let producer = config(job, PRODUCER).create_with_context(Reports::default())?;
        let sender = Self { producer, source: Source::new(job.size), topic: job.physical.clone() };
        sender.send(0)?;
        sender.producer.flush(Duration::from_secs(20))?;
        sender.reports().count.store(0, Ordering::Release);
        Ok(sender)
    }

    fn reports(&self) -> &Reports {
        self.producer.context()
    }

    fn send(&self, number: usize) -> Result<()> {
        let record = BaseRecord::with_opaque_to(&self.topic, number)
            .key(&self.source.key(number)[..])
            .payload(self.source.bytes(number))
            .headers(headers())
            .timestamp(unix_millis());
        self.producer.send(record).map_err(|(error, _)| error)?;
        Ok(())
    }

    fn confirmed(&self) -> usize {
        self.reports().count.load(Ordering::Acquire)
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.reports().has_failed.load(Ordering::Acquire), "a message was not stored");
        Ok(())
    }
}

fn publish(job: &Job) -> Result<Measured> {
    let sender = Sender::connect(job)?;
    let meter = Meter::start();
    for number in 0..job.count {
        if number - sender.confirmed() >= job.window {
            // It opens by a batch of the adapter at least: one message at a time makes small requests.
            while number - sender.confirmed() > job.window - job.batch {
                std::thread::sleep(FULL);
            }
        }
        sender.send(number)?;
    }
    while sender.confirmed() < job.count {
        std::thread::sleep(FULL);
    }
    sender.check()?;
    Ok(meter.stop(job.count, &format!("{}; {} on their way; a delivery callback counts", text(PRODUCER), job.window)))
}

fn consume(job: &Job) -> Result<Measured> {
    let mut config = config(job, CONSUMER);
    let consumer: BaseConsumer = config.set("group.id", &job.physical_group).create()?;
    consumer.subscribe(&[&job.physical])?;
    let (mut meter, mut count, mut bytes, begun) = (None, 0, 0, Instant::now());
    while count < job.count {
        // A poll that served a rebalance brings nothing.
        let Some(record) = consumer.poll(Duration::from_millis(100)) else {
            ensure!(begun.elapsed() < LONGEST, "{count} messages came");
            continue;
        };
        let record = record?;
        meter.get_or_insert_with(Meter::start);
        bytes += record.payload().map_or(0, <[u8]>::len);
        let id = record.headers().and_then(|headers| headers.iter().find(|header| header.key == "anybroker-meta"));
        std::hint::black_box((id.and_then(|header| header.value), record.key()));
        consumer.store_offset_from_message(&record)?;
        count += 1;
    }
    ensure!(bytes == job.count * job.size, "{bytes} bytes came");
    consumer.commit_consumer_state(CommitMode::Sync)?;
    drop(consumer);
    let settings = format!("{}; polled by one thread, records read in place", text(CONSUMER));
    Ok(meter.context("nothing came")?.stop(job.count, &settings))
}

async fn latency(job: &Job) -> Result<Measured> {
    let sender = Sender::connect(job)?;
    let meter = Meter::start();
    let mut schedule = Schedule::new(job);
    *sender.reports().latencies.lock() = Some((schedule.clone(), Latencies::new()));
    while let Some(numbers) = schedule.due().await {
        numbers.into_iter().try_for_each(|number| sender.send(number))?;
    }
    while sender.confirmed() < schedule.total() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    sender.check()?;
    let measured = meter.stop(schedule.total(), &format!("{}; a delivery callback notes the time", text(PRODUCER)));
    let noted = sender.reports().latencies.lock().take();
    let (_, latencies) = noted.context("the latencies are here")?;
    Ok(latencies.into(measured))
}
