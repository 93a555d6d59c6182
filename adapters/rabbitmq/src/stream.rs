//! One stream for each destination, which all groups read; what AMQP tells of it, and groups that read it.
//!
//! AMQP tells a reader nothing but messages with their offsets. How many a stream holds is a figure of some seconds ago
//! (`rabbit_stream_queue:stat/1` of 4.0.5), and that there is nothing to read is not told. So the end of a stream is found by
//! reading its last chunk, which always comes where there is one.

use std::time::Duration;

use anybroker_core::{Declared, Destination, Error, ErrorKind, Group, Result, Start, Timestamp};
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Consumer};
use tokio::time::{Instant, timeout, timeout_at};

use crate::codec::{mark, notes, offset};
use crate::error::{failed, late};
use crate::link::{bounded, passes};
use crate::names::Names;
use crate::progress::{Place, Turn, write};
use crate::state::Share;
use crate::topology::{SETTLES, Topology, last_one, quorum, refusing, text};

/// Messages on their way to whoever looks at a stream.
const WINDOW: u16 = 1_000;
/// How long a stream with something in it may take before it is asked by a mark of our own.
const EMPTY: Duration = Duration::from_millis(300);
/// How soon a stream is asked for again that its server does not serve yet.
const STARTING: Duration = Duration::from_millis(50);
/// How far the clocks of publishers and the server may be apart, for the search for a time: it begins so much earlier.
const APART: Duration = Duration::from_secs(10);

/// The end of a stream.
pub(crate) struct Tail {
    /// Offsets of the last chunk and what came behind it, with the times at which they were published.
    seen: Vec<(u64, i64)>,
}

impl Tail {
    /// The offset behind the last message.
    pub(crate) fn end(&self) -> u64 {
        self.seen.last().map_or(0, |(offset, _)| offset + 1)
    }
}

/// Reads a stream from somewhere on. A prefetch is demanded (`rabbit_stream_queue:consume/3`), and what was read is acked to
/// get more; acks have no other meaning there.
pub(crate) async fn read_from(
    channel: &Channel,
    stream: &str,
    from: AMQPValue,
    prefetch: u16,
    operation: &'static str,
    deadline: Instant,
) -> Result<Consumer> {
    bounded(operation, deadline, channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), from);
    let options = BasicConsumeOptions::default();
    bounded(operation, deadline, channel.basic_consume(stream.into(), "".into(), options, arguments)).await
}

/// From that offset on.
pub(crate) fn at(offset: u64) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(offset).unwrap_or(i64::MAX))
}

/// When a message was published: as our publishers tell, or by its own timestamp; of one that tells nothing, too late to be
/// left out.
fn published(delivery: &Delivery) -> i64 {
    match notes(&delivery.properties).hop.published {
        0 => {
            let seconds = delivery.properties.timestamp().and_then(|seconds| i64::try_from(seconds).ok());
            seconds.map_or(i64::MAX, |seconds| seconds.saturating_mul(1_000).saturating_add(999))
        }
        told => told,
    }
}

/// A delivery, or why there is none.
fn came<T>(operation: &'static str, next: Option<lapin::Result<T>>) -> Result<T> {
    match next {
        Some(Ok(delivery)) => Ok(delivery),
        Some(Err(error)) => Err(failed(operation, &error)),
        None => Err(Error::new(ErrorKind::Unavailable, operation, "the server has ended the reading of a stream")),
    }
}

