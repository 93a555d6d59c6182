//! One queue that a subscription reads. Receives run in tasks of their own: a request that is cut off in the middle
//! would leave its messages leased to nobody.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{
    Bytes, Delivery, DeliveryContext, DeliveryFacts, Destination, Error, ErrorKind, Group, Lane, Message, Timestamp,
    Token,
};
use aws_sdk_sqs::types::{Message as Received, MessageSystemAttributeName as System};
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::clients::Clients;
use crate::codec::{self, Raw};
use crate::config::{LONGEST_POLL, Polls};
use crate::error::failed;
use crate::inbox::{Arrival, Inbox};
use crate::leases::{self, Back, Delays, Forgiven, Lease, Leases, Taken};
use crate::letters;
use crate::parcel::BATCH;
use crate::requests::{self, Change, give_back};
use crate::topology::Prepared;

/// How long an answer is taken to travel, at most.
const TRAVEL: Duration = Duration::from_millis(250);
/// How long a message waits for somebody to take it, where the member holds nothing.
pub(crate) const UNTAKEN: Duration = Duration::from_secs(1);
/// The same in parts of the lease, where the member works on others and will come for it.
const UNTAKEN_SHARE: u32 = 4;
/// Between two requests where the server does not wait.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest that SQS keeps a message invisible.
const LONGEST_LEASE: Duration = Duration::from_secs(12 * 3600);

/// See the module's documentation.
pub(crate) struct Source {
    pub(crate) clients: Clients,
    pub(crate) destination: Destination,
    pub(crate) group: Group,
    pub(crate) queues: Prepared,
    pub(crate) lane: u32,
    pub(crate) lease: Duration,
    pub(crate) is_total: bool,
    pub(crate) polls: Polls,
    /// Locked after the inbox, where both are.
    pub(crate) leases: Mutex<Leases>,
    pub(crate) forgiven: Arc<Mutex<Forgiven>>,
    pub(crate) delays: Arc<Mutex<Delays>>,
    pub(crate) inbox: Arc<Inbox>,
    /// How many messages have come.
    pub(crate) received: AtomicU64,
    /// How many messages the open receives may bring.
    pub(crate) asked: AtomicUsize,
    pub(crate) open: AtomicUsize,
    /// How many receives are worth having open: more than one only while they come back full.
    pub(crate) width: AtomicUsize,
}

impl Source {
    /// Whether it reads a FIFO queue.
    pub(crate) fn is_fifo(&self) -> bool {
        self.queues.retry.is_some()
    }

