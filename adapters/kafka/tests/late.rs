//! What a topic does not take: refused before it is sent where that can be known, because librdkafka sends what is behind
//! a failed batch all the same; held back where it fails on its way.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bus, Config, Effect, ErrorKind, Message, PublishOptions, PublishOutcome, Registry, ack};
use anybroker_kafka::KafkaDriver;
use common::{LONG, connect, nothing, number, publish, receive, unique, url};
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use tokio::time::Instant;

/// Of the topics that take less than the cluster's default.
const LIMIT: usize = 50_000;

fn admin(url: &str) -> AdminClient<DefaultClientContext> {
    let host = url.strip_prefix("kafka://").unwrap();
    ClientConfig::new().set("bootstrap.servers", host).create().unwrap()
}

/// A topic of one partition that somebody else made.
async fn topic(url: &str, name: &str, setting: (&str, &str)) -> String {
    let name = unique(name);
    let new = NewTopic::new(&name, 1, TopicReplication::Fixed(1)).set(setting.0, setting.1);
    let created = admin(url).create_topics([&new], &AdminOptions::new()).await.unwrap();
    created.into_iter().for_each(|created| assert!(created.is_ok(), "{created:?}"));
    name
}

/// From now on a topic takes less.
async fn limit(url: &str, topic: &str) {
    let (specifier, limit) = (ResourceSpecifier::Topic(topic), LIMIT.to_string());
    let changed = AlterConfig { specifier, entries: HashMap::from([("max.message.bytes", limit.as_str())]) };
    admin(url).alter_configs([&changed], &AdminOptions::new()).await.unwrap().into_iter().for_each(|changed| {
        changed.unwrap();
    });
}

/// What compression does not make smaller.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..bytes).map(|_| next()).collect()
}

/// Ok, or kind and effect.
fn verdict(outcome: &PublishOutcome) -> Option<(ErrorKind, Effect)> {
    outcome.as_ref().err().map(|error| (error.kind(), error.effect()))
}

const HELD_BACK: Option<(ErrorKind, Effect)> = Some((ErrorKind::Unavailable, Effect::NotDone));
const TOO_LARGE: Option<(ErrorKind, Effect)> = Some((ErrorKind::TooLarge, Effect::NotDone));

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_large_for_its_topic_holds_back_its_key_and_spoils_nothing_else() {
    let Some(url) = url() else { return };
    let name = topic(&url, "limit", ("max.message.bytes", "50000")).await;
    let bus = connect(&url, "partitions=1").await;
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let message = |key: &str, payload: Vec<u8>| Message::new(name.as_str(), payload).with_key(key.to_owned());
    let batch = vec![
        message("k", b"0".to_vec()),
        message("k", noise(LIMIT)),
        message("k", b"1".to_vec()),
        message("other", b"2".to_vec()),
    ];
    let verdicts: Vec<_> = bus.publish(batch).await.iter().map(verdict).collect();
    assert_eq!(verdicts, [None, TOO_LARGE, HELD_BACK, None]);
    let deliveries = receive(&mut subscriber, 2).await;
    assert_eq!(deliveries.iter().map(number).collect::<Vec<_>>(), [0, 2]);
    for outcome in ack(deliveries).await {
        outcome.unwrap();
    }
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_fit_one_by_one_are_stored_however_many_there_are() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    for limit in ["50000", "3000", "1048588"] {
        let name = topic(&url, "pieces", ("max.message.bytes", limit)).await;
        let payload = noise(2_000);
        let batch = (0..2_000).map(|_| Message::new(name.as_str(), payload.clone()).with_key("k")).collect();
        let failed: Vec<_> = bus.publish(batch).await.into_iter().filter_map(Result::err).collect();
        assert!(failed.is_empty(), "{limit}: {} failed, such as {:?}", failed.len(), failed[0]);
    }
    bus.close(LONG).await.unwrap();
}

