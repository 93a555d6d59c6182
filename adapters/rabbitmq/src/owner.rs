//! Who works where order is kept: one member of a group at a time.
//!
//! A group's queue is made without knowing who will keep order, and "single active consumer" is a setting of a queue that
//! cannot change. So the members agree by a queue of its own that has one active consumer: every member puts a token in,
//! whoever is active holds one, unacked, and acks the rest. When that member goes, by whatever way, the server hands its
//! token to the next. The next one waits until the group's queue has no consumer: then everything that the old one held has
//! come back.
//!
//! A token tells how much a member may hold, and the largest one stays: whoever is active knows how much may have come back.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bytes, Error, ErrorKind, Message, Result};
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::Instant;

use crate::codec::encode;
use crate::desk::Desk;
use crate::error::failed;
use crate::link::{Link, bounded};
use crate::names::Names;
use crate::outlet::{Answer, Board, Parcel};
use crate::waits::ack_alone;

/// How soon is looked again whether the queue is free, at first and at most.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_millis(200);
/// How long a request of a turn may take.
const REQUEST: Duration = Duration::from_secs(10);
/// The server asks a quorum queue for 250 ms how many messages and consumers it has, and then tells 0 and 0
/// (`rabbit_quorum_queue:stat/2` of 4.0.5). What took that long was no answer.
pub(crate) const NO_ANSWER: Duration = Duration::from_millis(200);

/// One member's stand.
pub(crate) struct Owner {
    desk: Arc<Desk>,
    queue: String,
    channel: Channel,
    tokens: Consumer,
    is_active: bool,
    /// The tag of the token that is held, and how much it tells.
    token: Option<(u64, u16)>,
    /// How much this member may hold.
    prefetch: u16,
    next_look: Duration,
    /// The queue of the group's failures is new: nothing was ever written there.
    is_first: bool,
}

impl Owner {
    /// Stands by for its turn.
    pub(crate) async fn stand_by(
        link: &Link,
        desk: &Arc<Desk>,
        queue: &str,
        prefetch: u16,
        keeps_failures: bool,
        deadline: Instant,
    ) -> Result<Self> {
        let is_first = desk.topology.ensure_owner(queue, keeps_failures, "receive").await?;
        let channel = link.channel("receive", deadline).await?;
        // One to hold, one to ack.
        bounded("receive", deadline, channel.basic_qos(2, BasicQosOptions::default())).await?;
        put_token(desk, queue, prefetch, deadline).await?;
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = channel.basic_consume(Names::owner(queue).as_str().into(), "".into(), options, none);
        let tokens = bounded("receive", deadline, consuming).await?;
        Ok(Self {
            desk: Arc::clone(desk),
            queue: queue.to_owned(),
            channel,
            tokens,
            is_active: false,
            token: None,
            prefetch,
            next_look: FIRST_LOOK,
            is_first,
        })
    }

    /// The channel of its stand: when it is gone, somebody else may be next, and no sooner.
    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Whether nothing can have been written of the group's failures.
    pub(crate) fn is_first(&self) -> bool {
        self.is_first
    }

    /// How much earlier members may have held, and this one may.
    pub(crate) fn most_held(&self) -> u16 {
        self.token.map_or(0, |(_, told)| told).max(self.prefetch)
    }

    /// Whether it is its turn.
    pub(crate) fn is_active(&self) -> bool {
        self.is_active
    }

    /// Whether its stand is still there. Once it is not, somebody else may be next.
    pub(crate) fn stands(&self) -> bool {
        self.channel.status().connected()
    }

    /// Returns when its turn begins. Cancel-safe.
    pub(crate) async fn gained(&mut self) -> Result<()> {
        loop {
            let Some((_, told)) = self.token.filter(|_| !self.is_active) else {
                let next = self.tokens.next().await;
                self.hold(next)?;
                continue;
            };
            let deadline = Instant::now() + REQUEST;
            self.hold_all(deadline).await?;
            if told < self.prefetch && self.most_told() < self.prefetch {
                // A member of a version that wrote no figures has acked it.
                put_token(&self.desk, &self.queue, self.prefetch, deadline).await?;
                let next = self.tokens.next().await;
                self.hold(next)?;
                continue;
            }
            // The server tells no one when a queue loses its last consumer; this lasts as long as it takes to notice
            // that the old member is gone.
            let asked = Instant::now();
            match self.desk.topology.look(&self.queue, "receive", deadline).await? {
                Some((ready, 0)) if ready > 0 || asked.elapsed() < NO_ANSWER => {
                    self.is_active = true;
                    return Ok(());
                }
                Some(_) => {
                    tokio::time::sleep(self.next_look).await;
                    self.next_look = (self.next_look * 2).min(LAST_LOOK);
                }
                None => return Err(Error::new(ErrorKind::NotFound, "receive", "the group's queue is gone")),
            }
        }
    }

    fn most_told(&self) -> u16 {
        self.token.map_or(0, |(_, told)| told)
    }

    /// Takes in the tokens that are there. One that is smaller may be there beside the largest when its ack was lost: what
    /// the server has sent before it answers on this channel is here when the answer to the next request is.
    async fn hold_all(&mut self, deadline: Instant) -> Result<()> {
        for _ in 0..2 {
            let options = QueueDeclareOptions::durable().passive();
            let name = Names::owner(&self.queue);
            let asking = self.channel.queue_declare(name.as_str().into(), options, FieldTable::default());
            bounded("receive", deadline, asking).await?;
        }
        while let Some(next) = self.tokens.next().now_or_never() {
            self.hold(next)?;
        }
        Ok(())
    }

    /// Of two tokens the larger is held, and the other one acked.
    fn hold(&mut self, next: Option<lapin::Result<Delivery>>) -> Result<()> {
        let token = match next {
            Some(Ok(token)) => token,
            Some(Err(error)) => return Err(failed("receive", &error)),
            None => {
                let text = "the server has ended the stand for the group's order";
                return Err(Error::new(ErrorKind::Unavailable, "receive", text).with("queue", &self.queue));
            }
        };
        let told = std::str::from_utf8(&token.data).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        let (kept, other) = match self.token {
            None => ((token.delivery_tag, told), None),
            Some(held) if held.1 >= told => (held, Some(token.delivery_tag)),
            Some(held) => ((token.delivery_tag, told), Some(held.0)),
        };
        self.token = Some(kept);
        if let Some(other) = other {
            ack_alone(&self.channel, other);
        }
        Ok(())
    }

    /// Gives its turn up.
    pub(crate) async fn release(self, deadline: Instant) {
        if self.channel.status().connected() {
            let _ = tokio::time::timeout_at(deadline, self.channel.close(200, "closed".into())).await;
        }
    }
}

/// Puts a token in, which tells how much its member may hold.
async fn put_token(desk: &Desk, queue: &str, prefetch: u16, deadline: Instant) -> Result<()> {
    let name = Names::owner(queue);
    let board = Board::new(1);
    let token = Message::new("", Bytes::new());
    let parcel = Parcel {
        exchange: "".into(),
        routing_key: name.as_str().into(),
        properties: encode(&token, None, &mut Vec::new()),
        payload: Bytes::from(prefetch.to_string()),
    };
    desk.copies.send(parcel, (&board, 0), deadline).await?;
    board.wait(deadline).await;
    match board.take(0, "receive") {
        Answer::Stored => Ok(()),
        Answer::Unroutable => Err(Error::new(ErrorKind::Unavailable, "receive", "its owner queue is gone")),
        Answer::Failed(error) => Err(error),
    }
}
