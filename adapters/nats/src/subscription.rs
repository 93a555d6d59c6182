//! The receiving side: one member of a group, fed by one task for each destination.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    DeliveryContext, Error, ErrorKind, OnFailure, Order, Received, Result, SubscribeSpec, Subscription, TopologyMode,
};
use async_trait::async_trait;
use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::agreement::{self, Keepers, Stand, Unordered};
use crate::config::Settings;
use crate::desk::{Desk, Scope};
use crate::feed::Feed;
use crate::link::{Link, by};
use crate::lookup::look_up;
use crate::names::Names;
use crate::owner::{self, Owner};
use crate::settle::{self, NatsSettler};
use crate::state::{FeedState, Renewal, Shared, Tasks};
use crate::topology::{Topology, ack_wait};

/// Renewals that are told together.
const AT_ONCE: usize = 256;
/// How long a subscription that is dropped takes to give back what it holds.
const DROPPED: Duration = Duration::from_secs(10);

pub(crate) struct NatsSubscription {
    shared: Arc<Shared>,
    context: Arc<DeliveryContext>,
    keeper: JoinHandle<()>,
}

impl NatsSubscription {
    pub(crate) async fn open(
        spec: &SubscribeSpec,
        settings: &Settings,
        topology: &Arc<Topology>,
        link: &Arc<Link>,
    ) -> Result<Self> {
        let keeps_order = spec.order != Order::None;
        let ack_wait = ack_wait(spec.lease);
        let (mut scopes, mut feeds) = (Vec::new(), Vec::new());
        for destination in &spec.destinations {
            let group = &spec.group;
            let ack_wait = match spec.topology {
                TopologyMode::Declare => {
                    let ensured = topology.ensure_group(destination, group, spec.start, ack_wait, "subscribe").await?;
                    ensured.1.ack_wait()
                }
                TopologyMode::Verify => {
                    topology.expect(destination, "subscribe").await?;
                    topology.expect_group(destination, group, "subscribe").await?.ack_wait()
                }
                TopologyMode::Leave => ack_wait,
            };
            let names = &topology.names;
            scopes.push(Scope {
                stream: names.stream(destination),
                consumer: Names::consumer(group),
                records: names.records(destination, group),
                record: names.record(destination, group),
            });
            let feed = FeedState::new(destination.clone(), group.clone(), keeps_order, ack_wait);
            feeds.push(if spec.on_failure == OnFailure::Block { feed.blocking(spec.order) } else { feed });
        }
        let (shared, tasks) = Shared::new(spec.lease, spec.max_in_flight, feeds);
        let shared = Arc::new(shared);
        let desk = Arc::new(Desk {
            link: Arc::clone(link),
            topology: Arc::clone(topology),
            shared: Arc::clone(&shared),
            scopes,
            settle_timeout: settings.settle_timeout,
        });
        let settler = NatsSettler { desk: Arc::clone(&desk), runtime: Handle::current() };
        let context = DeliveryContext::new(spec.group.clone(), spec.max_attempts, Arc::new(settler));
        let mut working = Vec::new();
        for (index, destination) in (0..).zip(&spec.destinations) {
            let scope = &desk.scopes[index as usize];
            let claim = owner::claim(&scope.record);
            let keepers = Keepers::new(&scope.records, claim.clone(), settings.member_timeout);
            let stand = if keeps_order {
                agreement::expect_no_unordered(link, topology, keepers).await?;
                let record = (scope.records.clone(), claim);
                Stand::InTurn(Owner::new(Arc::clone(link), Arc::clone(topology), record, settings.member_timeout))
            } else {
                Stand::Any(Unordered::new(link, topology, keepers).await?)
            };
            working.push(Feed::new(index, destination.clone(), Arc::clone(&desk), stand).await?);
        }
        for feed in working {
            tokio::spawn(feed.run());
        }
        let keeper = tokio::spawn(keep(Arc::clone(&desk), tasks));
        Ok(Self { shared, context, keeper })
    }

    /// For closing the connection, and for lag.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

/// Renews leases, settles what has expired, and looks up what may have failed, until the subscription is gone.
async fn keep(desk: Arc<Desk>, Tasks { mut renewed, mut expired, mut looking }: Tasks) {
    let shared = Arc::clone(&desk.shared);
    let mut next = Instant::now();
    loop {
        tokio::select! {
            first = renewed.recv() => {
                let Some(first) = first else { return };
                let mut all = vec![first];
                while all.len() < AT_ONCE && let Ok(more) = renewed.try_recv() {
                    all.push(more);
                }
                renew(&desk, all).await;
            }
            first = expired.recv() => {
                let Some(first) = first else { return };
                let mut all = vec![first];
                while let Ok(more) = expired.try_recv() {
                    all.push(more);
                }
                let desk = Arc::clone(&desk);
                tokio::spawn(async move { settle::expire(&desk, all).await });
            }
            again = looking.recv() => {
                let Some(again) = again else { return };
                tokio::spawn(look_up(Arc::clone(&desk), again));
            }
            () = tokio::time::sleep_until(next) => next = Instant::now() + shared.keep_leases(),
        }
    }
}

/// Says that deliveries are in progress. What the server does not confirm counts as not kept.
async fn renew(desk: &Arc<Desk>, renewals: Vec<Renewal>) {
    let begun = Instant::now();
    let limit = begun + desk.shared.renewal_limit();
    let answers = desk.link.board.open(renewals.len(), limit);
    answers.expect(0, renewals.iter().map(|renewal| &renewal.ack));
    for (place, renewal) in renewals.iter().enumerate() {
        let (ack, reply) = (renewal.ack.clone(), answers.place(place));
        let sending = desk.link.client.publish_with_reply(ack, reply, Bytes::from_static(b"+WPI"));
        if !matches!(by(limit, sending).await, Some(Ok(()))) {
            answers.skip(place);
        }
    }
    let desk = Arc::clone(desk);
    tokio::spawn(async move {
        answers.wait(limit).await;
        let confirmed = renewals.iter().zip(answers.take_all());
        let confirmed = confirmed.filter(|(_, reply)| reply.as_ref().is_some_and(|reply| !reply.is_unserved));
        desk.shared.renewed(begun, confirmed.map(|(renewal, _)| renewal.key));
    });
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
impl Subscription for NatsSubscription {
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
        self.shared.room.notify_waiters();
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
        let text = format!("not everything was given back within {grace:?}; it comes back when its lease ends");
        Err(Error::new(ErrorKind::Timeout, "close", text))
    }
}

impl Drop for NatsSubscription {
    fn drop(&mut self) {
        self.context.close();
        self.shared.close(Instant::now() + DROPPED);
        // Its leases are kept until everything is given back.
        let (shared, keeper) = (Arc::clone(&self.shared), self.keeper.abort_handle());
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                shared.ended(Instant::now() + DROPPED).await;
                keeper.abort();
            });
        } else {
            keeper.abort();
        }
    }
}