impl Topology {
    /// Creates a destination with its stream, or finds it; tells whether it was there.
    pub(crate) async fn ensure_stream(
        &self,
        exchange: &str,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<bool> {
        let stream = Names::stream(exchange);
        let existed = loop {
            match self.look(&stream, operation, deadline).await {
                Err(error) if passes(&error) && Instant::now() + STARTING < deadline => {
                    tokio::time::sleep(STARTING).await;
                }
                found => break found?.is_some(),
            }
        };
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("stream"));
        let (seconds, bytes) = self.stream_keeps;
        if seconds > 0 {
            arguments.insert("x-max-age".into(), text(&format!("{seconds}s")));
        }
        if bytes > 0 {
            arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(bytes.try_into().unwrap_or(i64::MAX)));
        }
        let channel = self.channel(operation, deadline).await?;
        Self::make_exchange(&channel, exchange, operation, deadline).await?;
        Self::make_queue(&channel, &stream, arguments, operation, deadline).await?;
        Self::bind_stream(&channel, exchange, operation, deadline).await?;
        Ok(existed)
    }

    /// Binds the destination's stream to its exchange.
    pub(crate) async fn bind_stream(
        channel: &Channel,
        exchange: &str,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<()> {
        let stream = Names::stream(exchange);
        let options = QueueBindOptions::default();
        let binding =
            channel.queue_bind(stream.as_str().into(), exchange.into(), "".into(), options, FieldTable::default());
        bounded(operation, deadline, binding).await
    }

    /// Creates a group that reads the stream, or finds it. Its queue holds what comes back to it: retries and redrives.
    pub(crate) async fn ensure_reader(
        &self,
        destination: &Destination,
        group: &Group,
        start: Start,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<Declared> {
        let (exchange, queue) = (self.names.exchange(destination), self.names.queue(destination, group));
        self.ensure_stream(&exchange, operation, deadline).await?;
        if self.look(&queue, operation, deadline).await?.is_some() {
            self.make_reader(&exchange, &queue, group, operation, deadline).await?;
            return Ok(Declared::Existed);
        }
        let turn = Turn::take(&self.link, &queue, operation, deadline).await?;
        let existed = self.look(&queue, operation, deadline).await?.is_some();
        if !existed {
            // First where it begins: the group is there when its queue is.
            let place = Place::beginning(self.offset_of(&Names::stream(&exchange), start, operation, deadline).await?);
            let progress = Names::progress(&queue);
            let channel = &turn.channel;
            Self::make_queue(channel, &progress, last_one(), operation, deadline).await?;
            bounded(operation, deadline, channel.confirm_select(ConfirmSelectOptions::default())).await?;
            write(channel.clone(), progress, place, deadline).await?;
            self.make_owner(&queue, operation, deadline).await?;
            self.make_reader(&exchange, &queue, group, operation, deadline).await?;
        }
        turn.end(operation, deadline).await?;
        if existed {
            return Ok(Declared::Existed);
        }
        tokio::time::sleep(SETTLES).await;
        Ok(Declared::Created)
    }

    async fn make_reader(
        &self,
        exchange: &str,
        queue: &str,
        group: &Group,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<()> {
        let channel = self.channel(operation, deadline).await?;
        Self::make_queue(&channel, &Names::letters(queue), refusing(quorum()), operation, deadline).await?;
        // Nothing expires in it, and so it forwards nothing: a group that has a queue in the place of a stream, under the same
        // name, is another one to the server.
        let mut arguments = refusing(quorum());
        self.bounds_deliveries(&mut arguments);
        Self::make_queue(&channel, queue, arguments, operation, deadline).await?;
        let readers = Names::readers(exchange);
        Self::make_exchange(&channel, &readers, operation, deadline).await?;
        Self::bind_group(&channel, (queue, &readers), group, operation, deadline).await
    }

    /// The offset with which a new group starts.
    async fn offset_of(&self, stream: &str, start: Start, operation: &'static str, deadline: Instant) -> Result<u64> {
        match start {
            Start::Earliest => Ok(0),
            Start::Position(position) => Ok(position.major),
            Start::Latest => Ok(self.end(stream, operation, deadline).await?.end()),
            Start::Time(time) => self.offset_at(stream, time, operation, deadline).await,
            _ => Err(Error::unsupported(operation, "streams start at the earliest, the latest, a time or an offset")),
        }
    }

    /// The first message that was published at that time or later, or the end.
    async fn offset_at(
        &self,
        stream: &str,
        time: Timestamp,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<u64> {
        let tail = self.end(stream, operation, deadline).await?;
        let is_late = |(_, published): &&(u64, i64)| *published >= time.as_millis();
        let first = match tail.seen.first() {
            Some(first) if is_late(&first) => first.0,
            _ => return Ok(tail.seen.iter().find(is_late).map_or(tail.end(), |(offset, _)| *offset)),
        };
        // The server searches by the times of its chunks, to the second ("Streams", "Consuming": `timestamp`).
        let from = (time.as_millis() / 1_000).saturating_sub(i64::try_from(APART.as_secs()).unwrap_or(0));
        let channel = self.channel(operation, deadline).await?;
        let from = AMQPValue::Timestamp(u64::try_from(from).unwrap_or(0));
        let mut consumer = read_from(&channel, stream, from, WINDOW, operation, deadline).await?;
        let mut count = 0_u16;
        loop {
            let next = timeout_at(deadline, consumer.next()).await.map_err(|_| late(operation))?;
            let delivery = came(operation, next)?;
            let Some(offset) = offset(&delivery.properties) else { continue };
            if offset >= first || published(&delivery) >= time.as_millis() {
                return Ok(offset.min(first));
            }
            count += 1;
            if count == WINDOW / 2 {
                count = 0;
                let all = BasicAckOptions { multiple: true };
                bounded(operation, deadline, channel.basic_ack(delivery.delivery_tag, all)).await?;
            }
        }
    }

    /// The end of a stream for certain. One that seems to hold nothing gets a mark, which no group is handed.
    pub(crate) async fn end(&self, stream: &str, operation: &'static str, deadline: Instant) -> Result<Tail> {
        let found = self.tail(stream, true, operation, deadline).await?;
        found.ok_or_else(|| Error::new(ErrorKind::Unexpected, operation, "a stream that was marked has no end"))
    }

    /// The end of a stream. `None` where nothing comes, and nothing is to be marked.
    async fn tail(
        &self,
        stream: &str,
        marks: bool,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<Option<Tail>> {
        let channel = self.channel(operation, deadline).await?;
        let mut consumer = read_from(&channel, stream, text("last"), WINDOW, operation, deadline).await?;
        let mut next = match timeout(EMPTY, consumer.next()).await {
            Ok(next) => next,
            Err(_) if !marks => return Ok(None),
            Err(_) => {
                // Without a last chunk it reads what comes (`osiris_log:init_offset_reader0/2`).
                let options = BasicPublishOptions::default();
                bounded(operation, deadline, channel.basic_publish("".into(), stream.into(), options, b"", mark()))
                    .await?;
                timeout_at(deadline, consumer.next()).await.map_err(|_| late(operation))?
            }
        };
        let mut tail = Tail { seen: Vec::new() };
        // What is there when the server answers a request has been sent before, as far as the prefetch lets it.
        let (mut count, mut is_answered) = (0_u16, false);
        loop {
            let delivery = came(operation, next)?;
            tail.seen.extend(offset(&delivery.properties).map(|offset| (offset, published(&delivery))));
            count += 1;
            if count == WINDOW {
                (count, is_answered) = (0, false);
                let all = BasicAckOptions { multiple: true };
                bounded(operation, deadline, channel.basic_ack(delivery.delivery_tag, all)).await?;
            }
            next = loop {
                match consumer.next().now_or_never() {
                    Some(next) => break next,
                    None if is_answered => {
                        bounded(operation, deadline, channel.close(200, "".into())).await?;
                        return Ok(Some(tail));
                    }
                    None => {
                        // Two: the answer to the second is behind the deliveries in the client, too.
                        for _ in 0..2 {
                            let options = QueueDeclareOptions::durable().passive();
                            let asking = channel.queue_declare(stream.into(), options, FieldTable::default());
                            bounded(operation, deadline, asking).await?;
                        }
                        is_answered = true;
                    }
                }
            };
        }
    }

    /// How much of the stream is ahead of a group: of what its member in this process has not handed out, or of what it has
    /// stored to be settled.
    pub(crate) async fn ahead(&self, exchange: &str, queue: &str, share: Option<Share>) -> Result<u64> {
        let operation = "lag";
        let deadline = Instant::now() + crate::topology::REQUEST;
        let tail = self.tail(&Names::stream(exchange), false, operation, deadline).await?;
        let end = tail.map_or(0, |tail| tail.end());
        if let Some(share) = share {
            return Ok(end.saturating_sub(share.next) + share.ready);
        }
        let turn = Turn::take(&self.link, queue, operation, deadline).await?;
        let place = turn.look(operation, deadline).await?;
        turn.end(operation, deadline).await?;
        Ok(place.ahead(end))
    }
}
