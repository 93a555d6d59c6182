//! Messages as Kafka records and back.
//!
//! Key, payload, headers and (where Kafka keeps it as it is) the timestamp travel natively; the content type as the
//! header `content-type`, as CloudEvents' binary mode has it. What Kafka has no place for goes into one header of
//! this library's: the id always, and the rest only where it must.

use std::panic::AssertUnwindSafe;

use anybroker_core::{ByteString, Bytes, Destination, Message, MessageId, RESERVED_HEADER_PREFIX, Timestamp};
use bytes::BytesMut;
use rdkafka::message::{BorrowedHeaders, BorrowedMessage, Header, Headers, Message as _, OwnedHeaders};
use uuid::Uuid;

/// This library's header: flags, then what they announce.
pub(crate) const META: &str = "anybroker-meta";
/// What a record of a group's own topics says beside the message: why it died, or when it comes back.
pub(crate) const NOTE: &str = "anybroker-note";
/// The message's key, on records of a group's own topics; the record's key is this library's there.
pub(crate) const KEY: &str = "anybroker-key";
/// The media type of the payload.
const CONTENT_TYPE: &str = "content-type";

const ID_UUID: u8 = 1;
const TIMESTAMP: u8 = 2;
const TYPE_NATIVE: u8 = 4;
const TYPE_INSIDE: u8 = 8;
const HEADERS_INSIDE: u8 = 16;

/// So many headers of a record are looked at once.
const FEW_HEADERS: usize = 4;

/// Kafka drops records by their timestamp (retention) and refuses those from the future
/// (`message.timestamp.after.max.ms`, one hour): only what is near now is its timestamp, anything else is data.
const NATIVE_TIMESTAMP_MS: u64 = 30 * 60 * 1000;

/// The headers of the record, and the timestamp where it travels natively. `scratch` is reused between messages.
pub(crate) fn encode(message: &Message, now: Timestamp, scratch: &mut Vec<u8>) -> (OwnedHeaders, Option<i64>) {
    let headers = message.headers();
    let millis = message.timestamp().as_millis();
    let is_native_time = millis > 0 && millis.abs_diff(now.as_millis()) <= NATIVE_TIMESTAMP_MS;
    // A header name is a C string on its way through librdkafka.
    let packed = headers.iter().any(|(name, _)| name.contains('\0'));
    let is_type_native =
        message.content_type().is_some() && (packed || headers.iter().all(|(name, _)| name != CONTENT_TYPE));
    scratch.clear();
    scratch.push(0);
    let mut flags = 0;
    match message.id().as_uuid() {
        Some(uuid) => {
            flags |= ID_UUID;
            scratch.extend_from_slice(uuid.as_bytes());
        }
        None => message.id().with_str(|id| write_field(scratch, id.as_bytes())),
    }
    if !is_native_time {
        flags |= TIMESTAMP;
        scratch.extend_from_slice(&millis.to_le_bytes());
    }
    if let Some(content_type) = message.content_type() {
        if is_type_native {
            flags |= TYPE_NATIVE;
        } else {
            flags |= TYPE_INSIDE;
            write_field(scratch, content_type.as_bytes());
        }
    }
    if packed {
        flags |= HEADERS_INSIDE;
        scratch.extend_from_slice(headers.as_packed());
    }
    scratch[0] = flags;
    let mut native = OwnedHeaders::new_with_capacity(headers.len() + 2);
    native = native.insert(Header { key: META, value: Some(&scratch[..]) });
    if let Some(content_type) = message.content_type().filter(|_| is_type_native) {
        native = native.insert(Header { key: CONTENT_TYPE, value: Some(content_type.as_bytes()) });
    }
    if !packed {
        for (name, value) in headers {
            native = native.insert(Header { key: name, value: Some(value) });
        }
    }
    (native, is_native_time.then_some(millis))
}

/// More than a batch of one message takes beside the bytes of its fields.
pub(crate) const OVERHEAD: usize = 1_024;

/// The bytes of a batch of this one record, uncompressed (record format 2: KIP-98 and Kafka's "Message Format" page).
pub(crate) fn batch_size(key: Option<&[u8]>, payload: Option<&[u8]>, headers: &OwnedHeaders) -> usize {
    const BATCH_HEADER: usize = 61;
    let field = |field: Option<&[u8]>| match field {
        Some(bytes) => varint(bytes.len()) + bytes.len(),
        // A length of -1.
        None => 1,
    };
    let sizes = headers.iter().map(|header| field(Some(header.key.as_bytes())) + field(header.value));
    // Attributes and the two differences to the batch's first record, which are zero.
    let record = 3 + field(key) + field(payload) + varint(headers.count()) + sizes.sum::<usize>();
    BATCH_HEADER + varint(record) + record
}

