//! The bare client of SQS, for the cases that look past the adapter.

use std::collections::HashMap;
use std::time::Duration;

use anybroker_conformance::{Carries, NativeChannel, Place, RawMessage};
use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::primitives::Blob;
use aws_sdk_sqs::types::{MessageAttributeValue, SendMessageBatchRequestEntry};
use tokio::time::Instant;

use crate::common::{bare, host};

const CONTENT_TYPE: &str = "content-type";
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Native {
    client: Client,
    host: String,
}

impl Native {
    /// From the URL that the adapter is given.
    pub(crate) fn new(url: &str) -> Self {
        Self { client: bare(url), host: host(url) }
    }

    fn queue(&self, name: &str) -> String {
        format!("http://{}/000000000000/{name}", self.host)
    }
}

fn attribute(value: &[u8]) -> MessageAttributeValue {
    let builder = MessageAttributeValue::builder();
    let builder = match std::str::from_utf8(value) {
        Ok(text) => builder.data_type("String").string_value(text),
        Err(_) => builder.data_type("Binary").binary_value(Blob::new(value)),
    };
    builder.build().unwrap()
}

#[async_trait]
impl NativeChannel for Native {
    fn carries(&self) -> Carries {
        Carries { any_bytes: false, empty: false, null: false, keys: false, content_type: true, any_header: false }
    }

    async fn put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), String> {
        for ten in messages.chunks(10) {
            let entries = ten.iter().enumerate().map(|(number, message)| {
                let mut attributes: HashMap<String, MessageAttributeValue> =
                    message.headers.iter().map(|(name, value)| (name.clone(), attribute(value))).collect();
                if let Some(content_type) = &message.content_type {
                    attributes.insert(CONTENT_TYPE.to_owned(), attribute(content_type.as_bytes()));
                }
                let body = String::from_utf8(message.payload.clone().unwrap_or_default()).unwrap();
                SendMessageBatchRequestEntry::builder()
                    .id(number.to_string())
                    .message_body(body)
                    .set_message_attributes(Some(attributes))
                    .build()
                    .unwrap()
            });
            let request = self.client.send_message_batch().queue_url(self.queue(&place.group));
            let answer = request.set_entries(Some(entries.collect())).send().await;
            let answer = answer.map_err(|error| format!("{error:?}"))?;
            if !answer.failed().is_empty() {
                return Err(format!("{:?}", answer.failed()));
            }
        }
        Ok(())
    }

    async fn take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, String> {
        let deadline = Instant::now() + PATIENCE;
        let mut taken = Vec::new();
        while taken.len() < count && Instant::now() < deadline {
            let request = self.client.receive_message().queue_url(self.queue(&place.group));
            let request = request.message_attribute_names("All").max_number_of_messages(10).wait_time_seconds(1);
            let answer = request.send().await.map_err(|error| format!("{error:?}"))?;
            for message in answer.messages.unwrap_or_default() {
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
        }
        Ok(taken)
    }
}
