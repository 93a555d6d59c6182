//! The JetStream API: requests in JSON, as the server's `JetStream wire API` reference has them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Result};
use async_nats::Client;
use async_nats::client::RequestErrorKind;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use parking_lot::Mutex;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::authentication::Authentication;
use crate::denials::Denials;
use crate::error::{ApiError, CONSUMER_NOT_FOUND, NO_MESSAGE_FOUND, STREAM_NOT_FOUND, unanswered};
use crate::link::Link;

/// How long one request may take.
const REQUEST: Duration = Duration::from_secs(10);
/// So many that did not say how they are are asked one by one.
const UNHEARD: usize = 16;
/// How soon all servers of a cluster have heard of a stream.
const HEARD_OF: Duration = Duration::from_secs(2);
/// How long a JetStream that nobody serves yet is waited for: a restarted server recovers its streams first.
const SECOND_LOOK: Duration = Duration::from_secs(5);

/// A stream as the server has it.
#[derive(Debug, Deserialize)]
pub(crate) struct StreamInfo {
    pub(crate) config: Value,
    pub(crate) state: StreamState,
}

#[derive(Debug, Deserialize)]
pub(crate) struct StreamState {
    #[serde(default)]
    pub(crate) messages: u64,
    #[serde(default)]
    pub(crate) bytes: u64,
    /// Subjects with how many messages they have, where they were asked for.
    #[serde(default)]
    pub(crate) subjects: Option<HashMap<String, u64>>,
}

/// A consumer as the server has it.
#[derive(Debug, Deserialize)]
pub(crate) struct ConsumerInfo {
    pub(crate) name: String,
    pub(crate) config: Value,
    pub(crate) ack_floor: Place,
    pub(crate) delivered: Place,
    #[serde(default)]
    pub(crate) num_ack_pending: u64,
    #[serde(default)]
    pub(crate) num_pending: u64,
}

