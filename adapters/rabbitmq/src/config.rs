//! Settings, and what they mean to the client.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Error, ErrorKind, Login, Result};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::credentials::guest;

/// The settings of section `amqp`.
pub(crate) const FIELDS: &[Field] = &[
    Field::bool("create_destinations", "Whether publishing creates a destination that is missing.", "true"),
    Field::text("prefix", "What the names of exchanges and queues begin with: letters, digits, - and _.")
        .or("anybroker"),
    Field::choice(
        "queue",
        "What keeps messages: a queue for each group (classic ones are not written through), or one stream for all.",
        &["quorum", "classic", "stream"],
        "quorum",
    ),
    Field::duration("stream_max_age", "How long streams it creates keep messages at least; 0s is for ever.", "0s"),
    Field::integer(
        "stream_max_mib",
        "MiB that streams it creates keep at least; 0 is no limit.",
        0,
        1_000_000_000,
        "0",
    ),
    Field::text("admin", "The management plugin's address, such as http://broker:15672, with the same user."),
    Field::duration("heartbeat", "How often a silent connection is checked; it is given up after twice that.", "10s"),
    Field::integer("max_message_mib", "MiB of payload that the server takes (its `max_message_size`).", 1, 512, "16"),
    Field::duration("consumer_timeout", "How long the server lets a delivery be out, for groups it creates.", "24h"),
    Field::duration("settle_timeout", "How long a nack or dead letter waits for the confirmation of its copy.", "10s"),
    Field::choice("auth", "How to authenticate.", &["plain", "external"], "plain"),
    Field::text("tls_ca", "A file of the certificate authorities (PEM) to trust beside the system's."),
    Field::text("tls_certificate", "A file of this client's certificate (PEM)."),
    Field::text("tls_key", "A file of this client's private key (PEM, PKCS#8)."),
];

/// What keeps the messages of a group: a queue of its own, or the stream of the destination. What holds letters, waits or says
/// who works is a quorum queue with each: only that goes on to another queue at least once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QueueType {
    Quorum,
    Classic,
    Stream,
}

impl QueueType {
    /// As the server calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
            Self::Stream => "stream",
        }
    }

    /// Whether groups read one log.
    pub(crate) fn is_log(self) -> bool {
        self == Self::Stream
    }

    /// Whether the server may bury what expires: a classic queue lets it go before anybody has confirmed it ("Dead Letter
    /// Exchanges", "Safety"), and in a stream nothing expires ("Streams", "Feature Comparison").
    pub(crate) fn buries_expired(self) -> bool {
        self == Self::Quorum
    }

    /// Whether it counts how often a message was handed out.
    pub(crate) fn counts(self) -> bool {
        self == Self::Quorum
    }
}

/// The settings after reading.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) url: String,
    pub(crate) connect_timeout: Duration,
    pub(crate) create_destinations: bool,
    pub(crate) prefix: String,
    pub(crate) queue: QueueType,
    pub(crate) admin: Option<String>,
    pub(crate) vhost: String,
    pub(crate) max_message: u64,
    pub(crate) consumer_timeout: Duration,
    /// What streams keep at least: seconds and bytes; 0 is for ever.
    pub(crate) stream_keeps: (u64, u64),
    pub(crate) settle_timeout: Duration,
    pub(crate) login: Login,
    hosts: Vec<String>,
    heartbeat: u16,
    is_external: bool,
    is_tls: bool,
    tls_ca: Option<PathBuf>,
    tls_client: Option<(PathBuf, PathBuf)>,
}

