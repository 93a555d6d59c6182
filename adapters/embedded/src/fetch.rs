//! Handing out: what a member may have now is claimed for it.

use anybroker_core::{DeliveryFacts, Lane, OnFailure, Order, Position, Reason, Timestamp, Verdict};

use crate::dead_letter::{Death, bury};
use crate::error::Step;
use crate::lanes;
use crate::member::{Handle, Member, Ready, Source};
use crate::publisher::weight;
use crate::schema::{row_id, sequence};
use crate::store::{COLUMNS, Shelf, Store, Stored, lane, limit};

/// Rows that one transaction looks at, beyond those it hands out, before others get their turn.
pub(crate) const EXAMINED: usize = 4_096;

/// Bytes that one transaction brings, about.
const BYTES: usize = 16 << 20;

/// What a member gets.
#[derive(Default)]
pub(crate) struct Fetched {
    pub(crate) ready: Vec<Ready>,
    /// There is more to look at right away.
    pub(crate) more: bool,
    /// This source is deleted.
    pub(crate) gone: Option<usize>,
    pub(crate) shelf: Shelf,
    bytes: usize,
}

/// A group as it is when a fetch looks at it.
pub(crate) struct Cursor<'a> {
    pub(crate) source: &'a Source,
    pub(crate) index: usize,
    /// The first fresh sequence.
    pub(crate) at: i64,
    pub(crate) claim: i64,
    pub(crate) lease_until: i64,
    /// Which fetch of its member this is.
    pub(crate) turn: usize,
    /// How many rows may still be looked at without being handed out.
    pub(crate) budget: usize,
}

/// A row of `pending` that may be handed out.
pub(crate) struct Waiting {
    pub(crate) seq: i64,
    pub(crate) attempt: u32,
    pub(crate) deliveries: u32,
    pub(crate) redrives: u32,
}

impl Waiting {
    pub(crate) fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self { seq: row.get(0)?, attempt: row.get(1)?, deliveries: row.get(2)?, redrives: row.get(3)? })
    }
}

/// Claims up to `max` deliveries for a member. `turn` says with which destination to begin. Each gets its share of the
/// room first; what others leave is shared out after that.
pub(crate) fn fetch(store: &Store<'_>, member: &Member, max: usize, turn: usize) -> Step<Fetched> {
    let mut fetched = Fetched::default();
    let count = member.sources.len();
    for pass in 0..2 {
        for step in 0..count {
            let left = max - fetched.ready.len();
            let share = if pass == 0 { left.div_ceil(count - step) } else { left };
            let until = fetched.ready.len() + share;
            let open = fetch_from(store, member, turn, (turn + step) % count, until, &mut fetched)?;
            if !open {
                return Ok(fetched);
            }
        }
        if count == 1 || fetched.full(max) {
            break;
        }
    }
    Ok(fetched)
}

/// Claims from one destination until there are `max` deliveries; false when it was deleted.
fn fetch_from(
    store: &Store<'_>,
    member: &Member,
    turn: usize,
    index: usize,
    max: usize,
    fetched: &mut Fetched,
) -> Step<bool> {
    let source = &member.sources[index];
    let group = store.one("SELECT cursor, swept FROM consumers WHERE id = ?1", [source.group], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
    })?;
    let Some((at, swept)) = group else {
        fetched.gone = Some(index);
        return Ok(false);
    };
    if fetched.full(max) {
        return Ok(true);
    }
    let mut cursor = Cursor {
        source,
        index,
        at,
        claim: member.next_claim(),
        lease_until: store.after(member.lease),
        turn,
        budget: EXAMINED,
    };
    end_leases(store, member.order, source)?;
    sweep(store, source, at, swept, (member.order, member.on_failure))?;
    match member.order {
        Order::None => unordered(store, &mut cursor, max, fetched)?,
        Order::Key | Order::Total => lanes::ordered(store, member, &mut cursor, max, fetched)?,
    }
    if cursor.at != at {
        store.run("UPDATE consumers SET cursor = ?2 WHERE id = ?1", (source.group, cursor.at))?;
    }
    Ok(true)
}

impl Fetched {
    pub(crate) fn full(&self, max: usize) -> bool {
        self.ready.len() >= max || self.bytes >= BYTES
    }

    /// Hands a stored message out.
    pub(crate) fn hand_out(&mut self, cursor: &Cursor<'_>, stored: Stored, attempt: u32, deliveries: u32) {
        let seq = sequence(stored.row);
        let handle = Handle { claim: cursor.claim, seq, source: cursor.index };
        let mut facts = DeliveryFacts::new(handle.token());
        facts.attempt = attempt;
        facts.deliveries = Some(deliveries);
        facts.lane = Lane { index: u32::try_from(cursor.index).unwrap_or(u32::MAX), epoch: 0 };
        facts.position = Some(Position::new(seq.cast_unsigned()));
        facts.lease_until = Some(Timestamp::from_millis(cursor.lease_until));
        self.bytes += weight(&stored.message);
        self.ready.push(Ready { message: stored.message, facts });
    }
}

