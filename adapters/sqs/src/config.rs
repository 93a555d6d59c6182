//! The settings of section `sqs`.

use std::path::PathBuf;
use std::time::Duration;

use anybroker_core::Login;
use anybroker_core::config::{EndpointUrl, Field, Problem, Section};
use aws_sdk_sqs::config::Credentials;

use crate::names::Names;

/// How long a receive is held at most. SQS holds one for 20 s; an answer that comes as late as that is cut off by servers and
/// proxies with bounds of their own, and its messages are leased to nobody.
pub(crate) const LONGEST_POLL: Duration = Duration::from_secs(15);

/// Who waits while a queue has nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Polls {
    /// SQS holds the request.
    Long,
    /// This library, between requests.
    Short,
}

/// The settings of section `sqs`.
pub(crate) const FIELDS: &[Field] = &[
    Field::text("region", "The region. Default: the environment's."),
    Field::text("profile", "The profile of the AWS configuration files. Default: the environment's."),
    Field::choice("mode", "Which kind of queue; fifo keeps order per key.", &["standard", "fifo"], "standard"),
    Field::choice(
        "fanout",
        "Whether a destination is one queue, which has one group, or an SNS topic with a queue for each group.",
        &["none", "sns"],
        "none",
    ),
    Field::choice(
        "message_group",
        "What is in order in mode fifo: messages of a key, or all messages of a destination.",
        &["key", "one"],
        "key",
    ),
    Field::text("sns_endpoint", "The URL of SNS, where it is not at the same endpoint as SQS."),
    Field::text(
        "topic_arn_prefix",
        "What the ARNs of topics begin with, such as arn:aws:sns:eu-west-1:123456789012. Default: asked of SNS.",
    ),
    Field::choice(
        "tls",
        "Whether an endpoint that is named by host is spoken to over TLS; auto: unless it is this machine.",
        &["auto", "on", "off"],
        "auto",
    ),
    Field::text("tls_ca", "A PEM file with the certificates that are trusted instead of the system's."),
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
    Field::choice(
        "long_polls",
        "Whether the server waits for messages, or is asked ten times a second; auto: it waits, unless it is a FIFO queue at an endpoint of its own.",
        &["auto", "on", "off"],
        "auto",
    ),
];

/// The settings after reading.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) url: String,
    pub(crate) connect_timeout: Duration,
    pub(crate) names: Names,
    /// All messages of a destination are in one message group.
    pub(crate) is_total: bool,
    pub(crate) create_destinations: bool,
    pub(crate) message_max_bytes: usize,
    pub(crate) requests: usize,
    pub(crate) receivers: usize,
    pub(crate) polls: Polls,
    /// `http://host:port`, where the URL names a host.
    pub(crate) endpoint: Option<String>,
    /// The same for SNS.
    pub(crate) sns_endpoint: Option<String>,
    pub(crate) topic_arn_prefix: Option<String>,
    pub(crate) region: Option<String>,
    pub(crate) profile: Option<String>,
    pub(crate) credentials: Option<Credentials>,
    /// A provider, in the place of these.
    pub(crate) login: Option<Login>,
    pub(crate) tls_ca: Option<PathBuf>,
}

