//! Deletes from a retry topic what its group has settled: nothing else may end a retry, so its retention is for ever.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::{Offset, TopicPartitionList};
use tokio::runtime::Handle;

use crate::error::failed;
use crate::login::Admins;
use crate::topology::options;

/// How often it is done while the subscription lives, beside once at its end.
const INTERVAL: Duration = Duration::from_secs(30);

/// See the module's documentation.
pub(crate) struct Trim {
    admins: Arc<Admins>,
    runtime: Handle,
    topic: Arc<str>,
    /// Settled up to there, by partition; and what was deleted.
    settled: BTreeMap<i32, i64>,
    deleted: BTreeMap<i32, i64>,
    last: Instant,
}

impl Trim {
    pub(crate) fn new(admins: &Arc<Admins>, runtime: Handle, topic: &Arc<str>) -> Self {
        Self {
            admins: Arc::clone(admins),
            runtime,
            topic: Arc::clone(topic),
            settled: BTreeMap::new(),
            deleted: BTreeMap::new(),
            last: Instant::now(),
        }
    }

    /// These offsets were committed (or are on their way since the last call, which is long enough ago).
    pub(crate) fn settled(&mut self, offsets: Vec<(i32, i64)>, is_confirmed: bool) {
        let is_due = self.last.elapsed() >= INTERVAL && !self.settled.is_empty();
        if is_confirmed {
            self.settled.extend(offsets);
            self.delete();
        } else {
            if is_due {
                self.delete();
            }
            self.settled.extend(offsets);
        }
    }

    fn delete(&mut self) {
        self.last = Instant::now();
        let mut list = TopicPartitionList::new();
        for (partition, offset) in std::mem::take(&mut self.settled) {
            if offset > self.deleted.get(&partition).copied().unwrap_or_default()
                && list.add_partition_offset(&self.topic, partition, Offset::Offset(offset)).is_ok()
            {
                self.deleted.insert(partition, offset);
            }
        }
        if list.count() == 0 {
            return;
        }
        let (admins, topic) = (Arc::clone(&self.admins), Arc::clone(&self.topic));
        self.runtime.spawn(async move {
            let deleted = match admins.client(&topic).await {
                Ok(client) => {
                    client.delete_records(&list, &options()).await.map(drop).map_err(|error| failed("settle", &error))
                }
                Err(error) => Err(error),
            };
            if let Err(error) = deleted {
                tracing::warn!(%error, topic = &*topic, "settled retries could not be deleted; later ones will be with them");
            }
        });
    }
}
