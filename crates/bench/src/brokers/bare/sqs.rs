//! aws-sdk-sqs at its best: requests of ten, many at a time, and each entry's answer read.

use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result, ensure};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_sqs::primitives::Blob;
use aws_sdk_sqs::types::{
    DeleteMessageBatchRequestEntry, MessageAttributeValue, MessageSystemAttributeName as System,
    SendMessageBatchRequestEntry,
};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use crate::brokers::job::{Job, Measured, Meter, Source, Task, unix_millis};
use crate::brokers::open_loop;

const META: &str = "anybroker-meta";
/// What SQS takes in one request.
const TEN: usize = 10;
/// Receive requests that are open at a time, as in the adapter.
const RECEIVERS: usize = 4;

pub(super) async fn measure(job: &Job) -> Result<Measured> {
    let credentials = Credentials::new("x", "x", None, None, "bench");
    let config = aws_sdk_sqs::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("elasticmq"))
        .credentials_provider(credentials)
        .endpoint_url(format!("http://{}", job.host()))
        .build();
    let client = Client::from_conf(config);
    let url = format!("http://{}/000000000000/{}", job.host(), job.physical);
    match job.task {
        Task::Publish => publish(job, &client, &url).await,
        Task::Consume => consume(job, &client, &url).await,
        Task::Latency => latency(job, &client, &url).await,
    }
}

fn write_field(meta: &mut Vec<u8>, field: &[u8]) {
    meta.extend_from_slice(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_le_bytes());
    meta.extend_from_slice(field);
}

fn entry(source: &Source, number: usize, place: usize) -> Result<SendMessageBatchRequestEntry> {
    let mut meta = Vec::with_capacity(96);
    meta.extend_from_slice(&[1, 0, 1]);
    let mut text = uuid::Uuid::encode_buffer();
    write_field(&mut meta, uuid::Uuid::now_v7().hyphenated().encode_lower(&mut text).as_bytes());
    meta.extend_from_slice(&unix_millis().to_le_bytes());
    write_field(&mut meta, source.key(number));
    write_field(&mut meta, b"");
    let meta = MessageAttributeValue::builder().data_type("Binary").binary_value(Blob::new(meta)).build()?;
    let body = std::str::from_utf8(source.bytes(number))?;
    let entry = SendMessageBatchRequestEntry::builder().id(place.to_string()).message_body(body);
    Ok(entry.message_attributes(META, meta).build()?)
}

async fn send(client: Client, url: String, entries: Vec<SendMessageBatchRequestEntry>) -> Result<usize> {
    let count = entries.len();
    let answer = client.send_message_batch().queue_url(url).set_entries(Some(entries)).send().await?;
    ensure!(answer.failed().is_empty() && answer.successful().len() == count, "not stored: {:?}", answer.failed());
    Ok(count)
}

fn ten(source: &Source, first: usize, end: usize) -> Result<Vec<SendMessageBatchRequestEntry>> {
    (first..end.min(first + TEN)).enumerate().map(|(place, number)| entry(source, number, place)).collect()
}

async fn publish(job: &Job, client: &Client, url: &str) -> Result<Measured> {
    let source = Source::new(job.size);
    send(client.clone(), url.to_owned(), ten(&source, 0, 1)?).await?;
    let requests = job.window / TEN;
    let meter = Meter::start();
    let mut sending = FuturesUnordered::new();
    for first in (0..job.count).step_by(TEN) {
        if sending.len() == requests
            && let Some(sent) = sending.next().await
        {
            let sent: std::result::Result<Result<usize>, tokio::task::JoinError> = sent;
            sent??;
        }
        // A task each: requests are written on both threads.
        sending.push(tokio::spawn(send(client.clone(), url.to_owned(), ten(&source, first, job.count)?)));
    }
    while let Some(sent) = sending.next().await {
        sent??;
    }
    Ok(meter.stop(job.count, &format!("SendMessageBatch of {TEN}, {requests} requests at a time, a task each")))
}

/// Receives up to ten; deletes what came. Answers how many, and their bytes. The first that brings some starts the clock.
async fn round(client: &Client, url: &str, meter: &OnceLock<Meter>) -> Result<(usize, usize)> {
    let answer = client
        .receive_message()
        .queue_url(url)
        .max_number_of_messages(10)
        .wait_time_seconds(1)
        .visibility_timeout(30)
        .message_attribute_names("All")
        .message_system_attribute_names(System::ApproximateReceiveCount)
        .message_system_attribute_names(System::ApproximateFirstReceiveTimestamp)
        .message_system_attribute_names(System::SentTimestamp)
        .send()
        .await?;
    let (mut entries, mut bytes) = (Vec::with_capacity(TEN), 0);
    if answer.messages.as_ref().is_some_and(|messages| !messages.is_empty()) {
        meter.get_or_init(Meter::start);
    }
    for (place, message) in answer.messages.unwrap_or_default().into_iter().enumerate() {
        bytes += message.body().map_or(0, str::len);
        let attributes = message.message_attributes().context("no attributes")?;
        std::hint::black_box(attributes.get(META).context("no meta")?.binary_value());
        let handle = message.receipt_handle.context("no handle")?;
        let entry = DeleteMessageBatchRequestEntry::builder().id(place.to_string()).receipt_handle(handle);
        entries.push(entry.build()?);
    }
    let count = entries.len();
    if count > 0 {
        let answer = client.delete_message_batch().queue_url(url).set_entries(Some(entries)).send().await?;
        ensure!(answer.failed().is_empty() && answer.successful().len() == count, "not acked: {:?}", answer.failed());
    }
    Ok((count, bytes))
}

async fn consume(job: &Job, client: &Client, url: &str) -> Result<Measured> {
    let meter = Arc::new(OnceLock::new());
    let mut working = FuturesUnordered::new();
    let begin = || {
        let (client, url, meter) = (client.clone(), url.to_owned(), Arc::clone(&meter));
        tokio::spawn(async move { round(&client, &url, &meter).await })
    };
    working.extend((0..RECEIVERS).map(|_| begin()));
    let (mut count, mut bytes, mut empty) = (0, 0, 0);
    while count < job.count {
        let Some(done) = working.next().await else { break };
        let (brought, more) = done??;
        empty = if brought == 0 { empty + 1 } else { 0 };
        ensure!(empty < 20, "{count} messages came");
        (count, bytes) = (count + brought, bytes + more);
        if count < job.count && (working.is_empty() || count + working.len() * TEN < job.count) {
            working.push(begin());
        }
    }
    ensure!(bytes == job.count * job.size, "{bytes} bytes came");
    let settings = format!("{RECEIVERS} rounds at a time: ReceiveMessage of {TEN}, then DeleteMessageBatch");
    Ok(meter.get().context("nothing came")?.stop(job.count, &settings))
}

async fn latency(job: &Job, client: &Client, url: &str) -> Result<Measured> {
    let source = Source::new(job.size);
    send(client.clone(), url.to_owned(), ten(&source, 0, 1)?).await?;
    let settings = format!("SendMessageBatch of {TEN} at most, a task each");
    open_loop::run(job, &settings, async |numbers| {
        let mut sent = Vec::new();
        for first in numbers.clone().step_by(TEN) {
            let end = numbers.end.min(first + TEN);
            let sending = tokio::spawn(send(client.clone(), url.to_owned(), ten(&source, first, end)?));
            sent.push((first..end, async move { sending.await?.map(drop) }));
        }
        Ok(sent)
    })
    .await
}
