//! The one member of a group that reads its stream: where it goes on, and how its progress is stored.
//!
//! Progress is written on the channel of the member's stand (`owner.rs`), so that whoever comes next finds what was written:
//! the server has taken it in before it gives the token on.

use std::time::Duration;

use anybroker_core::Result;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Consumer};
use tokio::time::Instant;

use crate::feed::Feed;
use crate::link::bounded;
use crate::names::Names;
use crate::progress::{Place, Turn, write};
use crate::state::Shared;
use crate::stream::{at, read_from};

/// How long after the last one progress is written again.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a write may take.
const REQUEST: Duration = Duration::from_secs(10);

pub(crate) struct Reader {
    consumer: Consumer,
    channel: Channel,
    progress: String,
    /// Where the group was when it began.
    began: Place,
    /// How much was settled when it was written last, as the member counts.
    written: u64,
    writing: Option<(u64, BoxFuture<'static, Result<()>>)>,
    next_write: Instant,
}

/// What happened to a reader.
#[allow(clippy::large_enum_variant, reason = "an allocation for each message would cost more than moving it")]
pub(crate) enum Read {
    /// A message, or the end.
    Came(Option<lapin::Result<Delivery>>),
    /// Progress was written, or could not be.
    Wrote,
}

impl Reader {
    /// Reads on where the group is, on `channel`; its progress is written on `stand`.
    pub(crate) async fn open(
        feed: &Feed,
        stream: &str,
        channel: &Channel,
        stand: &Channel,
        deadline: Instant,
    ) -> Result<Self> {
        let turn = Turn::take(&feed.link, feed.queue(), "receive", deadline).await?;
        let place = turn.look("receive", deadline).await?;
        turn.end("receive", deadline).await?;
        // What this member has settled since is not written yet, when its connection was lost.
        let mut place = match &feed.known {
            Some(known) => place.merge(known),
            None => place,
        };
        if place.next > 0 {
            let end = feed.desk.topology.end(stream, "receive", deadline).await?.end();
            if end < place.next {
                // A stream is not flushed before its confirms: a loss of power may have taken its end. What takes the lost
                // offsets now is new.
                tracing::warn!(stream, next = place.next, end, "the stream ends before the group's place");
                place = place.cut(end);
            }
        }
        bounded("receive", deadline, stand.confirm_select(ConfirmSelectOptions::default())).await?;
        let consumer = read_from(channel, stream, at(place.from()), feed.prefetch, "receive", deadline).await?;
        let (channel, progress) = (stand.clone(), Names::progress(feed.queue()));
        Ok(Self { consumer, channel, progress, began: place, written: 0, writing: None, next_write: Instant::now() })
    }

    /// Where the group was when this reader began.
    pub(crate) fn began(&self) -> &Place {
        &self.began
    }

    /// Cancel-safe.
    pub(crate) async fn next(&mut self) -> Read {
        let Some((settled, writing)) = &mut self.writing else { return Read::Came(self.consumer.next().await) };
        tokio::select! {
            next = self.consumer.next() => Read::Came(next),
            told = writing => {
                let settled = *settled;
                self.wrote(settled, told);
                Read::Wrote
            }
        }
    }

    /// A message that is here already.
    pub(crate) fn ready(&mut self) -> Option<Option<lapin::Result<Delivery>>> {
        self.consumer.next().now_or_never()
    }

    fn wrote(&mut self, settled: u64, told: Result<()>) {
        self.writing = None;
        match told {
            Ok(()) => self.written = settled,
            // It is written again, here or by whoever reads next.
            Err(error) => tracing::warn!(%error, "how far a group is in its stream could not be stored"),
        }
    }

    /// Writes how far the group is, when something was settled since and it is time; tells when to come again for it.
    pub(crate) fn note(&mut self, shared: &Shared, feed: u32) -> Option<Instant> {
        if self.writing.is_some() || shared.settled(feed) == self.written {
            return None;
        }
        let now = Instant::now();
        if now < self.next_write {
            return Some(self.next_write);
        }
        self.next_write = now + PAUSE;
        let (settled, place) = shared.place(feed, &self.began)?;
        self.writing =
            Some((settled, write(self.channel.clone(), self.progress.clone(), place, now + REQUEST).boxed()));
        None
    }

    /// Writes the last of it.
    pub(crate) async fn finish(&mut self, shared: &Shared, feed: u32, deadline: Instant) {
        if let Some((settled, writing)) = self.writing.take() {
            let told = writing.await;
            self.wrote(settled, told);
        }
        if let Some((settled, place)) = shared.place(feed, &self.began).filter(|(settled, _)| *settled != self.written)
        {
            let told = write(self.channel.clone(), self.progress.clone(), place, deadline).await;
            self.wrote(settled, told);
        }
    }
}
