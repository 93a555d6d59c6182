//! Publishing: a batch goes to the writer, which stores it with whatever else waits, in one commit.

use anybroker_core::{Destination, Error, ErrorKind, Message, Position, PublishOutcome, Receipt, Result};

use crate::error::Step;
use crate::schema::row_id;
use crate::store::Store;

/// What a message costs in buffers, in bytes.
pub(crate) fn weight(message: &Message) -> usize {
    128 + message.bytes().len() + message.headers().as_packed().len() + message.key().map_or(0, <[u8]>::len)
}

/// A destination while messages are appended to it.
struct Tail {
    dest: i64,
    next: i64,
    stored_at: i64,
}

/// Stores a batch; one outcome per message.
pub(crate) fn store(store: &Store<'_>, batch: &[Message]) -> Step<Vec<PublishOutcome>> {
    let mut tails: Vec<Result<Tail>> = Vec::with_capacity(1);
    let mut names: Vec<&Destination> = Vec::with_capacity(1);
    let mut outcomes = Vec::with_capacity(batch.len());
    let mut insert = store.prepare(
        "INSERT INTO messages (id, mid, key, headers, content_type, timestamp, stored_at, due_at, expires_at, payload)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?;
    for message in batch {
        let place = match names.iter().position(|name| *name == message.destination()) {
            Some(place) => place,
            None => {
                names.push(message.destination());
                tails.push(tail(store, message.destination())?);
                tails.len() - 1
            }
        };
        let tail = match &mut tails[place] {
            Ok(tail) => tail,
            Err(missing) => {
                outcomes.push(Err(missing.duplicate().with("id", message.id())));
                continue;
            }
        };
        let seq = tail.next;
        let uuid = message.id().as_uuid();
        let text;
        let id: &dyn rusqlite::ToSql = match &uuid {
            Some(uuid) => uuid.as_bytes(),
            None => {
                text = message.id().to_string();
                &text
            }
        };
        let headers = Some(message.headers().as_packed()).filter(|packed| !packed.is_empty());
        let after = |duration| store.after(duration);
        insert.execute(rusqlite::params![
            row_id(tail.dest, seq),
            id,
            message.key(),
            headers,
            message.content_type(),
            message.timestamp().as_millis(),
            tail.stored_at,
            message.delay().filter(|delay| !delay.is_zero()).map(after),
            message.ttl().map(after),
            message.payload().map(|payload| &payload[..]),
        ])?;
        tail.next += 1;
        outcomes.push(Ok(Receipt { position: Some(Position::new(seq.cast_unsigned())), duplicate: false }));
    }
    for tail in tails.iter().flatten() {
        store.run(
            "UPDATE destinations SET next = ?2, stored_at = ?3 WHERE id = ?1",
            (tail.dest, tail.next, tail.stored_at),
        )?;
        store.touch_destination(tail.dest);
    }
    Ok(outcomes)
}

fn tail(store: &Store<'_>, name: &Destination) -> Step<Result<Tail>> {
    let find = || {
        store.one("SELECT id, next, stored_at FROM destinations WHERE name = ?1", [name.as_str()], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?))
        })
    };
    let mut found = find()?;
    if found.is_none() {
        if !store.settings.create_destinations {
            let text = "the destination does not exist, and create_destinations is off";
            return Ok(Err(Error::new(ErrorKind::NotFound, "publish", text).with("destination", name)));
        }
        crate::topology::create_destination(store, name)?;
        found = find()?;
    }
    let Some((dest, next, stored_at)) = found else {
        return Err(crate::error::damaged("a destination that was created is missing"));
    };
    Ok(Ok(Tail { dest, next, stored_at: stored_at.max(store.now) }))
}
