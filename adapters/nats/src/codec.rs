//! Messages as NATS messages and back.
//!
//! Payload and headers travel natively, the content type as the header `content-type`, as CloudEvents' binary mode has
//! it. What NATS has no place for (id, key, timestamp, a tombstone, the order of headers, which its client keeps in a hash
//! map) goes into one header of this library's. Headers that NATS would change (line breaks, white space at an end, bytes
//! that are not UTF-8, names that mean something to the server) all go there together.

use std::collections::BTreeSet;

use anybroker_core::{ByteString, Bytes, Destination, Headers, Message, MessageId, Timestamp};
use async_nats::{HeaderMap, HeaderName};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use uuid::Uuid;

/// This library's header.
pub(crate) const META: &str = "anybroker-meta";
/// How often a message that came back by redrive was redriven.
pub(crate) const REDRIVES: &str = "anybroker-redrives";
/// When the time to live of a message ends, in milliseconds of Unix time.
pub(crate) const EXPIRES: &str = "anybroker-expires";
/// When the server is to publish a message, and where to (2.12, ADR-51).
pub(crate) const SCHEDULE: &str = "Nats-Schedule";
pub(crate) const SCHEDULE_TARGET: &str = "Nats-Schedule-Target";
/// Why a message is a dead letter.
pub(crate) const LETTER: &str = "anybroker-letter";
/// What JetStream dedups by.
pub(crate) const MESSAGE_ID: &str = "Nats-Msg-Id";
/// The media type of the payload.
const CONTENT_TYPE: &str = "content-type";

const ID_UUID: u8 = 1;
const KEY: u8 = 2;
const TYPE_NATIVE: u8 = 4;
const TYPE_INSIDE: u8 = 8;
const HEADERS_INSIDE: u8 = 16;
const TOMBSTONE: u8 = 32;
const HEADER_ORDER: u8 = 64;

/// The headers that carry what is not payload. `scratch` is reused between messages.
pub(crate) fn encode(message: &Message, scratch: &mut Vec<u8>) -> HeaderMap {
    let mut map = HeaderMap::new();
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
    if let Some(content_type) = message.content_type() {
        let is_free = packed || headers.iter().all(|(name, _)| !name.eq_ignore_ascii_case(CONTENT_TYPE));
        if is_free && is_native_value(content_type.as_bytes()) {
            flags |= TYPE_NATIVE;
            map.insert(CONTENT_TYPE, content_type);
        } else {
            flags |= TYPE_INSIDE;
            write_field(scratch, content_type.as_bytes());
        }
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
            map.append(name, std::str::from_utf8(value).expect("native values are UTF-8"));
        }
    }
    scratch[0] = flags;
    // The client copies a name that is not static.
    map.insert(HeaderName::from_static(META), URL_SAFE_NO_PAD.encode(&scratch));
    map
}

/// For each header the place of its name among the sorted names; `None` where a header cannot travel as it is.
fn native_order(headers: &Headers) -> Option<Vec<u8>> {
    if headers.is_empty() || !headers.iter().all(|(name, value)| is_native_name(name) && is_native_value(value)) {
        return None;
    }
    let names: Vec<&str> = headers.iter().map(|(name, _)| name).collect::<BTreeSet<_>>().into_iter().collect();
    if names.len() > 255 {
        return None;
    }
    let place = |name: &str| names.binary_search(&name).ok().and_then(|place| u8::try_from(place).ok());
    headers.iter().map(|(name, _)| place(name)).collect()
}

fn is_native_name(name: &str) -> bool {
    // `Nats-` names change what the server does with the message.
    let is_the_servers = name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("nats-"));
    !name.is_empty() && !is_the_servers && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':')
}

fn is_native_value(value: &[u8]) -> bool {
    std::str::from_utf8(value).is_ok_and(|text| text.trim() == text && !text.chars().any(char::is_control))
}

/// An id as a header value, injectively: what a header would change is written as hexadecimal digits.
pub(crate) fn dedup_key(id: &MessageId) -> String {
    id.with_str(|text| {
        if text.len() <= 200 && text.bytes().all(|byte| byte.is_ascii_graphic()) && !text.starts_with("x=") {
            return text.to_owned();
        }
        format!("x={}", URL_SAFE_NO_PAD.encode(text.as_bytes()))
    })
}

fn write_field(buffer: &mut Vec<u8>, field: &[u8]) {
    let length = u32::try_from(field.len()).expect("a field of 4 GiB cannot be built");
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(field);
}

