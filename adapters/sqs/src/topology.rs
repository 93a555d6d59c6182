//! Destinations and groups: a queue with one group, or a topic with a queue for each group.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Declared, Description, Destination, Error, ErrorKind, Group, GroupDescription, Lag, Precision, Result, Start,
    TopologyMode, TopologySpec, naming,
};
use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use parking_lot::RwLock;
use tokio::time::Instant;

use crate::clients::Clients;
use crate::config::Settings;
use crate::names::{self, Names};
use crate::parcel::Route;
use crate::queues::{Attributes, Queues, figure};
use crate::topics::{self, Subscribed, Topics};

/// How long it is believed that a topic has groups. A topic without any would drop what is published.
const BELIEVED: Duration = Duration::from_secs(30);
/// The longest value of a tag.
const LONGEST_TAG: usize = 256;

/// Finds, creates, describes and deletes.
pub(crate) struct Topology {
    pub(crate) names: Names,
    pub(crate) queues: Queues,
    topics: Option<Topics>,
    creates: bool,
    known: RwLock<HashMap<Destination, (Route, Instant)>>,
}

/// The queues of a group.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    /// The URL of the one that it reads.
    pub(crate) queue: String,
    /// That of its dead letters.
    pub(crate) letters: String,
    /// That in which failed messages wait, in mode `fifo`.
    pub(crate) retry: Option<String>,
}

impl Topology {
    pub(crate) fn new(clients: &Clients, settings: &Settings) -> Self {
        Self {
            names: settings.names,
            queues: Queues::new(&clients.queues, settings.endpoint.as_ref()),
            topics: clients.topics.as_ref().map(|topics| Topics::new(topics, settings.topic_arn_prefix.as_ref())),
            creates: settings.create_destinations,
            known: RwLock::default(),
        }
    }

    /// Whether SNS answers, where it is used.
    pub(crate) async fn probe(&self) -> Result<()> {
        match &self.topics {
            Some(topics) => topics.probe().await,
            None => Ok(()),
        }
    }

    /// Where messages of a destination are sent to. A missing queue is created where the configuration says so; a
    /// missing topic is not, because without a group it would drop what it gets.
    pub(crate) async fn route(&self, destination: &Destination) -> Result<Route> {
        if let Some((route, since)) = self.known.read().get(destination)
            && (self.topics.is_none() || since.elapsed() < BELIEVED)
        {
            return Ok(route.clone());
        }
        let name = self.names.destination(destination);
        let route = match &self.topics {
            Some(topics) => {
                let arn = topics.expect(&name, "publish").await?;
                if topics.subscribed(&arn, "publish").await?.is_empty() {
                    let text = "no group exists, and SNS would drop the message; declare a group first";
                    return Err(Error::new(ErrorKind::NotFound, "publish", text));
                }
                Route::Topic(arn.into())
            }
            None if self.creates => Route::Queue(self.queues.ensure(&name, "publish").await?.0.into()),
            None => Route::Queue(self.queues.expect(&name, "publish").await?.into()),
        };
        self.known.write().insert(destination.clone(), (route.clone(), Instant::now()));
        Ok(route)
    }

    /// Forgets a destination that is gone.
    pub(crate) fn forget(&self, destination: &Destination) {
        self.known.write().remove(destination);
    }

    /// A group's queues, made ready.
    pub(crate) async fn prepare(
        &self,
        destination: &Destination,
        group: &Group,
        start: Start,
        mode: TopologyMode,
        operation: &'static str,
    ) -> Result<(Prepared, Declared)> {
        if mode == TopologyMode::Leave {
            return Ok((self.find(destination, group, operation).await?, Declared::Existed));
        }
        if mode == TopologyMode::Verify {
            let prepared = self.existing(destination, group, operation).await?;
            self.check_limits(&prepared, operation).await?;
            return Ok((prepared, Declared::Existed));
        }
        let name = self.names.queue(destination, group);
        let (queue, made) = self.queues.ensure(&name, operation).await?;
        let (letters, _) = self.queues.ensure(&self.names.dead_letters(destination, group), operation).await?;
        let retry = match self.names.is_fifo {
            true => Some(self.queues.ensure(&self.names.retry(destination, group), operation).await?.0),
            false => None,
        };
        let prepared = Prepared { queue, letters, retry };
        self.check_limits(&prepared, operation).await?;
        let is_new = match &self.topics {
            Some(topics) => self.connect(topics, destination, group, &prepared.queue, operation).await?,
            None => {
                let is_unowned = self.queues.owner(&prepared.queue, operation).await?.is_none();
                if start == Start::Latest && made == Declared::Existed && is_unowned {
                    let text =
                        "the queue may hold earlier messages, and SQS cannot pass over them; start at the earliest";
                    return Err(Error::unsupported(operation, text).with("destination", destination));
                }
                self.claim(&prepared.queue, group, operation).await?
            }
        };
        Ok((prepared, if is_new { Declared::Created } else { Declared::Existed }))
    }

