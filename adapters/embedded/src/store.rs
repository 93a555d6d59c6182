//! What every piece of work within a transaction needs: the connection, the moment, and what it touched.

use std::cell::RefCell;

use std::time::Duration;

use anybroker_core::{ByteString, Bytes, Destination, Headers, Message, MessageId, Order, Timestamp};
use bytes::BytesMut;
use rusqlite::types::ValueRef;
use rusqlite::{CachedStatement, Connection, OptionalExtension as _, Params, Row};

use crate::clock::{FileClock, millis};
use crate::config::Settings;
use crate::error::{Step, damaged};
use crate::schema::row_id;

/// Columns of a message, in the order that [`Shelf::message`] reads them.
pub(crate) const COLUMNS: &str =
    "id, mid, key, headers, content_type, timestamp, stored_at, due_at, expires_at, payload";

/// Bytes that messages of one batch share. A message that is kept longer than its batch keeps that much alive.
const CHUNK: usize = 64 << 10;

/// How far the clocks of two processes may be apart, in milliseconds, before "at once" is late.
const APART: i64 = 1_000;

/// What a transaction changed, for those who wait for it.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Destinations with new messages.
    pub(crate) destinations: Vec<i64>,
    /// Groups in which something may have become ready.
    pub(crate) groups: Vec<i64>,
    /// How many messages were settled for good, by destination: what trimming goes by.
    pub(crate) settled: Vec<(i64, usize)>,
}

/// A transaction at work.
pub(crate) struct Store<'c> {
    pub(crate) connection: &'c Connection,
    pub(crate) settings: &'c Settings,
    /// The moment that holds for the whole transaction, in milliseconds.
    pub(crate) now: i64,
    /// From when periods that begin now are counted: the end of this millisecond, so that they never end early.
    from: i64,
    pub(crate) touched: RefCell<Touched>,
}

impl<'c> Store<'c> {
    pub(crate) fn new(connection: &'c Connection, settings: &'c Settings, clock: &FileClock) -> Self {
        let now = clock.now();
        Self { connection, settings, now, from: now + clock.grain(), touched: RefCell::default() }
    }

    /// The moment that much later.
    pub(crate) fn after(&self, duration: Duration) -> i64 {
        self.from.saturating_add(millis(duration))
    }

    /// Due at once, by the clock of whichever process looks first: they need not agree to the millisecond.
    pub(crate) fn at_once(&self) -> i64 {
        self.now - APART
    }

    pub(crate) fn prepare(&self, sql: &str) -> rusqlite::Result<CachedStatement<'c>> {
        self.connection.prepare_cached(sql)
    }

    /// Runs a statement; tells how many rows it changed.
    pub(crate) fn run(&self, sql: &str, params: impl Params) -> rusqlite::Result<usize> {
        self.prepare(sql)?.execute(params)
    }

    /// Reads at most one row.
    pub(crate) fn one<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<Option<T>> {
        self.prepare(sql)?.query_row(params, read).optional()
    }

    /// Reads all rows.
    pub(crate) fn all<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<Vec<T>> {
        self.prepare(sql)?.query_map(params, read)?.collect()
    }

    /// Reads a number; 0 where there is none.
    pub(crate) fn number(&self, sql: &str, params: impl Params) -> rusqlite::Result<i64> {
        Ok(self.one(sql, params, |row| row.get::<_, Option<i64>>(0))?.flatten().unwrap_or(0))
    }

    /// Something in that group may be ready now.
    pub(crate) fn touch_group(&self, group: i64) {
        let groups = &mut self.touched.borrow_mut().groups;
        if !groups.contains(&group) {
            groups.push(group);
        }
    }

    pub(crate) fn touch_destination(&self, dest: i64) {
        let destinations = &mut self.touched.borrow_mut().destinations;
        if !destinations.contains(&dest) {
            destinations.push(dest);
        }
    }

    pub(crate) fn count_settled(&self, dest: i64, count: usize) {
        let settled = &mut self.touched.borrow_mut().settled;
        match settled.iter_mut().find(|(other, _)| *other == dest) {
            Some((_, sum)) => *sum += count,
            None => settled.push((dest, count)),
        }
    }

    /// The lane of a stored message.
    pub(crate) fn lane_of(&self, order: Order, dest: i64, seq: i64) -> Step<Option<i64>> {
        if order == Order::Total {
            return Ok(lane(order, None));
        }
        let found = self.one("SELECT key FROM messages WHERE id = ?1", [row_id(dest, seq)], |row| {
            Ok(row.get_ref(0)?.as_bytes_or_null()?.and_then(|key| lane(order, Some(key))))
        })?;
        found.ok_or_else(|| damaged(format!("message {seq} is missing")))
    }
}

