//! Messages, their ids and destinations.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use uuid::Uuid;

use crate::{Headers, Timestamp};

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(ByteString);

        impl $name {
            /// A name that is part of the program text; does not allocate.
            #[must_use]
            pub const fn from_static(name: &'static str) -> Self {
                Self(ByteString::from_static(name))
            }

            /// The name.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Deref for $name {
            type Target = str;
            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(name: &str) -> Self {
                Self(ByteString::from(name))
            }
        }

        impl From<String> for $name {
            fn from(name: String) -> Self {
                Self(ByteString::from(name))
            }
        }

        impl From<&$name> for $name {
            fn from(name: &$name) -> Self {
                name.clone()
            }
        }

        impl PartialEq<str> for $name {
            fn eq(&self, other: &str) -> bool {
                self.as_str() == other
            }
        }

        impl PartialEq<&str> for $name {
            fn eq(&self, other: &&str) -> bool {
                self.as_str() == *other
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self.as_str(), f)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer).map(Self::from)
            }
        }
    };
}

name_type! {
    /// The logical name of a destination (topic, queue, subject, stream). It may hold dots; adapters map it
    /// injectively to what the broker allows. Cheap to clone.
    Destination
}

name_type! {
    /// The logical name of a group (consumer group, durable, subscription): its members share the messages of a
    /// destination, other groups each see all of them. Cheap to clone.
    Group
}

/// The identity of a message: a UUIDv7 by default, any non-empty text of the sender's otherwise.
///
/// It is kept by retry and redrive, and mapped to the broker's native id where there is one. A text that is a
/// UUID in canonical form (lower case, with hyphens) is kept in 16 bytes; the text form is always the one given.
///
/// ```
/// use anybroker_core::MessageId;
/// let id = MessageId::from("order-17");
/// assert_eq!(id.to_string(), "order-17");
/// assert_ne!(MessageId::new(), MessageId::new());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId(Id);

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Id {
    Uuid(Uuid),
    Text(ByteString),
}

impl MessageId {
    /// A new UUIDv7.
    #[allow(clippy::new_without_default, reason = "two defaults would differ")]
    #[must_use]
    pub fn new() -> Self {
        Self(Id::Uuid(Uuid::now_v7()))
    }

    /// The UUID, where the id is one in canonical form.
    #[must_use]
    pub fn as_uuid(&self) -> Option<Uuid> {
        match &self.0 {
            Id::Uuid(uuid) => Some(*uuid),
            Id::Text(_) => None,
        }
    }

    /// Whether the text is empty, which no endpoint accepts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(&self.0, Id::Text(text) if text.is_empty())
    }

    /// Calls `read` with the text form, without allocating.
    pub fn with_str<R>(&self, read: impl FnOnce(&str) -> R) -> R {
        match &self.0 {
            Id::Uuid(uuid) => read(uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer())),
            Id::Text(text) => read(text),
        }
    }
}

impl From<Uuid> for MessageId {
    fn from(uuid: Uuid) -> Self {
        Self(Id::Uuid(uuid))
    }
}

impl From<ByteString> for MessageId {
    fn from(text: ByteString) -> Self {
        match canonical(&text) {
            Some(uuid) => Self(Id::Uuid(uuid)),
            None => Self(Id::Text(text)),
        }
    }
}

impl From<&str> for MessageId {
    fn from(text: &str) -> Self {
        match canonical(text) {
            Some(uuid) => Self(Id::Uuid(uuid)),
            None => Self(Id::Text(text.into())),
        }
    }
}

impl From<String> for MessageId {
    fn from(text: String) -> Self {
        ByteString::from(text).into()
    }
}

fn canonical(text: &str) -> Option<Uuid> {
    if text.len() != 36 || text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return None;
    }
    Uuid::try_parse(text).ok()
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_str(|text| f.pad(text))
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_str(|text| fmt::Debug::fmt(text, f))
    }
}

impl serde::Serialize for MessageId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.with_str(|text| serializer.serialize_str(text))
    }
}

impl<'de> serde::Deserialize<'de> for MessageId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

/// What is sent and received. Everything round-trips byte for byte on every broker, or publishing it answers
/// [`InvalidMessage`](crate::ErrorKind::InvalidMessage).
///
/// ```
/// use anybroker_core::Message;
/// let message = Message::new("orders", r#"{"total": 12}"#)
///     .with_key("order-17")
///     .with_header("tenant", "acme")
///     .with_content_type("application/json");
/// assert_eq!(message.destination(), "orders");
/// assert_eq!(message.key(), Some(&b"order-17"[..]));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub(crate) destination: Destination,
    pub(crate) id: MessageId,
    pub(crate) key: Option<Bytes>,
    pub(crate) headers: Headers,
    pub(crate) content_type: Option<ByteString>,
    pub(crate) timestamp: Timestamp,
    pub(crate) payload: Option<Bytes>,
    pub(crate) delay: Option<Duration>,
    pub(crate) ttl: Option<Duration>,
}