    /// Whether its receives have come back full of late: there is more.
    pub(crate) fn is_full(&self) -> bool {
        self.width.load(Ordering::Acquire) > 1
    }

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
        let wait = wait.min(LONGEST_POLL);
        let deadline = Instant::now() + wait;
        let (since, messages) = loop {
            let since = Instant::now();
            let held = match self.polls {
                Polls::Long => requests::seconds(wait),
                Polls::Short => 0,
            };
            let messages = match self.request(count, held).await {
                Ok(messages) => messages,
                Err(error) => {
                    self.trouble(error).await;
                    return 0;
                }
            };
            let is_over = self.polls == Polls::Long || Instant::now() + PAUSE > deadline || !self.inbox.is_alive();
            if is_over || !messages.is_empty() {
                break (since, messages);
            }
            self.inbox.degraded(None);
            tokio::time::sleep(PAUSE).await;
        };
        self.inbox.degraded(None);
        // The lease began when SQS answered: after the request was sent, and hardly longer ago than an answer travels.
        let now = Instant::now();
        let until = now - (now - since).min(TRAVEL) + self.lease;
        let arrivals: Vec<Arrival> =
            messages.into_iter().filter_map(|message| self.arrival(message, now, until)).collect();
        if self.inbox.is_closed() {
            self.give_back(arrivals).await;
            return 0;
        }
        let time = Timestamp::now();
        let (early, ready): (Vec<_>, Vec<_>) =
            arrivals.into_iter().partition(|arrival| arrival.carried.not_before.is_some_and(|due| due > time));
        let (expired, ready): (Vec<_>, Vec<_>) =
            ready.into_iter().partition(|arrival| arrival.carried.expires_at.is_some_and(|end| end <= time));
        let brought = ready.len();
        if brought > 0 {
            self.inbox.ready.lock().extend(ready);
            self.inbox.arrived.notify_one();
        }
        self.put_off(early, time).await;
        letters::bury_expired(self, expired).await;
        brought
    }

    /// Asks for messages. Of a FIFO queue by the client without retries of its own: asked again with the same attempt id, SQS
    /// hands over what a lost answer held, instead of waiting for its lease. That is so "during a visibility timeout"
    /// (<https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_ReceiveMessage.html>); behind it ElasticMQ
    /// (1.6.16) takes the messages from who has got them since (ReceiveRequestAttemptCache.scala, `allValid`).
    async fn request(&self, count: usize, held: i32) -> Result<Vec<Received>, Error> {
        let receiving = |client| receiving(client, &self.queues.queue, count, held, self.lease);
        if !self.is_fifo() {
            let answer = receiving(&self.clients.polls).send().await;
            return answer.map(|answer| answer.messages.unwrap_or_default()).map_err(|error| failed("receive", &error));
        }
        let fresh = || (uuid::Uuid::new_v4().simple().to_string(), Instant::now());
        let (mut attempt, mut since) = fresh();
        for asked in 1.. {
            if since.elapsed() + TRAVEL >= self.lease {
                (attempt, since) = fresh();
            }
            let request = receiving(&self.clients.sender).receive_request_attempt_id(attempt.clone());
            let error = match request.send().await {
                Ok(answer) => return Ok(answer.messages.unwrap_or_default()),
                Err(error) => failed("receive", &error),
            };
            if !requests::passes(&error) || asked >= requests::TRIES {
                return Err(error);
            }
            tokio::time::sleep(requests::pause(asked)).await;
        }
        unreachable!("the last try answers")
    }

    fn arrival(&self, mut message: Received, since: Instant, until: Instant) -> Option<Arrival> {
        let handle = Bytes::from(message.receipt_handle.take()?);
        let number = |name: &System| message.attributes.as_ref()?.get(name)?.parse::<i64>().ok();
        let count = number(&System::ApproximateReceiveCount).and_then(|count| u32::try_from(count).ok()).unwrap_or(1);
        let first_at = number(&System::ApproximateFirstReceiveTimestamp).map(Timestamp::from_millis);
        let raw = raw(message);
        // A standard queue passes one on, and keeps no order by it.
        let (message_id, group) = (raw.id.clone(), raw.group.clone().filter(|_| self.is_fifo()));
        let decoded = codec::decode(raw, &self.destination);
        let mut carried = decoded.carried;
        carried.first_at = carried.first_at.or(first_at);
        let (lane, message) = (self.lane, decoded.message);
        let place = self.received.fetch_add(1, Ordering::Relaxed);
        Some(Arrival { lane, place, since, until, handle, message_id, group, count, carried, message })
    }

    /// Puts back what is not due yet, until it is. SQS counts the hand-over; this connection does not.
    async fn put_off(&self, early: Vec<Arrival>, now: Timestamp) {
        if early.is_empty() {
            return;
        }
        let changes = early.into_iter().map(|arrival| {
            self.forgiven.lock().forgive(arrival.message_id);
            let millis = arrival.carried.not_before.map_or(0, |due| due.as_millis() - now.as_millis());
            let left = Duration::from_millis(u64::try_from(millis).unwrap_or(0)).min(LONGEST_LEASE);
            self.delays.lock().add(&self.queues.queue, Instant::now() + left);
            ((arrival.handle, arrival.until), left)
        });
        let changes: Vec<_> = changes.collect();
        for error in self.change(&changes, "receive").await.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "a delayed message could not be put back; it is looked at again when its lease ends");
        }
    }

    /// Changes visibility timeouts.
    pub(crate) async fn change(&self, changes: &[Change], operation: &'static str) -> Vec<Result<(), Error>> {
        requests::change(&self.clients, &self.queues.queue, changes, operation).await
    }

    /// Gives back what nobody has taken for a while: its caller was cancelled, and other members could have it. Not at once where
    /// the caller is at work and comes for more: giving back costs requests, and SQS counts the hand-over.
    async fn expect_taker(&self) {
        let mut limit = UNTAKEN;
        tokio::time::sleep(limit).await;
        if self.leases.lock().has_any_out() {
            limit = limit.max(self.lease / UNTAKEN_SHARE);
            tokio::time::sleep(limit - UNTAKEN).await;
        }
        let backs: Vec<_> = {
            let mut ready = self.inbox.ready.lock();
            let is_untaken = |arrival: &Arrival| arrival.lane == self.lane && arrival.since.elapsed() >= limit;
            let arrivals = Inbox::remove_of(&mut ready, is_untaken);
            // Nobody is to have something before what this member holds of its message group.
            let mut leases = self.leases.lock();
            arrivals.into_iter().filter_map(|arrival| leases.return_later(self.back(arrival))).collect()
        };
        self.put_back_quietly(backs).await;
    }

    /// A message that is out is dropped: what goes back now. Under order it waits for what is out of its message group, and what is
    /// behind it waits with it.
    pub(crate) fn drop_out(&self, handle: Bytes) -> Vec<Back> {
        let mut ready = self.inbox.ready.lock();
        let mut leases = self.leases.lock();
        let (group, back) = match leases.take(&handle) {
            Taken::Held(lease) => (lease.group.clone(), Some(lease.back(handle))),
            Taken::Over(group) => (group, None),
            Taken::Unknown => return Vec::new(),
        };
        let Some(group) = group else { return back.into_iter().collect() };
        let behind = match back {
            Some(_) => Inbox::remove_of(&mut ready, |arrival| self.is_behind(arrival, std::slice::from_ref(&group))),
            None => Vec::new(),
        };
        let mut backs = leases.take_returning(std::slice::from_ref(&group));
        let behind = behind.into_iter().map(|arrival| self.back(arrival));
        backs.extend(back.into_iter().chain(behind).filter_map(|back| leases.return_later(back)));
        backs
    }

    fn is_behind(&self, arrival: &Arrival, groups: &[String]) -> bool {
        arrival.lane == self.lane && arrival.group.as_ref().is_some_and(|group| groups.contains(group))
    }

    /// Takes what has arrived of message groups, because something before it goes back.
    pub(crate) fn take_behind(&self, groups: &[String]) -> Vec<Back> {
        if groups.is_empty() {
            return Vec::new();
        }
        let behind = self.inbox.remove(|arrival| self.is_behind(arrival, groups));
        behind.into_iter().map(|arrival| self.back(arrival)).collect()
    }

    /// Puts messages back, what belongs to one message group by one request and in the order of the queue: where something of it is
    /// seen as soon as it is back, as on LocalStack (4.13.1), whoever gets it is to get the rest behind it. The outcome of each.
    ///
    /// What is back by itself, because its lease is over, is not asked for: the request would take it from who has it by now.
    pub(crate) async fn put_back(&self, backs: Vec<Back>, operation: &'static str) -> Vec<(u64, Result<(), Error>)> {
        let now = Instant::now();
        let (backs, over): (Vec<_>, Vec<_>) = backs.into_iter().partition(|back| back.leased.1 > now);
        let is_over = || Error::new(ErrorKind::StaleDelivery, operation, "its lease is over; the message comes back");
        let mut answers: Vec<_> = over.into_iter().map(|back| (back.place, Err(is_over()))).collect();
        let parts = if self.is_fifo() { leases::packed(backs) } else { vec![backs] };
        let asked = parts.into_iter().map(|part| self.put_back_in_order(part, operation));
        answers.extend(join_all(asked).await.into_iter().flatten());
        answers
    }

    async fn put_back_in_order(&self, backs: Vec<Back>, operation: &'static str) -> Vec<(u64, Result<(), Error>)> {
        let (places, changes): (Vec<u64>, Vec<Change>) =
            backs.into_iter().map(|back| (back.place, give_back(back.leased))).unzip();
        // All at once where no order is kept.
        let size = if self.is_fifo() { BATCH } else { changes.len().max(1) };
        let mut answers = Vec::with_capacity(changes.len());
        for part in changes.chunks(size) {
            answers.extend(self.change(part, operation).await);
        }
        places.into_iter().zip(answers).collect()
    }

    async fn trouble(&self, error: Error) {
        match error.kind() {
            // The provider may say other ones next time.
            ErrorKind::Unauthenticated if self.clients.login.is_some() => self.degraded(&error).await,
            ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::Unauthenticated => {
                self.inbox.fail(error.with("destination", &self.destination));
            }
            _ => self.degraded(&error).await,
        }
    }

    async fn degraded(&self, error: &Error) {
        self.inbox.degraded(Some(error.to_string()));
        // The client has backed off by itself already; this keeps a fast failure from becoming a busy loop.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    /// Ends the leases of messages that nobody gets.
    pub(crate) async fn give_back(&self, arrivals: Vec<Arrival>) {
        let backs = arrivals.into_iter().map(|arrival| self.back(arrival)).collect();
        self.put_back_quietly(backs).await;
    }

    /// What nobody got, to be put back: that it was handed over is forgiven.
    fn back(&self, arrival: Arrival) -> Back {
        self.forgiven.lock().forgive(arrival.message_id);
        Back { group: arrival.group, place: arrival.place, leased: (arrival.handle, arrival.until) }
    }

    /// Puts messages back for which nobody waits.
    pub(crate) async fn put_back_quietly(&self, backs: Vec<Back>) {
        if backs.is_empty() {
            return;
        }
        self.put_back(backs, "release").await.into_iter().for_each(|(_, answer)| not_back(answer));
    }

    /// Gives back what has arrived for nobody, and what is out.
    pub(crate) async fn close(&self) {
        let mine = self.inbox.remove(|arrival| arrival.lane == self.lane);
        let out = self.leases.lock().drain();
        let held = out.into_iter().map(|(handle, lease)| {
            let back = lease.back(handle);
            self.forgiven.lock().forgive(lease.message_id);
            back
        });
        let mut backs: Vec<_> = held.collect();
        backs.extend(self.leases.lock().drain_returning());
        backs.extend(mine.into_iter().map(|arrival| self.back(arrival)));
        self.put_back_quietly(backs).await;
    }

    /// The delivery of an arrival, unless its lease ended while it lay here.
    pub(crate) fn deliver(&self, arrival: Arrival, context: &Arc<DeliveryContext>) -> Option<Delivery> {
        let now = Instant::now();
        if arrival.until <= now {
            return None;
        }
        let Arrival { place, until, handle, message_id, group, count, carried, message, .. } = arrival;
        let handed_over = self.forgiven.lock().handed_over(&message_id, count);
        let facts = DeliveryFacts {
            attempt: carried.failed.saturating_add(1),
            deliveries: Some(carried.failed.saturating_add(handed_over)),
            lane: Lane { index: self.lane, epoch: 0 },
            lease_until: Some(Timestamp::now().after(until - now)),
            ..DeliveryFacts::new(Token::Bytes(handle.clone()))
        };
        self.leases.lock().hand_out(handle, Lease { place, until, message_id, group, carried });
        Some(Delivery::new(message, facts, context))
    }

    /// Which source an arrival belongs to.
    pub(crate) fn of(sources: &[Arc<Self>], arrival: &Arrival) -> Arc<Self> {
        Arc::clone(&sources[arrival.lane as usize])
    }

    /// The message group and the deduplication id of a copy that goes to this source.
    pub(crate) fn lane_of(&self, message: &Message, dedup: String) -> (String, String) {
        crate::parcel::lane_of(message, self.is_total, dedup)
    }
}

