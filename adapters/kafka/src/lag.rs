//! What a group has left to do, by what it has committed.

use anybroker_core::{Destination, Error, ErrorKind, Figure, Group, Lag, Precision, Result};
use rdkafka::config::FromClientConfig;
use rdkafka::consumer::BaseConsumer;

use crate::error::failed;
use crate::progress::Progress;
use crate::topology::Topology;
use crate::{groups, names};

/// What one partition has left. A member tells what is out and what is held back with its commits, some moments later.
#[derive(Debug, Clone, Copy, Default)]
struct Left {
    ready: u64,
    out: u64,
    delayed: u64,
}

impl Left {
    fn of(progress: Option<&Progress>, (low, high): (i64, i64)) -> Self {
        let fallback = Progress { offset: low, ..Progress::default() };
        let progress = progress.unwrap_or(&fallback);
        // What the retention has taken is nothing to do any more.
        let unsettled = (high - progress.offset.max(low)).max(0).unsigned_abs().saturating_sub(progress.above);
        let out = progress.out.min(unsettled);
        let held = progress.held.min(unsettled - out);
        Self { ready: unsettled - out - held, out, delayed: held }
    }

    fn plus(self, other: Self) -> Self {
        Self { ready: self.ready + other.ready, out: self.out + other.out, delayed: self.delayed + other.delayed }
    }

    fn lag(self) -> Lag {
        let figure = |count: u64| -> Figure { Some((count, Precision::Approximate)) };
        Lag { ready: figure(self.ready), in_flight: figure(self.out), delayed: figure(self.delayed), ..Lag::default() }
    }
}

pub(crate) async fn lag(topology: &Topology, destination: &Destination, group: &Group) -> Result<Lag> {
    let topic = names::topic(destination);
    let partitions = topology.expect(&topic, "lag").await?;
    let retries = names::retries(destination, group);
    let retry_partitions = topology.partitions(&retries).await?;
    topology.settings().renew().await?;
    let (settings, group) = (topology.settings().clone(), group.clone());
    let asked = tokio::task::spawn_blocking(move || -> Result<Lag> {
        let consumer: BaseConsumer = BaseConsumer::from_config(&settings.reader(&names::group(&topic, &group)))
            .map_err(|error| failed("lag", &error))?;
        let topics = [(&*topic, partitions), (&*retries, retry_partitions)];
        let progress = groups::committed(&consumer, &topics, "lag")?;
        let (main, retry) = progress.split_at(partitions.unsigned_abs() as usize);
        if main.iter().all(Option::is_none) {
            let text = "the group has no offsets of this topic";
            return Err(Error::new(ErrorKind::NotFound, "lag", text).with("group", group));
        }
        let watermarks = |topic: &str, partition: i32| groups::watermarks(&consumer, topic, partition, "lag");
        let (mut total, mut lanes) = (Left::default(), Vec::new());
        for (partition, progress) in (0..).zip(main) {
            let mut left = Left::of(progress.as_ref(), watermarks(&topic, partition)?);
            if let Some(progress) = retry.get(lanes.len()) {
                left = left.plus(Left::of(progress.as_ref(), watermarks(&retries, partition)?));
            }
            total = total.plus(left);
            lanes.push((format!("{topic}/{partition}"), left.lag()));
        }
        Ok(Lag { lanes, ..total.lag() })
    });
    asked.await.expect("asking for offsets cannot panic")
}
