//! Handing out in order. Everything that is handed out under an order stands in `pending` with its lane, so that
//! every process sees which member has a lane, and what waits in it.

use std::collections::{HashMap, HashSet};

use anybroker_core::{OnFailure, Order, Reason, Verdict};

use crate::dead_letter::{Death, bury};
use crate::error::Step;
use crate::fetch::{self, Cursor, EXAMINED, Fetched, Waiting, set_aside, take_waiting};
use crate::member::{Member, Source};
use crate::schema::{row_id, sequence};
use crate::store::{COLUMNS, Store, lane, limit};

/// What a member may do with fresh messages of a lane.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    /// Take them.
    Open,
    /// Leave them: another member has the lane, or something in front waits.
    Closed,
    /// Bury them: the lane is parked behind a dead letter.
    Parked,
}

/// Hands out what waits and what is fresh, keeping the order of each lane.
pub(crate) fn ordered(
    store: &Store<'_>,
    member: &Member,
    cursor: &mut Cursor<'_>,
    max: usize,
    fetched: &mut Fetched,
) -> Step<()> {
    let begin = fetched.ready.len();
    let mut gates = HashMap::new();
    if member.order == Order::Total && claimed_by_others(store, member, cursor.source)? {
        return Ok(());
    }
    let share = begin + fetch::waiting_share(max - begin, cursor.turn);
    waiting(store, member, cursor, share, &mut gates, fetched)?;
    if !fetched.full(max) {
        fresh(store, member, cursor, max, &mut gates, fetched)?;
    }
    if !fetched.full(max) && share < max {
        waiting(store, member, cursor, max, &mut gates, fetched)?;
    }
    fetched.ready[begin..].sort_by_key(|ready| ready.facts.position);
    Ok(())
}