/// The bytes of a length as a zigzag varint.
fn varint(length: usize) -> usize {
    let mut rest = length << 1 >> 7;
    let mut bytes = 1;
    while rest > 0 {
        rest >>= 7;
        bytes += 1;
    }
    bytes
}

fn write_field(buffer: &mut Vec<u8>, field: &[u8]) {
    let length = u32::try_from(field.len()).expect("an id or content type of 4 GiB cannot be built");
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(field);
}

/// Records of one partition that were fetched together, copied into one buffer that their messages share.
#[derive(Debug)]
pub(crate) struct Chunk {
    destination: Destination,
    lane: String,
    arena: Bytes,
    records: Vec<Record>,
}

#[derive(Debug)]
struct Record {
    offset: i64,
    id: Id,
    timestamp: i64,
    payload: Option<Range>,
    key: Option<Range>,
    headers: Range,
    content_type: Option<Range>,
    note: Option<Range>,
}

#[derive(Debug)]
enum Id {
    Uuid(Uuid),
    Text(Range),
    /// Not written by this library: its place is its id.
    Position,
}

type Range = (u32, u32);

impl Chunk {
    /// How many records it holds.
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// The offset of a record.
    pub(crate) fn offset(&self, index: usize) -> i64 {
        self.records[index].offset
    }

    /// The key of a record.
    pub(crate) fn key(&self, index: usize) -> Option<Bytes> {
        self.records[index].key.map(|range| self.slice(range))
    }

    /// What the record says beside the message, on a group's own topics.
    pub(crate) fn note(&self, index: usize) -> Option<Bytes> {
        self.records[index].note.map(|range| self.slice(range))
    }

    /// Bytes that a record keeps in memory.
    pub(crate) fn weight(&self, index: usize) -> usize {
        let payload = self.records[index].payload.map_or(0, |range| range.1 - range.0) as usize;
        payload + 512
    }

    fn slice(&self, range: Range) -> Bytes {
        self.arena.slice(range.0 as usize..range.1 as usize)
    }

    /// The message of a record; shares the chunk's buffer.
    pub(crate) fn message(&self, index: usize) -> Message {
        let record = &self.records[index];
        let slice = |range: Range| self.slice(range);
        let text = |range| ByteString::try_from(slice(range)).unwrap_or_default();
        let id = match &record.id {
            Id::Uuid(uuid) => MessageId::from(*uuid),
            Id::Text(range) => MessageId::from(text(*range)),
            Id::Position => MessageId::from(format!("{}/{}", self.lane, record.offset)),
        };
        let time = Timestamp::from_millis(record.timestamp);
        let mut message = Message::from_parts(self.destination.clone(), id, time, record.payload.map(slice));
        if let Some(key) = record.key {
            message = message.with_key(slice(key));
        }
        if record.headers.0 < record.headers.1 {
            message =
                message.with_headers(anybroker_core::Headers::from_packed(slice(record.headers)).unwrap_or_default());
        }
        if let Some(content_type) = record.content_type {
            message = message.with_content_type(text(content_type));
        }
        message
    }
}

/// A chunk that is being filled.
pub(crate) struct Filling {
    arena: BytesMut,
    records: Vec<Record>,
    /// The topic is a group's own: notes count. Elsewhere anybody could forge one.
    is_own: bool,
}

impl Filling {
    pub(crate) fn with_capacity(bytes: usize, records: usize, is_own: bool) -> Self {
        Self { arena: BytesMut::with_capacity(bytes), records: Vec::with_capacity(records), is_own }
    }

    /// A chunk of a single record.
    pub(crate) fn one(record: &BorrowedMessage<'_>, is_own: bool) -> Self {
        let mut filling = Self::with_capacity(record.payload_len() + 512, 1, is_own);
        filling.push(record);
        filling
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.arena.len()
    }

    /// The chunk of what was copied.
    pub(crate) fn finish(self, destination: Destination, lane: String) -> Chunk {
        Chunk { destination, lane, arena: self.arena.freeze(), records: self.records }
    }

    /// Copies a record.
    pub(crate) fn push(&mut self, record: &BorrowedMessage<'_>) {
        let payload = record.payload().map(|bytes| self.copy(bytes));
        let key = record.key().map(|bytes| self.copy(bytes));
        let mut decoded = Record {
            offset: record.offset(),
            id: Id::Position,
            timestamp: record.timestamp().to_millis().unwrap_or_default(),
            payload,
            key,
            headers: (0, 0),
            content_type: None,
            note: None,
        };
        if let Some(headers) = record.headers() {
            self.push_headers(record, headers, &mut decoded);
        }
        self.records.push(decoded);
    }