/// How much of the room what waits may take before what is fresh: half, so that neither starves behind the other (a
/// message that fails at once, over and over; a backlog). With room for one they take turns.
pub(crate) fn waiting_share(room: usize, turn: usize) -> usize {
    if room == 1 { (turn + 1) % 2 } else { room.div_ceil(2) }
}

/// Hands out what waits in `pending` and what is fresh, in any order.
fn unordered(store: &Store<'_>, cursor: &mut Cursor<'_>, max: usize, fetched: &mut Fetched) -> Step<()> {
    let group = cursor.source.group;
    let exceptions = store.number("SELECT 1 FROM pending WHERE grp = ?1 LIMIT 1", [group])? == 1;
    if !exceptions {
        return fresh(store, cursor, max, exceptions, fetched);
    }
    let begin = fetched.ready.len();
    let share = begin + waiting_share(max - begin, cursor.turn);
    waiting(store, cursor, share, fetched)?;
    if !fetched.full(max) {
        fresh(store, cursor, max, exceptions, fetched)?;
    }
    if !fetched.full(max) && share < max {
        waiting(store, cursor, max, fetched)?;
    }
    Ok(())
}

fn waiting(store: &Store<'_>, cursor: &Cursor<'_>, max: usize, fetched: &mut Fetched) -> Step<()> {
    let room = max.saturating_sub(fetched.ready.len());
    let mut due = store.all(
        "SELECT seq, attempt, deliveries, redrives FROM pending
         WHERE grp = ?1 AND state = 0 AND due_at <= ?2 ORDER BY due_at, seq LIMIT ?3",
        (cursor.source.group, store.now, limit(room)),
        Waiting::read,
    )?;
    if due.len() < room {
        // Left by members that kept an order.
        due.extend(store.all(
            "SELECT seq, attempt, deliveries, redrives FROM pending WHERE grp = ?1 AND state = 2 LIMIT ?2",
            (cursor.source.group, limit(room - due.len())),
            Waiting::read,
        )?);
    }
    for waiting in due {
        if fetched.full(max) {
            fetched.more = true;
            break;
        }
        take_waiting(store, cursor, &waiting, fetched)?;
    }
    Ok(())
}

/// Hands out a message that waits in `pending`.
pub(crate) fn take_waiting(
    store: &Store<'_>,
    cursor: &Cursor<'_>,
    waiting: &Waiting,
    fetched: &mut Fetched,
) -> Step<()> {
    store.run(
        "UPDATE pending SET state = 1, due_at = ?3, claim = ?4, deliveries = ?5, first_at = coalesce(first_at, ?6)
         WHERE grp = ?1 AND seq = ?2",
        (cursor.source.group, waiting.seq, cursor.lease_until, cursor.claim, waiting.deliveries + 1, store.now),
    )?;
    let mut statement = store.prepare(&format!("SELECT {COLUMNS} FROM messages WHERE id = ?1"))?;
    let mut rows = statement.query([row_id(cursor.source.dest, waiting.seq)])?;
    let row = rows.next()?.ok_or_else(|| crate::error::damaged(format!("message {} is missing", waiting.seq)))?;
    let stored = fetched.shelf.message(row, &cursor.source.destination)?;
    fetched.hand_out(cursor, stored, waiting.attempt, waiting.deliveries + 1);
    Ok(())
}

/// Hands out a run of fresh messages: one claim, whatever its length.
fn fresh(store: &Store<'_>, cursor: &mut Cursor<'_>, max: usize, exceptions: bool, fetched: &mut Fetched) -> Step<()> {
    let (dest, group) = (cursor.source.dest, cursor.source.group);
    let ahead = if exceptions { done_ahead(store, cursor)? } else { Vec::new() };
    let mut statement =
        store.prepare(&format!("SELECT {COLUMNS} FROM messages WHERE id >= ?1 AND id < ?2 ORDER BY id"))?;
    let mut rows = statement.query([row_id(dest, cursor.at), row_id(dest + 1, 0)])?;
    let mut run: Option<(i64, i64)> = None;
    let mut skipped: Vec<i64> = Vec::new();
    while !fetched.full(max) {
        if cursor.budget == 0 {
            fetched.more = true;
            break;
        }
        let Some(row) = rows.next()? else { break };
        let stored = fetched.shelf.message(row, &cursor.source.destination)?;
        let seq = sequence(stored.row);
        cursor.at = seq + 1;
        if ahead.binary_search(&seq).is_ok() || set_aside(store, cursor, &stored, Order::None)? {
            cursor.budget -= 1;
            skipped.push(seq);
            continue;
        }
        run = Some((run.map_or(seq, |(first, _)| first), seq));
        fetched.hand_out(cursor, stored, 1, 1);
    }
    forget_done_ahead(store, cursor, !ahead.is_empty())?;
    if let Some((first, last)) = run {
        skipped.retain(|seq| (first..=last).contains(seq));
        let open = last - first + 1 - i64::try_from(skipped.len()).unwrap_or(0);
        let done = (!skipped.is_empty()).then(|| {
            let mut bits = Bits::new(first, last, None);
            skipped.iter().for_each(|seq| bits.set(*seq));
            bits.into_bytes()
        });
        store.run(
            "INSERT INTO claims (id, grp, first, last, open, lease_until, claimed_at, done)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            (cursor.claim, group, first, last, open, cursor.lease_until, store.now, done),
        )?;
    }
    Ok(())
}

