//! Typed payloads through serde.

use anybroker_core::{Destination, Error, ErrorKind, Message, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The class of a payload or event that does not have the expected shape. It stands in such an error's context as
/// `error_type`; trying again does not help, so handlers dead-letter it at once.
pub const SCHEMA_MISMATCH: &str = "SCHEMA_MISMATCH";

/// A value whose payload is JSON.
///
/// ```
/// use anybroker_core::ErrorKind;
/// use anybroker_events::{Json, JsonExt};
/// # fn main() -> anybroker_core::Result<()> {
/// let message = Json(vec![1, 2, 3]).to_message("numbers")?.with_key("k");
/// assert_eq!(message.content_type(), Some("application/json"));
/// assert_eq!(message.json::<Vec<u8>>()?, [1, 2, 3]);
/// assert_eq!(message.json::<String>().unwrap_err().kind(), ErrorKind::InvalidMessage);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Json<T>(pub T);

impl<T: Serialize> Json<T> {
    /// A message with the value as payload and the content type `application/json`.
    ///
    /// # Errors
    /// [`InvalidMessage`](ErrorKind::InvalidMessage) when the value has no JSON form (a map with keys that are no
    /// texts).
    pub fn to_message(&self, destination: impl Into<Destination>) -> Result<Message> {
        let payload = serde_json::to_vec(&self.0)
            .map_err(|error| refuse("write JSON", format!("the value has no JSON form: {error}")).with_source(error))?;
        Ok(Message::new(destination, payload).with_content_type("application/json"))
    }
}

impl<T: DeserializeOwned> Json<T> {
    /// The value in a message's payload, whatever its content type says.
    ///
    /// # Errors
    /// As [`JsonExt::json`].
    pub fn from_message(message: &Message) -> Result<Self> {
        message.json().map(Self)
    }
}

/// Reading payloads as JSON.
pub trait JsonExt {
    /// The payload as a value of that type. An empty payload is no JSON.
    ///
    /// # Errors
    /// [`InvalidMessage`](ErrorKind::InvalidMessage), with `error_type` [`SCHEMA_MISMATCH`] in its context, when the
    /// payload is not JSON or has another shape. The text names the place and what was expected there, and never quotes
    /// a value: errors go to logs, and payloads may be private.
    fn json<T: DeserializeOwned>(&self) -> Result<T>;
}

impl JsonExt for Message {
    fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(self.bytes())
            .map_err(|error| mismatch("read JSON", format!("the payload does not fit: {}", shape(&error)), self))
    }
}

/// A message that does not have the expected shape.
pub(crate) fn mismatch(operation: &'static str, problem: String, message: &Message) -> Error {
    refuse(operation, problem).with("id", message.id()).with("destination", message.destination())
}

pub(crate) fn refuse(operation: &'static str, problem: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidMessage, operation, problem).with("error_type", SCHEMA_MISMATCH)
}

/// What serde says, without the value that it quotes.
pub(crate) fn shape(error: &serde_json::Error) -> String {
    let text = error.to_string();
    for lead in ["invalid type: ", "invalid value: ", "unknown variant "] {
        if let Some(rest) = text.strip_prefix(lead) {
            let (value, expected) = rest.rsplit_once(", expected ").unwrap_or((rest, "something else"));
            let kind = value.split(['"', '`']).next().unwrap_or_default().trim_end();
            return format!(
                "{}{kind}, expected {expected}",
                if kind.is_empty() { lead.trim_end_matches([':', ' ']) } else { lead }
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    enum Colour {
        Red,
    }

    #[test]
    fn no_value_of_the_payload_stands_in_an_error() {
        let problem = |payload: &str| {
            // An id of its own: a random one has "300" in it now and then, and an error names it.
            let message = Message::new("d", payload.to_owned()).with_id("m");
            let error = if payload.contains("colour") {
                message.json::<std::collections::HashMap<String, Colour>>().map(drop).expect_err("wrong")
            } else {
                message.json::<Vec<u8>>().map(drop).expect_err("wrong")
            };
            format!("{error} {error:?}")
        };
        for payload in [r#"["MARKER"]"#, r#"["MARKER, expected MARKER"]"#, r#""MARKER""#, r#"{"colour": "MARKER"}"#] {
            assert!(!problem(payload).contains("MARKER"), "{}", problem(payload));
        }
        assert!(problem("[300]").contains("expected u8 at line 1 column 4"), "{}", problem("[300]"));
        assert!(!problem("[300]").contains("300"));
        let colour = Message::new("d", r#""Red""#).json::<Colour>().expect("the one there is");
        assert!(matches!(colour, Colour::Red));
    }
}
