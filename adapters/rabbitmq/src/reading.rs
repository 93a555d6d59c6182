//! Reading all letters of a group under one lease.
//!
//! The server does not keep an order for this: what a consumer gives back goes to the end of what came back before
//! (`rabbit_fifo:return_one/8` of 4.0.5, `lqueue:in(Msg, Returns)`), so that a reading of a few moves them behind the rest.
//! Therefore everything is taken before anything is decided, by one reader at a time, and whoever reads sorts. Letters are
//! taken by consumers whose prefetch is known to be filled: that they have brought everything is then certain, not guessed
//! from silence.

use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Result};
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use tokio::time::{Instant, timeout};

use crate::error::failed;
use crate::link::{Link, bounded};
use crate::topology::Topology;

/// How long nothing may happen to a reading.
pub(crate) const REQUEST: Duration = Duration::from_secs(20);
/// How long the end of a reading waits until the server has everything back.
const SETTLING: Duration = Duration::from_secs(2);
/// How soon the server is asked again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// Letters that are on their way at most, and their bytes when each is as large as the largest so far.
const MOST_COMING: u64 = 256;
const MOST_BYTES: u64 = 64 * 1_048_576;
const OPERATION: &str = "dead letters";

/// What was taken goes back when it ends, in whatever way.
pub(crate) struct Reading {
    channel: Channel,
    letters: String,
    first: Option<Delivery>,
    /// All stay to the end: another reader must see that somebody reads. The last one brings letters.
    consumers: Vec<Consumer>,
    /// Letters that the last consumer still brings.
    coming: u64,
    /// Letters that were ready when the server was last asked.
    ready: u64,
    /// Consumers of the queue that are this reading's, as the server counts.
    own: u32,
    largest: u64,
}

