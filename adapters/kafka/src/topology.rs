//! Topics and group offsets: created, verified, deleted.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Declared, Destination, Error, ErrorKind, Group, Result, TopologySpec};
use parking_lot::RwLock;
use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use rdkafka::config::FromClientConfig;
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::producer::Producer;
use tokio::time::Instant;

use crate::config::Settings;
use crate::error::{failed, kind};
use crate::groups;
use crate::login::Admins;
use crate::names;
use crate::publisher::{Found, Publisher, Route, Routes, unavailable};

/// How long a single request to the cluster may take.
pub(crate) const REQUEST: Duration = Duration::from_secs(10);

/// What is known of the cluster's topics, and how to change it.
pub(crate) struct Topology {
    settings: Settings,
    publisher: Arc<Publisher>,
    admins: Arc<Admins>,
    known: RwLock<HashMap<Destination, Route>>,
}

impl Topology {
    pub(crate) fn new(settings: &Settings, publisher: &Arc<Publisher>) -> Result<Self> {
        let admins = Admins::new(settings)?;
        Ok(Self { settings: settings.clone(), publisher: Arc::clone(publisher), admins, known: RwLock::default() })
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn publisher(&self) -> &Arc<Publisher> {
        &self.publisher
    }

    pub(crate) fn admins(&self) -> &Arc<Admins> {
        &self.admins
    }

    /// Where the messages of destinations go; looked up, and created where the configuration says so, the first time, and
    /// again when a topic did not take something.
    pub(crate) async fn route(&self, destinations: Vec<Destination>, deadline: Instant) -> Routes {
        let suspects = self.publisher.suspects();
        if !suspects.is_empty() {
            self.known.write().retain(|_, route| !suspects.contains(&*route.topic));
        }
        let mut routes = Vec::with_capacity(destinations.len());
        for destination in destinations {
            let known = self.known.read().get(&destination).cloned();
            let route = match known {
                Some(route) => Ok(route),
                None => self.find(&destination, deadline).await,
            };
            routes.push((destination, route));
        }
        Routes(routes)
    }

    async fn find(&self, destination: &Destination, deadline: Instant) -> Result<Route> {
        let topic = names::topic(destination);
        let looked_up = async {
            if self.settings.create_destinations {
                self.ensure(&topic, Shape::Destination, "publish").await?;
            } else {
                self.expect(&topic, "publish").await?;
            }
            Ok((topic.as_str().into(), self.taken(&topic).await))
        };
        let found: Result<(Arc<str>, _)> = match tokio::time::timeout_at(deadline, looked_up).await {
            Ok(found) => found.map_err(|error: Error| error.with_effect(anybroker_core::Effect::NotDone)),
            Err(_) => {
                let text = "the topic could not be looked up in time";
                return Err(Error::new(ErrorKind::Unavailable, "publish", text));
            }
        };
        let (topic, (largest, needs_key)) = found?;
        let route = Route { topic, line: self.publisher.line(largest)?, largest, needs_key };
        self.known.write().insert(destination.clone(), route.clone());
        Ok(route)
    }

    /// The largest batch that the topic takes, and whether it wants keys. Where the cluster does not tell (that needs
    /// DescribeConfigs), the broker refuses what does not fit.
    async fn taken(&self, topic: &str) -> (usize, bool) {
        let settings = crate::describe::configured(self, topic).await.unwrap_or_else(|error| {
            tracing::debug!(%error, topic, "what the topic takes is not known");
            Default::default()
        });
        let largest = settings.get("max.message.bytes").and_then(|bytes| bytes.parse().ok()).unwrap_or(usize::MAX);
        let needs_key = settings.get("cleanup.policy").is_some_and(|policy| policy.contains("compact"));
        (largest, needs_key)
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

    /// The topic's partitions; zero when it is missing.
    pub(crate) async fn partitions(&self, topic: &str) -> Result<i32> {
        match self.look_up(topic).await? {
            Found::Partitions { count, .. } => Ok(count),
            Found::Missing => Ok(0),
        }
    }

    async fn look_up(&self, topic: &str) -> Result<Found> {
        let (publisher, topic) = (Arc::clone(&self.publisher), topic.to_owned());
        tokio::task::spawn_blocking(move || publisher.look_up(&topic, REQUEST)).await.expect("looking up cannot panic")
    }

    /// Creates the topic where it is missing, and waits until its partitions have leaders.
    pub(crate) async fn ensure(&self, topic: &str, shape: Shape, operation: &'static str) -> Result<(Declared, i32)> {
        let mut declared = Declared::Existed;
        let deadline = Instant::now() + REQUEST;
        loop {
            match self.look_up(topic).await? {
                Found::Partitions { count, is_ready: true } => return Ok((declared, count)),
                Found::Partitions { .. } => {}
                Found::Missing if declared == Declared::Existed => {
                    declared = self.create(topic, shape, operation).await?;
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

    async fn create(&self, topic: &str, shape: Shape, operation: &'static str) -> Result<Declared> {
        let replication = TopicReplication::Fixed(self.settings.replication);
        let partitions = match shape {
            Shape::Destination => self.settings.partitions,
            Shape::Retries(partitions) => partitions,
            Shape::Letters => 1,
        };
        // A record of the group's own topics holds a message of the destination, and a note.
        let largest = self.settings.own_max_bytes().to_string();
        let retention = self.settings.dead_letter_retention.as_millis().to_string();
        let mut new = NewTopic::new(topic, partitions, replication);
        match shape {
            Shape::Destination => {}
            Shape::Retries(_) => {
                // What is settled is deleted up to the group's offset; nothing else may be.
                new = new.set("cleanup.policy", "delete").set("retention.ms", "-1").set("retention.bytes", "-1");
                new = new.set("max.message.bytes", &largest);
            }
            Shape::Letters => {
                new = new.set("cleanup.policy", "compact,delete").set("retention.ms", &retention);
                new = new.set("retention.bytes", "-1").set("max.message.bytes", &largest);
            }
        }
        let created = self
            .admins
            .client(topic)
            .await?
            .create_topics([&new], &options())
            .await
            .map_err(|error| failed(operation, &error))?;
        match created.into_iter().next() {
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => Ok(Declared::Existed),
            Some(Err((_, code))) => Err(Error::new(kind(code), operation, code.to_string()).with("topic", topic)),
            _ => Ok(Declared::Created),
        }
    }

    /// Creates what is missing of a group's own topics; answers the partitions of its retry topic.
    pub(crate) async fn ensure_own(
        &self,
        destination: &Destination,
        group: &Group,
        partitions: i32,
        operation: &'static str,
    ) -> Result<i32> {
        let retries = names::retries(destination, group);
        let (_, partitions) = self.ensure(&retries, Shape::Retries(partitions), operation).await?;
        self.ensure(&names::dead_letters(destination, group), Shape::Letters, operation).await?;
        Ok(partitions)
    }

    /// Answers the partitions of the group's retry topic; `NotFound` where one of its own topics is missing.
    pub(crate) async fn expect_own(
        &self,
        destination: &Destination,
        group: &Group,
        operation: &'static str,
    ) -> Result<i32> {
        let partitions = self.expect(&names::retries(destination, group), operation).await?;
        self.expect(&names::dead_letters(destination, group), operation).await?;
        Ok(partitions)
    }

    pub(crate) async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let topic = names::topic(&spec.destination);
        let (mut declared, partitions) = self.ensure(&topic, Shape::Destination, "declare").await?;
        if let Some(group) = &spec.group {
            self.ensure_own(&spec.destination, group, partitions, "declare").await?;
            self.settings.renew().await?;
            let (settings, group, start) = (self.settings.clone(), group.clone(), spec.start);
            let fixed = tokio::task::spawn_blocking(move || -> Result<bool> {
                let consumer: BaseConsumer = BaseConsumer::from_config(&settings.reader(&names::group(&topic, &group)))
                    .map_err(|error| failed("declare", &error))?;
                groups::fix_start(&consumer, &topic, partitions, start, "declare")
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
        self.expect_own(&spec.destination, group, "verify").await?;
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
        self.settings.renew().await?;
        let (settings, name) = (self.settings.clone(), group.clone());
        let committed = tokio::task::spawn_blocking(move || -> Result<bool> {
            let consumer: BaseConsumer = BaseConsumer::from_config(&settings.reader(&names::group(&topic, &name)))
                .map_err(|error| failed(operation, &error))?;
            let offsets = groups::committed(&consumer, &[(&topic, partitions)], operation)?;
            Ok(offsets.iter().any(Option::is_some))
        });
        if committed.await.expect("reading offsets cannot panic")? {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, operation, "the group has no offsets of this topic").with("group", group))
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        let mut found: Vec<Destination> =
            self.topics().await?.iter().filter_map(|topic| names::destination(topic)).collect();
        found.retain(|name| name.starts_with(prefix));
        found.sort();
        Ok(found)
    }

    pub(crate) async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let topic = names::topic(destination);
        let partitions = self.expect(&topic, "delete").await?;
        match group {
            Some(group) => self.delete_group(destination, topic, partitions, group).await,
            None => {
                let mut topics = self.own_topics(destination).await?;
                topics.push(topic);
                self.forget(destination);
                for topic in topics {
                    match self.delete_topic(&topic).await {
                        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                Ok(())
            }
        }
    }

    /// The own topics of all groups of a destination. Those whose names are too long to be told by them are found by the
    /// groups that the cluster knows.
    async fn own_topics(&self, destination: &Destination) -> Result<Vec<String>> {
        let nobody = Group::from_static("");
        let begins = [names::dead_letters(destination, &nobody), names::retries(destination, &nobody)];
        let existing = self.topics().await?;
        let groups = self.groups(destination).await?;
        let named: HashSet<String> = groups
            .iter()
            .flat_map(|group| [names::dead_letters(destination, group), names::retries(destination, group)])
            .collect();
        let is_own = |name: &String| named.contains(name) || begins.iter().any(|begin| name.starts_with(begin));
        Ok(existing.into_iter().filter(is_own).collect())
    }

    /// The groups of a destination that the cluster knows.
    pub(crate) async fn groups(&self, destination: &Destination) -> Result<Vec<Group>> {
        let publisher = Arc::clone(&self.publisher);
        let begin = format!("{}/", names::topic(destination));
        let listed = tokio::task::spawn_blocking(move || -> Result<Vec<Group>> {
            let client = publisher.client();
            let list = client.client().fetch_group_list(None, REQUEST).map_err(|error| unavailable(&error))?;
            let mut groups: Vec<Group> =
                list.groups().iter().filter_map(|group| group.name().strip_prefix(&begin).map(Group::from)).collect();
            groups.sort();
            Ok(groups)
        });
        listed.await.expect("listing groups cannot panic")
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
        let deleted = self.admins.client(&topic).await?.delete_groups(&[&id], &options()).await;
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
        for topic in [names::dead_letters(destination, group), names::retries(destination, group)] {
            match self.delete_topic(&topic).await {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    async fn topics(&self) -> Result<Vec<String>> {
        let client = self.publisher.client();
        let listed = tokio::task::spawn_blocking(move || -> Result<Vec<String>> {
            let metadata = client.client().fetch_metadata(None, REQUEST).map_err(|error| unavailable(&error))?;
            Ok(metadata.topics().iter().map(|topic| topic.name().to_owned()).collect())
        });
        listed.await.expect("listing topics cannot panic")
    }

    async fn delete_topic(&self, topic: &str) -> Result<()> {
        let deleted = self
            .admins
            .client(topic)
            .await?
            .delete_topics(&[topic], &options())
            .await
            .map_err(|error| failed("delete", &error))?;
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

/// What a topic is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Destination,
    /// The retry topic of a group, with as many partitions as its destination has.
    Retries(i32),
    /// The dead letters of a group.
    Letters,
}

pub(crate) fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(REQUEST)).operation_timeout(Some(REQUEST))
}