/// Hands out what waits: what is due, and what is queued in lanes that are this member's.
fn waiting(
    store: &Store<'_>,
    member: &Member,
    cursor: &mut Cursor<'_>,
    max: usize,
    gates: &mut HashMap<i64, Gate>,
    fetched: &mut Fetched,
) -> Step<()> {
    let most = limit(max.saturating_add(EXAMINED));
    let mut candidates = store.all(
        "SELECT seq, attempt, deliveries, redrives, lane FROM pending
         WHERE grp = ?1 AND state = 0 AND due_at <= ?2 ORDER BY due_at, seq LIMIT ?3",
        (cursor.source.group, store.now, most),
        |row| Ok((Waiting::read(row)?, row.get::<_, Option<i64>>(4)?)),
    )?;
    candidates.extend(store.all(
        "SELECT seq, attempt, deliveries, redrives, lane FROM pending
         WHERE grp = ?1 AND state = 2 AND due_at = ?2 LIMIT ?3",
        (cursor.source.group, member.id, most),
        |row| Ok((Waiting::read(row)?, row.get::<_, Option<i64>>(4)?)),
    )?);
    let mut walked = HashSet::new();
    for (waiting, lane) in candidates {
        if fetched.full(max) {
            fetched.more = true;
            break;
        }
        match lane {
            None => take_waiting(store, cursor, &waiting, fetched)?,
            Some(lane) if walked.insert(lane) => {
                let gate = walk(store, member, cursor, lane, max, fetched)?;
                gates.insert(lane, gate);
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Members without an order claim runs; under total order nobody goes past those of others.
fn claimed_by_others(store: &Store<'_>, member: &Member, source: &Source) -> Step<bool> {
    let (from, to) = member.claim_range();
    let found = store.number(
        "SELECT 1 FROM claims WHERE grp = ?1 AND NOT (id >= ?2 AND id < ?3) LIMIT 1",
        (source.group, from, to),
    )?;
    Ok(found == 1)
}

/// Takes what waits in a lane, in order, as far as it goes.
fn walk(
    store: &Store<'_>,
    member: &Member,
    cursor: &mut Cursor<'_>,
    lane: i64,
    max: usize,
    fetched: &mut Fetched,
) -> Step<Gate> {
    let group = cursor.source.group;
    // Who finds the lane by its mark settles whose mark it is now.
    store.run(
        "UPDATE pending SET due_at = 0 WHERE grp = ?1 AND state = 2 AND due_at = ?3 AND lane = ?2",
        (group, lane, member.id),
    )?;
    if let Some(holder) = holder(store, group, lane)?.filter(|claim| !member.owns(*claim)) {
        queue_behind(store, group, lane, -1)?;
        stamp(store, group, lane, Member::of_claim(holder))?;
        return Ok(Gate::Closed);
    }
    let strict = member.on_failure != OnFailure::GoPast;
    let first_letter = first_letter(store, member, group, lane)?;
    // Under a strict policy nothing goes past a message that failed before it is settled for good.
    let mut barrier = if strict { failed_out(store, group, lane)? } else { None };
    for (waiting, due) in in_line(store, group, lane, max)? {
        if fetched.full(max) || cursor.budget == 0 {
            fetched.more = true;
            if holder(store, group, lane)?.is_some() {
                stamp(store, group, lane, member.id)?;
            }
            return Ok(Gate::Closed);
        }
        if barrier.is_some_and(|barrier| barrier < waiting.seq) {
            queue_behind(store, group, lane, waiting.seq - 1)?;
            return Ok(Gate::Closed);
        }
        let failed = strict && waiting.attempt > 1;
        if !due {
            barrier = nearest(barrier, failed, waiting.seq);
            continue;
        }
        match first_letter.filter(|first| *first < waiting.seq) {
            // A letter that was put back waits for those in front of it; everything else follows them.
            Some(_) if waiting.redrives > 0 => {
                queue_behind(store, group, lane, waiting.seq - 1)?;
                return Ok(Gate::Parked);
            }
            Some(_) => {
                cursor.budget -= 1;
                park_waiting(store, cursor.source, lane, &waiting)?;
            }
            None => {
                take_waiting(store, cursor, &waiting, fetched)?;
                barrier = nearest(barrier, failed, waiting.seq);
            }
        }
    }
    gate(store, member, cursor.source, lane)
}

/// The first message that failed, of those known so far and this one: what is out may stand further behind.
fn nearest(barrier: Option<i64>, failed: bool, seq: i64) -> Option<i64> {
    if failed { Some(barrier.map_or(seq, |barrier| barrier.min(seq))) } else { barrier }
}

/// What waits in a lane in the order of its sequence: with a time (due or not), and queued behind others.
fn in_line(store: &Store<'_>, group: i64, lane: i64, max: usize) -> Step<Vec<(Waiting, bool)>> {
    let most = limit(max.saturating_add(EXAMINED));
    let mut line = Vec::new();
    for state in [0, 2] {
        line.extend(store.all(
            "SELECT seq, attempt, deliveries, redrives, due_at FROM pending
             WHERE grp = ?1 AND lane = ?2 AND state = ?3 ORDER BY seq LIMIT ?4",
            (group, lane, state, most),
            |row| Ok((Waiting::read(row)?, row.get::<_, i64>(4)? <= store.now)),
        )?);
    }
    line.sort_by_key(|(waiting, _)| waiting.seq);
    Ok(line)
}

/// A claim that holds the lane.
fn holder(store: &Store<'_>, group: i64, lane: i64) -> Step<Option<i64>> {
    Ok(store.one(
        "SELECT claim FROM pending WHERE grp = ?1 AND lane = ?2 AND state = 1 LIMIT 1",
        (group, lane),
        |row| row.get(0),
    )?)
}

/// The first message of a lane that is out and has failed before.
fn failed_out(store: &Store<'_>, group: i64, lane: i64) -> Step<Option<i64>> {
    let found = store.one(
        "SELECT min(seq) FROM pending WHERE grp = ?1 AND lane = ?2 AND state = 1 AND attempt > 1",
        (group, lane),
        |row| row.get::<_, Option<i64>>(0),
    )?;
    Ok(found.flatten())
}

/// Tells the member that holds a lane that something is queued in it: it finds the first by its own number.
fn stamp(store: &Store<'_>, group: i64, lane: i64, member: i64) -> Step<()> {
    store.run(
        "UPDATE pending SET due_at = ?3 WHERE grp = ?1 AND state = 2 AND due_at <> ?3 AND seq =
             (SELECT seq FROM pending WHERE grp = ?1 AND lane = ?2 AND state = 2 ORDER BY seq LIMIT 1)",
        (group, lane, member),
    )?;
    Ok(())
}

/// Under `Park`: the first letter that the lane is parked behind.
fn first_letter(store: &Store<'_>, member: &Member, group: i64, lane: i64) -> Step<Option<i64>> {
    if member.on_failure != OnFailure::Park {
        return Ok(None);
    }
    let found = store.one("SELECT min(seq) FROM letters WHERE grp = ?1 AND lane = ?2", (group, lane), |row| {
        row.get::<_, Option<i64>>(0)
    })?;
    Ok(found.flatten())
}

/// What is due behind `after` cannot go: it waits for its lane instead of being looked at by every fetch.
fn queue_behind(store: &Store<'_>, group: i64, lane: i64, after: i64) -> Step<()> {
    store.run(
        "UPDATE pending SET state = 2, due_at = 0
         WHERE grp = ?1 AND lane = ?2 AND seq > ?3 AND state = 0 AND due_at <= ?4",
        (group, lane, after, store.now),
    )?;
    Ok(())
}

/// What waits in parked lanes follows its letters, whether or not anybody receives.
pub(crate) fn park(store: &Store<'_>, source: &Source) -> Step<()> {
    let followers = store.all(
        "SELECT p.seq, p.attempt, p.deliveries, p.redrives, p.lane FROM pending p
         WHERE p.grp = ?1 AND p.state IN (0, 2) AND p.lane IS NOT NULL AND p.redrives = 0 AND EXISTS
             (SELECT 1 FROM letters l WHERE l.grp = p.grp AND l.lane = p.lane AND l.seq < p.seq)
         ORDER BY p.seq",
        [source.group],
        |row| Ok((Waiting::read(row)?, row.get::<_, i64>(4)?)),
    )?;
    for (waiting, lane) in followers {
        park_waiting(store, source, lane, &waiting)?;
    }
    Ok(())
}

fn park_waiting(store: &Store<'_>, source: &Source, lane: i64, waiting: &Waiting) -> Step<()> {
    let first_at = store.one(
        "DELETE FROM pending WHERE grp = ?1 AND seq = ?2 RETURNING first_at",
        (source.group, waiting.seq),
        |row| row.get::<_, Option<i64>>(0),
    )?;
    let death = Death {
        lane: Some(lane),
        redrives: waiting.redrives,
        first_at: first_at.flatten(),
        ..Death::new(waiting.seq, Verdict::new(Reason::Parked), waiting.attempt - 1)
    };
    bury(store, source, &death)
}

/// What fresh messages of a lane meet.
fn gate(store: &Store<'_>, member: &Member, source: &Source, lane: i64) -> Step<Gate> {
    let group = source.group;
    if first_letter(store, member, group, lane)?.is_some() {
        return Ok(Gate::Parked);
    }
    if holder(store, group, lane)?.is_some_and(|claim| !member.owns(claim)) {
        return Ok(Gate::Closed);
    }
    let queued = "SELECT 1 FROM pending WHERE grp = ?1 AND lane = ?2 AND state = 2 LIMIT 1";
    let returned = "SELECT 1 FROM pending WHERE grp = ?1 AND lane = ?2 AND state = 0 AND due_at <= ?3
                    AND (attempt = 1 OR ?4) LIMIT 1";
    let failed = "SELECT 1 FROM pending WHERE grp = ?1 AND lane = ?2 AND state IN (0, 1) AND attempt > 1 LIMIT 1";
    let strict = member.on_failure != OnFailure::GoPast;
    let closed = store.number(queued, (group, lane))? == 1
        || store.number(returned, (group, lane, store.now, strict))? == 1
        || (strict && store.number(failed, (group, lane))? == 1);
    Ok(if closed { Gate::Closed } else { Gate::Open })
}

fn fresh(
    store: &Store<'_>,
    member: &Member,
    cursor: &mut Cursor<'_>,
    max: usize,
    gates: &mut HashMap<i64, Gate>,
    fetched: &mut Fetched,
) -> Step<()> {
    let (dest, group) = (cursor.source.dest, cursor.source.group);
    let ahead = fetch::done_ahead(store, cursor)?;
    let mut insert = store.prepare(
        "INSERT INTO pending (grp, seq, state, due_at, lane, claim, attempt, deliveries, redrives, first_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7, 0, ?8)",
    )?;
    let mut statement =
        store.prepare(&format!("SELECT {COLUMNS} FROM messages WHERE id >= ?1 AND id < ?2 ORDER BY id"))?;
    let mut rows = statement.query([row_id(dest, cursor.at), row_id(dest + 1, 0)])?;
    while !fetched.full(max) {
        if cursor.budget == 0 {
            fetched.more = true;
            break;
        }
        let Some(row) = rows.next()? else { break };
        let stored = fetched.shelf.message(row, &cursor.source.destination)?;
        let seq = sequence(stored.row);
        let lane = lane(member.order, stored.message.key());
        let gate = match lane {
            None => Gate::Open,
            Some(lane) => match gates.get(&lane) {
                Some(gate) => *gate,
                None => {
                    let gate = gate(store, member, cursor.source, lane)?;
                    gates.insert(lane, gate);
                    gate
                }
            },
        };
        if gate == Gate::Closed && member.order == Order::Total && ahead.binary_search(&seq).is_err() {
            break; // Nothing behind it can go either.
        }
        cursor.at = seq + 1;
        if ahead.binary_search(&seq).is_ok() || set_aside(store, cursor, &stored, member.order)? {
            cursor.budget -= 1;
        } else if gate == Gate::Open {
            insert.execute((group, seq, 1, cursor.lease_until, lane, cursor.claim, 1, store.now))?;
            fetched.hand_out(cursor, stored, 1, 1);
        } else if gate == Gate::Parked {
            cursor.budget -= 1;
            let death = Death { lane, ..Death::new(seq, Verdict::new(Reason::Parked), 0) };
            bury(store, cursor.source, &death)?;
        } else {
            cursor.budget -= 1;
            insert.execute((group, seq, 2, 0, lane, 0, 0, None::<i64>))?;
            if let Some(lane) = lane
                && let Some(claim) = holder(store, group, lane)?
            {
                stamp(store, group, lane, Member::of_claim(claim))?;
            }
        }
    }
    fetch::forget_done_ahead(store, cursor, !ahead.is_empty())
}

/// A message of a lane was settled or came back: the next that is queued in it may go, unless the lane is still
/// held, or something that failed waits in front.
pub(crate) fn advance(store: &Store<'_>, source: &Source, lane: i64, on_failure: OnFailure) -> Step<()> {
    let group = source.group;
    let queued = store.one(
        "SELECT seq FROM pending WHERE grp = ?1 AND lane = ?2 AND state = 2 ORDER BY seq LIMIT 1",
        (group, lane),
        |row| row.get::<_, i64>(0),
    )?;
    let Some(seq) = queued else { return Ok(()) };
    let held = "SELECT 1 FROM pending WHERE grp = ?1 AND lane = ?2 AND state = 1 LIMIT 1";
    if store.number(held, (group, lane))? == 1 {
        return Ok(());
    }
    // In front of what failed nothing has to wait.
    let failed =
        "SELECT 1 FROM pending WHERE grp = ?1 AND lane = ?2 AND state = 0 AND attempt > 1 AND seq < ?3 LIMIT 1";
    if on_failure != OnFailure::GoPast && store.number(failed, (group, lane, seq))? == 1 {
        return Ok(());
    }
    store
        .run("UPDATE pending SET state = 0, due_at = ?3 WHERE grp = ?1 AND seq = ?2", (group, seq, store.at_once()))?;
    store.touch_group(group);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_stable_and_keys_keep_off_the_total_lane() {
        // Stored in files: these values must never change.
        assert_eq!(lane(Order::Total, Some(b"k")), Some(0));
        assert_eq!(lane(Order::Key, None), None);
        assert_eq!(lane(Order::Key, Some(b"order-17")), lane(Order::None, Some(b"order-17")));
        assert_ne!(lane(Order::Key, Some(b"")), Some(0));
    }
}