    /// Subscribes a group's queue to the topic. Tells whether it was not before.
    async fn connect(
        &self,
        topics: &Topics,
        destination: &Destination,
        group: &Group,
        queue: &str,
        operation: &'static str,
    ) -> Result<bool> {
        let topic = topics.ensure(&self.names.destination(destination), operation).await?;
        let attributes = self.queues.attributes(queue, operation).await?;
        let arn = arn(&attributes, operation)?;
        if let Some(found) = self.subscription(topics, &topic, arn, operation).await? {
            topics.expect_raw(&found.arn, operation).await?;
            return Ok(false);
        }
        self.queues.tag(queue, &tag(group), operation).await?;
        if attributes.get(&Attribute::Policy).is_none_or(String::is_empty) {
            self.queues.set(queue, Attribute::Policy, &topics::policy(&topic, arn), operation).await?;
        }
        topics.subscribe(&topic, arn, operation).await?;
        Ok(true)
    }

    async fn subscription(
        &self,
        topics: &Topics,
        topic: &str,
        queue_arn: &str,
        operation: &'static str,
    ) -> Result<Option<Subscribed>> {
        let found = topics.subscribed(topic, operation).await?;
        Ok(found.into_iter().find(|subscribed| subscribed.queue_arn == queue_arn))
    }

    /// Makes a queue the group's. Tells whether it was nobody's before.
    async fn claim(&self, url: &str, group: &Group, operation: &'static str) -> Result<bool> {
        let name = tag(group);
        let is_new = match self.queues.owner(url, operation).await? {
            Some(owner) => return if owner == name { Ok(false) } else { Err(taken(group, operation)) },
            None => {
                self.queues.tag(url, &name, operation).await?;
                true
            }
        };
        // Two may claim it at once; the one whose tag stayed has it.
        if self.queues.owner(url, operation).await?.is_some_and(|owner| owner != name) {
            return Err(taken(group, operation));
        }
        Ok(is_new)
    }

    /// The URLs of a group's queues; `NotFound` when one is missing.
    async fn find(&self, destination: &Destination, group: &Group, operation: &'static str) -> Result<Prepared> {
        let queue = self.queues.expect(&self.names.queue(destination, group), operation).await?;
        let letters = self.queues.expect(&self.names.dead_letters(destination, group), operation).await?;
        let retry = match self.names.is_fifo {
            true => Some(self.queues.expect(&self.names.retry(destination, group), operation).await?),
            false => None,
        };
        Ok(Prepared { queue, letters, retry })
    }

    /// As [`find`](Self::find); `NotFound` also when they are not the group's.
    pub(crate) async fn existing(
        &self,
        destination: &Destination,
        group: &Group,
        operation: &'static str,
    ) -> Result<Prepared> {
        let named = |error: Error| error.with("destination", destination).with("group", group);
        let prepared = self.find(destination, group, operation).await.map_err(named)?;
        match &self.topics {
            Some(topics) => {
                let topic = topics.expect(&self.names.destination(destination), operation).await.map_err(named)?;
                let attributes = self.queues.attributes(&prepared.queue, operation).await?;
                let found = self.subscription(topics, &topic, arn(&attributes, operation)?, operation).await?;
                let missing = || Error::new(ErrorKind::NotFound, operation, "the group's queue is not subscribed");
                topics.expect_raw(&found.ok_or_else(|| named(missing()))?.arn, operation).await?;
            }
            None => match self.queues.owner(&prepared.queue, operation).await? {
                Some(owner) if owner == tag(group) => {}
                _ => return Err(named(Error::new(ErrorKind::NotFound, operation, "the queue is not this group's"))),
            },
        }
        Ok(prepared)
    }

