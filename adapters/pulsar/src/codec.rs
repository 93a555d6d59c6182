//! Messages as Pulsar messages and back.
//!
//! Payload, key, headers, a tombstone and the content type (as the property `content-type`) travel natively; what Pulsar
//! has no place for goes into properties of this library's. Properties are texts: headers that are none all travel packed.

use std::time::Duration;

use anybroker_core::{Bytes, Destination, Headers, Message, MessageId, Timestamp};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use pulsar::message::Payload;
use pulsar::proto::{KeyValue, MessageIdData, MessageMetadata, SingleMessageMetadata};

/// Flags, timestamp and id of a message.
const META: &str = "anybroker-meta";
/// All headers in one, base64.
const HEADERS: &str = "anybroker-headers";
const INNER_TYPE: &str = "anybroker-content-type";
/// What the group knows of a message that came back to it.
const NOTES: &str = "anybroker-notes";
/// Why a message is a dead letter.
pub(crate) const LETTER: &str = "anybroker-letter";
const CONTENT_TYPE: &str = "content-type";

const TYPE_NATIVE: u8 = 1;
const PACKED: u8 = 2;
const KEYED: u8 = 4;

/// What a group knows of a message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    /// Failed attempts.
    pub(crate) failures: u32,
    /// Not to be handed out before; milliseconds since 1970, 0 for at once.
    pub(crate) not_before: i64,
    /// When the group first received it; 0 where it did not yet.
    pub(crate) first_at: i64,
    /// How often it was redriven.
    pub(crate) redrives: u32,
    /// Where its source was stored.
    pub(crate) origin: (u64, u64),
    /// Hand-overs that had no outcome, before this copy was stored.
    pub(crate) lost: u32,
}

impl Notes {
    fn encode(self) -> String {
        let Self { failures, not_before, first_at, redrives, origin, lost } = self;
        format!("{failures} {not_before} {first_at} {redrives} {} {} {lost}", origin.0, origin.1)
    }

    fn decode(text: &str) -> Option<Self> {
        let mut parts = text.split(' ');
        Some(Self {
            failures: parts.next()?.parse().ok()?,
            not_before: parts.next()?.parse().ok()?,
            first_at: parts.next()?.parse().ok()?,
            redrives: parts.next()?.parse().ok()?,
            origin: (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?),
            lost: parts.next()?.parse().ok()?,
        })
    }
}

/// When a delay that begins now has ended. One millisecond more: `now` was cut to whole ones.
pub(crate) fn due(delay: Duration) -> i64 {
    Timestamp::now().after(delay).as_millis().saturating_add(1)
}

/// A property.
pub(crate) fn property(key: &str, value: impl Into<String>) -> KeyValue {
    KeyValue { key: key.to_owned(), value: value.into() }
}

/// The frame's payload, but for what the producer adds.
pub(crate) fn encode(message: &Message, notes: Option<Notes>) -> Payload {
    let headers = message.headers();
    let mut flags = 0;
    let mut properties = Vec::with_capacity(headers.len() + 3);
    let is_packed = headers.iter().any(|(_, value)| std::str::from_utf8(value).is_err());
    if is_packed {
        flags |= PACKED;
        properties.push(property(HEADERS, STANDARD.encode(headers.as_packed())));
    } else {
        let texts = headers.iter().map(|(name, value)| property(name, String::from_utf8_lossy(value)));
        properties.extend(texts);
    }
    if let Some(content_type) = message.content_type() {
        if is_packed || headers.iter().all(|(name, _)| name != CONTENT_TYPE) {
            flags |= TYPE_NATIVE;
            properties.push(property(CONTENT_TYPE, content_type));
        } else {
            properties.push(property(INNER_TYPE, content_type));
        }
    }
    let mut metadata = MessageMetadata::default();
    if let Some(key) = message.key() {
        flags |= KEYED;
        match std::str::from_utf8(key) {
            Ok(text) => metadata.partition_key = Some(text.to_owned()),
            Err(_) => {
                metadata.partition_key = Some(STANDARD.encode(key));
                metadata.partition_key_b64_encoded = Some(true);
            }
        }
    }
    let millis = message.timestamp().as_millis();
    metadata.event_time = u64::try_from(millis).ok().filter(|time| *time > 0);
    properties.push(property(META, message.id().with_str(|id| format!("{flags} {millis} {id}"))));
    if let Some(notes) = notes {
        properties.push(property(NOTES, notes.encode()));
        metadata.deliver_at_time = Some(notes.not_before).filter(|time| *time > 0);
    }
    metadata.null_value = message.is_tombstone().then_some(true);
    metadata.properties = properties;
    Payload { metadata, data: message.bytes().to_vec() }
}

