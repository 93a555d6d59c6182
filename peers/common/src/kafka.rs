//! What a bare client does on Kafka beside the peer.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use anybroker_core::naming::{escape, shorten};
use anybroker_core::{Declared, Destination, Error, ErrorKind, Group, Result, Start, TopologySpec};
use parking_lot::Mutex;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaResult, RDKafkaErrorCode};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::failed;

/// How many partitions a topic gets.
pub const PARTITIONS: i32 = 3;
const LIMIT: Duration = Duration::from_secs(20);

/// The groups that this process has made, so that they are deleted with their topic.
static GROUPS: LazyLock<Mutex<HashMap<Destination, BTreeSet<Group>>>> = LazyLock::new(Mutex::default);

/// The servers of a URL.
#[must_use]
pub fn servers(url: &str) -> String {
    url.trim_start_matches("kafka://").to_owned()
}

/// Letters, digits, dots and dashes: an underscore is the mark.
fn token(name: &str) -> String {
    let escaped = escape(name, "_", |byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.');
    if escaped.len() <= 160 { escaped } else { shorten(&escaped, "_", 100, name) }
}

/// The topic of a destination.
#[must_use]
pub fn topic(destination: &Destination) -> String {
    format!("peers.{}", token(destination))
}

/// The consumer group of a group on a destination: Kafka's belong to no topic.
#[must_use]
pub fn group_id(destination: &Destination, group: &Group) -> String {
    format!("{}.{}", topic(destination), token(group))
}

/// The first and the next offset of each partition. The controller answers a creation before the partition's leader has taken it on,
/// and a leader that has not says so with an error that means "ask again": its clients do, and so does this.
fn ends(reader: &BaseConsumer, topic: &str) -> KafkaResult<Vec<(i64, i64)>> {
    let deadline = Instant::now() + LIMIT;
    let end = |partition| loop {
        match reader.fetch_watermarks(topic, partition, LIMIT) {
            Err(error) if is_not_yet_there(error.rdkafka_error_code()) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            answer => return answer,
        }
    };
    (0..PARTITIONS).map(end).collect()
}

fn is_not_yet_there(code: Option<RDKafkaErrorCode>) -> bool {
    use RDKafkaErrorCode::{
        LeaderNotAvailable, NotLeaderForPartition, UnknownPartition, UnknownTopic, UnknownTopicOrPartition,
    };
    let codes = [UnknownPartition, UnknownTopic, UnknownTopicOrPartition, LeaderNotAvailable, NotLeaderForPartition];
    code.is_some_and(|code| codes.contains(&code))
}

/// One administrator.
#[derive(Clone)]
pub struct Topology {
    config: ClientConfig,
    admin: Arc<AdminClient<DefaultClientContext>>,
}

impl Topology {
    /// To some servers.
    ///
    /// # Errors
    /// What the client says.
    pub fn new(servers: &str) -> Result<Self> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", servers);
        let admin = config.create().map_err(|error| failed(ErrorKind::Unavailable, "connect", error))?;
        Ok(Self { config, admin: Arc::new(admin) })
    }

    /// The client's calls that wait go to a thread of their own.
    async fn apart<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&Self) -> KafkaResult<T> + Send + 'static,
    ) -> Result<T> {
        let own = self.clone();
        match tokio::task::spawn_blocking(move || work(&own)).await {
            Ok(done) => done.map_err(|error| failed(ErrorKind::Unavailable, operation, error)),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    /// Whether the topic is there. All are asked for: a question for one may create it.
    async fn has_topic(&self, destination: &Destination) -> Result<bool> {
        let name = topic(destination);
        let found = move |own: &Self| {
            let all = own.admin.inner().fetch_metadata(None, LIMIT)?;
            Ok(all.topics().iter().any(|topic| topic.name() == name && !topic.partitions().is_empty()))
        };
        self.apart("topology", found).await
    }

    /// Creates the topic; whether it is new.
    async fn create_topic(&self, destination: &Destination) -> Result<bool> {
        let name = topic(destination);
        let new = NewTopic::new(&name, PARTITIONS, TopicReplication::Fixed(1));
        let options = AdminOptions::new().operation_timeout(Some(LIMIT));
        let made = self.admin.create_topics([&new], &options).await;
        let made = made.map_err(|error| failed(ErrorKind::Unavailable, "declare", error))?;
        let is_new = match made.into_iter().next() {
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => false,
            Some(Err((_, code))) => return Err(failed(ErrorKind::Unavailable, "declare", code)),
            _ => true,
        };
        // The peer is not to meet a topic that only the controller knows.
        self.apart("declare", move |own| ends(&own.config.create()?, &name)).await?;
        Ok(is_new)
    }

    fn reader(&self, group: &str) -> KafkaResult<BaseConsumer> {
        self.config.clone().set("group.id", group).set("enable.auto.commit", "false").create()
    }

    fn partitions(destination: &Destination) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            list.add_partition(&topic(destination), partition);
        }
        list
    }

    /// Whether the group has a place in the topic.
    async fn has_group(&self, destination: &Destination, group: &Group) -> Result<bool> {
        let (name, list) = (group_id(destination, group), Self::partitions(destination));
        let found = self.apart("topology", move |own| own.reader(&name)?.committed_offsets(list, LIMIT)).await?;
        Ok(found.elements().iter().any(|element| matches!(element.offset(), Offset::Offset(_))))
    }

    /// Commits where the group starts: Kafka knows a group by that.
    async fn create_group(&self, destination: &Destination, group: &Group, start: Start) -> Result<()> {
        GROUPS.lock().entry(destination.clone()).or_default().insert(group.clone());
        let (name, topic, mut list) = (group_id(destination, group), topic(destination), Self::partitions(destination));
        let commit = move |own: &Self| {
            let reader = own.reader(&name)?;
            for (partition, (first, next)) in (0..).zip(ends(&reader, &topic)?) {
                let at = if start == Start::Latest { next } else { first };
                list.set_partition_offset(&topic, partition, Offset::Offset(at))?;
            }
            reader.commit(&list, CommitMode::Sync)
        };
        self.apart("declare", commit).await
    }

    /// Creates what is missing of a topic and of a group's place in it.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let is_new = !self.has_topic(&spec.destination).await? && self.create_topic(&spec.destination).await?;
        let declared = if is_new { Declared::Created } else { Declared::Existed };
        match &spec.group {
            Some(group) if is_new || !self.has_group(&spec.destination, group).await? => {
                self.create_group(&spec.destination, group, spec.start).await?;
                Ok(Declared::Created)
            }
            _ => Ok(declared),
        }
    }

    /// Looks whether topic and group are there.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`.
    pub async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let missing = |what: &str| Err(Error::new(ErrorKind::NotFound, "verify", format!("there is no such {what}")));
        if !self.has_topic(&spec.destination).await? {
            return missing("topic");
        }
        match &spec.group {
            Some(group) if !self.has_group(&spec.destination, group).await? => missing("group"),
            _ => Ok(()),
        }
    }

    /// Deletes a topic with its groups, or one group.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`.
    pub async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.verify(&TopologySpec { group: group.cloned(), ..TopologySpec::destination(destination) }).await?;
        let options = AdminOptions::new().operation_timeout(Some(LIMIT));
        let unavailable = |error| failed(ErrorKind::Unavailable, "delete", error);
        let groups = match group {
            Some(group) => BTreeSet::from([group.clone()]),
            None => GROUPS.lock().remove(destination).unwrap_or_default(),
        };
        let names: Vec<String> = groups.iter().map(|group| group_id(destination, group)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        if group.is_none() {
            self.admin.delete_topics(&[&topic(destination)], &options).await.map_err(unavailable)?;
        }
        if !names.is_empty() {
            // One that has members stays: the topic is what matters.
            self.admin.delete_groups(&names, &options).await.map_err(unavailable)?;
        }
        Ok(())
    }
}