impl Settings {
    pub(crate) fn read(section: &Section) -> Self {
        let url = section.url();
        let size = |field: &str| usize::try_from(section.integer(field)).expect("the field's bounds are positive");
        let text = |field: &str| section.optional_text(field).map(str::to_owned);
        let endpoint = url.hosts().first().map(|host| {
            let is_secure = match section.text("tls") {
                "on" => true,
                "off" => false,
                _ => !is_loopback(host),
            };
            format!("{}://{host}", if is_secure { "https" } else { "http" })
        });
        let names = Names { is_fifo: section.text("mode") == "fifo", has_topics: section.text("fanout") == "sns" };
        Self {
            url: url.to_string(),
            connect_timeout: section.connect_timeout(),
            names,
            is_total: section.text("message_group") == "one",
            create_destinations: section.bool("create_destinations"),
            message_max_bytes: size("message_max_bytes"),
            requests: size("requests"),
            receivers: size("receivers"),
            // While a request waits at a FIFO queue of which a message group is locked, ElasticMQ (1.6.16) looks through the
            // whole queue without a pause: it schedules the next look for when the first message of any group is due, and the
            // locked ones are due already (QueueActorWaitForMessagesOps.scala, `scheduleTryReplyWhenAvailable`).
            polls: match section.text("long_polls") {
                "on" => Polls::Long,
                "off" => Polls::Short,
                // ElasticMQ has no topics, and LocalStack waits without this.
                _ if names.is_fifo && endpoint.is_some() && !names.has_topics => Polls::Short,
                _ => Polls::Long,
            },
            region: text("region"),
            profile: text("profile"),
            credentials: credentials(url, section),
            login: section.login().filter(|login| login.may_change()).cloned(),
            sns_endpoint: text("sns_endpoint").or_else(|| endpoint.clone()),
            topic_arn_prefix: text("topic_arn_prefix").map(|prefix| prefix.trim_end_matches(':').to_owned()),
            tls_ca: text("tls_ca").map(PathBuf::from),
            endpoint,
        }
    }

    /// What the fields cannot check one by one.
    pub(crate) fn check(section: &Section) -> Vec<Problem> {
        let mut problems = Vec::new();
        let url = section.url();
        let mut wrong = |key: &str, message: &str| {
            problems.push(Problem { key: key.into(), origin: "url".into(), message: message.into() });
        };
        if url.hosts().len() > 1 {
            wrong("url", "expected one host (or none: Amazon's endpoint of the region)");
        }
        if url.username().is_some() != url.password().is_some() {
            wrong("url", "expected both an access key and its secret before the @, or neither");
        }
        let has_own = section.secret("session_token").is_some() || section.optional_text("profile").is_some();
        if section.has_provider() && has_own {
            wrong("sqs", "the credentials come from a provider; expected neither session_token nor profile with it");
        }
        if !matches!(url.path(), "" | "/") {
            wrong("url", "a path means nothing here; destinations are named by the messages");
        }
        if section.text("message_group") == "one" && section.text("mode") != "fifo" {
            wrong("message_group", "standard queues have no order; expected mode = \"fifo\" with it");
        }
        if section.text("fanout") != "sns" {
            for field in ["sns_endpoint", "topic_arn_prefix"] {
                if section.optional_text(field).is_some() {
                    wrong(field, "it means nothing without fanout = \"sns\"");
                }
            }
        }
        if section.optional_text("sns_endpoint").is_some_and(|url| !url.starts_with("http")) {
            wrong("sns_endpoint", "expected a URL that begins with http:// or https://");
        }
        if section.optional_text("topic_arn_prefix").is_some_and(|prefix| !prefix.starts_with("arn:")) {
            wrong("topic_arn_prefix", "expected a text such as arn:aws:sns:eu-west-1:123456789012");
        }
        problems
    }

    /// The mode as the endpoint is called by.
    pub(crate) fn mode(&self) -> &'static str {
        match (self.names.is_fifo, self.names.has_topics) {
            (false, false) => "standard",
            (false, true) => "standard+sns",
            (true, false) => "fifo",
            (true, true) => "fifo+sns",
        }
    }
}

fn credentials(url: &EndpointUrl, section: &Section) -> Option<Credentials> {
    let of_url = url.username().zip(url.password());
    if let Some((key, secret)) = of_url {
        let token = section.secret("session_token").map(|token| token.reveal().to_owned());
        return Some(Credentials::new(key, secret.reveal(), token, None, "url"));
    }
    // An emulator on this machine wants some, and looks at none; the default chain would ask the network for them.
    let is_emulator =
        url.hosts().first().is_some_and(|host| is_loopback(host)) && section.optional_text("profile").is_none();
    is_emulator.then(|| Credentials::new("anybroker", "anybroker", None, None, "emulator"))
}

fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_matches(['[', ']']);
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}
