//! Adds up what has happened, each event once: a projection into a database of its own.
//!
//! A broker delivers at least once, and the shop sends some orders twice. So the mark "this group has seen this message"
//! and what the message changes are written in *one* transaction: a crash in between leaves both or neither, and a
//! second copy finds the mark.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anybroker::events::cloudevents::{AttributesReader, Event};
use anybroker::events::{TypedEvent, from_message};
use anybroker::worker::{Classify, Context, ErrorClass, Handler, HandlerError, Outcome, async_trait};
use rusqlite::{Connection, OpenFlags, Transaction, params};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;

use crate::order::{ORDER_CREATED, Order, PAYMENT_COMPLETED, Payment, Reservation, STOCK_RESERVED};

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS seen (
        consumer TEXT NOT NULL,
        message TEXT NOT NULL,
        PRIMARY KEY (consumer, message)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS totals (
        country TEXT PRIMARY KEY,
        orders INTEGER NOT NULL DEFAULT 0,
        ordered_cents INTEGER NOT NULL DEFAULT 0,
        paid INTEGER NOT NULL DEFAULT 0,
        paid_cents INTEGER NOT NULL DEFAULT 0,
        reserved INTEGER NOT NULL DEFAULT 0,
        reserved_units INTEGER NOT NULL DEFAULT 0
    ) WITHOUT ROWID;
";

const GONE: &str = "the writer of the totals is gone";

/// How many events are written in one transaction, at most.
const BATCH: usize = 256;

/// What one event adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    country: String,
    columns: (&'static str, &'static str),
    amount: u64,
}

impl Change {
    /// What the event in that message adds.
    ///
    /// # Errors
    /// `SCHEMA_MISMATCH`.
    fn of(ctx: &Context) -> Outcome<Self> {
        let event = from_message(ctx.message()).class(ErrorClass::SCHEMA_MISMATCH)?;
        Ok(match event.ty() {
            ORDER_CREATED => {
                let order: Order = data_of(event)?;
                Self { amount: order.total_cents(), country: order.country, columns: ("orders", "ordered_cents") }
            }
            PAYMENT_COMPLETED => {
                let payment: Payment = data_of(event)?;
                Self { amount: payment.amount_cents, country: payment.country, columns: ("paid", "paid_cents") }
            }
            STOCK_RESERVED => {
                let reserved: Reservation = data_of(event)?;
                Self { amount: reserved.units, country: reserved.country, columns: ("reserved", "reserved_units") }
            }
            other => {
                return Err(HandlerError::new(ErrorClass::SCHEMA_MISMATCH, format!("nothing is known of {other}")));
            }
        })
    }

    /// Marks the message and adds, or finds the mark.
    fn apply(&self, transaction: &Transaction<'_>, consumer: &str, message: &str) -> rusqlite::Result<Applied> {
        let marked = transaction
            .prepare_cached("INSERT OR IGNORE INTO seen (consumer, message) VALUES (?1, ?2)")?
            .execute(params![consumer, message])?;
        if marked == 0 {
            return Ok(Applied::Duplicate);
        }
        let (count, sum) = self.columns;
        let amount = i64::try_from(self.amount).unwrap_or(i64::MAX);
        transaction
            .prepare_cached(&format!(
                "INSERT INTO totals (country, {count}, {sum}) VALUES (?1, 1, ?2)
                 ON CONFLICT (country) DO UPDATE SET {count} = {count} + 1, {sum} = {sum} + ?2"
            ))?
            .execute(params![self.country, amount])?;
        Ok(Applied::Counted)
    }
}

fn data_of<T: DeserializeOwned>(event: Event) -> Outcome<T> {
    Ok(TypedEvent::from_event(event).class(ErrorClass::SCHEMA_MISMATCH)?.data)
}

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It was added.
    Counted,
    /// It had been added before.
    Duplicate,
}

/// The database of the projection. One thread writes; what waits for it is written together, so that a sync to the disk
/// is shared by up to 256 events, and each event is still answered only when it is on the disk.
#[derive(Debug, Clone)]
pub struct Ledger {
    writes: Sender<Write>,
    duplicates: Arc<AtomicU64>,
}

struct Write {
    consumer: String,
    message: String,
    change: Change,
    answer: oneshot::Sender<Result<Applied, String>>,
}

impl Ledger {
    /// Opens or creates the database.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(file: &Path) -> rusqlite::Result<Self> {
        let database = Connection::open(file)?;
        database.busy_timeout(Duration::from_secs(5))?;
        database.pragma_update(None, "journal_mode", "wal")?;
        database.pragma_update(None, "synchronous", "full")?;
        database.execute_batch(SCHEMA)?;
        let (writes, waiting) = channel(BATCH);
        std::thread::spawn(move || write_all(database, waiting));
        Ok(Self { writes, duplicates: Arc::default() })
    }

    /// How many messages came that had been seen before.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.duplicates.load(Ordering::Relaxed)
    }

    /// Adds a change, unless that consumer has seen the message.
    ///
    /// # Errors
    /// The database's, as text; nothing was written then.
    async fn apply(&self, consumer: String, message: String, change: Change) -> Result<Applied, String> {
        let (answer, answered) = oneshot::channel();
        let write = Write { consumer, message, change, answer };
        self.writes.send(write).await.map_err(|_| GONE.to_owned())?;
        let applied = answered.await.map_err(|_| GONE.to_owned())??;
        if applied == Applied::Duplicate {
            self.duplicates.fetch_add(1, Ordering::Relaxed);
        }
        Ok(applied)
    }
}