impl ConsumerInfo {
    pub(crate) fn ack_wait(&self) -> Duration {
        Duration::from_nanos(self.config["ack_wait"].as_u64().unwrap_or(30_000_000_000))
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct Place {
    pub(crate) consumer_seq: u64,
    pub(crate) stream_seq: u64,
}

/// A stored message, as `STREAM.MSG.GET` tells it.
#[derive(Debug, Deserialize)]
pub(crate) struct StoredMessage {
    pub(crate) seq: u64,
    #[serde(default)]
    pub(crate) data: String,
    pub(crate) time: String,
}

impl StoredMessage {
    pub(crate) fn payload(&self) -> Vec<u8> {
        STANDARD.decode(&self.data).unwrap_or_default()
    }
}

#[derive(Deserialize)]
struct GotMessage {
    message: StoredMessage,
}

#[derive(Deserialize)]
struct Page<T> {
    total: usize,
    /// `null` where there are none.
    #[serde(alias = "consumers", default = "none")]
    streams: Option<Vec<T>>,
    /// Of a cluster: those that did not say in time how they are.
    #[serde(default)]
    missing: Option<Vec<String>>,
}

fn none<T>() -> Option<Vec<T>> {
    None
}

/// Asks the server.
#[derive(Clone)]
pub(crate) struct Api {
    client: Client,
    denials: Arc<Denials>,
    authentication: Arc<Authentication>,
    /// Streams that this client has made, and when.
    made: Arc<Mutex<HashMap<String, Instant>>>,
}

impl Api {
    pub(crate) fn new(link: &Link) -> Self {
        let (denials, authentication) = (Arc::clone(&link.denials), Arc::clone(&link.authentication));
        Self { client: link.client.clone(), denials, authentication, made: Arc::default() }
    }

    /// Waits while the server refuses the credentials; the reason at the deadline.
    pub(crate) async fn passed(&self, deadline: Instant) -> Result<()> {
        self.authentication.passed(deadline).await
    }

    /// One request; the answer may be the server's own refusal.
    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        subject: &str,
        body: &Value,
    ) -> Result<std::result::Result<T, ApiError>> {
        let subject = format!("$JS.API.{subject}");
        let payload = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let patience = Instant::now() + SECOND_LOOK;
        self.passed(Instant::now() + REQUEST).await?;
        #[derive(Deserialize)]
        struct Refusal {
            error: Option<ApiError>,
        }
        let unreadable = |error: serde_json::Error| {
            Error::new(ErrorKind::Unexpected, operation, format!("an answer that cannot be read: {error}"))
        };
        let answer = loop {
            let request = async_nats::Request::new().payload(payload.clone().into()).timeout(Some(REQUEST));
            let begun = Instant::now();
            let answer = tokio::select! {
                answer = self.client.send_request(subject.clone(), request) => answer,
                // Nothing else would come.
                denied = self.denials.of(operation, &subject, begun) => return Err(denied),
            };
            match answer {
                Ok(answer) => {
                    let refusal: Refusal = serde_json::from_slice(&answer.payload).map_err(unreadable)?;
                    match refusal.error {
                        None => break answer,
                        Some(error) if error.is(STREAM_NOT_FOUND) && self.was_just_made(&subject) => {
                            tokio::time::sleep(Duration::from_millis(50)).await;
                        }
                        Some(error) => return Ok(Err(error)),
                    }
                }
                Err(error) if error.kind() == RequestErrorKind::NoResponders && Instant::now() < patience => {
                    // There is no event for "JetStream serves again".
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(unanswered(operation, &error)),
            }
        };
        if let Some(name) = subject.strip_prefix("$JS.API.STREAM.CREATE.") {
            self.made.lock().insert(name.to_owned(), Instant::now());
        } else if let Some(name) = subject.strip_prefix("$JS.API.STREAM.DELETE.") {
            self.made.lock().remove(name);
        }
        serde_json::from_slice(&answer.payload).map(Ok).map_err(unreadable)
    }

    pub(crate) fn is_in_a_cluster(&self) -> bool {
        self.client.server_info().cluster.is_some()
    }

    /// Whether a request is about a stream that was made a moment ago: another server of a cluster than the one that said so may not
    /// have heard of it yet. Found by the suite on three servers.
    fn was_just_made(&self, subject: &str) -> bool {
        let mut made = self.made.lock();
        made.retain(|_, at| at.elapsed() < HEARD_OF);
        !made.is_empty() && self.is_in_a_cluster() && subject.split('.').any(|token| made.contains_key(token))
    }

    /// One request whose refusal is an error.
    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        subject: &str,
        body: &Value,
    ) -> Result<T> {
        self.ask(operation, subject, body).await?.map_err(|error| error.into_error(operation))
    }

    /// The stream, where it exists.
    pub(crate) async fn stream(&self, operation: &'static str, name: &str) -> Result<Option<StreamInfo>> {
        match self.ask(operation, &format!("STREAM.INFO.{name}"), &Value::Null).await? {
            Ok(info) => Ok(Some(info)),
            Err(error) if error.is(STREAM_NOT_FOUND) => Ok(None),
            Err(error) => Err(error.into_error(operation)),
        }
    }

    /// The consumer, where stream and consumer exist.
    pub(crate) async fn consumer(
        &self,
        operation: &'static str,
        stream: &str,
        name: &str,
    ) -> Result<Option<ConsumerInfo>> {
        match self.ask(operation, &format!("CONSUMER.INFO.{stream}.{name}"), &Value::Null).await? {
            Ok(info) => Ok(Some(info)),
            Err(error) if error.is(STREAM_NOT_FOUND) || error.is(CONSUMER_NOT_FOUND) => Ok(None),
            Err(error) => Err(error.into_error(operation)),
        }
    }

    /// All consumers of a stream.
    pub(crate) async fn consumers(&self, operation: &'static str, stream: &str) -> Result<Vec<ConsumerInfo>> {
        let mut unheard = Vec::new();
        let mut found: Vec<ConsumerInfo> =
            self.pages_and_missing(operation, &format!("CONSUMER.LIST.{stream}"), &json!({}), &mut unheard).await?;
        for name in unheard.into_iter().take(UNHEARD) {
            if found.iter().all(|consumer| consumer.name != name) {
                // Where it cannot be asked either, it is left out, as the server has done.
                found.extend(self.consumer(operation, stream, &name).await.ok().flatten());
            }
        }
        Ok(found)
    }

    /// The streams that hold any of these subjects.
    pub(crate) async fn streams_of(&self, operation: &'static str, subjects: &str) -> Result<Vec<String>> {
        self.pages(operation, "STREAM.NAMES", &json!({ "subject": subjects })).await
    }

    async fn pages<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        subject: &str,
        filter: &Value,
    ) -> Result<Vec<T>> {
        self.pages_and_missing(operation, subject, filter, &mut Vec::new()).await
    }

