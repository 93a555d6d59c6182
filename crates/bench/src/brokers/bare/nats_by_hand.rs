//! JetStream's protocol by hand, on async-nats' core client: less than a user of the client can have from it, because nothing
//! here tells which message an answer is for. Publishing: replies to one inbox, each read and counted. Consuming: pulls of as
//! much as there is room for, and acks that the server confirms to one inbox, which counts them. It shows what of a cost is the
//! protocol's and the connection's own.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::{Client, Message, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use serde::Deserialize;

use crate::brokers::job::{Job, Measured, Meter, Source, Task};

/// Nothing takes longer.
const LONGEST: Duration = Duration::from_secs(20);

pub(super) async fn measure(job: &Job) -> Result<Measured> {
    let client = super::nats::connect(job).await?;
    match job.task {
        Task::Publish => publish(job, client).await,
        Task::Consume => consume(job, &client).await,
        Task::Latency => bail!("only the throughput of it is measured"),
    }
}

#[derive(Deserialize)]
struct PubAck {
    #[serde(default)]
    seq: u64,
    error: Option<serde_json::Value>,
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
        let subject = super::nats::subject(job, &client).await?;
        let inbox = Subject::from(client.new_inbox());
        let replies = client.subscribe(inbox.clone()).await?;
        let mut sender = Self { client, source: Source::new(job.size), subject, inbox, replies, confirmed: 0 };
        sender.send(0).await?;
        sender.confirm().await?;
        sender.confirmed = 0;
        Ok(sender)
    }

    async fn send(&self, number: usize) -> Result<()> {
        let headers = super::nats::headers(&self.source, number);
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
                    super::nats::read(&message)?;
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
