//! Consuming from one group's queue: one task, one channel at a time, attached anew when it is lost.
//!
//! There is never more than one consumer of a feed: each lives on the channel of its attachment, and a new channel is opened
//! only after the old one is gone.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bytes, Destination, Error, ErrorKind, Group, Lane, Reason, Result, SubscriptionEvent, Verdict};
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::Instant;

use crate::agreement;
use crate::codec::{decode, is_mark, notes, offset};
use crate::desk::Desk;
use crate::error::failed;
use crate::ledger::Ledger;
use crate::link::{Link, bounded, passes};
use crate::owner::Owner;
use crate::progress::Place;
use crate::reader::{Read, Reader};
use crate::state::Arrival;
use crate::waits::{ack_alone, gained, next, read, wrote};

/// How long a request of an attachment may take.
const REQUEST: Duration = Duration::from_secs(10);
/// How soon a lost channel is attached again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// How long a user whose credentials may be replaced is refused before that is the end: of one that is deleted the server takes
/// the permissions first, and its connections a moment later.
const DENIED: Duration = Duration::from_secs(10);
/// Messages that are taken in before anything else is looked at.
const BURST: usize = 256;

pub(crate) struct Feed {
    pub(crate) index: u32,
    pub(crate) desk: Arc<Desk>,
    pub(crate) link: Arc<Link>,
    pub(crate) keeps_order: bool,
    /// Whether later messages of a key wait for one that failed.
    pub(crate) blocks: bool,
    pub(crate) prefetch: u16,
    /// What is bound again after a lost connection, where the subscription may create.
    pub(crate) restores: Option<(Destination, Group)>,
    /// How far this member knows its group to be in the stream.
    pub(crate) known: Option<Place>,
}

/// How an attachment ended.
enum Ended {
    /// The subscription closes; everything is given back.
    Closed,
    /// It can be attached again.
    Lost(Error),
    /// It cannot.
    Over(Error),
    /// It was left to other members, until somebody receives here.
    Left,
}

/// One channel, and what consumes on it.
struct Session {
    channel: Arc<Channel>,
    lane: Lane,
    consumer: Option<Consumer>,
    /// Set when the server was told to send ahead less than it may, because older messages are out still: the last of them.
    narrow: Option<u64>,
    owner: Option<Owner>,
    /// What reads the stream, where there is one.
    reader: Option<Reader>,
    /// What failed and keeps its place, where it does.
    ledger: Option<Ledger>,
}