    async fn pages_and_missing<T: DeserializeOwned>(
        &self,
        operation: &'static str,
        subject: &str,
        filter: &Value,
        missing: &mut Vec<String>,
    ) -> Result<Vec<T>> {
        let mut found: Vec<T> = Vec::new();
        loop {
            let mut body = filter.clone();
            body["offset"] = json!(found.len());
            let page: Page<Option<T>> = match self.ask(operation, subject, &body).await? {
                Ok(page) => page,
                Err(error) => return Err(error.into_error(operation)),
            };
            let before = found.len();
            found.extend(page.streams.into_iter().flatten().flatten());
            missing.extend(page.missing.into_iter().flatten());
            if found.len() + missing.len() >= page.total || found.len() == before {
                return Ok(found);
            }
        }
    }

    /// The subjects of a stream below `filter`.
    pub(crate) async fn subjects(&self, operation: &'static str, stream: &str, filter: &str) -> Result<Vec<String>> {
        let mut found = Vec::new();
        loop {
            let body = json!({ "subjects_filter": filter, "offset": found.len() });
            let info: StreamInfo = self.call(operation, &format!("STREAM.INFO.{stream}"), &body).await?;
            let page = info.state.subjects.unwrap_or_default();
            let is_last = page.is_empty();
            found.extend(page.into_keys());
            // The server tells up to 100,000 at once; a page that brings none ends it.
            if is_last || found.len() % 100_000 != 0 {
                return Ok(found);
            }
        }
    }

    /// One stored message by a query such as `{"seq": 7}` or `{"last_by_subj": "a.b"}`, read from the stream's leader:
    /// other replicas may lag behind what was confirmed.
    pub(crate) async fn message(
        &self,
        operation: &'static str,
        stream: &str,
        query: &Value,
    ) -> Result<Option<StoredMessage>> {
        match self.ask::<GotMessage>(operation, &format!("STREAM.MSG.GET.{stream}"), query).await? {
            Ok(got) => Ok(Some(got.message)),
            Err(error) if error.is(NO_MESSAGE_FOUND) => Ok(None),
            Err(error) => Err(error.into_error(operation)),
        }
    }

    /// Deletes a stored message; false when it is not there.
    pub(crate) async fn delete_message(&self, operation: &'static str, stream: &str, sequence: u64) -> Result<bool> {
        let body = json!({ "seq": sequence, "no_erase": true });
        match self.ask::<Value>(operation, &format!("STREAM.MSG.DELETE.{stream}"), &body).await? {
            Ok(_) => Ok(true),
            // A delete that fails has a code of its own (10057) and the words of the store: "no message found" (nats-server,
            // store.go, `ErrStoreMsgNotFound`).
            Err(error)
                if error.is(NO_MESSAGE_FOUND)
                    || ["no message found", "not found"].iter().any(|told| error.description.contains(told)) =>
            {
                Ok(false)
            }
            Err(error) => Err(error.into_error(operation)),
        }
    }
}
