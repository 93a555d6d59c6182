//! Event attributes as message headers: the names and encodings of the published protocol bindings.

use std::borrow::Cow;
use std::collections::BTreeMap;

use anybroker_core::{Error, Headers, Message};

use crate::json::mismatch;

/// The prefix that is written: the one of the HTTP and NATS bindings.
pub(crate) const PREFIX: &str = "ce-";

/// The prefixes that are read, and whether their values are percent-encoded. The Kafka and AMQP bindings carry plain
/// UTF-8. AMQP clients that cannot have a colon in a name write `cloudEvents_`.
const FORMS: &[(&str, bool)] = &[("ce-", true), ("ce_", false), ("cloudevents:", false), ("cloudevents_", false)];

/// Whether the specification allows that name: lower-case ASCII letters and digits.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

/// Adds an attribute as a header.
pub(crate) fn write(headers: &mut Headers, name: &str, value: &str) {
    headers.append(format!("{PREFIX}{name}"), encode(value).as_bytes());
}

/// All attributes that stand in the headers, by name. Header names are compared without case, as HTTP does. Headers
/// that are no attribute (other prefixes, names that the specification does not allow) are left to the message.
pub(crate) fn read(message: &Message) -> Result<BTreeMap<String, String>, Error> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for (header, value) in message.headers() {
        let Some((name, encoded)) = attribute(header) else { continue };
        let text = std::str::from_utf8(value)
            .map_err(|_| mismatch("read event", format!("the attribute `{name}` is not UTF-8"), message))?;
        let text = if encoded { decode(text) } else { text.to_owned() };
        match found.get(&name) {
            // A bridge may have written a second form beside the first; two values would be two events.
            Some(other) if *other != text => {
                let problem = format!("the attribute `{name}` stands there twice, with different values");
                return Err(mismatch("read event", problem, message));
            }
            _ => drop(found.insert(name, text)),
        }
    }
    Ok(found)
}

fn attribute(header: &str) -> Option<(String, bool)> {
    let lower = header.to_ascii_lowercase();
    FORMS.iter().find_map(|(prefix, encoded)| {
        let name = lower.strip_prefix(prefix).filter(|name| is_name(name))?;
        Some((name.to_owned(), *encoded))
    })
}

/// Percent-encodes what the HTTP binding (3.1.3.2) wants encoded: everything but printable ASCII, and the space, the
/// double quote and the percent sign.
fn encode(value: &str) -> Cow<'_, str> {
    let plain = |byte: u8| matches!(byte, b'!'..=b'~') && byte != b'"' && byte != b'%';
    if value.bytes().all(plain) {
        return Cow::Borrowed(value);
    }
    let mut encoded = String::with_capacity(value.len() + 16);
    for byte in value.bytes() {
        if plain(byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    Cow::Owned(encoded)
}

/// The reverse. A percent sign without two hex digits stands for itself, and so does a sequence that is not UTF-8:
/// such values come from senders that do not encode.
fn decode(value: &str) -> String {
    if !value.contains('%') {
        return value.to_owned();
    }
    let bytes = value.as_bytes();
    let hex = |at: usize| bytes.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        match (byte, hex(at + 1), hex(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push(u8::try_from(high * 16 + low).expect("two hex digits are a byte"));
                at += 3;
            }
            _ => {
                decoded.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).unwrap_or_else(|_| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_survives_encoding() {
        for text in ["", "plain", "100 %", "a \"b\"", "Zürich €", "%41", "a+b/c?d=e", "\n\0"] {
            let encoded = encode(text);
            assert!(encoded.bytes().all(|byte| (b'!'..=b'~').contains(&byte)), "{encoded}");
            assert_eq!(decode(&encoded), text);
        }
    }

    #[test]
    fn the_example_of_the_http_binding_is_encoded_as_it_says() {
        assert_eq!(encode("Euro € 😀"), "Euro%20%E2%82%AC%20%F0%9F%98%80");
    }

    #[test]
    fn what_was_never_encoded_stands_for_itself() {
        for text in ["100%", "%zz", "%e2%28%a1", "%4"] {
            assert_eq!(decode(text), text);
        }
    }

    #[test]
    fn all_published_forms_are_attributes_and_other_headers_are_not() {
        for header in ["ce-id", "Ce-Id", "ce_id", "cloudEvents:id", "cloudEvents_id"] {
            assert_eq!(attribute(header).map(|(name, _)| name).as_deref(), Some("id"), "{header}");
        }
        for header in ["ce-", "ce-my-header", "id", "cloudEvents", "tenant", "ce-ключ"] {
            assert_eq!(attribute(header), None, "{header}");
        }
    }
}
