//! Settings, and what they mean to the connections.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{Credentials, Error, ErrorKind, Login, Result, Secret};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// The settings of section `pulsar`.
pub(crate) const FIELDS: &[Field] = &[
    Field::text("admin", "The admin REST endpoint, such as http://broker:8080.").required(),
    Field::bool("create_destinations", "Whether publishing creates a destination that is missing.", "true"),
    Field::text("tenant", "The tenant of all topics.").or("public"),
    Field::text("namespace", "The namespace of all topics.").or("default"),
    Field::integer("partitions", "Partitions of the topics it creates; 0 for topics without.", 0, 1_000, "0"),
    Field::integer(
        "key_ranges",
        "Ranges of keys that members share under order per key, on topics without partitions; 0: one member works.",
        0,
        64,
        "0",
    ),
    Field::duration("retention", "How long created destinations keep what every group has settled; 0 for ever.", "7d"),
    Field::integer("retention_mib", "MiB of settled messages that they keep; 0 for no bound.", 0, 1_000_000_000, "0"),
    Field::duration("settle_timeout", "How long a settle waits for the broker's confirmation.", "10s"),
    Field::text("tls_ca", "A file of the certificate authorities (PEM) to trust beside the system's."),
    Field::secret("token", "The token (JWT) to authenticate with."),
];

/// The settings after reading.
#[derive(Clone)]
pub(crate) struct Settings {
    pub(crate) url: String,
    pub(crate) hosts: Vec<String>,
    pub(crate) tls: bool,
    pub(crate) admin: String,
    pub(crate) connect_timeout: Duration,
    pub(crate) create_destinations: bool,
    pub(crate) tenant: String,
    pub(crate) namespace: String,
    pub(crate) partitions: u32,
    pub(crate) key_ranges: i32,
    pub(crate) retention: Duration,
    pub(crate) retention_mib: i64,
    pub(crate) settle_timeout: Duration,
    pub(crate) login: Option<Login>,
    tls_ca: Option<PathBuf>,
}

impl Settings {
    pub(crate) fn read(section: &Section) -> Self {
        let url = section.url();
        let tls = url.scheme() == "pulsar+ssl";
        let port = if tls { 6651 } else { 6650 };
        let has_port = |host: &String| host.rsplit_once(']').map_or(host.as_str(), |(_, rest)| rest).contains(':');
        let hosts = url.hosts().iter();
        Self {
            url: url.to_string(),
            hosts: hosts.map(|host| if has_port(host) { host.clone() } else { format!("{host}:{port}") }).collect(),
            tls,
            admin: section.text("admin").trim_end_matches('/').to_owned(),
            connect_timeout: section.connect_timeout(),
            create_destinations: section.bool("create_destinations"),
            tenant: section.text("tenant").to_owned(),
            namespace: section.text("namespace").to_owned(),
            partitions: u32::try_from(section.integer("partitions")).unwrap_or(0),
            key_ranges: i32::try_from(section.integer("key_ranges")).unwrap_or(0),
            retention: section.duration("retention"),
            retention_mib: section.integer("retention_mib"),
            settle_timeout: section.duration("settle_timeout"),
            login: login(section),
            tls_ca: section.optional_text("tls_ca").map(PathBuf::from),
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
            wrong("url", "expected at least one host, such as pulsar://broker:6650");
        }
        if !matches!(url.path(), "" | "/") {
            wrong("url", "a path means nothing to Pulsar; set tenant and namespace");
        }
        if url.username().is_some() || url.password().is_some() {
            wrong("url", "Pulsar has no user and password here; set token or credentials_file");
        }
        if section.has_provider() && section.secret("token").is_some() {
            wrong("pulsar.token", "the credentials come from a provider; expected no token with it");
        }
        let admin = section.text("admin");
        if !admin.starts_with("http://") && !admin.starts_with("https://") || admin.contains(['?', '#', '@', ' ']) {
            wrong("pulsar.admin", "expected a URL such as http://broker:8080 or https://broker:8443");
        }
        for field in ["tenant", "namespace"] {
            // Pulsar's own rule for these names (NamedEntity).
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-=:._".contains(&byte);
            if section.text(field).is_empty() || !section.text(field).bytes().all(is_plain) {
                wrong(&format!("pulsar.{field}"), "expected letters, digits, and - = : . _ only");
            }
        }
        problems
    }

    /// What the provider says at first, which is told by its own kind.
    pub(crate) async fn check_login(&self) -> Result<()> {
        match &self.login {
            Some(login) => token(login.now().await?).map(drop),
            None => Ok(()),
        }
    }

    /// A refusal can pass where there is a provider.
    pub(crate) fn passing(&self, error: Error) -> Error {
        match &self.login {
            Some(login) => login.passing(error),
            None => error,
        }
    }

    /// The provider may say other credentials when those that it said are refused.
    pub(crate) fn may_be_let_in(&self) -> bool {
        self.login.as_ref().is_some_and(Login::may_change)
    }

    /// What encrypted connections trust.
    pub(crate) fn tls(&self) -> Result<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in rustls_native_certs::load_native_certs().certs {
            let _ = roots.add(certificate);
        }
        if let Some(path) = &self.tls_ca {
            let unreadable = |why: String| {
                Error::new(ErrorKind::ConfigInvalid, "connect", format!("tls_ca cannot be read: {why}"))
                    .with("tls_ca", path.display())
            };
            let mut found = 0;
            for certificate in CertificateDer::pem_file_iter(path).map_err(|error| unreadable(error.to_string()))? {
                let certificate = certificate.map_err(|error| unreadable(error.to_string()))?;
                roots.add(certificate).map_err(|error| unreadable(error.to_string()))?;
                found += 1;
            }
            if found == 0 {
                return Err(unreadable("it holds no certificate".into()));
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| Error::new(ErrorKind::Unexpected, "connect", error.to_string()))?;
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}

fn login(section: &Section) -> Option<Login> {
    let of_setting = section.secret("token").map(|token| Login::fixed(Credentials::Token(token.clone())));
    of_setting.or_else(|| section.login().filter(|login| login.may_change()).cloned())
}

/// # Errors
/// `ConfigInvalid` for what is no token.
pub(crate) fn token(credentials: Credentials) -> Result<Secret> {
    match credentials {
        Credentials::Token(token) => Ok(token),
        other => Err(other.unfit("a token")),
    }
}
