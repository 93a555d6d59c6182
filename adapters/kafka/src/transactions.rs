//! The clients of a connection's transactions. Each has a transactional id of its own and one transaction at a time; one that
//! ended well is used again.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anybroker_core::{Effect, Error, ErrorKind, Result};
use parking_lot::Mutex;
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::producer::Producer;
use tokio::sync::Semaphore;

use crate::config::Settings;
use crate::error::kind;
use crate::line::Line;
use crate::publisher::Publisher;
use crate::transaction::{KafkaTransaction, Open};

/// See the module's documentation.
pub(crate) struct Transactions {
    pub(crate) settings: Settings,
    publisher: Arc<Publisher>,
    /// The transactional ids are this name with a number.
    name: String,
    idle: Mutex<Vec<Slot>>,
    /// The numbers that are in use, idle ones included.
    numbers: Mutex<BTreeSet<u32>>,
    room: Arc<Semaphore>,
    open: Mutex<Vec<Weak<Open>>>,
    counter: AtomicU32,
    /// Another process has taken the name.
    is_fenced: AtomicBool,
    pub(crate) is_closing: AtomicBool,
}

/// A transactional id and its client.
pub(crate) struct Slot {
    pub(crate) number: u32,
    pub(crate) line: Arc<Line>,
}

impl Transactions {
    pub(crate) fn new(settings: &Settings, publisher: &Arc<Publisher>) -> Arc<Self> {
        // A random name fences nobody, which is not needed for what was settled: the group's generation does that (KIP-447).
        let random = || format!("anybroker-{}", uuid::Uuid::new_v4());
        let (idle, numbers, open, counter, is_fenced, is_closing) = Default::default();
        Arc::new(Self {
            settings: settings.clone(),
            publisher: Arc::clone(publisher),
            name: settings.transactional_id.clone().unwrap_or_else(random),
            idle,
            numbers,
            room: Arc::new(Semaphore::new(settings.open_transactions)),
            open,
            counter,
            is_fenced,
            is_closing,
        })
    }

    pub(crate) async fn begin(self: &Arc<Self>) -> Result<KafkaTransaction> {
        let patience = self.settings.connect_timeout;
        let Ok(permit) = tokio::time::timeout(patience, Arc::clone(&self.room).acquire_owned()).await else {
            let text = "as many transactions as open_transactions allows are open";
            return Err(Error::new(ErrorKind::RateLimited, "begin", text));
        };
        let permit = permit.map_err(|_| Error::closed("begin"))?;
        let pool = Arc::clone(self);
        let begun = tokio::task::spawn_blocking(move || pool.begun(patience)).await;
        let slot = begun.expect("beginning a transaction cannot panic")?;
        let id = self.counter.fetch_add(1, Ordering::Relaxed);
        let transaction = KafkaTransaction::new(self, slot, id, permit);
        let mut open = self.open.lock();
        open.retain(|other| other.strong_count() > 0);
        open.push(Arc::downgrade(transaction.open()));
        Ok(transaction)
    }

    /// A client with a fresh transaction. Blocks.
    fn begun(&self, patience: Duration) -> Result<Slot> {
        let deadline = Instant::now() + patience;
        loop {
            if self.is_fenced.load(Ordering::Acquire) {
                return Err(fenced("begin"));
            }
            let idle = self.idle.lock().pop();
            let slot = match idle {
                Some(slot) if slot.line.is_shut_out() => {
                    self.discard(slot);
                    continue;
                }
                Some(slot) => slot,
                None => {
                    let number = self.take_number();
                    let line = self.initialised(number, deadline).inspect_err(|_| self.free(number))?;
                    Slot { number, line: Arc::new(line) }
                }
            };
            let begun = slot.line.client().begin_transaction();
            match begun {
                Ok(()) => return Ok(slot),
                // It failed while nobody used it.
                Err(error) => {
                    self.learn("begin", &error);
                    self.discard(slot);
                    if Instant::now() >= deadline {
                        return Err(refused("begin", &error));
                    }
                }
            }
        }
    }