/// Where a message was stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored<'a> {
    pub(crate) stream: &'a str,
    pub(crate) sequence: u64,
    pub(crate) time: Timestamp,
}

/// This library's headers of a message, found in one pass: a look-up hashes its name.
#[derive(Default)]
pub(crate) struct Found<'a> {
    meta: Option<&'a str>,
    /// How often it was redriven.
    pub(crate) redrives: u32,
    /// When its time to live ends, in milliseconds of Unix time.
    pub(crate) expires: Option<i64>,
}

pub(crate) fn find(map: Option<&HeaderMap>) -> Found<'_> {
    let mut found = Found::default();
    for (name, values) in map.into_iter().flat_map(HeaderMap::iter) {
        let Some(value) = values.first().map(|value| value.as_str()) else { continue };
        match AsRef::<str>::as_ref(name) {
            META => found.meta = Some(value),
            REDRIVES => found.redrives = value.parse().unwrap_or(0),
            EXPIRES => found.expires = value.parse().ok(),
            _ => {}
        }
    }
    found
}

/// The message that headers and payload make. One that this library did not write has its id from `Nats-Msg-Id`, or is
/// named by its place.
pub(crate) fn decode(
    destination: &Destination,
    stored: Stored<'_>,
    map: Option<&HeaderMap>,
    found: &Found<'_>,
    payload: Bytes,
) -> Message {
    let Some(meta) = found.meta.and_then(|meta| with_decoded(meta, read_meta)) else {
        return foreign(destination, stored, map, payload);
    };
    let payload = if meta.flags & TOMBSTONE != 0 { None } else { Some(payload) };
    let mut message = Message::from_parts(destination.clone(), meta.id, meta.timestamp, payload);
    if let Some(key) = meta.key {
        message = message.with_key(key);
    }
    let native_type = || map.and_then(|map| map.get(CONTENT_TYPE)).map(|value| ByteString::from(value.as_str()));
    let content_type = if meta.flags & TYPE_NATIVE != 0 { native_type() } else { meta.content_type };
    if let Some(content_type) = content_type {
        message = message.with_content_type(content_type);
    }
    if meta.flags & HEADERS_INSIDE != 0 {
        return message.with_headers(Headers::from_packed(meta.rest).unwrap_or_default());
    }
    match map.filter(|map| map.len() > 1) {
        Some(map) => {
            let headers = native_headers(map, meta.flags & TYPE_NATIVE != 0, &meta.rest);
            if headers.is_empty() { message } else { message.with_headers(headers) }
        }
        // This library's header alone.
        None => message,
    }
}

/// Reads what is written in base64; without a buffer of its own where it is short.
fn with_decoded<R>(text: &str, read: impl FnOnce(&[u8]) -> Option<R>) -> Option<R> {
    let mut short = [0; 256];
    if text.len() <= short.len() {
        let length = URL_SAFE_NO_PAD.decode_slice(text, &mut short).ok()?;
        return read(short.get(..length)?);
    }
    read(&URL_SAFE_NO_PAD.decode(text).ok()?)
}

fn foreign(destination: &Destination, stored: Stored<'_>, map: Option<&HeaderMap>, payload: Bytes) -> Message {
    let given = map.and_then(|map| map.get(MESSAGE_ID)).map(|value| MessageId::from(value.as_str()));
    let id = given.filter(|id| !id.is_empty());
    let id = id.unwrap_or_else(|| MessageId::from(format!("{}/{}", stored.stream, stored.sequence)));
    let mut message = Message::from_parts(destination.clone(), id, stored.time, Some(payload));
    if let Some(map) = map {
        if let Some(content_type) = map.get(CONTENT_TYPE) {
            message = message.with_content_type(content_type.as_str());
        }
        message = message.with_headers(native_headers(map, true, &[]));
    }
    message
}

/// The user's headers, in the order that `order` tells; by name where it does not.
fn native_headers(map: &HeaderMap, type_is_native: bool, order: &[u8]) -> Headers {
    let is_ours = |name: &str| {
        name.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("nats-"))
            || (type_is_native && name == CONTENT_TYPE)
            || name.get(..10).is_some_and(|start| start.eq_ignore_ascii_case("anybroker-"))
    };
    let mut names: Vec<(&str, std::slice::Iter<'_, async_nats::HeaderValue>)> = map
        .iter()
        .map(|(name, values)| (AsRef::<str>::as_ref(name), values.iter()))
        .filter(|(name, _)| !is_ours(name))
        .collect();
    names.sort_unstable_by_key(|(name, _)| *name);
    let mut headers = Headers::new();
    for place in order {
        if let Some((name, values)) = names.get_mut(usize::from(*place))
            && let Some(value) = values.next()
        {
            headers.append(*name, value.as_str());
        }
    }
    for (name, values) in names {
        for value in values {
            headers.append(name, value.as_str());
        }
    }
    headers
}