impl Settings {
    pub(crate) fn read(section: &Section) -> Self {
        let url = section.url();
        let path = |field: &str| section.optional_text(field).map(PathBuf::from);
        let seconds = section.duration("heartbeat").as_secs();
        Self {
            url: url.to_string(),
            connect_timeout: section.connect_timeout(),
            create_destinations: section.bool("create_destinations"),
            prefix: section.text("prefix").to_owned(),
            queue: match section.text("queue") {
                "classic" => QueueType::Classic,
                "stream" => QueueType::Stream,
                _ => QueueType::Quorum,
            },
            admin: section.optional_text("admin").map(|admin| admin.trim_end_matches('/').to_owned()),
            vhost: vhost(url.path()),
            max_message: u64::try_from(section.integer("max_message_mib")).unwrap_or(16) * 1_048_576,
            consumer_timeout: section.duration("consumer_timeout"),
            stream_keeps: (
                section.duration("stream_max_age").as_micros().div_ceil(1_000_000).try_into().unwrap_or(u64::MAX),
                u64::try_from(section.integer("stream_max_mib")).unwrap_or(0) * 1_048_576,
            ),
            settle_timeout: section.duration("settle_timeout"),
            login: section.login().cloned().unwrap_or_else(|| guest(url.password())),
            hosts: url.hosts().to_vec(),
            heartbeat: u16::try_from(seconds).unwrap_or(u16::MAX),
            is_external: section.text("auth") == "external",
            is_tls: url.scheme() == "amqps",
            tls_ca: path("tls_ca"),
            tls_client: path("tls_certificate").zip(path("tls_key")),
        }
    }

    /// What the fields cannot check one by one.
    pub(crate) fn check(section: &Section) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut wrong = |key: &str, message: &str| {
            problems.push(Problem { key: key.into(), origin: "url".into(), message: message.into() });
        };
        let url = section.url();
        if url.hosts().is_empty() {
            wrong("url", "expected at least one host, such as amqp://broker:5672");
        }
        let prefix = section.text("prefix");
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if prefix.is_empty() || prefix.len() > 32 || !prefix.bytes().all(is_plain) {
            wrong("amqp.prefix", "expected 1 to 32 letters, digits, - and _");
        }
        if section
            .optional_text("admin")
            .is_some_and(|admin| !admin.starts_with("http://") && !admin.starts_with("https://"))
        {
            wrong("amqp.admin", "expected http://host:port or https://host:port");
        }
        let heartbeat = section.duration("heartbeat");
        if heartbeat < Duration::from_secs(1) || heartbeat > Duration::from_secs(3_600) {
            wrong("amqp.heartbeat", "expected 1s to 1h");
        }
        // The server looks for timeouts once a minute.
        if section.duration("consumer_timeout") < Duration::from_secs(120) {
            wrong("amqp.consumer_timeout", "expected at least 2m");
        }
        if section.optional_text("tls_certificate").is_some() != section.optional_text("tls_key").is_some() {
            wrong("amqp.tls_key", "tls_certificate and tls_key belong together; one of them is missing");
        }
        if section.text("auth") == "external" && (url.scheme() != "amqps" || section.optional_text("tls_key").is_none())
        {
            wrong("amqp.auth", "external takes an amqps:// URL, tls_certificate and tls_key");
        }
        if section.text("auth") == "external" && section.has_provider() {
            wrong("amqp.auth", "external takes the user from the certificate; expected no provider of credentials");
        }
        problems
    }

    /// One address for each host, without user and password.
    pub(crate) fn addresses(&self) -> Vec<AMQPUri> {
        let (scheme, port) = if self.is_tls { (AMQPScheme::AMQPS, 5671) } else { (AMQPScheme::AMQP, 5672) };
        let address = |host: &String| {
            let (host, port) = split(host, port);
            let userinfo = AMQPUserInfo { username: String::new(), password: String::new() };
            let query = AMQPQueryString {
                heartbeat: Some(self.heartbeat),
                connection_timeout: u64::try_from(self.connect_timeout.as_millis()).ok(),
                auth_mechanism: self.is_external.then_some(SASLMechanism::External),
                ..AMQPQueryString::default()
            };
            AMQPUri {
                scheme: scheme.clone(),
                authority: AMQPAuthority { userinfo, host, port },
                vhost: self.vhost.clone(),
                query,
            }
        };
        self.hosts.iter().map(address).collect()
    }

    /// Read anew for each connection, so that renewed certificates are used.
    pub(crate) async fn tls(&self) -> Result<OwnedTLSConfig> {
        if !self.is_tls {
            return Ok(OwnedTLSConfig::default());
        }
        let cert_chain = match &self.tls_ca {
            Some(path) => Some(text("tls_ca", path, holds_certificate).await?),
            None => None,
        };
        let identity = match &self.tls_client {
            Some((certificate, key)) => Some(OwnedIdentity::PKCS8 {
                pem: text("tls_certificate", certificate, holds_certificate).await?.into_bytes(),
                key: text("tls_key", key, |key| PrivatePkcs8KeyDer::from_pem_slice(key).is_ok()).await?.into_bytes(),
            }),
            None => None,
        };
        Ok(OwnedTLSConfig { identity, cert_chain })
    }

    /// What the management plugin's address trusts: as the broker's.
    pub(crate) fn admin_tls(&self) -> Result<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        if self.admin.as_ref().is_some_and(|admin| admin.starts_with("https://")) {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if let Some(path) = &self.tls_ca {
                let unreadable = |why: String| {
                    let text = format!("the file of tls_ca cannot be read: {why}");
                    Error::new(ErrorKind::ConfigInvalid, "connect", text).with("tls_ca", path.display())
                };
                for certificate in CertificateDer::pem_file_iter(path).map_err(|why| unreadable(why.to_string()))? {
                    roots.add_parsable_certificates([certificate.map_err(|why| unreadable(why.to_string()))?]);
                }
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| Error::new(ErrorKind::Unexpected, "connect", error.to_string()))?;
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}

