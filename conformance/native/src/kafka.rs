//! Kafka's bare client: librdkafka by `rdkafka`.

use std::time::Duration;

use anybroker_conformance::{Carries, NativeChannel, Place, RawMessage};
use async_trait::async_trait;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::metadata::MetadataTopic;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::time::Instant;

use crate::access::Access;

const CONTENT_TYPE: &str = "content-type";
const PATIENCE: Duration = Duration::from_secs(50);

pub(crate) struct Native {
    config: ClientConfig,
}

impl Native {
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        access.without(&["tls", "tls_ca", "tls_certificate"])?;
        if access.user().is_some() {
            return Err("the bare client is not made for users and passwords".into());
        }
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", access.hosts().join(",")).set("linger.ms", "50");
        Ok(Self { config })
    }
}

#[async_trait]
impl NativeChannel for Native {
    fn carries(&self) -> Carries {
        Carries { any_bytes: true, empty: true, null: true, keys: true, content_type: true, any_header: true }
    }

    async fn put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), String> {
        let (config, topic, messages) = (self.config.clone(), place.destination.clone(), messages.to_vec());
        blocking(move || {
            let producer: BaseProducer = config.create()?;
            for message in &messages {
                let mut headers = OwnedHeaders::new();
                for (name, value) in &message.headers {
                    headers = headers.insert(Header { key: name, value: Some(value) });
                }
                if let Some(content_type) = &message.content_type {
                    headers = headers.insert(Header { key: CONTENT_TYPE, value: Some(content_type) });
                }
                let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(&topic).headers(headers);
                record.key = message.key.as_deref();
                record.payload = message.payload.as_deref();
                producer.send(record).map_err(|(error, _)| error)?;
            }
            producer.flush(PATIENCE)
        })
        .await
    }

    async fn take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, String> {
        let (mut config, topic) = (self.config.clone(), place.destination.clone());
        config.set("group.id", "bare").set("enable.auto.commit", "false");
        blocking(move || {
            let consumer: BaseConsumer = config.create()?;
            let metadata = consumer.fetch_metadata(Some(&topic), PATIENCE)?;
            let mut all = TopicPartitionList::new();
            for partition in metadata.topics().iter().flat_map(MetadataTopic::partitions) {
                all.add_partition_offset(&topic, partition.id(), Offset::Beginning)?;
            }
            consumer.assign(&all)?;
            let deadline = Instant::now() + PATIENCE;
            let mut taken = Vec::new();
            while taken.len() < count && Instant::now() < deadline {
                let Some(record) = consumer.poll(Duration::from_millis(100)) else { continue };
                let record = record?;
                let mut raw = RawMessage {
                    payload: record.payload().map(<[u8]>::to_vec),
                    key: record.key().map(<[u8]>::to_vec),
                    ..RawMessage::default()
                };
                for header in record.headers().into_iter().flat_map(|headers| headers.iter()) {
                    let value = header.value.unwrap_or_default();
                    match header.key {
                        CONTENT_TYPE => raw.content_type = Some(String::from_utf8_lossy(value).into_owned()),
                        name => raw.headers.push((name.to_owned(), value.to_vec())),
                    }
                }
                taken.push(raw);
            }
            Ok(taken)
        })
        .await
    }
}

/// The base client waits on its thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> rdkafka::error::KafkaResult<T> + Send + 'static,
) -> Result<T, String> {
    let worked = tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?;
    worked.map_err(|error| error.to_string())
}
