//! What is sent, and the requests of up to ten that carry it, to queues and topics alike.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Message, PublishOutcome, Receipt};
use aws_sdk_sns::types::{MessageAttributeValue as TopicAttribute, PublishBatchRequestEntry};
use aws_sdk_sqs::primitives::Blob;
use aws_sdk_sqs::types::{MessageAttributeValue, SendMessageBatchRequestEntry};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::join_all;

use crate::clients::Clients;
use crate::codec::{Encoded, Value};
use crate::error::{failed_entry, failed_topic_entry, unmentioned};
use crate::requests::seconds;

/// The limit of SQS and of SNS on a batch.
pub(crate) const BATCH: usize = 10;
/// The longest that SQS holds back what is sent.
pub(crate) const LONGEST_DELAY: Duration = Duration::from_secs(900);

/// Where messages are sent to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Route {
    /// A queue's URL.
    Queue(Arc<str>),
    /// A topic's ARN.
    Topic(Arc<str>),
}

/// A message on its way.
pub(crate) struct Parcel {
    pub(crate) encoded: Encoded,
    /// Its message group and its deduplication id, in a FIFO queue.
    pub(crate) lane: Option<(String, String)>,
    /// How long SQS holds it back. Queues only.
    pub(crate) delay: Duration,
}

impl Parcel {
    pub(crate) fn new(encoded: Encoded) -> Self {
        Self { encoded, lane: None, delay: Duration::ZERO }
    }
}

/// The message group and the deduplication id of a message, which is a copy's own. Without a key it waits for nothing, not for
/// another copy of itself either: a publish that was repeated.
pub(crate) fn lane_of(message: &Message, is_total: bool, dedup: String) -> (String, String) {
    let group = match message.key() {
        _ if is_total => crate::names::ONE_GROUP.to_owned(),
        Some(key) => crate::names::message_group(key),
        None => crate::names::lone_group(dedup.as_bytes()),
    };
    (group, dedup)
}

/// One request of up to ten; success of the whole says nothing of the entries.
pub(crate) async fn send(
    clients: &Clients,
    route: &Route,
    parcels: Vec<Parcel>,
    operation: &'static str,
) -> Vec<PublishOutcome> {
    match route {
        Route::Queue(url) => to_queue(clients, url, parcels, operation).await,
        Route::Topic(arn) => to_topic(clients, arn, parcels, operation).await,
    }
}

/// As many requests as it takes, split by number and by size; one after the other where there is an order to keep.
pub(crate) async fn send_all(
    clients: &Clients,
    route: &Route,
    parcels: Vec<Parcel>,
    timeout: Duration,
    operation: &'static str,
) -> Vec<PublishOutcome> {
    let is_ordered = parcels.first().is_some_and(|parcel| parcel.lane.is_some());
    let mut requests: Vec<Vec<Parcel>> = Vec::new();
    let mut bytes = 0;
    for parcel in parcels {
        match requests.last_mut() {
            Some(last) if last.len() < BATCH && bytes + parcel.encoded.size <= clients.request_bytes => {
                bytes += parcel.encoded.size;
                last.push(parcel);
            }
            _ => {
                bytes = parcel.encoded.size;
                requests.push(vec![parcel]);
            }
        }
    }
    let sending = requests.into_iter().map(|request| async move {
        let count = request.len();
        match tokio::time::timeout(timeout, send(clients, route, request, operation)).await {
            Ok(outcomes) => outcomes,
            Err(_) => (0..count).map(|_| Err(Error::new(ErrorKind::Timeout, operation, "no answer in time"))).collect(),
        }
    });
    if !is_ordered {
        return join_all(sending).await.into_iter().flatten().collect();
    }
    let mut outcomes = Vec::new();
    for request in sending {
        outcomes.extend(request.await);
    }
    outcomes
}

