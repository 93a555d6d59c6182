//! Tokens, certificates and permissions, on a broker that is configured for them.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use anybroker_core::{
    Bus, Config, Credentials, Effect, Error, ErrorKind, Message, Registry, Retry, Secret, SubscriptionEvent, Timestamp,
    TopologyMode, TopologySpec, ack,
};
use anybroker_pulsar::PulsarDriver;
use anybroker_testing::Vault;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use common::{LONG, QUIET, connect, receive, try_connect, unique, url};
use ring::hmac;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

/// What `cargo xtask brokers up pulsar` wrote for its server.
struct Secured {
    settings: HashMap<String, String>,
    folder: PathBuf,
}

/// `None` after saying why the test does not run.
fn secured() -> Option<Secured> {
    url()?;
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state/anybroker"));
    let state = std::env::var_os("ANYBROKER_STATE").map(PathBuf::from).or_else(home).unwrap();
    let instance = std::env::var("ANYBROKER_INSTANCE").unwrap_or_else(|_| "dev".into());
    let folder = state.join("brokers").join(instance).join("pulsar");
    let Ok(text) = std::fs::read_to_string(folder.join("standalone.conf")) else {
        println!("not run: {} is not a server of `cargo xtask brokers`", folder.display());
        return None;
    };
    let setting = |line: &str| line.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    Some(Secured { settings: text.lines().filter_map(setting).collect(), folder })
}

impl Secured {
    fn port(&self, setting: &str) -> &str {
        &self.settings[setting]
    }

    /// Not encrypted.
    fn plain(&self) -> String {
        let (clients, admin) = (self.port("brokerServicePort"), self.port("webServicePort"));
        format!("pulsar://127.0.0.1:{clients}?admin=http://127.0.0.1:{admin}")
    }

    /// Encrypted, for that host.
    fn tls(&self, host: &str) -> String {
        let (clients, admin) = (self.port("brokerServicePortTls"), self.port("webServicePortTls"));
        format!("pulsar+ssl://{host}:{clients}?admin=https://{host}:{admin}")
    }

    fn file(&self, name: &str) -> String {
        self.folder.join(name).to_string_lossy().into_owned()
    }

