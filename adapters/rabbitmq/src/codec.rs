//! Messages as AMQP messages and back.
//!
//! Payload, headers and content type travel natively, the id as `message-id`, the timestamp as `timestamp` (seconds, for
//! other readers). What AMQP has no place for (key, milliseconds, a tombstone, the order of headers, which its client keeps
//! in a sorted map) goes into one header of this library's. Headers that AMQP or RabbitMQ would change (a name that stands
//! twice or is longer than 255 bytes, names that mean something to the server) all go there together.

use std::collections::BTreeSet;

use anybroker_core::naming::fnv1a;
use anybroker_core::{ByteString, Bytes, Destination, Headers, Message, MessageId, Timestamp};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, LongString, ShortString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// This library's header.
const META: &str = "anybroker-meta";
/// What happened to a message in its group.
const HOP: &str = "anybroker-hop";
/// Why a message is a dead letter.
pub(crate) const LETTER: &str = "anybroker-letter";
/// What a quorum queue counts: how often a message came back.
const DELIVERY_COUNT: &str = "x-delivery-count";
/// The place of a message in its stream.
const OFFSET: &str = "x-stream-offset";
/// A message that only tells a reader that a stream has an end (`stream.rs`).
const MARK: &str = "anybroker-mark";
/// AMQP: what the server writes to disk where the queue is durable.
pub(crate) const PERSISTENT: u8 = 2;

const ID_UUID: u8 = 1;
const KEY: u8 = 2;
const TYPE_NATIVE: u8 = 4;
const TYPE_INSIDE: u8 = 8;
const HEADERS_INSIDE: u8 = 16;
const TOMBSTONE: u8 = 32;
const HEADER_ORDER: u8 = 64;

/// What happened to a message in its group before it was stored there again: written by nacks and redrives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Hop {
    /// Failed attempts.
    #[serde(rename = "f")]
    pub(crate) failures: u32,
    /// Hand-overs before it was stored again.
    #[serde(rename = "d")]
    pub(crate) deliveries: u32,
    /// When the group first received it, in milliseconds; 0 where that is not known.
    #[serde(rename = "t")]
    pub(crate) first: i64,
    /// How often it was redriven.
    #[serde(rename = "r")]
    pub(crate) redrives: u32,
    /// When it expires, in milliseconds; 0 for never.
    #[serde(rename = "e")]
    pub(crate) expires: i64,
    /// When it was published into a stream, in milliseconds of its publisher's clock; 0 elsewhere.
    #[serde(rename = "p", skip_serializing_if = "is_zero")]
    pub(crate) published: i64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// The properties that carry what is not payload. `scratch` is reused between messages.
pub(crate) fn encode(message: &Message, hop: Option<&Hop>, scratch: &mut Vec<u8>) -> BasicProperties {
    let mut table = FieldTable::default();
    let headers = message.headers();
    let order = native_order(headers);
    let packed = !headers.is_empty() && order.is_none();
    scratch.clear();
    scratch.push(0);
    scratch.extend_from_slice(&message.timestamp().as_millis().to_le_bytes());
    let mut flags = 0;
    match message.id().as_uuid() {
        Some(uuid) => {
            flags |= ID_UUID;
            scratch.extend_from_slice(uuid.as_bytes());
        }
        None => message.id().with_str(|id| write_field(scratch, id.as_bytes())),
    }
    if let Some(key) = message.key() {
        flags |= KEY;
        write_field(scratch, key);
    }
    let mut properties =
        BasicProperties::default().with_delivery_mode(PERSISTENT).with_message_id(native_id(message.id()));
    if let Some(content_type) = message.content_type() {
        if content_type.len() <= 255 {
            flags |= TYPE_NATIVE;
            properties = properties.with_content_type(content_type.into());
        } else {
            flags |= TYPE_INSIDE;
            write_field(scratch, content_type.as_bytes());
        }
    }
    if let Ok(seconds) = u64::try_from(message.timestamp().as_millis().div_euclid(1_000)) {
        properties = properties.with_timestamp(seconds);
    }
    if message.is_tombstone() {
        flags |= TOMBSTONE;
    }
    if packed {
        flags |= HEADERS_INSIDE;
        scratch.extend_from_slice(headers.as_packed());
    } else if let Some(order) = order {
        if order.len() > 1 {
            flags |= HEADER_ORDER;
            scratch.extend_from_slice(&order);
        }
        for (name, value) in headers {
            table.insert(name.into(), AMQPValue::LongString(LongString::from(value)));
        }
    }
    scratch[0] = flags;
    table.insert(META.into(), AMQPValue::ByteArray(scratch.as_slice().into()));
    if let Some(hop) = hop {
        let text = serde_json::to_vec(hop).expect("numbers become JSON");
        table.insert(HOP.into(), AMQPValue::LongString(LongString::from(text)));
    }
    properties.with_headers(table)
}

