//! Passwords, certificates and permissions, on a broker that is configured for them.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::path::PathBuf;
use std::time::Duration;

use anybroker_core::{Bus, Config, ErrorKind, Message, Registry};
use anybroker_kafka::KafkaDriver;
use common::{LONG, Server, receive, unique};
use tokio::time::Instant;

/// Where the secured listeners are.
struct Secured {
    sasl: u16,
    tls: u16,
    folder: PathBuf,
}

/// What `cargo xtask brokers up kafka` wrote for its server; `None` after saying why the test does not run.
fn secured() -> Option<Secured> {
    let server = Server::find()?;
    let port = |listener| server.port("listeners", listener);
    Some(Secured { sasl: port("SASL_PLAINTEXT"), tls: port("SASL_SSL"), folder: server.folder })
}

impl Secured {
    fn ca(&self) -> String {
        self.folder.join("ca.pem").to_string_lossy().into_owned()
    }
}

async fn try_connect(url: String) -> anybroker_core::Result<Bus> {
    Registry::new().with(KafkaDriver).connect(Config::from_url(url)).await
}

async fn works(url: String) {
    let bus = try_connect(url).await.unwrap();
    let name = unique("secured");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    bus.send(Message::new(name.as_str(), "let in")).await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    delivery.nack(Duration::ZERO).await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((delivery.message().bytes(), delivery.attempt()), (&b"let in"[..], 2));
    delivery.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// The kind of the refusal, which comes within the timeout and tells no secret.
async fn refused(url: String) -> ErrorKind {
    let start = Instant::now();
    let error = try_connect(format!("{url}&connect_timeout=3s")).await.map(drop).unwrap_err();
    println!("{error:?}");
    assert!(start.elapsed() < Duration::from_secs(6), "{:?} for {error}", start.elapsed());
    assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    error.kind()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_mechanism_lets_in_who_knows_the_password() {
    let Some(Secured { sasl, .. }) = secured() else { return };
    for mechanism in ["plain", "scram_sha_256", "scram_sha_512"] {
        works(format!("kafka://alice:alice-secret@127.0.0.1:{sasl}?partitions=1&sasl={mechanism}")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_lets_in_who_trusts_the_server_and_knows_the_password() {
    let Some(secured) = secured() else { return };
    let (tls, ca) = (secured.tls, secured.ca());
    works(format!("kafka://alice:alice-secret@localhost:{tls}?partitions=1&tls=true&tls_ca={ca}")).await;
    let danger = "danger_accept_any_certificate=true";
    works(format!("kafka://alice:alice-secret@127.0.0.1:{tls}?partitions=1&tls=true&{danger}")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_user_or_mechanism_is_unauthenticated() {
    let Some(Secured { sasl, .. }) = secured() else { return };
    for url in [
        format!("kafka://alice:wrong-secret@127.0.0.1:{sasl}?sasl=plain"),
        format!("kafka://alice:wrong-secret@127.0.0.1:{sasl}?sasl=scram_sha_512"),
        format!("kafka://nobody:some-secret@127.0.0.1:{sasl}?sasl=scram_sha_256"),
    ] {
        assert_eq!(refused(url).await, ErrorKind::Unauthenticated);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_trusted_or_another_host_is_unauthenticated() {
    let Some(secured) = secured() else { return };
    let (tls, ca) = (secured.tls, secured.ca());
    let wrong_ca = format!("kafka://alice:alice-secret@localhost:{tls}?tls=true");
    let wrong_host = format!("kafka://alice:alice-secret@127.0.0.1:{tls}?tls=true&tls_ca={ca}");
    for url in [wrong_ca, wrong_host] {
        assert_eq!(refused(url).await, ErrorKind::Unauthenticated);
    }
    let missing = format!("kafka://alice:alice-secret@localhost:{tls}?tls=true&tls_ca=/nowhere/ca.pem");
    assert_eq!(refused(missing).await, ErrorKind::ConfigInvalid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_nothing_is_denied_every_verb() {
    let Some(Secured { sasl, .. }) = secured() else { return };
    let name = unique("denied");
    let owner = try_connect(format!("kafka://alice:alice-secret@127.0.0.1:{sasl}?partitions=1")).await.unwrap();
    owner.send(Message::new(name.as_str(), "x")).await.unwrap();
    let bus = try_connect(format!("kafka://limited:limited-secret@127.0.0.1:{sasl}?partitions=1")).await.unwrap();
    let denied = ErrorKind::PermissionDenied;
    assert_eq!(bus.send(Message::new(name.as_str(), "x")).await.unwrap_err().kind(), denied);
    assert_eq!(bus.send(Message::new(unique("new").as_str(), "x")).await.unwrap_err().kind(), denied);
    let subscribed = bus.subscribe(bus.subscription(name.as_str(), "g")).await;
    assert_eq!(subscribed.map(drop).unwrap_err().kind(), denied);
    assert_eq!(bus.describe(name.as_str()).await.unwrap_err().kind(), denied);
    assert_eq!(bus.lag(name.as_str(), "g").await.unwrap_err().kind(), denied);
    assert_eq!(bus.delete(name.as_str(), None).await.unwrap_err().kind(), denied);
    owner.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test]
async fn settings_that_do_not_go_together_are_refused_by_name() {
    for (url, key) in [
        ("kafka://h:9092?tls_ca=/x.pem", "kafka.tls"),
        ("kafka://h:9092?danger_accept_any_certificate=true", "kafka.tls"),
        ("kafka://h:9092?tls=true&tls_key=/x.pem", "kafka.tls_key"),
    ] {
        let error = try_connect(url.into()).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
        assert!(format!("{error:?}").contains(key), "{error:?}");
    }
}
