//! The admin REST API: topics, subscriptions, figures.

use std::time::Duration;

use anybroker_core::{Effect, Error, ErrorKind, Login, Result, Retry};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::{Settings, token};

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(20);
/// No answer that is of use is larger.
const LARGEST: usize = 64 * 1_048_576;

/// Method and what it is asked with.
pub(crate) enum Verb<'v> {
    Get,
    Put(&'v Value),
    Post(&'v Value),
    Delete,
}

pub(crate) struct Admin {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    base: String,
    space: String,
    login: Option<Login>,
}

/// What the broker answered.
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// A refusal that can pass: the provider may say other credentials.
    may_pass: bool,
    body: Bytes,
}

impl Admin {
    pub(crate) fn new(settings: &Settings, space: &str) -> Result<Self> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(settings.connect_timeout));
        tcp.set_nodelay(true);
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(settings.tls()?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Ok(Self {
            client: Client::builder(TokioExecutor::new()).pool_idle_timeout(Duration::from_secs(20)).build(https),
            base: format!("{}/admin/v2", settings.admin),
            space: space.to_owned(),
            login: settings.login.clone(),
        })
    }

    /// Below `/admin/v2`, such as `/brokers/version`. A request that is refused because nobody knows who asks did nothing: it is
    /// made once more, with what a provider says then.
    pub(crate) async fn ask(&self, operation: &'static str, verb: Verb<'_>, path: &str) -> Result<Answer> {
        let answer = self.ask_once(operation, &verb, path).await?;
        match &self.login {
            Some(login) if login.may_change() && answer.is_unknown_who_asks() => {
                login.refused();
                self.ask_once(operation, &verb, path).await
            }
            _ => Ok(answer),
        }
    }

    async fn ask_once(&self, operation: &'static str, verb: &Verb<'_>, path: &str) -> Result<Answer> {
        let (method, body, is_read) = match verb {
            Verb::Get => ("GET", Bytes::new(), true),
            Verb::Put(body) => ("PUT", Bytes::from(body.to_string()), false),
            Verb::Post(body) => ("POST", Bytes::from(body.to_string()), false),
            Verb::Delete => ("DELETE", Bytes::new(), false),
        };
        let mut request = http::Request::builder().method(method).uri(format!("{}{path}", self.base));
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        if let Some(login) = &self.login {
            let token = token(login.recent().await?)?;
            // With the method's name a token that is wrong is refused; without it the broker tries its other providers, and
            // takes the client for the anonymous role in the end, where there is one (AuthenticationService.java).
            request = request
                .header("authorization", format!("Bearer {}", token.reveal()))
                .header("x-pulsar-auth-method-name", "token");
        }
        let invalid = |error: http::Error| Error::new(ErrorKind::ConfigInvalid, operation, error.to_string());
        let request = request.body(Full::new(body)).map_err(invalid)?;
        let effect = if is_read { Effect::NotDone } else { Effect::Unknown };
        let asking = async {
            let failed = |error: String, connect: bool| {
                let text = format!("the admin endpoint does not answer: {error}");
                let effect = if connect { Effect::NotDone } else { effect };
                Error::new(ErrorKind::Unavailable, operation, text).with_effect(effect)
            };
            let answer = self.client.request(request).await.map_err(|error| {
                let is_untrusted = caused_by_certificate(&error);
                let connect = error.is_connect();
                let why = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                let mut error = failed(why, connect);
                if is_untrusted {
                    error = Error::new(ErrorKind::Unauthenticated, operation, error.message().to_owned());
                }
                error
            })?;
            let status = answer.status().as_u16();
            let body = Limited::new(answer.into_body(), LARGEST).collect().await;
            let body = body.map_err(|error| failed(error.to_string(), false))?.to_bytes();
            let may_pass = self.login.as_ref().is_some_and(Login::may_change);
            Ok(Answer { status, may_pass, body })
        };
        match tokio::time::timeout(REQUEST, asking).await {
            Ok(answer) => answer.map_err(|error: Error| error.with("admin", &self.base)),
            Err(_) => {
                let text = format!("the admin endpoint did not answer within {REQUEST:?}");
                Err(Error::new(ErrorKind::Unavailable, operation, text).with_effect(effect).with("admin", &self.base))
            }
        }
    }

    /// Of a topic: `path` follows its local name, with its leading slash.
    pub(crate) async fn topic(
        &self,
        operation: &'static str,
        verb: Verb<'_>,
        local: &str,
        path: &str,
    ) -> Result<Answer> {
        let path = format!("/persistent/{}/{local}{path}", self.space);
        self.ask(operation, verb, &path).await.map_err(|error| error.with("topic", local))
    }

    /// How many partitions a topic has; `None` when it does not exist.
    pub(crate) async fn partitions(&self, operation: &'static str, local: &str) -> Result<Option<u32>> {
        let answer = self.topic(operation, Verb::Get, local, "/partitions").await?;
        if answer.status == 404 {
            return Ok(None);
        }
        let found: Value = answer.read(operation)?;
        Ok(Some(found["partitions"].as_u64().and_then(|count| u32::try_from(count).ok()).unwrap_or(0)))
    }

    /// The subscriptions of a topic; `None` when it does not exist.
    pub(crate) async fn subscriptions(&self, operation: &'static str, local: &str) -> Result<Option<Vec<String>>> {
        let answer = self.topic(operation, Verb::Get, local, "/subscriptions").await?;
        if answer.status == 404 { Ok(None) } else { answer.read(operation).map(Some) }
    }

    /// Deletes; false when it is gone already.
    pub(crate) async fn delete(&self, operation: &'static str, local: &str, path: &str) -> Result<bool> {
        let answer = self.topic(operation, Verb::Delete, local, &format!("{path}?force=true")).await?;
        if answer.status == 404 { Ok(false) } else { answer.done(operation).map(|()| true) }
    }
}

