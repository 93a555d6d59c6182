//! What a subscription's settler and feeds share: where copies go.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Message, Result, Timestamp, Verdict};
use lapin::BasicProperties;
use tokio::time::Instant;

use crate::codec::{Hop, encode};
use crate::dead_letter;
use crate::names::Names;
use crate::outlet::{Answer, Board, Outlet, Parcel};
use crate::publisher::expiration;
use crate::state::{Shared, Taken};
use crate::topology::Topology;

pub(crate) struct Desk {
    pub(crate) topology: Arc<Topology>,
    /// Where copies are published.
    pub(crate) copies: Arc<Outlet>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) settle_timeout: Duration,
    /// The queue of each feed.
    pub(crate) queues: Vec<String>,
    /// The stream of each feed, where groups read one.
    pub(crate) streams: Vec<String>,
}

/// A copy that is to be stored before its source is acked.
pub(crate) struct Copy {
    queue: String,
    properties: BasicProperties,
    payload: anybroker_core::Bytes,
    waiting: bool,
}

impl Desk {
    /// The copy that comes back after a failure.
    pub(crate) async fn retry(&self, taken: &Taken, delay: Duration, deadline: Instant) -> Result<Copy> {
        let queue = &self.queues[taken.feed as usize];
        let hop = Hop { failures: taken.hop.failures + 1, ..taken.hop };
        let mut properties = encode(&taken.message, Some(&hop), &mut Vec::new());
        let payload = payload(&taken.message);
        if delay.is_zero() {
            if hop.expires != 0 && self.topology.queue.buries_expired() {
                let left = u64::try_from(hop.expires - Timestamp::now().as_millis()).unwrap_or(0);
                properties = properties.with_expiration(expiration(Duration::from_millis(left)));
            }
            return Ok(Copy { queue: queue.clone(), properties, payload, waiting: false });
        }
        properties = properties.with_expiration(expiration(delay));
        let waiting = self.topology.ensure_waiting(queue, false, delay, "settle", deadline).await?;
        Ok(Copy { queue: waiting, properties, payload, waiting: true })
    }

    /// The dead letter.
    pub(crate) fn letter(&self, taken: &Taken, attempts: u32, verdict: &Verdict) -> Copy {
        let properties = dead_letter::encode(&taken.message, &taken.hop, attempts, verdict);
        let queue = Names::letters(&self.queues[taken.feed as usize]);
        Copy { queue, properties, payload: payload(&taken.message), waiting: false }
    }

    /// Stores copies, all on their way together; tells for each whether it is confirmed.
    pub(crate) async fn store(&self, copies: Vec<Result<Copy>>, deadline: Instant) -> Vec<Result<()>> {
        let board = Board::new(copies.len());
        let mut places = Vec::with_capacity(copies.len());
        for (index, copy) in copies.into_iter().enumerate() {
            let sent = match copy {
                Ok(Copy { queue, properties, payload, waiting }) => {
                    let routing_key = queue.as_str().into();
                    places.push(Some((queue, waiting)));
                    let parcel = Parcel { exchange: "".into(), routing_key, properties, payload };
                    self.copies.send(parcel, (&board, index), deadline).await
                }
                Err(error) => {
                    places.push(None);
                    Err(error)
                }
            };
            if let Err(error) = sent {
                board.note(index, Answer::Failed(error));
            }
        }
        board.wait(deadline).await;
        let mut told = Vec::with_capacity(places.len());
        for (index, place) in places.into_iter().enumerate() {
            told.push(match (board.take(index, "settle"), place) {
                (Answer::Stored, _) => Ok(()),
                (Answer::Unroutable, Some((queue, waiting))) => {
                    if waiting {
                        self.topology.forget_waiting(&queue);
                    }
                    Err(self.topology.takes_nothing(&queue, "settle", deadline).await)
                }
                (Answer::Unroutable, None) => Err(Error::new(ErrorKind::Unexpected, "settle", "nothing was sent")),
                (Answer::Failed(error), _) => Err(error),
            });
        }
        told
    }

    /// Dead-letters a message that expired before it could be handed out.
    pub(crate) async fn bury(self: Arc<Self>, taken: Taken, verdict: Verdict) {
        let deadline = Instant::now() + self.settle_timeout;
        let letter = self.letter(&taken, taken.hop.failures, &verdict);
        match self.store(vec![Ok(letter)], deadline).await.pop() {
            Some(Ok(())) => drop(self.shared.ack(&[taken.key])),
            // It is met again when the channel's messages come back.
            _ => self.shared.unsettled(taken.key),
        }
    }
}

fn payload(message: &Message) -> anybroker_core::Bytes {
    message.payload().cloned().unwrap_or_default()
}