/// Why the bytes of a message cannot be read here.
pub(crate) fn unreadable(metadata: &MessageMetadata) -> Option<&'static str> {
    if metadata.compression.is_some_and(|kind| kind != 0) {
        return Some("it is compressed, which this adapter does not read");
    }
    if !metadata.encryption_keys.is_empty() {
        return Some("it is encrypted end to end, which this adapter does not read");
    }
    if metadata.num_chunks_from_msg.is_some_and(|chunks| chunks > 1) {
        return Some("it is a chunk of a larger message, which this adapter does not join");
    }
    None
}

/// The messages of a batch that somebody else's producer made; `None` when it cannot be read.
pub(crate) fn unbatch(payload: &Payload, ack_set: &[i64]) -> Option<Vec<(i32, Payload)>> {
    let count = payload.metadata.num_messages_in_batch?;
    let mut rest = payload.data.as_slice();
    let mut found = Vec::new();
    for index in 0..count {
        let (size, after) = rest.split_first_chunk::<4>()?;
        let (head, after) = after.split_at_checked(u32::from_be_bytes(*size) as usize)?;
        let single = SingleMessageMetadata::decode(head).ok()?;
        let (data, after) = after.split_at_checked(usize::try_from(single.payload_size).ok()?)?;
        rest = after;
        let place = usize::try_from(index).ok()?;
        // A bit that is set is a message that is not acked yet.
        let is_acked = !ack_set.is_empty() && ack_set.get(place / 64).is_none_or(|word| word >> (place % 64) & 1 == 0);
        if is_acked || single.compacted_out() {
            continue;
        }
        let metadata = MessageMetadata {
            properties: single.properties,
            partition_key: single.partition_key,
            partition_key_b64_encoded: single.partition_key_b64_encoded,
            event_time: single.event_time,
            null_value: single.null_value,
            publish_time: payload.metadata.publish_time,
            ..Default::default()
        };
        found.push((index, Payload { metadata, data: data.to_vec() }));
    }
    Some(found)
}

/// The message that a payload is, and what its group noted. One that this library did not write is named by its place.
pub(crate) fn decode(destination: &Destination, id: &MessageIdData, payload: Payload) -> (Message, Option<Notes>) {
    let Payload { metadata, data } = payload;
    let find = |name: &str| metadata.properties.iter().find(|property| property.key == name);
    let meta = find(META).and_then(|meta| {
        let mut parts = meta.value.splitn(3, ' ');
        let flags: u8 = parts.next()?.parse().ok()?;
        Some((flags, parts.next()?.parse::<i64>().ok()?, parts.next()?))
    });
    let notes = find(NOTES).and_then(|notes| Notes::decode(&notes.value));
    let (flags, millis, name) = match meta {
        Some((flags, millis, name)) => (flags, millis, MessageId::from(name)),
        None => {
            let time = metadata.event_time.filter(|time| *time > 0).unwrap_or(metadata.publish_time);
            let mut place = format!("{}/{}:{}", destination, id.ledger_id, id.entry_id);
            if let Some(index) = id.batch_index.filter(|index| *index >= 0) {
                place.push_str(&format!(":{index}"));
            }
            (TYPE_NATIVE, i64::try_from(time).unwrap_or(0), MessageId::from(place))
        }
    };
    let body = if metadata.null_value() { None } else { Some(Bytes::from(data)) };
    let mut message = Message::from_parts(destination.clone(), name, Timestamp::from_millis(millis), body);
    if let Some(key) = &metadata.partition_key
        && (meta.is_none() || flags & KEYED != 0)
    {
        let bytes = metadata.partition_key_b64_encoded().then(|| STANDARD.decode(key).ok()).flatten();
        message = message.with_key(bytes.unwrap_or_else(|| key.as_bytes().to_vec()));
    }
    let native_type = flags & TYPE_NATIVE != 0;
    let content_type = find(if native_type { CONTENT_TYPE } else { INNER_TYPE });
    if let Some(content_type) = content_type {
        message = message.with_content_type(content_type.value.as_str());
    }
    let headers = if flags & PACKED != 0 {
        let packed = find(HEADERS).and_then(|packed| STANDARD.decode(&packed.value).ok());
        packed.and_then(|packed| Headers::from_packed(Bytes::from(packed))).unwrap_or_default()
    } else {
        let is_ours = |name: &str| {
            native_type && name == CONTENT_TYPE
                || name.get(..10).is_some_and(|start| start.eq_ignore_ascii_case("anybroker-"))
        };
        let mut headers = Headers::new();
        for property in metadata.properties.iter().filter(|property| !is_ours(&property.key)) {
            headers.append(&property.key, &property.value);
        }
        headers
    };
    if !headers.is_empty() {
        message = message.with_headers(headers);
    }
    (message, notes)
}

