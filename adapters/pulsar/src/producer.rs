//! One producer of one topic: messages out in call order, receipts in.
//!
//! Entries are not batched: in a batch the entry is what the broker redelivers, delays and hashes by key, and what it acks
//! unless the broker is set up otherwise. Nothing is sent again by itself: whether a cut-off send was stored is not known
//! (pulsar-rs #358), and a broker that is not told to dedup would store it twice.

use std::collections::VecDeque;
use std::sync::Arc;

use anybroker_core::{Effect, Error, ErrorKind, Position, Result, Timestamp};
use parking_lot::Mutex;
use pulsar::message::Payload;
use pulsar::proto::{self, BaseCommand, MessageIdData, base_command::Type};

use crate::batch::{Batch, Window};
use crate::link::Link;
use crate::wire::{Conn, command};

pub(crate) struct Producer {
    topic: String,
    window: Window,
    opening: tokio::sync::Mutex<()>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    open: Option<(Arc<Conn>, u64)>,
    name: String,
    next: u64,
    pending: VecDeque<Pending>,
}

struct Pending {
    producer: u64,
    sequence: u64,
    batch: Arc<Batch>,
    index: usize,
    weight: u32,
}

impl Producer {
    pub(crate) fn new(topic: String, window: Window) -> Arc<Self> {
        Arc::new(Self { topic, window, opening: tokio::sync::Mutex::default(), inner: Mutex::default() })
    }

    /// The local name of its topic.
    pub(crate) fn local(&self) -> &str {
        self.topic.rsplit('/').next().unwrap_or_default()
    }

    pub(crate) fn is_open(&self) -> bool {
        self.inner.lock().open.as_ref().is_some_and(|(conn, _)| !conn.is_closed())
    }

    /// Opens it unless it is open. The topic must exist: a broker that creates topics by itself would make one. The caller
    /// bounds the time.
    pub(crate) async fn open(self: &Arc<Self>, link: &Link, operation: &'static str) -> Result<()> {
        let _one = self.opening.lock().await;
        if self.is_open() {
            return Ok(());
        }
        let conn = link.serving(operation, &self.topic).await?;
        let producer_id = conn.next_id();
        conn.add_producer(producer_id, self);
        let create = |request_id| BaseCommand {
            producer: Some(proto::CommandProducer {
                topic: self.topic.clone(),
                producer_id,
                request_id,
                user_provided_producer_name: Some(false),
                ..Default::default()
            }),
            ..command(Type::Producer)
        };
        let answer = match conn.ask(operation, create).await {
            Ok(answer) => answer,
            Err(error) => {
                conn.close_producer(producer_id);
                return Err(error.with_effect(Effect::NotDone));
            }
        };
        self.opened(
            &conn,
            producer_id,
            answer.producer_success.map(|created| created.producer_name).unwrap_or_default(),
        )
    }

    /// It is there, unless the broker has closed it in the moment since: nothing that is sent to such a one is ever answered.
    fn opened(&self, conn: &Arc<Conn>, id: u64, name: String) -> Result<()> {
        let mut inner = self.inner.lock();
        (inner.name, inner.open) = (name, Some((Arc::clone(conn), id)));
        drop(inner);
        // Looked for when it is open: a close from now on finds it so.
        if conn.has_producer(id) {
            return Ok(());
        }
        let text = "the broker closed the producer as soon as it was opened (its topic moves or was deleted)";
        let why = Error::new(ErrorKind::Unavailable, "publish", text);
        self.cut(id, &why.duplicate().with_effect(Effect::Unknown));
        Err(why.with_effect(Effect::NotDone))
    }

    /// Sends, and answers under which opening; the outcome goes to the batch. With `opening` only under that one: what was
    /// sent under an earlier one may be lost. Its weight must have been entered into the window.
    pub(crate) fn send(
        &self,
        mut payload: Payload,
        weight: u32,
        batch: &Arc<Batch>,
        index: usize,
        opening: Option<u64>,
    ) -> Result<u64> {
        let mut inner = self.inner.lock();
        let open = inner.open.as_ref().filter(|(conn, id)| !conn.is_closed() && opening.is_none_or(|is| is == *id));
        let Some((conn, producer_id)) = open.cloned() else {
            drop(inner);
            self.window.leave(weight);
            let text = "the connection to the broker of this topic was lost";
            return Err(Error::new(ErrorKind::Unavailable, "publish", text));
        };
        let sequence_id = inner.next;
        inner.next += 1;
        payload.metadata.producer_name.clone_from(&inner.name);
        payload.metadata.sequence_id = sequence_id;
        payload.metadata.publish_time = u64::try_from(Timestamp::now().as_millis()).unwrap_or(0);
        let batch = Arc::clone(batch);
        inner.pending.push_back(Pending { producer: producer_id, sequence: sequence_id, batch, index, weight });
        let send = proto::CommandSend { producer_id, sequence_id, num_messages: Some(1), ..Default::default() };
        // Under the lock, so that sequence numbers go out in their order.
        conn.send(BaseCommand { send: Some(send), ..command(Type::Send) }, Some(payload));
        Ok(producer_id)
    }

