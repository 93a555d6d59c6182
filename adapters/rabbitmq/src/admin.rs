//! The management plugin's HTTP interface: what AMQP 0-9-1 cannot tell.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bytes, Effect, Error, ErrorKind, Login, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::AUTHORIZATION;
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::config::Settings;
use crate::credentials::{refused, unprovided, user_and_password};
use crate::error::is_about_trust;

const REQUEST: Duration = Duration::from_secs(10);
/// An answer is not larger; the longest is a list of bindings.
const LONGEST_ANSWER: usize = 64 * 1_048_576;
const PAGE: usize = 500;
/// What the plugin says to a user without one of its tags.
const NO_TAG: &[u8] = b"Not management user";

pub(crate) struct Admin {
    address: String,
    vhost: String,
    login: Login,
    client: Client<HttpsConnector<HttpConnector>, Empty<Bytes>>,
}

/// A binding of an exchange.
#[derive(Debug, Deserialize)]
pub(crate) struct Binding {
    pub(crate) destination: String,
    pub(crate) destination_type: String,
    #[serde(default)]
    pub(crate) arguments: serde_json::Value,
}

/// What the plugin knows of a queue; figures are missing until its first statistics.
#[derive(Debug, Deserialize)]
pub(crate) struct QueueFigures {
    pub(crate) name: String,
    pub(crate) messages_unacknowledged: Option<u64>,
}

#[derive(Deserialize)]
struct Page<T> {
    items: Vec<T>,
    page_count: usize,
}

#[derive(Deserialize)]
struct Exchange {
    name: String,
}

#[derive(Deserialize)]
struct Overview {
    rabbitmq_version: String,
}

