//! Dead letters: references to messages that a group will not see again, unless they are redriven.

use anybroker_core::{
    ByteString, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Error, ErrorKind, OnFailure, Position,
    Reason, Result, Timestamp, Verdict,
};

use crate::error::{Step, damaged};
use crate::member::Source;
use crate::schema::sequence;
use crate::store::{COLUMNS, Shelf, Store, limit};
use crate::{fetch, lanes, retention, topology};

/// How many letters one page holds at most.
const PAGE: usize = 1_000;

/// A message that becomes a dead letter.
pub(crate) struct Death {
    pub(crate) seq: i64,
    /// Set when its lane is to be parked behind it.
    pub(crate) lane: Option<i64>,
    pub(crate) verdict: Verdict,
    pub(crate) attempts: u32,
    pub(crate) redrives: u32,
    pub(crate) first_at: Option<i64>,
}

impl Death {
    pub(crate) fn new(seq: i64, verdict: Verdict, attempts: u32) -> Self {
        Self { seq, lane: None, verdict, attempts, redrives: 0, first_at: None }
    }
}

/// Stores a letter. Its source is settled in the same transaction: there are both, or neither.
pub(crate) fn bury(store: &Store<'_>, source: &Source, death: &Death) -> Step<()> {
    store.run(
        "INSERT INTO letters (grp, seq, lane, reason, error_type, detail, attempts, first_at, last_at, redrives)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        (
            source.group,
            death.seq,
            death.lane,
            death.verdict.reason.as_str(),
            death.verdict.error_type.as_deref(),
            death.verdict.detail.as_deref(),
            death.attempts,
            death.first_at,
            store.now,
            death.redrives,
        ),
    )?;
    Ok(())
}

/// Reads a page of letters, after giving those their due whose time to live has ended.
pub(crate) fn page(store: &Store<'_>, scope: &DeadLetterScope, from: Option<i64>, max: usize) -> Step<DeadLetterPage> {
    let source = topology::find(store, &scope.source, &scope.group, "dead letters")?;
    sweep(store, &source)?;
    let max = max.clamp(1, PAGE);
    let mut shelf = Shelf::default();
    let mut statement = store.prepare(&format!(
        "SELECT {COLUMNS}, l.id, l.reason, l.error_type, l.detail, l.attempts, l.first_at, l.last_at, l.redrives
         FROM letters l JOIN messages m ON m.id = (?1 << 40 | l.seq)
         WHERE l.grp = ?2 AND l.id >= ?3 ORDER BY l.id LIMIT ?4",
        COLUMNS = COLUMNS.split(", ").map(|column| format!("m.{column}")).collect::<Vec<_>>().join(", ")
    ))?;
    let mut rows = statement.query((source.dest, source.group, from.unwrap_or(0), limit(max + 1)))?;
    let mut page = DeadLetterPage::default();
    while let Some(row) = rows.next()? {
        let id = DeadLetterId(row.get::<_, i64>(10)?.to_string().into());
        if page.letters.len() == max {
            page.next = Some(id);
            break;
        }
        let stored = shelf.message(row, &source.destination)?;
        let text = |column| Ok::<_, rusqlite::Error>(row.get::<_, Option<String>>(column)?.map(ByteString::from));
        page.letters.push(DeadLetter {
            id,
            message: stored.message,
            group: scope.group.clone(),
            reason: Reason::from(row.get::<_, String>(11)?.as_str()),
            error_type: text(12)?,
            detail: text(13)?,
            attempts: row.get(14)?,
            first_at: row.get::<_, Option<i64>>(15)?.map(Timestamp::from_millis),
            last_at: Timestamp::from_millis(row.get(16)?),
            redrives: row.get(17)?,
            position: Some(Position::new(sequence(stored.row).cast_unsigned())),
        });
    }
    Ok(page)
}

