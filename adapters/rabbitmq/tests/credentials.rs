//! Credentials that change while a service runs, on a server whose users come and go.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anybroker_core::{
    Bus, Config, Credentials, Effect, ErrorKind, Registry, Result, Secret, Subscriber, SubscriptionEvent, TopologySpec,
};
use anybroker_rabbitmq::RabbitDriver;
use anybroker_testing::{Vault, refused, send};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use common::server::{OwnServer, free_ports};
use common::{LONG, nothing, number, unique};
use rcgen::{KeyPair, SigningKey};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PLUGINS: &str = "[rabbitmq_management].\n";
const DEFINITIONS: &str = r#"{
    "vhosts": [{"name": "/"}],
    "users": [{"name": "root", "password": "root", "tags": "administrator"}]
}"#;

struct Server {
    own: OwnServer,
    clients: u16,
    admin: u16,
}

impl Server {
    fn start() -> Option<Self> {
        Self::start_with(PLUGINS, |_| String::new())
    }

    /// With more plugins, and what they need.
    fn start_with(plugins: &str, settings: impl FnOnce(&Path) -> String) -> Option<Self> {
        let [clients, admin] = free_ports();
        let own = OwnServer::start(&[clients, admin], plugins, |folder| {
            std::fs::write(folder.join("definitions.json"), DEFINITIONS).unwrap();
            settings(folder)
                + &format!(
                    "listeners.tcp.1 = 127.0.0.1:{clients}\nmanagement.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {admin}\n\
                 load_definitions = /srv/definitions.json\ndisk_free_limit.absolute = 200MB\nlog.file.level = warning\n"
                )
        })?;
        Some(Self { own, clients, admin })
    }

    fn url(&self, user: &str) -> String {
        let at = if user.is_empty() { "" } else { "@" };
        format!("amqp://{user}{at}127.0.0.1:{}/?admin=http://127.0.0.1:{}&connect_timeout=5s", self.clients, self.admin)
    }

    /// A request to the management plugin that changes something.
    async fn change(&self, method: &str, path: &str, body: &str) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.admin)).await.unwrap();
        let (login, length) = (STANDARD.encode("root:root"), body.len());
        let request = format!(
            "{method} /api/{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic {login}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
    }

    async fn set_password(&self, user: &str, password: &str) {
        let body = format!(r#"{{"password": "{password}", "tags": "management"}}"#);
        self.change("PUT", &format!("users/{user}"), &body).await;
    }

    async fn make_user(&self, user: &str, password: &str) {
        self.set_password(user, password).await;
        self.permit(user).await;
    }

    async fn permit(&self, user: &str) {
        let all = r#"{"configure": ".*", "write": ".*", "read": ".*"}"#;
        self.change("PUT", &format!("permissions/%2F/{user}"), all).await;
    }

    async fn end_connections(&self, user: &str) {
        self.change("DELETE", &format!("connections/username/{user}"), "").await;
    }
}

fn password_of(user: &str, password: &str) -> Credentials {
    Credentials::Password { user: user.to_owned(), password: Secret::new(password) }
}

async fn connect(config: Config) -> Result<Bus> {
    Registry::new().with(RabbitDriver).connect(config).await
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
            // What was handed out on a connection that is gone by now comes again.
            if let Err(failed) = delivery.ack().await {
                assert_eq!(failed.error().kind(), ErrorKind::StaleDelivery, "{failed:?}");
            }
        }
    }
}

