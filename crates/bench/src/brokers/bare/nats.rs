//! async-nats at its best, which is JetStream's protocol on the core client. Publishing: replies to one inbox, each read and
//! counted; no future and no channel for a message. (The client's own JetStream publish makes a oneshot for each.) Consuming:
//! pulls of as much as there is room for, and acks that the server confirms to one inbox, which counts them. (The client's own
//! `double_ack` subscribes to an inbox for each message.)

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::{Client, HeaderMap, Message, Subject, Subscriber};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use serde::Deserialize;

use super::{meta, read_meta};
use crate::brokers::job::{Job, Measured, Meter, Source, Task, unix_millis};
use crate::brokers::open_loop::{Latencies, Schedule};

const META: &str = "anybroker-meta";
/// Nothing takes longer.
const LONGEST: Duration = Duration::from_secs(20);

pub(super) async fn measure(job: &Job) -> Result<Measured> {
    let client = async_nats::connect(job.host()).await?;
    match job.task {
        Task::Publish => publish(job, client).await,
        Task::Consume => consume(job, &client).await,
        Task::Latency => latency(job, client).await,
    }
}

#[derive(Deserialize)]
struct PubAck {
    #[serde(default)]
    seq: u64,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct ConsumerInfo {
    config: ConsumerConfig,
}

#[derive(Deserialize)]
struct ConsumerConfig {
    filter_subjects: Vec<String>,
}

struct Sender {
    client: Client,
    source: Source,
    subject: Subject,
    inbox: Subject,
    replies: Subscriber,
    confirmed: usize,
}

impl Sender {
    async fn new(job: &Job, client: Client) -> Result<Self> {
        // What the group reads is what is published.
        let asking = format!("$JS.API.CONSUMER.INFO.{}.{}", job.physical, job.physical_group);
        let info: ConsumerInfo = serde_json::from_slice(&client.request(asking, Bytes::new()).await?.payload)?;
        let subject = info.config.filter_subjects.first().context("a group reads something")?.as_str().into();
        let inbox = Subject::from(client.new_inbox());
        let replies = client.subscribe(inbox.clone()).await?;
        let mut sender = Self { client, source: Source::new(job.size), subject, inbox, replies, confirmed: 0 };
        sender.send(0).await?;
        sender.confirm().await?;
        sender.confirmed = 0;
        Ok(sender)
    }

    async fn send(&self, number: usize) -> Result<()> {
        let mut headers = HeaderMap::new();
        let meta = meta(&uuid::Uuid::now_v7(), self.source.key(number), unix_millis());
        headers.insert(META, URL_SAFE_NO_PAD.encode(meta).as_str());
        let (subject, reply) = (self.subject.clone(), self.inbox.clone());
        let payload = self.source.payload(number);
        Ok(self.client.publish_with_reply_and_headers(subject, reply, headers, payload).await?)
    }

    fn read(&mut self, reply: Option<Message>) -> Result<()> {
        let ack: PubAck = serde_json::from_slice(&reply.context("the inbox has ended")?.payload)?;
        ensure!(ack.error.is_none() && ack.seq > 0, "not stored: {:?}", ack.error);
        self.confirmed += 1;
        Ok(())
    }

    /// Waits for a confirm, and reads all that are there.
    async fn confirm(&mut self) -> Result<()> {
        let first = tokio::time::timeout(LONGEST, self.replies.next()).await?;
        self.read(first)?;
        self.confirm_what_is_here()
    }