/// The lane in which a message with that key keeps its order: a hash of the key, 0 for the whole destination.
/// Stored, so it must never change; two keys that meet in one lane only wait for each other.
pub(crate) fn lane(order: Order, key: Option<&[u8]>) -> Option<i64> {
    if order == Order::Total {
        return Some(0);
    }
    // FNV-1a, 64 bits (<http://www.isthe.com/chongo/tech/comp/fnv/>), then mixed so that its low bit is as good.
    let hash = key?
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    Some((hash ^ (hash >> 32)).cast_signed() | 1)
}

/// A message as it is stored.
pub(crate) struct Stored {
    pub(crate) row: i64,
    pub(crate) message: Message,
    pub(crate) due_at: Option<i64>,
    pub(crate) expires_at: Option<i64>,
}

/// The bytes of messages that were read together, in few allocations.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    buffer: BytesMut,
}

impl Shelf {
    /// Reads a row of [`COLUMNS`].
    pub(crate) fn message(&mut self, row: &Row<'_>, destination: &Destination) -> Step<Stored> {
        let id = match row.get_ref(1)? {
            ValueRef::Blob(bytes) => {
                uuid::Uuid::from_slice(bytes).map(MessageId::from).map_err(|_| damaged("a message id is not a UUID"))?
            }
            ValueRef::Text(_) => MessageId::from(self.text(row, 1)?.unwrap_or_default()),
            _ => return Err(damaged("a message has no id")),
        };
        let timestamp = Timestamp::from_millis(row.get(5)?);
        let payload = self.bytes(row.get_ref(9)?.as_bytes_or_null()?);
        let mut message = Message::from_parts(destination.clone(), id, timestamp, payload);
        if let Some(key) = self.bytes(row.get_ref(2)?.as_bytes_or_null()?) {
            message = message.with_key(key);
        }
        if let Some(packed) = self.bytes(row.get_ref(3)?.as_bytes_or_null()?) {
            let headers = Headers::from_packed(packed).ok_or_else(|| damaged("headers that cannot be read"))?;
            message = message.with_headers(headers);
        }
        if let Some(content_type) = self.text(row, 4)? {
            message = message.with_content_type(content_type);
        }
        Ok(Stored { row: row.get(0)?, message, due_at: row.get(7)?, expires_at: row.get(8)? })
    }

    fn bytes(&mut self, bytes: Option<&[u8]>) -> Option<Bytes> {
        let bytes = bytes?;
        if bytes.is_empty() {
            return Some(Bytes::new());
        }
        if self.buffer.capacity() < bytes.len() {
            self.buffer = BytesMut::with_capacity(bytes.len().max(CHUNK));
        }
        self.buffer.extend_from_slice(bytes);
        Some(self.buffer.split().freeze())
    }

    fn text(&mut self, row: &Row<'_>, column: usize) -> Step<Option<ByteString>> {
        let bytes = self.bytes(row.get_ref(column)?.as_bytes_or_null()?);
        bytes.map(|bytes| ByteString::try_from(bytes).map_err(|_| damaged("a text that is not UTF-8"))).transpose()
    }
}

/// A count for a `LIMIT`.
pub(crate) fn limit(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
