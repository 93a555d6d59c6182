//! One queue that a subscription reads. Receives run in tasks of their own: a request that is cut off in the middle
//! would leave its messages leased to nobody.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{
    Bytes, Delivery, DeliveryContext, DeliveryFacts, Destination, Error, ErrorKind, Lane, SubscriptionEvent, Timestamp,
    Token,
};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{Message as Received, MessageSystemAttributeName};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::codec;
use crate::config::LONGEST_POLL;
use crate::error::failed;
use crate::leases::{Forgiven, Lease, Leases};
use crate::publisher::{BATCH, Publisher};
use crate::requests;

/// How long an answer is taken to travel, at most.
const TRAVEL: Duration = Duration::from_millis(250);
/// How long a message waits for somebody to take it.
const UNTAKEN: Duration = Duration::from_secs(1);

/// See the module's documentation.
pub(crate) struct Source {
    pub(crate) client: Client,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) destination: Destination,
    pub(crate) url: String,
    pub(crate) letters: String,
    pub(crate) lane: u32,
    pub(crate) lease: Duration,
    pub(crate) leases: Mutex<Leases>,
    pub(crate) forgiven: Arc<Mutex<Forgiven>>,
    pub(crate) inbox: Arc<Inbox>,
    /// How many messages the open receives may bring.
    pub(crate) asked: AtomicUsize,
    pub(crate) open: AtomicUsize,
    /// How many receives are worth having open: more than one only while they come back full.
    pub(crate) width: AtomicUsize,
}

/// What has arrived, of all sources of a subscription.
#[derive(Default)]
pub(crate) struct Inbox {
    pub(crate) ready: Mutex<VecDeque<Arrival>>,
    pub(crate) events: Mutex<VecDeque<SubscriptionEvent>>,
    pub(crate) failure: Mutex<Option<Error>>,
    pub(crate) arrived: Notify,
    pub(crate) is_closed: AtomicBool,
    is_degraded: AtomicBool,
}

/// A message that is leased and not handed out.
pub(crate) struct Arrival {
    lane: u32,
    since: Instant,
    until: Instant,
    message: Received,
}

impl Inbox {
    fn degraded(&self, cause: Option<String>) {
        if self.is_degraded.swap(cause.is_some(), Ordering::AcqRel) == cause.is_some() {
            return;
        }
        let event = cause.map_or(SubscriptionEvent::Recovered, |cause| SubscriptionEvent::Degraded { cause });
        self.events.lock().push_back(event);
        self.arrived.notify_one();
    }
}

impl Source {
    /// Opens receives for `wanted` more messages, as far as `receivers` allows. The first waits as long as the caller does;
    /// those beside it do not wait, because what they brought later might find nobody.
    pub(crate) fn ask(self: &Arc<Self>, wanted: usize, wait: Duration, receivers: usize) {
        let mut missing = wanted.saturating_sub(self.asked.load(Ordering::Acquire));
        while missing > 0 {
            let open = self.open.load(Ordering::Acquire);
            if open >= self.width.load(Ordering::Acquire).clamp(1, receivers) {
                return;
            }
            let wait = if open == 0 { wait } else { Duration::ZERO };
            let count = missing.min(BATCH);
            missing -= count;
            self.asked.fetch_add(count, Ordering::AcqRel);
            self.open.fetch_add(1, Ordering::AcqRel);
            let source = Arc::clone(self);
            tokio::spawn(async move {
                let brought = source.receive(count, wait).await;
                let width = if brought == BATCH { source.width.load(Ordering::Acquire).max(1) * 2 } else { 1 };
                source.width.store(width.min(receivers), Ordering::Release);
                source.asked.fetch_sub(count, Ordering::AcqRel);
                source.open.fetch_sub(1, Ordering::AcqRel);
                source.inbox.arrived.notify_one();
                if brought > 0 {
                    source.expect_taker().await;
                }
            });
        }
    }

