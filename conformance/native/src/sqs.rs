//! The bare clients of SQS and SNS: `aws-sdk-sqs` and `aws-sdk-sns`.

use std::collections::HashMap;
use std::time::Duration;

use anybroker_conformance::{Carries, NativeChannel, Place, RawMessage};
use async_trait::async_trait;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_sns::types as sns;
use aws_sdk_sqs::config::Credentials;
use aws_sdk_sqs::primitives::Blob;
use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, MessageAttributeValue, SendMessageBatchRequestEntry};
use tokio::time::Instant;

use crate::access::Access;

const CONTENT_TYPE: &str = "content-type";
const PATIENCE: Duration = Duration::from_secs(20);
/// As many as one request takes.
const BATCH: usize = 10;

pub(crate) struct Native {
    /// `http://host:port`; without one, Amazon's of the region.
    endpoint: Option<String>,
    sns_endpoint: Option<String>,
    region: Option<String>,
    credentials: Option<Credentials>,
    has_topics: bool,
    is_fifo: bool,
}

/// `http://host:port` or `https://host:port` of what the URL names; `None` where it names nothing.
pub(crate) fn endpoint(access: &Access) -> Option<String> {
    let host = access.hosts().first()?;
    Some(match access.setting("tls") {
        Some("on") => format!("https://{host}"),
        Some("off") => format!("http://{host}"),
        _ if is_near(host) => format!("http://{host}"),
        _ => format!("https://{host}"),
    })
}

/// Whether it is on this machine, as emulators are.
fn is_near(host: &str) -> bool {
    host.starts_with("127.") || host.starts_with("localhost") || host.starts_with("[::1]")
}

/// A message as both services take it: its attributes with their types, and what a FIFO queue or topic wants besides.
struct Parcel {
    body: String,
    attributes: Vec<(String, Vec<u8>)>,
    fifo: Option<Fifo>,
}

struct Fifo {
    group: String,
    deduplication: String,
}

impl Native {
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        access.without(&["tls_ca", "profile", "session_token"])?;
        let is_fifo = access.setting("mode") == Some("fifo");
        let endpoint = endpoint(access);
        let own = access.user().map(|(key, secret)| Credentials::new(key, secret, None, None, "url"));
        // An emulator wants some, and looks at none.
        let is_near = || access.hosts().first().is_some_and(|host| is_near(host));
        let any = || is_near().then(|| Credentials::new("k", "s", None, None, "emulator"));
        Ok(Self {
            sns_endpoint: access.setting("sns_endpoint").map(str::to_owned).or_else(|| endpoint.clone()),
            endpoint,
            region: access.setting("region").map(str::to_owned),
            credentials: own.or_else(any),
            has_topics: access.setting("fanout") == Some("sns"),
            is_fifo,
        })
    }

    async fn config(&self, endpoint: Option<&String>) -> SdkConfig {
        let mut loader = aws_config::defaults(BehaviorVersion::latest());
        if let Some(endpoint) = endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        if let Some(region) = &self.region {
            loader = loader.region(Region::new(region.clone()));
        }
        if let Some(credentials) = &self.credentials {
            loader = loader.credentials_provider(credentials.clone());
        }
        loader.load().await
    }

    async fn queues(&self) -> aws_sdk_sqs::Client {
        aws_sdk_sqs::Client::new(&self.config(self.endpoint.as_ref()).await)
    }

    fn parcel(&self, message: &RawMessage) -> Result<Parcel, String> {
        let bytes = message.payload.clone().unwrap_or_default();
        let body = String::from_utf8(bytes).map_err(|_| "a body is text".to_owned())?;
        let mut attributes = message.headers.clone();
        attributes.extend(message.content_type.iter().map(|text| (CONTENT_TYPE.to_owned(), text.clone().into_bytes())));
        // A message group for each: none waits for another one.
        let fifo = self.is_fifo.then(|| {
            let unique = uuid::Uuid::new_v4().to_string();
            Fifo { group: unique.clone(), deduplication: unique }
        });
        Ok(Parcel { body, attributes, fifo })
    }

    async fn send(&self, queue: &str, parcels: Vec<Parcel>) -> Result<(), String> {
        let client = self.queues().await;
        let url = queue_url(&client, queue).await?;
        let mut entries = Vec::new();
        for (number, parcel) in parcels.into_iter().enumerate() {
            let mut attributes = HashMap::new();
            for (name, value) in parcel.attributes {
                let builder = MessageAttributeValue::builder();
                let builder = match String::from_utf8(value) {
                    Ok(text) => builder.data_type("String").string_value(text),
                    Err(bytes) => builder.data_type("Binary").binary_value(Blob::new(bytes.into_bytes())),
                };
                attributes.insert(name, builder.build().map_err(told)?);
            }
            let (group, deduplication) = parcel.fifo.map(|fifo| (fifo.group, fifo.deduplication)).unzip();
            let entry = SendMessageBatchRequestEntry::builder()
                .id(number.to_string())
                .message_body(parcel.body)
                .set_message_attributes(Some(attributes))
                .set_message_group_id(group)
                .set_message_deduplication_id(deduplication);
            entries.push(entry.build().map_err(told)?);
        }
        let answer =
            client.send_message_batch().queue_url(url).set_entries(Some(entries)).send().await.map_err(told)?;
        if answer.failed().is_empty() { Ok(()) } else { Err(told(answer.failed())) }
    }

    async fn notify(&self, topic: &str, parcels: Vec<Parcel>) -> Result<(), String> {
        let client = aws_sdk_sns::Client::new(&self.config(self.sns_endpoint.as_ref()).await);
        let mut pages = client.list_topics().into_paginator().items().send();
        let end = format!(":{topic}");
        let arn = loop {
            let Some(found) = pages.next().await else { return Err(format!("there is no topic {topic}")) };
            match found.map_err(told)?.topic_arn {
                Some(arn) if arn.ends_with(&end) => break arn,
                _ => {}
            }
        };
        let mut entries = Vec::new();
        for (number, parcel) in parcels.into_iter().enumerate() {
            let mut attributes = HashMap::new();
            for (name, value) in parcel.attributes {
                let builder = sns::MessageAttributeValue::builder();
                let builder = match String::from_utf8(value) {
                    Ok(text) => builder.data_type("String").string_value(text),
                    Err(bytes) => builder.data_type("Binary").binary_value(Blob::new(bytes.into_bytes())),
                };
                attributes.insert(name, builder.build().map_err(told)?);
            }
            let (group, deduplication) = parcel.fifo.map(|fifo| (fifo.group, fifo.deduplication)).unzip();
            let entry = sns::PublishBatchRequestEntry::builder()
                .id(number.to_string())
                .message(parcel.body)
                .set_message_attributes(Some(attributes))
                .set_message_group_id(group)
                .set_message_deduplication_id(deduplication);
            entries.push(entry.build().map_err(told)?);
        }
        let request = client.publish_batch().topic_arn(arn).set_publish_batch_request_entries(Some(entries));
        let answer = request.send().await.map_err(told)?;
        if answer.failed().is_empty() { Ok(()) } else { Err(told(answer.failed())) }
    }
}