    /// The token of a role (RFC 7519), signed as the broker expects it.
    fn token(&self, role: &str) -> String {
        self.signed(&format!(r#"{{"sub":"{role}"}}"#))
    }

    /// One that holds until then, in seconds since 1970.
    fn token_until(&self, role: &str, end: i64) -> String {
        self.signed(&format!(r#"{{"sub":"{role}","exp":{end}}}"#))
    }

    fn signed(&self, claims: &str) -> String {
        let key = self.settings["tokenSecretKey"].rsplit_once(',').unwrap().1;
        signed(&STANDARD.decode(key).unwrap(), claims)
    }

    /// A namespace in which the role may do that.
    async fn namespace(&self, grants: &[(&str, &str)]) -> String {
        let name = format!("secured-{}", uuid::Uuid::now_v7().simple());
        self.admin("PUT", &format!("/namespaces/public/{name}"), "{}").await;
        for (role, actions) in grants {
            self.admin("POST", &format!("/namespaces/public/{name}/permissions/{role}"), actions).await;
        }
        name
    }

    async fn admin(&self, method: &str, path: &str, body: &str) {
        let address = format!("127.0.0.1:{}", self.port("webServicePort"));
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let request = format!(
            "{method} /admin/v2{path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 20"), "{method} {path}: {answer}");
    }
}

fn signed(key: &[u8], claims: &str) -> String {
    let head = [r#"{"alg":"HS256"}"#, claims].map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
    let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), head.as_bytes());
    format!("{head}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// Publishing, receiving, failing, burying and looking all work.
async fn works(bus: Bus) {
    let name = unique("secured");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    bus.send(Message::new(name.as_str(), "let in")).await.unwrap();
    receive(&mut subscriber, 1).await.remove(0).nack(Duration::ZERO).await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((delivery.message().bytes(), delivery.attempt()), (&b"let in"[..], 2));
    delivery.ack().await.unwrap();
    assert_eq!(bus.lag(name.as_str(), "g").await.unwrap().total(), Some(0));
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// The refusal, which comes within the timeout and tells no secret.
async fn refused(url: &str, settings: &str) -> Error {
    let begun = Instant::now();
    let error = try_connect(url, &format!("{settings}&connect_timeout=10s")).await.map(drop).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}: {error}", begun.elapsed());
    let shown = format!("{error} {error:?}");
    let mut tokens = settings.split('&').filter_map(|setting| setting.strip_prefix("token="));
    assert!(tokens.all(|token| !shown.contains(token)), "{shown}");
    error
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encrypted_connections_and_tokens_let_in_who_trusts_and_is_known() {
    let Some(secured) = secured() else { return };
    let (ca, token) = (secured.file("ca.pem"), secured.token("admin"));
    works(connect(&secured.plain(), &format!("token={token}")).await).await;
    works(connect(&secured.tls("127.0.0.1"), &format!("tls_ca={ca}")).await).await;
    works(connect(&secured.tls("127.0.0.1"), &format!("tls_ca={ca}&token={token}")).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_not_trusted_or_is_another_host_is_unauthenticated() {
    let Some(secured) = secured() else { return };
    let ca = secured.file("ca.pem");
    // A certificate that is somebody else's: of the same kind, and no authority of this broker's.
    let stranger = format!("tls_ca={}", secured.file("server.pem"));
    let trusting = format!("tls_ca={ca}");
    let (here, elsewhere) = (secured.tls("127.0.0.1"), secured.tls("localhost"));
    // Only the admin endpoint is encrypted.
    let admin_only = |host: &str| {
        let (clients, admin) = (secured.port("brokerServicePort"), secured.port("webServicePortTls"));
        format!("pulsar://127.0.0.1:{clients}?admin=https://{host}:{admin}")
    };
    let (admin_here, admin_elsewhere) = (admin_only("127.0.0.1"), admin_only("localhost"));
    works(connect(&admin_here, &trusting).await).await;
    for (case, url, settings) in [
        ("the system's authorities", &here, ""),
        ("another authority", &here, &stranger),
        ("another host", &elsewhere, &trusting),
        ("the system's authorities, admin", &admin_here, ""),
        ("another authority, admin", &admin_here, &stranger),
        ("another host, admin", &admin_elsewhere, &trusting),
    ] {
        let error = refused(url, settings).await;
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{case}: {error}");
    }
    for file in ["standalone.conf", "missing.pem"] {
        let error = refused(&here, &format!("tls_ca={}", secured.file(file))).await;
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{file}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_forged_expired_or_none_is_unauthenticated() {
    let Some(secured) = secured() else { return };
    let key = STANDARD.decode(secured.settings["tokenSecretKey"].rsplit_once(',').unwrap().1).unwrap();
    for (case, token) in [
        ("another key", signed(b"a key that the broker does not know of", r#"{"sub":"admin"}"#)),
        ("expired", signed(&key, r#"{"sub":"admin","exp":1000000000}"#)),
        ("no token", "marker-that-is-no-token".to_owned()),
    ] {
        let error = refused(&secured.plain(), &format!("token={token}")).await;
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{case}: {error}");
        let encrypted = format!("tls_ca={}&token={token}", secured.file("ca.pem"));
        let error = refused(&secured.tls("127.0.0.1"), &encrypted).await;
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{case}, encrypted: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_nothing_is_denied_every_verb() {
    let Some(secured) = secured() else { return };
    let namespace = secured.namespace(&[]).await;
    let owner = connect(&secured.plain(), &format!("namespace={namespace}")).await;
    let name = unique("denied");
    owner.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let settings = format!("namespace={namespace}&token={}", secured.token("limited"));
    let bus = connect(&secured.plain(), &settings).await;
    let denied = ErrorKind::PermissionDenied;
    assert_eq!(bus.send(Message::new(name.as_str(), "x")).await.unwrap_err().kind(), denied);
    assert_eq!(bus.send(Message::new(unique("new").as_str(), "x")).await.unwrap_err().kind(), denied);
    for mode in [TopologyMode::Declare, TopologyMode::Verify, TopologyMode::Leave] {
        let spec = bus.subscription(name.as_str(), "g").with_topology(mode);
        assert_eq!(bus.subscribe(spec).await.map(drop).unwrap_err().kind(), denied, "{mode:?}");
    }
    assert_eq!(bus.describe(name.as_str()).await.unwrap_err().kind(), denied);
    assert_eq!(bus.lag(name.as_str(), "g").await.unwrap_err().kind(), denied);
    assert_eq!(bus.delete(name.as_str(), None).await.unwrap_err().kind(), denied);
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    assert_eq!(letters.page(None, 1).await.map(drop).unwrap_err().kind(), denied);
    bus.close(LONG).await.unwrap();
    owner.delete(name.as_str(), None).await.unwrap();
    owner.close(LONG).await.unwrap();
}

/// What the README says of permissions: a service that may produce and consume needs an administrator only for topics.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_produce_and_consume_works_on_what_an_administrator_has_declared() {
    let Some(secured) = secured() else { return };
    let grants = [("service", r#"["produce","consume"]"#), ("reader", r#"["consume"]"#), ("writer", r#"["produce"]"#)];
    let namespace = secured.namespace(&grants).await;
    let owner = connect(&secured.plain(), &format!("namespace={namespace}")).await;
    let name = unique("granted");
    owner.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let as_role = |role: &str| format!("namespace={namespace}&token={}", secured.token(role));
    let denied = ErrorKind::PermissionDenied;

    let writer = connect(&secured.plain(), &as_role("writer")).await;
    writer.send(Message::new(name.as_str(), "x")).await.unwrap();
    let subscribed = writer.subscribe(writer.subscription(name.as_str(), "g")).await;
    assert_eq!(subscribed.map(drop).unwrap_err().kind(), denied);

    let reader = connect(&secured.plain(), &as_role("reader")).await;
    assert_eq!(reader.send(Message::new(name.as_str(), "y")).await.unwrap_err().kind(), denied);
    let spec = reader.subscription(name.as_str(), "g");
    let subscribed = reader.subscribe(spec.clone()).await;
    assert_eq!(subscribed.map(drop).unwrap_err().kind(), denied, "hand-overs are counted by writing");
    let mut subscriber = reader.subscribe(spec.with_crash_limit(None)).await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    let error = delivery.nack(Duration::ZERO).await.unwrap_err();
    assert_eq!(error.error().kind(), denied, "what comes back is written: {error:?}");
    drop(error);
    subscriber.close(LONG).await.unwrap();

    let service = connect(&secured.plain(), &as_role("service")).await;
    let mut subscriber = service.subscribe(service.subscription(name.as_str(), "g")).await.unwrap();
    receive(&mut subscriber, 1).await.remove(0).nack(Duration::ZERO).await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!(delivery.attempt(), 2);
    delivery.dead_letter(anybroker_core::Verdict::new(anybroker_core::Reason::Rejected)).await.unwrap();
    let letters = service.dead_letters(name.as_str(), "g").unwrap();
    assert_eq!(letters.redrive(&Default::default()).await.unwrap().moved, 1);
    receive(&mut subscriber, 1).await.remove(0).ack().await.unwrap();
    assert_eq!(service.lag(name.as_str(), "g").await.unwrap().total(), Some(0));
    let missing = service.send(Message::new(unique("new").as_str(), "x")).await.unwrap_err();
    assert_eq!(missing.kind(), denied, "only administrators create topics: {missing}");
    subscriber.close(LONG).await.unwrap();
    // Brokers delete the topic of the count when nobody has read it for a day: members that may not create it come in.
    let count = format!("/persistent/public/{namespace}/{name}=c=g?force=true");
    secured.admin("DELETE", &count, "").await;
    let mut subscriber = service.subscribe(service.subscription(name.as_str(), "g")).await.unwrap();
    service.send(Message::new(name.as_str(), "y")).await.unwrap();
    receive(&mut subscriber, 1).await.remove(0).ack().await.unwrap();
    // Nothing is kept for a topic without a group, as far as this role can see: that is refused, not dropped.
    let kept = unique("kept");
    owner.declare(&TopologySpec::destination(kept.as_str())).await.unwrap();
    assert_eq!(service.send(Message::new(kept.as_str(), "x")).await.unwrap_err().kind(), denied);
    owner.send(Message::new(kept.as_str(), "x")).await.unwrap();

    subscriber.close(LONG).await.unwrap();
    for bus in [writer, reader, service] {
        bus.close(LONG).await.unwrap();
    }
    owner.delete(name.as_str(), None).await.unwrap();
    owner.delete(kept.as_str(), None).await.unwrap();
    owner.close(LONG).await.unwrap();
}

async fn connect_with(url: &str, vault: &Vault) -> anybroker_core::Result<Bus> {
    let config = Config::from_url(url).with_credentials(vault.clone());
    Registry::new().with(PulsarDriver).connect(config).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_that_expire_are_replaced_while_a_service_runs() {
    let Some(secured) = secured() else { return };
    let expiring = |holds: Duration| {
        let end = Timestamp::now().after(holds).as_millis() / 1_000;
        Credentials::Token(Secret::new(secured.token_until("admin", end)))
    };
    let vault = Vault::saying(Err("sealed"));
    let sealed = connect_with(&secured.plain(), &vault).await.map(drop).unwrap_err();
    assert_eq!(sealed.kind(), ErrorKind::NotFound, "{sealed}");

    let holds = Duration::from_secs(5);
    vault.says(Ok(expiring(holds)));
    let bus = connect_with(&secured.plain(), &vault).await.unwrap();
    let name = unique("rotated");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let numbers = |from: u32, to: u32| (from..to).map(|n| Message::new(name.as_str(), n.to_string())).collect();
    let all_stored = |outcomes: Vec<anybroker_core::PublishOutcome>| {
        for outcome in outcomes {
            outcome.unwrap();
        }
    };
    all_stored(bus.publish(numbers(0, 20)).await);
    let first = receive(&mut subscriber, 20).await;

    // The broker asks for another one, and nobody notices. It is made now, and must hold when the broker has asked.
    vault.says(Ok(expiring(2 * holds)));
    let asked = vault.asked();
    let deadline = Instant::now() + LONG;
    while vault.asked() == asked {
        assert!(Instant::now() < deadline, "the broker does not ask for a token that holds");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    all_stored(bus.publish(numbers(20, 40)).await);
    for outcome in ack(first).await {
        outcome.unwrap();
    }
    let received = subscriber.receive_all(100, LONG).await.unwrap();
    assert!(received.events.is_empty(), "{:?}", received.events);
    let mut second = received.deliveries;
    let left = 20 - second.len();
    second.extend(receive(&mut subscriber, left).await);
    for outcome in ack(second).await {
        outcome.unwrap();
    }

    // The provider has none that holds: the broker ends the connections, and lets nobody in.
    let deadline = Instant::now() + LONG;
    let refused = loop {
        assert!(Instant::now() < deadline, "a token that has expired is let in");
        match bus.send(Message::new(name.as_str(), "early")).await {
            Ok(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            Err(error) if error.kind() == ErrorKind::Unavailable => {}
            Err(error) => break error,
        }
    };
    assert_eq!((refused.kind(), refused.effect()), (ErrorKind::Unauthenticated, Effect::NotDone), "{refused}");
    assert_eq!(refused.retry(), Retry::Later(None));
    let deadline = Instant::now() + LONG;
    let mut early = Vec::new();
    loop {
        assert!(Instant::now() < deadline, "the subscriber was told nothing");
        let received = subscriber.receive_all(100, Duration::from_secs(1)).await.unwrap();
        early.extend(received.deliveries);
        if received.events.iter().any(|event| matches!(event, SubscriptionEvent::Degraded { .. })) {
            break;
        }
    }
    drop(early);
    // A vault that is closed says nothing of a topic, whatever it answers.
    vault.says(Err("sealed"));
    let closed = bus.send(Message::new(name.as_str(), "early")).await.unwrap_err();
    assert_eq!((closed.kind(), closed.effect()), (ErrorKind::Unavailable, Effect::NotDone), "{closed}");
    assert!(closed.to_string().contains("sealed"), "{closed}");

    vault.says(Ok(Credentials::Token(Secret::new(secured.token("admin")))));
    all_stored(bus.publish(numbers(40, 60)).await);
    let mut left: BTreeSet<String> = (40..60).map(|n: u32| n.to_string()).collect();
    let deadline = Instant::now() + LONG;
    while !left.is_empty() {
        assert!(Instant::now() < deadline, "{left:?} did not come");
        let received = subscriber.receive_all(100, Duration::from_secs(1)).await.unwrap();
        for delivery in &received.deliveries {
            left.remove(&String::from_utf8_lossy(delivery.message().bytes()).into_owned());
        }
        for outcome in ack(received.deliveries).await {
            outcome.unwrap();
        }
    }
    assert_eq!(bus.lag(name.as_str(), "g").await.unwrap().total(), Some(0));
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test]
async fn what_is_no_token_or_stands_beside_a_provider_is_a_mistake() {
    let config = Config::from_url("pulsar://localhost?admin=http://localhost&token=x")
        .with_credentials(Vault::saying(Err("sealed")));
    let error = Registry::new().with(PulsarDriver).check(config).unwrap_err();
    assert!(error.message().contains("provider"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("login.toml");
    std::fs::write(&file, "user = \"me\"\npassword = \"MARKER\"").unwrap();
    let config = Config::from_url("pulsar://localhost?admin=http://localhost")
        .with("credentials_file", file.display().to_string());
    let error = Registry::new().with(PulsarDriver).connect(config).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(error.to_string().contains("expected a token") && !error.to_string().contains("MARKER"), "{error}");
}

/// Whether it is what a member or publisher may be told that has just lost its permission: so, or that its connection to the topic ended.
fn is_denied(error: &Error) -> bool {
    let passes = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout);
    assert!(passes || error.kind() == ErrorKind::PermissionDenied, "{error:?}");
    !passes
}

/// A role that administers nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_loses_its_permission_at_work_is_denied_and_goes_on_when_it_has_it_again() {
    const BOTH: &str = r#"["produce","consume"]"#;
    let Some(secured) = secured() else { return };
    let namespace = secured.namespace(&[("service", BOTH)]).await;
    let owner = connect(&secured.plain(), &format!("namespace={namespace}")).await;
    let name = unique("revoked");
    owner.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let service = connect(&secured.plain(), &format!("namespace={namespace}&token={}", secured.token("service"))).await;
    let mut subscriber = service.subscribe(service.subscription(name.as_str(), "g")).await.unwrap();
    service.send(Message::new(name.as_str(), "before")).await.unwrap();
    let held = receive(&mut subscriber, 1).await.remove(0);

    let permissions = format!("/namespaces/public/{namespace}/permissions/service");
    secured.admin("DELETE", &permissions, "").await;
    let deadline = Instant::now() + LONG;
    // What the broker takes before it has heard of it is stored; what was on its way then may be.
    let (mut stored, mut unknown) = (0, 0);
    loop {
        assert!(Instant::now() < deadline, "the publisher is never denied");
        match service.send(Message::new(name.as_str(), "meanwhile")).await {
            Ok(_) => stored += 1,
            Err(error) if is_denied(&error) => break,
            Err(error) => unknown += usize::from(error.effect() == Effect::Unknown),
        }
    }
    loop {
        assert!(Instant::now() < deadline, "the member is never denied");
        match subscriber.receive(10, Duration::from_millis(200)).await {
            Ok(deliveries) => drop(deliveries),
            Err(error) if is_denied(&error) => break,
            Err(_) => {}
        }
    }
    drop(held);
    let again = service.subscribe(service.subscription(name.as_str(), "g")).await.map(drop).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::PermissionDenied);

    secured.admin("POST", &permissions, BOTH).await;
    let deadline = Instant::now() + LONG;
    while let Err(error) = service.send(Message::new(name.as_str(), "after")).await {
        is_denied(&error);
        assert!(Instant::now() < deadline, "{error:?}");
    }
    let mut subscriber = service.subscribe(service.subscription(name.as_str(), "g")).await.unwrap();
    let (mut bodies, mut begin) = (Vec::<String>::new(), Instant::now());
    let has = |bodies: &[String], body: &str| bodies.iter().any(|found| found == body);
    while begin.elapsed() < QUIET || !(has(&bodies, "before") && has(&bodies, "after")) {
        assert!(begin.elapsed() < LONG, "{bodies:?}");
        for delivery in subscriber.receive(10, QUIET).await.unwrap() {
            bodies.push(String::from_utf8(delivery.message().bytes().to_vec()).unwrap());
            delivery.ack().await.unwrap();
            begin = Instant::now();
        }
    }
    let count = |body: &str| bodies.iter().filter(|found| *found == body).count();
    assert_eq!((count("before"), count("after")), (1, 1), "{bodies:?}");
    assert!(
        (stored..=stored + unknown).contains(&count("meanwhile")),
        "{stored} stored, {unknown} unknown: {bodies:?}"
    );
    subscriber.close(LONG).await.unwrap();
    service.close(LONG).await.unwrap();
    owner.delete(name.as_str(), None).await.unwrap();
    owner.close(LONG).await.unwrap();
}
