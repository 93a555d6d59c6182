//! Receiving and settling through a peer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, OnceLock, Weak};
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, DeliveryContext, DeliveryFacts, Destination, Error, ErrorKind, Group, Lane, MessageId,
    Received, Result, SettleError, Settlement, Settler, Settling, SubscribeSpec, Subscription, SubscriptionEvent,
    Token,
};
use async_trait::async_trait;
use futures_util::future::{join_all, select_all};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::{Deliveries, Held};

type Inlet = mpsc::Receiver<Result<Box<dyn Held>>>;

/// How often each message of a group was nacked, for peers that tell no count.
static NACKS: LazyLock<Mutex<HashMap<(Group, MessageId), u32>>> = LazyLock::new(Mutex::default);

/// What is out, and what brings more.
pub(crate) struct Member {
    held: Mutex<HashMap<u64, Box<dyn Held>>>,
    /// Whether the record gives nacks with a delay.
    delays: bool,
    next: AtomicU64,
    closed: AtomicBool,
    consumers: Mutex<Vec<Deliveries>>,
    context: OnceLock<Weak<DeliveryContext>>,
}

impl Member {
    /// Ends the peer's consumers. What is held is dropped unsettled, as a service does that ends: when and how it comes back
    /// is the peer's.
    pub(crate) async fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if let Some(context) = self.context.get().and_then(Weak::upgrade) {
            context.close();
        }
        let consumers = std::mem::take(&mut *self.consumers.lock());
        join_all(consumers.into_iter().map(Deliveries::end)).await;
        self.held.lock().clear();
    }
}

/// The receiving end.
pub(crate) struct PeerSubscription {
    member: Arc<Member>,
    context: Arc<DeliveryContext>,
    inlets: Vec<(Destination, Inlet)>,
    paused: bool,
    degraded: bool,
    first: usize,
}

impl PeerSubscription {
    pub(crate) fn new(spec: SubscribeSpec, inlets: Vec<(Destination, Inlet, Deliveries)>, delays: bool) -> Self {
        let (inlets, consumers): (Vec<_>, Vec<_>) =
            inlets.into_iter().map(|(name, inlet, consumer)| ((name, inlet), consumer)).unzip();
        let member = Arc::new(Member {
            held: Mutex::default(),
            delays,
            next: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            consumers: Mutex::new(consumers),
            context: OnceLock::new(),
        });
        let context = DeliveryContext::new(spec.group.clone(), spec.max_attempts, member.clone());
        let _ = member.context.set(Arc::downgrade(&context));
        Self { member, context, inlets, paused: false, degraded: false, first: 0 }
    }

    pub(crate) fn member(&self) -> Weak<Member> {
        Arc::downgrade(&self.member)
    }

    fn delivery(&self, at: usize, held: Box<dyn Held>) -> Delivery {
        let number = self.member.next.fetch_add(1, Ordering::Relaxed);
        let mut facts = DeliveryFacts::new(Token::Pair(number, 0));
        facts.lane.index = u32::try_from(at).unwrap_or(u32::MAX);
        let message = held.parcel().unpack(&self.inlets[at].0);
        facts.attempt = held.count().unwrap_or_else(|| {
            let key = (self.context.group.clone(), message.id().clone());
            1 + NACKS.lock().get(&key).copied().unwrap_or(0)
        });
        self.member.held.lock().insert(number, held);
        Delivery::new(message, facts, &self.context)
    }
}

