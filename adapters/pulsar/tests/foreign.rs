//! What other clients' producers write that this adapter does not read.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::time::Duration;

use anybroker_core::{Message, Reason};
use common::{LONG, connect, number, receive, unique, url};
use futures_util::{SinkExt, StreamExt};
use pulsar::message::{Codec, Message as Frame, Payload};
use pulsar::proto::{self, BaseCommand, MessageMetadata, base_command::Type};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::codec::Framed;

/// A producer that writes what it is given, as it is.
struct Producer(Framed<TcpStream, Codec>);

impl Producer {
    async fn open(url: &str, topic: &str) -> Self {
        let address = url.split("://").nth(1).unwrap().split('?').next().unwrap();
        let mut own = Self(Framed::new(TcpStream::connect(address).await.unwrap(), Codec));
        let connect =
            proto::CommandConnect { client_version: "a test".into(), protocol_version: Some(19), ..Default::default() };
        own.ask(BaseCommand { connect: Some(connect), ..command(Type::Connect) }, None).await;
        let producer = proto::CommandProducer {
            topic: format!("persistent://public/default/{topic}"),
            producer_id: 1,
            request_id: 1,
            ..Default::default()
        };
        let made = own.ask(BaseCommand { producer: Some(producer), ..command(Type::Producer) }, None).await;
        assert!(made.producer_success.is_some(), "{made:?}");
        own
    }

    async fn send(&mut self, sequence_id: u64, metadata: MessageMetadata, data: Vec<u8>) {
        let publish_time = 1;
        let metadata = MessageMetadata { producer_name: "a test".into(), sequence_id, publish_time, ..metadata };
        let send = proto::CommandSend {
            producer_id: 1,
            sequence_id,
            num_messages: metadata.num_messages_in_batch,
            ..Default::default()
        };
        let command = BaseCommand { send: Some(send), ..command(Type::Send) };
        let answer = self.ask(command, Some(Payload { metadata, data })).await;
        assert!(answer.send_receipt.is_some(), "{answer:?}");
    }

    async fn ask(&mut self, command: BaseCommand, payload: Option<Payload>) -> BaseCommand {
        self.0.send(Frame { command, payload }).await.unwrap();
        self.0.next().await.unwrap().unwrap().command
    }
}

fn command(kind: Type) -> BaseCommand {
    BaseCommand { r#type: kind as i32, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_unreadable_messages_than_may_be_in_flight_become_dead_letters_and_what_is_behind_them_comes() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("unreadable");
    let spec = bus.subscription(name.as_str(), "g").with_max_in_flight(4);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let mut producer = Producer::open(&url, &name).await;
    for sequence in 0..6 {
        let compressed = MessageMetadata { compression: Some(1), ..Default::default() };
        producer.send(sequence, compressed, vec![7; 3]).await;
    }
    // In a batch of three, which takes three permits.
    for sequence in 6..9 {
        let batch = MessageMetadata { compression: Some(1), num_messages_in_batch: Some(3), ..Default::default() };
        producer.send(sequence, batch, vec![7; 30]).await;
    }
    bus.send(Message::new(name.as_str(), "1")).await.unwrap();
    let came = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!(number(&came), 1);
    came.ack().await.unwrap();
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    let deadline = Instant::now() + LONG;
    let found = loop {
        let found = letters.page(None, 100).await.unwrap().letters;
        if found.len() >= 9 {
            break found;
        }
        assert!(Instant::now() < deadline, "{found:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(found.len(), 9);
    assert!(found.iter().all(|letter| letter.reason == Reason::Malformed), "{found:?}");
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}