/// An id as `message-id`, which holds 255 bytes.
pub(crate) fn native_id(id: &MessageId) -> ShortString {
    id.with_str(|text| match ShortString::try_new(text) {
        Ok(text) => text,
        Err(_) => format!("{:032x}", fnv1a(text.as_bytes())).as_str().into(),
    })
}

/// For each header the place of its name among the sorted names; `None` where a header cannot travel as it is.
fn native_order(headers: &Headers) -> Option<Vec<u8>> {
    if headers.is_empty() || !headers.iter().all(|(name, _)| is_native_name(name)) {
        return None;
    }
    let names: BTreeSet<&str> = headers.iter().map(|(name, _)| name).collect();
    // A table holds a name once.
    if names.len() != headers.len() || names.len() > 255 {
        return None;
    }
    let names: Vec<&str> = names.into_iter().collect();
    let place = |name: &str| names.binary_search(&name).ok().and_then(|place| u8::try_from(place).ok());
    headers.iter().map(|(name, _)| place(name)).collect()
}

/// `CC` and `BCC` change where a message goes, `x-` names are the server's.
fn is_native_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 255 && !is_the_servers(name)
}

fn is_the_servers(name: &str) -> bool {
    let starts = |prefix: &str| name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    matches!(name, "CC" | "BCC") || starts("x-") || starts("anybroker-")
}

fn write_field(buffer: &mut Vec<u8>, field: &[u8]) {
    let length = u32::try_from(field.len()).expect("a field of 4 GiB cannot be built");
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(field);
}

/// What the server and this library noted about a message.
pub(crate) struct Notes {
    pub(crate) hop: Hop,
    /// How often it came back since it was stored.
    pub(crate) returned: u32,
}

pub(crate) fn notes(properties: &BasicProperties) -> Notes {
    let table = properties.headers().as_ref().map(FieldTable::inner);
    let hop = table.and_then(|table| table.get(HOP)).and_then(bytes_of);
    let hop = hop.and_then(|text| serde_json::from_slice(text).ok()).unwrap_or_default();
    let returned = table.and_then(|table| table.get(DELIVERY_COUNT)).and_then(number).unwrap_or(0);
    Notes { hop, returned: u32::try_from(returned).unwrap_or(u32::MAX) }
}

/// The place of a message that came from a stream.
pub(crate) fn offset(properties: &BasicProperties) -> Option<u64> {
    let table = properties.headers().as_ref().map(FieldTable::inner)?;
    u64::try_from(table.get(OFFSET).and_then(number)?).ok()
}

/// A message for nobody.
pub(crate) fn mark() -> BasicProperties {
    let mut table = FieldTable::default();
    table.insert(MARK.into(), AMQPValue::Boolean(true));
    BasicProperties::default().with_delivery_mode(PERSISTENT).with_message_id(MARK.into()).with_headers(table)
}

/// Whether it is one for nobody.
pub(crate) fn is_mark(properties: &BasicProperties) -> bool {
    let is_named = properties.message_id().as_ref().is_some_and(|id| id.as_str() == MARK);
    let table = properties.headers().as_ref().map(FieldTable::inner);
    is_named && table.is_some_and(|table| matches!(table.get(MARK), Some(AMQPValue::Boolean(true))))
}

pub(crate) fn bytes_of(value: &AMQPValue) -> Option<&[u8]> {
    match value {
        AMQPValue::LongString(text) => Some(text.as_bytes()),
        AMQPValue::ByteArray(bytes) => Some(bytes.as_slice()),
        AMQPValue::ShortString(text) => Some(text.as_str().as_bytes()),
        _ => None,
    }
}

