//! A fatal error of the idempotent producer ends that producer, and not the connection. librdkafka's own mock cluster
//! answers what no healthy broker does; everything else is the client as it is.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use anybroker_core::{Config, Message, Registry};
use anybroker_kafka::KafkaDriver;
use rdkafka::ClientConfig;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, DefaultProducerContext, Producer};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use tokio::time::Instant;

const LONG: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_fatal_error_the_same_connection_publishes() {
    let cluster: MockCluster<'_, DefaultProducerContext> = MockCluster::new(1).unwrap();
    cluster.create_topic("t", 1, 1).unwrap();
    let denial = || {
        let denied = RDKafkaRespErr::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED;
        cluster.request_errors(RDKafkaApiKey::InitProducerId, &[denied]);
    };
    // The client by itself: the answer is fatal to it.
    denial();
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", cluster.bootstrap_servers()).set("enable.idempotence", "true");
    let bare: BaseProducer = config.create().unwrap();
    let deadline = Instant::now() + LONG;
    while bare.client().fatal_error().is_none() {
        assert!(Instant::now() < deadline, "the answer is not fatal");
        bare.poll(Duration::from_millis(50));
    }
    denial();
    let url = format!("kafka://{}?create_destinations=false", cluster.bootstrap_servers());
    let bus = Registry::new().with(KafkaDriver).connect(Config::from_url(url)).await.unwrap();
    let deadline = Instant::now() + LONG;
    while let Err(error) = bus.send(Message::new("t", "x")).await {
        assert!(Instant::now() < deadline, "{error:?}");
    }
    bus.send(Message::new("t", "y")).await.unwrap();
    bus.close(LONG).await.unwrap();
}