/// A file's text, checked: the client says nothing of one that holds nothing.
async fn text(field: &'static str, path: &PathBuf, is_right: impl Fn(&[u8]) -> bool) -> Result<String> {
    let wrong = |why: &dyn std::fmt::Display| {
        let text = format!("the file of {field} cannot be read: {why}");
        Error::new(ErrorKind::ConfigInvalid, "connect", text).with(field, path.display())
    };
    let text = tokio::fs::read_to_string(path).await.map_err(|error| wrong(&error.kind()))?;
    if is_right(text.as_bytes()) { Ok(text) } else { Err(wrong(&"it does not hold what it should (PEM)")) }
}

fn holds_certificate(pem: &[u8]) -> bool {
    CertificateDer::pem_slice_iter(pem).next().is_some_and(|first| first.is_ok())
}

/// `/` where the path names none; the name behind the slash otherwise, which is `/` itself when it was written as `%2f`.
fn vhost(path: &str) -> String {
    match path.strip_prefix('/') {
        None | Some("") => "/".to_owned(),
        Some(name) => name.to_owned(),
    }
}

/// Host and port; the colons of an IPv6 address stand in brackets.
fn split(host: &str, default: u16) -> (String, u16) {
    let at = host.rfind(':').filter(|at| !host[*at..].contains(']'));
    let (name, port) = match at {
        Some(at) => (&host[..at], host[at + 1..].parse().unwrap_or(default)),
        None => (host, default),
    };
    (name.trim_start_matches('[').trim_end_matches(']').to_owned(), port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_virtual_hosts_are_read() {
        assert_eq!(split("a", 5672), ("a".to_owned(), 5672));
        assert_eq!(split("a:1", 5672), ("a".to_owned(), 1));
        assert_eq!(split("[::1]:2", 5672), ("::1".to_owned(), 2));
        assert_eq!(split("[::1]", 5672), ("::1".to_owned(), 5672));
        for (path, expected) in [("", "/"), ("/", "/"), ("//", "/"), ("/orders", "orders")] {
            assert_eq!(vhost(path), expected, "{path}");
        }
    }
}