/// The SDK says what happened only in the long form of its errors.
fn told(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

async fn queue_url(client: &aws_sdk_sqs::Client, queue: &str) -> Result<String, String> {
    let answer = client.get_queue_url().queue_name(queue).send().await.map_err(told)?;
    answer.queue_url.ok_or_else(|| format!("queue {queue} has no URL"))
}

#[async_trait]
impl NativeChannel for Native {
    fn carries(&self) -> Carries {
        // A FIFO queue's message group is text of few characters, which a key is not.
        Carries { any_bytes: false, empty: false, null: false, keys: false, content_type: true, any_header: false }
    }

    async fn put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), String> {
        for together in messages.chunks(BATCH) {
            let parcels = together.iter().map(|message| self.parcel(message)).collect::<Result<Vec<_>, _>>()?;
            match self.has_topics {
                true => self.notify(&place.destination, parcels).await?,
                false => self.send(&place.group, parcels).await?,
            }
        }
        Ok(())
    }

    async fn take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, String> {
        let client = self.queues().await;
        let url = queue_url(&client, &place.group).await?;
        let deadline = Instant::now() + PATIENCE;
        let mut taken = Vec::new();
        while taken.len() < count && Instant::now() < deadline {
            let request = client.receive_message().queue_url(&url);
            let request = request.message_attribute_names("All").max_number_of_messages(10).wait_time_seconds(1);
            let answer = request.send().await.map_err(told)?;
            let mut done = Vec::new();
            for message in answer.messages.unwrap_or_default() {
                let handle = message.receipt_handle.unwrap_or_default();
                let entry = DeleteMessageBatchRequestEntry::builder().id(done.len().to_string()).receipt_handle(handle);
                done.push(entry.build().map_err(told)?);
                let mut raw = RawMessage::of(message.body.unwrap_or_default());
                for (name, value) in message.message_attributes.unwrap_or_default() {
                    let bytes = match value.binary_value() {
                        Some(bytes) => bytes.as_ref().to_vec(),
                        None => value.string_value().unwrap_or_default().as_bytes().to_vec(),
                    };
                    match name.as_str() {
                        CONTENT_TYPE => raw.content_type = Some(String::from_utf8_lossy(&bytes).into_owned()),
                        _ => raw.headers.push((name, bytes)),
                    }
                }
                taken.push(raw);
            }
            // Others of a message group come when those before them are gone.
            if !done.is_empty() {
                client.delete_message_batch().queue_url(&url).set_entries(Some(done)).send().await.map_err(told)?;
            }
        }
        Ok(taken)
    }
}
