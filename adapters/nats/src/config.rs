//! Settings, and what they mean to the client.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Credentials, Login, Result};
use async_nats::ConnectOptions;

use crate::authentication::{Authentication, CredsFile};
use crate::tls;

/// The settings of section `nats`.
pub(crate) const FIELDS: &[Field] = &[
    Field::bool("create_destinations", "Whether publishing creates a destination that is missing.", "true"),
    Field::text("prefix", "What the names of streams and subjects begin with: letters, digits, - and _.")
        .or("anybroker"),
    Field::integer("replicas", "Copies of the streams it creates: 1, 3 or 5 in a cluster.", 1, 5, "1"),
    Field::duration("max_age", "How long created destinations keep messages, acked or not; 0 for ever.", "0"),
    Field::integer(
        "max_mib",
        "MiB that a created destination keeps; publishing to a full one fails. 0 for no bound.",
        0,
        1_000_000_000,
        "0",
    ),
    Field::duration("dedup_window", "How long created destinations remember ids; 0 for no dedup.", "2m"),
    Field::duration(
        "member_timeout",
        "How long a member that keeps order may be silent before another one works.",
        "6s",
    ),
    Field::duration("settle_timeout", "How long a settle waits for the server's confirmation.", "10s"),
    Field::bool("tls", "Whether the connection must be encrypted; a URL nats+tls:// says the same.", "false"),
    Field::text("tls_ca", "A file of the certificate authorities (PEM) to trust instead of the system's."),
    Field::text("tls_certificate", "A file of this client's certificate (PEM)."),
    Field::text("tls_key", "A file of this client's private key (PEM)."),
    Field::secret("token", "The token to authenticate with."),
    Field::secret("nkey", "The seed of the NKey to authenticate with."),
    Field::text("credentials", "A .creds file: a user's JWT and seed."),
];

/// The settings after reading.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) url: String,
    pub(crate) hosts: Vec<String>,
    pub(crate) connect_timeout: Duration,
    pub(crate) create_destinations: bool,
    pub(crate) prefix: String,
    pub(crate) replicas: i64,
    pub(crate) max_age: Duration,
    pub(crate) max_bytes: i64,
    pub(crate) dedup_window: Duration,
    pub(crate) member_timeout: Duration,
    pub(crate) settle_timeout: Duration,
    pub(crate) login: Option<Login>,
    tls: bool,
    pub(crate) tls_ca: Option<PathBuf>,
    pub(crate) tls_client: Option<(PathBuf, PathBuf)>,
}

impl Settings {
    pub(crate) fn read(section: &Section) -> Self {
        let url = section.url();
        let path = |field: &str| section.optional_text(field).map(PathBuf::from);
        Self {
            url: url.to_string(),
            hosts: url.hosts().to_vec(),
            connect_timeout: section.connect_timeout(),
            create_destinations: section.bool("create_destinations"),
            prefix: section.text("prefix").to_owned(),
            replicas: section.integer("replicas"),
            max_age: section.duration("max_age"),
            max_bytes: section.integer("max_mib") * 1_048_576,
            dedup_window: section.duration("dedup_window"),
            member_timeout: section.duration("member_timeout"),
            settle_timeout: section.duration("settle_timeout"),
            login: login(section),
            tls: section.bool("tls") || url.scheme() == "nats+tls",
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
        if section.url().hosts().is_empty() {
            wrong("url", "expected at least one host, such as nats://broker:4222");
        }
        if !matches!(section.url().path(), "" | "/") {
            wrong("url", "a path means nothing to NATS; destinations are named by the messages");
        }
        let prefix = section.text("prefix");
        if prefix.len() > 32 || !prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
            wrong("nats.prefix", "expected at most 32 letters, digits, - and _");
        }
        let ways = [
            // Both of the user of the URL and a provider is reported already.
            section.url().username().is_some() && !section.has_provider(),
            section.has_provider(),
            section.secret("token").is_some(),
            section.secret("nkey").is_some(),
            section.optional_text("credentials").is_some(),
        ];
        if ways.into_iter().filter(|is_set| *is_set).count() > 1 {
            wrong("nats", "more than one of user, token, nkey, credentials and a provider is set; expected one");
        }
        if section.optional_text("tls_certificate").is_some() != section.optional_text("tls_key").is_some() {
            wrong("nats.tls_key", "tls_certificate and tls_key belong together; one of them is missing");
        }
        if section.duration("member_timeout") < Duration::from_secs(1) {
            wrong("nats.member_timeout", "expected at least 1s");
        }
        problems
    }

    /// The client's options, without its callbacks.
    pub(crate) async fn options(&self, authentication: &Arc<Authentication>) -> Result<ConnectOptions> {
        let options = authentication
            .options()
            .name("anybroker")
            .connection_timeout(self.connect_timeout)
            // A connection that is dead in one direction is noticed within two of these (nats.rs PR #1594).
            .ping_interval(Duration::from_secs(5))
            .client_capacity(4096)
            // The default backs off to 4 s; a server that is back should be used soon.
            .reconnect_delay_callback(|attempts| {
                Duration::from_millis(match attempts {
                    0 | 1 => 0,
                    attempts => (20 * attempts as u64).min(500),
                })
            })
            .require_tls(self.tls);
        // Always: the server may ask for it.
        let settings = self.clone();
        let config = tokio::task::spawn_blocking(move || tls::config(&settings)).await;
        Ok(options.tls_client_config(config.expect("reading files cannot panic, and nobody aborts it")?))
    }
}

fn login(section: &Section) -> Option<Login> {
    let fixed = |credentials| Some(Login::fixed(credentials));
    if let Some(token) = section.secret("token") {
        return fixed(Credentials::Token(token.clone()));
    }
    if let Some(seed) = section.secret("nkey") {
        return fixed(Credentials::Nkey { jwt: None, seed: seed.clone() });
    }
    match section.optional_text("credentials") {
        Some(path) => Some(Login::asked(Arc::new(CredsFile(path.into())), section.connect_timeout())),
        None => section.login().cloned(),
    }
}