impl Admin {
    /// `None` where no address is configured.
    pub(crate) fn new(settings: &Arc<Settings>) -> Result<Option<Self>> {
        let Some(address) = settings.admin.clone() else { return Ok(None) };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new().with_tls_config(settings.admin_tls()?);
        let connector = connector.https_or_http().enable_http1().wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Some(Self { address, vhost: escaped(&settings.vhost), login: settings.login.clone(), client }))
    }

    /// The server's version.
    pub(crate) async fn version(&self) -> Result<String> {
        Ok(self.found::<Overview>("connect", "/api/overview").await?.rabbitmq_version)
    }

    /// What is bound to an exchange; `None` where there is no such exchange.
    pub(crate) async fn bindings(&self, operation: &'static str, exchange: &str) -> Result<Option<Vec<Binding>>> {
        let path = format!("/api/exchanges/{}/{}/bindings/source", self.vhost, escaped(exchange));
        self.ask(operation, &path).await
    }

    /// The figures of one queue; `None` where there is no such queue.
    pub(crate) async fn queue(&self, operation: &'static str, queue: &str) -> Result<Option<QueueFigures>> {
        let columns = "name,messages_unacknowledged";
        let path = format!("/api/queues/{}/{}?columns={columns}", self.vhost, escaped(queue));
        self.ask(operation, &path).await
    }

    /// The queues whose names begin like that.
    pub(crate) async fn queues(&self, operation: &'static str, start: &str) -> Result<Vec<QueueFigures>> {
        let columns = "name,messages_unacknowledged";
        let mut found: Vec<QueueFigures> = self.pages(operation, "queues", start, columns).await?;
        found.retain(|queue| queue.name.starts_with(start));
        Ok(found)
    }

    /// The exchanges whose names begin like that.
    pub(crate) async fn exchanges(&self, operation: &'static str, start: &str) -> Result<Vec<String>> {
        let found: Vec<Exchange> = self.pages(operation, "exchanges", start, "name").await?;
        Ok(found.into_iter().map(|exchange| exchange.name).filter(|name| name.starts_with(start)).collect())
    }

    async fn pages<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        of: &str,
        start: &str,
        columns: &str,
    ) -> Result<Vec<T>> {
        let mut found = Vec::new();
        // Of a name only `.` means something in a regular expression.
        let pattern = escaped(&format!("^{}", start.replace('.', "\\.")));
        for page in 1.. {
            let path = format!(
                "/api/{of}/{}?page={page}&page_size={PAGE}&name={pattern}&use_regex=true&columns={columns}",
                self.vhost
            );
            let answer: Page<T> = self.found(operation, &path).await?;
            found.extend(answer.items);
            if page >= answer.page_count {
                break;
            }
        }
        Ok(found)
    }

    async fn found<T: DeserializeOwned>(&self, operation: &'static str, path: &str) -> Result<T> {
        let missing = || self.error(ErrorKind::NotFound, operation, "the management plugin has no such resource");
        self.ask(operation, path).await?.ok_or_else(missing)
    }

    /// What is refused is asked once more, where the provider of the credentials may say something else by now.
    async fn ask<T: DeserializeOwned>(&self, operation: &'static str, path: &str) -> Result<Option<T>> {
        match self.ask_once(operation, path).await {
            Err(error) if error.kind() == ErrorKind::Unauthenticated && self.login.may_change() => {
                self.login.refused();
                self.ask_once(operation, path).await.map_err(|error| refused(&self.login, operation, error))
            }
            answer => answer,
        }
    }

    async fn authorization(&self, operation: &'static str) -> Result<HeaderValue> {
        let credentials = self.login.recent().await?;
        let (user, password) = user_and_password(&credentials).map_err(|error| unprovided(operation, error))?;
        let credentials = STANDARD.encode(format!("{user}:{}", password.reveal()));
        let mut value = HeaderValue::from_str(&format!("Basic {credentials}")).expect("base64 is a header value");
        value.set_sensitive(true);
        Ok(value)
    }

    async fn ask_once<T: DeserializeOwned>(&self, operation: &'static str, path: &str) -> Result<Option<T>> {
        let request = Request::get(format!("{}{path}", self.address))
            .header(AUTHORIZATION, self.authorization(operation).await?)
            .body(Empty::new())
            .map_err(|_| self.error(ErrorKind::ConfigInvalid, operation, "the setting `admin` is no address"))?;
        let asking = async {
            let response = self.client.request(request).await.map_err(|error| self.unreached(operation, &error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect().await.map_err(|error| {
                self.error(
                    ErrorKind::Unavailable,
                    operation,
                    format!("the management plugin's answer broke off: {error}"),
                )
            })?;
            Ok::<_, Error>((status, body.to_bytes()))
        };
        let (status, body) = match tokio::time::timeout(REQUEST, asking).await {
            Ok(answer) => answer?,
            Err(_) => return Err(self.error(ErrorKind::Timeout, operation, "the management plugin does not answer")),
        };
        let kind = match status {
            StatusCode::NOT_FOUND => return Ok(None),
            // Known, and without the tag (`rabbit_web_dispatch_access_control` of 4.0.5).
            StatusCode::UNAUTHORIZED if body.windows(NO_TAG.len()).any(|text| text == NO_TAG) => {
                ErrorKind::PermissionDenied
            }
            StatusCode::UNAUTHORIZED => ErrorKind::Unauthenticated,
            StatusCode::FORBIDDEN => ErrorKind::PermissionDenied,
            status if status.is_success() => {
                return serde_json::from_slice(&body).map(Some).map_err(|error| {
                    self.error(ErrorKind::Unexpected, operation, format!("the management plugin's answer: {error}"))
                });
            }
            status if status.is_server_error() => ErrorKind::Unavailable,
            _ => ErrorKind::Unexpected,
        };
        Err(self.error(kind, operation, format!("the management plugin answers {status}")))
    }

    fn unreached(&self, operation: &'static str, error: &hyper_util::client::legacy::Error) -> Error {
        let mut cause: Option<&dyn std::error::Error> = Some(error);
        let mut texts = Vec::new();
        while let Some(this) = cause {
            texts.push(this.to_string());
            cause = this.source();
        }
        let text = format!("the management plugin cannot be reached: {}", texts.join(": "));
        let kind = if is_about_trust(&text) { ErrorKind::Unauthenticated } else { ErrorKind::Unavailable };
        self.error(kind, operation, text)
    }

    fn error(&self, kind: ErrorKind, operation: &'static str, text: impl Into<String>) -> Error {
        Error::new(kind, operation, text.into()).with("admin", &self.address).with_effect(Effect::NotDone)
    }
}

/// Percent-encoded, so that it is one part of a path or a query.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}