impl Feed {
    pub(crate) async fn run(mut self) {
        let shared = Arc::clone(&self.desk.shared);
        let (mut pause, mut is_degraded) = (FIRST_PAUSE, false);
        let mut denied_at = None;
        loop {
            let ended = match self.attach(is_degraded).await {
                Ok(mut session) => {
                    if is_degraded {
                        shared.tell(SubscriptionEvent::Recovered);
                    }
                    (pause, is_degraded) = (FIRST_PAUSE, false);
                    let (lane, attached_at) = (session.lane, Instant::now());
                    let ended = self.serve(&mut session).await;
                    denied_at.take_if(|_| attached_at.elapsed() > DENIED);
                    if let Some(reader) = &session.reader {
                        self.known = shared.place(self.index, reader.began()).map(|(_, place)| place);
                    }
                    drop(session);
                    shared.detach(self.index);
                    if self.keeps_order && !matches!(ended, Ended::Closed) {
                        shared.tell(SubscriptionEvent::Lost { lane });
                    }
                    ended
                }
                Err(error) if passes(&error) => Ended::Lost(error),
                Err(error) => Ended::Over(error),
            };
            let ended = match ended {
                Ended::Over(error) if self.may_be_let_in(&error, &mut denied_at) => Ended::Lost(error),
                ended => ended,
            };
            match ended {
                Ended::Closed => break,
                Ended::Left => {
                    let mut closing = shared.closing.subscribe();
                    loop {
                        let changed = shared.changed.notified();
                        tokio::pin!(changed);
                        changed.as_mut().enable();
                        if !shared.is_resting() || closing.borrow_and_update().is_some() {
                            break;
                        }
                        tokio::select! {
                            () = &mut changed => {}
                            _ = closing.changed() => {}
                        }
                    }
                    if closing.borrow().is_some() {
                        break;
                    }
                }
                Ended::Over(error) => {
                    shared.fail(error);
                    break;
                }
                Ended::Lost(error) => {
                    if !is_degraded {
                        is_degraded = true;
                        shared.tell(SubscriptionEvent::Degraded { cause: error.message().to_owned() });
                    }
                    let mut closing = shared.closing.subscribe();
                    if tokio::time::timeout(pause, closing.wait_for(Option::is_some)).await.is_ok() {
                        break;
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
        shared.working.send_modify(|working| *working -= 1);
    }

    fn may_be_let_in(&self, error: &Error, denied_at: &mut Option<Instant>) -> bool {
        error.kind() == ErrorKind::PermissionDenied
            && self.link.may_change_login()
            && denied_at.get_or_insert_with(Instant::now).elapsed() < DENIED
    }

    pub(crate) fn queue(&self) -> &str {
        &self.desk.queues[self.index as usize]
    }

    /// `again`: after a loss.
    async fn attach(&self, again: bool) -> Result<Session> {
        let deadline = Instant::now() + REQUEST;
        if let Some((destination, group)) = self.restores.as_ref().filter(|_| again) {
            self.desk.topology.bind_again(destination, group, "receive", deadline).await?;
        }
        let channel = Arc::new(self.link.channel("receive", deadline).await?);
        let owner = match self.keeps_order {
            true => Some({
                let (link, desk, queue) = (&self.link, &self.desk, self.queue());
                Owner::stand_by(link, desk, queue, self.prefetch, self.blocks, deadline).await?
            }),
            false => None,
        };
        let lane = self.desk.shared.attach(self.index, Arc::clone(&channel));
        Ok(Session { channel, lane, consumer: None, narrow: None, owner, reader: None, ledger: None })
    }

    async fn serve(&self, session: &mut Session) -> Ended {
        let shared = &self.desk.shared;
        let mut closing = shared.closing.subscribe();
        let tick = (shared.lease / 20).clamp(Duration::from_millis(10), Duration::from_millis(500));
        let mut looked = Instant::now();
        loop {
            let changed = shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if closing.borrow_and_update().is_some() {
                return self.close(session).await;
            }
            if let Err(error) = self.adjust(session).await {
                return self.ended(error, session).await;
            }
            if looked.elapsed() >= tick {
                looked = Instant::now();
                shared.end_leases(self.index);
                if !session.channel.status().connected() || session.owner.as_ref().is_some_and(|owner| !owner.stands())
                {
                    return Ended::Lost(self.gone());
                }
                if session.reader.is_some() && shared.is_idle(self.index) {
                    self.leave(session, Instant::now() + REQUEST).await;
                    return Ended::Left;
                }
            }
            for over in shared.over(self.index) {
                tokio::spawn(Arc::clone(&self.desk).bury(over, Verdict::new(Reason::Expired)));
            }
            let due = [
                session.reader.as_mut().and_then(|reader| reader.note(shared, self.index)),
                session.ledger.as_mut().and_then(|ledger| ledger.note(shared, self.index)),
                if self.blocks { shared.resume(self.index) } else { None },
            ];
            let wake = due.into_iter().flatten().fold(looked + tick, Instant::min);
            tokio::select! {
                next = next(&mut session.consumer) => {
                    if let Err(error) = self.take_in(next, session) {
                        return self.ended(error, session).await;
                    }
                }
                read = read(&mut session.reader) => {
                    if let Read::Came(next) = read
                        && let Err(error) = self.take_from_stream(next, session)
                    {
                        return self.ended(error, session).await;
                    }
                }
                gained = gained(&mut session.owner) => match gained {
                    Ok(()) => {
                        let name = self.queue().to_owned();
                        shared.tell(SubscriptionEvent::Assigned { lane: session.lane, name });
                    }
                    Err(error) => return self.ended(error, session).await,
                },
                () = wrote(&mut session.ledger, shared, self.index) => {}
                () = &mut changed => {}
                _ = closing.changed() => {}
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    fn gone(&self) -> Error {
        Error::new(ErrorKind::Unavailable, "receive", "the channel is gone").with("queue", self.queue())
    }

    /// Begins or ends consuming, as it is wanted.
    async fn adjust(&self, session: &mut Session) -> Result<()> {
        let shared = &self.desk.shared;
        let deadline = Instant::now() + REQUEST;
        let is_turn = session.owner.as_ref().is_none_or(Owner::is_active);
        // Under order nothing is given back while older messages are out: it would come back before them.
        let is_wanted = is_turn && (self.keeps_order || !shared.is_resting());
        let is_narrow = session.narrow.is_some_and(|last| !shared.has_unacked_to(self.index, last));
        if session.consumer.is_some() && (!is_wanted || is_narrow) {
            self.stop(session, deadline).await?;
            shared.surrender(self.index);
        }
        if session.consumer.is_none() && is_wanted && self.keeps_order {
            self.take_over(session).await?;
            if let (Some(stream), Some(owner)) = (self.desk.streams.get(self.index as usize), &session.owner) {
                let reader = Reader::open(self, stream, &session.channel, owner.channel(), deadline).await?;
                shared.begin_log(self.index, reader.began().from());
                session.reader = Some(reader);
            }
            if let (true, Some(owner)) = (self.blocks, &session.owner) {
                let (ledger, notes) = Ledger::open(self.queue(), owner.channel(), owner.is_first(), deadline).await?;
                let most = usize::from(owner.most_held().max(self.prefetch));
                shared.expect(self.index, notes, most, session.reader.is_some());
                session.ledger = Some(ledger);
            }
            return Ok(());
        }
        if session.consumer.is_none() && is_wanted {
            let (unacked, last) = shared.unacked(self.index);
            let room = usize::from(self.prefetch).saturating_sub(unacked);
            let Some(room) = u16::try_from(room).ok().filter(|room| *room > 0) else { return Ok(()) };
            let topology = &self.desk.topology;
            agreement::agree(topology, self.queue(), false, "receive", deadline).await?;
            session.consumer = Some(self.consume(&session.channel, room, deadline).await?);
            session.narrow = (unacked > 0).then_some(last);
            if agreement::is_kept(topology, self.queue(), "receive", deadline).await? {
                // What has come to this consumer nobody has seen: it goes back with the channel.
                session.consumer = None;
                let text = "members that keep order came at the same moment";
                return Err(Error::new(ErrorKind::Unavailable, "receive", text).with("queue", self.queue()));
            }
        }
        Ok(())
    }

    async fn consume(&self, channel: &Channel, room: u16, deadline: Instant) -> Result<Consumer> {
        bounded("receive", deadline, channel.basic_qos(room, BasicQosOptions::default())).await?;
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = channel.basic_consume(self.queue().into(), "".into(), options, none);
        bounded("receive", deadline, consuming).await
    }

    /// Begins to consume under order.
    ///
    /// The server puts what comes back behind what came back before (`rabbit_fifo:return_one/8` of 4.0.5). A member that took
    /// some of it and went would leave what is older behind what is newer. So nobody takes only some: the prefetch is what
    /// any member of the group may have held, and the server hands so many over in one step, to one consumer. What this
    /// member was not asked for stays ready here.
    async fn take_over(&self, session: &mut Session) -> Result<()> {
        let deadline = Instant::now() + REQUEST;
        let most = session.owner.as_ref().map_or(self.prefetch, Owner::most_held).max(self.prefetch);
        let channel = Arc::clone(&session.channel);
        session.consumer = Some(self.consume(&channel, most, deadline).await?);
        // That nobody else consumes was looked at, but an answer of "nobody" may be the server's excuse for none: when the
        // queue does not answer within 250 ms it tells 0 and 0 (`rabbit_quorum_queue:stat/2`). Now this consumer is there.
        let (mut pause, mut was_alone) = (FIRST_PAUSE, true);
        loop {
            let options = QueueDeclareOptions::durable().passive();
            let asking = channel.queue_declare(self.queue().into(), options, FieldTable::default());
            match bounded("receive", deadline, asking).await?.consumer_count() {
                1 if was_alone => return Ok(()),
                // What the other one held has come back: this one's is to come back behind it.
                1 => break,
                count => was_alone &= count == 0,
            }
            if Instant::now() + pause >= deadline {
                break;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        let text = "somebody else consumed from the queue, and order is kept";
        Err(Error::new(ErrorKind::Unavailable, "receive", text).with("queue", self.queue()))
    }

    /// Cancels the consumer, and takes in what was on its way: an ack of several messages must not cover one that nobody
    /// has seen.
    async fn stop(&self, session: &mut Session, deadline: Instant) -> Result<()> {
        let Some(mut consumer) = session.consumer.take() else { return Ok(()) };
        let cancelling = session.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        bounded("receive", deadline, cancelling).await?;
        loop {
            match tokio::time::timeout_at(deadline, consumer.next()).await {
                Ok(Some(Ok(delivery))) => self.arrive(vec![self.read(&self.destination(), delivery, None)]),
                Ok(Some(Err(error))) => return Err(failed("receive", &error)),
                Ok(None) => return Ok(()),
                Err(_) => return Err(self.gone()),
            }
        }
    }

    /// Takes in what is there; what came before an error too.
    fn take_in(&self, first: Option<lapin::Result<Delivery>>, session: &mut Session) -> Result<()> {
        let destination = self.destination();
        let (mut arrivals, mut next, mut result) = (Vec::new(), Some(first), Ok(()));
        while let Some(came) = next {
            match came {
                Some(Ok(delivery)) => arrivals.push(self.read(&destination, delivery, None)),
                Some(Err(error)) => result = Err(failed("receive", &error)),
                // The server has cancelled it, or the channel is gone.
                None => result = Err(self.gone()),
            }
            if result.is_err() || arrivals.len() >= BURST {
                break;
            }
            next = session.consumer.as_mut().and_then(|consumer| consumer.next().now_or_never());
        }
        self.arrive(arrivals);
        result
    }

    /// The same from a stream: what is nobody's is passed over.
    fn take_from_stream(&self, first: Option<lapin::Result<Delivery>>, session: &mut Session) -> Result<()> {
        let Some(reader) = &mut session.reader else { return Ok(()) };
        let destination = self.destination();
        let (mut arrivals, mut next, mut result) = (Vec::new(), Some(first), Ok(()));
        for left in (0..BURST).rev() {
            match next {
                None => break,
                Some(Some(Ok(delivery))) => match offset(&delivery.properties) {
                    Some(offset) if !reader.began().is_settled(offset) && !is_mark(&delivery.properties) => {
                        arrivals.push(self.read(&destination, delivery, Some(offset)));
                    }
                    told => {
                        // Nobody's; an ack is the server's leave to send another one.
                        ack_alone(&session.channel, delivery.delivery_tag);
                        if let Some(offset) = told {
                            // Progress is noted in the stream's order.
                            self.arrive(std::mem::take(&mut arrivals));
                            self.desk.shared.passed(self.index, offset);
                        }
                    }
                },
                Some(Some(Err(error))) => result = Err(failed("receive", &error)),
                Some(None) => result = Err(self.gone()),
            }
            if result.is_err() {
                break;
            }
            next = if left > 0 { reader.ready() } else { None };
        }
        self.arrive(arrivals);
        result
    }

    fn destination(&self) -> Destination {
        self.desk.shared.lock().feeds[self.index as usize].destination.clone()
    }

    fn read(&self, destination: &Destination, delivery: Delivery, offset: Option<u64>) -> Arrival {
        let noted = notes(&delivery.properties);
        let message = Arc::new(decode(destination, &delivery.properties, Bytes::from(delivery.data)));
        // A classic queue tells only that it was handed out before.
        let told = if self.desk.topology.queue.counts() { noted.returned } else { u32::from(delivery.redelivered) };
        let delivered = told.saturating_add(1);
        let (feed, tag, hop) = (self.index, delivery.delivery_tag, noted.hop);
        Arrival { feed, tag, message, hop, offset, delivered }
    }

    fn arrive(&self, mut arrivals: Vec<Arrival>) {
        if arrivals.is_empty() {
            return;
        }
        for over in self.desk.shared.arrive(&mut arrivals) {
            let verdict = Verdict::new(Reason::Expired);
            tokio::spawn(Arc::clone(&self.desk).bury(over, verdict));
        }
    }

    /// Why an attachment ended: a queue that is gone is told apart from a connection that is.
    async fn ended(&self, error: Error, session: &mut Session) -> Ended {
        let is_refused = error.kind() == ErrorKind::Unauthenticated && !passes(&error);
        let is_final =
            matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Closed | ErrorKind::AlreadyExists);
        if is_refused || is_final {
            return Ended::Over(error);
        }
        if session.channel.status().connected() || error.kind() == ErrorKind::NotFound {
            let deadline = Instant::now() + REQUEST;
            let (destination, group) = {
                let state = self.desk.shared.lock();
                let own = &state.feeds[self.index as usize];
                (own.destination.clone(), own.group.clone())
            };
            if let Ok(None) = self.desk.topology.look(self.queue(), "receive", deadline).await {
                return Ended::Over(crate::topology::missing("receive", &destination, Some(&group)));
            }
            if let Some(stream) = self.desk.streams.get(self.index as usize)
                && let Ok(None) = self.desk.topology.look(stream, "receive", deadline).await
            {
                return Ended::Over(crate::topology::missing("receive", &destination, None));
            }
        }
        // A channel that stands still must not keep messages from the next one.
        let _ = tokio::time::timeout(REQUEST, session.channel.close(200, "".into())).await;
        Ended::Lost(error)
    }

    /// Gives everything back: the server takes what is unacked when the channel closes, in order. Of a channel that closes it
    /// drops the acks that it has not passed to the queue yet (more than 32 at once wait); cancelling the consumer passes
    /// them (`rabbit_fifo_client:settle/3` and `cancel_checkout/3` of 4.0.5). So that comes after the last ack.
    async fn close(&self, session: &mut Session) -> Ended {
        let shared = &self.desk.shared;
        let deadline = shared.closing.borrow().unwrap_or_else(Instant::now);
        loop {
            let changed = shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !shared.is_settling(self.index) || Instant::now() >= deadline {
                break;
            }
            // Failures are noted to the end: a nack may wait for that.
            let due = session.ledger.as_mut().and_then(|ledger| ledger.note(shared, self.index));
            tokio::select! {
                () = wrote(&mut session.ledger, shared, self.index) => {}
                () = &mut changed => {}
                () = tokio::time::sleep_until(due.map_or(deadline, |due| due.min(deadline))) => {}
            }
        }
        self.leave(session, deadline).await;
        Ended::Closed
    }

    async fn leave(&self, session: &mut Session, deadline: Instant) {
        // Under order nothing is cancelled: what a quorum queue sends to a consumer that is being cancelled its channel gives back
        // at once (4.0.5, `rabbit_fifo_client:handle_delivery/4`), and so before what is older and out. When the channel goes, all of
        // it comes back in one step, in its order (`rabbit_fifo:return_all/6`).
        if !self.keeps_order {
            let _ = self.stop(session, deadline).await;
        }
        if let Some(reader) = &mut session.reader {
            reader.finish(&self.desk.shared, self.index, deadline).await;
        }
        if let Some(ledger) = &mut session.ledger {
            ledger.finish(&self.desk.shared, self.index, deadline).await;
        }
        if session.channel.status().connected() {
            let _ = tokio::time::timeout_at(deadline, session.channel.close(200, "closed".into())).await;
        }
        // The client cancels a consumer that is dropped while its channel is open.
        session.consumer = None;
        if let Some(owner) = session.owner.take() {
            owner.release(deadline).await;
        }
    }
}