    /// SQS's own redrive policy counts hand-overs, of which not every one is a failure: it would bury what the
    /// subscription still owns, and a letter that is read too often. So none of a group's queues may have one.
    async fn check_limits(&self, prepared: &Prepared, operation: &'static str) -> Result<()> {
        for url in [Some(&prepared.queue), Some(&prepared.letters), prepared.retry.as_ref()].into_iter().flatten() {
            let attributes = self.queues.attributes(url, operation).await?;
            if let Some(policy) = attributes.get(&Attribute::RedrivePolicy).filter(|policy| !policy.is_empty()) {
                let text = "the queue has a redrive policy of SQS, which would bury messages that the subscription's \
                            max_attempts still owns; remove it (set RedrivePolicy to an empty text)";
                let error = Error::new(ErrorKind::AlreadyExists, operation, text);
                return Err(error.with("queue", url).with("redrive_policy", policy));
            }
        }
        Ok(())
    }

    pub(crate) async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let name = self.names.destination(&spec.destination);
        match (&spec.group, &self.topics) {
            (Some(group), _) => {
                let mode = TopologyMode::Declare;
                Ok(self.prepare(&spec.destination, group, spec.start, mode, "declare").await?.1)
            }
            (None, Some(topics)) => match topics.expect(&name, "declare").await {
                Ok(_) => Ok(Declared::Existed),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    topics.ensure(&name, "declare").await.map(|_| Declared::Created)
                }
                Err(error) => Err(error),
            },
            (None, None) => Ok(self.queues.ensure(&name, "declare").await?.1),
        }
    }

    pub(crate) async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let name = self.names.destination(&spec.destination);
        match (&spec.group, &self.topics) {
            (Some(group), _) => {
                let mode = TopologyMode::Verify;
                self.prepare(&spec.destination, group, spec.start, mode, "verify").await.map(|_| ())
            }
            (None, Some(topics)) => topics.expect(&name, "verify").await.map(|_| ()),
            (None, None) => self.queues.expect(&name, "verify").await.map(|_| ()),
        }
    }

    pub(crate) async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let name = self.names.destination(destination);
        let Some(topics) = &self.topics else {
            let url = self.queues.expect(&name, "delete").await?;
            let owner = self.queues.owner(&url, "delete").await?;
            if let Some(group) = group
                && owner.as_ref() != Some(&tag(group))
            {
                let text = "the queue is not this group's";
                return Err(Error::new(ErrorKind::NotFound, "delete", text).with("group", group));
            }
            // Without topics the names do not depend on the group.
            let any = Group::from("");
            self.queues.delete(&self.names.dead_letters(destination, &any)).await?;
            if self.names.is_fifo {
                self.queues.delete(&self.names.retry(destination, &any)).await?;
            }
            if group.is_some() {
                return self.queues.untag(&url, "delete").await;
            }
            self.forget(destination);
            return self.queues.delete(&name).await;
        };
        let topic = topics.expect(&name, "delete").await?;
        self.forget(destination);
        let wanted = group.map(|group| self.names.queue(destination, group));
        let mut deleted = 0;
        for subscribed in topics.subscribed(&topic, "delete").await? {
            let queue = subscribed.queue_name();
            let Some((_, found)) = self.group_of(queue).await? else { continue };
            if wanted.as_ref().is_none_or(|wanted| wanted == queue) {
                self.queues.delete(&self.names.dead_letters(destination, &found)).await?;
                if self.names.is_fifo {
                    self.queues.delete(&self.names.retry(destination, &found)).await?;
                }
                self.queues.delete(queue).await?;
                topics.unsubscribe(&subscribed.arn).await?;
                deleted += 1;
            }
        }
        match group {
            Some(group) if deleted == 0 => {
                Err(Error::new(ErrorKind::NotFound, "delete", "there is no such group").with("group", group))
            }
            Some(_) => Ok(()),
            None => topics.delete(&topic).await,
        }
    }

    /// The URL of a subscribed queue and the group whose it is; `None` for a stranger's.
    async fn group_of(&self, queue: &str) -> Result<Option<(String, Group)>> {
        let Some(url) = self.queues.find(queue, "describe").await? else { return Ok(None) };
        let owner = self.queues.owner(&url, "describe").await?;
        Ok(owner.map(|owner| (url, Group::from(names::unescaped(&owner).unwrap_or(owner)))))
    }

    pub(crate) async fn describe(&self, destination: &Destination) -> Result<Description> {
        let physical = self.names.destination(destination);
        let mut groups = Vec::new();
        let (settings, messages) = match &self.topics {
            Some(topics) => {
                let topic = topics.expect(&physical, "describe").await?;
                for subscribed in topics.subscribed(&topic, "describe").await? {
                    if let Some((url, group)) = self.group_of(subscribed.queue_name()).await? {
                        groups.push(self.describe_group(destination, group, &url).await?);
                    }
                }
                (BTreeMap::from([("TopicArn".to_owned(), topic)]), None)
            }
            None => {
                let url = self.queues.expect(&physical, "describe").await?;
                let attributes = self.queues.attributes(&url, "describe").await?;
                if let Some((url, group)) = self.group_of(&physical).await? {
                    groups.push(self.describe_group(destination, group, &url).await?);
                }
                let messages = lag_of(&attributes, None).total();
                (attributes.into_iter().map(|(name, value)| (name.as_str().to_owned(), value)).collect(), messages)
            }
        };
        Ok(Description { destination: destination.clone(), physical, groups, messages, settings })
    }

    async fn describe_group(&self, destination: &Destination, group: Group, url: &str) -> Result<GroupDescription> {
        let dead_letters = self.names.dead_letters(destination, &group);
        let dead_letter_count = match self.queues.find(&dead_letters, "describe").await? {
            Some(letters) => lag_of(&self.queues.attributes(&letters, "describe").await?, None).total(),
            None => None,
        };
        let physical = self.names.queue(destination, &group);
        let lag = self.measure(destination, &group, url).await?;
        Ok(GroupDescription { group, physical, dead_letters, dead_letter_count, lag })
    }

    pub(crate) async fn lag(&self, destination: &Destination, group: &Group) -> Result<(Arc<str>, Lag)> {
        let prepared = self.existing(destination, group, "lag").await?;
        let lag = self.measure(destination, group, &prepared.queue).await?;
        Ok((prepared.queue.into(), lag))
    }

    async fn measure(&self, destination: &Destination, group: &Group, url: &str) -> Result<Lag> {
        let attributes = self.queues.attributes(url, "lag").await?;
        let retry = match self.names.is_fifo {
            true => self.queues.find(&self.names.retry(destination, group), "lag").await?,
            false => None,
        };
        let waiting = match retry {
            Some(retry) => Some(self.queues.attributes(&retry, "lag").await?),
            None => None,
        };
        Ok(lag_of(&attributes, waiting.as_ref()))
    }
}

