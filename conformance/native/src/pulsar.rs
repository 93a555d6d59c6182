//! Pulsar's bare client: `pulsar`.

use std::time::Duration;

use anybroker_conformance::{Carries, NativeChannel, Place, RawMessage};
use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::TryStreamExt;
use pulsar::consumer::InitialPosition;
use pulsar::{
    Authentication, Consumer, ConsumerOptions, Error, ProducerOptions, Pulsar, SubType, TokioExecutor, producer,
};

use crate::access::Access;
use crate::pulsar_null;

const CONTENT_TYPE: &str = "content-type";
const PATIENCE: Duration = Duration::from_secs(20);
/// More than any case puts: what is put together becomes one batch.
const BATCH: u32 = 1_000;

pub(crate) struct Native {
    url: String,
    token: Option<String>,
}

impl Native {
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        access.without(&["tls_ca"])?;
        Ok(Self { url: access.base.clone(), token: access.setting("token").map(str::to_owned) })
    }

    async fn client(&self) -> Result<Pulsar<TokioExecutor>, Error> {
        let mut builder = Pulsar::builder(&self.url, TokioExecutor);
        if let Some(token) = &self.token {
            let (name, data) = ("token".to_owned(), token.clone().into_bytes());
            builder = builder.with_auth(Authentication { name, data });
        }
        builder.build().await
    }

    async fn try_put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), Error> {
        let options = ProducerOptions { batch_size: Some(BATCH), ..ProducerOptions::default() };
        let client = self.client().await?;
        let (nulls, messages): (Vec<_>, Vec<_>) = messages.iter().partition(|message| message.payload.is_none());
        if !nulls.is_empty() {
            pulsar_null::put(&client, self.token.as_deref(), &place.destination, &nulls).await?;
        }
        if messages.is_empty() {
            return Ok(());
        }
        let builder = client.producer().with_topic(&place.destination).with_options(options);
        let mut producer = builder.build().await?;
        let mut receipts = Vec::new();
        for message in messages {
            let texts = message.headers.iter();
            let texts = texts.map(|(name, value)| (name.clone(), String::from_utf8_lossy(value).into_owned()));
            let mut put = producer::Message {
                payload: message.payload.clone().unwrap_or_default(),
                properties: texts.collect(),
                ..producer::Message::default()
            };
            if let Some(content_type) = &message.content_type {
                put.properties.insert(CONTENT_TYPE.to_owned(), content_type.clone());
            }
            if let Some(key) = &message.key {
                let text = std::str::from_utf8(key).ok();
                put.partition_key_b64_encoded = text.is_none().then_some(true);
                put.partition_key = Some(text.map_or_else(|| STANDARD.encode(key), str::to_owned));
            }
            receipts.push(producer.send_non_blocking(put).await?);
        }
        producer.send_batch().await?;
        for receipt in receipts {
            receipt.await?;
        }
        Ok(())
    }

    async fn try_take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, Error> {
        let options = ConsumerOptions { durable: Some(false), ..ConsumerOptions::default() }
            .with_initial_position(InitialPosition::Earliest);
        let builder = self.client().await?.consumer().with_topic(&place.destination).with_subscription("bare");
        let builder = builder.with_subscription_type(SubType::Exclusive).with_options(options);
        let mut consumer: Consumer<Vec<u8>, _> = builder.build().await?;
        let mut taken = Vec::new();
        while taken.len() < count {
            let Some(message) = consumer.try_next().await? else { break };
            let metadata = &message.payload.metadata;
            let payload = (!metadata.null_value()).then(|| message.payload.data.clone());
            let mut raw = RawMessage { payload, ..RawMessage::default() };
            raw.key = metadata.partition_key.as_ref().map(|key| match metadata.partition_key_b64_encoded() {
                true => STANDARD.decode(key).unwrap_or_default(),
                false => key.as_bytes().to_vec(),
            });
            for property in &metadata.properties {
                match property.key.as_str() {
                    CONTENT_TYPE => raw.content_type = Some(property.value.clone()),
                    name => raw.headers.push((name.to_owned(), property.value.as_bytes().to_vec())),
                }
            }
            taken.push(raw);
        }
        Ok(taken)
    }
}

#[async_trait]
impl NativeChannel for Native {
    fn carries(&self) -> Carries {
        Carries { any_bytes: true, empty: true, null: true, keys: true, content_type: true, any_header: false }
    }

    async fn put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), String> {
        self.try_put(place, messages).await.map_err(|error| error.to_string())
    }

    async fn take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, String> {
        match tokio::time::timeout(PATIENCE, self.try_take(place, count)).await {
            Ok(taken) => taken.map_err(|error| error.to_string()),
            Err(_) => Err(format!("{count} did not come within {PATIENCE:?}")),
        }
    }
}