impl Answer {
    /// The answer's content.
    pub(crate) fn read<T: DeserializeOwned>(&self, operation: &'static str) -> Result<T> {
        self.done(operation)?;
        serde_json::from_slice(&self.body).map_err(|error| {
            Error::new(ErrorKind::Unexpected, operation, format!("an admin answer that cannot be read: {error}"))
        })
    }

    /// As text, such as a version.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim().trim_matches('"').to_owned()
    }

    /// Of a role that is known and may not do it: 403 or 401, with a reason (PulsarWebResource.java). Whoever is not known is refused
    /// before that, with a page of the web server.
    fn is_unknown_who_asks(&self) -> bool {
        self.status == 401 && self.reason().is_none()
    }

    fn reason(&self) -> Option<String> {
        let body = serde_json::from_slice::<Value>(&self.body).ok()?;
        body["reason"].as_str().map(str::to_owned)
    }

    /// An error unless the request succeeded.
    pub(crate) fn done(&self, operation: &'static str) -> Result<()> {
        if (200..=299).contains(&self.status) {
            return Ok(());
        }
        let kind = match self.status {
            401 if self.is_unknown_who_asks() => ErrorKind::Unauthenticated,
            401 | 403 => ErrorKind::PermissionDenied,
            404 => ErrorKind::NotFound,
            409 => ErrorKind::AlreadyExists,
            429 => ErrorKind::RateLimited,
            408 | 500..=599 => ErrorKind::Unavailable,
            _ => ErrorKind::Unexpected,
        };
        let reason = self.reason().unwrap_or_default();
        let reason = reason.lines().next().unwrap_or_default();
        let effect = if self.status >= 500 { Effect::Unknown } else { Effect::NotDone };
        let text = format!("the admin endpoint answers {}: {reason}", self.status);
        let error = Error::new(kind, operation, text).with_effect(effect);
        let is_passing = self.may_pass && kind == ErrorKind::Unauthenticated;
        Err(if is_passing { error.with_retry(Retry::Later(None)) } else { error })
    }
}

fn caused_by_certificate(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && crate::wire::is_untrusted(io)
        {
            return true;
        }
        next = error.source();
    }
    false
}
