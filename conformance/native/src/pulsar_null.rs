//! Payloads that are null. The producers of the `pulsar` crate write none (their messages have no place for `null_value`), so this
//! speaks the protocol for them, with the crate's frames.

use std::time::SystemTime;

use anybroker_conformance::RawMessage;
use futures_util::{SinkExt as _, StreamExt as _};
use pulsar::message::proto::base_command::Type;
use pulsar::message::proto::{self, BaseCommand};
use pulsar::message::{Codec, Message, Payload};
use pulsar::{Error, Pulsar, TokioExecutor};
use tokio::net::TcpStream;
use tokio_util::codec::Framed;

/// The version of the protocol that the crate itself connects with.
const PROTOCOL: i32 = 12;
const PRODUCER: u64 = 1;

/// Writes each to the topic's first partition, or to the topic where it has none.
pub(crate) async fn put(
    client: &Pulsar<TokioExecutor>,
    token: Option<&str>,
    topic: &str,
    messages: &[&RawMessage],
) -> Result<(), Error> {
    let brokers = client.lookup_partitioned_topic(topic).await?;
    let (topic, broker) = brokers.into_iter().next().ok_or_else(|| other("nobody serves the topic"))?;
    let mut line = Line(Framed::new(TcpStream::connect(broker.broker_url).await.map_err(other)?, Codec));
    let hello = proto::CommandConnect {
        client_version: proto::client_version(),
        auth_method_name: token.map(|_| "token".to_owned()),
        auth_data: token.map(|token| token.as_bytes().to_vec()),
        protocol_version: Some(PROTOCOL),
        ..proto::CommandConnect::default()
    };
    line.tell(BaseCommand { connect: Some(hello), ..of(Type::Connect) }, None).await?;
    line.until(|answer| answer.connected.take()).await?;
    let producer = proto::CommandProducer { topic, producer_id: PRODUCER, ..proto::CommandProducer::default() };
    line.tell(BaseCommand { producer: Some(producer), ..of(Type::Producer) }, None).await?;
    let name = line.until(|answer| answer.producer_success.take()).await?.producer_name;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_err(other)?.as_millis();
    for (sequence_id, message) in (0..).zip(messages) {
        let properties = message.headers.iter().map(|(key, value)| proto::KeyValue {
            key: key.clone(),
            value: String::from_utf8_lossy(value).into_owned(),
        });
        let metadata = proto::MessageMetadata {
            producer_name: name.clone(),
            sequence_id,
            publish_time: u64::try_from(now).map_err(other)?,
            properties: properties.collect(),
            partition_key: message.key.as_ref().map(|key| String::from_utf8_lossy(key).into_owned()),
            null_value: Some(true),
            ..proto::MessageMetadata::default()
        };
        let send = proto::CommandSend { producer_id: PRODUCER, sequence_id, ..proto::CommandSend::default() };
        let payload = Payload { metadata, data: Vec::new() };
        line.tell(BaseCommand { send: Some(send), ..of(Type::Send) }, Some(payload)).await?;
        line.until(|answer| answer.send_receipt.take()).await?;
    }
    Ok(())
}

/// A connection to a broker.
struct Line(Framed<TcpStream, Codec>);

impl Line {
    async fn tell(&mut self, command: BaseCommand, payload: Option<Payload>) -> Result<(), Error> {
        self.0.send(Message { command, payload }).await.map_err(other)
    }

    /// The answer that is waited for; what the broker complains about is an error.
    async fn until<T>(&mut self, wanted: impl Fn(&mut BaseCommand) -> Option<T>) -> Result<T, Error> {
        while let Some(answer) = self.0.next().await {
            let mut answer = answer.map_err(other)?.command;
            if let Some(found) = wanted(&mut answer) {
                return Ok(found);
            }
            if let Some(error) = answer.error {
                return Err(other(error.message));
            }
            if let Some(error) = answer.send_error {
                return Err(other(error.message));
            }
        }
        Err(other("the broker ended the connection"))
    }
}

fn of(kind: Type) -> BaseCommand {
    BaseCommand { r#type: kind.into(), ..BaseCommand::default() }
}

fn other(error: impl std::fmt::Display) -> Error {
    Error::Custom(error.to_string())
}