impl Reading {
    /// Begins when no other reader is there.
    pub(crate) async fn open(link: &Link, letters: &str) -> Result<Self> {
        let deadline = Instant::now() + REQUEST;
        let mut pause = FIRST_PAUSE;
        loop {
            let channel = link.channel_until(OPERATION, deadline).await?;
            if let Some(reading) = Self::begin(channel, letters, deadline).await? {
                return Ok(reading);
            }
            if Instant::now() + pause >= deadline {
                let text = "somebody else reads these letters; nothing else can be told while that lasts";
                return Err(Error::new(ErrorKind::Timeout, OPERATION, text).with("queue", letters));
            }
            // Two that begin together see each other, and must not meet again.
            tokio::time::sleep(pause + pause.mul_f64(jitter())).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// `None` when somebody else reads.
    async fn begin(channel: Channel, letters: &str, deadline: Instant) -> Result<Option<Self>> {
        let mut reading = Self {
            channel,
            letters: letters.to_owned(),
            first: None,
            consumers: Vec::new(),
            coming: 0,
            ready: 0,
            own: 0,
            largest: MOST_BYTES / 4,
        };
        if reading.look(deadline).await?.1 > 0 {
            reading.close(deadline).await?;
            return Ok(None);
        }
        let getting = reading.channel.basic_get(letters.into(), BasicGetOptions::default());
        match bounded(OPERATION, deadline, getting).await? {
            // The server counts whoever has got something as a consumer.
            Some(got) => (reading.first, reading.own) = (Some(got.delivery), 1),
            None => reading.consume(1, deadline).await?,
        }
        loop {
            let (ready, consumers) = reading.look(deadline).await?;
            if consumers > reading.own {
                reading.close(deadline).await?;
                return Ok(None);
            }
            if consumers == reading.own {
                reading.ready = ready;
                return Ok(Some(reading));
            }
            tokio::time::sleep(LONGEST_PAUSE).await;
        }
    }

    /// The next letter, in no order; `None` when this reading has all.
    pub(crate) async fn next(&mut self) -> Result<Option<Delivery>> {
        if let Some(first) = self.first.take() {
            self.note(&first);
            return Ok(Some(first));
        }
        if self.coming == 0 {
            if self.ready == 0 {
                self.ready = self.alone().await?;
            }
            if self.ready == 0 {
                return Ok(None);
            }
            let window = self.ready.min((MOST_BYTES / self.largest.max(1)).clamp(1, MOST_COMING));
            self.consume(u16::try_from(window).unwrap_or(1), Instant::now() + REQUEST).await?;
            (self.coming, self.ready) = (window, 0);
        }
        let Some(consumer) = self.consumers.last_mut() else { return Ok(None) };
        match timeout(REQUEST, consumer.next()).await {
            Ok(Some(Ok(delivery))) => {
                self.coming -= 1;
                self.note(&delivery);
                Ok(Some(delivery))
            }
            Ok(Some(Err(error))) => Err(failed(OPERATION, &error)),
            Ok(None) => Err(self.error(ErrorKind::Unavailable, "the reading was ended by the server")),
            Err(_) => Err(self.error(ErrorKind::Timeout, "letters that were there did not come: who has taken them?")),
        }
    }

    fn note(&mut self, delivery: &Delivery) {
        let size = delivery.data.len() as u64 + 1_024;
        // The first one replaces a cautious guess.
        self.largest = if self.consumers.is_empty() { size } else { self.largest.max(size) };
    }

    async fn consume(&mut self, prefetch: u16, deadline: Instant) -> Result<()> {
        bounded(OPERATION, deadline, self.channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = self.channel.basic_consume(self.letters.as_str().into(), "".into(), options, none);
        self.consumers.push(bounded(OPERATION, deadline, consuming).await?);
        self.own += 1;
        Ok(())
    }

    /// Letters that are ready and consumers of the queue. On this channel, so that it is asked after what was asked before:
    /// the server answers a `consume` before it has done it. When the queue does not answer it within 250 ms, the server
    /// tells 0 and 0 (`rabbit_quorum_queue:stat/2`); while this reading has a consumer, that is told from an answer.
    async fn look(&self, deadline: Instant) -> Result<(u64, u32)> {
        let options = QueueDeclareOptions::durable().passive();
        let asking = self.channel.queue_declare(self.letters.as_str().into(), options, FieldTable::default());
        match bounded(OPERATION, deadline, asking).await {
            Ok(queue) => Ok((u64::from(queue.message_count()), queue.consumer_count())),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Error::new(ErrorKind::NotFound, OPERATION, "it has no queue of letters"))
            }
            Err(error) => Err(error),
        }
    }

    /// What is ready, once nobody else has anything: another reader that has begun sees this one, and gives back.
    async fn alone(&self) -> Result<u64> {
        let deadline = Instant::now() + REQUEST;
        loop {
            match self.look(deadline).await? {
                (ready, consumers) if consumers == self.own => return Ok(ready),
                _ if Instant::now() + LONGEST_PAUSE >= deadline => {
                    return Err(self.error(ErrorKind::Timeout, "somebody else reads these letters"));
                }
                _ => tokio::time::sleep(LONGEST_PAUSE).await,
            }
        }
    }

    /// Acks letters that are settled for good, and makes sure that the server does not forget it: of a channel that closes it
    /// drops the acks that it has not passed to the queue yet (more than 32 at once wait), unless the consumer is cancelled
    /// first (`rabbit_fifo_client:settle/3` and `cancel_checkout/3` of 4.0.5). What was got without a consumer goes first,
    /// when nothing waits.
    pub(crate) async fn ack(&self, mut tags: Vec<u64>) -> Result<()> {
        if tags.is_empty() {
            return Ok(());
        }
        tags.sort_unstable();
        for tag in tags {
            crate::waits::ack_alone(&self.channel, tag);
        }
        let deadline = Instant::now() + REQUEST;
        for consumer in &self.consumers {
            let cancelling = self.channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
            bounded(OPERATION, deadline, cancelling).await?;
        }
        Ok(())
    }

    /// Gives everything that is unacked back, and waits until it is there: the server takes it back a moment after the
    /// channel is closed.
    pub(crate) async fn end(self, topology: &Topology) -> Result<()> {
        let deadline = Instant::now() + REQUEST;
        self.close(deadline).await?;
        let (patience, mut pause) = (Instant::now() + SETTLING, FIRST_PAUSE);
        while Instant::now() < patience {
            match topology.look(&self.letters, OPERATION, deadline).await? {
                Some((_, consumers)) if consumers > 0 => tokio::time::sleep(pause).await,
                _ => break,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(())
    }

    async fn close(&self, deadline: Instant) -> Result<()> {
        bounded(OPERATION, deadline, self.channel.close(200, "read".into())).await
    }

    fn error(&self, kind: ErrorKind, text: &'static str) -> Error {
        Error::new(kind, OPERATION, text).with("queue", &self.letters)
    }
}

/// 0 to 1.
fn jitter() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0
}
