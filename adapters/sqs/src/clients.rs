//! The SDK's clients, made of the settings.

use std::error::Error as StdError;
use std::path::Path;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Login, Result};
use aws_sdk_sqs::config::http::HttpResponse;
use aws_sdk_sqs::config::retry::RetryConfig;
use aws_sdk_sqs::config::timeout::TimeoutConfig;
use aws_sdk_sqs::config::{BehaviorVersion, IdentityCache, Region, StalledStreamProtectionConfig};
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::Builder as HttpBuilder;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::config::{LONGEST_POLL, Settings};
use crate::error::failed;
use crate::login::{Refusals, Shown};

/// How long one answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a request may take that finds, creates, describes, deletes or reads, with its retries. A service that has stopped
/// answering kept whoever asked for 90 s before: three attempts, each as long as a poll.
const REQUEST: Duration = Duration::from_secs(20);
/// How long at most before a request that was refused for its credentials is made with new ones.
const AGAIN: Duration = Duration::from_millis(50);

/// The clients of one connection. Those that send do not retry by themselves, because then nobody could tell whether an
/// earlier attempt is stored; the others do, for what they ask may be done twice.
#[derive(Debug, Clone)]
pub(crate) struct Clients {
    pub(crate) queues: aws_sdk_sqs::Client,
    /// The same, for receives that wait.
    pub(crate) polls: aws_sdk_sqs::Client,
    pub(crate) sender: aws_sdk_sqs::Client,
    pub(crate) topics: Option<Topics>,
    /// A provider: refused credentials may be others soon.
    pub(crate) login: Option<Login>,
    /// The largest request that carries messages.
    pub(crate) request_bytes: usize,
}

/// Those of SNS.
#[derive(Debug, Clone)]
pub(crate) struct Topics {
    pub(crate) topics: aws_sdk_sns::Client,
    pub(crate) sender: aws_sdk_sns::Client,
}

impl Clients {
    pub(crate) async fn new(settings: &Settings) -> Result<Self> {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(settings.connect_timeout.min(Duration::from_secs(5)))
            // A receive can hang for ever otherwise (aws-sdk-rust #1094, vector #20017).
            .operation_attempt_timeout(LONGEST_POLL + ANSWER)
            .build();
        // What nobody has to wait for at the service.
        let short = TimeoutConfig::builder().operation_attempt_timeout(ANSWER).operation_timeout(REQUEST).build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .timeout_config(timeouts)
            // It takes an idle long poll for a stalled stream (aws-sdk-rust #1148).
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        if let Some(region) = &settings.region {
            loader = loader.region(Region::new(region.clone()));
        }
        if let Some(profile) = &settings.profile {
            loader = loader.profile_name(profile);
        }
        let login = settings.login.clone().map(Shown);
        if let Some(login) = &login {
            login.check().await?;
            loader = loader.credentials_provider(login.clone()).identity_cache(IdentityCache::no_cache());
        } else if let Some(credentials) = &settings.credentials {
            loader = loader.credentials_provider(credentials.clone());
        }
        if let Some(file) = &settings.tls_ca {
            let context = TlsContext::builder().with_trust_store(trusted(file)?).build();
            let context = context.map_err(|error| wrong_ca(file, &error.to_string()))?;
            let client =
                HttpBuilder::new().tls_provider(Provider::Rustls(CryptoMode::AwsLc)).tls_context(context).build_https();
            loader = loader.http_client(client);
        }
        let shared = loader.load().await;
        let mut queues = aws_sdk_sqs::config::Builder::from(&shared);
        if let Some(endpoint) = &settings.endpoint {
            queues = queues.endpoint_url(endpoint);
        }
        // A request that is refused for its credentials did nothing: it is made once more, with what the provider says then.
        let once_more = RetryConfig::standard().with_max_attempts(2).with_initial_backoff(AGAIN);
        let refusals = |is_only| login.clone().map(|Shown(login)| Refusals { login, is_only });
        let sender = match refusals(true) {
            Some(refusals) => queues.clone().retry_config(once_more.clone()).retry_classifier(refusals),
            None => queues.clone().retry_config(RetryConfig::disabled()),
        };
        if let Some(refusals) = refusals(false) {
            queues = queues.retry_classifier(refusals);
        }
        let topics = settings.names.has_topics.then(|| {
            let mut topics = aws_sdk_sns::config::Builder::from(&shared);
            if let Some(endpoint) = &settings.sns_endpoint {
                topics = topics.endpoint_url(endpoint);
            }
            let sender = match refusals(true) {
                Some(refusals) => topics.clone().retry_config(once_more.clone()).retry_classifier(refusals),
                None => topics.clone().retry_config(RetryConfig::disabled()),
            };
            if let Some(refusals) = refusals(false) {
                topics = topics.retry_classifier(refusals);
            }
            Topics {
                topics: aws_sdk_sns::Client::from_conf(topics.timeout_config(short.clone()).build()),
                sender: aws_sdk_sns::Client::from_conf(sender.build()),
            }
        });
        Ok(Self {
            polls: aws_sdk_sqs::Client::from_conf(queues.clone().build()),
            queues: aws_sdk_sqs::Client::from_conf(queues.timeout_config(short).build()),
            sender: aws_sdk_sqs::Client::from_conf(sender.build()),
            topics,
            login: settings.login.clone(),
            request_bytes: settings.message_max_bytes,
        })
    }
}

impl Clients {
    /// The error of a request that failed.
    pub(crate) fn failed<E>(&self, operation: &'static str, error: &SdkError<E, HttpResponse>) -> Error
    where
        E: StdError + ProvideErrorMetadata + Send + Sync + 'static,
    {
        let error = failed(operation, error);
        match &self.login {
            Some(login) => login.passing(error),
            None => error,
        }
    }
}

/// Read and parsed here, because the client's own reading panics on what is no certificate.
fn trusted(file: &Path) -> Result<TrustStore> {
    let pem = std::fs::read(file).map_err(|error| wrong_ca(file, &error.to_string()))?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| wrong_ca(file, &error.to_string()))?;
    if found.is_empty() {
        return Err(wrong_ca(file, "it holds no certificate"));
    }
    let mut roots = rustls::RootCertStore::empty();
    for certificate in found {
        roots.add(certificate).map_err(|error| wrong_ca(file, &error.to_string()))?;
    }
    Ok(TrustStore::empty().with_pem_certificate(pem))
}

fn wrong_ca(file: &Path, problem: &str) -> Error {
    let text = format!("tls_ca: expected a PEM file of certificates: {problem}");
    Error::new(ErrorKind::ConfigInvalid, "connect", text).with("file", file.display())
}
