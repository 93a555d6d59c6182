//! The receiving side: one member of a group, fed by one task for each topic.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    DeliveryContext, Error, ErrorKind, OnFailure, Order, Received, Result, SubscribeSpec, Subscription, TopologyMode,
};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::config::Settings;
use crate::feed::{Feed, HashRange};
use crate::hand_overs::HandOvers;
use crate::members::Members;
use crate::names::Names;
use crate::producer::Producer;
use crate::settle::{Desk, PulsarSettler, Ways};
use crate::state::{FeedState, Shared};
use crate::topology::Topology;

/// How often what is kept of failures is stored anew: the topic of it keeps a day.
const RENEWED: Duration = Duration::from_secs(6 * 3_600);
/// How long a subscription that is dropped takes to give back what it holds.
const DROPPED: Duration = Duration::from_secs(10);

pub(crate) struct PulsarSubscription {
    shared: Arc<Shared>,
    desk: Arc<Desk>,
    context: Arc<DeliveryContext>,
    keeper: JoinHandle<()>,
}

impl PulsarSubscription {
    pub(crate) async fn open(spec: &SubscribeSpec, settings: &Settings, topology: &Arc<Topology>) -> Result<Self> {
        let operation = "subscribe";
        let group = &spec.group;
        let subscription = Names::subscription(group);
        let mut ways = Vec::new();
        let mut states = Vec::new();
        let mut feeds = Vec::new();
        // What members share out: where they show, its feeds, and how many lanes that are.
        let mut shared_out = Vec::new();
        // Whose hand-overs are counted, and its first feed.
        let mut counted = Vec::new();
        for destination in &spec.destinations {
            let partitions = match spec.topology {
                TopologyMode::Declare => topology.ensure_group(destination, group, spec.start, operation).await?.1,
                TopologyMode::Verify => topology.expect_group(destination, group, operation).await?,
                TopologyMode::Leave => topology.expect(destination, operation).await?,
            };
            if spec.order == Order::Total && partitions > 1 {
                let text = "the topic has partitions, which keep order each for itself; ask for order per key";
                return Err(Error::unsupported(operation, text).with("destination", destination));
            }
            let blocks = spec.on_failure == OnFailure::Block;
            let has_count = (spec.crash_limit.is_some() || blocks)
                && topology.counts_hand_overs(destination, group, operation).await?;
            if blocks && !has_count {
                let text = "the topic is gone on which the group keeps its failures: declare the group again";
                return Err(Error::new(ErrorKind::NotFound, operation, text).with("destination", destination));
            }
            let is_counted = spec.crash_limit.is_some() && has_count;
            if has_count {
                counted.push((destination, u32::try_from(states.len()).expect("a subscription has few topics")));
            }
            let window = || topology.window.clone();
            let letters = Producer::new(topology.names.full(&Names::letters(destination, group)), window());
            let (local, local_back) = (Names::topic(destination), Names::back(destination, group));
            let (sources, backs) = (topology.topics(&local, partitions), topology.topics(&local_back, partitions));
            let splits = spec.order == Order::Key && sources.len() == 1 && settings.key_ranges > 1;
            let ranges: Vec<Option<HashRange>> = match splits {
                true => HashRange::split(settings.key_ranges).map(Some).collect(),
                false => vec![None],
            };
            let (begin, lanes) = (states.len(), sources.len() * ranges.len());
            for (source, back) in sources.into_iter().zip(backs) {
                let way = Ways { back: Producer::new(back.clone(), window()), letters: Arc::clone(&letters) };
                for range in &ranges {
                    let index = u32::try_from(states.len()).expect("a subscription has few topics");
                    for (local, topic, is_back) in [(&local, &source, false), (&local_back, &back, true)] {
                        ways.push(way.clone());
                        let state = FeedState::new(destination.clone(), group.clone(), is_back, index, is_counted);
                        states.push(if blocks { state.blocking(spec.order) } else { state });
                        let (destination, local, topic) = (destination.clone(), local.clone(), topic.clone());
                        feeds.push((destination, local, topic, *range, is_back));
                    }
                }
            }
            if spec.order == Order::Key && lanes > 1 {
                let place = if partitions == 0 { local_back } else { format!("{local_back}-partition-0") };
                let number = |count: usize| u32::try_from(count).expect("a subscription has few topics");
                shared_out.push((place, number(begin)..number(states.len()), lanes));
            }
        }
        let keeps_order = spec.order != Order::None;
        let shared = Arc::new(Shared::new(spec.lease, spec.max_in_flight, keeps_order, states));
        let mut hand_overs = vec![None; feeds.len()];
        let mut counts = Vec::new();
        for (destination, first) in counted {
            let count = HandOvers::new(topology, &shared, destination, group, first);
            count.open(operation).await?;
            let own = feeds.iter().zip(&mut hand_overs).filter(|(feed, _)| feed.0 == *destination);
            own.for_each(|(_, of)| *of = Some(Arc::clone(&count)));
            counts.push(count);
        }
        let desk = Arc::new(Desk {
            hand_overs,
            topology: Arc::clone(topology),
            shared: Arc::clone(&shared),
            ways,
            settle_timeout: settings.settle_timeout,
        });
        let settler = PulsarSettler { desk: Arc::clone(&desk), runtime: Handle::current() };
        let context = DeliveryContext::new(group.clone(), spec.max_attempts, Arc::new(settler));
        let keeper = tokio::spawn(keep(Arc::clone(&desk)));
        let opened = Self { shared: Arc::clone(&shared), desk: Arc::clone(&desk), context, keeper };
        for count in counts {
            tokio::spawn(count.run());
        }
        // Under order, whether what comes back is received here depends on who has its source: those first.
        let (sources, backs): (Vec<_>, Vec<_>) = (0..).zip(feeds).partition(|(_, feed)| !feed.4);
        for share in [sources, backs] {
            let mut attached = Vec::new();
            for (index, (destination, local, topic, range, is_back)) in share {
                let (subscription, desk, order) = (subscription.clone(), Arc::clone(&desk), spec.order);
                let feed = Feed { index, destination, local, topic, subscription, order, range, is_back, desk };
                let (first, told) = oneshot::channel();
                tokio::spawn(feed.run(first));
                attached.push(told);
            }
            for told in attached {
                let gone = || Error::new(ErrorKind::Unavailable, operation, "the consumer could not be attached");
                told.await.unwrap_or_else(|_| Err(gone()))?;
            }
        }
        for (place, feeds, lanes) in shared_out {
            tokio::spawn(Members::new(topology, &shared, place, feeds, lanes).run());
        }
        Ok(opened)
    }

