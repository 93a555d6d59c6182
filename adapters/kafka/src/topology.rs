//! Topics and group offsets: created, verified, deleted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Declared, Destination, Error, ErrorKind, Group, Result, Start, TopologySpec};
use parking_lot::RwLock;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::FromClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};
use tokio::time::Instant;

use crate::config::Settings;
use crate::error::{failed, kind};
use crate::names;
use crate::publisher::{Found, Publisher, Routes, unavailable};

/// How long a single request to the cluster may take.
const REQUEST: Duration = Duration::from_secs(10);

/// What is known of the cluster's topics, and how to change it.
pub(crate) struct Topology {
    settings: Settings,
    publisher: Arc<Publisher>,
    admin: AdminClient<DefaultClientContext>,
    known: RwLock<HashMap<Destination, Arc<str>>>,
}

impl Topology {
    pub(crate) fn new(settings: &Settings, publisher: &Arc<Publisher>) -> Result<Self> {
        let admin = AdminClient::from_config(&settings.admin()).map_err(|error| failed("connect", &error))?;
        Ok(Self { settings: settings.clone(), publisher: Arc::clone(publisher), admin, known: RwLock::default() })
    }

    /// The topics of destinations that are published to; looked up, and created where the configuration says so, the
    /// first time.
    pub(crate) async fn route(&self, destinations: Vec<Destination>, deadline: Instant) -> Routes {
        let mut routes = Vec::with_capacity(destinations.len());
        for destination in destinations {
            let known = self.known.read().get(&destination).cloned();
            let topic = match known {
                Some(topic) => Ok(topic),
                None => self.find(&destination, deadline).await,
            };
            routes.push((destination, topic));
        }
        Routes(routes)
    }

    async fn find(&self, destination: &Destination, deadline: Instant) -> Result<Arc<str>> {
        let topic = names::topic(destination);
        let looked_up = async {
            if self.settings.create_destinations {
                self.ensure(&topic, "publish").await.map(|_| ())
            } else {
                self.expect(&topic, "publish").await.map(|_| ())
            }
        };
        match tokio::time::timeout_at(deadline, looked_up).await {
            Ok(found) => found.map_err(|error| error.with_effect(anybroker_core::Effect::NotDone))?,
            Err(_) => {
                let text = "the topic could not be looked up in time";
                return Err(Error::new(ErrorKind::Unavailable, "publish", text));
            }
        }
        let topic: Arc<str> = topic.into();
        self.known.write().insert(destination.clone(), Arc::clone(&topic));
        Ok(topic)
    }

    /// Forgets a topic that is gone.
    pub(crate) fn forget(&self, destination: &Destination) {
        self.known.write().remove(destination);
    }

    /// The topic's partitions; `NotFound` when it is missing.
    pub(crate) async fn expect(&self, topic: &str, operation: &'static str) -> Result<i32> {
        match self.look_up(topic).await? {
            Found::Partitions { count, .. } => Ok(count),
            Found::Missing => {
                Err(Error::new(ErrorKind::NotFound, operation, "there is no such topic").with("topic", topic))
            }
        }
    }

    async fn look_up(&self, topic: &str) -> Result<Found> {
        let (publisher, topic) = (Arc::clone(&self.publisher), topic.to_owned());
        tokio::task::spawn_blocking(move || publisher.look_up(&topic, REQUEST)).await.expect("looking up cannot panic")
    }

    /// Creates the topic where it is missing, and waits until its partitions have leaders.
    pub(crate) async fn ensure(&self, topic: &str, operation: &'static str) -> Result<(Declared, i32)> {
        let mut declared = Declared::Existed;
        let deadline = Instant::now() + REQUEST;
        loop {
            match self.look_up(topic).await? {
                Found::Partitions { count, is_ready: true } => return Ok((declared, count)),
                Found::Partitions { .. } => {}
                Found::Missing if declared == Declared::Existed => {
                    declared = self.create(topic, operation).await?;
                    continue;
                }
                Found::Missing => {}
            }
            if Instant::now() >= deadline {
                let text = "the topic was created and has no leaders yet";
                return Err(Error::new(ErrorKind::Unavailable, operation, text).with("topic", topic));
            }
            // Leaders are elected within some milliseconds; there is no event for it.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn create(&self, topic: &str, operation: &'static str) -> Result<Declared> {
        let replication = TopicReplication::Fixed(self.settings.replication);
        let new = NewTopic::new(topic, self.settings.partitions, replication);
        let created = self.admin.create_topics([&new], &options()).await.map_err(|error| failed(operation, &error))?;
        match created.into_iter().next() {
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => Ok(Declared::Existed),
            Some(Err((_, code))) => Err(Error::new(kind(code), operation, code.to_string()).with("topic", topic)),
            _ => Ok(Declared::Created),
        }
    }

    pub(crate) async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let topic = names::topic(&spec.destination);
        let (mut declared, partitions) = self.ensure(&topic, "declare").await?;
        if let Some(group) = &spec.group {
            self.ensure(&names::dead_letters(&spec.destination, group), "declare").await?;
            let (settings, group, start) = (self.settings.clone(), group.clone(), spec.start);
            let fixed = tokio::task::spawn_blocking(move || -> Result<bool> {
                let consumer: BaseConsumer =
                    BaseConsumer::from_config(&settings.consumer(&names::group(&topic, &group)))
                        .map_err(|error| failed("declare", &error))?;
                fix_start(&consumer, &topic, partitions, start, "declare")
            });
            if fixed.await.expect("fixing the start cannot panic")? {
                declared = Declared::Created;
            }
        }
        Ok(declared)
    }

