//! async-nats at its best, by its own JetStream interface. Publishing: each message is sent at once, and its acknowledgement
//! awaited in order, a thousand later. Consuming: the client's stream of pulls, and acks that the server confirms, as many
//! of them on their way as there are messages.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::client::Request;
use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::message::PublishMessage;
use async_nats::{Client, ConnectOptions, HeaderMap, HeaderName, Message, Subject};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use serde::Deserialize;

use super::{meta, read_meta};
use crate::brokers::job::{Job, Measured, Meter, Source, Task, unix_millis};
use crate::brokers::open_loop;

const META: &str = "anybroker-meta";
const MESSAGE_ID: &str = "Nats-Msg-Id";
/// Nothing takes longer.
const LONGEST: Duration = Duration::from_secs(20);

pub(super) async fn measure(job: &Job) -> Result<Measured> {
    let client = connect(job).await?;
    match job.task {
        Task::Publish => publish(job, client).await,
        Task::Consume => consume(job, client).await,
        Task::Latency => latency(job, client).await,
    }
}

pub(super) async fn connect(job: &Job) -> Result<Client> {
    Ok(ConnectOptions::new().skip_subject_validation(true).connect(job.host()).await?)
}

#[derive(Deserialize)]
struct ConsumerInfo {
    config: ConsumerConfig,
}

#[derive(Deserialize)]
struct ConsumerConfig {
    filter_subjects: Vec<String>,
}

/// What the group reads is what is published.
pub(super) async fn subject(job: &Job, client: &Client) -> Result<Subject> {
    let asking = format!("$JS.API.CONSUMER.INFO.{}.{}", job.physical, job.physical_group);
    let info: ConsumerInfo = serde_json::from_slice(&client.request(asking, Bytes::new()).await?.payload)?;
    Ok(info.config.filter_subjects.first().context("a group reads something")?.as_str().into())
}

/// What travels beside the payload, as the adapter writes it.
pub(super) fn headers(source: &Source, number: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let id = uuid::Uuid::now_v7();
    let meta = meta(&id, source.key(number), unix_millis());
    headers.insert(HeaderName::from_static(META), URL_SAFE_NO_PAD.encode(meta));
    // By default the adapter has the server remember ids, which costs the server as much here.
    headers.insert(HeaderName::from_static(MESSAGE_ID), id.hyphenated().to_string());
    headers
}

/// Reads it.
pub(super) fn read(message: &Message) -> Result<()> {
    let meta = message.headers.as_ref().and_then(|headers| headers.get(HeaderName::from_static(META)));
    let meta = meta.and_then(|meta| URL_SAFE_NO_PAD.decode(meta.as_str()).ok());
    let meta: Vec<u8> = meta.context("a message without what was written")?;
    std::hint::black_box(read_meta(&meta));
    Ok(())
}

struct Sender {
    context: Context,
    source: Source,
    subject: Subject,
}

impl Sender {
    async fn new(job: &Job, client: Client) -> Result<Self> {
        let subject = subject(job, &client).await?;
        let sender = Self { context: async_nats::jetstream::new(client), source: Source::new(job.size), subject };
        stored(sender.send(0).await?).await?;
        Ok(sender)
    }

    async fn send(&self, number: usize) -> Result<async_nats::jetstream::context::PublishAckFuture> {
        let headers = headers(&self.source, number);
        let message = PublishMessage::build().payload(self.source.payload(number)).headers(headers);
        Ok(self.context.send_publish(self.subject.clone(), message).await?)
    }
}

async fn stored(ack: async_nats::jetstream::context::PublishAckFuture) -> Result<()> {
    ensure!(ack.await?.sequence > 0, "not stored");
    Ok(())
}

async fn publish(job: &Job, client: Client) -> Result<Measured> {
    let sender = Sender::new(job, client).await?;
    let meter = Meter::start();
    let mut waiting = VecDeque::with_capacity(job.window);
    for number in 0..job.count {
        if waiting.len() == job.window
            && let Some(ack) = waiting.pop_front()
        {
            stored(ack).await?;
        }
        waiting.push_back(sender.send(number).await?);
    }
    for ack in waiting {
        stored(ack).await?;
    }
    Ok(meter.stop(job.count, &format!("its JetStream context; {} on their way; acks awaited in order", job.window)))
}

async fn consume(job: &Job, client: Client) -> Result<Measured> {
    let context = async_nats::jetstream::new(client.clone());
    let consumer: PullConsumer = context.get_consumer_from_stream(&job.physical_group, &job.physical).await?;
    let mut messages = consumer.stream().max_messages_per_batch(job.in_flight).messages().await?;
    // A request, because the client's `double_ack` subscribes to an inbox for each message. Without a timer for each.
    let ack = |reply: Subject| {
        let request = Request::new().payload(Bytes::from_static(b"+ACK")).timeout(None);
        client.send_request(reply, request)
    };
    let mut acking = FuturesUnordered::new();
    let (mut meter, mut count, mut acked, mut bytes) = (None, 0, 0, 0);
    while acked < job.count {
        tokio::select! {
            biased;
            confirmed = acking.next(), if !acking.is_empty() => {
                let mut next = confirmed;
                while let Some(confirmed) = next {
                    let confirmed: Message = confirmed?;
                    ensure!(confirmed.status.is_none(), "an ack was not confirmed: {:?}", confirmed.status);
                    acked += 1;
                    next = acking.next().now_or_never().flatten();
                }
            }
            message = messages.next(), if count < job.count && count - acked < job.in_flight => {
                let mut next = Some(message);
                // All that is here, before anything else is looked at.
                while let Some(message) = next {
                    let message = message.context("the stream has ended")??.message;
                    meter.get_or_insert_with(Meter::start);
                    bytes += message.payload.len();
                    read(&message)?;
                    acking.push(ack(message.reply.context("a message without a reply subject")?));
                    count += 1;
                    let is_full = count - acked == job.in_flight || count == job.count;
                    next = if is_full { None } else { messages.next().now_or_never() };
                }
            }
            () = tokio::time::sleep(LONGEST) => bail!("{count} messages came, {acked} are acked"),
        }
    }
    ensure!(bytes == job.count * job.size, "{bytes} bytes came");
    let settings = format!("its stream of pulls of {0}; {0} unacked at most; acks are requests", job.in_flight);
    Ok(meter.context("nothing came")?.stop(job.count, &settings))
}

async fn latency(job: &Job, client: Client) -> Result<Measured> {
    let sender = Sender::new(job, client).await?;
    open_loop::run(job, "its JetStream context; acks awaited in order", async |numbers| {
        let mut sent = Vec::with_capacity(numbers.len());
        for number in numbers {
            sent.push((number..number + 1, stored(sender.send(number).await?)));
        }
        Ok(sent)
    })
    .await
}