/// The sum is exact: whatever is not refused before is taken by the broker, and what is refused before is one byte too
/// large or more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_message_of_a_topic_is_stored_and_one_byte_more_is_refused_before() {
    let Some(url) = url() else { return };
    let name = topic(&url, "edge", ("max.message.bytes", "50000")).await;
    let bus = connect(&url, "partitions=1").await;
    let all = noise(LIMIT);
    // Each with its own key and one behind it, which tells who refused: the broker does so too late to hold it back.
    let pair = |size: usize| {
        let message = |payload: &[u8]| {
            Message::new(name.as_str(), payload.to_vec())
                .with_key(size.to_string())
                .with_header("a", noise(100))
                .with_content_type("text/plain")
        };
        [message(&all[..size]), message(b"x")]
    };
    let mut largest = None;
    for size in (LIMIT - 500)..LIMIT {
        let verdicts: Vec<_> = bus.publish(pair(size).into()).await.iter().map(verdict).collect();
        match (&verdicts[..], largest) {
            ([None, None], None) => {}
            ([TOO_LARGE, HELD_BACK], None) => largest = Some(size - 1),
            ([TOO_LARGE, HELD_BACK], Some(_)) => {}
            other => panic!("{size}: {other:?}"),
        }
    }
    let largest = largest.unwrap();
    // The same record by the bare client: the broker's own limit is at the same place.
    let bare: rdkafka::producer::FutureProducer =
        ClientConfig::new().set("bootstrap.servers", url.strip_prefix("kafka://").unwrap()).create().unwrap();
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let last = loop {
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        let is_last = delivery.message().bytes().len() == largest;
        delivery.ack().await.unwrap();
        if is_last {
            break stored_headers(&url, &name, largest).await;
        }
    };
    for (size, fits) in [(largest, true), (largest + 1, false)] {
        let key = largest.to_string();
        let record = rdkafka::producer::FutureRecord::to(&name).key(&key).payload(&all[..size]).headers(last.clone());
        let sent = bare.send(record, LONG).await;
        assert_eq!(sent.is_ok(), fits, "{size}: {sent:?}");
    }
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// The headers of the record with a payload of that size, as they stand in the topic.
async fn stored_headers(url: &str, name: &str, size: usize) -> rdkafka::message::OwnedHeaders {
    use rdkafka::consumer::{BaseConsumer, Consumer};
    use rdkafka::message::{Headers, Message};
    let (host, name) = (url.strip_prefix("kafka://").unwrap().to_owned(), name.to_owned());
    let read = move || {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", host).set("group.id", "reader").set("auto.offset.reset", "earliest");
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = rdkafka::TopicPartitionList::new();
        list.add_partition_offset(&name, 0, rdkafka::Offset::Beginning).unwrap();
        consumer.assign(&list).unwrap();
        let deadline = std::time::Instant::now() + LONG;
        loop {
            assert!(std::time::Instant::now() < deadline, "the record is not there");
            let Some(Ok(record)) = consumer.poll(Duration::from_millis(100)) else { continue };
            if record.payload().is_some_and(|payload| payload.len() == size) {
                let mut headers = rdkafka::message::OwnedHeaders::new();
                for header in record.headers().unwrap().iter() {
                    headers = headers.insert(header);
                }
                return headers;
            }
        }
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compacted_topic_refuses_what_has_no_key_and_its_neighbours_are_stored() {
    let Some(url) = url() else { return };
    let name = topic(&url, "compacted", ("cleanup.policy", "compact")).await;
    let bus = connect(&url, "partitions=1").await;
    let message = |payload: &'static str| Message::new(name.as_str(), payload);
    let batch = vec![message("0").with_key("a"), message("1"), message("2").with_key("b"), message("3").with_key("")];
    let verdicts: Vec<_> = bus.publish(batch).await.iter().map(verdict).collect();
    assert_eq!(verdicts, [None, Some((ErrorKind::InvalidMessage, Effect::NotDone)), None, None]);
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_that_is_lowered_is_learned_from_the_first_refusal() {
    let Some(url) = url() else { return };
    let name = topic(&url, "lowered", ("max.message.bytes", "500000")).await;
    let bus = connect(&url, "partitions=1").await;
    let batch = || {
        let message = |payload: Vec<u8>| Message::new(name.as_str(), payload).with_key("k");
        vec![message(noise(100_000)), message(b"x".to_vec())]
    };
    publish(&bus, batch()).await;
    limit(&url, &name).await;
    // The broker's own threads see the new limit a moment later.
    let deadline = Instant::now() + LONG;
    loop {
        let first = bus.publish(vec![batch().remove(0)]).await;
        if verdict(&first[0]) == TOO_LARGE {
            break;
        }
        assert!(Instant::now() < deadline, "{first:?}");
    }
    let verdicts: Vec<_> = bus.publish(batch()).await.iter().map(verdict).collect();
    assert_eq!(verdicts, [TOO_LARGE, HELD_BACK]);
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_deleted_underneath_is_not_found_or_made_again() {
    let Some(url) = url() else { return };
    let name = topic(&url, "deleted", ("max.message.bytes", "500000")).await;
    let (makes, finds) = (connect(&url, "partitions=1").await, connect(&url, "create_destinations=false").await);
    for bus in [&makes, &finds] {
        bus.send(Message::new(name.as_str(), "x").with_key("k")).await.unwrap();
    }
    admin(&url).delete_topics(&[&name], &AdminOptions::new()).await.unwrap().into_iter().for_each(|deleted| {
        deleted.unwrap();
    });
    // A publish that is on its way when the client learns of it may get no answer at all.
    let short = PublishOptions::default().with_timeout(Duration::from_secs(3));
    let send = async |bus: &Bus| {
        let message = Message::new(name.as_str(), "y").with_key("k");
        bus.submit(vec![message], &short).await.await.remove(0)
    };
    let deadline = Instant::now() + LONG;
    let gone = loop {
        match send(&finds).await {
            Err(error) if error.kind() == ErrorKind::NotFound => break error,
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
    };
    assert_eq!(gone.effect(), Effect::NotDone);
    let deadline = Instant::now() + LONG;
    while let Err(error) = send(&makes).await {
        assert!(Instant::now() < deadline, "{error:?}");
    }
    // And then the other finds it again.
    let deadline = Instant::now() + LONG;
    while let Err(error) = send(&finds).await {
        assert!(Instant::now() < deadline, "{error:?}");
    }
    for bus in [makes, finds] {
        bus.close(LONG).await.unwrap();
    }
}

/// librdkafka keeps 100,000 messages, so that the end of this batch waits for room; meanwhile the client breaks, and
/// all that it holds is unknown. The client that takes its place must not get the rest of the key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_a_client_is_replaced_in_the_middle_of_a_batch_the_rest_of_its_keys_is_held_back() {
    const COUNT: usize = 110_000;
    let cluster: MockCluster<'_, DefaultProducerContext> = MockCluster::new(1).unwrap();
    cluster.create_topic("t", 1, 1).unwrap();
    // Without its producer's id the client sends nothing. It asks again and again; the last answer is fatal.
    cluster.broker_round_trip_time(1, Duration::from_millis(400)).unwrap();
    let mut answers = vec![RDKafkaRespErr::RD_KAFKA_RESP_ERR_COORDINATOR_NOT_AVAILABLE; 15];
    answers.push(RDKafkaRespErr::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED);
    cluster.request_errors(RDKafkaApiKey::InitProducerId, &answers);
    let bus = mock(&cluster).await;
    let batch = (0..COUNT).map(|_| Message::new("t", "x").with_key("k")).collect();
    let options = PublishOptions::default().with_timeout(LONG);
    let outcomes = bus.submit(batch, &options).await.await;
    let first = outcomes.iter().position(Result::is_err).expect("the client has met no fatal error");
    let stored_behind = outcomes[first..].iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(stored_behind, 0, "behind entry {first}: {:?}", outcomes[first]);
    assert_eq!(verdict(&outcomes[COUNT - 1]), HELD_BACK);
    bus.send(Message::new("t", "afterwards").with_key("k")).await.unwrap();
    bus.close(LONG).await.unwrap();
}

async fn mock(cluster: &MockCluster<'_, DefaultProducerContext>) -> Bus {
    let url = format!("kafka://{}?create_destinations=false", cluster.bootstrap_servers());
    Registry::new().with(KafkaDriver).connect(Config::from_url(url)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_fails_at_the_broker_keeps_its_transaction_from_committing() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let (good, strict) = (unique("fails-good"), unique("fails-strict"));
    let mut subscriber = bus.subscribe(bus.subscription(good.as_str(), "g")).await.unwrap();
    let large = || Message::new(strict.as_str(), noise(100_000));
    publish(&bus, vec![large()]).await;
    limit(&url, &strict).await;
    // The broker's own threads see the new limit a moment later.
    let deadline = Instant::now() + LONG;
    loop {
        let transaction = bus.begin().await.unwrap();
        let options = PublishOptions::default().with_transaction(Arc::clone(&transaction));
        let batch = vec![Message::new(good.as_str(), "7"), large()];
        let outcomes = bus.submit(batch, &options).await.await;
        if outcomes[1].is_ok() {
            assert!(Instant::now() < deadline, "the topic still takes it");
            transaction.abort().await.unwrap();
            continue;
        }
        let error = transaction.commit().await.unwrap_err();
        assert_eq!(error.effect(), Effect::NotDone, "{error:?}");
        break;
    }
    let transaction = bus.begin().await.unwrap();
    let options = PublishOptions::default().with_transaction(Arc::clone(&transaction));
    bus.submit(vec![Message::new(good.as_str(), "8")], &options).await.await.remove(0).unwrap();
    transaction.commit().await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!(number(&delivery), 8);
    delivery.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
    for destination in [good, strict] {
        bus.delete(destination.as_str(), None).await.unwrap();
    }
    bus.close(LONG).await.unwrap();
}