impl Message {
    /// A message with a new UUIDv7 id and the present time.
    pub fn new(destination: impl Into<Destination>, payload: impl Into<Bytes>) -> Self {
        Self::build(destination.into(), Some(payload.into()), MessageId::new(), Timestamp::now())
    }

    /// A tombstone: "this key is no more". It differs from an empty payload and is refused where the broker
    /// has none.
    pub fn tombstone(destination: impl Into<Destination>, key: impl Into<Bytes>) -> Self {
        Self::build(destination.into(), None, MessageId::new(), Timestamp::now()).with_key(key)
    }

    /// A message out of its stored parts. For adapters, which set what they read.
    #[must_use]
    pub fn from_parts(destination: Destination, id: MessageId, timestamp: Timestamp, payload: Option<Bytes>) -> Self {
        Self::build(destination, payload, id, timestamp)
    }

    fn build(destination: Destination, payload: Option<Bytes>, id: MessageId, timestamp: Timestamp) -> Self {
        let (headers, key, content_type, delay, ttl) = Default::default();
        Self { destination, id, key, headers, content_type, timestamp, payload, delay, ttl }
    }

    /// Replaces the id.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<MessageId>) -> Self {
        self.id = id.into();
        self
    }

    /// Sets the key, by which order is kept and messages are spread.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds a header behind those that are there.
    #[must_use]
    pub fn with_header(mut self, name: impl AsRef<str>, value: impl AsRef<[u8]>) -> Self {
        self.headers.append(name, value);
        self
    }

    /// Replaces all headers.
    #[must_use]
    pub fn with_headers(mut self, headers: Headers) -> Self {
        self.headers = headers;
        self
    }

    /// Sets the media type of the payload, such as `application/json`.
    #[must_use]
    pub fn with_content_type(mut self, content_type: impl Into<ByteString>) -> Self {
        self.content_type = Some(content_type.into());
        self
    }

    /// Replaces the timestamp.
    #[must_use]
    pub fn with_timestamp(mut self, timestamp: Timestamp) -> Self {
        self.timestamp = timestamp;
        self
    }

    /// Replaces the destination.
    #[must_use]
    pub fn with_destination(mut self, destination: impl Into<Destination>) -> Self {
        self.destination = destination.into();
        self
    }

    /// Asks the broker to hold the message back for that long. An instruction of this publish: a received
    /// message has none. Refused where [`delayed_publish`](crate::Capabilities::delayed_publish) is.
    #[must_use]
    pub fn with_delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// Asks the broker to dead-letter the message as `expired` when a group has not settled it within that
    /// time. An instruction of this publish. Refused where [`ttl`](crate::Capabilities::ttl) is.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Where it goes, or came from.
    #[must_use]
    pub fn destination(&self) -> &Destination {
        &self.destination
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> &MessageId {
        &self.id
    }

    /// The key's bytes.
    #[must_use]
    pub fn key(&self) -> Option<&[u8]> {
        self.key.as_deref()
    }

    /// The key, to be shared without a copy.
    #[must_use]
    pub fn key_bytes(&self) -> Option<&Bytes> {
        self.key.as_ref()
    }

    /// The user's headers.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// The user's headers, to be changed.
    pub fn headers_mut(&mut self) -> &mut Headers {
        &mut self.headers
    }

    /// The media type of the payload.
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref()
    }

    /// When it was made.
    #[must_use]
    pub fn timestamp(&self) -> Timestamp {
        self.timestamp
    }

    /// The payload; `None` for a tombstone.
    #[must_use]
    pub fn payload(&self) -> Option<&Bytes> {
        self.payload.as_ref()
    }

    /// The payload's bytes; empty for a tombstone.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.payload.as_deref().unwrap_or_default()
    }

    /// Whether it is a tombstone.
    #[must_use]
    pub fn is_tombstone(&self) -> bool {
        self.payload.is_none()
    }

    /// How long the broker is asked to hold it back.
    #[must_use]
    pub fn delay(&self) -> Option<Duration> {
        self.delay
    }

    /// How long it may stay unsettled before it expires.
    #[must_use]
    pub fn ttl(&self) -> Option<Duration> {
        self.ttl
    }

    /// Forgets the instructions of the publish that brought it here (delay, time to live).
    #[must_use]
    pub fn without_instructions(mut self) -> Self {
        self.delay = None;
        self.ttl = None;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_keep_the_text_they_were_given() {
        for text in [
            "a",
            "0191E2B4-0000-7000-8000-000000000000",
            "0191e2b4-0000-7000-8000-000000000000",
            "0191e2b4000070008000000000000000",
        ] {
            assert_eq!(MessageId::from(text).to_string(), text);
        }
        assert!(MessageId::from("0191e2b4-0000-7000-8000-000000000000").as_uuid().is_some());
        assert!(MessageId::from("0191E2B4-0000-7000-8000-000000000000").as_uuid().is_none());
    }

    #[test]
    fn a_tombstone_is_not_an_empty_payload() {
        assert_ne!(Message::tombstone("d", "k").payload(), Message::new("d", "").payload());
    }
}
