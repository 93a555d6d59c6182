//! Deleting what every group is done with, beyond what is kept for replay.

use crate::clock::millis;
use crate::error::Step;
use crate::schema::row_id;
use crate::store::Store;

/// How many messages one transaction deletes.
const STEP: i64 = 4_096;

/// After that many settled messages of a destination it is worth looking.
pub(crate) const WORTH: usize = 1_024;

/// Deletes the oldest messages of a destination that nobody needs any more; tells whether there are more.
pub(crate) fn trim(store: &Store<'_>, dest: i64) -> Step<bool> {
    let found = store.one("SELECT low, next FROM destinations WHERE id = ?1", [dest], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
    })?;
    let Some((low, next)) = found else { return Ok(false) };
    // Below this every group is done with everything, apart from single rows that wait or are dead letters.
    let done =
        store.one("SELECT min(cursor) FROM consumers WHERE dest = ?1", [dest], |row| row.get::<_, Option<i64>>(0))?;
    let Some(cursor) = done.flatten() else { return Ok(false) };
    let claimed = store.one(
        "SELECT min(first) FROM claims WHERE grp IN (SELECT id FROM consumers WHERE dest = ?1)",
        [dest],
        |row| row.get::<_, Option<i64>>(0),
    )?;
    let done = claimed.flatten().unwrap_or(i64::MAX).min(cursor);
    let kept = i64::try_from(store.settings.retention_messages).unwrap_or(i64::MAX);
    let mut target = next.saturating_sub(kept).min(done);
    if target < done {
        let since = store.now.saturating_sub(millis(store.settings.retention));
        target = target.max(first_since(store, dest, low, next, since)?.min(done));
    }
    if target <= low {
        return Ok(false);
    }
    let end = target.min(low + STEP);
    let mut begin = low;
    for pinned in pinned(store, dest, low, end)? {
        delete(store, dest, begin, pinned)?;
        begin = pinned + 1;
    }
    delete(store, dest, begin, end)?;
    store.run("UPDATE destinations SET low = ?2 WHERE id = ?1", (dest, end))?;
    Ok(end < target)
}

fn delete(store: &Store<'_>, dest: i64, from: i64, to: i64) -> Step<()> {
    if from < to {
        store.run("DELETE FROM messages WHERE id >= ?1 AND id < ?2", (row_id(dest, from), row_id(dest, to)))?;
    }
    Ok(())
}

/// Messages in that stretch that a group still has waiting or as dead letters, in order.
fn pinned(store: &Store<'_>, dest: i64, from: i64, to: i64) -> Step<Vec<i64>> {
    Ok(store.all(
        "SELECT seq FROM consumers c JOIN pending p ON p.grp = c.id AND p.seq >= ?2 AND p.seq < ?3 WHERE c.dest = ?1
         UNION SELECT seq FROM consumers c JOIN letters l ON l.grp = c.id AND l.seq >= ?2 AND l.seq < ?3
         WHERE c.dest = ?1 ORDER BY seq",
        (dest, from, to),
        |row| row.get(0),
    )?)
}

/// The first sequence in `low..next` that was stored at or after that moment; `next` when there is none.
pub(crate) fn first_since(store: &Store<'_>, dest: i64, low: i64, next: i64, since: i64) -> Step<i64> {
    // Sequences have no holes in there, and the moments never go back: the middle tells which half.
    let (mut low, mut high) = (low, next);
    while low < high {
        let middle = low + (high - low) / 2;
        let at = store
            .one("SELECT stored_at FROM messages WHERE id = ?1", [row_id(dest, middle)], |row| row.get::<_, i64>(0))?;
        if at.is_none_or(|at| at < since) { low = middle + 1 } else { high = middle }
    }
    Ok(low)
}

/// A single message is settled, or its letter purged: it goes when it was only kept for that.
pub(crate) fn release(store: &Store<'_>, dest: i64, seq: i64) -> Step<()> {
    let low = store.number("SELECT low FROM destinations WHERE id = ?1", [dest])?;
    if seq < low && pinned(store, dest, seq, seq + 1)?.is_empty() {
        delete(store, dest, seq, seq + 1)?;
    }
    Ok(())
}
