//! Encrypted connections, certificates and permissions, on a server that is configured for them.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use anybroker_core::{Effect, Error, ErrorKind, Message, TopologySpec};
use common::server::{OwnServer, free_ports};
use common::{LONG, connect, receive, try_connect, unique};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

const PLUGINS: &str = "[rabbitmq_management,rabbitmq_auth_mechanism_ssl].\n";

/// `app` may do everything, `reader` may only read, `outsider` may not enter the virtual host. `client` comes with a
/// certificate and has no password.
const DEFINITIONS: &str = r#"{
    "vhosts": [{"name": "/"}],
    "users": [
        {"name": "app", "password": "secret", "tags": "management"},
        {"name": "reader", "password": "secret", "tags": ""},
        {"name": "outsider", "password": "secret", "tags": ""},
        {"name": "client", "password_hash": "", "tags": ""}
    ],
    "permissions": [
        {"user": "app", "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"},
        {"user": "client", "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"},
        {"user": "reader", "vhost": "/", "configure": "^$", "write": "^$", "read": ".*"}
    ]
}"#;

struct Secured {
    server: OwnServer,
    clients: u16,
    admin: u16,
}

fn authority(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// `<name>.pem` and `<name>.key`, for that host and user.
fn certificate(folder: &Path, name: &str, host: &str, authority: &CertifiedIssuer<'static, KeyPair>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, host);
    let certificate = params.signed_by(&key, authority).unwrap();
    std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
    std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

impl Secured {
    fn start() -> Option<Self> {
        let [clients, admin] = free_ports();
        let server = OwnServer::start(&[clients, admin], PLUGINS, |folder| {
            let (own, other) = (authority("own"), authority("other"));
            std::fs::write(folder.join("ca.pem"), own.pem()).unwrap();
            std::fs::write(folder.join("other-ca.pem"), other.pem()).unwrap();
            std::fs::write(folder.join("definitions.json"), DEFINITIONS).unwrap();
            certificate(folder, "server", "127.0.0.1", &own);
            certificate(folder, "client", "client", &own);
            certificate(folder, "nobody", "nobody", &own);
            certificate(folder, "stranger", "client", &other);
            let files = |prefix: &str| {
                format!(
                    "{prefix}.cacertfile = /srv/ca.pem\n\
                     {prefix}.certfile = /srv/server.pem\n\
                     {prefix}.keyfile = /srv/server.key\n"
                )
            };
            format!(
                "listeners.tcp = none\n\
                 listeners.ssl.1 = 127.0.0.1:{clients}\n\
                 {}\
                 ssl_options.verify = verify_peer\n\
                 ssl_options.fail_if_no_peer_cert = false\n\
                 ssl_cert_login_from = common_name\n\
                 auth_mechanisms.1 = PLAIN\n\
                 auth_mechanisms.2 = EXTERNAL\n\
                 management.ssl.ip = 127.0.0.1\n\
                 management.ssl.port = {admin}\n\
                 {}\
                 load_definitions = /srv/definitions.json\n\
                 disk_free_limit.absolute = 200MB\n\
                 log.file.level = warning\n",
                files("ssl_options"),
                files("management.ssl"),
            )
        })?;
        Some(Self { server, clients, admin })
    }

    fn url(&self, user: &str, host: &str, settings: &str) -> String {
        let at = if user.is_empty() { "" } else { "@" };
        format!("amqps://{user}{at}{host}:{}/%2f?connect_timeout=10s{settings}", self.clients)
    }

    fn file(&self, name: &str) -> String {
        self.server.folder.path().join(name).display().to_string()
    }

    fn trusting(&self, authority: &str) -> String {
        format!("&tls_ca={}", self.file(authority))
    }

    fn external(&self, client: &str) -> String {
        let (certificate, key) = (self.file(&format!("{client}.pem")), self.file(&format!("{client}.key")));
        format!("{}&auth=external&tls_certificate={certificate}&tls_key={key}", self.trusting("ca.pem"))
    }
}

async fn refused(url: &str) -> Error {
    let begun = Instant::now();
    let error = try_connect(url, "").await.map(drop).unwrap_err();
    // The deadline is 10 s.
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}: {error}", begun.elapsed());
    let text = format!("{error} {error:?}");
    assert!(!text.contains("PRIVATE KEY") && !text.contains("secret") && !text.contains("MARKER"), "{text}");
    assert_eq!(error.effect(), Effect::NotDone, "{error:?}");
    error
}

async fn works(url: &str, deletes: bool) {
    let bus = connect(url, "").await;
    let name = unique("secured");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    bus.send(Message::new(name.as_str(), "let in")).await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    delivery.nack(Duration::ZERO).await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((delivery.message().bytes(), delivery.attempt()), (&b"let in"[..], 2));
    delivery.ack().await.unwrap();
    subscriber.close(LONG).await.unwrap();
    if deletes {
        assert_eq!(bus.describe(name.as_str()).await.unwrap().groups.len(), 1);
        bus.delete(name.as_str(), None).await.unwrap();
    }
    bus.close(LONG).await.unwrap();
}

/// One server for all: it takes seconds to start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_can_be_trusted_is_let_in_and_who_cannot_is_told_by_kind() {
    let Some(secured) = Secured::start() else { return };
    let ca = secured.trusting("ca.pem");
    let admin = |host: &str| format!("&admin=https://{host}:{}", secured.admin);
    // User and password, with the management plugin by https, and a certificate instead of a password.
    works(&secured.url("app:secret", "127.0.0.1", &format!("{ca}{}", admin("127.0.0.1"))), true).await;
    works(&secured.url("", "127.0.0.1", &secured.external("client")), false).await;

    let mut wrong = Vec::new();
    let cases = [
        ("the system's authorities", "app:secret", "127.0.0.1", String::new()),
        ("another authority", "app:secret", "127.0.0.1", secured.trusting("other-ca.pem")),
        ("another host", "app:secret", "localhost", ca.clone()),
        ("a wrong password", "app:MARKER", "127.0.0.1", ca.clone()),
        ("no such user", "nobody:MARKER", "127.0.0.1", ca.clone()),
        ("a stranger's certificate", "", "127.0.0.1", secured.external("stranger")),
        ("a certificate of no user", "", "127.0.0.1", secured.external("nobody")),
        ("another host of the plugin", "app:secret", "127.0.0.1", format!("{ca}{}", admin("localhost"))),
    ];
    for (case, user, host, settings) in cases {
        let error = refused(&secured.url(user, host, &settings)).await;
        if error.kind() != ErrorKind::Unauthenticated {
            wrong.push(format!("{case}: {error:?}"));
        }
    }

    // Known, and not allowed: into the virtual host, to the plugin, to create, to publish.
    let outside = refused(&secured.url("outsider:secret", "127.0.0.1", &ca)).await;
    let asking = secured.url("reader:secret", "127.0.0.1", &format!("{ca}{}", admin("127.0.0.1")));
    let asking = refused(&asking).await;
    let bus = connect(&secured.url("app:secret", "127.0.0.1", &ca), "").await;
    let name = unique("forbidden");
    bus.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let reader = connect(&secured.url("reader:secret", "127.0.0.1", &ca), "create_destinations=false").await;
    let publishing = reader.send(Message::new(name.as_str(), "x")).await.unwrap_err();
    let declaring = reader.declare(&TopologySpec::group(unique("new").as_str(), "g")).await.unwrap_err();
    // A channel that the server closes leaves open what else was on its way.
    assert_eq!(publishing.kind(), ErrorKind::PermissionDenied, "{publishing:?}");
    for error in [outside, asking, declaring] {
        if (error.kind(), error.effect()) != (ErrorKind::PermissionDenied, Effect::NotDone) {
            wrong.push(format!("{error:?}"));
        }
    }
    reader.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();

    // Files that are wrong, before anything is asked.
    std::fs::write(secured.file("empty.pem"), "nothing\n").unwrap();
    let client = secured.file("client.pem");
    for settings in [
        secured.trusting("missing.pem"),
        secured.trusting("empty.pem"),
        format!("{ca}&auth=external&tls_certificate={client}&tls_key={}", secured.file("missing.key")),
        format!("{ca}&auth=external&tls_certificate={client}&tls_key={client}"),
    ] {
        let error = refused(&secured.url("app:secret", "127.0.0.1", &settings)).await;
        if error.kind() != ErrorKind::ConfigInvalid {
            wrong.push(format!("{settings}: {error:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
