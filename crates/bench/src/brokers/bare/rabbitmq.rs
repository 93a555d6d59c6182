//! lapin at its best: one channel with confirms that are awaited in order, a thousand later; consuming with a prefetch, and
//! one ack for all that was read at once.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{FutureExt, StreamExt};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, PublisherConfirm};

use super::{meta, read_meta};
use crate::brokers::job::{Job, Measured, Meter, Source, Task, unix_millis};
use crate::brokers::open_loop;

const META: &str = "anybroker-meta";

pub(super) async fn measure(job: &Job) -> Result<Measured> {
    let uri = job.url.split('?').next().unwrap_or_default();
    let connection = Connection::connect(uri, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    match job.task {
        Task::Publish => publish(job, channel).await,
        Task::Consume => consume(job, &channel).await,
        Task::Latency => latency(job, channel).await,
    }
}

struct Sender {
    channel: Channel,
    source: Source,
    exchange: String,
}

impl Sender {
    async fn new(job: &Job, channel: Channel) -> Result<Self> {
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let sender = Self { channel, source: Source::new(job.size), exchange: job.physical.clone() };
        stored(sender.send(0).await?).await?;
        Ok(sender)
    }

    async fn send(&self, number: usize) -> Result<PublisherConfirm> {
        let (id, now) = (uuid::Uuid::now_v7(), unix_millis());
        let mut table = BTreeMap::new();
        let meta = meta(&id, self.source.key(number), now);
        table.insert(META.into(), AMQPValue::ByteArray(meta.into()));
        let mut text = uuid::Uuid::encode_buffer();
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_message_id((&*id.hyphenated().encode_lower(&mut text)).into())
            .with_timestamp(now.unsigned_abs() / 1_000)
            .with_headers(FieldTable::from(table));
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let payload = self.source.bytes(number);
        let exchange = self.exchange.as_str().into();
        Ok(self.channel.basic_publish(exchange, "".into(), options, payload, properties).await?)
    }
}

async fn stored(confirm: PublisherConfirm) -> Result<()> {
    match confirm.await? {
        Confirmation::Ack(None) => Ok(()),
        other => bail!("not stored: {other:?}"),
    }
}

async fn publish(job: &Job, channel: Channel) -> Result<Measured> {
    let sender = Sender::new(job, channel).await?;
    let meter = Meter::start();
    let mut waiting = VecDeque::with_capacity(job.window);
    for number in 0..job.count {
        if waiting.len() == job.window
            && let Some(confirm) = waiting.pop_front()
        {
            stored(confirm).await?;
        }
        waiting.push_back(sender.send(number).await?);
    }
    for confirm in waiting {
        stored(confirm).await?;
    }
    Ok(meter.stop(job.count, &format!("one channel; {} on their way; confirms awaited in order", job.window)))
}

async fn consume(job: &Job, channel: &Channel) -> Result<Measured> {
    let prefetch = u16::try_from(job.in_flight)?;
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let queue = job.physical_group.as_str();
    let options = BasicConsumeOptions::default();
    let mut consumer = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await?;
    let (mut meter, mut count, mut bytes) = (None, 0, 0);
    while count < job.count {
        let first = tokio::time::timeout(Duration::from_secs(20), consumer.next()).await;
        let mut next = first.with_context(|| format!("{count} messages came"))?;
        meter.get_or_insert_with(Meter::start);
        let (mut last, mut read) = (None, 0);
        while let Some(delivery) = next {
            let delivery = delivery?;
            bytes += delivery.data.len();
            let table = delivery.properties.headers().as_ref().map(FieldTable::inner);
            let Some(AMQPValue::ByteArray(meta)) = table.and_then(|table| table.get(META)) else { bail!("no {META}") };
            std::hint::black_box(read_meta(meta.as_slice()));
            (last, read) = (Some(delivery.delivery_tag), read + 1);
            if read == job.batch {
                break;
            }
            next = consumer.next().now_or_never().flatten();
        }
        let Some(last) = last else { bail!("the consumer has ended") };
        channel.basic_ack(last, BasicAckOptions { multiple: true }).await?;
        count += read;
    }
    ensure!(bytes == job.count * job.size, "{bytes} bytes came");
    channel.close(200, "done".into()).await?;
    let settings = format!("prefetch {prefetch}; one ack for what was read at once, {} at most", job.batch);
    Ok(meter.context("nothing came")?.stop(job.count, &settings))
}

async fn latency(job: &Job, channel: Channel) -> Result<Measured> {
    let sender = Sender::new(job, channel).await?;
    open_loop::run(job, "one channel; confirms awaited in order", async |numbers| {
        let mut sent = Vec::with_capacity(numbers.len());
        for number in numbers {
            sent.push((number..number + 1, stored(sender.send(number).await?)));
        }
        Ok(sent)
    })
    .await
}
