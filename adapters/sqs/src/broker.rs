//! One connection to SQS.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anybroker_core::{
    Broker, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, DeliveryContext,
    Description, Destination, Endpoint, Error, ErrorKind, Group, Lag, Message, PublishTerms, Result, SubscribeSpec,
    Subscription, TopologySpec,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::RwLock;

use crate::capabilities::capabilities;
use crate::clients::Clients;
use crate::config::Settings;
use crate::dead_letter::Letters;
use crate::error::failed;
use crate::inbox::Inbox;
use crate::leases::{Delays, Forgiven};
use crate::publisher::Publisher;
use crate::retry;
use crate::settle::SqsSettler;
use crate::source::Source;
use crate::subscription::SqsSubscription;
use crate::topology::Topology;

pub(crate) struct SqsBroker {
    endpoint: Endpoint,
    capabilities: Capabilities,
    settings: Settings,
    clients: Clients,
    publisher: Publisher,
    topology: Arc<Topology>,
    letters: Letters,
    forgiven: Arc<Mutex<Forgiven>>,
    delays: Arc<Mutex<Delays>>,
    subscriptions: Mutex<Vec<Weak<Inbox>>>,
    is_closed: AtomicBool,
}

impl SqsBroker {
    pub(crate) async fn connect(settings: Settings) -> Result<Self> {
        let timeout = settings.connect_timeout;
        let connecting = async {
            let clients = Clients::new(&settings).await?;
            let topology = Topology::new(&clients, &settings);
            // Without retries: whether somebody answers is what is asked.
            let queues = async {
                let listed = clients.sender.list_queues().max_results(1).send().await;
                listed.map(|_| ()).map_err(|error| failed("connect", &error))
            };
            for probe in [queues.await, topology.probe().await] {
                match probe {
                    // Who answers that, answers; a service needs no permission to list. Its verbs tell what it lacks.
                    Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                        tracing::debug!(%error, "connected, without the permission to list");
                    }
                    probe => probe?,
                }
            }
            Ok::<_, Error>((clients, topology))
        };
        let (clients, topology) = match tokio::time::timeout(timeout, connecting).await {
            Ok(Err(error)) if error.kind() == ErrorKind::Timeout => Err(unreachable(error.message())),
            Ok(connected) => connected,
            Err(_) => Err(unreachable(&format!("no answer within {timeout:?}"))),
        }
        .map_err(|error| error.with("url", &settings.url))?;
        let topology = Arc::new(topology);
        let publisher = Publisher::new(&clients, &topology, &settings);
        let letters = Letters {
            clients: clients.clone(),
            topology: Arc::clone(&topology),
            is_total: settings.is_total,
            readings: Arc::default(),
        };
        let server = match &settings.endpoint {
            None => "Amazon SQS".to_owned(),
            Some(_) => "emulated: speaks the protocol of Amazon SQS, at an endpoint of its own".to_owned(),
        };
        let endpoint = Endpoint { scheme: "sqs", mode: settings.mode().into(), url: settings.url.clone(), server };
        let capabilities = capabilities(&settings);
        let (forgiven, delays) = (Arc::default(), Arc::default());
        let (subscriptions, is_closed) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self {
            endpoint,
            capabilities,
            settings,
            clients,
            publisher,
            topology,
            letters,
            forgiven,
            delays,
            subscriptions,
            is_closed,
        })
    }

    fn open(&self, operation: &'static str) -> Result<()> {
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::closed(operation).with("endpoint", &self.endpoint));
        }
        Ok(())
    }

    async fn source(&self, spec: &SubscribeSpec, lane: usize, inbox: &Arc<Inbox>) -> Result<Arc<Source>> {
        let destination = &spec.destinations[lane];
        let prepared = self.topology.prepare(destination, &spec.group, spec.start, spec.topology, "subscribe").await?;
        Ok(Arc::new(Source {
            clients: self.clients.clone(),
            destination: destination.clone(),
            group: spec.group.clone(),
            queues: prepared.0,
            lane: u32::try_from(lane).expect("few destinations"),
            lease: spec.lease,
            is_total: self.settings.is_total,
            polls: self.settings.polls,
            leases: Mutex::default(),
            forgiven: Arc::clone(&self.forgiven),
            delays: Arc::clone(&self.delays),
            inbox: Arc::clone(inbox),
            received: AtomicU64::new(0),
            asked: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            width: AtomicUsize::new(1),
        }))
    }
}

