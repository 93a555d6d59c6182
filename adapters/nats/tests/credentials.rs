//! Credentials that change while a service runs, on servers whose users come and go.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anybroker_core::{Bus, Config, Credentials, Effect, ErrorKind, Order, Registry, Result, Secret, Subscriber};
use anybroker_nats::NatsDriver;
use anybroker_testing::{Told, Vault, refused, send};
use common::server::OwnServer;
use common::{LONG, number, unique};
use nkeys::KeyPair;

fn password(user: &str, password: &str) -> Credentials {
    Credentials::Password { user: user.to_owned(), password: Secret::new(password) }
}

/// A server that waits for a second only for what a client shows.
fn users(users: &str) -> String {
    format!("authorization {{ timeout: 1, users = [ {users} ] }}")
}

async fn connect(config: Config) -> Result<Bus> {
    Registry::new().with(NatsDriver).connect(config).await
}

/// Receives and acks until all of `expected` have come.
async fn drain(subscriber: &mut Subscriber, expected: &BTreeSet<u32>) {
    let deadline = Instant::now() + LONG;
    let mut came = BTreeSet::new();
    while !expected.is_subset(&came) {
        let missing: Vec<_> = expected.difference(&came).collect();
        assert!(Instant::now() < deadline, "{missing:?} did not come");
        for delivery in subscriber.receive(16, Duration::from_secs(1)).await.unwrap() {
            came.insert(number(&delivery));
            delivery.ack().await.unwrap();
        }
    }
}

async fn send_five(bus: &Bus, name: &str, next: u32, stored: &mut BTreeSet<u32>) {
    for number in next..next + 5 {
        send(bus, name, number, LONG).await.unwrap();
        stored.insert(number);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_goes_on_with_what_its_provider_says_after_its_password_was_changed() {
    let Some(server) = OwnServer::start(|_| users("{ user: alice, password: one }")) else { return };
    let vault = Vault::saying(Ok(password("alice", "one")));
    let bus = connect(Config::from_url(server.url("")).with_credentials(vault.clone())).await.unwrap();
    let name = unique("rotated");
    let spec = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(5));
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let (mut next, mut stored) = (5, BTreeSet::new());
    send_five(&bus, &name, 0, &mut stored).await;
    // What is out when the connection ends comes again.
    drop(subscriber.receive(2, LONG).await.unwrap());

    server.reload(&users("{ user: alice, password: two }"));
    refused(&bus, &name, ErrorKind::Unauthenticated, &mut next, &mut stored).await;
    // A destination that was not published to yet is refused in the same way.
    let error = send(&bus, unique("other").as_str(), 0, Duration::from_secs(2)).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Unauthenticated, Effect::NotDone), "{error:?}");
    let asking = bus.describe(name.as_str()).await.unwrap_err();
    assert_eq!((asking.kind(), asking.effect()), (ErrorKind::Unauthenticated, Effect::NotDone), "{asking:?}");

    // While the provider says nothing useful, it is as if the broker could not be reached.
    vault.says(Err("the vault is sealed"));
    let error = refused(&bus, &name, ErrorKind::Unavailable, &mut next, &mut stored).await;
    assert!(error.message().contains("the vault is sealed"), "{error}");
    let key = Credentials::AccessKey { id: "id".into(), secret: Secret::new("x"), session_token: None };
    vault.says(Ok(key));
    loop {
        let error = refused(&bus, &name, ErrorKind::Unavailable, &mut next, &mut stored).await;
        if error.message().contains("expected user and password") {
            break;
        }
    }

    // It may take longer than the server waits for a client.
    vault.says_after(Ok(password("alice", "two")), Duration::from_secs(2));
    send_five(&bus, &name, next, &mut stored).await;
    drain(&mut subscriber, &stored).await;
    assert_eq!(bus.describe(name.as_str()).await.unwrap().groups.len(), 1);
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

fn write(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(&beside, path).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_keeps_order_goes_on_with_the_key_in_its_file_after_its_user_was_removed() {
    let (key, other) = (KeyPair::new_user(), KeyPair::new_user());
    let Some(server) = OwnServer::start(|_| users(&format!("{{ nkey: {} }}", key.public_key()))) else { return };
    let file = server.folder.path().join("login.toml");
    write(&file, &format!("seed = \"{}\"", key.seed().unwrap()));
    let config = Config::from_url(server.url("")).with("credentials_file", file.display().to_string());
    let bus = connect(config).await.unwrap();
    let name = unique("replaced");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g").with_order(Order::Key)).await.unwrap();
    let (mut next, mut stored) = (5, BTreeSet::new());
    send_five(&bus, &name, 0, &mut stored).await;
    drain(&mut subscriber, &stored).await;
    stored.clear();

    server.reload(&users(&format!("{{ nkey: {} }}", other.public_key())));
    refused(&bus, &name, ErrorKind::Unauthenticated, &mut next, &mut stored).await;
    write(&file, &format!("seed = \"{}\"", other.seed().unwrap()));
    send_five(&bus, &name, next, &mut stored).await;
    drain(&mut subscriber, &stored).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_for_the_first_time_tells_at_once_what_is_wrong() {
    let Some(server) = OwnServer::start(|_| "authorization { token: \"of the server\" }".to_owned()) else { return };
    let with = |told: Told| Config::from_url(server.url("")).with_credentials(Vault::saying(told));
    let token = |text: &str| Credentials::Token(Secret::new(text));
    let key = Credentials::AccessKey { id: "id".into(), secret: Secret::new("MARKER"), session_token: None };
    let seed = Credentials::Nkey { jwt: None, seed: Secret::new("MARKER") };
    let cases = [
        (with(Ok(token("MARKER"))), ErrorKind::Unauthenticated),
        (with(Ok(password("MARKER", "MARKER"))), ErrorKind::Unauthenticated),
        (with(Ok(seed)), ErrorKind::Unauthenticated),
        (with(Ok(key)), ErrorKind::ConfigInvalid),
        (with(Err("the vault is sealed")), ErrorKind::NotFound),
        (Config::from_url(server.url("")).with("credentials_file", "/nowhere/login.json"), ErrorKind::NotFound),
        (with(Ok(token("of the server"))).with("nats.token", "MARKER"), ErrorKind::ConfigInvalid),
        (with(Ok(token("of the server"))).with("nats.nkey", "MARKER"), ErrorKind::ConfigInvalid),
        (with(Ok(token("of the server"))).with("nats.credentials", "/nowhere/me.creds"), ErrorKind::ConfigInvalid),
    ];
    for (config, kind) in cases {
        let begun = Instant::now();
        let error = connect(config).await.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.effect()), (kind, Effect::NotDone), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}: {error}", begun.elapsed());
        assert!(!format!("{error:?}").contains("MARKER"), "{error:?}");
    }
    connect(with(Ok(token("of the server")))).await.unwrap().close(LONG).await.unwrap();
}
