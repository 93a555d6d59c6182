//! The file: how it is opened, what is in it, and how older versions are brought up to date.
//!
//! A message is stored once, whatever the number of groups. Each group has a cursor into the log of its destination;
//! everything from the cursor on is fresh. Below the cursor a message is settled, unless it is named by
//!
//! - a *claim*: a run of fresh messages that was handed out together, with one bit for each that is settled, or
//! - a row of *pending*: one message that failed, is delayed, came back, or whose key's order must be kept.
//!
//! So publishing costs the same for any number of groups, and handing out or settling a batch touches one row.

use std::path::Path;
use std::time::{Duration, Instant};

use anybroker_core::{Effect, Error, ErrorKind, Result};
use rusqlite::{Connection, OpenFlags, TransactionBehavior};

use crate::config::{Durability, Settings};
use crate::error::{Fault, cannot_open, failed};

/// `AnyB`: tells our files from other applications' (<https://www.sqlite.org/pragma.html#pragma_application_id>).
const APPLICATION_ID: i64 = 0x416e_7942;

/// What each version adds; the version of a file is how many of these it has seen.
const MIGRATIONS: &[&str] = &["
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE destinations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    next INTEGER NOT NULL DEFAULT 0,      -- the sequence of the next message
    low INTEGER NOT NULL DEFAULT 0,       -- everything below is trimmed, apart from what letters and pending rows hold
    stored_at INTEGER NOT NULL DEFAULT 0  -- of the newest message: it never goes back within a destination
) STRICT;
CREATE TABLE consumers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    dest INTEGER NOT NULL,
    name TEXT NOT NULL,
    cursor INTEGER NOT NULL,              -- the first fresh sequence
    swept INTEGER NOT NULL DEFAULT 0,     -- messages that expired up to this moment are dead letters already
    policy INTEGER NOT NULL DEFAULT 0,    -- order (0 none, 1 key, 2 total) + 4 * on failure (0 go past, 1 block, 2 park)
    UNIQUE (dest, name)
) STRICT;
CREATE TABLE members (
    id INTEGER NOT NULL,
    grp INTEGER NOT NULL,
    pid INTEGER NOT NULL,                 -- of its process, and when that began: members of dead ones do not count
    born INTEGER NOT NULL,
    PRIMARY KEY (grp, id)
) STRICT, WITHOUT ROWID;
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,               -- destination << 40 | sequence
    mid ANY NOT NULL,                     -- 16 bytes of a UUID, or a text
    key BLOB,
    headers BLOB,
    content_type TEXT,
    timestamp INTEGER NOT NULL,
    stored_at INTEGER NOT NULL,
    due_at INTEGER,
    expires_at INTEGER,
    payload BLOB
) STRICT;
CREATE INDEX messages_due ON messages (id >> 40, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX messages_expiry ON messages (id >> 40, expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE claims (
    id INTEGER PRIMARY KEY,               -- member << 32 | number
    grp INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    open INTEGER NOT NULL,                -- how many are not settled
    lease_until INTEGER NOT NULL,
    claimed_at INTEGER NOT NULL,
    done BLOB                             -- a bit for each that is settled or moved to pending; NULL for none
) STRICT;
CREATE INDEX claims_lease ON claims (grp, lease_until);
CREATE TABLE pending (
    grp INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    state INTEGER NOT NULL,               -- 0 waits until due_at, 1 is out until due_at, 2 waits for its lane, 3 is done
    due_at INTEGER NOT NULL,
    lane INTEGER,
    claim INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    deliveries INTEGER NOT NULL,
    redrives INTEGER NOT NULL,
    first_at INTEGER,
    error_type TEXT,
    PRIMARY KEY (grp, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX pending_due ON pending (grp, state, due_at);
CREATE INDEX pending_lane ON pending (grp, lane, state, seq) WHERE lane IS NOT NULL;
CREATE TABLE letters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    grp INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    lane INTEGER,                         -- set when the lane is parked behind this letter
    reason TEXT NOT NULL,
    error_type TEXT,
    detail TEXT,
    attempts INTEGER NOT NULL,
    first_at INTEGER,
    last_at INTEGER NOT NULL,
    redrives INTEGER NOT NULL
) STRICT;
CREATE INDEX letters_group ON letters (grp, id);
CREATE INDEX letters_seq ON letters (grp, seq);
CREATE INDEX letters_lane ON letters (grp, lane, seq) WHERE lane IS NOT NULL;
"];

/// The version that this library writes.
pub(crate) const VERSION: i64 = MIGRATIONS.len() as i64;

/// How many bits of a message's row id its sequence has.
const SEQUENCE_BITS: u32 = 40;

/// The row id of a message.
pub(crate) fn row_id(dest: i64, seq: i64) -> i64 {
    dest << SEQUENCE_BITS | seq
}

/// The sequence in a row id.
pub(crate) fn sequence(row_id: i64) -> i64 {
    row_id & ((1 << SEQUENCE_BITS) - 1)
}

/// Opens the file, creating it where it is missing, and brings it up to date.
pub(crate) fn open(path: &Path, settings: &Settings) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_EXRESCODE;
    let connection = Connection::open_with_flags(path, flags).map_err(|error| cannot_open(path, error))?;
    prepare(connection, path, settings).map_err(|fault| match fault {
        Fault::Broker(error) => error.with("path", path.display()),
        Fault::Sqlite(error) => cannot_open(path, error),
    })
}

fn prepare(mut connection: Connection, path: &Path, settings: &Settings) -> Result<Connection, Fault> {
    wait_when_busy(&mut connection, settings.busy_timeout)?;
    // Nothing is written before it is known that the file is ours.
    let version = version_of(&connection)?;
    if connection.is_readonly("main")? {
        return Err(Error::new(ErrorKind::PermissionDenied, "connect", "the file is read-only; expected to write it")
            .with("path", path.display())
            .into());
    }
    connection.set_prepared_statement_cache_capacity(128);
    let synchronous = match settings.durability {
        Durability::Synced => "FULL",
        Durability::Grouped => "NORMAL",
        Durability::DangerUnsynced => "OFF",
    };
    connection.execute_batch("PRAGMA trusted_schema = OFF; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -16384;")?;
    enter_wal(&connection, settings.busy_timeout)?;
    connection.execute_batch(&format!("PRAGMA synchronous = {synchronous};"))?;
    if version < VERSION {
        migrate(&mut connection)?;
    }
    if let Some(bytes) = settings.max_file_size {
        let page: i64 = connection.query_row("PRAGMA page_size", [], |row| row.get(0))?;
        let pages = (i64::try_from(bytes).unwrap_or(i64::MAX) / page).max(1);
        connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
    }
    Ok(connection)
}

/// The file's version, 0 for an empty one; an error for a file that is not ours or is newer than we are.
fn version_of(connection: &Connection) -> Result<i64, Fault> {
    // One look: another process may make the file at this moment, and of two looks the first could be before that and the second behind.
    let (application, version, tables) = connection.query_row(
        "SELECT (SELECT application_id FROM pragma_application_id), (SELECT user_version FROM pragma_user_version),
            (SELECT count(*) FROM sqlite_schema)",
        [],
        |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?)),
    )?;
    if application != APPLICATION_ID && (version != 0 || tables != 0) {
        let text = "the file is another application's database; expected one of this broker, or none";
        return Err(Error::new(ErrorKind::Unexpected, "connect", text)
            .with("cause", "foreign_database")
            .with_effect(Effect::NotDone)
            .into());
    }
    if version > VERSION {
        let text = format!(
            "the file has schema version {version}, this library knows up to {VERSION}; use the version that wrote it"
        );
        return Err(Error::new(ErrorKind::Unexpected, "connect", text)
            .with("cause", "newer_schema")
            .with_effect(Effect::NotDone)
            .into());
    }
    Ok(version)
}

