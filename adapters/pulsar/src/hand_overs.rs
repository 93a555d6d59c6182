//! How often messages were handed out, kept so that it outlives the member: a message that kills its consumer must not come
//! back for ever, and Pulsar forgets its own count when a consumer leaves (InMemoryRedeliveryTracker.java).
//!
//! A first hand-over costs nothing of its own: before a member hands out what lies behind everything that the group has
//! reserved, it stores how far it reserves, for many messages at once. What lies within a reservation that is older than the
//! member may have been handed out by another one, which may have died of it: such a message is handed out only after a note of
//! its count is stored. So a count misses the hand-overs that nobody noted (the first one; on Shared subscriptions one of each
//! member that was there already). It has one too many where a member ends after the note and before the message is out: notes of
//! one topic wait until what another one's are about is out, so that who receives one message at a time is counted right.
//!
//! Reservations and notes of a group lie on a topic of their own, which every member reads from its beginning.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Destination, Error, ErrorKind, Group, Result};
use pulsar::message::Payload;
use pulsar::proto::{self, BaseCommand, MessageMetadata, base_command::Type, command_subscribe::SubType};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::names::Names;
use crate::producer::Producer;
use crate::state::{Failing, Failure, Place, Shared, Wanted};
use crate::topology::Topology;
use crate::wire::{Conn, Inbound, command};

/// How many entries are reserved at once.
pub(crate) const RESERVED: u64 = 10_000;
/// Notes that are read at once.
const READ_AHEAD: u32 = 1_000;
/// How long the broker may take to say what its last message is, before it is asked again.
const ANSWERED: Duration = Duration::from_secs(2);
/// How long storing a note may take, and how long to wait before it is tried again.
const STORED: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(500);

/// Ledger and entry.
pub(crate) type At = (u64, u64);

/// What one message of the topic says. Feeds are counted from the first of their destination: the same for every member.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Page {
    /// Feed; everything up to there may have been handed out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    reserved: Vec<(u32, At)>,
    /// Feed, place, and how often that was handed out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    seen: Vec<(u32, Place, u32)>,
    /// Feed, place, how often the message there has failed and kept its place, until when it waits (milliseconds since 1970), and
    /// when the group first received it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    failed: Vec<(u32, Place, u32, i64, i64)>,
}

/// The count of one destination's and group's hand-overs, as one subscription knows it.
pub(crate) struct HandOvers {
    topology: Arc<Topology>,
    shared: Arc<Shared>,
    topic: String,
    /// The first feed of the destination.
    first: u32,
    writer: Arc<Producer>,
    reader: watch::Sender<Option<(Arc<Conn>, u64)>>,
    read: watch::Sender<Option<At>>,
}

impl HandOvers {
    pub(crate) fn new(
        topology: &Arc<Topology>,
        shared: &Arc<Shared>,
        destination: &Destination,
        group: &Group,
        first: u32,
    ) -> Arc<Self> {
        let topic = topology.names.full(&Names::hand_overs(destination, group));
        let writer = Producer::new(topic.clone(), topology.window.clone());
        let (topology, shared) = (Arc::clone(topology), Arc::clone(shared));
        let (reader, read) = (watch::Sender::new(None), watch::Sender::new(None));
        Arc::new(Self { topology, shared, topic, first, writer, reader, read })
    }

