//! One connection to SQS.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anybroker_core::{
    Broker, Capabilities, Confirms, DeadLetterId, DeadLetterPage, DeadLetterScope, Declared, DeliveryContext,
    Description, Destination, Endpoint, Error, ErrorKind, Group, Lag, Message, PublishTerms, Result, SubscribeSpec,
    Subscription, TopologySpec,
};
use async_trait::async_trait;
use aws_sdk_sqs::Client;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::RwLock;

use crate::capabilities::capabilities;
use crate::config::Settings;
use crate::dead_letter;
use crate::error::failed;
use crate::leases::Forgiven;
use crate::publisher::Publisher;
use crate::queues::Queues;
use crate::settle::SqsSettler;
use crate::source::{Inbox, Source};
use crate::subscription::SqsSubscription;

pub(crate) struct SqsBroker {
    endpoint: Endpoint,
    capabilities: Capabilities,
    settings: Settings,
    client: Client,
    publisher: Arc<Publisher>,
    queues: Arc<Queues>,
    forgiven: Arc<Mutex<Forgiven>>,
    subscriptions: Mutex<Vec<Weak<Inbox>>>,
    is_closed: AtomicBool,
}

impl SqsBroker {
    pub(crate) async fn connect(settings: Settings) -> Result<Self> {
        let timeout = settings.connect_timeout;
        let connecting = async {
            let (client, sender) = settings.clients().await;
            // Without retries: whether somebody answers is what is asked.
            sender.list_queues().max_results(1).send().await.map_err(|error| failed("connect", &error))?;
            Ok::<_, Error>((client, sender))
        };
        let (client, sender) = match tokio::time::timeout(timeout, connecting).await {
            Ok(Err(error)) if error.kind() == ErrorKind::Timeout => Err(unreachable(error.message())),
            Ok(connected) => connected,
            Err(_) => Err(unreachable(&format!("no answer within {timeout:?}"))),
        }
        .map_err(|error| error.with("url", &settings.url))?;
        let queues = Arc::new(Queues::new(&client, &settings));
        let publisher = Arc::new(Publisher::new(sender, &queues, &settings));
        let server = match &settings.endpoint {
            None => "Amazon SQS".to_owned(),
            Some(_) => "emulated: speaks the protocol of Amazon SQS, at an endpoint of its own".to_owned(),
        };
        let endpoint = Endpoint { scheme: "sqs", mode: "standard".into(), url: settings.url.clone(), server };
        let capabilities = capabilities(&settings);
        let forgiven = Arc::default();
        let (subscriptions, is_closed) = (Mutex::default(), AtomicBool::new(false));
        Ok(Self { endpoint, capabilities, settings, client, publisher, queues, forgiven, subscriptions, is_closed })
    }

    fn open(&self, operation: &'static str) -> Result<()> {
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::closed(operation).with("endpoint", &self.endpoint));
        }
        Ok(())
    }
}

fn unreachable(text: &str) -> Error {
    Error::new(ErrorKind::Unavailable, "connect", text)
}

fn unwritten(operation: &'static str) -> Error {
    Error::unsupported(operation, "not written yet in this adapter")
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
        for destination in &spec.destinations {
            let prepared =
                self.queues.prepare(destination, &spec.group, spec.start, spec.topology, "subscribe").await?;
            let (url, letters) = prepared.0;
            sources.push(Arc::new(Source {
                client: self.client.clone(),
                publisher: Arc::clone(&self.publisher),
                destination: destination.clone(),
                url,
                letters,
                lane: u32::try_from(sources.len()).expect("few destinations"),
                lease: spec.lease,
                leases: Mutex::default(),
                forgiven: Arc::clone(&self.forgiven),
                inbox: Arc::clone(&inbox),
                asked: AtomicUsize::new(0),
                open: AtomicUsize::new(0),
                width: AtomicUsize::new(1),
            }));
        }
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
        Ok(Box::new(SqsSubscription { sources, context, inbox, on_their_way, receivers, is_paused: false, turn: 0 }))
    }

    async fn dead_letters(
        &self,
        scope: &DeadLetterScope,
        _from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        self.open("dead letters")?;
        let url = self.queues.dead_letters(&scope.source, &scope.group).await?;
        dead_letter::page(&self.client, &url, scope, max).await
    }

    async fn redrive(&self, _scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        ids.iter().map(|_| Err(unwritten("redrive"))).collect()
    }

    async fn purge(&self, _scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        ids.iter().map(|_| Err(unwritten("purge"))).collect()
    }

    async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        self.open("declare")?;
        self.queues.declare(spec).await
    }

    async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.open("verify")?;
        self.queues.verify(spec).await
    }

    async fn describe(&self, _destination: &Destination) -> Result<Description> {
        Err(unwritten("describe"))
    }

    async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.open("delete")?;
        self.queues.delete(destination, group).await
    }

    async fn lag(&self, _destination: &Destination, _group: &Group) -> Result<Lag> {
        Err(unwritten("lag"))
    }

    async fn close(&self, grace: Duration) -> Result<()> {
        if self.is_closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        for inbox in std::mem::take(&mut *self.subscriptions.lock()).iter().filter_map(Weak::upgrade) {
            // Its owner meets `Closed` at the next receive; what it holds comes back by lease.
            *inbox.failure.lock() = Some(Error::closed("receive"));
            inbox.arrived.notify_one();
        }
        self.publisher.flush(grace).await
    }
}
