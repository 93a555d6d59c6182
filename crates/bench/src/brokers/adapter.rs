//! The adapter's side, the same for every broker: what a service does, through the facade's handle.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{Bus, Config, Confirms, Destination, Message, PublishOptions, Registry, ack};
use anybroker_worker::{Context, HandlerOptions, Outcome, Worker, handler_with};
use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;

use super::job::{Job, Measured, Meter, Source};
use super::open_loop;

const WAIT: Duration = Duration::from_secs(20);

/// Connects to the endpoint.
pub(crate) async fn connect(url: &str) -> Result<Bus> {
    let registry = Registry::new();
    #[cfg(feature = "kafka")]
    let registry = registry.with(anybroker_kafka::KafkaDriver);
    #[cfg(feature = "nats")]
    let registry = registry.with(anybroker_nats::NatsDriver);
    #[cfg(feature = "pulsar")]
    let registry = registry.with(anybroker_pulsar::PulsarDriver);
    #[cfg(feature = "rabbitmq")]
    let registry = registry.with(anybroker_rabbitmq::RabbitDriver);
    #[cfg(feature = "sqs")]
    let registry = registry.with(anybroker_sqs::SqsDriver);
    Ok(registry.connect(Config::from_url(url)).await?)
}

struct Maker {
    source: Source,
    destination: Destination,
}

impl Maker {
    fn new(job: &Job) -> Self {
        Self { source: Source::new(job.size), destination: Destination::from(job.destination.as_str()) }
    }

    fn batch(&self, numbers: std::ops::Range<usize>) -> Vec<Message> {
        let message = |number| {
            let message = Message::new(self.destination.clone(), self.source.payload(number));
            message.with_key(self.source.key(number).clone())
        };
        numbers.map(message).collect()
    }
}

async fn stored(confirms: Confirms) -> Result<()> {
    for outcome in confirms.await {
        outcome?;
    }
    Ok(())
}

pub(crate) async fn publish(job: &Job) -> Result<Measured> {
    let bus = connect(&job.url).await?;
    let maker = Maker::new(job);
    let options = PublishOptions::default();
    let batches = job.window / job.batch;
    // The first publish looks the destination up and opens what it needs; so does the bare client's.
    stored(bus.submit(maker.batch(0..1), &options).await).await?;
    let meter = Meter::start();
    let mut waiting: VecDeque<Confirms> = VecDeque::with_capacity(batches);
    for batch in 0..job.count / job.batch {
        if waiting.len() == batches
            && let Some(confirms) = waiting.pop_front()
        {
            stored(confirms).await?;
        }
        let messages = maker.batch(batch * job.batch..(batch + 1) * job.batch);
        waiting.push_back(bus.submit(messages, &options).await);
    }
    for confirms in waiting {
        stored(confirms).await?;
    }
    let measured = meter.stop(job.count, &settings(job));
    bus.broker().close(WAIT).await?;
    Ok(measured)
}

pub(crate) async fn consume(job: &Job) -> Result<Measured> {
    let bus = connect(&job.url).await?;
    let spec = bus.subscription(job.destination.as_str(), job.group.as_str()).with_max_in_flight(job.in_flight);
    let mut subscriber = bus.subscribe(spec).await?;
    let mut settling = FuturesUnordered::new();
    let (mut meter, mut received, mut acked, mut bytes) = (None, 0, 0, 0);
    while acked < job.count {
        tokio::select! {
            biased;
            Some(outcomes) = settling.next(), if !settling.is_empty() => {
                let outcomes: Vec<anybroker_core::SettleOutcome> = outcomes;
                acked += outcomes.len();
                outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))?;
            }
            deliveries = subscriber.receive(job.batch, WAIT), if received < job.count => {
                let deliveries = deliveries?;
                ensure!(!deliveries.is_empty(), "{received} of {} messages came", job.count);
                meter.get_or_insert_with(Meter::start);
                received += deliveries.len();
                for delivery in &deliveries {
                    let message = delivery.message();
                    bytes += message.bytes().len();
                    std::hint::black_box((message.id(), message.key()));
                }
                settling.push(ack(deliveries));
            }
        }
    }
    ensure!(bytes == job.count * job.size, "{bytes} bytes came");
    let meter = meter.context("nothing came")?;
    if super::plan::acks_are_confirmed(&job.broker) {
        let measured = meter.stop(job.count, &settings(job));
        subscriber.close(WAIT).await?;
        return Ok(measured);
    }
    // The last acks are safe when the subscription is closed.
    subscriber.close(WAIT).await?;
    Ok(meter.stop(job.count, &settings(job)))
}

struct Handled {
    count: AtomicUsize,
    first: Notify,
}

async fn handle(handled: &Arc<Handled>, context: &Context) -> Outcome {
    std::hint::black_box((context.message().id(), context.message().key()));
    if handled.count.fetch_add(1, Ordering::AcqRel) == 0 {
        handled.first.notify_one();
    }
    Ok(())
}

/// Consumes through a worker; from the first message handled until the worker has drained.
pub(crate) async fn work(job: &Job) -> Result<Measured> {
    let bus = connect(&job.url).await?;
    let spec = bus.subscription(job.destination.as_str(), job.group.as_str()).with_max_in_flight(job.in_flight);
    let handled = Arc::new(Handled { count: AtomicUsize::new(0), first: Notify::new() });
    let options = HandlerOptions::new(spec).with_batch(job.batch);
    let worker = Worker::new(bus.clone()).handle(options, handler_with(Arc::clone(&handled), handle));
    let shutdown = worker.shutdown_handle();
    let worker = tokio::spawn(worker.run_until(std::future::pending()));
    tokio::time::timeout(WAIT, handled.first.notified()).await.context("nothing came")?;
    let meter = Meter::start();
    while handled.count.load(Ordering::Acquire) < job.count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    shutdown.drain();
    worker.await??;
    Ok(meter.stop(job.count, &settings(job)))
}

pub(crate) async fn latency(job: &Job) -> Result<Measured> {
    let bus = connect(&job.url).await?;
    let maker = Maker::new(job);
    let options = PublishOptions::default();
    stored(bus.submit(maker.batch(0..1), &options).await).await?;
    open_loop::run(job, &settings(job), async |numbers| {
        let messages = maker.batch(numbers.clone());
        Ok(vec![(numbers, stored(bus.submit(messages, &options).await))])
    })
    .await
}

fn settings(job: &Job) -> String {
    let Job { batch, window, in_flight, .. } = job;
    format!("defaults; batches of {batch}, {window} on their way, max_in_flight {in_flight}")
}