/// Sequences from the cursor on that are not fresh: settled already, or put back before the cursor came by.
pub(crate) fn done_ahead(store: &Store<'_>, cursor: &Cursor<'_>) -> Step<Vec<i64>> {
    let ahead = store.all(
        "SELECT seq FROM pending WHERE grp = ?1 AND seq >= ?2 ORDER BY seq LIMIT ?3",
        (cursor.source.group, cursor.at, limit(EXAMINED * 2)),
        |row| row.get::<_, i64>(0),
    )?;
    Ok(ahead)
}

/// The marks of what was settled ahead of the cursor go when it has passed them.
pub(crate) fn forget_done_ahead(store: &Store<'_>, cursor: &Cursor<'_>, any: bool) -> Step<()> {
    if any {
        store.run("DELETE FROM pending WHERE grp = ?1 AND state = 3 AND seq < ?2", (cursor.source.group, cursor.at))?;
    }
    Ok(())
}

/// A fresh message that cannot be handed out now: it expired, or is held back. Tells whether it was set aside.
pub(crate) fn set_aside(store: &Store<'_>, cursor: &Cursor<'_>, stored: &Stored, order: Order) -> Step<bool> {
    let (seq, group) = (sequence(stored.row), cursor.source.group);
    if stored.expires_at.is_some_and(|expires_at| expires_at <= store.now) {
        // Nobody has failed it: its key goes on.
        bury(store, cursor.source, &Death::new(seq, Verdict::new(Reason::Expired), 0))?;
        return Ok(true);
    }
    let Some(due_at) = stored.due_at.filter(|due_at| *due_at > store.now) else { return Ok(false) };
    store.run(
        "INSERT INTO pending (grp, seq, state, due_at, lane, claim, attempt, deliveries, redrives)
         VALUES (?1, ?2, 0, ?3, ?4, 0, 1, 0, 0)",
        (group, seq, due_at, lane(order, stored.message.key())),
    )?;
    Ok(true)
}

/// Gives back what members did not settle within their leases: crashed ones, slow ones.
pub(crate) fn end_leases(store: &Store<'_>, order: Order, source: &Source) -> Step<()> {
    let ended =
        store.all("SELECT id FROM claims WHERE grp = ?1 AND lease_until <= ?2", (source.group, store.now), |row| {
            row.get::<_, i64>(0)
        })?;
    for claim in &ended {
        return_claim(store, order, source, *claim, 1)?;
    }
    store.run(
        "UPDATE pending SET state = 0, claim = 0, due_at = ?3 WHERE grp = ?1 AND state = 1 AND due_at <= ?2",
        (source.group, store.now, store.at_once()),
    )?;
    Ok(())
}

/// Everything of a claim that is not settled waits again, at once; `deliveries` is what the hand-over counts.
pub(crate) fn return_claim(store: &Store<'_>, order: Order, source: &Source, claim: i64, deliveries: u32) -> Step<()> {
    let run = store.one("SELECT first, last, claimed_at, done FROM claims WHERE id = ?1", [claim], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?, row.get::<_, Option<Vec<u8>>>(3)?))
    })?;
    let Some((first, last, claimed_at, done)) = run else { return Ok(()) };
    let bits = Bits::new(first, last, done);
    for seq in (first..=last).filter(|seq| !bits.is_set(*seq)) {
        let lane = store.lane_of(order, source.dest, seq)?;
        store.run(
            "INSERT INTO pending (grp, seq, state, due_at, lane, claim, attempt, deliveries, redrives, first_at)
             VALUES (?1, ?2, 0, ?3, ?4, 0, 1, ?5, 0, ?6)",
            (source.group, seq, store.at_once(), lane, deliveries, claimed_at),
        )?;
    }
    store.run("DELETE FROM claims WHERE id = ?1", [claim])?;
    Ok(())
}

