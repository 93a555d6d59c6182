//! The bare clients, one file each. They share nothing with the adapters: what an adapter writes beside the payload is
//! written here by hand, so that the same bytes travel.

#[cfg(feature = "kafka")]
mod kafka;
#[cfg(feature = "nats")]
mod nats;
#[cfg(feature = "nats")]
mod nats_by_hand;
#[cfg(feature = "pulsar")]
mod pulsar;
#[cfg(feature = "rabbitmq")]
mod rabbitmq;
#[cfg(feature = "sqs")]
mod sqs;

use anyhow::{Result, bail};

use super::job::{Job, Measured};

/// Does the job with the bare client.
pub(crate) async fn measure(job: &Job) -> Result<Measured> {
    match job.broker.as_str() {
        #[cfg(feature = "kafka")]
        "kafka" => kafka::measure(job).await,
        #[cfg(feature = "nats")]
        "nats" => nats::measure(job).await,
        #[cfg(feature = "pulsar")]
        "pulsar" => pulsar::measure(job).await,
        #[cfg(feature = "rabbitmq")]
        "rabbitmq" => rabbitmq::measure(job).await,
        #[cfg(feature = "sqs")]
        "sqs" => sqs::measure(job).await,
        other => bail!("there is no bare client for {other}"),
    }
}

/// Does the job with the broker's protocol by hand, where that is less than the client has for its users.
pub(crate) async fn measure_by_hand(job: &Job) -> Result<Measured> {
    match job.broker.as_str() {
        #[cfg(feature = "nats")]
        "nats" => nats_by_hand::measure(job).await,
        other => bail!("nothing is written by hand for {other}"),
    }
}

/// Flags, timestamp, id and key, as the adapters of RabbitMQ and NATS write them.
#[cfg(any(feature = "nats", feature = "rabbitmq"))]
fn meta(id: &uuid::Uuid, key: &[u8], now: i64) -> Vec<u8> {
    let mut meta = Vec::with_capacity(64);
    meta.push(1 | 2);
    meta.extend_from_slice(&now.to_le_bytes());
    meta.extend_from_slice(id.as_bytes());
    meta.extend_from_slice(&u32::try_from(key.len()).unwrap_or(u32::MAX).to_le_bytes());
    meta.extend_from_slice(key);
    meta
}

/// Reads what [`meta`] wrote: the id and the key.
#[cfg(any(feature = "nats", feature = "rabbitmq"))]
fn read_meta(meta: &[u8]) -> Option<(uuid::Uuid, &[u8])> {
    let id = uuid::Uuid::from_slice(meta.get(9..25)?).ok()?;
    Some((id, meta.get(29..)?))
}
