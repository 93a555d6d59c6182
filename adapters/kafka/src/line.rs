//! A client of librdkafka that publishes, with the thread that collects its reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anybroker_core::{Error, ErrorKind, Position, Receipt, Result};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message as _;
use rdkafka::producer::{BaseProducer, DeliveryResult, Producer, ProducerContext, PurgeConfig};
use rdkafka::{ClientConfig, ClientContext};
use tokio::runtime::Handle;

use crate::board::Board;
use crate::config::Settings;
use crate::error::{failed, kind, unpublished};
use crate::login::Made;

pub(crate) type Client = BaseProducer<Reports>;

/// See the module's documentation.
pub(crate) struct Line {
    current: Arc<Current>,
    stopping: Arc<AtomicBool>,
    reporter: Mutex<Option<JoinHandle<()>>>,
}

/// The client of the moment. One that has met a fatal error (a sequence of the idempotent producer was broken) takes
/// nothing any more, and is replaced.
struct Current {
    recipe: Recipe,
    made: Mutex<Made>,
    /// One with a transaction is not replaced: what it held of the transaction is gone with it.
    is_replaced: bool,
    board: Arc<Board>,
    faults: Arc<Faults>,
    client: RwLock<Arc<Client>>,
}

/// What went wrong with a client beside single messages.
#[derive(Default)]
struct Faults {
    is_fatal: AtomicBool,
    refusal: Mutex<Option<(RDKafkaErrorCode, Error)>>,
}

/// How a client is made.
pub(crate) struct Recipe {
    pub(crate) settings: Settings,
    pub(crate) kind: Kind,
    /// Where the provider of the credentials is asked.
    pub(crate) runtime: Handle,
}

/// What a client is for.
pub(crate) enum Kind {
    /// Batches are of at most so many bytes.
    Plain(Option<usize>),
    /// Transactions of this id.
    Transactional(String),
}

impl Recipe {
    fn config(&self) -> ClientConfig {
        match &self.kind {
            Kind::Plain(batch) => self.settings.producer(*batch),
            Kind::Transactional(id) => self.settings.transactional(id),
        }
    }
}

impl Line {
    pub(crate) fn new(recipe: Recipe, board: &Arc<Board>) -> Result<Self> {
        let is_replaced = matches!(recipe.kind, Kind::Plain(_));
        let made = Mutex::new(Made::now(&recipe.settings, &recipe.runtime));
        let (board, faults) = (Arc::clone(board), Arc::new(Faults::default()));
        let context = Reports { board: Arc::clone(&board), faults: Arc::clone(&faults) };
        let client =
            Client::from_config_and_context(&recipe.config(), context).map_err(|error| failed("connect", &error))?;
        let client = RwLock::new(Arc::new(client));
        let current = Arc::new(Current { recipe, made, is_replaced, board, faults, client });
        let stopping = Arc::new(AtomicBool::new(false));
        let reporter = {
            let (current, stopping) = (Arc::clone(&current), Arc::clone(&stopping));
            let work = move || {
                while !stopping.load(Ordering::Acquire) {
                    current.serve();
                }
            };
            std::thread::Builder::new().name("anybroker-kafka-reports".into()).spawn(work)
        };
        let reporter = reporter.map_err(|error| {
            Error::new(ErrorKind::Unavailable, "connect", "no thread could be started").with_source(error)
        })?;
        Ok(Self { current, stopping, reporter: Mutex::new(Some(reporter)) })
    }

