//! The pulsar crate as it can be set: a producer without batches, as the adapter has it, whose receipts are awaited in order;
//! a consumer on a shared subscription that acks each message. It cannot ask the broker to confirm acks.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt;
use pulsar::consumer::ConsumerOptions;
use pulsar::producer::{Message, SendFuture};
use pulsar::{Consumer, Producer, ProducerOptions, Pulsar, SubType, TokioExecutor};

use crate::brokers::job::{Job, Measured, Meter, Source, Task, unix_millis};
use crate::brokers::open_loop;

const META: &str = "anybroker-meta";

pub(super) async fn measure(job: &Job) -> Result<Measured> {
    let url = format!("pulsar://{}", job.host());
    // The default of 100 makes a full channel an error.
    let client =
        Pulsar::builder(url, TokioExecutor).with_outbound_channel_size(job.window.max(1_000) * 4).build().await?;
    match job.task {
        Task::Publish => publish(job, &client).await,
        Task::Consume => consume(job, &client).await,
        Task::Latency => latency(job, &client).await,
    }
}

struct Sender {
    producer: Producer<TokioExecutor>,
    source: Source,
}

impl Sender {
    async fn new(job: &Job, client: &Pulsar<TokioExecutor>) -> Result<Self> {
        let options = ProducerOptions { block_queue_if_full: true, ..ProducerOptions::default() };
        let producer = client.producer().with_topic(&job.physical).with_options(options).build().await?;
        let mut sender = Self { producer, source: Source::new(job.size) };
        sender.send(0).await?.await?;
        Ok(sender)
    }

    async fn send(&mut self, number: usize) -> Result<SendFuture> {
        let now = unix_millis();
        let meta = format!("4 {now} {}", uuid::Uuid::now_v7());
        let message = Message {
            payload: self.source.bytes(number).to_vec(),
            properties: HashMap::from([(META.to_owned(), meta)]),
            partition_key: Some(String::from_utf8_lossy(self.source.key(number)).into_owned()),
            event_time: Some(now.unsigned_abs()),
            ..Message::default()
        };
        Ok(self.producer.send_non_blocking(message).await?)
    }
}

async fn publish(job: &Job, client: &Pulsar<TokioExecutor>) -> Result<Measured> {
    let mut sender = Sender::new(job, client).await?;
    let meter = Meter::start();
    let mut waiting = VecDeque::with_capacity(job.window);
    for number in 0..job.count {
        if waiting.len() == job.window
            && let Some(receipt) = waiting.pop_front()
        {
            let receipt: SendFuture = receipt;
            receipt.await?;
        }
        waiting.push_back(sender.send(number).await?);
    }
    for receipt in waiting {
        receipt.await?;
    }
    Ok(meter.stop(job.count, &format!("no batches; {} on their way; receipts awaited in order", job.window)))
}

async fn consume(job: &Job, client: &Pulsar<TokioExecutor>) -> Result<Measured> {
    let options = ConsumerOptions { receiver_queue_size: Some(u32::try_from(job.in_flight)?), ..Default::default() };
    let mut consumer: Consumer<Vec<u8>, TokioExecutor> = client
        .consumer()
        .with_topic(&job.physical)
        .with_subscription(&job.physical_group)
        .with_subscription_type(SubType::Shared)
        .with_options(options)
        .build()
        .await?;
    let (mut meter, mut count, mut bytes) = (None, 0, 0);
    while count < job.count {
        let next = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await;
        let message = next.with_context(|| format!("{count} messages came"))?.context("the consumer has ended")??;
        meter.get_or_insert_with(Meter::start);
        bytes += message.payload.data.len();
        let meta = message.payload.metadata.properties.iter().find(|property| property.key == META);
        std::hint::black_box((meta.map(|property| &property.value), &message.payload.metadata.partition_key));
        consumer.ack(&message).await?;
        count += 1;
    }
    ensure!(bytes == job.count * job.size, "{bytes} bytes came");
    // Closing sends what acks are left, and waits for an answer behind them.
    consumer.close().await?;
    let settings = format!("Shared, a queue of {}; each ack sent", job.in_flight);
    Ok(meter.context("nothing came")?.stop(job.count, &settings))
}

async fn latency(job: &Job, client: &Pulsar<TokioExecutor>) -> Result<Measured> {
    let mut sender = Sender::new(job, client).await?;
    open_loop::run(job, "no batches; receipts awaited in order", async |numbers| {
        let mut sent = Vec::with_capacity(numbers.len());
        for number in numbers {
            let receipt = sender.send(number).await?;
            sent.push((number..number + 1, async move { Ok(receipt.await.map(drop)?) }));
        }
        Ok(sent)
    })
    .await
}