pub(crate) fn number(value: &AMQPValue) -> Option<i64> {
    Some(match value {
        AMQPValue::ShortShortInt(number) => i64::from(*number),
        AMQPValue::ShortShortUInt(number) => i64::from(*number),
        AMQPValue::ShortInt(number) => i64::from(*number),
        AMQPValue::ShortUInt(number) => i64::from(*number),
        AMQPValue::LongInt(number) => i64::from(*number),
        AMQPValue::LongUInt(number) => i64::from(*number),
        AMQPValue::LongLongInt(number) => *number,
        AMQPValue::Timestamp(seconds) => i64::try_from(*seconds).ok()?,
        _ => return None,
    })
}

/// The message that properties and payload make. One that this library did not write has its id from `message-id`, or is
/// named by a digest of its payload.
pub(crate) fn decode(destination: &Destination, properties: &BasicProperties, payload: Bytes) -> Message {
    let table = properties.headers().as_ref().map(FieldTable::inner);
    let meta = table.and_then(|table| table.get(META)).and_then(bytes_of).map(Bytes::copy_from_slice);
    let Some(meta) = meta.and_then(|meta| read_meta(&meta)) else { return foreign(destination, properties, payload) };
    let payload = if meta.flags & TOMBSTONE != 0 { None } else { Some(payload) };
    let mut message = Message::from_parts(destination.clone(), meta.id, meta.timestamp, payload);
    if let Some(key) = meta.key {
        message = message.with_key(key);
    }
    let native_type = || properties.content_type().as_ref().map(|text| ByteString::from(text.as_str()));
    let content_type = if meta.flags & TYPE_NATIVE != 0 { native_type() } else { meta.content_type };
    if let Some(content_type) = content_type {
        message = message.with_content_type(content_type);
    }
    if meta.flags & HEADERS_INSIDE != 0 {
        return message.with_headers(Headers::from_packed(meta.rest).unwrap_or_default());
    }
    let headers = native_headers(properties, &meta.rest);
    if headers.is_empty() { message } else { message.with_headers(headers) }
}

fn foreign(destination: &Destination, properties: &BasicProperties, payload: Bytes) -> Message {
    let given = properties.message_id().as_ref().map(|id| MessageId::from(id.as_str())).filter(|id| !id.is_empty());
    let id = given.unwrap_or_else(|| MessageId::from(format!("{:032x}", fnv1a(&payload))));
    let millis =
        properties.timestamp().and_then(|seconds| i64::try_from(seconds).ok()).unwrap_or(0).saturating_mul(1_000);
    let mut message = Message::from_parts(destination.clone(), id, Timestamp::from_millis(millis), Some(payload));
    if let Some(content_type) = properties.content_type() {
        message = message.with_content_type(content_type.as_str());
    }
    message.with_headers(native_headers(properties, &[]))
}

/// The user's headers, in the order that `order` tells; by name where it does not.
fn native_headers(properties: &BasicProperties, order: &[u8]) -> Headers {
    let mut headers = Headers::new();
    let Some(table) = properties.headers().as_ref().map(FieldTable::inner) else { return headers };
    let mut named: Vec<Option<(&str, &AMQPValue)>> = table
        .iter()
        .map(|(name, value)| (name.as_str(), value))
        .filter(|(name, _)| !is_the_servers(name))
        .map(Some)
        .collect();
    let mut append = |entry: Option<(&str, &AMQPValue)>| {
        let Some((name, value)) = entry else { return };
        match bytes_of(value) {
            Some(bytes) => headers.append(name, bytes),
            None => headers.append(name, text_of(value)),
        };
    };
    for place in order {
        append(named.get_mut(usize::from(*place)).and_then(Option::take));
    }
    named.into_iter().for_each(append);
    headers
}

/// A foreign writer's header that is no text.
fn text_of(value: &AMQPValue) -> String {
    match value {
        AMQPValue::Boolean(value) => value.to_string(),
        AMQPValue::Float(value) => value.to_string(),
        AMQPValue::Double(value) => value.to_string(),
        AMQPValue::Void => String::new(),
        other => number(other).map_or_else(|| format!("{other:?}"), |number| number.to_string()),
    }
}

struct Meta {
    flags: u8,
    timestamp: Timestamp,
    id: MessageId,
    key: Option<Bytes>,
    content_type: Option<ByteString>,
    rest: Bytes,
}

