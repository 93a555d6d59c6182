//! Messages as those of SQS (and SNS) and back.
//!
//! A body is a text that is not empty and holds only what XML allows; attributes are at most ten, in no order, and
//! named narrowly. A payload that is such a text is the body as it is; any other is base64. Headers that fit
//! are attributes, so that foreign readers see them; one binary attribute of this library's holds their order, the
//! headers that do not fit, and what SQS has no place for.

use std::borrow::Cow;
use std::collections::HashMap;

use anybroker_core::{ByteString, Bytes, Destination, Headers, Message, MessageId, Timestamp};
use aws_sdk_sqs::types::MessageAttributeValue;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// This library's attribute.
const META: &str = "anybroker-meta";
const CONTENT_TYPE: &str = "content-type";
/// Ten, less this library's and the content type. With more than ten SNS would drop a message on its way to a queue.
const NATIVE_HEADERS: usize = 8;

const VERSION: u8 = 1;
const BODY_TEXT: u8 = 0;
const BODY_BASE64: u8 = 1;
const BODY_EMPTY: u8 = 2;
const HAS_KEY: u8 = 1;
const TYPE_NATIVE: u8 = 2;
const TYPE_INSIDE: u8 = 4;
const HAS_CARRIED: u8 = 8;
const HEADER_NATIVE: u8 = 0;
const HEADER_INSIDE: u8 = 1;

/// What a message brings along beside itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Carried {
    /// Failed attempts of earlier copies.
    pub(crate) failed: u32,
    /// How often it was redriven.
    pub(crate) redrives: u32,
    /// When the group first received it.
    pub(crate) first_at: Option<Timestamp>,
    /// It is not delivered before.
    pub(crate) not_before: Option<Timestamp>,
    /// It is a dead letter from then on.
    pub(crate) expires_at: Option<Timestamp>,
}

/// The value of an attribute.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    Text(String),
    Binary(Vec<u8>),
}

/// A message in SQS's form.
pub(crate) struct Encoded {
    pub(crate) body: String,
    pub(crate) attributes: Vec<(String, Value)>,
    /// As SQS counts it against its limits.
    pub(crate) size: usize,
}

/// Encodes a message; `letter` is why it is a dead letter, for those.
pub(crate) fn encode(message: &Message, carried: &Carried, letter: Option<&str>) -> Encoded {
    let payload = message.bytes();
    let (form, body) = match std::str::from_utf8(payload) {
        _ if payload.is_empty() => (BODY_EMPTY, "empty".to_owned()),
        Ok(text) if is_carried(text) => (BODY_TEXT, text.to_owned()),
        _ => (BODY_BASE64, STANDARD.encode(payload)),
    };
    let mut attributes: Vec<(String, Value)> = Vec::with_capacity(2);
    let mut meta = Vec::with_capacity(96);
    meta.extend_from_slice(&[VERSION, form, 0]);
    message.id().with_str(|id| write_field(&mut meta, id.as_bytes()));
    meta.extend_from_slice(&message.timestamp().as_millis().to_le_bytes());
    if let Some(key) = message.key() {
        meta[2] |= HAS_KEY;
        write_field(&mut meta, key);
    }
    let headers = message.headers();
    if let Some(content_type) = message.content_type() {
        if is_carried(content_type) && !content_type.is_empty() && headers.get(CONTENT_TYPE).is_none() {
            meta[2] |= TYPE_NATIVE;
            attributes.push((CONTENT_TYPE.to_owned(), Value::Text(content_type.to_owned())));
        } else {
            meta[2] |= TYPE_INSIDE;
            write_field(&mut meta, content_type.as_bytes());
        }
    }
    if *carried != Carried::default() {
        meta[2] |= HAS_CARRIED;
        carried.write(&mut meta);
    }
    write_field(&mut meta, letter.unwrap_or_default().as_bytes());
    let mut natives = 0;
    for (name, value) in headers {
        let text = std::str::from_utf8(value).ok().filter(|text| !text.is_empty() && is_carried(text));
        let is_new = || attributes.iter().all(|(other, _)| other != name);
        match text {
            Some(text) if natives < NATIVE_HEADERS && is_attribute_name(name) && is_new() => {
                natives += 1;
                meta.push(HEADER_NATIVE);
                write_field(&mut meta, name.as_bytes());
                attributes.push((name.to_owned(), Value::Text(text.to_owned())));
            }
            _ => {
                meta.push(HEADER_INSIDE);
                write_field(&mut meta, name.as_bytes());
                write_field(&mut meta, value);
            }
        }
    }
    attributes.push((META.to_owned(), Value::Binary(meta)));
    let of_attributes: usize = attributes
        .iter()
        .map(|(name, value)| match value {
            Value::Text(text) => name.len() + "String".len() + text.len(),
            // As the longer of its two forms.
            Value::Binary(bytes) => name.len() + "Binary".len() + bytes.len().div_ceil(3) * 4,
        })
        .sum();
    Encoded { size: body.len() + of_attributes, body, attributes }
}

/// What SQS lets through: XML's characters. Carriage returns are among them, but an XML reader may turn them into line
/// feeds.
fn is_carried(text: &str) -> bool {
    text.chars().all(
        |c| matches!(c, '\t' | '\n' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..='\u{10ffff}'),
    )
}

fn is_attribute_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    let lower = name.to_ascii_lowercase();
    name.len() <= 256
        && !name.is_empty()
        && name.bytes().all(plain)
        && !name.starts_with('.')
        && !name.ends_with('.')
        && !name.contains("..")
        && !lower.starts_with("aws")
        && !lower.starts_with("amazon")
}

