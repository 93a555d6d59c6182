//! A message as it goes through a peer.

use anybroker_core::{Bytes, Destination, Headers, Message, MessageId, Timestamp};

/// What AnyBroker's message has and a peer's has not travels in headers of this prefix.
const OWN: &str = "any-";

/// Headers and payload. What a peer calls headers holds each name once, in no order, and often text only; what does not fit
/// into that travels packed, so that only what the peer says that it carries is asked of it.
#[derive(Debug, Clone, Default)]
pub struct Parcel {
    /// Each name once.
    pub headers: Vec<(String, Bytes)>,
    /// The payload.
    pub payload: Bytes,
}

impl Parcel {
    /// Of a message. `carries` tells whether the peer's documentation says that it carries such a header, `room` how many
    /// there may be beside this adapter's.
    #[must_use]
    pub fn pack(message: &Message, room: usize, carries: impl Fn(&str, &[u8]) -> bool) -> Self {
        let id = message.id().to_string();
        let is_carried = !id.starts_with(HEX) && carries("any-id", id.as_bytes());
        let id = if is_carried { id } else { hex(id.as_bytes()) };
        let mut headers = vec![own("id", id), own("time", message.timestamp().as_millis().to_string())];
        headers.extend(message.key().map(|key| own("key", hex(key))));
        headers.extend(message.content_type().map(|text| own("type", hex(text.as_bytes()))));
        let names: Vec<String> = message.headers().iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
        let is_set = (1..names.len()).all(|at| !names[..at].contains(&names[at]));
        let is_plain =
            |(name, value): (&str, &[u8])| !name.to_ascii_lowercase().starts_with(OWN) && carries(name, value);
        if is_set && names.len() <= room && message.headers().iter().all(is_plain) {
            // Their order, and the case of the names, which a peer may not keep.
            let order = message.headers().iter().map(|(name, _)| hex(name.as_bytes())).collect::<Vec<_>>().join(".");
            headers.extend((!names.is_empty()).then(|| own("order", order)));
            let plain = message.headers().iter();
            headers.extend(plain.map(|(name, value)| (name.to_owned(), Bytes::copy_from_slice(value))));
        } else {
            headers.push(own("packed", hex(message.headers().as_packed())));
        }
        Self { headers, payload: message.payload().cloned().unwrap_or_default() }
    }

    /// The message again. What the peer has lost or changed shows in it.
    #[must_use]
    pub fn unpack(self, destination: &Destination) -> Message {
        let text = |name: &str| {
            let own = format!("{OWN}{name}");
            let found = self.headers.iter().find(|(other, _)| other.eq_ignore_ascii_case(&own));
            found.and_then(|(_, value)| std::str::from_utf8(value).ok())
        };
        let time = text("time").and_then(|time| time.parse().ok()).unwrap_or(0);
        let id = text("id").unwrap_or_default();
        let id = unhex(id).and_then(|id| String::from_utf8(id).ok()).unwrap_or_else(|| id.to_owned());
        let id = MessageId::from(id);
        let mut message =
            Message::from_parts(destination.clone(), id, Timestamp::from_millis(time), Some(self.payload.clone()));
        if let Some(key) = text("key").and_then(unhex) {
            message = message.with_key(key);
        }
        if let Some(kind) = text("type").and_then(unhex).and_then(|kind| String::from_utf8(kind).ok()) {
            message = message.with_content_type(kind);
        }
        let packed = text("packed").and_then(unhex).and_then(|packed| Headers::from_packed(packed.into()));
        let headers = packed.unwrap_or_else(|| {
            let mut headers = Headers::new();
            for name in text("order").unwrap_or_default().split('.').filter_map(unhex) {
                let Ok(name) = String::from_utf8(name) else { continue };
                let found = self.headers.iter().find(|(other, _)| other.eq_ignore_ascii_case(&name));
                if let Some((_, value)) = found.filter(|_| !name.is_empty()) {
                    headers.append(name, value);
                }
            }
            headers
        });
        message.with_headers(headers)
    }

    /// All of it as one payload, for a peer that has no headers.
    #[must_use]
    pub fn into_frame(self) -> Vec<u8> {
        let mut headers = Headers::new();
        for (name, value) in &self.headers {
            headers.append(name, value);
        }
        let packed = headers.as_packed();
        let length = u32::try_from(packed.len()).unwrap_or(u32::MAX).to_le_bytes();
        [&length[..], packed, &self.payload].concat()
    }

    /// What [`into_frame`](Self::into_frame) made; `None` where it is cut.
    #[must_use]
    pub fn from_frame(frame: &[u8]) -> Option<Self> {
        let (length, rest) = frame.split_first_chunk::<4>()?;
        let length = u32::from_le_bytes(*length) as usize;
        let (packed, payload) = (rest.get(..length)?, rest.get(length..)?);
        let packed = Headers::from_packed(Bytes::copy_from_slice(packed))?;
        let headers = packed.iter().map(|(name, value)| (name.to_owned(), Bytes::copy_from_slice(value))).collect();
        Some(Self { headers, payload: Bytes::copy_from_slice(payload) })
    }
}

fn own(name: &str, value: String) -> (String, Bytes) {
    (format!("{OWN}{name}"), value.into())
}

/// What hexadecimal text begins with: a peer need not carry an empty value.
const HEX: &str = "hex-";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(HEX.to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let text = text.strip_prefix(HEX)?;
    let pair = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    (0..text.len()).step_by(2).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_comes_through_whether_it_is_carried_or_not_and_headers_beyond_the_room_are_packed() {
        for id in ["plain", " spaces ", "hex-00", "hex-"] {
            let message = Message::new("d", "body").with_id(id).with_header("a", "1").with_header("b", "2");
            for (carries, room) in [(true, 1), (false, 2), (true, 2)] {
                let parcel = Parcel::pack(&message, room, |_, _| carries);
                assert_eq!(parcel.headers.iter().any(|(name, _)| name == "a"), carries && room == 2);
                assert!(parcel.headers.iter().all(|(_, value)| !value.is_empty()));
                assert_eq!(parcel.unpack(message.destination()), message);
            }
        }
    }

    #[test]
    fn a_message_comes_out_of_its_parcel_as_it_went_in_whether_its_headers_are_carried_or_not() {
        let bare = Message::new("d", "body").with_content_type("").with_key(&[0_u8, 255][..]);
        let headed = bare.clone().with_header("B", "x y").with_header("a", "");
        let repeated = headed.clone().with_header("A", [0, 13, 255]);
        for message in [Message::new("d", ""), bare, headed, repeated] {
            for carries in [true, false] {
                let parcel = Parcel::pack(&message, usize::MAX, |_, _| carries);
                let mut through = Parcel::from_frame(&parcel.into_frame()).expect("a whole frame");
                through.headers.reverse();
                through.headers.iter_mut().for_each(|(name, _)| name.make_ascii_lowercase());
                assert_eq!(through.unpack(message.destination()), message);
            }
        }
    }
}