fn migrate(connection: &mut Connection) -> Result<(), Fault> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Another process may have done it while this one waited for the lock.
    let version = version_of(&transaction)?;
    for migration in MIGRATIONS.iter().skip(usize::try_from(version).unwrap_or(0)) {
        transaction.execute_batch(migration)?;
    }
    transaction
        .execute_batch(&format!("PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"))?;
    transaction.commit()?;
    Ok(())
}

/// The change of mode needs the file for itself for a moment, and SQLite does not always wait for that by itself
/// (<https://www.sqlite.org/wal.html#sometimes_queries_return_sqlite_busy_in_wal_mode>).
fn enter_wal(connection: &Connection, patience: Duration) -> Result<(), Fault> {
    let start = Instant::now();
    loop {
        match connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0)) {
            Ok(mode) if mode == "wal" => return Ok(()),
            Ok(mode) => {
                let text = format!("the file system cannot share memory (journal mode stays {mode}); use a local one");
                return Err(Error::new(ErrorKind::Unavailable, "connect", text).into());
            }
            Err(error) if failed(&error).is_some_and(|code| code == rusqlite::ErrorCode::DatabaseBusy) => {
                if start.elapsed() >= patience {
                    return Err(error.into());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// SQLite's own timeout waits up to 100 ms between tries, which is long beside a commit.
fn wait_when_busy(connection: &mut Connection, patience: Duration) -> rusqlite::Result<()> {
    let start = std::cell::Cell::new(Instant::now());
    connection.busy_handler(Some(move |tries: i32| {
        if tries == 0 {
            start.set(Instant::now());
        }
        if start.get().elapsed() >= patience {
            return false;
        }
        std::thread::sleep(Duration::from_micros(if tries < 20 { 100 } else { 1_000 }));
        true
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn whoever_opens_a_new_file_at_once_is_let_in() {
        for _ in 0..500 {
            let folder = tempfile::tempdir().unwrap();
            let settings = Settings::new(folder.path().join("new.db"));
            std::thread::scope(|scope| {
                let opening: Vec<_> =
                    (0..6).map(|_| scope.spawn(|| open(&settings.path, &settings).map(drop))).collect();
                opening.into_iter().for_each(|opened| opened.join().unwrap().unwrap());
            });
        }
    }
}