/// What expired is a dead letter, whether or not anybody receives.
pub(crate) fn sweep(store: &Store<'_>, source: &Source) -> Step<()> {
    let policy = topology::policy(store, source)?;
    fetch::end_leases(store, policy.0, source)?;
    let found = store.one("SELECT cursor, swept FROM consumers WHERE id = ?1", [source.group], |row| {
        Ok((row.get(0)?, row.get(1)?))
    })?;
    let (cursor, swept) = found.ok_or_else(|| damaged("a group that was found is missing"))?;
    fetch::sweep(store, source, cursor, swept, policy)?;
    if policy.1 == OnFailure::Park {
        lanes::park(store, source)?;
    }
    Ok(())
}

/// The number in a letter's id; ids of other adapters have none.
pub(crate) fn number(id: &DeadLetterId) -> Option<i64> {
    id.0.parse().ok()
}

/// Puts letters back to their group: attempt 1, the order of their sequence.
pub(crate) fn redrive(store: &Store<'_>, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Step<Vec<Result<()>>> {
    let source = match topology::find(store, &scope.source, &scope.group, "redrive") {
        Err(crate::error::Fault::Broker(error)) => return Ok(ids.iter().map(|_| Err(error.duplicate())).collect()),
        found => found?,
    };
    let (order, _) = topology::policy(store, &source)?;
    each(store, &source, ids, "redrive", |letter| {
        // The order of a parked lane is kept: what is in front goes first.
        let earlier = "SELECT 1 FROM letters WHERE grp = ?1 AND lane = ?2 AND seq < ?3 LIMIT 1";
        if store.number(earlier, (source.group, letter.lane, letter.seq))? == 1 {
            let text = "an earlier letter of this key is still in the queue; redrive or purge that one first";
            return Ok(Err(Error::new(ErrorKind::Unavailable, "redrive", text)));
        }
        let lane = store.lane_of(order, source.dest, letter.seq)?;
        store.run(
            "INSERT INTO pending (grp, seq, state, due_at, lane, claim, attempt, deliveries, redrives)
             VALUES (?1, ?2, 0, ?3, ?4, 0, 1, 0, ?5)
             ON CONFLICT DO UPDATE SET state = 0, due_at = ?3, lane = ?4, attempt = 1, deliveries = 0, redrives = ?5",
            (source.group, letter.seq, store.at_once(), lane, letter.redrives + 1),
        )?;
        Ok(Ok(()))
    })
}

/// Deletes letters.
pub(crate) fn purge(store: &Store<'_>, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Step<Vec<Result<()>>> {
    let source = match topology::find(store, &scope.source, &scope.group, "purge") {
        Err(crate::error::Fault::Broker(error)) => return Ok(ids.iter().map(|_| Err(error.duplicate())).collect()),
        found => found?,
    };
    each(store, &source, ids, "purge", |_| Ok(Ok(())))
}

/// A letter that leaves the queue.
struct Leaving {
    seq: i64,
    lane: Option<i64>,
    redrives: u32,
}

/// Takes letters out of the queue, each after `work` has agreed.
fn each(
    store: &Store<'_>,
    source: &Source,
    ids: &[DeadLetterId],
    operation: &'static str,
    mut work: impl FnMut(&Leaving) -> Step<Result<()>>,
) -> Step<Vec<Result<()>>> {
    let mut outcomes = Vec::with_capacity(ids.len());
    for id in ids {
        let found = store.one(
            "SELECT seq, lane, redrives FROM letters WHERE id = ?1 AND grp = ?2",
            (number(id), source.group),
            |row| Ok(Leaving { seq: row.get(0)?, lane: row.get(1)?, redrives: row.get(2)? }),
        )?;
        let Some(letter) = found else {
            let text = "the dead letter is gone; it was redriven or purged already";
            outcomes.push(Err(Error::new(ErrorKind::NotFound, operation, text).with("id", id)));
            continue;
        };
        let agreed = work(&letter)?;
        if agreed.is_ok() {
            store.run("DELETE FROM letters WHERE id = ?1", [number(id)])?;
            retention::release(store, source.dest, letter.seq)?;
            if let Some(lane) = letter.lane {
                lanes::advance(store, source, lane, OnFailure::Park)?;
            }
        }
        outcomes.push(agreed.map_err(|error| error.with("id", id)));
    }
    store.touch_group(source.group);
    Ok(outcomes)
}