/// The subscription tells that it waits, and with which words.
async fn degraded(subscriber: &mut Subscriber) -> String {
    let deadline = Instant::now() + LONG;
    loop {
        assert!(Instant::now() < deadline, "nothing is told");
        let received = subscriber.receive_all(1, Duration::from_millis(100)).await.unwrap();
        assert!(received.deliveries.is_empty(), "{received:?}");
        for event in received.events {
            if let SubscriptionEvent::Degraded { cause } = event {
                return cause;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_goes_on_with_what_its_provider_says_after_its_password_was_changed() {
    let Some(server) = Server::start() else { return };
    server.make_user("first", "one").await;
    let vault = Vault::saying(Ok(password_of("first", "one")));
    let bus = connect(Config::from_url(server.url("")).with_credentials(vault.clone())).await.unwrap();
    let name = unique("rotated");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let (mut next, mut stored) = (0, BTreeSet::new());
    for number in 0..5 {
        send(&bus, &name, number, LONG).await.unwrap();
        stored.insert(number);
        next = number + 1;
    }
    // Two are out when the connections end; they come again.
    let held = subscriber.receive(2, LONG).await.unwrap();
    assert!(!held.is_empty());

    server.set_password("first", "two").await;
    server.end_connections("first").await;
    let error = refused(&bus, &name, ErrorKind::Unauthenticated, &mut next, &mut stored).await;
    assert!(!format!("{error:?}").contains("\"one\""), "{error:?}");
    let asking = bus.describe(name.as_str()).await.unwrap_err();
    assert_eq!(asking.kind(), ErrorKind::Unauthenticated, "{asking:?}");
    drop(held);
    degraded(&mut subscriber).await;

    // While the provider says nothing useful, it is as if the broker could not be reached.
    vault.says(Err("the vault is sealed"));
    let error = refused(&bus, &name, ErrorKind::Unavailable, &mut next, &mut stored).await;
    assert!(error.message().contains("the vault is sealed"), "{error}");
    vault.says(Ok(Credentials::AccessKey { id: "id".into(), secret: Secret::new("x"), session_token: None }));
    let error = refused(&bus, &name, ErrorKind::Unavailable, &mut next, &mut stored).await;
    assert!(error.message().contains("expected user and password"), "{error}");

    vault.says(Ok(password_of("first", "two")));
    for number in next..next + 5 {
        send(&bus, &name, number, LONG).await.unwrap();
        stored.insert(number);
    }
    drain(&mut subscriber, &stored).await;
    assert_eq!(bus.describe(name.as_str()).await.unwrap().groups.len(), 1);
    // A new password alone ends no connection; the plugin wants it with the next request.
    server.set_password("first", "three").await;
    vault.says(Ok(password_of("first", "three")));
    assert_eq!(bus.describe(name.as_str()).await.unwrap().groups.len(), 1);
    send(&bus, &name, 0, LONG).await.unwrap();
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

fn write(path: &Path, user: &str, password: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, format!(r#"{{"user": "{user}", "password": "{password}"}}"#)).unwrap();
    std::fs::rename(&beside, path).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_keeps_order_goes_on_as_another_user_of_its_file_after_its_own_was_deleted() {
    let Some(server) = Server::start() else { return };
    server.make_user("first", "one").await;
    let file = server.own.folder.path().join("login.json");
    write(&file, "first", "one");
    let config = Config::from_url(server.url("")).with("credentials_file", file.display().to_string());
    let bus = connect(config).await.unwrap();
    let name = unique("replaced");
    let spec = bus.subscription(name.as_str(), "g").with_order(anybroker_core::Order::Key);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let (mut next, mut stored) = (1, BTreeSet::from([0]));
    send(&bus, &name, 0, LONG).await.unwrap();
    drain(&mut subscriber, &stored).await;
    stored.clear();

    server.set_password("second", "other").await;
    server.change("DELETE", "users/first", "").await;
    refused(&bus, &name, ErrorKind::Unauthenticated, &mut next, &mut stored).await;
    degraded(&mut subscriber).await;
    write(&file, "second", "other");
    // A user that may do nothing yet; so the member is refused, several times within this second.
    refused(&bus, &name, ErrorKind::PermissionDenied, &mut next, &mut stored).await;
    nothing(&mut subscriber).await;
    server.permit("second").await;
    for number in next..next + 5 {
        send(&bus, &name, number, LONG).await.unwrap();
        stored.insert(number);
    }
    drain(&mut subscriber, &stored).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connecting_for_the_first_time_tells_at_once_what_is_wrong() {
    let Some(server) = Server::start() else { return };
    server.make_user("first", "one").await;
    let with = |credentials: std::result::Result<Credentials, &'static str>| {
        Config::from_url(server.url("")).with_credentials(Vault::saying(credentials))
    };
    let key = Credentials::AccessKey { id: "id".into(), secret: Secret::new("MARKER"), session_token: None };
    let cases = [
        (with(Ok(password_of("first", "MARKER"))), ErrorKind::Unauthenticated),
        (with(Ok(Credentials::Token(Secret::new("MARKER")))), ErrorKind::Unauthenticated),
        (with(Ok(key)), ErrorKind::ConfigInvalid),
        (with(Err("the vault is sealed")), ErrorKind::NotFound),
        (Config::from_url(server.url("")).with("credentials_file", "/nowhere/login.json"), ErrorKind::NotFound),
        // A certificate names the user, or a provider does.
        (
            with(Ok(password_of("first", "one")))
                .with("url", format!("amqps://127.0.0.1:{}/", server.clients))
                .with("amqp.auth", "external")
                .with("amqp.tls_certificate", "/nowhere/me.pem")
                .with("amqp.tls_key", "/nowhere/me.key"),
            ErrorKind::ConfigInvalid,
        ),
    ];
    for (config, kind) in cases {
        let begun = Instant::now();
        let error = connect(config).await.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.effect()), (kind, Effect::NotDone), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}: {error}", begun.elapsed());
        assert!(!format!("{error:?}").contains("MARKER"), "{error:?}");
    }
    connect(with(Ok(password_of("first", "one")))).await.unwrap().close(LONG).await.unwrap();
}

/// The two numbers of an ECDSA signature, 32 bytes each, as a JWT has them (RFC 7518, 3.4), of their ASN.1 form.
fn plain(signature: &[u8]) -> Vec<u8> {
    let (mut rest, mut numbers) = (&signature[2..], Vec::new());
    for _ in 0..2 {
        let length = usize::from(rest[1]);
        let number = &rest[2..2 + length];
        let digits = &number[number.len().saturating_sub(32)..];
        numbers.extend(std::iter::repeat_n(0, 32 - digits.len()).chain(digits.iter().copied()));
        rest = &rest[2 + length..];
    }
    numbers
}

/// A token for everything, as the plugin for OAuth 2 reads it (RabbitMQ, "OAuth 2.0 Authentication Backend", "Scope-to-Permission
/// Translation"), which is over after `seconds`.
fn token(key: &KeyPair, seconds: u64) -> Credentials {
    let expires = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + seconds;
    let claims = format!(
        r#"{{"aud": "rabbitmq", "sub": "service", "exp": {expires}, "scope": "rabbitmq.configure:*/* rabbitmq.write:*/* rabbitmq.read:*/* rabbitmq.tag:management"}}"#
    );
    let head = URL_SAFE_NO_PAD.encode(r#"{"alg": "ES256", "typ": "JWT", "kid": "one"}"#);
    let signed = format!("{head}.{}", URL_SAFE_NO_PAD.encode(claims));
    let signature = URL_SAFE_NO_PAD.encode(plain(&key.sign(signed.as_bytes()).unwrap()));
    Credentials::Token(Secret::new(format!("{signed}.{signature}")))
}

/// Until something that has to be permitted comes out as expected; anything else is `other`.
async fn declared(bus: &Bus, expected: std::result::Result<(), ErrorKind>, other: std::result::Result<(), ErrorKind>) {
    let deadline = Instant::now() + LONG;
    loop {
        assert!(Instant::now() < deadline, "never {expected:?}");
        let outcome = bus.declare(&TopologySpec::group(unique("new").as_str(), "g")).await;
        let outcome = outcome.map(drop).map_err(|error| error.kind());
        if outcome == expected {
            return;
        }
        assert_eq!(outcome, other);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_replaced_on_its_connection_before_it_is_over_or_afterwards() {
    let key = KeyPair::generate().unwrap();
    let plugins = "[rabbitmq_management,rabbitmq_auth_backend_oauth2].\n";
    let Some(server) = Server::start_with(plugins, |folder| {
        std::fs::write(folder.join("key.pem"), key.public_key_pem()).unwrap();
        "auth_backends.1 = rabbit_auth_backend_oauth2\nauth_backends.2 = rabbit_auth_backend_internal\n\
         auth_oauth2.resource_server_id = rabbitmq\nauth_oauth2.default_key = one\n\
         auth_oauth2.signing_keys.one = /srv/key.pem\n"
            .to_owned()
    }) else {
        return;
    };
    let begun = Instant::now();
    let vault = Vault::saying(Ok(token(&key, 5)));
    let bus = connect(Config::from_url(server.url("")).with_credentials(vault.clone())).await.unwrap();
    let name = unique("tokens");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    // Replaced in time, nobody notices.
    vault.says(Ok(token(&key, 14)));
    while begun.elapsed() < Duration::from_secs(8) {
        declared(&bus, Ok(()), Ok(())).await;
    }
    assert_eq!(bus.describe(name.as_str()).await.unwrap().groups.len(), 1);
    // Too late: refused meanwhile.
    declared(&bus, Err(ErrorKind::PermissionDenied), Ok(())).await;
    vault.says(Ok(token(&key, 3_600)));
    declared(&bus, Ok(()), Err(ErrorKind::PermissionDenied)).await;
    send(&bus, &name, 0, LONG).await.unwrap();
    drain(&mut subscriber, &BTreeSet::from([0])).await;
    assert_eq!(bus.describe(name.as_str()).await.unwrap().groups.len(), 1);
    subscriber.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}
