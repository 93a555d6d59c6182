//! NATS' bare client: `async-nats`.

use std::time::Duration;

use anybroker_conformance::{Carries, NativeChannel, Place, RawMessage};
use async_nats::jetstream::{self, Context};
use async_nats::{ConnectOptions, Error, HeaderMap};
use async_trait::async_trait;
use tokio::time::Instant;

use crate::access::Access;

const CONTENT_TYPE: &str = "content-type";
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Native {
    hosts: Vec<String>,
    user: Option<(String, String)>,
    token: Option<String>,
}

impl Native {
    pub(crate) fn new(access: &Access) -> Result<Self, String> {
        access.without(&["tls", "tls_ca", "tls_certificate", "nkey", "credentials"])?;
        let hosts = access.hosts().iter().map(|host| format!("nats://{host}")).collect();
        let user = access.user().map(|(name, password)| (name.to_owned(), password.to_owned()));
        Ok(Self { hosts, user, token: access.setting("token").map(str::to_owned) })
    }

    async fn context(&self) -> Result<Context, Error> {
        let mut options = ConnectOptions::new();
        if let Some((name, password)) = self.user.clone() {
            options = options.user_and_password(name, password);
        }
        if let Some(token) = self.token.clone() {
            options = options.token(token);
        }
        Ok(jetstream::new(options.connect(&self.hosts).await?))
    }

    async fn try_put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), Error> {
        let context = self.context().await?;
        let stream = context.get_stream(&place.destination).await?;
        // A stream takes all subjects below the destination's; `m` is where messages of others go.
        let subject =
            stream.cached_info().config.subjects.first().ok_or("a stream that takes no subject")?.replace('>', "m");
        let mut acks = Vec::new();
        for message in messages {
            let mut headers = HeaderMap::new();
            for (name, value) in &message.headers {
                headers.append(name.as_str(), std::str::from_utf8(value)?);
            }
            if let Some(content_type) = &message.content_type {
                headers.insert(CONTENT_TYPE, content_type.as_str());
            }
            let payload = message.payload.clone().unwrap_or_default().into();
            acks.push(context.publish_with_headers(subject.clone(), headers, payload).await?);
        }
        for ack in acks {
            ack.await?;
        }
        Ok(())
    }

    async fn try_take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, Error> {
        let context = self.context().await?;
        let mut stream = context.get_stream(&place.destination).await?;
        let deadline = Instant::now() + PATIENCE;
        while (stream.info().await?.state.messages as usize) < count && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let state = stream.cached_info().state.clone();
        let mut taken = Vec::new();
        for sequence in state.first_sequence..=state.last_sequence {
            let message = stream.get_raw_message(sequence).await?;
            let mut raw = RawMessage::of(message.payload.to_vec());
            for (name, values) in message.headers.iter() {
                for value in values {
                    match name.as_ref() {
                        CONTENT_TYPE => raw.content_type = Some(value.as_str().to_owned()),
                        name => raw.headers.push((name.to_owned(), value.as_str().as_bytes().to_vec())),
                    }
                }
            }
            taken.push(raw);
        }
        Ok(taken)
    }
}

#[async_trait]
impl NativeChannel for Native {
    fn carries(&self) -> Carries {
        Carries { any_bytes: true, empty: true, null: false, keys: false, content_type: true, any_header: false }
    }

    async fn put(&self, place: &Place, messages: &[RawMessage]) -> Result<(), String> {
        self.try_put(place, messages).await.map_err(|error| error.to_string())
    }

    async fn take(&self, place: &Place, count: usize) -> Result<Vec<RawMessage>, String> {
        self.try_take(place, count).await.map_err(|error| error.to_string())
    }
}