/// Messages whose time to live has ended become dead letters, unless somebody has them at the moment.
pub(crate) fn sweep(
    store: &Store<'_>,
    source: &Source,
    cursor: i64,
    swept: i64,
    (order, on_failure): (Order, OnFailure),
) -> Step<()> {
    let expired = store.all(
        "SELECT id, expires_at FROM messages
         WHERE id >> 40 = ?1 AND expires_at IS NOT NULL AND expires_at > ?2 AND expires_at <= ?3 ORDER BY expires_at",
        (source.dest, swept, store.now),
        |row| Ok((sequence(row.get(0)?), row.get::<_, i64>(1)?)),
    )?;
    if expired.is_empty() {
        return Ok(());
    }
    let mut mark = store.now;
    for (seq, expires_at) in expired {
        let row = store.one(
            "SELECT state, attempt, redrives, first_at FROM pending WHERE grp = ?1 AND seq = ?2",
            (source.group, seq),
            |row| Ok((row.get::<_, i64>(0)?, row.get::<_, u32>(1)?, row.get::<_, i64>(2)?, row.get(3)?)),
        )?;
        let mut death = Death::new(seq, Verdict::new(Reason::Expired), 0);
        match row {
            Some((1, ..)) => mark = mark.min(expires_at - 1),
            // A letter that was put back must not die at once.
            Some((3, ..) | (_, _, 1.., _)) => {}
            Some((_, attempt, _, first_at)) => {
                death.attempts = attempt - 1;
                death.first_at = first_at;
                store.run("DELETE FROM pending WHERE grp = ?1 AND seq = ?2", (source.group, seq))?;
                bury(store, source, &death)?;
                // What waited behind it in its lane need not wait any more.
                if let Some(lane) = store.lane_of(order, source.dest, seq)?.filter(|_| order != Order::None) {
                    lanes::advance(store, source, lane, on_failure)?;
                }
            }
            None if seq >= cursor => {
                bury(store, source, &death)?;
                store.run(
                    "INSERT INTO pending (grp, seq, state, due_at, claim, attempt, deliveries, redrives)
                     VALUES (?1, ?2, 3, 0, 0, 1, 0, 0)",
                    (source.group, seq),
                )?;
            }
            None if is_claimed(store, source.group, seq)? => mark = mark.min(expires_at - 1),
            None => {}
        }
    }
    if mark > swept {
        store.run("UPDATE consumers SET swept = ?2 WHERE id = ?1", (source.group, mark))?;
    }
    Ok(())
}

fn is_claimed(store: &Store<'_>, group: i64, seq: i64) -> Step<bool> {
    let claims = store.all(
        "SELECT first, last, done FROM claims WHERE grp = ?1 AND first <= ?2 AND last >= ?2",
        (group, seq),
        |row| Ok(Bits::new(row.get(0)?, row.get(1)?, row.get(2)?)),
    )?;
    Ok(claims.iter().any(|bits| !bits.is_set(seq)))
}

/// When something falls due in a group by time alone, after now; `i64::MAX` for never.
pub(crate) fn next_due(store: &Store<'_>, source: &Source) -> Step<i64> {
    let mut next = i64::MAX;
    for sql in [
        "SELECT min(lease_until) FROM claims WHERE grp = ?1 AND lease_until > ?2",
        "SELECT min(due_at) FROM pending WHERE grp = ?1 AND state = 0 AND due_at > ?2",
        "SELECT min(due_at) FROM pending WHERE grp = ?1 AND state = 1 AND due_at > ?2",
    ] {
        if let found @ 1.. = store.number(sql, (source.group, store.now))? {
            next = next.min(found);
        }
    }
    let expiry = "SELECT min(expires_at) FROM messages
                  WHERE id >> 40 = ?1 AND expires_at IS NOT NULL AND expires_at > ?2";
    if let found @ 1.. = store.number(expiry, (source.dest, store.now))? {
        next = next.min(found);
    }
    Ok(next)
}

/// Which messages of a claim are settled.
#[derive(Debug)]
pub(crate) struct Bits {
    first: i64,
    bytes: Vec<u8>,
}

impl Bits {
    pub(crate) fn new(first: i64, last: i64, bytes: Option<Vec<u8>>) -> Self {
        let length = usize::try_from(last - first).unwrap_or(0) / 8 + 1;
        let mut bytes = bytes.unwrap_or_default();
        bytes.resize(length, 0);
        Self { first, bytes }
    }

    pub(crate) fn set(&mut self, seq: i64) {
        let (byte, bit) = self.place(seq);
        self.bytes[byte] |= bit;
    }

    pub(crate) fn is_set(&self, seq: i64) -> bool {
        let (byte, bit) = self.place(seq);
        self.bytes.get(byte).is_none_or(|found| found & bit != 0)
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn place(&self, seq: i64) -> (usize, u8) {
        let offset = usize::try_from(seq - self.first).unwrap_or(usize::MAX / 16);
        (offset / 8, 1 << (offset % 8))
    }
}
