//! Passwords, certificates and permissions, on a broker that is configured for them.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anybroker_core::{
    Bus, Config, Credentials, Effect, ErrorKind, Message, Registry, Retry, Secret, Settlement, Subscriber,
    SubscriptionEvent, ack, settle_in,
};
use anybroker_kafka::KafkaDriver;
use anybroker_testing::Vault;
use common::{LONG, Server, number, numbered, publish, receive, unique};
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

fn rotated(password: &str) -> Credentials {
    Credentials::Password { user: "rotated".into(), password: Secret::new(password) }
}

/// Gives the user another password, as an administrator does. Connections that exist are asked for it within seconds
/// (`connections.max.reauth.ms`).
fn sets_password(server: &Server, password: &str) {
    let setting = format!("SCRAM-SHA-256=[password={password}]");
    let alter = ["--alter", "--add-config", &setting, "--entity-type", "users", "--entity-name", "rotated"];
    server.tool("kafka.admin.ConfigCommand", &alter);
}

/// Whether the client of a member that was replaced is still there.
fn is_closing() -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let names = threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap_or_default());
    names.into_iter().any(|name| name.trim_end() == "kafka-closing")
}

/// A client of its own publishes, and the member's offsets are committed with it.
async fn in_a_transaction(bus: &Bus, subscriber: &mut Subscriber, name: &str, number: u32) {
    publish(bus, numbered(name, number..number + 1)).await;
    let delivery = receive(subscriber, 1).await.remove(0);
    let transaction = bus.begin().await.unwrap();
    settle_in(&transaction, vec![(delivery, Settlement::Ack)]).await.remove(0).unwrap();
    transaction.commit().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passwords_are_replaced_while_a_service_runs() {
    let Some(server) = Server::find() else { return };
    let Some(secured) = secured() else { return };
    sets_password(&server, "first-secret");
    let vault = Vault::saying(Ok(rotated("first-secret")));
    let url = format!("kafka://127.0.0.1:{}?partitions=2&sasl=scram_sha_256&publish_timeout=5s", secured.sasl);
    let config = || Config::from_url(url.as_str()).with_credentials(vault.clone());
    let bus = Registry::new().with(KafkaDriver).connect(config()).await.unwrap();
    let name = unique("rotated");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..20)).await;
    let first = receive(&mut subscriber, 20).await;
    for outcome in ack(first).await {
        outcome.unwrap();
    }
    in_a_transaction(&bus, &mut subscriber, &name, 100).await;

    // The provider does not know the new one yet.
    let old = tokio::task::spawn_blocking(move || sets_password(&server, "second-secret"));
    old.await.unwrap();
    let deadline = Instant::now() + LONG;
    let mut left: BTreeSet<u32> = BTreeSet::new();
    let refused = loop {
        assert!(Instant::now() < deadline, "a password that was replaced is let in");
        match bus.publish(numbered(&name, 20..21)).await.remove(0) {
            Ok(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            Err(error) if error.kind() == ErrorKind::Unauthenticated => break error,
            Err(error) => println!("{error}"),
        }
    };
    assert_eq!((refused.effect(), refused.retry()), (Effect::Unknown, Retry::Later(None)), "{refused}");
    assert!(!format!("{refused} {refused:?}").contains("secret"), "{refused:?}");
    let mut told = false;
    while !told {
        assert!(Instant::now() < deadline, "the subscriber was told nothing");
        let received = subscriber.receive_all(100, Duration::from_secs(1)).await.unwrap();
        told = received.events.iter().any(|event| matches!(event, SubscriptionEvent::Degraded { .. }));
        // Nobody takes its ack: it comes again.
        left.extend(received.deliveries.iter().map(number));
    }
    vault.says(Err("sealed"));
    assert_eq!(
        Registry::new().with(KafkaDriver).connect(config()).await.map(drop).unwrap_err().kind(),
        ErrorKind::NotFound
    );

    let begun = Instant::now();
    vault.says(Ok(rotated("second-secret")));
    left.extend(40..60);
    let deadline = Instant::now() + LONG * 2;
    let mut unsent: Vec<Message> = numbered(&name, 40..60);
    while !unsent.is_empty() {
        assert!(Instant::now() < deadline, "nothing is published with the new password");
        let outcomes = bus.publish(unsent.clone()).await;
        unsent = unsent.into_iter().zip(outcomes).filter(|(_, outcome)| outcome.is_err()).map(|(m, _)| m).collect();
    }
    println!("publishes again after {:?}", begun.elapsed());
    while !left.is_empty() {
        assert!(Instant::now() < deadline, "{left:?} did not come");
        let received = subscriber.receive_all(100, Duration::from_secs(1)).await.unwrap();
        let numbers: Vec<u32> = received.deliveries.iter().map(number).collect();
        for (number, outcome) in numbers.into_iter().zip(ack(received.deliveries).await) {
            if outcome.is_ok() {
                left.remove(&number);
            }
        }
    }
    println!("received again after {:?}", begun.elapsed());
    in_a_transaction(&bus, &mut subscriber, &name, 101).await;
    assert_eq!(bus.lag(name.as_str(), "g").await.unwrap().total(), Some(0));
    let deadline = Instant::now() + LONG;
    while is_closing() {
        assert!(Instant::now() < deadline, "the member that was replaced does not end");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test]
async fn what_is_no_password_is_a_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("login.yaml");
    std::fs::write(&file, "token: MARKER").unwrap();
    let config = Config::from_url("kafka://localhost:1").with("credentials_file", file.display().to_string());
    let error = Registry::new().with(KafkaDriver).connect(config).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(error.to_string().contains("expected user and password"), "{error}");
    assert!(!error.to_string().contains("MARKER"), "{error}");
}