    /// The client, which is not replaced while the guard is held.
    pub(crate) fn client(&self) -> RwLockReadGuard<'_, Arc<Client>> {
        self.current.client.read()
    }

    /// After a fatal error there is a fresh client a moment later.
    pub(crate) fn is_replaced(&self) -> bool {
        self.current.is_replaced
    }

    /// The client has said that it takes nothing any more.
    pub(crate) fn is_fatal(&self) {
        self.current.faults.is_fatal.store(true, Ordering::Release);
    }

    /// Why the cluster does not let this client in, if that is what happened.
    pub(crate) fn refusal(&self) -> Option<Error> {
        self.current.faults.refusal.lock().as_ref().map(|(_, refusal)| refusal.duplicate())
    }

    /// The same, where trying again is in vain. A TLS handshake also fails when a server is just coming or going.
    pub(crate) fn final_refusal(&self) -> Option<Error> {
        let refusal = self.current.faults.refusal.lock();
        refusal.as_ref().filter(|(code, _)| *code != RDKafkaErrorCode::SSL).map(|(_, refusal)| refusal.duplicate())
    }

    /// Whether the cluster has refused its credentials, of which others may be there soon: then they are asked for, and it is of
    /// no use any more.
    pub(crate) fn is_shut_out(&self) -> bool {
        let made = self.current.made.lock();
        let is_shut_out = made.may_change() && self.final_refusal().is_some();
        if is_shut_out {
            made.refused();
        }
        is_shut_out
    }

    /// Ends the thread that collects reports.
    pub(crate) fn stop(&self) -> Option<JoinHandle<()>> {
        self.stopping.store(true, Ordering::Release);
        self.reporter.lock().take()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Current {
    /// Serves reports and errors, and replaces the client after a fatal one, or when there are other credentials than those that
    /// the cluster refuses.
    fn serve(&self) {
        let client = Arc::clone(&self.client.read());
        client.poll(Duration::from_millis(50));
        if !self.is_replaced {
            return;
        }
        if self.faults.is_fatal.swap(false, Ordering::AcqRel)
            && let Some((code, reason)) = client.client().fatal_error()
        {
            return self.replace(&client, &format!("a fatal error: {code}: {reason}"));
        }
        // The client does not tell each time that it was refused.
        if self.board.is_refused() && self.faults.refusal.lock().is_some() {
            self.made.lock().refused();
            if self.made.lock().is_outdated() {
                self.replace(&client, "there are other credentials");
            }
        }
    }

    fn replace(&self, client: &Client, why: &str) {
        let made = Made::now(&self.recipe.settings, &self.recipe.runtime);
        let context = Reports { board: Arc::clone(&self.board), faults: Arc::clone(&self.faults) };
        match Client::from_config_and_context(&self.recipe.config(), context) {
            Ok(fresh) => {
                tracing::warn!(why, "the producer was replaced");
                let mut current = self.client.write();
                // Before the fresh one takes anything: what is behind the old one's of a key must not go past them.
                self.board.replaced();
                *current = Arc::new(fresh);
                *self.made.lock() = made;
                *self.faults.refusal.lock() = None;
            }
            Err(error) => {
                tracing::error!(%error, why, "the producer could not be replaced");
                self.faults.is_fatal.store(true, Ordering::Release);
            }
        }
        // What it still held certainly or possibly is not stored; each gets its outcome.
        client.purge(PurgeConfig::default().queue().inflight());
        let deadline = Instant::now() + Duration::from_secs(5);
        while client.in_flight_count() > 0 && Instant::now() < deadline {
            client.poll(Duration::from_millis(20));
        }
    }
}

/// Receives librdkafka's delivery reports.
pub(crate) struct Reports {
    board: Arc<Board>,
    faults: Arc<Faults>,
}

impl ClientContext for Reports {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "kafka producer");
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::Fatal) => self.faults.is_fatal.store(true, Ordering::Release),
            Some(code) => {
                if let Some(refusal) = crate::error::refused(code, reason) {
                    if code != RDKafkaErrorCode::SSL {
                        self.board.refused(refusal.message());
                    }
                    *self.faults.refusal.lock() = Some((code, refusal));
                }
            }
            None => {}
        }
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: usize) {
        let outcome = match result {
            Ok(record) => {
                let position = u64::try_from(record.offset()).ok().map(Position::new);
                Ok(Receipt { position, duplicate: false })
            }
            Err((error, record)) => {
                match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::Fatal) => self.faults.is_fatal.store(true, Ordering::Release),
                    Some(code) if is_of_topic(code) => self.board.suspect(record.topic()),
                    _ => {}
                }
                Err(unpublished(error))
            }
        };
        self.board.report(opaque, outcome);
    }
}

/// Whether the failure tells that the topic is gone, or takes something else than was known.
pub(crate) fn is_of_topic(code: RDKafkaErrorCode) -> bool {
    let is_policy = matches!(code, RDKafkaErrorCode::InvalidRecord | RDKafkaErrorCode::InvalidDifferentRecord);
    is_policy || matches!(kind(code), ErrorKind::TooLarge | ErrorKind::NotFound)
}