    /// Reads until the subscription closes; whatever ends the reader, another one begins.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut closing = self.shared.closing.subscribe();
        loop {
            let reading = async {
                if let Err(error) = self.read_on().await {
                    tracing::debug!(%error, topic = self.topic, "the count of hand-overs is read anew");
                }
                self.reader.send_replace(None);
                tokio::time::sleep(AGAIN).await;
            };
            tokio::select! {
                () = reading => {}
                _ = closing.wait_for(Option::is_some) => break,
            }
        }
        if let Some((conn, consumer)) = self.reader.send_replace(None) {
            conn.abandon_consumer(consumer);
        }
        // A failure may still be on its way.
        let deadline = closing.borrow().unwrap_or_else(Instant::now);
        self.shared.ended(deadline).await;
        self.writer.close();
    }

    async fn read_on(&self) -> Result<()> {
        let operation = "receive";
        let conn = self.topology.link.serving(operation, &self.topic).await?;
        let consumer_id = conn.next_id();
        let mut inbound = conn.add_consumer(consumer_id);
        let name = uuid::Uuid::now_v7().simple().to_string();
        let subscribe = proto::CommandSubscribe {
            topic: self.topic.clone(),
            subscription: format!("anybroker-reader-{name}"),
            sub_type: SubType::Exclusive as i32,
            consumer_id,
            consumer_name: Some(name),
            durable: Some(false),
            initial_position: Some(proto::command_subscribe::InitialPosition::Earliest as i32),
            ..Default::default()
        };
        // Told before it is there, so that whoever ends this early closes it.
        self.reader.send_replace(Some((Arc::clone(&conn), consumer_id)));
        conn.subscribe(operation, subscribe).await?;
        let mut permits = 0;
        loop {
            if permits < READ_AHEAD / 2 {
                let flow = proto::CommandFlow { consumer_id, message_permits: READ_AHEAD - permits };
                conn.tell(BaseCommand { flow: Some(flow), ..command(Type::Flow) });
                permits = READ_AHEAD;
            }
            let Some(Inbound::Message(arrived)) = inbound.recv().await else {
                return Err(Error::new(ErrorKind::Unavailable, operation, "the reader was closed"));
            };
            permits -= 1;
            // One that cannot be read says nothing: it is not this library's.
            let page = serde_json::from_slice::<Page>(&arrived.payload.data).unwrap_or_default();
            page.reserved.iter().for_each(|(feed, at)| self.shared.reserved(self.first + feed, *at));
            page.seen.iter().for_each(|(feed, place, times)| self.shared.seen(self.first + feed, *place, *times));
            for (feed, place, times, not_before, first_at) in page.failed {
                self.shared.has_failed(self.first + feed, place, Failure { times, not_before, first_at });
            }
            let at = (arrived.id.ledger_id, arrived.id.entry_id);
            self.read.send_if_modified(|read| {
                let is_later = read.is_none_or(|read| read < at);
                *read = (*read).max(Some(at));
                is_later
            });
        }
    }

    /// Waits until everything is read that is stored by now. The caller bounds the time.
    pub(crate) async fn catch_up(&self) -> Result<()> {
        let operation = "receive";
        let mut readers = self.reader.subscribe();
        loop {
            let gone = |_| Error::closed(operation);
            let found = readers.wait_for(Option::is_some).await.map_err(gone)?.clone();
            let Some((conn, consumer_id)) = found else { continue };
            let ask = |request_id| BaseCommand {
                get_last_message_id: Some(proto::CommandGetLastMessageId { consumer_id, request_id }),
                ..command(Type::GetLastMessageId)
            };
            let answer = match tokio::time::timeout(ANSWERED, conn.ask(operation, ask)).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => {
                    // It is not there yet, or not any more.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
                // Seen once on 4.2.4: both subscriptions were made at once, and nothing more came for 15 s. Asking changes
                // nothing, so it is asked again.
                Err(_) => continue,
            };
            let last = answer.get_last_message_id_response.map(|answer| answer.last_message_id);
            // Entry -1 is an empty topic's.
            let Some(last) = last.filter(|last| last.entry_id != u64::MAX) else { return Ok(()) };
            let last = (last.ledger_id, last.entry_id);
            self.read.subscribe().wait_for(|read| read.is_some_and(|read| read >= last)).await.map_err(gone)?;
            return Ok(());
        }
    }

    /// Stores what has to be stored before these messages are handed out; tries until that is done, or cannot be.
    pub(crate) async fn store(&self, wanted: Wanted) {
        loop {
            let stored = tokio::time::timeout(STORED, self.store_once(&wanted)).await;
            let late = || Err(Error::new(ErrorKind::Timeout, "receive", "a note of hand-overs was not stored in time"));
            match stored.unwrap_or_else(|_| late()) {
                Ok(()) => break,
                Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::NotFound) => {
                    self.shared.fail(error);
                    break;
                }
                Err(error) => tracing::debug!(%error, topic = self.topic, "a note of hand-overs is stored again"),
            }
            if self.shared.closing.borrow().is_some() {
                break;
            }
            tokio::time::sleep(AGAIN).await;
        }
        self.shared.stored(&wanted);
    }

    /// Stores that messages of this destination failed in their places.
    pub(crate) async fn fail(&self, failing: impl Iterator<Item = &Failing>, deadline: Instant) -> Result<()> {
        let noted = |failing: &Failing| {
            let Failure { times, not_before, first_at } = failing.failure;
            (failing.feed - self.first, failing.place, times, not_before, first_at)
        };
        let failed = failing.map(noted).collect();
        self.write(&Page { failed, ..Page::default() }, deadline, "settle").await
    }

    async fn store_once(&self, wanted: &Wanted) -> Result<()> {
        match wanted {
            Wanted::Reserve { feed, from } => {
                let up_to = (from.0, from.1.saturating_add(RESERVED));
                let page = Page { reserved: vec![(feed - self.first, up_to)], ..Page::default() };
                self.write(&page, Instant::now() + STORED, "receive").await?;
                self.shared.reserved(*feed, up_to);
            }
            Wanted::Note { feed, keys } => {
                // Another member may have noted some of them meanwhile.
                self.catch_up().await?;
                let counts = self.shared.hand_overs(keys);
                if counts.is_empty() {
                    return Ok(());
                }
                let seen = counts.iter().map(|(_, place, times)| (feed - self.first, *place, times + 1)).collect();
                self.write(&Page { seen, ..Page::default() }, Instant::now() + STORED, "receive").await?;
                self.shared.noted(&counts);
            }
        }
        Ok(())
    }

    async fn write(&self, page: &Page, deadline: Instant, operation: &'static str) -> Result<()> {
        let data = serde_json::to_vec(page).expect("numbers become JSON");
        let payload = Payload { metadata: MessageMetadata::default(), data };
        let written = vec![(Arc::clone(&self.writer), payload)];
        let mut outcomes = self.topology.write(written, deadline, operation).await;
        outcomes.pop().expect("one outcome for each payload")
    }

    /// Opens the writer: who may not write here may not receive.
    pub(crate) async fn open(&self, operation: &'static str) -> Result<()> {
        self.writer.open(&self.topology.link, operation).await
    }
}