fn unreachable(text: &str) -> Error {
    Error::new(ErrorKind::Unavailable, "connect", text)
}

#[async_trait]
impl Broker for SqsBroker {
    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn publish(&self, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        if let Err(error) = self.open("publish") {
            return Confirms::ready(batch.iter().map(|_| Err(error.duplicate())).collect());
        }
        self.publisher.publish(&batch, &terms).await
    }

    async fn subscribe(&self, spec: SubscribeSpec) -> Result<Box<dyn Subscription>> {
        self.open("subscribe")?;
        let inbox = Arc::new(Inbox::default());
        let mut sources = Vec::with_capacity(spec.destinations.len());
        for lane in 0..spec.destinations.len() {
            sources.push(self.source(&spec, lane, &inbox).await?);
        }
        sources.iter().for_each(retry::bring_back);
        let on_their_way = Arc::new(RwLock::new(()));
        let settler = SqsSettler {
            sources: sources.clone(),
            runtime: Handle::current(),
            on_their_way: Arc::clone(&on_their_way),
        };
        let context = DeliveryContext::new(spec.group.clone(), spec.max_attempts, Arc::new(settler));
        let mut subscriptions = self.subscriptions.lock();
        subscriptions.retain(|other| other.strong_count() > 0);
        subscriptions.push(Arc::downgrade(&inbox));
        let receivers = self.settings.receivers;
        Ok(Box::new(SqsSubscription {
            sources,
            context,
            inbox,
            on_their_way,
            receivers,
            is_paused: false,
            turn: 0,
            max_in_flight: spec.max_in_flight,
            taken_at: None,
        }))
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        self.open("dead letters")?;
        self.letters.page(scope, from, max).await
    }

    async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        match self.open("redrive") {
            Ok(()) => self.letters.redrive(scope, ids).await,
            Err(error) => ids.iter().map(|_| Err(error.duplicate())).collect(),
        }
    }

    async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        match self.open("purge") {
            Ok(()) => self.letters.purge(scope, ids).await,
            Err(error) => ids.iter().map(|_| Err(error.duplicate())).collect(),
        }
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.open("declare")?;
        self.topology.declare(spec).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.open("verify")?;
        self.topology.verify(spec).await
    }

    async fn describe(&self, destination: &Destination) -> Result<Description> {
        self.open("describe")?;
        self.topology.describe(destination).await
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.open("delete")?;
        self.topology.delete(destination, group).await
    }

    async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        self.open("lag")?;
        let (queue, mut lag) = self.topology.lag(destination, group).await?;
        let delayed = self.delays.lock().count(&queue);
        if let (Some((in_flight, _)), Some((waiting, _))) = (&mut lag.in_flight, &mut lag.delayed) {
            // SQS counts what waits under a visibility timeout as in flight; this connection's own is known better.
            let moved = delayed.min(*in_flight);
            *in_flight -= moved;
            *waiting += moved;
        }
        Ok(lag)
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        if self.is_closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        for inbox in std::mem::take(&mut *self.subscriptions.lock()).iter().filter_map(Weak::upgrade) {
            // Its owner meets `Closed` at the next receive; what it holds comes back by lease.
            inbox.disconnect();
        }
        let (flushed, _) = tokio::join!(self.publisher.flush(grace), tokio::time::timeout(grace, self.letters.close()));
        flushed
    }
}