    pub(crate) async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let topic = names::topic(&spec.destination);
        let partitions = self.expect(&topic, "verify").await?;
        let Some(group) = &spec.group else { return Ok(()) };
        self.expect_group(topic, partitions, group, "verify").await
    }

    /// `NotFound` when the group has no offsets of the topic.
    pub(crate) async fn expect_group(
        &self,
        topic: String,
        partitions: i32,
        group: &Group,
        operation: &'static str,
    ) -> Result<()> {
        let (settings, name) = (self.settings.clone(), group.clone());
        let committed = tokio::task::spawn_blocking(move || -> Result<bool> {
            let consumer: BaseConsumer = BaseConsumer::from_config(&settings.consumer(&names::group(&topic, &name)))
                .map_err(|error| failed(operation, &error))?;
            let offsets = committed(&consumer, &topic, partitions, operation)?;
            Ok(offsets.iter().any(Option::is_some))
        });
        if committed.await.expect("reading offsets cannot panic")? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, operation, "the group has no offsets of this topic").with("group", group))
    }

    pub(crate) async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let topic = names::topic(destination);
        let partitions = self.expect(&topic, "delete").await?;
        match group {
            Some(group) => self.delete_group(destination, topic, partitions, group).await,
            None => {
                let letters = names::dead_letters(destination, &Group::from_static(""));
                let mut topics: Vec<String> =
                    self.topics().await?.into_iter().filter(|name| name.starts_with(&letters)).collect();
                topics.push(topic);
                self.forget(destination);
                for topic in topics {
                    self.delete_topic(&topic).await?;
                }
                Ok(())
            }
        }
    }

    async fn delete_group(
        &self,
        destination: &Destination,
        topic: String,
        partitions: i32,
        group: &Group,
    ) -> Result<()> {
        self.expect_group(topic.clone(), partitions, group, "delete").await?;
        let id = names::group(&topic, group);
        let deleted = self.admin.delete_groups(&[&id], &options()).await;
        match deleted.map_err(|error| failed("delete", &error))?.into_iter().next() {
            Some(Err((_, RDKafkaErrorCode::NonEmptyGroup))) => {
                let text = "the group has members; close its subscriptions first";
                return Err(Error::new(ErrorKind::Unavailable, "delete", text).with("group", group));
            }
            Some(Err((_, code))) => {
                return Err(Error::new(kind(code), "delete", code.to_string()).with("group", group));
            }
            _ => {}
        }
        match self.delete_topic(&names::dead_letters(destination, group)).await {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    async fn topics(&self) -> Result<Vec<String>> {
        let client = Arc::clone(self.publisher.client());
        let listed = tokio::task::spawn_blocking(move || -> Result<Vec<String>> {
            use rdkafka::producer::Producer;
            let metadata = client.client().fetch_metadata(None, REQUEST).map_err(|error| unavailable(&error))?;
            Ok(metadata.topics().iter().map(|topic| topic.name().to_owned()).collect())
        });
        listed.await.expect("listing topics cannot panic")
    }

    async fn delete_topic(&self, topic: &str) -> Result<()> {
        let deleted = self.admin.delete_topics(&[topic], &options()).await.map_err(|error| failed("delete", &error))?;
        if let Some(Err((_, code))) = deleted.into_iter().next() {
            return Err(Error::new(kind(code), "delete", code.to_string()).with("topic", topic));
        }
        // Brokers and this client forget it a moment later: gone means gone.
        let deadline = Instant::now() + REQUEST;
        while Instant::now() < deadline && !matches!(self.look_up(topic).await?, Found::Missing) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(REQUEST)).operation_timeout(Some(REQUEST))
}

/// The committed offset of each partition. Blocks.
pub(crate) fn committed<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: i32,
    operation: &'static str,
) -> Result<Vec<Option<i64>>> {
    let mut asked = TopicPartitionList::with_capacity(partitions.unsigned_abs() as usize);
    for partition in 0..partitions {
        asked.add_partition(topic, partition);
    }
    // The first group of a cluster waits for the offsets topic to be made.
    let deadline = std::time::Instant::now() + REQUEST;
    let offsets = loop {
        match consumer.committed_offsets(asked.clone(), REQUEST) {
            Ok(offsets) => break offsets,
            Err(error) => {
                let error = failed(operation, &error);
                let is_transient = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout);
                if !is_transient || std::time::Instant::now() >= deadline {
                    return Err(error);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    };
    Ok(offsets
        .elements()
        .iter()
        .map(|element| match element.offset() {
            Offset::Offset(offset) => Some(offset),
            _ => None,
        })
        .collect())
}

/// Commits where a new group starts, so that everything published from now on belongs to it whoever joins first. One
/// that has offsets already goes on where it was. Tells whether it was new. Blocks.
pub(crate) fn fix_start<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partitions: i32,
    start: Start,
    operation: &'static str,
) -> Result<bool> {
    let present = committed(consumer, topic, partitions, operation)?;
    if present.iter().any(Option::is_some) {
        return Ok(false);
    }
    let mut offsets = TopicPartitionList::new();
    for partition in 0..partitions {
        let (low, high) =
            consumer.fetch_watermarks(topic, partition, REQUEST).map_err(|error| failed(operation, &error))?;
        let offset = if start == Start::Latest { high } else { low };
        offsets
            .add_partition_offset(topic, partition, Offset::Offset(offset))
            .map_err(|error| failed(operation, &error))?;
    }
    match consumer.commit(&offsets, CommitMode::Sync) {
        Ok(()) => Ok(true),
        // Refused because somebody of the group is reading already: then its start is fixed.
        Err(error) => match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::UnknownMemberId | RDKafkaErrorCode::IllegalGeneration) => Ok(false),
            _ => Err(failed(operation, &error)),
        },
    }
}