impl Subscribed {
    fn queue_name(&self) -> &str {
        self.queue_arn.rsplit(':').next().unwrap_or_default()
    }
}

/// SQS's own figures; what waits in the retry queue is delayed, wherever it stands there.
fn lag_of(attributes: &Attributes, waiting: Option<&Attributes>) -> Lag {
    let of = |name: Attribute| figure(attributes, &name);
    let all = |waiting: &Attributes| {
        figure(waiting, &Attribute::ApproximateNumberOfMessages)
            + figure(waiting, &Attribute::ApproximateNumberOfMessagesNotVisible)
            + figure(waiting, &Attribute::ApproximateNumberOfMessagesDelayed)
    };
    let delayed = of(Attribute::ApproximateNumberOfMessagesDelayed) + waiting.map_or(0, all);
    Lag {
        ready: Some((of(Attribute::ApproximateNumberOfMessages), Precision::Approximate)),
        in_flight: Some((of(Attribute::ApproximateNumberOfMessagesNotVisible), Precision::Approximate)),
        delayed: Some((delayed, Precision::Approximate)),
        ..Lag::default()
    }
}

/// A group as the value of a tag.
fn tag(group: &Group) -> String {
    let name = names::escaped(group);
    match name.len() <= LONGEST_TAG {
        true => name,
        // `h` is no hexadecimal digit: no escaped name looks like this.
        false => naming::shorten(&name, "_", LONGEST_TAG - 34, &name),
    }
}

fn arn<'a>(attributes: &'a Attributes, operation: &'static str) -> Result<&'a String> {
    let missing = || Error::new(ErrorKind::Unexpected, operation, "the queue's attributes lack its ARN");
    attributes.get(&Attribute::QueueArn).ok_or_else(missing)
}

fn taken(group: &Group, operation: &'static str) -> Error {
    let text = "the queue belongs to another group; several groups need topics: fanout = \"sns\"";
    Error::unsupported(operation, text).with("group", group)
}
