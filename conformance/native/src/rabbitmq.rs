//! RabbitMQ's bare client: `lapin`.

use std::time::Duration;

use anybroker_conformance::{Carries, NativeChannel, Place, RawMessage};
use async_trait::async_trait;
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use tokio::time::Instant;

use crate::access::Access;

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Native {
    url: String,
    reads_streams: bool,
}

impl Native {
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        access.without(&["tls_ca", "tls_certificate"])?;
        let first = access.hosts().first().ok_or("the URL names no host")?;
        // The client takes one host, and a path of one slash for a virtual host without a name.
        let url = access.base.replacen(&access.hosts().join(","), first, 1);
        let url = if access.path() == "/" { url.trim_end_matches('/').to_owned() } else { url };
        Ok(Self { url, reads_streams: access.setting("queue") == Some("stream") })
    }

    async fn channel(&self) -> lapin::Result<(Connection, Channel)> {
        let connection = Connection::connect(&self.url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    async fn try_put(&self, place: &Place, messages: &[RawMessage]) -> lapin::Result<usize> {
        let (_connection, channel) = self.channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let mut refused = 0;
        for message in messages {
            let mut table = FieldTable::default();
            for (name, value) in &message.headers {
                table.insert(name.as_str().into(), AMQPValue::LongString(LongString::from(value.as_slice())));
            }
            let mut properties = BasicProperties::default();
            if !message.headers.is_empty() {
                properties = properties.with_headers(table);
            }
            if let Some(content_type) = &message.content_type {
                properties = properties.with_content_type(content_type.as_str().into());
            }
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let payload = message.payload.as_deref().unwrap_or_default();
            let exchange = place.destination.as_str().into();
            let confirm = channel.basic_publish(exchange, "".into(), options, payload, properties).await?.await?;
            refused += usize::from(!matches!(confirm, Confirmation::Ack(None)));
        }
        Ok(refused)
    }

    /// What stands in a stream: all of it is there before it is read, and none of it goes away.
    async fn try_read(&self, stream: &str, count: usize) -> lapin::Result<Vec<RawMessage>> {
        let (_connection, channel) = self.channel().await?;
        channel.basic_qos(100, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
        let options = BasicConsumeOptions::default();
        let mut consumer = channel.basic_consume(stream.into(), "".into(), options, arguments).await?;
        let mut taken = Vec::new();
        while taken.len() < count
            && let Ok(Some(delivery)) = tokio::time::timeout(PATIENCE, consumer.next()).await
        {
            let delivery = delivery?;
            channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default()).await?;
            taken.push(raw(&delivery));
        }
        Ok(taken)
    }

    async fn try_take(&self, place: &Place, count: usize) -> lapin::Result<Vec<RawMessage>> {
        let (_connection, channel) = self.channel().await?;
        let deadline = Instant::now() + PATIENCE;
        let mut taken = Vec::new();
        while taken.len() < count && Instant::now() < deadline {
            let options = BasicGetOptions { no_ack: true };
            let Some(got) = channel.basic_get(place.group.as_str().into(), options).await? else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            taken.push(raw(&got.delivery));
        }
        Ok(taken)
    }
}

fn raw(delivery: &Delivery) -> RawMessage {
    let properties = &delivery.properties;
    let mut raw = RawMessage::of(delivery.data.clone());
    raw.content_type = properties.content_type().as_ref().map(|text| text.as_str().to_owned());
    for (name, value) in properties.headers().iter().flat_map(|table| table.inner()) {
        let value = match value {
            AMQPValue::LongString(text) => text.as_bytes().to_vec(),
            AMQPValue::ByteArray(bytes) => bytes.as_slice().to_vec(),
            other => format!("{other:?}").into_bytes(),
        };
        raw.headers.push((name.as_str().to_owned(), value));
    }
    raw
}

#[async_trait]
impl NativeChannel for Native {
    fn carries(&self) -> Carries {
        Carries { any_bytes: true, empty: true, null: false, keys: false, content_type: true, any_header: true }
    }

    async fn put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), String> {
        match self.try_put(place, messages).await {
            Ok(0) => Ok(()),
            Ok(refused) => Err(format!("{refused} were not taken by any queue")),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, String> {
        let taken = match self.reads_streams {
            true => self.try_read(&format!("{}=stream", place.destination), count).await,
            false => self.try_take(place, count).await,
        };
        taken.map_err(|error| error.to_string())
    }
}
