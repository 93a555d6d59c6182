//! A peer as AnyBroker's suite drives it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anybroker_core::capability::Capabilities;
use anybroker_core::{
    Broker, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, Description, Destination, Effect,
    Endpoint, Error, ErrorKind, Group, Lag, Message, PublishOrder, PublishTerms, Receipt, Result, SubscribeSpec,
    Subscription, TopologyMode, TopologySpec, held_back,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::subscription::{Member, PeerSubscription};
use crate::{Parcel, Peer};

/// See the module's documentation.
pub struct PeerBroker<P> {
    peer: Arc<P>,
    creates: bool,
    closed: AtomicBool,
    /// What a publish need not declare again.
    known: Arc<Mutex<HashSet<Destination>>>,
    members: Mutex<Vec<Weak<Member>>>,
    /// Where the record gives order per key: when the batch before is through. A service that wants order publishes one after the other.
    last: Mutex<Option<oneshot::Receiver<()>>>,
}

impl<P: Peer> PeerBroker<P> {
    /// With `creates`, a publish to a destination that was not named before declares it first.
    pub fn new(peer: P, creates: bool) -> Self {
        Self {
            peer: Arc::new(peer),
            creates,
            closed: AtomicBool::new(false),
            known: Arc::default(),
            members: Mutex::default(),
            last: Mutex::default(),
        }
    }

    fn is_open(&self, operation: &'static str) -> Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(Error::closed(operation)) } else { Ok(()) }
    }

    fn no_word<T>(&self, operation: &'static str) -> Result<T> {
        Err(Error::unsupported(operation, "the peer has no word for it"))
    }
}

/// The destinations that a publish declares first, where it declares any.
type Known = Option<Arc<Mutex<HashSet<Destination>>>>;

async fn publish_one<P: Peer>(peer: &P, message: &Message, known: &Known, deadline: Instant) -> Result<Receipt> {
    let parcel = Parcel::pack(message, peer.room(), |name, value| peer.carries(name, value));
    let name = message.destination();
    let publish = async {
        if let Some(known) = known.as_ref().filter(|known| !known.lock().contains(name)) {
            peer.declare(&TopologySpec::destination(name)).await?;
            known.lock().insert(name.clone());
        }
        peer.publish(message, parcel).await
    };
    let outcome = tokio::time::timeout_at(deadline, publish).await.unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Timeout, "publish", "the peer did not answer in time").with_effect(Effect::Unknown))
    });
    if let (Err(error), Some(known)) = (&outcome, known)
        && (error.kind() == ErrorKind::NotFound || !peer.tells_missing())
    {
        known.lock().remove(name);
    }
    outcome.map_err(|error| error.with("id", message.id()))
}

#[async_trait]
impl<P: Peer> Broker for PeerBroker<P> {
    fn endpoint(&self) -> &Endpoint {
        self.peer.endpoint()
    }

    fn capabilities(&self) -> &Capabilities {
        self.peer.record()
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        let (peer, known) = (Arc::clone(&self.peer), self.creates.then(|| Arc::clone(&self.known)));
        let is_open = self.is_open("publish");
        let deadline = Instant::now() + terms.timeout;
        let is_ordered = terms.order == PublishOrder::Key && self.peer.record().key_order.is_given();
        let (through, next) = oneshot::channel();
        let before = if is_ordered { self.last.lock().replace(next) } else { None };
        // A task of its own: who drops the answer does not take the publishes back.
        let work = tokio::spawn(async move {
            let _through: oneshot::Sender<()> = through;
            if let Some(before) = before {
                // An error is what comes: the batch before drops its end.
                let _ = before.await;
            }
            let (mut failed, mut outcomes) = (HashSet::new(), Vec::with_capacity(batch.len()));
            for message in &batch {
                let lane = message.key().map(|key| (message.destination().clone(), key.to_vec()));
                let outcome = match &is_open {
                    Err(error) => Err(error.duplicate()),
                    Ok(()) if lane.as_ref().is_some_and(|lane| failed.contains(lane)) => {
                        Err(held_back(message.id(), message.destination()))
                    }
                    Ok(()) => publish_one(peer.as_ref(), message, &known, deadline).await,
                };
                if let (Err(_), Some(lane), PublishOrder::Key) = (&outcome, lane, terms.order) {
                    failed.insert(lane);
                }
                outcomes.push(outcome);
            }
            outcomes
        });
        Confirms::waiting(async move {
            match work.await {
                Ok(outcomes) => outcomes,
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            }
        })
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        self.is_open("subscribe")?;
        let mut destinations: Vec<Destination> = Vec::new();
        for name in &spec.destinations {
            if !destinations.contains(name) {
                destinations.push(name.clone());
            }
        }
        for name in &destinations {
            let topology = TopologySpec::group(name, &spec.group).with_start(spec.start);
            match spec.topology {
                TopologyMode::Declare => drop(self.peer.declare(&topology).await?),
                _ => self.peer.verify(&topology).await?,
            }
        }
        let mut inlets = Vec::new();
        for name in destinations {
            let (into, inlet) = mpsc::channel(self.peer.ahead(&spec).clamp(1, 10_000));
            let deliveries = self.peer.consume(&name, &spec, into).await?;
            inlets.push((name, inlet, deliveries));
        }
        let subscription = PeerSubscription::new(spec, inlets, self.peer.record().nack_delay.is_given());
        let mut members = self.members.lock();
        members.retain(|member| member.strong_count() > 0);
        members.push(subscription.member());
        Ok(Box::new(subscription))
    }

    async fn dead_letters(&self, _: &DeadLetterScope, _: Option<DeadLetterId>, _: usize) -> Result<DeadLetterPage> {
        self.no_word("dead letters")
    }

    async fn redrive(&self, _: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        ids.iter().map(|_| self.no_word("redrive")).collect()
    }

    async fn purge(&self, _: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        ids.iter().map(|_| self.no_word("purge")).collect()
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.is_open("declare")?;
        self.peer.declare(spec).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.is_open("verify")?;
        self.peer.verify(spec).await
    }

    async fn describe(&self, _: &Destination) -> Result<Description> {
        self.no_word("describe")
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.is_open("delete")?;
        self.peer.delete(destination, group).await
    }

    async fn lag(&self, _: &Destination, _: &Group) -> Result<Lag> {
        self.no_word("lag")
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let members = std::mem::take(&mut *self.members.lock());
        for member in members.iter().filter_map(Weak::upgrade) {
            member.close().await;
        }
        match tokio::time::timeout(grace, self.peer.close()).await {
            Ok(closed) => closed,
            Err(_) => Err(Error::new(ErrorKind::Timeout, "close", "the peer did not close in time")),
        }
    }
}
