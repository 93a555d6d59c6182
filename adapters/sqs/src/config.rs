//! Settings, and the clients made of them.

use std::time::Duration;

use anybroker_core::config::{EndpointUrl, Field, Problem, Section};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::retry::RetryConfig;
use aws_sdk_sqs::config::timeout::TimeoutConfig;
use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region, StalledStreamProtectionConfig};

/// The longest that SQS holds a receive.
pub(crate) const LONGEST_POLL: Duration = Duration::from_secs(20);

/// The settings of section `sqs`.
pub(crate) const FIELDS: &[Field] = &[
    Field::text("region", "The region. Default: the environment's."),
    Field::choice("mode", "Which kind of queue.", &["standard"], "standard"),
    Field::choice(
        "tls",
        "Whether an endpoint that is named by host is spoken to over TLS; auto: unless it is this machine.",
        &["auto", "on", "off"],
        "auto",
    ),
    Field::secret("session_token", "The session token that belongs to the URL's key and secret."),
    Field::bool("create_destinations", "Whether publishing creates a destination that is missing.", "true"),
    Field::integer(
        "message_max_bytes",
        "Largest message with its attributes, and largest batch.",
        65_536,
        1_048_576,
        "262144",
    ),
    Field::integer("requests", "Requests that are on their way at most.", 1, 1000, "32"),
    Field::integer("receivers", "Receive requests that one subscription has open at most.", 1, 100, "4"),
];

/// The settings after reading.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) url: String,
    pub(crate) connect_timeout: Duration,
    pub(crate) create_destinations: bool,
    pub(crate) message_max_bytes: usize,
    pub(crate) requests: usize,
    pub(crate) receivers: usize,
    /// `http://host:port`, where the URL names a host.
    pub(crate) endpoint: Option<String>,
    region: Option<String>,
    credentials: Option<Credentials>,
}

impl Settings {
    pub(crate) fn read(section: &Section) -> Self {
        let url = section.url();
        let size = |field: &str| usize::try_from(section.integer(field)).expect("the field's bounds are positive");
        let endpoint = url.hosts().first().map(|host| {
            let is_here = is_loopback(host);
            let is_secure = match section.text("tls") {
                "on" => true,
                "off" => false,
                _ => !is_here,
            };
            format!("{}://{host}", if is_secure { "https" } else { "http" })
        });
        Self {
            url: url.to_string(),
            connect_timeout: section.connect_timeout(),
            create_destinations: section.bool("create_destinations"),
            message_max_bytes: size("message_max_bytes"),
            requests: size("requests"),
            receivers: size("receivers"),
            region: section.optional_text("region").map(str::to_owned),
            credentials: credentials(url, section),
            endpoint,
        }
    }

    /// What the fields cannot check one by one.
    pub(crate) fn check(section: &Section) -> Vec<Problem> {
        let mut problems = Vec::new();
        let url = section.url();
        let mut wrong = |message: &str| {
            problems.push(Problem { key: "url".into(), origin: "url".into(), message: message.into() });
        };
        if url.hosts().len() > 1 {
            wrong("expected one host (or none: Amazon's endpoint of the region)");
        }
        if url.username().is_some() != url.password().is_some() {
            wrong("expected both an access key and its secret before the @, or neither");
        }
        if !matches!(url.path(), "" | "/") {
            wrong("a path means nothing here; destinations are named by the messages");
        }
        problems
    }

    /// The client for everything that may be done twice, and the one that sends: it does not retry by itself, because
    /// then nobody could tell whether an earlier attempt is stored.
    pub(crate) async fn clients(&self) -> (Client, Client) {
        let mut loader = aws_config::defaults(BehaviorVersion::latest());
        if let Some(region) = &self.region {
            loader = loader.region(Region::new(region.clone()));
        }
        if let Some(credentials) = &self.credentials {
            loader = loader.credentials_provider(credentials.clone());
        }
        if let Some(endpoint) = &self.endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        let shared = loader.load().await;
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(self.connect_timeout.min(Duration::from_secs(5)))
            // A receive can hang for ever otherwise (aws-sdk-rust #1094, vector #20017).
            .operation_attempt_timeout(LONGEST_POLL + Duration::from_secs(10))
            .build();
        let config = aws_sdk_sqs::config::Builder::from(&shared)
            .timeout_config(timeouts)
            // It takes an idle long poll for a stalled stream (aws-sdk-rust #1148).
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        let sender = config.clone().retry_config(RetryConfig::disabled());
        (Client::from_conf(config.build()), Client::from_conf(sender.build()))
    }
}

fn credentials(url: &EndpointUrl, section: &Section) -> Option<Credentials> {
    let of_url = url.username().zip(url.password());
    if let Some((key, secret)) = of_url {
        let token = section.secret("session_token").map(|token| token.reveal().to_owned());
        return Some(Credentials::new(key, secret.reveal(), token, None, "url"));
    }
    // An emulator on this machine wants some, and looks at none; the default chain would ask the network for them.
    let is_emulator = url.hosts().first().is_some_and(|host| is_loopback(host));
    is_emulator.then(|| Credentials::new("anybroker", "anybroker", None, None, "emulator"))
}

fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}