struct Meta {
    flags: u8,
    timestamp: Timestamp,
    id: MessageId,
    key: Option<Bytes>,
    content_type: Option<ByteString>,
    rest: Bytes,
}

fn read_meta(meta: &[u8]) -> Option<Meta> {
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
        key = Some(Bytes::copy_from_slice(bytes));
    }
    let mut content_type = None;
    if flags & TYPE_INSIDE != 0 {
        let (text, after) = read_field(rest)?;
        rest = after;
        content_type = Some(ByteString::from(std::str::from_utf8(text).ok()?));
    }
    let timestamp = Timestamp::from_millis(i64::from_le_bytes(*millis));
    let rest = if rest.is_empty() { Bytes::new() } else { Bytes::copy_from_slice(rest) };
    Some(Meta { flags, timestamp, id, key, content_type, rest })
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
        let map = encode(message, &mut Vec::new());
        let stored = Stored { stream: "s", sequence: 7, time: Timestamp::from_millis(1) };
        decode(
            message.destination(),
            stored,
            Some(&map),
            &find(Some(&map)),
            message.payload().cloned().unwrap_or_default(),
        )
    }

    #[test]
    fn every_shape_comes_back_as_it_was() {
        let all_bytes: Vec<u8> = (0..=255).collect();
        let shapes = [
            Message::new("d", "x"),
            Message::tombstone("d", all_bytes.clone()),
            Message::new("d", "").with_key("").with_id("not a uuid ✓ ").with_timestamp(Timestamp::from_millis(-5)),
            Message::new("d", "x").with_header("b", "1").with_header("a", "2").with_header("b", "3"),
            Message::new("d", "x").with_header("a", " padded ").with_header("b", "2"),
            Message::new("d", "x").with_header("a", all_bytes),
            Message::new("d", "x").with_header("Nats-Msg-Id", "forged").with_content_type("text/plain"),
            Message::new("d", "x").with_header("content-type", "mine").with_content_type("text/plain"),
            Message::new("d", "x").with_header("Content-Type", "mine").with_content_type("text/plain"),
            Message::new("d", "x").with_content_type("odd\r\ntype"),
            Message::new("d", "x").with_header("empty", "").with_header("empty", ""),
            Message::new("d", "x").with_key(vec![7; 1_000]).with_content_type("odd\ntype"),
        ];
        for message in shapes {
            assert_eq!(round_trip(&message), message);
        }
    }

    #[test]
    fn headers_that_nats_keeps_stay_readable_for_others() {
        let message = Message::new("d", "x").with_header("ce-type", "a").with_content_type("application/json");
        let map = encode(&message, &mut Vec::new());
        assert_eq!(map.get("ce-type").unwrap().as_str(), "a");
        assert_eq!(map.get("content-type").unwrap().as_str(), "application/json");
    }

    #[test]
    fn a_foreign_message_is_named_by_its_dedup_id_or_its_place() {
        let stored = Stored { stream: "s", sequence: 7, time: Timestamp::from_millis(9) };
        let bare = decode(&"d".into(), stored, None, &find(None), Bytes::from_static(b"x"));
        assert_eq!((bare.id().to_string(), bare.timestamp()), ("s/7".to_owned(), Timestamp::from_millis(9)));
        let mut map = HeaderMap::new();
        map.insert(MESSAGE_ID, "theirs");
        map.insert("a", "1");
        let named = decode(&"d".into(), stored, Some(&map), &find(Some(&map)), Bytes::from_static(b"x"));
        assert_eq!((named.id().to_string(), named.headers().len()), ("theirs".to_owned(), 1));
    }

    #[test]
    fn dedup_keys_are_injective_and_legal() {
        let ids = ["a", " a", "a ", "x=YQ", "ключ", "a\nb", ""];
        let keys: BTreeSet<String> = ids.iter().map(|id| dedup_key(&MessageId::from(*id))).collect();
        assert_eq!(keys.len(), ids.len());
        assert!(keys.iter().all(|key| key.bytes().all(|byte| byte.is_ascii_graphic())));
    }
}
