//! Pulling: one task for each destination of a subscription asks the server for as much as there is room for.
//!
//! It speaks the pull protocol itself. The client's own stream of messages does not end when its consumer is deleted
//! while disconnected (nats.rs #1584), fetches ahead on its own (#1418), and cannot be told how much room there is.

mod fresh;
mod gather;
mod line;
mod turn;

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Destination, Error, ErrorKind, Result, Timestamp};
use async_nats::{HeaderMap, Message, StatusCode};
use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::ack::{self, Ack};
use crate::agreement::{Stand, Unordered};
use crate::codec::{self, Stored};
use crate::desk::Desk;
use crate::inbox::Inbox;
use crate::link;
use crate::lookup::look_up;
use crate::owner::Owner;
use crate::state::Arrival;
use fresh::Fresh;
use gather::Gathering;

/// How long a pull waits at the server.
const EXPIRES: Duration = Duration::from_secs(30);
/// The same in a cluster, where a pull cannot be ended at once: see [`Feed::pulls_end`].
const EXPIRES_IN_A_CLUSTER: Duration = Duration::from_secs(1);
/// How often the server says that it still knows a pull.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Messages that arrive together: at most so many before anything else has its turn.
const AT_ONCE: usize = 256;
/// How long the end of a pull may take.
const LAST: Duration = Duration::from_secs(5);

pub(crate) struct Feed {
    index: u32,
    destination: Destination,
    desk: Arc<Desk>,
    /// Under order: the claim on the turn.
    owner: Option<Owner>,
    /// Without order: nobody keeps one in the group, which is looked at again on each new connection.
    unordered: Option<Unordered>,
    has_agreed: bool,
    link: watch::Receiver<link::State>,
    epoch: u64,
    /// The server's process.
    server: String,
    is_degraded: bool,
    inbox: Inbox,
    fresh: Fresh,
    /// When the server was last heard of.
    heard: Instant,
    /// Messages up to here may have records that a restarted server's count does not show.
    look_below: u64,
    is_ready: bool,
    is_resting: bool,
    /// The consumer's count of its last delivery that came here.
    last: Option<u64>,
    /// Under order: deliveries went elsewhere, to a connection that was lost.
    is_missing: bool,
    /// Until when they come back.
    held_until: Option<Instant>,
    /// They come: what must be here before anything is handed out.
    gathering: Option<Gathering>,
    /// On a new connection of the member whose turn it is: what is lost is not called back yet.
    is_uncalled: bool,
    /// What the server's names of deliveries begin with.
    ack_prefix: Option<String>,
    /// What was read and has not arrived: many at once.
    arrivals: Vec<Arrival>,
}

impl Feed {
    pub(crate) async fn new(index: u32, destination: Destination, desk: Arc<Desk>, stand: Stand) -> Result<Self> {
        let (owner, unordered) = match stand {
            Stand::InTurn(owner) => (Some(owner), None),
            Stand::Any(unordered) => (None, Some(unordered)),
        };
        let link = desk.link.state.clone();
        let epoch = link.borrow().epoch;
        let server = desk.link.client.server_info().server_id;
        let fresh = Fresh::new(Instant::now(), None);
        let inbox = Inbox::open(&desk.link.client).await?;
        let (is_degraded, heard, look_below, is_ready, is_resting) = (false, Instant::now(), 0, false, false);
        Ok(Self {
            index,
            destination,
            desk,
            owner,
            unordered,
            has_agreed: true,
            link,
            epoch,
            server,
            is_degraded,
            inbox,
            fresh,
            heard,
            look_below,
            is_ready,
            is_resting,
            last: None,
            is_missing: false,
            held_until: None,
            gathering: None,
            is_uncalled: false,
            ack_prefix: None,
            arrivals: Vec::new(),
        })
    }