fn read_meta(meta: &Bytes) -> Option<Meta> {
    let (&flags, mut rest) = meta.split_first()?;
    let (millis, after) = rest.split_first_chunk::<8>()?;
    rest = after;
    let id = if flags & ID_UUID != 0 {
        let (bytes, after) = rest.split_first_chunk::<16>()?;
        rest = after;
        MessageId::from(Uuid::from_bytes(*bytes))
    } else {
        let (text, after) = read_field(rest)?;
        rest = after;
        MessageId::from(std::str::from_utf8(text).ok()?)
    };
    let mut key = None;
    if flags & KEY != 0 {
        let (bytes, after) = read_field(rest)?;
        rest = after;
        key = Some(meta.slice_ref(bytes));
    }
    let mut content_type = None;
    if flags & TYPE_INSIDE != 0 {
        let (text, after) = read_field(rest)?;
        rest = after;
        content_type = Some(ByteString::try_from(meta.slice_ref(text)).ok()?);
    }
    let timestamp = Timestamp::from_millis(i64::from_le_bytes(*millis));
    Some(Meta { flags, timestamp, id, key, content_type, rest: meta.slice_ref(rest) })
}

fn read_field(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = rest.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn round_trip(message: &Message) -> Message {
        let properties = encode(message, None, &mut Vec::new());
        decode(message.destination(), &properties, message.payload().cloned().unwrap_or_default())
    }

    #[test]
    fn every_shape_comes_back_as_it_was() {
        let all_bytes: Vec<u8> = (0..=255).collect();
        let shapes = [
            Message::new("d", "x"),
            Message::tombstone("d", all_bytes.clone()),
            Message::new("d", "").with_key("").with_id("not a uuid ✓ ").with_timestamp(Timestamp::from_millis(-5)),
            Message::new("d", "x").with_id("y".repeat(300)).with_content_type("t".repeat(300)),
            Message::new("d", "x").with_header("b", "1").with_header("a", "2").with_header("c", "3"),
            Message::new("d", "x").with_header("b", "1").with_header("a", "2").with_header("b", "3"),
            Message::new("d", "x").with_header("a", all_bytes).with_header("B", ""),
            Message::new("d", "x").with_header("x-death", "forged").with_content_type("text/plain"),
            Message::new("d", "x").with_header("CC", "elsewhere"),
            Message::new("d", "x").with_header("n".repeat(256), "long"),
        ];
        for message in shapes {
            assert_eq!(round_trip(&message), message);
        }
    }

    #[test]
    fn headers_that_amqp_keeps_stay_readable_for_others() {
        let message = Message::new("d", "x").with_header("ce-type", "a").with_content_type("application/json");
        let properties = encode(&message, None, &mut Vec::new());
        let table = properties.headers().as_ref().unwrap().inner();
        assert_eq!(bytes_of(&table["ce-type"]), Some(&b"a"[..]));
        assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "application/json");
    }

    #[test]
    fn what_names_the_server_reads_never_travels_natively() {
        for name in ["CC", "BCC", "x-death", "X-Delivery-Count"] {
            let properties = encode(&Message::new("d", "x").with_header(name, "1"), None, &mut Vec::new());
            assert!(!properties.headers().as_ref().unwrap().contains_key(name), "{name}");
        }
    }

    #[test]
    fn a_foreign_message_is_named_by_its_id_or_its_payload_and_keeps_its_headers() {
        let bare = decode(&"d".into(), &BasicProperties::default(), Bytes::from_static(b"x"));
        let again = decode(&"d".into(), &BasicProperties::default(), Bytes::from_static(b"x"));
        assert_eq!(bare.id(), again.id());
        let mut table = FieldTable::default();
        table.insert("a".into(), AMQPValue::LongInt(7));
        let properties = BasicProperties::default().with_message_id("theirs".into()).with_headers(table);
        let named = decode(&"d".into(), &properties, Bytes::from_static(b"x"));
        assert_eq!((named.id().to_string().as_str(), named.headers().get("a")), ("theirs", Some(&b"7"[..])));
    }

    #[test]
    fn what_happened_in_the_group_is_read_back() {
        let hop = Hop { failures: 2, deliveries: 5, first: 7, redrives: 1, expires: 9, published: 11 };
        let properties = encode(&Message::new("d", "x"), Some(&hop), &mut Vec::new());
        assert_eq!(notes(&properties).hop, hop);
    }
}