/// What became of a message that goes back and that nobody waits for.
pub(crate) fn not_back(answer: Result<(), Error>) {
    if let Err(error) =
        answer.or_else(|error| if error.kind() == ErrorKind::StaleDelivery { Ok(()) } else { Err(error) })
    {
        tracing::warn!(%error, "a message could not be given back; it comes back when its lease ends");
    }
}

/// A request for messages, with everything that this library reads of them.
pub(crate) fn receiving(
    client: &aws_sdk_sqs::Client,
    url: &str,
    count: usize,
    wait: i32,
    lease: Duration,
) -> aws_sdk_sqs::operation::receive_message::builders::ReceiveMessageFluentBuilder {
    client
        .receive_message()
        .queue_url(url)
        .max_number_of_messages(i32::try_from(count.min(BATCH)).expect("ten at most"))
        .wait_time_seconds(wait)
        .visibility_timeout(requests::seconds(lease))
        .message_attribute_names("All")
        .message_system_attribute_names(System::ApproximateReceiveCount)
        .message_system_attribute_names(System::ApproximateFirstReceiveTimestamp)
        .message_system_attribute_names(System::SentTimestamp)
        .message_system_attribute_names(System::MessageGroupId)
}

/// A received message without its handle.
pub(crate) fn raw(message: Received) -> Raw {
    let mut system = message.attributes.unwrap_or_default();
    let sent = system.get(&System::SentTimestamp).and_then(|millis| millis.parse().ok()).map(Timestamp::from_millis);
    Raw {
        body: message.body.unwrap_or_default(),
        attributes: message.message_attributes.unwrap_or_default(),
        id: message.message_id.unwrap_or_default(),
        sent,
        group: system.remove(&System::MessageGroupId),
    }
}

/// What has come for a source, as a queue of arrivals.
pub(crate) type Arrivals = VecDeque<Arrival>;