    /// Works until the subscription closes or fails.
    pub(crate) async fn run(mut self) {
        let shared = Arc::clone(&self.desk.shared);
        let mut closing = shared.closing.subscribe();
        let mut look = Instant::now();
        let asking = self.asking();
        let (denials, begun) = (Arc::clone(&self.desk.link.denials), Instant::now());
        let denied = denials.of("receive", &asking, begun);
        tokio::pin!(denied);
        while closing.borrow().is_none() {
            let room = shared.room.notified();
            tokio::pin!(room);
            // Registered before there is looked for room, so that no wake-up is missed.
            room.as_mut().enable();
            if self.link.borrow().epoch != self.epoch {
                // Not asked for anything more before it is known what was lost.
                self.on_link().await;
            }
            if let Err(error) = self.pull(&mut look).await {
                shared.fail(error);
                break;
            }
            let watchdog = self.heard + HEARTBEAT * 3;
            let echo = self.echo_due();
            let rest = shared.rests_at().filter(|_| !self.is_resting);
            tokio::select! {
                biased;
                _ = closing.changed() => {}
                error = &mut denied => {
                    shared.fail(error);
                    break;
                }
                message = self.inbox.next() => {
                    if let Some(message) = message {
                        if let Err(error) = self.receive(message).await {
                            shared.fail(error);
                            break;
                        }
                    } else if let Err(error) = self.renew_inbox().await {
                        shared.fail(error);
                        break;
                    }
                }
                _ = self.link.changed() => self.on_link().await,
                () = room => {}
                () = tokio::time::sleep_until(rest.unwrap_or(watchdog)), if rest.is_some() => {}
                () = tokio::time::sleep_until(self.held_until.unwrap_or(watchdog)), if self.held_until.is_some() => {}
                () = tokio::time::sleep_until(self.gathering.map_or(watchdog, Gathering::next)),
                    if self.gathering.is_some() => {}
                () = tokio::time::sleep_until(look), if self.owner.is_some() => {}
                // Sent before the next pull is.
                () = tokio::time::sleep_until(echo.unwrap_or(watchdog)), if echo.is_some() => {}
                () = tokio::time::sleep_until(watchdog) => self.on_silence().await,
            }
        }
        let deadline = closing.borrow().unwrap_or_else(Instant::now);
        self.close(deadline).await;
        shared.working.send_modify(|working| *working -= 1);
    }

    /// Where the server is asked for messages.
    fn asking(&self) -> String {
        let scope = &self.desk.scopes[self.index as usize];
        format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", scope.stream, scope.consumer)
    }