    fn confirm_what_is_here(&mut self) -> Result<()> {
        while let Some(reply) = self.replies.next().now_or_never() {
            self.read(reply)?;
        }
        Ok(())
    }
}

async fn publish(job: &Job, client: Client) -> Result<Measured> {
    let mut sender = Sender::new(job, client).await?;
    let meter = Meter::start();
    for number in 0..job.count {
        while number - sender.confirmed >= job.window {
            sender.confirm().await?;
        }
        sender.send(number).await?;
    }
    while sender.confirmed < job.count {
        sender.confirm().await?;
    }
    Ok(meter.stop(job.count, &format!("{} on their way; replies to one inbox, read and counted", job.window)))
}

async fn consume(job: &Job, client: &Client) -> Result<Measured> {
    let (inbox, acks) = (Subject::from(client.new_inbox()), Subject::from(client.new_inbox()));
    let (mut messages, mut replies) = (client.subscribe(inbox.clone()).await?, client.subscribe(acks.clone()).await?);
    let asking = Subject::from(format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", job.physical, job.physical_group));
    let (mut meter, mut asked, mut count, mut acked, mut bytes) = (None, 0, 0, 0, 0);
    while acked < job.count {
        let room = job.in_flight - (asked - acked);
        if room >= job.in_flight / 2 && asked < job.count {
            let room = room.min(job.count - asked);
            let body = format!("{{\"batch\":{room},\"expires\":30000000000}}");
            client.publish_with_reply(asking.clone(), inbox.clone(), body.into()).await?;
            asked += room;
        }
        tokio::select! {
            biased;
            message = messages.next(), if count < job.count => {
                let mut next = Some(message);
                // All that is here, before anything else is looked at.
                while let Some(message) = next {
                    let message = message.context("the inbox has ended")?;
                    ensure!(message.status.is_none(), "a pull has ended: {:?}", message.status);
                    meter.get_or_insert_with(Meter::start);
                    bytes += message.payload.len();
                    let meta = message.headers.as_ref().and_then(|headers| headers.get(META));
                    let meta = meta.and_then(|meta| URL_SAFE_NO_PAD.decode(meta.as_str()).ok());
                    let meta: Vec<u8> = meta.context("a message without what was written")?;
                    std::hint::black_box(read_meta(&meta));
                    let ack = message.reply.context("a message without a reply subject")?;
                    client.publish_with_reply(ack, acks.clone(), Bytes::from_static(b"+ACK")).await?;
                    count += 1;
                    next = messages.next().now_or_never();
                }
            }
            reply = replies.next() => {
                let mut next = Some(reply);
                while let Some(reply) = next {
                    let reply = reply.context("the inbox has ended")?;
                    ensure!(reply.status.is_none(), "an ack was not confirmed: {:?}", reply.status);
                    acked += 1;
                    next = replies.next().now_or_never();
                }
            }
            () = tokio::time::sleep(LONGEST) => bail!("{count} messages came, {acked} are acked"),
        }
    }
    ensure!(bytes == job.count * job.size, "{bytes} bytes came");
    let settings = format!("pulls, {} asked for or unacked at most; acks confirmed to one inbox", job.in_flight);
    Ok(meter.context("nothing came")?.stop(job.count, &settings))
}

async fn latency(job: &Job, client: Client) -> Result<Measured> {
    let mut sender = Sender::new(job, client).await?;
    let meter = Meter::start();
    let mut schedule = Schedule::new(job);
    let (mut latencies, mut noted, begun) = (Latencies::new(), 0, Instant::now());
    let mut sent = 0;
    let mut is_over = false;
    while noted < schedule.total() {
        ensure!(begun.elapsed() < LONGEST * 3, "{noted} of {} are confirmed", schedule.total());
        tokio::select! {
            biased;
            reply = sender.replies.next() => {
                sender.read(reply)?;
                sender.confirm_what_is_here()?;
            }
            due = schedule.due(), if !is_over => match due {
                Some(numbers) => {
                    sent = numbers.end;
                    for number in numbers {
                        sender.send(number).await?;
                    }
                }
                None => is_over = true,
            },
        }
        // The server confirms in the order in which it stores, which is that of the subject.
        while noted < sender.confirmed.min(sent) {
            latencies.note(schedule.moment(noted));
            noted += 1;
        }
    }
    Ok(latencies.into(meter.stop(schedule.total(), "replies to one inbox, read and counted")))
}
