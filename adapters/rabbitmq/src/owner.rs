//! Who works where order is kept: one member of a group at a time.
//!
//! A group's queue is made without knowing who will keep order, and "single active consumer" is a setting of a queue that
//! cannot change. So the members agree by a queue of its own that has one active consumer: every member puts a token in,
//! whoever is active holds one, unacked, and acks the rest. When that member goes, by whatever way, the server hands its
//! token to the next. The next one waits until the group's queue has no consumer: then everything that the old one held has
//! come back, in its places.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bytes, Error, ErrorKind, Message, Result};
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::Instant;

use crate::codec::encode;
use crate::desk::Desk;
use crate::error::failed;
use crate::feed::ack_alone;
use crate::link::{Link, bounded};
use crate::names::Names;
use crate::outlet::{Answer, Board, Parcel};

/// How soon is looked again whether the queue is free, at first and at most.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_millis(200);

/// One member's stand.
pub(crate) struct Owner {
    desk: Arc<Desk>,
    queue: String,
    channel: Channel,
    tokens: Consumer,
    is_active: bool,
    has_token: bool,
    next_look: Duration,
}

impl Owner {
    /// Stands by for its turn.
    pub(crate) async fn stand_by(link: &Link, desk: &Arc<Desk>, queue: &str, deadline: Instant) -> Result<Self> {
        desk.topology.ensure_owner(queue, "receive").await?;
        let channel = link.channel("receive", deadline).await?;
        // One to hold, one to ack.
        bounded("receive", deadline, channel.basic_qos(2, BasicQosOptions::default())).await?;
        let name = Names::owner(queue);
        let board = Board::new(1);
        let token = Message::new("", Bytes::new());
        let parcel = Parcel {
            exchange: "".into(),
            routing_key: name.as_str().into(),
            properties: encode(&token, None, &mut Vec::new()),
            payload: Bytes::new(),
        };
        desk.copies.send(parcel, (&board, 0), deadline).await?;
        board.wait(deadline).await;
        match board.take(0, "receive") {
            Answer::Stored => {}
            Answer::Unroutable => return Err(Error::new(ErrorKind::Unavailable, "receive", "its owner queue is gone")),
            Answer::Failed(error) => return Err(error),
        }
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = channel.basic_consume(name.as_str().into(), "".into(), options, none);
        let tokens = bounded("receive", deadline, consuming).await?;
        Ok(Self {
            desk: Arc::clone(desk),
            queue: queue.to_owned(),
            channel,
            tokens,
            is_active: false,
            has_token: false,
            next_look: FIRST_LOOK,
        })
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
            if !self.has_token || self.is_active {
                match self.tokens.next().await {
                    Some(Ok(token)) if self.has_token => ack_alone(&self.channel, token.delivery_tag),
                    Some(Ok(_)) => self.has_token = true,
                    Some(Err(error)) => return Err(failed("receive", &error)),
                    None => {
                        let text = "the server has ended the stand for the group's order";
                        return Err(Error::new(ErrorKind::Unavailable, "receive", text).with("queue", &self.queue));
                    }
                }
                continue;
            }
            // The server tells no one when a queue loses its last consumer; this lasts as long as it takes to notice
            // that the old member is gone.
            let deadline = Instant::now() + Duration::from_secs(10);
            match self.desk.topology.look(&self.queue, "receive", deadline).await? {
                Some((_, 0)) => {
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

    /// Gives its turn up.
    pub(crate) async fn release(self, deadline: Instant) {
        if self.channel.status().connected() {
            let _ = tokio::time::timeout_at(deadline, self.channel.close(200, "closed".into())).await;
        }
    }
}
