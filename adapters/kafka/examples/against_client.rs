//! What the adapter costs over its own client: rdkafka at its best (enqueue now, confirm later) and the adapter, in turns,
//! in one run, with the same settings and the same bytes on the wire.
//!
//! ```text
//! eval "$(cargo xtask brokers up kafka)"
//! cargo run --release -p anybroker-kafka --example against_client
//! ```
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anybroker_core::{Bus, Config, Message, MessageId, PublishOptions, Registry, ack};
use anybroker_kafka::KafkaDriver;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::message::{Header, Message as _, OwnedHeaders};
use rdkafka::producer::{
    BaseRecord, DeliveryResult, FutureProducer, FutureRecord, Producer, ProducerContext, ThreadedProducer,
};
use rdkafka::{ClientConfig, ClientContext};

const MESSAGES: usize = 1_000_000;
const WINDOW: usize = 10_000;
const BATCH: usize = 100;
const ROUNDS: usize = 4;
const KEYS: usize = 1_000;
const PAYLOAD: [u8; 256] = [7; 256];

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let url = std::env::var("ANYBROKER_TEST_KAFKA_URL").unwrap();
    let hosts = url.trim_start_matches("kafka://").to_owned();
    let bus = Registry::new().with(KafkaDriver).connect(Config::from_url(format!("{url}?partitions=1"))).await.unwrap();
    let keys: Vec<String> = (0..KEYS).map(|key| format!("key-{key}")).collect();
    let mut figures: [Vec<Figure>; 5] = Default::default();
    for round in 0..=ROUNDS {
        let topic = format!("bench.{}", MessageId::new());
        bus.declare(&anybroker_core::TopologySpec::destination(topic.as_str())).await.unwrap();
        // In turns, because a fresh topic costs whoever comes first.
        let mut adapter = None;
        if round % 2 == 0 {
            adapter = Some(publish_adapter(&bus, &topic, &keys).await);
        }
        let client = publish_client(&hosts, &topic, &keys);
        let futures = publish_futures(&hosts, &topic, &keys).await;
        let adapter = match adapter {
            Some(figure) => figure,
            None => publish_adapter(&bus, &topic, &keys).await,
        };
        let runs = [client, futures, adapter, consume_client(&hosts, &topic), consume_adapter(&bus, &topic).await];
        bus.delete(topic.as_str(), None).await.unwrap();
        // The first round warms up.
        if round > 0 {
            figures.iter_mut().zip(runs).for_each(|(figures, figure)| figures.push(figure));
        }
    }
    let names = ["publish, client, reports counted", "publish, client, a future each", "publish, adapter"];
    let names = names.into_iter().chain(["consume, client", "consume, adapter"]);
    for (name, figures) in names.zip(&figures) {
        println!("{name}: {} msg/s, {} CPU us/msg", spread(figures, |it| it.0), spread(figures, |it| it.1));
    }
    for (name, client, adapter) in [("publish", 0, 2), ("publish (futures)", 1, 2), ("consume", 3, 4)] {
        let pairs: Vec<Figure> =
            figures[adapter].iter().zip(&figures[client]).map(|(it, other)| (it.0 / other.0, it.1 / other.1)).collect();
        let (speed, cpu) = (spread(&pairs, |it| it.0), spread(&pairs, |it| it.1));
        println!("{name}, adapter / client within a round: speed {speed}, CPU {cpu}");
    }
}

/// Messages a second, and microseconds of this process's processor time for a message.
type Figure = (f64, f64);

/// Median, least and most.
fn spread(figures: &[Figure], of: impl Fn(&Figure) -> f64) -> String {
    let mut sorted: Vec<f64> = figures.iter().map(of).collect();
    sorted.sort_by(f64::total_cmp);
    let text = |figure: f64| if figure < 100.0 { format!("{figure:.2}") } else { format!("{figure:.0}") };
    format!("{} ({} to {})", text(sorted[sorted.len() / 2]), text(sorted[0]), text(sorted[sorted.len() - 1]))
}

struct Meter(Instant, Duration);

impl Meter {
    fn start() -> Self {
        Self(Instant::now(), Self::processor_time())
    }

    #[allow(clippy::cast_precision_loss)]
    fn figure(&self) -> Figure {
        let (took, cpu) = (self.0.elapsed(), Self::processor_time() - self.1);
        (MESSAGES as f64 / took.as_secs_f64(), cpu.as_secs_f64() * 1e6 / MESSAGES as f64)
    }

    /// User and system time of all threads, in ticks of 10 ms.
    fn processor_time() -> Duration {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }
}

fn producer_settings(hosts: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", hosts)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("compression.type", "lz4")
        .set("linger.ms", "5")
        .set("partitioner", "murmur2_random")
        .set("queue.buffering.max.kbytes", "65536");
    config
}

/// An id of its own for each message, as the adapter's have.
fn headers() -> OwnedHeaders {
    let mut meta = [1; 17];
    meta[1..].copy_from_slice(MessageId::new().as_uuid().unwrap().as_bytes());
    OwnedHeaders::new_with_capacity(1).insert(Header { key: "anybroker-meta", value: Some(&meta[..]) })
}

fn now() -> i64 {
    anybroker_core::Timestamp::now().as_millis()
}

#[derive(Default)]
struct Count(AtomicUsize);