    /// rdkafka panics on a header name that is not UTF-8, which any producer can write (`BorrowedHeaders::try_get`
    /// unwraps): one such record must not end the subscription. Its other headers are delivered.
    fn push_headers(&mut self, record: &BorrowedMessage<'_>, headers: &BorrowedHeaders, decoded: &mut Record) {
        let before = (self.arena.len(), decoded.key);
        let all = AssertUnwindSafe(|| self.read_headers(headers.count(), &|index| Some(headers.get(index)), decoded));
        let read = match std::panic::catch_unwind(all) {
            Ok(read) => read,
            Err(_) => {
                self.arena.truncate(before.0);
                (decoded.content_type, decoded.note, decoded.key) = (None, None, before.1);
                (decoded.headers, decoded.id) = ((0, 0), Id::Position);
                let each = |index| std::panic::catch_unwind(AssertUnwindSafe(|| headers.get(index))).ok();
                let _ = self.read_headers(headers.count(), &each, decoded);
                None
            }
        };
        if read.is_none() {
            let (topic, partition, offset) = (record.topic(), record.partition(), record.offset());
            tracing::warn!(topic, partition, offset, "a header of a record is not readable");
        }
    }

    fn read_headers<'h>(
        &mut self,
        count: usize,
        header: &dyn Fn(usize) -> Option<Header<'h, &'h [u8]>>,
        decoded: &mut Record,
    ) -> Option<()> {
        // Each look into the client's list checks the name anew: once for each header, where there are as few as usual.
        let few: [_; FEW_HEADERS] =
            std::array::from_fn(|index| (index < count && count <= FEW_HEADERS).then(|| header(index)));
        let header = |index: usize| if count <= FEW_HEADERS { few[index].clone().flatten() } else { header(index) };
        let find =
            |name: &str, from: usize| (from..count).find(|index| header(*index).is_some_and(|found| found.key == name));
        let value = |index: usize| header(index).and_then(|header| header.value);
        let meta_at = find(META, 0);
        let meta = meta_at.and_then(value);
        let type_at = match meta.and_then(|meta| meta.first()) {
            Some(flags) if flags & TYPE_NATIVE != 0 => find(CONTENT_TYPE, meta_at.unwrap_or_default()),
            Some(_) => None,
            // Not written by this library: CloudEvents' binary mode.
            None => find(CONTENT_TYPE, 0),
        };
        if let Some(value) = type_at.and_then(value) {
            decoded.content_type = Some(self.copy(value));
        }
        if self.is_own {
            decoded.note = find(NOTE, 0).and_then(value).map(|note| self.copy(note));
            decoded.key = find(KEY, 0).and_then(value).map(|key| self.copy(key));
        }
        let start = self.here();
        for index in (0..count).filter(|index| Some(*index) != type_at) {
            let Some(header) = header(index) else { continue };
            if !header.key.starts_with(RESERVED_HEADER_PREFIX) {
                self.copy_field(header.key.as_bytes());
                self.copy_field(header.value.unwrap_or_default());
            }
        }
        decoded.headers = (start, self.here());
        match meta {
            Some(meta) => self.read_meta(meta, decoded),
            None => Some(()),
        }
    }

    fn read_meta(&mut self, meta: &[u8], decoded: &mut Record) -> Option<()> {
        let (flags, rest) = meta.split_first()?;
        let mut rest = rest;
        if flags & ID_UUID != 0 {
            let (bytes, after) = rest.split_first_chunk::<16>()?;
            decoded.id = Id::Uuid(Uuid::from_bytes(*bytes));
            rest = after;
        } else {
            let (text, after) = read_field(rest)?;
            std::str::from_utf8(text).ok()?;
            decoded.id = Id::Text(self.copy(text));
            rest = after;
        }
        if flags & TIMESTAMP != 0 {
            let (bytes, after) = rest.split_first_chunk::<8>()?;
            decoded.timestamp = i64::from_le_bytes(*bytes);
            rest = after;
        }
        if flags & TYPE_INSIDE != 0 {
            let (text, after) = read_field(rest)?;
            std::str::from_utf8(text).ok()?;
            decoded.content_type = Some(self.copy(text));
            rest = after;
        }
        if flags & HEADERS_INSIDE != 0 {
            decoded.headers = self.copy(rest);
        }
        Some(())
    }

    fn here(&self) -> u32 {
        u32::try_from(self.arena.len()).expect("a chunk ends long before 4 GiB")
    }

    fn copy(&mut self, bytes: &[u8]) -> Range {
        let start = self.here();
        self.arena.extend_from_slice(bytes);
        (start, self.here())
    }

    fn copy_field(&mut self, field: &[u8]) {
        let length = u32::try_from(field.len()).expect("a record is smaller than 4 GiB");
        self.arena.extend_from_slice(&length.to_le_bytes());
        self.arena.extend_from_slice(field);
    }
}

fn read_field(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = rest.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}
