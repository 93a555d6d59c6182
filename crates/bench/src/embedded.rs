//! The embedded broker beside SQLite as a service would use it by hand, at the same durability.

use std::path::Path;
use std::sync::Arc;

use anybroker_core::{Bus, BusOptions, Message};
use anybroker_embedded::{Durability, EmbeddedBroker, Settings};
use rusqlite::{Connection, params};
use tempfile::TempDir;

use crate::report::Report;
use crate::rows::{self, Bare};

/// Measures the embedded broker, with every commit synced and with commits grouped. It has a thread of its own for the
/// file, so nothing is kept on one core.
pub fn run(report: &mut Report) {
    std::thread::scope(|scope| {
        // A thread that begins from the pinned one would be pinned too.
        scope.spawn(|| {
            unpin();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                // The files of the last endpoint, which is closed when the next is opened.
                let mut files = None;
                let synced = async || open(Durability::Synced, &mut files).await;
                rows::run(report, "embedded synced", 50, synced, async || Table::new("FULL")).await;
                let grouped = async || open(Durability::Grouped, &mut files).await;
                rows::run(report, "embedded grouped", 5, grouped, async || Table::new("NORMAL")).await;
            });
        });
    });
}

fn unpin() {
    let mut cores = rustix::thread::CpuSet::new();
    (0..rustix::thread::CpuSet::MAX_CPU).for_each(|core| cores.set(core));
    if let Err(error) = rustix::thread::sched_setaffinity(None, &cores) {
        eprintln!("still pinned to one core: {error}");
    }
}

/// Settled messages are deleted, as by hand: nothing is kept for replay.
async fn open(durability: Durability, files: &mut Option<TempDir>) -> Bus {
    let directory = files.insert(directory());
    let mut settings = Settings::new(directory.path().join("events.db"));
    settings.durability = durability;
    settings.retention_messages = 0;
    let broker = EmbeddedBroker::open(settings).await.expect("a fresh file");
    Bus::new(Arc::new(broker), BusOptions::default())
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// A queue in one table: insert; lease the oldest that are free, in one statement; delete each when it is done.
struct Table {
    connection: Connection,
    _directory: TempDir,
}

impl Table {
    fn new(synchronous: &str) -> Self {
        let directory = directory();
        let connection = Self::open(&directory.path().join("queue.db"), synchronous).expect("a fresh file");
        Self { connection, _directory: directory }
    }

    fn open(path: &Path, synchronous: &str) -> rusqlite::Result<Connection> {
        let connection = Connection::open(path)?;
        connection.execute_batch(&format!(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = {synchronous}; PRAGMA cache_size = -16384;
             CREATE TABLE queue (id INTEGER PRIMARY KEY, mid BLOB NOT NULL, key BLOB, headers BLOB, time INTEGER,
                                 leased_until INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0,
                                 payload BLOB);"
        ))?;
        Ok(connection)
    }

    fn insert(&mut self, batch: &[Message]) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut insert = transaction
            .prepare_cached("INSERT INTO queue (mid, key, headers, time, payload) VALUES (?1, ?2, ?3, ?4, ?5)")?;
        for message in batch {
            let id = message.id().as_uuid().expect("ids of the benchmark are UUIDs");
            let headers = message.headers().as_packed();
            insert.execute(params![
                id.as_bytes(),
                message.key(),
                headers,
                message.timestamp().as_millis(),
                message.bytes()
            ])?;
        }
        drop(insert);
        transaction.commit()
    }

    fn lease(&mut self, max: usize) -> rusqlite::Result<Vec<Row>> {
        let now = anybroker_core::Timestamp::now().as_millis();
        let transaction = self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut lease = transaction.prepare_cached(
            "UPDATE queue SET leased_until = ?1, attempt = attempt + 1
             WHERE id IN (SELECT id FROM queue WHERE leased_until <= ?2 ORDER BY id LIMIT ?3)
             RETURNING id, mid, key, headers, time, attempt, payload",
        )?;
        let rows = lease
            .query_map(params![now + 30_000, now, i64::try_from(max).unwrap_or(i64::MAX)], |row| {
                Ok(Row {
                    id: row.get(0)?,
                    mid: row.get(1)?,
                    key: row.get(2)?,
                    headers: row.get(3)?,
                    time: row.get(4)?,
                    attempt: row.get(5)?,
                    payload: row.get(6)?,
                })
            })?
            .collect::<rusqlite::Result<_>>()?;
        drop(lease);
        transaction.commit()?;
        Ok(rows)
    }

    fn delete(&mut self, rows: &[Row]) -> rusqlite::Result<()> {
        let transaction = self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut delete = transaction.prepare_cached("DELETE FROM queue WHERE id = ?1")?;
        for row in rows {
            delete.execute([row.id])?;
        }
        drop(delete);
        transaction.commit()
    }
}

/// What a consumer by hand reads of a message.
struct Row {
    id: i64,
    mid: [u8; 16],
    key: Option<Vec<u8>>,
    headers: Option<Vec<u8>>,
    time: i64,
    attempt: i64,
    payload: Vec<u8>,
}

impl Bare for Table {
    async fn publish(&mut self, batch: Vec<Message>) {
        self.insert(&batch).expect("an open file");
    }

    async fn receive_and_settle(&mut self, max: usize) -> usize {
        let rows = self.lease(max).expect("an open file");
        for row in &rows {
            std::hint::black_box((&row.mid, &row.key, &row.headers, row.time, row.attempt, &row.payload));
        }
        self.delete(&rows).expect("an open file");
        rows.len()
    }
}
