//! The receiving side: one member of a group, fed by one task for each destination.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    DeliveryContext, Error, ErrorKind, OnFailure, Order, Received, Result, SubscribeSpec, Subscription, TopologyMode,
};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::agreement;
use crate::config::Settings;
use crate::desk::Desk;
use crate::feed::Feed;
use crate::link::Link;
use crate::names::Names;
use crate::outlet::Outlet;
use crate::settle::RabbitSettler;
use crate::state::{FeedState, Shared};
use crate::topology::Topology;

/// How many messages of a destination may wait in a member beyond what may be out, where later ones wait for one that failed.
pub(crate) const MOST_WAITING: usize = 1_000;
/// How long a subscription that is dropped takes to give back what it holds.
const DROPPED: Duration = Duration::from_secs(10);

pub(crate) struct RabbitSubscription {
    shared: Arc<Shared>,
    context: Arc<DeliveryContext>,
}

impl RabbitSubscription {
    pub(crate) async fn open(
        spec: &SubscribeSpec,
        settings: &Settings,
        topology: &Arc<Topology>,
        link: &Arc<Link>,
        copies: &Arc<Outlet>,
    ) -> Result<Self> {
        let is_log = settings.queue.is_log();
        // One member reads a stream, as if order was asked for.
        let keeps_order = is_log || spec.order != Order::None;
        let share = (spec.max_in_flight / spec.destinations.len()).max(1);
        let blocks = spec.on_failure == OnFailure::Block;
        let waiting = if blocks { MOST_WAITING } else { 0 };
        let prefetch = u16::try_from(share + waiting).unwrap_or(u16::MAX);
        let (mut queues, mut streams, mut feeds) = (Vec::new(), Vec::new(), Vec::new());
        for destination in &spec.destinations {
            let group = &spec.group;
            match spec.topology {
                TopologyMode::Declare => {
                    topology.ensure_group(destination, group, spec.start, "subscribe").await?;
                }
                TopologyMode::Verify => {
                    topology.ensure(destination, false, "subscribe", Instant::now() + DROPPED).await?;
                    topology.expect_group(destination, group, "subscribe").await?;
                }
                TopologyMode::Leave => {}
            }
            let feed = FeedState::new(destination.clone(), group.clone(), keeps_order, share);
            feeds.push(if blocks { feed.blocking(spec.order) } else { feed });
            let queue = topology.names.queue(destination, group);
            if !is_log {
                agreement::agree(topology, &queue, keeps_order, "subscribe", Instant::now() + DROPPED).await?;
            }
            queues.push(queue);
            if is_log {
                streams.push(Names::stream(&topology.names.exchange(destination)));
            }
        }
        let count = u32::try_from(queues.len()).unwrap_or(u32::MAX);
        let shared = Arc::new(Shared::new(spec.lease, settings.queue.counts(), feeds));
        let desk = Arc::new(Desk {
            topology: Arc::clone(topology),
            copies: Arc::clone(copies),
            shared: Arc::clone(&shared),
            settle_timeout: settings.settle_timeout,
            queues,
            streams,
        });
        let settler = RabbitSettler { desk: Arc::clone(&desk), runtime: Handle::current() };
        let context = DeliveryContext::new(spec.group.clone(), spec.max_attempts, Arc::new(settler));
        for index in 0..count {
            let (desk, link) = (Arc::clone(&desk), Arc::clone(link));
            let place = (spec.destinations[index as usize].clone(), spec.group.clone());
            let restores = (spec.topology == TopologyMode::Declare).then_some(place);
            tokio::spawn(Feed { index, desk, link, keeps_order, blocks, prefetch, restores, known: None }.run());
        }
        Ok(Self { shared, context })
    }

    /// For closing the connection, and for lag.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
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
impl Subscription for RabbitSubscription {
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
            if let Some(received) = self.shared.take(max, &self.context)? {
                return Ok(received);
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return Ok(Received::default());
            }
        }
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        self.shared.lock().is_paused = paused;
        self.shared.changed.notify_waiters();
        self.shared.arrived.notify_one();
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
        let text = format!("not everything was given back within {grace:?}; it comes back with the connection's end");
        Err(Error::new(ErrorKind::Timeout, "close", text))
    }
}

impl Drop for RabbitSubscription {
    fn drop(&mut self) {
        self.context.close();
        self.shared.close(Instant::now() + DROPPED);
    }
}
