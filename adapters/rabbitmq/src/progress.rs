//! How far a group is in a stream: one message in a quorum queue of the group's, replaced by each next one.
//!
//! AMQP has no offsets that the server keeps ("Streams", "Offset Tracking" is of the stream protocol). A queue of one message
//! that drops its head when the next one comes (`x-max-length`, `x-overflow`; `rabbit_fifo:evaluate_limit/5` of 4.0.5 drops
//! what was given back before what is new) keeps the last one written, as durably as everything else of a group. Looking at it
//! takes it for a moment, so that whoever looks takes a turn; whoever writes does not: that is the one member that reads.

use std::fmt;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Result};
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::time::Instant;
use uuid::Uuid;

use crate::codec::PERSISTENT;
use crate::link::{Link, bounded, passes};
use crate::names::Names;
use crate::topology::text;

/// How soon a turn is asked for again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// What of a stream a group has settled: any, not only the first so many. What is open is with a member, which holds so many
/// at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Another one for each group that is made, also under a name that was there before.
    pub(crate) group: Uuid,
    /// Nothing from here on is settled.
    pub(crate) next: u64,
    /// What is not settled before that, in order.
    pub(crate) open: Vec<u64>,
}

impl Place {
    /// Where a new group begins.
    pub(crate) fn beginning(offset: u64) -> Self {
        Self { group: Uuid::new_v4(), next: offset, open: Vec::new() }
    }

    /// Where reading goes on.
    pub(crate) fn from(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.next)
    }

    pub(crate) fn is_settled(&self, offset: u64) -> bool {
        offset < self.next && self.open.binary_search(&offset).is_err()
    }

    /// How much before `end` is not settled.
    pub(crate) fn ahead(&self, end: u64) -> u64 {
        end.saturating_sub(self.next) + self.open.len() as u64
    }

    /// With what another one knows to be settled; of another group it knows nothing.
    pub(crate) fn merge(self, other: &Self) -> Self {
        if self.group != other.group {
            return self;
        }
        let (later, earlier) = if self.next >= other.next { (&self, other) } else { (other, &self) };
        let open = later.open.iter().copied().filter(|offset| !earlier.is_settled(*offset)).collect();
        Self { group: self.group, next: later.next, open }
    }

    /// As it is when the stream ends there: what is behind it is not there yet.
    pub(crate) fn cut(mut self, end: u64) -> Self {
        self.next = self.next.min(end);
        self.open.retain(|offset| *offset < end);
        self
    }

    fn parse(data: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(data).ok()?.split(' ');
        let (group, next) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let open = parts.map(|offset| offset.parse().ok()).collect::<Option<Vec<u64>>>()?;
        Some(Self { group, next, open }).filter(|place| place.open.is_sorted())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.group.simple(), self.next)?;
        self.open.iter().try_for_each(|offset| write!(f, " {offset}"))
    }
}

/// Replaces what is written. The channel has confirms.
pub(crate) async fn write(
    channel: Channel,
    queue: String,
    written: impl fmt::Display,
    deadline: Instant,
) -> Result<()> {
    let operation = "settle";
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let payload = written.to_string();
    let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
    let publishing = async {
        let key = queue.as_str().into();
        channel.basic_publish("".into(), key, options, payload.as_bytes(), properties).await?.await
    };
    match bounded(operation, deadline, publishing).await? {
        Confirmation::Ack(None) => Ok(()),
        Confirmation::Ack(Some(_)) => {
            let text = "a queue in which the group keeps what it knows is gone";
            Err(Error::new(ErrorKind::NotFound, operation, text).with("queue", &queue))
        }
        other => {
            let text = format!("what the group knows could not be stored: {other:?}");
            Err(Error::new(ErrorKind::Unavailable, operation, text))
        }
    }
}

/// While it is there nobody else looks at the progress of the group. It ends with its channel, so also when whoever waits for
/// it is gone.
pub(crate) struct Turn {
    pub(crate) channel: Channel,
    progress: String,
}

