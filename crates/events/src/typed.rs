//! Events whose data has a type.

use anybroker_core::{Destination, Message, MessageId, Result, Timestamp};
use cloudevents::event::{AttributesReader, Data, EventBuilder};
use cloudevents::{Event, EventBuilderV10};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::json::{refuse, shape};
use crate::{Metadata, Mode, from_message, to_message};

/// An event with typed data, as JSON in a CloudEvents envelope.
///
/// The subject names the aggregate, and by default it is the partition key too.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TypedEvent<T> {
    /// Its identity, and the message's.
    pub id: MessageId,
    /// Who says so: a URI reference such as `/shop`.
    pub source: String,
    /// What happened: see [`check_event_type`](crate::check_event_type).
    pub event_type: String,
    /// The aggregate it happened to.
    pub subject: Option<String>,
    /// When it happened.
    pub time: Timestamp,
    /// The partition key, where it is not the subject.
    pub partition_key: Option<String>,
    /// What travels with it.
    pub metadata: Metadata,
    /// What there is to say about it.
    pub data: T,
}

impl<T> TypedEvent<T> {
    /// An event with a new UUIDv7 id and the present time.
    pub fn new(source: impl Into<String>, event_type: impl Into<String>, data: T) -> Self {
        Self {
            id: MessageId::new(),
            source: source.into(),
            event_type: event_type.into(),
            subject: None,
            time: Timestamp::now(),
            partition_key: None,
            metadata: Metadata::default(),
            data,
        }
    }

    /// Replaces the id.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<MessageId>) -> Self {
        self.id = id.into();
        self
    }

    /// Names the aggregate.
    #[must_use]
    pub fn with_subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// Replaces the time.
    #[must_use]
    pub fn with_time(mut self, time: Timestamp) -> Self {
        self.time = time;
        self
    }

    /// Sets a partition key other than the subject.
    #[must_use]
    pub fn with_partition_key(mut self, key: impl Into<String>) -> Self {
        self.partition_key = Some(key.into());
        self
    }

    /// Says on whose behalf.
    #[must_use]
    pub fn with_user_id(mut self, user: impl Into<String>) -> Self {
        self.metadata.user_id = Some(user.into());
        self
    }

    /// Names the version of the data's shape.
    #[must_use]
    pub fn with_schema_version(mut self, version: impl Into<String>) -> Self {
        self.metadata.schema_version = Some(version.into());
        self
    }

    /// Marks it as caused by the message `parent`: see [`Metadata::caused_by`].
    #[must_use]
    pub fn caused_by(mut self, parent: &Message) -> Self {
        self.metadata = self.metadata.caused_by(parent);
        self
    }
}

impl<T: Serialize> TypedEvent<T> {
    /// The event in its envelope.
    ///
    /// # Errors
    /// [`InvalidMessage`](anybroker_core::ErrorKind::InvalidMessage) when the data has no JSON form, or the time no
    /// RFC 3339 one.
    pub fn to_event(&self) -> Result<Event> {
        let data = serde_json::to_value(&self.data)
            .map_err(|error| refuse("write event", format!("the data has no JSON form: {error}")).with_source(error))?;
        let mut builder = EventBuilderV10::new()
            .id(self.id.to_string())
            .source(&self.source)
            .ty(&self.event_type)
            .time(self.time.to_string());
        if let Some(subject) = &self.subject {
            builder = builder.subject(subject);
        }
        if let Some(key) = &self.partition_key {
            builder = builder.extension(crate::metadata::PARTITION_KEY, key.as_str());
        }
        // `()` is an event without data.
        if data != Value::Null {
            builder = builder.data("application/json", data);
        }
        let mut event = builder.build().map_err(|error| refuse("write event", error.to_string()).with_source(error))?;
        self.metadata.write_to(&mut event);
        Ok(event)
    }

    /// The event as a message for `destination`.
    ///
    /// # Errors
    /// As [`to_event`](Self::to_event) and [`to_message`].
    pub fn to_message(&self, destination: impl Into<Destination>, mode: Mode) -> Result<Message> {
        to_message(&self.to_event()?, destination, mode)
    }
}

impl<T: DeserializeOwned> TypedEvent<T> {
    /// The event in a message. One without a time of its own has the message's.
    ///
    /// # Errors
    /// As [`from_message`]; and the same for data that is not JSON or has another shape.
    pub fn from_message(message: &Message) -> Result<Self> {
        Self::read(from_message(message)?, message.timestamp())
            .map_err(|error| error.with("destination", message.destination()))
    }

    /// An event with its data as a value of that type: for receivers that look at the event's type first. One without
    /// a time of its own has the present time.
    ///
    /// # Errors
    /// [`InvalidMessage`](anybroker_core::ErrorKind::InvalidMessage), with `error_type`
    /// [`SCHEMA_MISMATCH`](crate::SCHEMA_MISMATCH), for data that is not JSON or has another shape.
    pub fn from_event(event: Event) -> Result<Self> {
        Self::read(event, Timestamp::now())
    }

    fn read(mut event: Event, otherwise: Timestamp) -> Result<Self> {
        let (_, _, data) = event.take_data();
        let data = match data {
            None => serde_json::from_value(Value::Null),
            Some(Data::Json(value)) => serde_json::from_value(value),
            Some(Data::String(text)) => serde_json::from_str(&text),
            Some(Data::Binary(bytes)) => serde_json::from_slice(&bytes),
        };
        let data = data.map_err(|error| {
            let problem = format!("the data of {} does not fit: {}", event.ty(), shape(&error));
            refuse("read event", problem).with("id", event.id())
        })?;
        let time = event.time().map(|time| Timestamp::from_millis(time.timestamp_millis()));
        Ok(Self {
            id: MessageId::from(event.id()),
            source: event.source().clone(),
            event_type: event.ty().to_owned(),
            subject: event.subject().map(ToOwned::to_owned),
            time: time.unwrap_or(otherwise),
            partition_key: event.extension(crate::metadata::PARTITION_KEY).map(ToString::to_string),
            metadata: Metadata::of(&event),
            data,
        })
    }
}