fn write_all(mut database: Connection, mut waiting: Receiver<Write>) {
    let mut batch = Vec::with_capacity(BATCH);
    while waiting.blocking_recv_many(&mut batch, BATCH) > 0 {
        let outcome = write(&mut database, &batch);
        for (index, write) in batch.drain(..).enumerate() {
            let answer = match &outcome {
                Ok(applied) => Ok(applied[index]),
                Err(error) => Err(error.to_string()),
            };
            // A handler that was cut off does not wait any more; its message comes again and finds the mark.
            let _ = write.answer.send(answer);
        }
    }
}

fn write(database: &mut Connection, batch: &[Write]) -> rusqlite::Result<Vec<Applied>> {
    let transaction = database.transaction()?;
    let applied = batch
        .iter()
        .map(|write| write.change.apply(&transaction, &write.consumer, &write.message))
        .collect::<rusqlite::Result<Vec<_>>>()?;
    transaction.commit()?;
    Ok(applied)
}

/// The worker of the group `totals`.
#[derive(Debug)]
pub struct Projection {
    ledger: Ledger,
}

impl Projection {
    /// A projection into that ledger.
    #[must_use]
    pub fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }
}

#[async_trait]
impl Handler for Projection {
    async fn handle(&self, ctx: &Context) -> Outcome {
        let change = Change::of(ctx)?;
        let (group, message) = (ctx.group().to_string(), ctx.message().id().to_string());
        // Counted now or counted before: done either way.
        let applied = self.ledger.apply(group, message, change).await;
        applied.map(drop).map_err(|problem| HandlerError::new(ErrorClass::SERVICE_UNAVAILABLE, problem))
    }
}

/// The sums by country, and all together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Totals {
    /// Country and its sums, by name.
    pub countries: Vec<(String, Sums)>,
}

/// What was added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sums {
    /// Orders.
    pub orders: u64,
    /// What they cost.
    pub ordered_cents: u64,
    /// Orders that were paid.
    pub paid: u64,
    /// What was paid.
    pub paid_cents: u64,
    /// Orders whose items were put aside.
    pub reserved: u64,
    /// How many pieces.
    pub reserved_units: u64,
}

impl Totals {
    /// Reads them from the database of a [`Ledger`].
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(file: &Path) -> rusqlite::Result<Self> {
        let database = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE)?; // Not created.
        database.busy_timeout(Duration::from_secs(5))?;
        let mut rows = database.prepare(
            "SELECT country, orders, ordered_cents, paid, paid_cents, reserved, reserved_units FROM totals
             ORDER BY country",
        )?;
        let number = |row: &rusqlite::Row<'_>, index| row.get::<_, i64>(index).map(i64::unsigned_abs);
        let countries = rows.query_map([], |row| {
            let sums = Sums {
                orders: number(row, 1)?,
                ordered_cents: number(row, 2)?,
                paid: number(row, 3)?,
                paid_cents: number(row, 4)?,
                reserved: number(row, 5)?,
                reserved_units: number(row, 6)?,
            };
            Ok((row.get(0)?, sums))
        })?;
        Ok(Self { countries: countries.collect::<rusqlite::Result<_>>()? })
    }

    /// Everything together.
    #[must_use]
    pub fn all(&self) -> Sums {
        self.countries.iter().fold(Sums::default(), |all, (_, sums)| Sums {
            orders: all.orders + sums.orders,
            ordered_cents: all.ordered_cents + sums.ordered_cents,
            paid: all.paid + sums.paid,
            paid_cents: all.paid_cents + sums.paid_cents,
            reserved: all.reserved + sums.reserved,
            reserved_units: all.reserved_units + sums.reserved_units,
        })
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {:<7} {:>7} {:>15} {:>7} {:>15} {:>9} {:>7}",
            "country", "orders", "ordered", "paid", "received", "reserved", "pieces"
        )?;
        let total = ("all".to_owned(), self.all());
        for (country, sums) in self.countries.iter().chain([&total]) {
            let (ordered, received) = (euros(sums.ordered_cents), euros(sums.paid_cents));
            writeln!(
                f,
                "  {country:<7} {:>7} {ordered:>15} {:>7} {received:>15} {:>9} {:>7}",
                sums.orders, sums.paid, sums.reserved, sums.reserved_units
            )?;
        }
        Ok(())
    }
}

fn euros(cents: u64) -> String {
    format!("{}.{:02} EUR", cents / 100, cents % 100)
}