#[async_trait]
impl Subscription for PeerSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        let deadline = Instant::now() + wait;
        if self.member.closed.load(Ordering::Acquire) {
            return Err(Error::closed("receive"));
        }
        if self.paused || max == 0 {
            tokio::time::sleep_until(deadline).await;
            return Ok(Received::default());
        }
        self.first = (self.first + 1) % self.inlets.len();
        let count = self.inlets.len();
        // A receive of a channel is cancel-safe, and nothing is awaited between the taking and the answer.
        let first = {
            let mut order: Vec<_> = self.inlets.iter_mut().enumerate().collect();
            order.rotate_left(self.first % count);
            let waiting = order.into_iter().map(|(at, (_, inlet))| Box::pin(async move { (at, inlet.recv().await) }));
            match tokio::time::timeout_at(deadline, select_all(waiting)).await {
                Ok((came, _, _)) => came,
                Err(_) => return Ok(Received::default()),
            }
        };
        let (mut deliveries, mut events) = (Vec::new(), Vec::new());
        match first {
            (at, Some(Ok(held))) => deliveries.push(self.delivery(at, held)),
            // The peer's stream goes on behind such an error: so does its runtime.
            (_, Some(Err(error))) if error.kind() == ErrorKind::Unavailable => {
                self.degraded = true;
                let cause = error.message().to_owned();
                return Ok(Received { deliveries, events: vec![SubscriptionEvent::Degraded { cause }] });
            }
            (_, Some(Err(error))) => return Err(error),
            (_, None) if self.member.closed.load(Ordering::Acquire) => return Err(Error::closed("receive")),
            (_, None) => return Err(Error::new(ErrorKind::Unavailable, "receive", "the peer's stream has ended")),
        }
        if std::mem::take(&mut self.degraded) {
            events.push(SubscriptionEvent::Recovered);
        }
        let mut is_more = true;
        while is_more && deliveries.len() < max {
            is_more = false;
            for at in 0..count {
                if deliveries.len() == max {
                    break;
                }
                match self.inlets[at].1.try_recv() {
                    Ok(Ok(held)) => {
                        let delivery = self.delivery(at, held);
                        deliveries.push(delivery);
                        is_more = true;
                    }
                    Ok(Err(error)) => {
                        self.degraded = true;
                        events.push(SubscriptionEvent::Degraded { cause: error.message().to_owned() });
                    }
                    Err(_) => {}
                }
            }
        }
        Ok(Received { deliveries, events })
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        self.paused = paused;
        Ok(())
    }

    async fn close(self: Box<Self>, _grace: Duration) -> Result<()> {
        self.member.close().await;
        Ok(())
    }
}

impl Drop for PeerSubscription {
    fn drop(&mut self) {
        // Consumers end with their handles; what is held is dropped.
        self.member.closed.store(true, Ordering::Release);
        self.context.close();
        self.member.consumers.lock().clear();
        self.member.held.lock().clear();
    }
}

#[async_trait]
impl Settler for Member {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let mut work = Vec::with_capacity(batch.len());
        for (delivery, settlement) in batch {
            let has_word = match &settlement {
                Settlement::Ack => true,
                Settlement::Nack(nack) => self.delays || nack.delay.is_zero(),
                Settlement::Release | Settlement::DeadLetter(_) => false,
            };
            let held = match delivery.token() {
                Token::Pair(number, _) if has_word => self.held.lock().remove(number),
                _ => None,
            };
            work.push((delivery, held, settlement, has_word));
        }
        // A task of its own: who drops the answer does not take the settles back.
        let work = tokio::spawn(join_all(work.into_iter().map(|(delivery, held, settlement, has_word)| async move {
            let done = match (held, settlement) {
                (Some(held), Settlement::Ack) => held.ack().await,
                (Some(held), Settlement::Nack(nack)) => {
                    let key = (delivery.group().clone(), delivery.message().id().clone());
                    *NACKS.lock().entry(key).or_default() += 1;
                    held.nack(nack.delay).await
                }
                (None, _) if has_word => {
                    Err(Error::new(ErrorKind::StaleDelivery, "settle", "it was settled before, or is gone"))
                }
                _ => Err(Error::unsupported("settle", "the peer has no word for it")),
            };
            match done {
                Ok(()) => Ok(AckLevel::Sent),
                Err(error) => Err(SettleError::new(delivery, error)),
            }
        })));
        Settling::waiting(async move {
            match work.await {
                Ok(outcomes) => outcomes,
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            }
        })
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let mut outcomes = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            let stale = || Error::new(ErrorKind::StaleDelivery, "extend", "it was settled before, or is gone");
            let Token::Pair(number, _) = delivery.token() else {
                outcomes.push(Err(stale()));
                continue;
            };
            let held = self.held.lock().remove(number);
            outcomes.push(match held {
                Some(mut held) => {
                    let extended = held.extend(lease).await;
                    self.held.lock().insert(*number, held);
                    extended
                }
                None => Err(stale()),
            });
        }
        outcomes
    }

    /// What a service does that does not want a delivery after all: the peer's nack.
    fn abandoned(&self, token: &Token, _lane: Lane) {
        let Token::Pair(number, _) = token else { return };
        if let (Some(held), Ok(runtime)) = (self.held.lock().remove(number), tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move { drop(held.nack(Duration::ZERO).await) });
        }
    }
}