fn write_field(buffer: &mut Vec<u8>, field: &[u8]) {
    let length = u32::try_from(field.len()).expect("the limits are far below 4 GiB");
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(field);
}

impl Carried {
    fn write(&self, buffer: &mut Vec<u8>) {
        buffer.extend_from_slice(&self.failed.to_le_bytes());
        buffer.extend_from_slice(&self.redrives.to_le_bytes());
        for time in [self.first_at, self.not_before, self.expires_at] {
            buffer.extend_from_slice(&time.map_or(i64::MIN, Timestamp::as_millis).to_le_bytes());
        }
    }

    fn read(rest: &[u8]) -> Option<(Self, &[u8])> {
        let (failed, rest) = rest.split_first_chunk::<4>()?;
        let (redrives, mut rest) = rest.split_first_chunk::<4>()?;
        let mut times = [None; 3];
        for time in &mut times {
            let (millis, after) = rest.split_first_chunk::<8>()?;
            let millis = i64::from_le_bytes(*millis);
            *time = (millis != i64::MIN).then(|| Timestamp::from_millis(millis));
            rest = after;
        }
        let [first_at, not_before, expires_at] = times;
        let (failed, redrives) = (u32::from_le_bytes(*failed), u32::from_le_bytes(*redrives));
        Some((Self { failed, redrives, first_at, not_before, expires_at }, rest))
    }
}

/// A received message as SQS has it.
pub(crate) struct Raw {
    pub(crate) body: String,
    pub(crate) attributes: HashMap<String, MessageAttributeValue>,
    /// SQS's own id.
    pub(crate) id: String,
    /// When it was sent.
    pub(crate) sent: Option<Timestamp>,
    /// Its message group, in a FIFO queue.
    pub(crate) group: Option<String>,
}

/// A received message.
pub(crate) struct Decoded {
    pub(crate) message: Message,
    pub(crate) carried: Carried,
    /// Why it is a dead letter.
    pub(crate) letter: Option<String>,
}

/// Decodes; what this library did not write is a text body with the attributes as headers, and its message group as key.
pub(crate) fn decode(raw: Raw, destination: &Destination) -> Decoded {
    let Raw { body, attributes, id, sent, group } = raw;
    // Bytes from a queue, base64 from a topic.
    let meta = attributes.get(META).and_then(|value| match value.binary_value() {
        Some(bytes) => Some(Cow::Borrowed(bytes.as_ref())),
        None => STANDARD.decode(value.string_value()?).ok().map(Cow::Owned),
    });
    if let Some(decoded) = meta.and_then(|meta| decode_own(&meta, &body, &attributes, destination)) {
        return decoded;
    }
    let time = sent.unwrap_or_else(Timestamp::now);
    let mut message =
        Message::from_parts(destination.clone(), MessageId::from(id.as_str()), time, Some(Bytes::from(body)));
    if let Some(group) = group {
        message = message.with_key(group);
    }
    let mut names: Vec<&String> = attributes.keys().collect();
    names.sort_unstable();
    for name in names {
        let value = &attributes[name];
        let bytes = value.binary_value().map(AsRef::as_ref).or(value.string_value().map(str::as_bytes));
        message.headers_mut().append(name, bytes.unwrap_or_default());
    }
    Decoded { message, carried: Carried::default(), letter: None }
}

fn decode_own(
    meta: &[u8],
    body: &str,
    attributes: &HashMap<String, MessageAttributeValue>,
    destination: &Destination,
) -> Option<Decoded> {
    let ([VERSION, form, flags], rest) = meta.split_first_chunk::<3>()? else { return None };
    let (id, rest) = read_text(rest)?;
    let (millis, mut rest) = rest.split_first_chunk::<8>()?;
    let payload = match *form {
        BODY_TEXT => Bytes::copy_from_slice(body.as_bytes()),
        BODY_BASE64 => STANDARD.decode(body).ok()?.into(),
        BODY_EMPTY => Bytes::new(),
        _ => return None,
    };
    let time = Timestamp::from_millis(i64::from_le_bytes(*millis));
    let mut message = Message::from_parts(destination.clone(), MessageId::from(id), time, Some(payload));
    if flags & HAS_KEY != 0 {
        let (key, after) = read_field(rest)?;
        message = message.with_key(key.to_vec());
        rest = after;
    }
    if flags & TYPE_NATIVE != 0 {
        message = message.with_content_type(ByteString::from(attributes.get(CONTENT_TYPE)?.string_value()?));
    } else if flags & TYPE_INSIDE != 0 {
        let (content_type, after) = read_text(rest)?;
        message = message.with_content_type(ByteString::from(content_type));
        rest = after;
    }
    let mut carried = Carried::default();
    if flags & HAS_CARRIED != 0 {
        (carried, rest) = Carried::read(rest)?;
    }
    let (letter, mut rest) = read_text(rest)?;
    let mut headers = Headers::new();
    while let Some((kind, after)) = rest.split_first() {
        let (name, after) = read_text(after)?;
        if *kind == HEADER_NATIVE {
            headers.append(name, attributes.get(name)?.string_value()?);
            rest = after;
        } else {
            let (value, after) = read_field(after)?;
            headers.append(name, value);
            rest = after;
        }
    }
    let letter = (!letter.is_empty()).then(|| letter.to_owned());
    Some(Decoded { message: message.with_headers(headers), carried, letter })
}

fn read_field(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = rest.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

fn read_text(rest: &[u8]) -> Option<(&str, &[u8])> {
    let (field, rest) = read_field(rest)?;
    Some((std::str::from_utf8(field).ok()?, rest))
}