    /// The broker has stored a message.
    pub(crate) fn stored(&self, producer: u64, sequence: u64, id: Option<&MessageIdData>) {
        let position = id.map_or(Position::new(0), |id| Position { major: id.ledger_id, minor: id.entry_id });
        self.outcome(producer, sequence, Ok(position));
    }

    /// The broker has refused a message.
    pub(crate) fn refused(&self, producer: u64, sequence: u64, error: &Error) {
        self.outcome(producer, sequence, Err(error.duplicate()));
    }

    fn outcome(&self, producer: u64, sequence: u64, outcome: Result<Position>) {
        let mut inner = self.inner.lock();
        let is_it = |pending: &Pending| (pending.producer, pending.sequence) == (producer, sequence);
        // Receipts come in the order of the sends.
        let Some(at) = inner.pending.iter().position(is_it) else { return };
        let pending = inner.pending.remove(at);
        drop(inner);
        if let Some(pending) = pending {
            self.window.leave(pending.weight);
            pending.batch.set(pending.index, outcome);
        }
    }

    /// The broker, or the connection, has ended it: what is on its way has no outcome any more.
    pub(crate) fn cut(&self, producer: u64, why: &Error) {
        let mut inner = self.inner.lock();
        if inner.open.as_ref().is_some_and(|(_, open)| *open == producer) {
            inner.open = None;
        }
        let all = std::mem::take(&mut inner.pending);
        let (gone, kept): (VecDeque<_>, VecDeque<_>) = all.into_iter().partition(|entry| entry.producer == producer);
        inner.pending = kept;
        drop(inner);
        for pending in gone {
            self.window.leave(pending.weight);
            pending.batch.set(pending.index, Err(why.duplicate()));
        }
    }

    /// Ends it. What is still on its way gets no receipt any more, and takes no room.
    pub(crate) fn close(&self) {
        let open = self.inner.lock().open.take();
        if let Some((conn, id)) = open {
            conn.close_producer(id);
            let text = "the producer was closed before the broker confirmed";
            self.cut(id, &Error::new(ErrorKind::Closed, "publish", text).with_effect(Effect::Unknown));
        }
    }
}

#[cfg(test)]
mod tests {
    use pulsar::proto::MessageMetadata;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_producer_that_the_broker_closed_as_soon_as_it_was_opened_is_not_open() {
        let producer = Producer::new("t".into(), Window::new());
        let conn = Arc::new(Conn::new(None));
        for is_closed in [false, true] {
            let id = conn.next_id();
            conn.add_producer(id, &producer);
            if is_closed {
                conn.close_producer(id);
            }
            producer.inner.lock().open = None;
            let opened = producer.opened(&conn, id, String::new());
            assert_eq!(opened.err().map(|error| error.kind()), is_closed.then_some(ErrorKind::Unavailable));
            assert_eq!(producer.is_open(), !is_closed);
        }
    }

    #[tokio::test]
    async fn what_is_on_its_way_when_it_is_closed_has_an_outcome_and_takes_no_room() {
        let window = Window::new();
        let producer = Producer::new("t".into(), window.clone());
        producer.inner.lock().open = Some((Arc::new(Conn::new(None)), 1));
        let (batch, now) = (Batch::new(1), Instant::now());
        assert!(window.enter(1, now).await);
        let payload = Payload { metadata: MessageMetadata::default(), data: Vec::new() };
        producer.send(payload, 1, &batch, 0, None).unwrap();
        assert!(!window.emptied(now).await);
        producer.close();
        assert!(window.emptied(now).await);
        let late = || Error::new(ErrorKind::Timeout, "publish", "no outcome");
        let outcome = batch.wait(now, late).await.remove(0).unwrap_err();
        assert_eq!((outcome.kind(), outcome.effect()), (ErrorKind::Closed, Effect::Unknown));
    }
}