    /// For closing the connection, and for lag.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

/// Ends leases and delays until the subscription is gone.
async fn keep(desk: Arc<Desk>) {
    let mut renewed = Instant::now();
    loop {
        if renewed.elapsed() > RENEWED {
            renewed = Instant::now();
            let (desk, failed) = (Arc::clone(&desk), desk.shared.all_failed());
            tokio::spawn(async move {
                let told = desk.store_failures(failed.iter(), Instant::now() + DROPPED).await;
                if let Some(error) = told.into_iter().find_map(Result::err) {
                    tracing::warn!(%error, "what is kept of failures could not be stored anew");
                }
            });
        }
        let (returned, next) = desk.shared.look_after();
        if !returned.is_empty() {
            Desk::give_back(returned);
        }
        tokio::select! {
            () = tokio::time::sleep_until(next) => {}
            () = desk.shared.kept.notified() => {}
        }
    }
}

/// As long as it lives, somebody waits for messages.
struct Receiving<'a>(&'a Shared);

impl<'a> Receiving<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.receiving(true);
        Self(shared)
    }
}

impl Drop for Receiving<'_> {
    fn drop(&mut self) {
        self.0.receiving(false);
    }
}

#[async_trait]
impl Subscription for PulsarSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        let deadline = Instant::now() + wait;
        let _receiving = Receiving::new(&self.shared);
        loop {
            if self.shared.lock().is_closing {
                return Err(Error::closed("receive"));
            }
            let arrived = self.shared.arrived.notified();
            let mut wanted = Vec::new();
            let received = self.shared.take(max, &self.context, &mut wanted);
            for wanted in wanted {
                // Goes on when this future is dropped.
                if let Some(hand_overs) = self.desk.hand_overs[wanted.feed() as usize].clone() {
                    tokio::spawn(async move { hand_overs.store(wanted).await });
                }
            }
            if let Some(received) = received? {
                return Ok(received);
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return Ok(Received::default());
            }
        }
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        self.shared.lock().is_paused = paused;
        self.shared.room.notify_waiters();
        self.shared.arrived.notify_one();
        self.shared.kept.notify_one();
        Ok(())
    }

    async fn close(self: Box<Self>, grace: Duration) -> Result<()> {
        let deadline = Instant::now() + grace;
        // From here on settles are stale; those that were handed over are waited for.
        self.context.close();
        self.shared.close(deadline);
        if self.shared.ended(deadline + Duration::from_millis(100)).await {
            return Ok(());
        }
        let text = format!("not everything was given back within {grace:?}; it comes back when the connection ends");
        Err(Error::new(ErrorKind::Timeout, "close", text))
    }
}

impl Drop for PulsarSubscription {
    fn drop(&mut self) {
        self.context.close();
        self.shared.close(Instant::now() + DROPPED);
        self.keeper.abort();
    }
}