    /// Receives once, into the inbox. Answers how many messages came.
    async fn receive(&self, count: usize, wait: Duration) -> usize {
        let wait = requests::seconds(wait.min(LONGEST_POLL));
        let since = Instant::now();
        let request = self
            .client
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(i32::try_from(count).expect("ten at most"))
            .wait_time_seconds(wait)
            .visibility_timeout(requests::seconds(self.lease))
            .message_attribute_names("All")
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
        let messages = match request.send().await {
            Ok(answer) => answer.messages.unwrap_or_default(),
            Err(error) => {
                self.trouble(failed("receive", &error)).await;
                return 0;
            }
        };
        self.inbox.degraded(None);
        if self.inbox.is_closed.load(Ordering::Acquire) {
            self.give_back(messages).await;
            return 0;
        }
        // The lease began when SQS answered: after the request was sent, and hardly longer ago than an answer travels.
        let now = Instant::now();
        let until = now - (now - since).min(TRAVEL) + self.lease;
        let brought = messages.len();
        let arrival = |message| Arrival { lane: self.lane, since: now, until, message };
        self.inbox.ready.lock().extend(messages.into_iter().map(arrival));
        brought
    }

    /// Gives back what nobody has taken for a while: its caller was cancelled, and other members could have it.
    async fn expect_taker(&self) {
        tokio::time::sleep(UNTAKEN).await;
        let messages = self.remove(|arrival| arrival.since.elapsed() >= UNTAKEN);
        self.give_back(messages).await;
    }

    /// Takes arrivals of this source out of the inbox.
    fn remove(&self, chosen: impl Fn(&Arrival) -> bool) -> Vec<Received> {
        let mut ready = self.inbox.ready.lock();
        if !ready.iter().any(|arrival| arrival.lane == self.lane && chosen(arrival)) {
            return Vec::new();
        }
        let (removed, kept) =
            ready.drain(..).partition::<VecDeque<_>, _>(|arrival| arrival.lane == self.lane && chosen(arrival));
        *ready = kept;
        removed.into_iter().map(|arrival| arrival.message).collect()
    }

    async fn trouble(&self, error: Error) {
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::Unauthenticated => {
                self.inbox.failure.lock().get_or_insert(error.with("destination", &self.destination));
            }
            _ => {
                self.inbox.degraded(Some(error.to_string()));
                // The client has backed off by itself already; this keeps a fast failure from becoming a busy loop.
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }

    /// Ends the leases of messages that nobody gets.
    async fn give_back(&self, messages: Vec<Received>) {
        if messages.is_empty() {
            return;
        }
        let entries: Vec<(Bytes, Duration)> = messages
            .into_iter()
            .filter_map(|message| {
                self.forgiven.lock().forgive(message.message_id.unwrap_or_default());
                Some((Bytes::from(message.receipt_handle?), Duration::ZERO))
            })
            .collect();
        let outcomes = requests::change(&self.client, &self.url, &entries, "release").await;
        for error in outcomes.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "a message could not be given back; it comes back when its lease ends");
        }
    }

    /// Gives back what has arrived for nobody, and what is out.
    pub(crate) async fn close(&self) {
        let mine = self.remove(|_| true);
        let out = self.leases.lock().drain();
        let entries: Vec<_> = out
            .into_iter()
            .map(|(handle, lease)| {
                self.forgiven.lock().forgive(lease.message_id);
                (handle, Duration::ZERO)
            })
            .collect();
        let (..) = tokio::join!(self.give_back(mine), requests::change(&self.client, &self.url, &entries, "release"));
    }

    /// The delivery of an arrival, unless its lease ended while it lay here.
    pub(crate) fn deliver(&self, arrival: Arrival, context: &Arc<DeliveryContext>) -> Option<Delivery> {
        let now = Instant::now();
        if arrival.until <= now {
            return None;
        }
        let mut message = arrival.message;
        let handle = Bytes::from(message.receipt_handle.take()?);
        let message_id = message.message_id.clone().unwrap_or_default();
        let count = message
            .attributes()
            .and_then(|attributes| attributes.get(&MessageSystemAttributeName::ApproximateReceiveCount))
            .and_then(|count| count.parse().ok())
            .unwrap_or(1);
        let facts = DeliveryFacts {
            attempt: self.forgiven.lock().attempt(&message_id, count),
            lane: Lane { index: self.lane, epoch: 0 },
            lease_until: Some(Timestamp::now().after(arrival.until - now)),
            ..DeliveryFacts::new(Token::Bytes(handle.clone()))
        };
        self.leases.lock().hand_out(handle, Lease { until: arrival.until, message_id });
        Some(Delivery::new(codec::decode(message, &self.destination).message, facts, context))
    }

    /// Which source an arrival belongs to.
    pub(crate) fn of(sources: &[Arc<Self>], arrival: &Arrival) -> Arc<Self> {
        Arc::clone(&sources[arrival.lane as usize])
    }
}