    /// A client whose id is its own: what its predecessor left open has been taken back, and the predecessor is fenced.
    pub(crate) fn initialised(&self, number: u32, deadline: Instant) -> Result<Line> {
        let line = self.publisher.transactional(&format!("{}-{number}", self.name))?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let client = Arc::clone(&line.client());
            match client.init_transactions(left) {
                Ok(()) => return Ok(line),
                Err(error) => {
                    if !is_retriable(&error) || Instant::now() >= deadline {
                        line.is_shut_out();
                        return Err(line.final_refusal().unwrap_or_else(|| refused("begin", &error)));
                    }
                }
            }
        }
    }

    fn take_number(&self) -> u32 {
        let mut numbers = self.numbers.lock();
        // The lowest: a process that comes back under its name takes back what it left open with its first transactions.
        let number = (0..).find(|number| !numbers.contains(number)).expect("few are in use");
        numbers.insert(number);
        number
    }

    pub(crate) fn free(&self, number: u32) {
        self.numbers.lock().remove(&number);
    }

    /// Its transaction ended well.
    pub(crate) fn reuse(&self, slot: Slot) {
        self.idle.lock().push(slot);
    }

    /// Its client is given up; the next one under its id takes back what it left open.
    pub(crate) fn discard(&self, slot: Slot) {
        let number = slot.number;
        slot.line.is_shut_out();
        drop(slot);
        self.free(number);
    }

    /// Looks whether another process has taken the name. Then this connection begins no transaction any more: taking the name
    /// back would fence the other one, and so on.
    pub(crate) fn learn(&self, operation: &'static str, error: &KafkaError) {
        if is_fencing(error) && self.settings.transactional_id.is_some() {
            tracing::warn!(name = self.name, operation, %error, "another process has taken the transactional id");
            self.is_fenced.store(true, Ordering::Release);
        }
    }

    /// Aborts what is open.
    pub(crate) async fn close(&self, deadline: tokio::time::Instant) -> Result<()> {
        self.is_closing.store(true, Ordering::Release);
        self.room.close();
        let mut result = Ok(());
        let open = std::mem::take(&mut *self.open.lock());
        for open in open.into_iter().filter_map(|open| open.upgrade()) {
            match tokio::time::timeout_at(deadline, open.abandon()).await {
                Ok(()) => {}
                Err(_) => {
                    let text =
                        "an open transaction was not taken back in time; the broker does it by transaction_timeout";
                    result = Err(Error::new(ErrorKind::Timeout, "close", text).with_effect(Effect::Unknown));
                }
            }
        }
        result
    }

    /// Ends the threads of the clients that are idle.
    pub(crate) fn stop(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut *self.idle.lock()).into_iter().filter_map(|slot| slot.line.stop()).collect()
    }
}

/// Whether the same call may be made again.
pub(crate) fn is_retriable(error: &KafkaError) -> bool {
    matches!(error, KafkaError::Transaction(error) if error.is_retriable())
}

/// Whether the client has lost its id to another one.
pub(crate) fn is_fencing(error: &KafkaError) -> bool {
    let fencing = [Code::Fenced, Code::ProducerFenced, Code::InvalidProducerEpoch];
    error.rdkafka_error_code().is_some_and(|code| fencing.contains(&code))
}

pub(crate) fn fenced(operation: &'static str) -> Error {
    let text = "another process has taken this transactional id; it goes on there, and nothing more is begun here";
    Error::new(ErrorKind::AlreadyExists, operation, text).with_effect(Effect::NotDone)
}

/// What librdkafka says of a step before the end of a transaction: nothing of it will become visible.
pub(crate) fn refused(operation: &'static str, error: &KafkaError) -> Error {
    if is_fencing(error) {
        return fenced(operation);
    }
    let kind = match error.rdkafka_error_code().map(kind) {
        // Mostly a connection that was lost, or a message that failed: the transaction may be tried anew.
        None | Some(ErrorKind::Unexpected) => ErrorKind::Unavailable,
        Some(kind) => kind,
    };
    Error::new(kind, operation, error.to_string()).with_effect(Effect::NotDone)
}