impl ClientContext for Count {}

impl ProducerContext for Count {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        assert!(result.is_ok());
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// The cheapest that the client can do: which message was reported is not asked.
fn publish_client(hosts: &str, topic: &str, keys: &[String]) -> Figure {
    let producer: ThreadedProducer<Count> = producer_settings(hosts).create_with_context(Count::default()).unwrap();
    // Connected and with a producer id before the clock runs, as the adapter is.
    producer.send(BaseRecord::to(topic).key("k").payload("first")).map_err(|(error, _)| error).unwrap();
    producer.flush(Duration::from_secs(10)).unwrap();
    producer.context().0.store(0, Ordering::Release);
    let meter = Meter::start();
    for number in 0..MESSAGES {
        while number - producer.context().0.load(Ordering::Acquire) >= WINDOW {
            std::thread::sleep(Duration::from_micros(200));
        }
        let record =
            BaseRecord::to(topic).key(&keys[number % KEYS]).payload(&PAYLOAD[..]).headers(headers()).timestamp(now());
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    while producer.context().0.load(Ordering::Acquire) < MESSAGES {
        std::thread::sleep(Duration::from_micros(200));
    }
    meter.figure()
}

async fn publish_futures(hosts: &str, topic: &str, keys: &[String]) -> Figure {
    let producer: FutureProducer = producer_settings(hosts).create().unwrap();
    producer.send(FutureRecord::to(topic).key("k").payload("first"), Duration::from_secs(10)).await.unwrap();
    let meter = Meter::start();
    let mut waiting = VecDeque::with_capacity(WINDOW);
    for number in 0..MESSAGES {
        if waiting.len() == WINDOW {
            let confirm: rdkafka::producer::DeliveryFuture = waiting.pop_front().unwrap();
            confirm.await.unwrap().unwrap();
        }
        let record =
            FutureRecord::to(topic).key(&keys[number % KEYS]).payload(&PAYLOAD[..]).headers(headers()).timestamp(now());
        waiting.push_back(producer.send_result(record).map_err(|(error, _)| error).unwrap());
    }
    for confirm in waiting {
        confirm.await.unwrap().unwrap();
    }
    meter.figure()
}

async fn publish_adapter(bus: &Bus, topic: &str, keys: &[String]) -> Figure {
    let destination = anybroker_core::Destination::from(topic);
    let keys: Vec<anybroker_core::Bytes> = keys.iter().map(|key| key.clone().into()).collect();
    assert!(bus.send(Message::new(destination.clone(), "first")).await.is_ok());
    let payload = anybroker_core::Bytes::from_static(&PAYLOAD);
    let meter = Meter::start();
    let mut waiting = VecDeque::with_capacity(WINDOW / BATCH);
    for batch in 0..MESSAGES / BATCH {
        if waiting.len() == WINDOW / BATCH {
            let confirms: anybroker_core::Confirms = waiting.pop_front().unwrap();
            assert!(confirms.await.iter().all(Result::is_ok));
        }
        let messages = (0..BATCH)
            .map(|entry| {
                let key = keys[(batch * BATCH + entry) % KEYS].clone();
                Message::new(destination.clone(), payload.clone()).with_key(key)
            })
            .collect();
        waiting.push_back(bus.submit(messages, &PublishOptions::default()).await);
    }
    for confirms in waiting {
        assert!(confirms.await.iter().all(Result::is_ok));
    }
    meter.figure()
}

/// Reads the first of what was published.
fn consume_client(hosts: &str, topic: &str) -> Figure {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", hosts)
        .set("group.id", format!("{topic}-client"))
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "100")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed")
        .set("fetch.queue.backoff.ms", "10")
        .set("queued.max.messages.kbytes", "16384")
        .create()
        .unwrap();
    consumer.subscribe(&[topic]).unwrap();
    let (mut start, mut count, mut bytes) = (None, 0, 0);
    while count < MESSAGES {
        let Some(record) = consumer.poll(Duration::from_millis(100)) else { continue };
        let record = record.unwrap();
        start.get_or_insert_with(Meter::start);
        // The message outlives the poll, as the adapter's does.
        bytes += record.detach().payload().unwrap().len();
        consumer.store_offset_from_message(&record).unwrap();
        count += 1;
    }
    assert!(bytes > (MESSAGES - ROUNDS) * PAYLOAD.len());
    consumer.commit_consumer_state(CommitMode::Sync).unwrap();
    start.unwrap().figure()
}

async fn consume_adapter(bus: &Bus, topic: &str) -> Figure {
    let mut subscriber = bus.subscribe(bus.subscription(topic, "adapter").with_max_in_flight(10_000)).await.unwrap();
    let (mut start, mut count, mut bytes) = (None, 0, 0);
    while count < MESSAGES {
        let deliveries = subscriber.receive(500, Duration::from_secs(10)).await.unwrap();
        start.get_or_insert_with(Meter::start);
        count += deliveries.len();
        bytes += deliveries.iter().map(|delivery| delivery.message().bytes().len()).sum::<usize>();
        assert!(ack(deliveries).await.iter().all(Result::is_ok));
    }
    assert!(bytes > (count - ROUNDS) * PAYLOAD.len());
    subscriber.close(Duration::from_secs(10)).await.unwrap();
    start.unwrap().figure()
}