/// Where a message of that key goes among `partitions`: as the Java client's default does it, so that a key has one
/// partition whoever publishes it (JavaStringHash over the UTF-16 units of the key as it is written).
pub(crate) fn partition_of(key: &str, partitions: usize) -> usize {
    let hash = key.encode_utf16().fold(0_i32, |hash, unit| hash.wrapping_mul(31).wrapping_add(i32::from(unit)));
    (hash & i32::MAX) as usize % partitions
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn id() -> MessageIdData {
        MessageIdData { ledger_id: 7, entry_id: 3, ..Default::default() }
    }

    #[test]
    fn every_shape_comes_back_as_it_was() {
        let all_bytes: Vec<u8> = (0..=255).collect();
        let shapes = [
            Message::new("d", "x"),
            Message::tombstone("d", all_bytes.clone()),
            Message::new("d", "").with_key("").with_id("not a uuid ✓ ").with_timestamp(Timestamp::from_millis(-5)),
            Message::new("d", "x").with_header("b", "1").with_header("a", "2").with_header("b", "3"),
            Message::new("d", "x").with_header("a", all_bytes).with_content_type("text/plain"),
            Message::new("d", "x").with_header("content-type", "mine").with_content_type("text/plain"),
            Message::new("d", "x").with_header("content-type", "mine"),
            Message::new("d", "x").with_header("Content-Type", "mine").with_content_type("odd\r\ntype"),
        ];
        for message in shapes {
            let notes = Notes { failures: 2, not_before: 5, first_at: 4, redrives: 1, origin: (3, 2), lost: 6 };
            let (back, found) = decode(message.destination(), &id(), encode(&message, Some(notes)));
            assert_eq!((back, found), (message.clone(), Some(notes)));
            assert_eq!(decode(message.destination(), &id(), encode(&message, None)), (message, None));
        }
    }

    #[test]
    fn a_foreign_message_is_named_by_its_place() {
        let metadata = MessageMetadata { publish_time: 9, partition_key: Some("k".into()), ..Default::default() };
        let (message, _) = decode(&"d".into(), &id(), Payload { metadata, data: b"x".to_vec() });
        assert_eq!((message.id().to_string(), message.key()), ("d/7:3".to_owned(), Some(&b"k"[..])));
        assert_eq!(message.timestamp(), Timestamp::from_millis(9));
    }

    #[test]
    fn a_batch_is_taken_apart_without_what_was_acked_of_it() {
        let mut data = Vec::new();
        for number in 0..3_u8 {
            let single = SingleMessageMetadata { payload_size: 1, ..Default::default() };
            data.extend(u32::try_from(single.encoded_len()).unwrap().to_be_bytes());
            data.extend(single.encode_to_vec());
            data.push(number);
        }
        let metadata = MessageMetadata { num_messages_in_batch: Some(3), ..Default::default() };
        let payload = Payload { metadata, data };
        let bodies = |set: &[i64]| {
            unbatch(&payload, set).unwrap().into_iter().map(|(index, one)| (index, one.data[0])).collect::<Vec<_>>()
        };
        assert_eq!(bodies(&[]), [(0, 0), (1, 1), (2, 2)]);
        assert_eq!(bodies(&[0b101]), [(0, 0), (2, 2)]);
        let cut = Payload { data: payload.data[..5].to_vec(), ..payload.clone() };
        assert!(unbatch(&cut, &[]).is_none());
    }

    #[test]
    fn partitions_are_chosen_as_the_java_client_does() {
        assert_eq!(partition_of("a", 10), 97 % 10);
        assert_eq!(partition_of("ab", 1_000_000), 97 * 31 + 98);
    }
}
