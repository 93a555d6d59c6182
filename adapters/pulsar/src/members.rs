//! The members of a group under order per key: who is there, and how many lanes each is to have.
//!
//! A lane is a topic's partition, or a range of the hashes of keys of a topic without partitions. That one member has it at a
//! time is the broker's doing (Exclusive and Key_Shared with fixed ranges refuse a second consumer); this only shares them out.
//! Each member has a consumer that receives nothing on the group's own topic, on a subscription that ends with it. Who is there
//! stands in that topic's figures, in the same order for everybody, so that all of them reckon the same shares.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::Result;
use pulsar::proto::{self, command_subscribe::SubType};
use serde_json::Value;
use tokio::sync::mpsc;

use crate::admin::Verb;
use crate::state::Shared;
use crate::topology::Topology;
use crate::wire::{Conn, Inbound};

/// The subscription that all members have.
const SUBSCRIPTION: &str = "anybroker-members";
/// How often it is looked who is there: about as long as a member that joins waits for its share.
const LOOK: Duration = Duration::from_secs(1);
/// How long one look may take.
const LOOKED: Duration = Duration::from_secs(10);

/// One destination's and group's members, as one of them sees them.
pub(crate) struct Members {
    topology: Arc<Topology>,
    shared: Arc<Shared>,
    /// The topic on which they show, locally and whole.
    local: String,
    topic: String,
    /// The feeds that are shared out.
    feeds: Range<u32>,
    lanes: usize,
    /// This member.
    name: String,
}

/// This member, shown to the others.
struct Shown {
    conn: Arc<Conn>,
    consumer: u64,
    inbound: mpsc::UnboundedReceiver<Inbound>,
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.conn.abandon_consumer(self.consumer);
    }
}

impl Members {
    pub(crate) fn new(
        topology: &Arc<Topology>,
        shared: &Arc<Shared>,
        local: String,
        feeds: Range<u32>,
        lanes: usize,
    ) -> Self {
        let topic = topology.names.full(&local);
        let name = uuid::Uuid::now_v7().simple().to_string();
        Self { topology: Arc::clone(topology), shared: Arc::clone(shared), local, topic, feeds, lanes, name }
    }

    /// Shows this member and shares the lanes out until the subscription closes.
    pub(crate) async fn run(self) {
        let mut closing = self.shared.closing.subscribe();
        let mut shown = None;
        loop {
            let looking = tokio::time::timeout(LOOKED, self.look(&mut shown));
            let looked = tokio::select! {
                looked = looking => looked,
                _ = closing.wait_for(Option::is_some) => return,
            };
            match looked {
                Ok(Ok(Some(quota))) => self.shared.balance(self.feeds.clone(), quota),
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::debug!(%error, topic = self.topic, "who is in the group could not be seen"),
                Err(_) => tracing::debug!(topic = self.topic, "who is in the group could not be seen in time"),
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = closing.wait_for(Option::is_some) => return,
            }
        }
    }

    /// How many lanes are this member's share, as far as that is known.
    async fn look(&self, shown: &mut Option<Shown>) -> Result<Option<usize>> {
        let is_there = shown.as_mut().is_some_and(|shown| {
            !shown.conn.is_closed() && matches!(shown.inbound.try_recv(), Err(mpsc::error::TryRecvError::Empty))
        });
        if !is_there {
            // The old one first: a consumer's name is one's own.
            drop(shown.take());
            *shown = Some(self.show().await?);
        }
        let answer = self.topology.admin.topic("receive", Verb::Get, &self.local, "/stats").await?;
        let stats: Value = answer.read("receive")?;
        let consumers = stats["subscriptions"][SUBSCRIPTION]["consumers"].as_array();
        let names = consumers.into_iter().flatten().filter_map(|consumer| consumer["consumerName"].as_str());
        Ok(share(&self.name, names, self.lanes))
    }

    async fn show(&self) -> Result<Shown> {
        let operation = "receive";
        let conn = self.topology.link.serving(operation, &self.topic).await?;
        let consumer = conn.next_id();
        let inbound = conn.add_consumer(consumer);
        let subscribe = proto::CommandSubscribe {
            topic: self.topic.clone(),
            subscription: SUBSCRIPTION.to_owned(),
            sub_type: SubType::Shared as i32,
            consumer_id: consumer,
            consumer_name: Some(self.name.clone()),
            durable: Some(false),
            initial_position: Some(proto::command_subscribe::InitialPosition::Latest as i32),
            ..Default::default()
        };
        // Given up before it is answered, it is closed.
        let shown = Shown { conn: Arc::clone(&conn), consumer, inbound };
        conn.subscribe(operation, subscribe).await.map(|_| shown)
    }
}

/// The share of `own` among those that are there: the first ones, by name, have one more where it does not come out even.
fn share<'n>(own: &str, names: impl Iterator<Item = &'n str>, lanes: usize) -> Option<usize> {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    names.dedup();
    let rank = names.iter().position(|name| *name == own)?;
    Some(lanes / names.len() + usize::from(rank < lanes % names.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_of_all_members_are_as_equal_as_can_be_and_are_all_lanes_together() {
        for lanes in 1..20 {
            for members in 1..20 {
                let names: Vec<String> = (0..members).rev().map(|name| format!("{name:03}")).collect();
                let share = |own: &String| share(own, names.iter().map(String::as_str), lanes).unwrap();
                let shares: Vec<usize> = names.iter().map(share).collect();
                assert_eq!(shares.iter().sum::<usize>(), lanes);
                assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
            }
        }
    }

    #[test]
    fn who_is_not_seen_yet_knows_no_share() {
        assert_eq!(share("a", ["b"].into_iter(), 8), None);
    }
}
