//! What the records of a group's own topics say beside their message.

use anybroker_core::{ByteString, Timestamp};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Detail beyond that is cut, so that a letter fits where its message did.
const LONGEST_TEXT: usize = 4_096;

/// Where a message stood in its destination, and what it has been through in its group. It stays with the message through
/// every retry, dead letter and redrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    /// How often it was redriven.
    #[serde(default)]
    pub(crate) redrives: u32,
    /// When the group first got it, in milliseconds since 1970.
    #[serde(default)]
    pub(crate) first_at: Option<i64>,
}

impl Origin {
    /// The key of its records on the group's own topics. A letter that is written twice (a crash before its source was
    /// settled) takes the place of the first.
    pub(crate) fn key(&self) -> String {
        format!("{}:{}:{}", self.partition, self.offset, self.redrives)
    }
}

/// On the retry topic: when the message comes back, and as which attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Retry {
    #[serde(flatten)]
    pub(crate) origin: Origin,
    pub(crate) attempt: u32,
    /// Not before that moment, in milliseconds since 1970.
    pub(crate) due: i64,
}

/// On the dead-letter topic: why the message died.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Letter {
    #[serde(flatten)]
    pub(crate) origin: Origin,
    pub(crate) source: String,
    pub(crate) group: String,
    pub(crate) reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
    pub(crate) attempts: u32,
    pub(crate) last_at: i64,
    /// The message has no payload. Its letter has one: a record without would remove it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_tombstone: bool,
}

pub(crate) fn write(note: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(note).expect("numbers and texts become JSON")
}

pub(crate) fn read<N: DeserializeOwned>(note: Option<Bytes>) -> Option<N> {
    serde_json::from_slice(&note?).ok()
}

/// The text, cut to what a note carries.
pub(crate) fn cut(text: &ByteString) -> String {
    let end = (0..=text.len().min(LONGEST_TEXT)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text[..end].to_owned()
}

/// Milliseconds since 1970 when `delay` from now is over; never before it is.
pub(crate) fn due(delay: std::time::Duration) -> i64 {
    if delay.is_zero() {
        return 0;
    }
    // Both are cut to milliseconds.
    Timestamp::now().after(delay).as_millis() + 2
}
