//! The broker: one connection of one process to the file.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Broker, Capabilities, Clock, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description,
    Destination, Effect, Endpoint, Error, ErrorKind, Group, Lag, Message, PublishOutcome, PublishTerms, Result,
    SubscribeSpec, Subscription, TopologySpec,
};
use async_trait::async_trait;
use notify::RecommendedWatcher;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use crate::clock::FileClock;
use crate::config::{Durability, Settings};
use crate::inbox::{Command, Inbox, Publish};
use crate::member::Member;
use crate::subscription::{FileSubscription, safety};
use crate::wake::{self, Bell, GroupSync};
use crate::writer::Writer;
use crate::{capabilities, dead_letter, publisher, schema, topology};

/// Bytes that one permit of the buffer stands for.
const PERMIT: usize = 1 << 10;

/// A broker in one SQLite file. Several processes may have it open at once.
pub struct EmbeddedBroker {
    keeper: Arc<Keeper>,
    clock: FileClock,
    endpoint: Endpoint,
    record: Capabilities,
    buffer: Arc<Semaphore>,
    permits: u32,
}

/// What the broker and its subscriptions share. The writer ends when the last of them is gone.
pub(crate) struct Keeper {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) safety: Duration,
    _watcher: Option<RecommendedWatcher>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.inbox.close();
    }
}

impl EmbeddedBroker {
    /// Opens the file, creating it where it is missing. Waits for other processes that are just creating it.
    ///
    /// # Errors
    /// `NotFound` when the directory is missing, `PermissionDenied` when the file may not be written,
    /// `Unavailable` when it stays locked or the disk is full, `ConfigInvalid` when the path is a directory,
    /// `Unexpected` when the file is damaged, no database, another application's, or written by a newer version (the
    /// context `cause` says which).
    pub async fn open(settings: Settings) -> Result<Self> {
        Self::open_by(settings, FileClock::system()).await
    }

    /// As [`open`](Self::open), with a clock for leases, delays and times to live.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub async fn open_with_clock(settings: Settings, clock: Arc<dyn Clock>) -> Result<Self> {
        Self::open_by(settings, FileClock::Given(clock)).await
    }

    async fn open_by(settings: Settings, clock: FileClock) -> Result<Self> {
        let path = absolute(&settings.path)?;
        let inbox = Arc::new(Inbox::default());
        let keeper = {
            let (settings, clock, inbox, path) = (settings.clone(), clock.clone(), Arc::clone(&inbox), path.clone());
            tokio::task::spawn_blocking(move || start(&path, settings, clock, inbox))
                .await
                .map_err(|error| Error::new(ErrorKind::Unexpected, "connect", error.to_string()))??
        };
        let permits = u32::try_from(settings.buffer.div_ceil(PERMIT)).unwrap_or(u32::MAX).max(1);
        let mode = if settings.durability == Durability::Grouped { "grouped" } else { "synced" };
        Ok(Self {
            keeper: Arc::new(keeper),
            clock,
            endpoint: Endpoint {
                scheme: "embedded",
                mode: mode.into(),
                url: format!("embedded://{}", path.display()),
                server: format!("SQLite {}", rusqlite::version()),
            },
            record: capabilities::record(&settings),
            buffer: Arc::new(Semaphore::new(permits.try_into().unwrap_or(Semaphore::MAX_PERMITS))),
            permits,
        })
    }

    fn inbox(&self) -> &Inbox {
        &self.keeper.inbox
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|error| Error::new(ErrorKind::ConfigInvalid, "connect", format!("no path to a file: {error}")))
}

/// Opens the file and starts the threads. Blocks.
fn start(path: &Path, settings: Settings, clock: FileClock, inbox: Arc<Inbox>) -> Result<Keeper> {
    let connection = schema::open(path, &settings)?;
    let failed = |error: std::io::Error| {
        Error::new(ErrorKind::Unavailable, "connect", format!("a thread or the log could not be opened: {error}"))
            .with("path", path.display())
    };
    let group_sync = match settings.durability {
        Durability::Grouped => Some(GroupSync::start(path, settings.group_window).map_err(failed)?),
        Durability::Synced | Durability::DangerUnsynced => None,
    };
    let watcher = wake::watch(path, &inbox);
    let bell = Bell::new(path);
    let safety = settings.look_every.unwrap_or_else(|| safety(watcher.is_some()));
    Writer::start(connection, settings, clock, Arc::clone(&inbox), group_sync, bell).map_err(failed)?;
    Ok(Keeper { inbox, safety, _watcher: watcher })
}

