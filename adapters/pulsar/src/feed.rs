//! One topic of a subscription: a consumer that is attached again whenever it is lost.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anybroker_core::{Destination, Error, ErrorKind, Order, Reason, Result};
use pulsar::proto::{self, BaseCommand, base_command::Type, command_subscribe::SubType};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::codec;
use crate::dead_letter;
use crate::settle::{Desk, entry_id, tell};
use crate::state::Arrival;
use crate::topology::missing;
use crate::wire::{Arrived, Conn, Inbound, command};

/// Arrivals that are taken in at once.
const TOGETHER: usize = 500;
/// How often a member that stands by looks whether it is its turn.
const STAND_BY: Duration = Duration::from_millis(250);
/// How long attaching may take.
const ATTACH: Duration = Duration::from_secs(15);

pub(crate) struct Feed {
    pub(crate) index: u32,
    pub(crate) destination: Destination,
    /// The local name of its topic, as it is checked for, and its whole name, as it is subscribed to.
    pub(crate) local: String,
    pub(crate) topic: String,
    pub(crate) subscription: String,
    pub(crate) order: Order,
    /// The hashes of keys that it takes; all of them when there is none.
    pub(crate) range: Option<HashRange>,
    pub(crate) is_back: bool,
    pub(crate) desk: Arc<Desk>,
}

struct Attached {
    conn: Arc<Conn>,
    consumer: u64,
    inbound: mpsc::UnboundedReceiver<Inbound>,
}

/// A consumer that is being made. Given up, it is closed: the broker may have made it nevertheless.
struct Opening {
    conn: Arc<Conn>,
    consumer: u64,
    is_done: bool,
}

impl Drop for Opening {
    fn drop(&mut self) {
        if !self.is_done {
            self.conn.abandon_consumer(self.consumer);
        }
    }
}

/// Hashes of keys, both ends included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HashRange {
    from: i32,
    to: i32,
}

impl HashRange {
    /// How many there are: brokers hash keys to 16 bits (StickyKeyConsumerSelector.DEFAULT_RANGE_SIZE).
    const HASHES: i32 = 1 << 16;

    /// All of them in `count` equal parts.
    pub(crate) fn split(count: i32) -> impl Iterator<Item = Self> {
        let size = Self::HASHES / count;
        (0..count).map(move |index| {
            let end = if index + 1 == count { Self::HASHES } else { (index + 1) * size };
            Self { from: index * size, to: end - 1 }
        })
    }
}

/// Why a consumer ended.
enum End {
    Closing,
    Lost(&'static str),
    /// The lane, or its source, is another member's from now on.
    Yielded,
}

impl Feed {
    fn kind(&self) -> SubType {
        match self.order {
            Order::None => SubType::Shared,
            // Ranges of hashes that are fixed, so that a key has the same range on every topic of the group: what comes back
            // of it comes by another topic than it came by first. With ranges that the broker shares out anew whenever members
            // come and go, a key would have two owners meanwhile.
            Order::Key if self.range.is_some() => SubType::KeyShared,
            // With Failover a member that joins may take over while messages of the old one are out.
            Order::Key | Order::Total => SubType::Exclusive,
        }
    }

    /// One member works at a time.
    fn is_lane(&self) -> bool {
        self.order != Order::None && !self.is_back
    }

    fn lane_name(&self) -> String {
        match self.range {
            Some(HashRange { from, to }) => format!("{}#{from}-{to}", self.topic),
            None => self.topic.clone(),
        }
    }