async fn to_queue(clients: &Clients, url: &str, parcels: Vec<Parcel>, operation: &'static str) -> Vec<PublishOutcome> {
    let count = parcels.len();
    let entries = parcels.into_iter().enumerate().map(|(index, parcel)| {
        let attributes = parcel.encoded.attributes.into_iter().map(|(name, value)| (name, of_queue(value)));
        let (group, dedup) = parcel.lane.unzip();
        SendMessageBatchRequestEntry::builder()
            .id(index.to_string())
            .message_body(parcel.encoded.body)
            .set_message_attributes(Some(attributes.collect()))
            .set_message_group_id(group)
            .set_message_deduplication_id(dedup)
            .set_delay_seconds((!parcel.delay.is_zero()).then(|| seconds(parcel.delay)))
            .build()
            .expect("id and body are set")
    });
    let entries = entries.collect();
    let answer = match clients.sender.send_message_batch().queue_url(url).set_entries(Some(entries)).send().await {
        Ok(answer) => answer,
        Err(error) => {
            let error = clients.failed(operation, &error);
            return (0..count).map(|_| Err(error.duplicate())).collect();
        }
    };
    let mut outcomes = Outcomes::new(count, operation);
    answer.successful().iter().for_each(|entry| outcomes.set(entry.id(), Ok(STORED)));
    answer.failed().iter().for_each(|entry| outcomes.set(entry.id(), Err(failed_entry(operation, entry))));
    outcomes.0
}

async fn to_topic(clients: &Clients, arn: &str, parcels: Vec<Parcel>, operation: &'static str) -> Vec<PublishOutcome> {
    let count = parcels.len();
    let topics = clients.topics.as_ref().expect("there are topics only with clients of theirs");
    let entries = parcels.into_iter().enumerate().map(|(index, parcel)| {
        let attributes = parcel.encoded.attributes.into_iter().map(|(name, value)| (name, of_topic(value)));
        let (group, dedup) = parcel.lane.unzip();
        PublishBatchRequestEntry::builder()
            .id(index.to_string())
            .message(parcel.encoded.body)
            .set_message_attributes(Some(attributes.collect()))
            .set_message_group_id(group)
            .set_message_deduplication_id(dedup)
            .build()
            .expect("id and message are set")
    });
    let entries = entries.collect();
    let request = topics.sender.publish_batch().topic_arn(arn).set_publish_batch_request_entries(Some(entries));
    let answer = match request.send().await {
        Ok(answer) => answer,
        Err(error) => {
            let error = clients.failed(operation, &error);
            return (0..count).map(|_| Err(error.duplicate())).collect();
        }
    };
    let mut outcomes = Outcomes::new(count, operation);
    for entry in answer.successful() {
        outcomes.set(entry.id().unwrap_or_default(), Ok(STORED));
    }
    answer.failed().iter().for_each(|entry| outcomes.set(entry.id(), Err(failed_topic_entry(operation, entry))));
    outcomes.0
}

/// SQS tells no position, and answers a copy within the deduplication window as it answers the first.
const STORED: Receipt = Receipt { position: None, duplicate: false };

/// Starts with "not mentioned" for each.
struct Outcomes(Vec<PublishOutcome>);

impl Outcomes {
    fn new(count: usize, operation: &'static str) -> Self {
        Self((0..count).map(|_| Err(unmentioned(operation))).collect())
    }

    fn set(&mut self, id: &str, outcome: PublishOutcome) {
        if let Some(place) = id.parse::<usize>().ok().and_then(|index| self.0.get_mut(index)) {
            *place = outcome;
        }
    }
}

fn of_queue(value: Value) -> MessageAttributeValue {
    let builder = MessageAttributeValue::builder();
    let builder = match value {
        Value::Text(text) => builder.data_type("String").string_value(text),
        Value::Binary(bytes) => builder.data_type("Binary").binary_value(Blob::new(bytes)),
    };
    builder.build().expect("the type is set")
}

/// As text: moto (5.2.5) fails on binary attributes that a topic hands to a queue.
fn of_topic(value: Value) -> TopicAttribute {
    let text = match value {
        Value::Text(text) => text,
        Value::Binary(bytes) => STANDARD.encode(bytes),
    };
    TopicAttribute::builder().data_type("String").string_value(text).build().expect("the type is set")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_a_message_without_a_key_share_no_message_group_and_those_with_one_do() {
        let group = |message: &Message, is_total, dedup: &str| lane_of(message, is_total, dedup.to_owned()).0;
        let (loose, keyed) = (Message::new("d", "x"), Message::new("d", "x").with_key("k"));
        assert_ne!(group(&loose, false, "first"), group(&loose, false, "second"));
        assert_eq!(group(&loose, false, "first"), group(&loose, false, "first"));
        assert_eq!(group(&keyed, false, "first"), group(&keyed, false, "second"));
        assert_eq!(group(&loose, true, "first"), group(&keyed, true, "second"));
    }
}