    /// Asks for as much as there is room for, once it is this member's turn.
    async fn pull(&mut self, look: &mut Instant) -> Result<()> {
        if !self.link.borrow().is_connected {
            return Ok(());
        }
        if !self.is_ready {
            match self.get_ready().await {
                Ok(()) => {
                    self.is_ready = true;
                    self.is_uncalled =
                        self.owner.is_some() && self.desk.shared.lock().feeds[self.index as usize].is_active;
                    if self.is_uncalled {
                        *look = Instant::now();
                    }
                }
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "not ready to pull");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    self.desk.shared.room.notify_waiters();
                    return Ok(());
                }
            }
        }
        self.look_after_turn(look).await?;
        if !self.is_ready {
            self.desk.shared.room.notify_waiters();
            return Ok(());
        }
        if self.is_uncalled {
            // It is not known yet whether it is still this member's turn.
            return Ok(());
        }
        if self.is_missing {
            self.call_missing().await?;
        }
        if let Some(until) = self.held_until
            && (Instant::now() < until || !self.gather().await?)
        {
            return Ok(());
        }
        let rests = self.desk.shared.is_resting();
        if rests && !self.is_resting {
            self.rest().await?;
        }
        let has_rested = std::mem::replace(&mut self.is_resting, rests);
        self.gathered(rests || has_rested);
        self.echo().await;
        loop {
            let batch = match self.desk.shared.reserve(self.index) {
                0 => self.gather_more(),
                batch => batch,
            };
            if batch == 0 {
                return Ok(());
            }
            let subject = self.asking();
            let body = if self.desk.scopes.len() > self.desk.shared.max_in_flight {
                // More destinations than room: they take turns.
                format!("{{\"batch\":{batch},\"expires\":250000000}}")
            } else if self.is_in_a_cluster() {
                format!("{{\"batch\":{batch},\"expires\":{}}}", EXPIRES_IN_A_CLUSTER.as_nanos())
            } else {
                let (expires, heartbeat) = (EXPIRES.as_nanos(), HEARTBEAT.as_nanos());
                format!("{{\"batch\":{batch},\"expires\":{expires},\"idle_heartbeat\":{heartbeat}}}")
            };
            self.heard = Instant::now();
            let sent = self.desk.link.client.publish_with_reply(subject, self.inbox.subject.clone(), body.into()).await;
            sent.map_err(|error| Error::new(ErrorKind::Closed, "receive", error.to_string()))?;
        }
    }

    /// After every (re)connect: whether others keep order now, and which messages have records although the server's count may not show it.
    async fn get_ready(&mut self) -> Result<()> {
        if let Some(unordered) = self.unordered.as_mut().filter(|_| !self.has_agreed) {
            if !unordered.keepers.are_gone(&self.desk.topology, "receive").await? {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "receive",
                    "whether others keep order is not known yet",
                ));
            }
            self.has_agreed = true;
            if !self.is_degraded {
                self.desk.shared.hold(self.index, false);
            }
        }
        let scope = &self.desk.scopes[self.index as usize];
        let filter = format!("{}.f.>", scope.record);
        let subjects = self.desk.topology.api.subjects("receive", &scope.records, &filter).await?;
        let sequence = |subject: &String| subject.rsplit('.').next().and_then(|last| last.parse::<u64>().ok());
        self.look_below = subjects.iter().filter_map(sequence).max().unwrap_or(0);
        Ok(())
    }

    /// Nobody receives here at the moment: what was prefetched goes to others, and no more is asked for.
    async fn rest(&mut self) -> Result<()> {
        self.take_in().await;
        self.renew_inbox().await?;
        let entries = self.desk.shared.surrender(self.index, false);
        let deadline = Instant::now() + self.desk.settle_timeout;
        if let Err(error) = self.desk.give_back(self.index, entries, Duration::ZERO, deadline).await {
            // It comes back when its leases end.
            tracing::debug!(%error, "not everything could be given back");
        }
        self.desk.shared.room.notify_waiters();
        Ok(())
    }

    /// Ends the pulls, and takes in what the server has sent already.
    async fn take_in(&mut self) {
        if self.is_in_a_cluster() {
            self.pulls_end().await;
        }
        self.take_in_messages().await;
        // Asked about a consumer, the server forgets the pulls whose inbox is gone. Otherwise it takes the first message
        // that is given back for one of them, finds nobody, and puts it behind the others (nats-server 2.15,
        // `loopAndGatherMsgs`).
        let scope = &self.desk.scopes[self.index as usize];
        let info = self.desk.topology.api.consumer("receive", &scope.stream, &scope.consumer).await.ok().flatten();
        // Under order it can be seen whether something was sent all the same.
        if self.owner.is_some() && self.desk.shared.lock().feeds[self.index as usize].is_active {
            let sent = info.map(|info| info.delivered.consumer_seq);
            let last = std::mem::replace(&mut self.last, sent);
            self.is_missing |= last.zip(sent).is_some_and(|(last, sent)| last != sent);
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.desk.shared.is_looking(self.index) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn is_in_a_cluster(&self) -> bool {
        self.desk.link.client.server_info().cluster.is_some()
    }

    /// Waits until no pull is open. In a cluster the leader of the consumer may be another server than that of this connection: it
    /// goes on sending until it knows that an inbox is gone, and what comes here then is nobody's until its lease ends. No request
    /// ends a pull, so it is waited for. Found by the suite on three servers.
    async fn pulls_end(&mut self) {
        let deadline = Instant::now() + EXPIRES_IN_A_CLUSTER * 2;
        while self.link.borrow().is_connected && self.desk.shared.lock().feeds[self.index as usize].asked > 0 {
            let Ok(Some(message)) = tokio::time::timeout_at(deadline, self.inbox.next()).await else { return };
            match message.status {
                None => {
                    self.read(message);
                    self.arrive();
                }
                Some(StatusCode::IDLE_HEARTBEAT) => {}
                Some(_) => self.desk.shared.unasked(self.index, left(message.headers.as_ref())),
            }
        }
    }

    async fn take_in_messages(&mut self) {
        let asked = self.desk.shared.lock().feeds[self.index as usize].asked;
        if self.link.borrow().is_connected && self.inbox.end(asked).await.is_ok() {
            let deadline = Instant::now() + LAST;
            while let Ok(Some(message)) = tokio::time::timeout_at(deadline, self.inbox.next()).await {
                if message.status.is_none() {
                    self.read(message);
                    self.arrive();
                }
            }
        }
    }

    /// Takes in a message or status, and what is there behind it.
    async fn receive(&mut self, first: Message) -> Result<()> {
        let mut next = Some(first);
        while let Some(message) = next {
            // An echo says nothing about the pull.
            if message.status.is_some() || message.reply.is_some() {
                self.heard = Instant::now();
            }
            match message.status {
                Some(status) => {
                    self.arrive();
                    self.on_status(status, &message).await?;
                }
                None => self.read(message),
            }
            let is_full = self.arrivals.len() >= AT_ONCE;
            next = if is_full { None } else { self.inbox.next().now_or_never().flatten() };
        }
        self.arrive();
        Ok(())
    }

    /// Reads a message; it arrives with those behind it.
    fn read(&mut self, message: Message) {
        let Some(ack) = message.reply else { return self.fresh.came(&message.payload) };
        let Some(Ack { delivered, sequence, count, nanos }) = ack::parse(&ack) else { return };
        if self.owner.is_some() && self.ack_prefix.is_none() {
            self.ack_prefix = ack::prefix_of(&ack).map(str::to_owned);
        }
        let is_next = self.last.replace(count).is_none_or(|last| count == last + 1);
        if self.owner.is_some() && !is_next {
            self.desk.shared.hold(self.index, true);
            self.is_missing = true;
        }
        let scope = &self.desk.scopes[self.index as usize];
        let stored = Stored { stream: &scope.stream, sequence, time: Timestamp::from_millis(nanos / 1_000_000) };
        let headers = message.headers.as_ref();
        let found = codec::find(headers);
        let decoded = codec::decode(&self.destination, stored, headers, &found, message.payload);
        self.arrivals.push(Arrival {
            feed: self.index,
            sequence,
            ack,
            message: Arc::new(decoded),
            delivered,
            redrives: found.redrives,
            since: self.fresh.since(Instant::now()),
            expires: found.expires,
            must_look: sequence <= self.look_below,
        });
    }

    fn arrive(&mut self) {
        if self.arrivals.is_empty() {
            return;
        }
        for looking in self.desk.shared.arrive(&mut self.arrivals) {
            tokio::spawn(look_up(Arc::clone(&self.desk), looking));
        }
    }

    async fn on_status(&mut self, status: StatusCode, message: &Message) -> Result<()> {
        let shared = &self.desk.shared;
        match status.as_u16() {
            100 => {}
            404 | 408 => shared.unasked(self.index, left(message.headers.as_ref())),
            code => {
                shared.unasked(self.index, left(message.headers.as_ref()));
                let description = message.description.as_deref().unwrap_or_default();
                tracing::debug!(code, description, "pull ended");
                if code == 503 || description.contains("Deleted") {
                    self.check_consumer().await?;
                }
                // Whatever it is (a leader that moves, a shutdown): not asked again at once.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    /// Ends the subscription when group or destination are gone, instead of waiting for ever (nats.rs #1584).
    async fn check_consumer(&self) -> Result<()> {
        let scope = &self.desk.scopes[self.index as usize];
        match self.desk.topology.api.consumer("receive", &scope.stream, &scope.consumer).await {
            Ok(None) => {
                let text = "the group or its destination was deleted";
                Err(Error::new(ErrorKind::NotFound, "receive", text).with("destination", &self.destination))
            }
            _ => Ok(()),
        }
    }

    /// Takes in what is still on its way, waits for settles, and gives the rest back at once.
    async fn close(mut self, deadline: Instant) {
        let shared = Arc::clone(&self.desk.shared);
        let is_owner = shared.lock().feeds[self.index as usize].is_active;
        let closing = async {
            self.take_in().await;
            loop {
                let settled = shared.room.notified();
                if !shared.is_settling(self.index) {
                    break;
                }
                let _ = tokio::time::timeout(Duration::from_millis(20), settled).await;
            }
            let is_whole = self.is_ready
                && (self.last.is_some() || self.owner.is_none())
                && !self.is_uncalled
                && self.held_until.is_none()
                && self.gathering.is_none()
                && self.link.borrow().epoch == self.epoch;
            let entries = shared.surrender(self.index, true);
            // No pull of this member is open any more in a cluster. Elsewhere one of a connection that was lost may be.
            let is_all_back = if is_owner && is_whole && self.is_missing && self.is_in_a_cluster() {
                // What is here goes back with it, in the order of the stream.
                self.desk.spare(self.index, &entries, deadline).await?;
                self.call_back().await?;
                self.held_until.is_some_and(|until| until <= Instant::now())
            } else {
                if is_owner || self.owner.is_none() {
                    self.desk.give_back(self.index, entries, Duration::ZERO, deadline).await?;
                }
                is_whole && !self.is_missing
            };
            match &mut self.owner {
                // Deliveries that went to a lost connection were not given back: the next member has to wait for them.
                Some(owner) if is_all_back => owner.release().await,
                _ => Ok(()),
            }
        };
        match tokio::time::timeout_at(deadline, closing).await {
            Ok(Ok(())) => {}
            // It comes back when its leases end.
            Ok(Err(error)) => tracing::debug!(%error, "not everything could be given back"),
            Err(_) => tracing::debug!("not everything could be given back in time"),
        }
    }
}

/// How many messages of a pull that has ended were not sent.
fn left(headers: Option<&HeaderMap>) -> Option<usize> {
    headers?.get("Nats-Pending-Messages")?.as_str().parse().ok()
}

/// What trying again does not change.
fn is_final(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::AlreadyExists)
}
