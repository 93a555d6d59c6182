//! Encrypted connections: who is trusted, who is let in, and what is told otherwise.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use anybroker_core::{Error, ErrorKind, Message};
use common::server::OwnServer;
use common::{LONG, connect, try_connect, unique};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// `<name>.pem` and `<name>.key`, for that host.
fn certificate(folder: &Path, name: &str, host: &str, authority: &CertifiedIssuer<'static, KeyPair>) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![host.to_owned()]).unwrap().signed_by(&key, authority).unwrap();
    std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
    std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

fn server() -> Option<OwnServer> {
    OwnServer::start(|folder| {
        let (authority, other) = (authority(), authority());
        std::fs::write(folder.join("ca.pem"), authority.pem()).unwrap();
        std::fs::write(folder.join("other-ca.pem"), other.pem()).unwrap();
        std::fs::write(folder.join("empty.pem"), "nothing\n").unwrap();
        certificate(folder, "server", "127.0.0.1", &authority);
        certificate(folder, "client", "client", &authority);
        certificate(folder, "stranger", "client", &other);
        let file = |name: &str| folder.join(name).display().to_string();
        format!(
            "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, verify: true }}",
            file("server.pem"),
            file("server.key"),
            file("ca.pem")
        )
    })
}

fn settings(server: &OwnServer, authority: &str, client: &str) -> String {
    let file = |name: &str| server.folder.path().join(name).display().to_string();
    let mut settings = Vec::new();
    if !authority.is_empty() {
        settings.push(format!("tls_ca={}", file(authority)));
    }
    if !client.is_empty() {
        let (certificate, key) = (file(&format!("{client}.pem")), file(&format!("{client}.key")));
        settings.push(format!("tls_certificate={certificate}&tls_key={key}"));
    }
    settings.push("connect_timeout=4s".to_owned());
    settings.join("&")
}

async fn refused(url: &str, settings: &str) -> Error {
    let begun = Instant::now();
    let error = try_connect(url, settings).await.map(drop).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}: {error}", begun.elapsed());
    assert!(!format!("{error:?}").contains("PRIVATE KEY"), "{error:?}");
    error
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trusted_server_takes_a_client_with_its_certificate() {
    let Some(server) = server() else { return };
    // The server asks for it; a URL of nats+tls would refuse one that does not.
    for scheme in ["nats", "nats+tls"] {
        let url = server.url("").replacen("nats", scheme, 1);
        let bus = connect(&url, &settings(&server, "ca.pem", "client")).await;
        let name = unique("tls");
        bus.send(Message::new(name.as_str(), "x")).await.unwrap();
        bus.delete(name.as_str(), None).await.unwrap();
        bus.close(LONG).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_cannot_be_trusted_is_refused_on_either_side() {
    let Some(server) = server() else { return };
    let url = server.url("").replacen("nats", "nats+tls", 1);
    let elsewhere = url.replacen("127.0.0.1", "localhost", 1);
    let cases = [
        ("the system's authorities", &url, "", "client"),
        ("another authority", &url, "other-ca.pem", "client"),
        ("another host", &elsewhere, "ca.pem", "client"),
        ("no certificate of the client's", &url, "ca.pem", ""),
        ("a stranger's certificate", &url, "ca.pem", "stranger"),
    ];
    for (case, url, authority, client) in cases {
        let error = refused(url, &settings(&server, authority, client)).await;
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{case}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_wrong_are_named() {
    let Some(server) = server() else { return };
    let url = server.url("").replacen("nats", "nats+tls", 1);
    let file = |name: &str| server.folder.path().join(name).display().to_string();
    let (ca, client, key) = (file("ca.pem"), file("client.pem"), file("client.key"));
    let cases = [
        ("nats.tls_ca", format!("tls_ca={}", file("missing.pem"))),
        ("nats.tls_ca", format!("tls_ca={}", file("empty.pem"))),
        ("nats.tls_certificate", format!("tls_ca={ca}&tls_certificate={}&tls_key={key}", file("empty.pem"))),
        ("nats.tls_key", format!("tls_ca={ca}&tls_certificate={client}&tls_key={client}")),
        ("nats.tls_certificate", format!("tls_ca={ca}&tls_certificate={ca}&tls_key={key}")),
        ("tls_key", format!("tls_ca={ca}&tls_certificate={client}")),
    ];
    for (field, settings) in cases {
        let error = refused(&url, &settings).await;
        assert_eq!(error.kind(), ErrorKind::ConfigInvalid, "{settings}: {error}");
        assert!(format!("{error:?}").contains(field), "{settings}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_tls_is_refused_where_it_is_demanded() {
    let Some(server) = OwnServer::start(|_| String::new()) else { return };
    let error = refused(&server.url("").replacen("nats", "nats+tls", 1), "connect_timeout=4s").await;
    assert!(matches!(error.kind(), ErrorKind::ConfigInvalid | ErrorKind::Timeout), "{error}");
}