    /// Works until the subscription closes or fails; `first` is told what became of the first attachment.
    pub(crate) async fn run(self, first: oneshot::Sender<Result<()>>) {
        let shared = Arc::clone(&self.desk.shared);
        let mut first = Some(first);
        let mut closing = shared.closing.subscribe();
        let mut pause = Duration::from_millis(50);
        while shared.closing.borrow().is_none() {
            if !shared.may_work(self.index) {
                if let Some(first) = first.take() {
                    let _ = first.send(Ok(()));
                }
                shared.stands_by(self.index);
                let changed = shared.room.notified();
                if !shared.may_work(self.index) {
                    let _ = tokio::time::timeout(STAND_BY, changed).await;
                }
                continue;
            }
            let attaching = tokio::time::timeout(ATTACH, self.attach(first.is_none()));
            let attached = tokio::select! {
                attached = attaching => attached,
                () = begun(&mut closing) => break,
            };
            let attached = attached.unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Unavailable, "receive", "the broker did not attach the consumer in time"))
            });
            let wait = match attached {
                Ok(attached) => {
                    pause = Duration::from_millis(50);
                    shared.attached(
                        self.index,
                        &attached.conn,
                        attached.consumer,
                        self.is_lane().then(|| self.lane_name()),
                    );
                    if let Some(first) = first.take() {
                        let _ = first.send(Ok(()));
                    }
                    match self.work(attached).await {
                        End::Closing => break,
                        End::Yielded => {
                            shared.detached(self.index, self.is_lane());
                            continue;
                        }
                        End::Lost(cause) => {
                            shared.detached(self.index, self.is_lane());
                            shared.degraded(self.index, cause);
                            pause
                        }
                    }
                }
                Err(error) if self.order != Order::None && error.kind() == ErrorKind::AlreadyExists => {
                    if let Some(first) = first.take() {
                        let _ = first.send(Ok(()));
                    }
                    shared.stands_by(self.index);
                    STAND_BY
                }
                Err(error) => {
                    if let Some(first) = first.take() {
                        let _ = first.send(Err(error));
                        break;
                    }
                    if self.desk.topology.link.is_final(error.kind()) {
                        shared.fail(error);
                        break;
                    }
                    shared.degraded(self.index, error.message());
                    pause = (pause * 2).min(Duration::from_secs(1));
                    pause
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = begun(&mut closing) => {}
            }
        }
        shared.detached(self.index, false);
        shared.working.send_modify(|working| *working -= 1);
    }

    /// Subscribes. A subscription that was deleted must not be made again in silence, so it is looked for first.
    async fn attach(&self, looks: bool) -> Result<Attached> {
        let operation = "receive";
        if looks {
            let groups = self.desk.topology.admin.subscriptions(operation, &self.local).await?;
            if !groups.is_some_and(|groups| groups.contains(&self.subscription)) {
                return Err(missing(operation, &self.destination, None).with("subscription", &self.subscription));
            }
        }
        let conn = self.desk.topology.link.serving(operation, &self.topic).await?;
        let consumer_id = conn.next_id();
        let inbound = conn.add_consumer(consumer_id);
        let kind = self.kind();
        let subscribe = proto::CommandSubscribe {
            topic: self.topic.clone(),
            subscription: self.subscription.clone(),
            sub_type: kind as i32,
            consumer_id,
            consumer_name: Some(uuid::Uuid::now_v7().simple().to_string()),
            durable: Some(true),
            initial_position: Some(proto::command_subscribe::InitialPosition::Earliest as i32),
            key_shared_meta: self.range.map(|HashRange { from, to }| proto::KeySharedMeta {
                key_shared_mode: proto::KeySharedMode::Sticky as i32,
                hash_ranges: vec![proto::IntRange { start: from, end: to }],
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut opening = Opening { conn: Arc::clone(&conn), consumer: consumer_id, is_done: false };
        conn.subscribe(operation, subscribe).await?;
        if let Some(hand_overs) = &self.desk.hand_overs[self.index as usize] {
            // Only then is it known what others may have handed out before.
            hand_overs.catch_up().await?;
        }
        opening.is_done = true;
        Ok(Attached { conn, consumer: consumer_id, inbound })
    }

    async fn work(&self, mut attached: Attached) -> End {
        let shared = &self.desk.shared;
        let mut closing = shared.closing.subscribe();
        loop {
            let room = shared.room.notified();
            if shared.leaves(self.index) {
                let closed = attached.conn.close_consumer(attached.consumer);
                let _ = tokio::time::timeout(Duration::from_secs(5), closed).await;
                return End::Yielded;
            }
            let permits = shared.reserve(self.index);
            if permits > 0 {
                let message_permits = u32::try_from(permits).unwrap_or(u32::MAX);
                attached.conn.tell(BaseCommand {
                    flow: Some(proto::CommandFlow { consumer_id: attached.consumer, message_permits }),
                    ..command(Type::Flow)
                });
            }
            tokio::select! {
                biased;
                () = begun(&mut closing) => return self.leave(attached).await,
                came = attached.inbound.recv() => match came {
                    Some(Inbound::Message(arrived)) => {
                        let mut arrivals = Vec::new();
                        self.read(*arrived, &attached, &mut arrivals);
                        let mut is_closed = false;
                        while arrivals.len() < TOGETHER && !is_closed {
                            match attached.inbound.try_recv() {
                                Ok(Inbound::Message(arrived)) => self.read(*arrived, &attached, &mut arrivals),
                                Ok(Inbound::Closed) => is_closed = true,
                                Err(_) => break,
                            }
                        }
                        let returned = shared.arrive(self.index, arrivals);
                        if !returned.is_empty() {
                            Desk::give_back(returned);
                        }
                        if is_closed {
                            return End::Lost("the broker closed the consumer; attaching again");
                        }
                    }
                    Some(Inbound::Closed) => return End::Lost("the broker closed the consumer; attaching again"),
                    None => return End::Lost("the connection to the broker was lost"),
                },
                () = room => {}
            }
        }
    }

    /// What was handed over to be settled is waited for; then the consumer is closed, and the broker has the rest at once.
    async fn leave(&self, attached: Attached) -> End {
        let shared = &self.desk.shared;
        let deadline = *shared.closing.borrow();
        let deadline = deadline.unwrap_or_else(Instant::now);
        loop {
            let settled = shared.room.notified();
            if !shared.is_settling(self.index) {
                break;
            }
            let again = deadline.min(Instant::now() + Duration::from_millis(100));
            let _ = tokio::time::timeout_at(again, settled).await;
            if Instant::now() >= deadline {
                break;
            }
        }
        let _ = tokio::time::timeout(Duration::from_secs(5), attached.conn.close_consumer(attached.consumer)).await;
        End::Closing
    }

    fn read(&self, arrived: Arrived, attached: &Attached, into: &mut Vec<Arrival>) {
        let Arrived { id, payload, ack_set } = arrived;
        if let Some(why) = codec::unreadable(&payload.metadata) {
            self.bury(id, payload, why, attached);
            return;
        }
        if payload.metadata.num_messages_in_batch.is_none() {
            let (message, notes) = codec::decode(&self.destination, &id, payload);
            into.push(Arrival { id, siblings: None, message, notes: notes.unwrap_or_default() });
            return;
        }
        match codec::unbatch(&payload, &ack_set) {
            Some(parts) => {
                let siblings = Arc::new(AtomicUsize::new(parts.len()));
                for (index, payload) in parts {
                    let mut id = id.clone();
                    id.batch_index = Some(index);
                    let (message, notes) = codec::decode(&self.destination, &id, payload);
                    let siblings = Some(Arc::clone(&siblings));
                    into.push(Arrival { id, siblings, message, notes: notes.unwrap_or_default() });
                }
            }
            None => self.bury(id, payload, "it is a batch that cannot be taken apart", attached),
        }
    }

    /// What cannot be read becomes a dead letter with its bytes as they are; it is acked once that is stored. Otherwise it
    /// comes again when the consumer is attached again.
    fn bury(&self, id: proto::MessageIdData, payload: pulsar::message::Payload, why: &str, attached: &Attached) {
        // The broker counts the messages of a batch, whether they can be read or not.
        let messages = payload.metadata.num_messages_in_batch.and_then(|count| usize::try_from(count).ok());
        self.desk.shared.spent(self.index, messages.unwrap_or(1).max(1));
        let letter = dead_letter::malformed(&self.destination, &id, payload, why);
        let desk = Arc::clone(&self.desk);
        let (conn, consumer) = (Arc::clone(&attached.conn), attached.consumer);
        let producer = Arc::clone(&desk.ways[self.index as usize].letters);
        tokio::spawn(async move {
            let deadline = Instant::now() + desk.settle_timeout;
            let stored = desk.topology.write(vec![(producer, letter)], deadline, "receive").await;
            let reason = Reason::Malformed;
            match stored.into_iter().next() {
                Some(Ok(())) => {
                    let told = tell(&conn, consumer, vec![entry_id(&id)], "receive");
                    let _ = tokio::time::timeout_at(deadline, told).await;
                    tracing::warn!(%reason, "a message that cannot be read became a dead letter");
                }
                _ => tracing::warn!(%reason, "a message that cannot be read could not become a dead letter"),
            }
        });
    }
}

/// Waits until the subscription closes.
async fn begun(closing: &mut watch::Receiver<Option<Instant>>) {
    let _ = closing.wait_for(Option::is_some).await;
}