impl Turn {
    /// Waits for it. It is an exclusive consumer: the server has one at most ("Consumers", "Exclusivity").
    pub(crate) async fn take(link: &Link, queue: &str, operation: &'static str, deadline: Instant) -> Result<Self> {
        let name = Names::turn(queue);
        let mut pause = FIRST_PAUSE;
        loop {
            let channel = link.channel_until(operation, deadline).await?;
            match Self::begin(&channel, &name, operation, deadline).await {
                Ok(()) => return Ok(Self { channel, progress: Names::progress(queue) }),
                Err(error) if !is_taken(&error) => return Err(error),
                Err(error) if Instant::now() + pause >= deadline => return Err(error),
                Err(_) => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn begin(channel: &Channel, name: &str, operation: &'static str, deadline: Instant) -> Result<()> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("classic"));
        let options = QueueDeclareOptions { auto_delete: true, ..QueueDeclareOptions::durable() };
        bounded(operation, deadline, channel.queue_declare(name.into(), options, arguments)).await?;
        let options = BasicConsumeOptions { exclusive: true, no_ack: true, ..BasicConsumeOptions::default() };
        bounded(operation, deadline, channel.basic_consume(name.into(), "".into(), options, FieldTable::default()))
            .await
            .map(drop)
    }

    /// What is written. It is missing for a moment when whoever looked at it before has died.
    pub(crate) async fn look(&self, operation: &'static str, deadline: Instant) -> Result<Place> {
        loop {
            let getting = self.channel.basic_get(self.progress.as_str().into(), BasicGetOptions::default());
            if let Some(got) = bounded(operation, deadline, getting).await? {
                let options = BasicNackOptions { multiple: false, requeue: true };
                bounded(operation, deadline, self.channel.basic_nack(got.delivery.delivery_tag, options)).await?;
                return Place::parse(&got.delivery.data).ok_or_else(|| {
                    Error::new(ErrorKind::Unexpected, operation, "the group's progress is not what this library wrote")
                        .with("queue", &self.progress)
                });
            }
            if Instant::now() + LONGEST_PAUSE >= deadline {
                return Err(Error::new(ErrorKind::Timeout, operation, "the group's progress is held by somebody else")
                    .with("queue", &self.progress));
            }
            tokio::time::sleep(LONGEST_PAUSE).await;
        }
    }

    /// Gives it up.
    pub(crate) async fn end(self, operation: &'static str, deadline: Instant) -> Result<()> {
        bounded(operation, deadline, self.channel.close(200, "".into())).await
    }
}

/// Somebody else has the turn, or had it and took its queue away, or the connection is gone.
fn is_taken(error: &Error) -> bool {
    error.message().contains("exclusive use") || error.kind() == ErrorKind::NotFound || passes(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_was_written_and_nothing_else_is_one() {
        for open in [vec![], vec![3, 7]] {
            let place = place(u64::MAX, &open);
            assert_eq!(Place::parse(place.to_string().as_bytes()), Some(place));
        }
        let group = Uuid::from_u128(7).simple().to_string();
        for other in ["", "7", "x 7", &group, &format!("{group} -1"), &format!("{group} 7 "), &format!("{group} 7 5 4")]
        {
            assert_eq!(Place::parse(other.as_bytes()), None, "{other}");
        }
    }

    fn place(next: u64, open: &[u64]) -> Place {
        Place { group: Uuid::from_u128(7), next, open: open.to_vec() }
    }

    #[test]
    fn what_either_of_two_places_has_settled_is_settled_in_both_together() {
        let (one, two) = (place(10, &[2, 5, 9]), place(7, &[2, 3]));
        for merged in [one.clone().merge(&two), two.clone().merge(&one)] {
            assert_eq!(merged, place(10, &[2, 9]));
            for offset in 0..12 {
                let expected = one.is_settled(offset) || two.is_settled(offset);
                assert_eq!(merged.is_settled(offset), expected, "{offset}");
            }
        }
        let other = Place { group: Uuid::from_u128(8), ..place(20, &[]) };
        assert_eq!(one.clone().merge(&other), one, "a group that was made anew");
    }

    #[test]
    fn a_place_tells_where_reading_goes_on_and_how_much_is_ahead() {
        assert_eq!((place(10, &[]).from(), place(10, &[]).ahead(12)), (10, 2));
        assert_eq!((place(10, &[2, 9]).from(), place(10, &[2, 9]).ahead(12)), (2, 4));
        assert_eq!(place(10, &[2, 9]).cut(5), place(5, &[2]));
    }
}