#[async_trait]
impl Broker for EmbeddedBroker {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn capabilities(&self) -> &Capabilities {
        &self.record
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let deadline = Instant::now() + terms.timeout;
        let count = batch.len();
        let each = move |error: Error| -> Vec<PublishOutcome> { (0..count).map(|_| Err(error.duplicate())).collect() };
        let weight: usize = batch.iter().map(publisher::weight).sum();
        // One batch larger than the buffer takes all of it.
        let permits = u32::try_from(weight.div_ceil(PERMIT)).unwrap_or(u32::MAX).clamp(1, self.permits);
        let room = match self.buffer.clone().try_acquire_many_owned(permits) {
            Ok(room) => room,
            Err(_) => match tokio::time::timeout_at(deadline, self.buffer.clone().acquire_many_owned(permits)).await {
                Ok(Ok(room)) => room,
                Ok(Err(_)) => return Confirms::ready(each(Error::closed("publish"))),
                Err(_) => {
                    let text = format!("the buffer stayed full for {:?}", terms.timeout);
                    return Confirms::ready(each(Error::new(ErrorKind::RateLimited, "publish", text)));
                }
            },
        };
        let (answer, answered) = oneshot::channel();
        let publish = Publish { batch, outcomes: Vec::new(), answer: Some(answer), weight, room };
        if self.inbox().send(Command::Publish(publish)).is_err() {
            return Confirms::ready(each(Error::closed("publish")));
        }
        Confirms::waiting(async move {
            match tokio::time::timeout_at(deadline, answered).await {
                Ok(Ok(outcomes)) => outcomes,
                Ok(Err(_)) => each(Error::closed("publish").with_effect(Effect::Unknown)),
                Err(_) => {
                    let text = format!("no commit within {:?}", terms.timeout);
                    each(Error::new(ErrorKind::Timeout, "publish", text))
                }
            }
        })
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        let (id, sources) = {
            let spec = spec.clone();
            self.inbox().call("subscribe", move |store| topology::join(store, &spec)).await?
        };
        let member = Member::new(id, sources, &spec);
        Ok(Box::new(FileSubscription::new(Arc::clone(&self.keeper), self.clock.clone(), member, &spec)))
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let from = match from {
            None => None,
            Some(id) => Some(dead_letter::number(&id).ok_or_else(|| {
                Error::new(ErrorKind::NotFound, "dead letters", "no dead letter of this broker").with("id", id)
            })?),
        };
        let scope = scope.clone();
        self.inbox().call("dead letters", move |store| dead_letter::page(store, &scope, from, max)).await
    }

    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let (scope, all) = (scope.clone(), ids.to_vec());
        let outcomes = self.inbox().call("redrive", move |store| dead_letter::redrive(store, &scope, &all)).await;
        outcomes.unwrap_or_else(|error| ids.iter().map(|_| Err(error.duplicate())).collect())
    }

    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let (scope, all) = (scope.clone(), ids.to_vec());
        let outcomes = self.inbox().call("purge", move |store| dead_letter::purge(store, &scope, &all)).await;
        outcomes.unwrap_or_else(|error| ids.iter().map(|_| Err(error.duplicate())).collect())
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let spec = spec.clone();
        self.inbox().call("declare", move |store| topology::declare(store, &spec)).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let spec = spec.clone();
        self.inbox().call("verify", move |store| topology::verify(store, &spec, "verify")).await
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        let destination = destination.clone();
        self.inbox().call("describe", move |store| topology::describe(store, &destination)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        let prefix = prefix.to_owned();
        self.inbox().call("list", move |store| topology::list(store, &prefix)).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let (destination, group) = (destination.clone(), group.cloned());
        self.inbox().call("delete", move |store| topology::delete(store, &destination, group.as_ref())).await
    }

    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        let (destination, group) = (destination.clone(), group.clone());
        let lag = move |store: &crate::store::Store<'_>| {
            let source = topology::find(store, &destination, &group, "lag")?;
            topology::lag(store, &source)
        };
        self.inbox().call("lag", lag).await
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        if self.inbox().send(Command::Close(answer)).is_err() {
            return Ok(()); // It is closed.
        }
        match tokio::time::timeout(grace.max(Duration::from_millis(1)), answered).await {
            Ok(Ok(closed)) => closed,
            Ok(Err(_)) => Ok(()),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "close", format!("not closed within {grace:?}"))),
        }
    }
}

impl std::fmt::Debug for EmbeddedBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedBroker").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}
