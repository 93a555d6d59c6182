//! Streams and consumers: created, verified, described, deleted.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Declared, Description, Destination, Effect, Error, ErrorKind, Group, GroupDescription, Lag, Precision, Result,
    Start, Timestamp, TopologySpec,
};
use async_nats::Subject;
use parking_lot::RwLock;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::api::{Api, ConsumerInfo, StreamInfo};
use crate::config::Settings;
use crate::error::{CONSUMER_NOT_FOUND, STREAM_EXISTS, STREAM_NOT_FOUND};
use crate::names::Names;

/// The logical name, in the metadata of streams and consumers.
const NAME: &str = "anybroker-name";
/// The lease of a group that is declared before anybody subscribes.
const LEASE: Duration = Duration::from_secs(30);

/// Where messages of a destination are published to.
pub(crate) struct Route {
    pub(crate) subject: Subject,
}

/// What is known of the server's streams, and how to change it.
pub(crate) struct Topology {
    pub(crate) api: Api,
    pub(crate) names: Names,
    settings: Settings,
    /// Whether streams are made for scheduled messages.
    schedules: bool,
    known: RwLock<HashMap<Destination, Arc<Route>>>,
}

impl Topology {
    pub(crate) fn new(api: Api, settings: &Settings, schedules: bool) -> Self {
        let (names, settings, known) = (Names::new(&settings.prefix), settings.clone(), RwLock::default());
        Self { api, names, settings, schedules, known }
    }

    /// Where to publish; looked up, and created where the configuration says so, the first time.
    pub(crate) async fn route(&self, destination: &Destination, deadline: Instant) -> Result<Arc<Route>> {
        if let Some(route) = self.known.read().get(destination) {
            return Ok(Arc::clone(route));
        }
        self.api.passed(deadline).await?;
        let looked_up = async {
            if self.settings.create_destinations {
                self.ensure(destination, "publish").await.map(drop)
            } else {
                self.expect(destination, "publish").await.map(drop)
            }
        };
        match tokio::time::timeout_at(deadline, looked_up).await {
            Ok(found) => found.map_err(|error| error.with_effect(Effect::NotDone))?,
            Err(_) => {
                let text = "the stream could not be looked up in time";
                return Err(Error::new(ErrorKind::Unavailable, "publish", text).with_effect(Effect::NotDone));
            }
        }
        let route = Arc::new(Route { subject: Subject::from(self.names.subject(destination)) });
        self.known.write().insert(destination.clone(), Arc::clone(&route));
        Ok(route)
    }

    /// Why nobody took a message: the stream is gone, or JetStream is.
    pub(crate) async fn unserved(&self, destination: &Destination) -> Error {
        match self.expect(destination, "publish").await {
            Ok(_) => Error::new(ErrorKind::Unavailable, "publish", "JetStream did not serve the stream at that moment"),
            Err(error) => {
                if error.kind() == ErrorKind::NotFound {
                    self.known.write().remove(destination);
                }
                error
            }
        }
        .with_effect(Effect::NotDone)
    }

    /// The destination's stream; `NotFound` when it is missing.
    pub(crate) async fn expect(&self, destination: &Destination, operation: &'static str) -> Result<StreamInfo> {
        let name = self.names.stream(destination);
        self.api.stream(operation, &name).await?.ok_or_else(|| missing(operation, destination, None))
    }

    /// The group's consumer; `NotFound` when it or its destination is missing.
    pub(crate) async fn expect_group(
        &self,
        destination: &Destination,
        group: &Group,
        operation: &'static str,
    ) -> Result<ConsumerInfo> {
        let (stream, consumer) = (self.names.stream(destination), Names::consumer(group));
        let found = self.api.consumer(operation, &stream, &consumer).await?;
        found.ok_or_else(|| missing(operation, destination, Some(group)))
    }

    /// Creates the destination where it is missing.
    pub(crate) async fn ensure(&self, destination: &Destination, operation: &'static str) -> Result<Declared> {
        let settings = &self.settings;
        let mut window = settings.dedup_window;
        if !settings.max_age.is_zero() {
            window = window.min(settings.max_age);
        }
        let mut config = json!({
            "name": self.names.stream(destination),
            "subjects": [self.names.subjects(destination)],
            "retention": "limits",
            "storage": "file",
            "num_replicas": settings.replicas,
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": if settings.max_bytes == 0 { -1 } else { settings.max_bytes },
            "max_age": nanos(settings.max_age),
            "max_msg_size": -1,
            // What is full refuses; the default drops the oldest, whether somebody has read it or not. Without a bound
            // there is nothing to drop, and the server wants the default for scheduled messages.
            "discard": if self.schedules { "old" } else { "new" },
            "duplicate_window": nanos(window),
            "allow_direct": true,
            "metadata": { NAME: destination },
        });
        if self.schedules {
            config["allow_msg_schedules"] = json!(true);
        }
        self.ensure_stream(config, operation).await.map_err(|error| error.with("destination", destination))
    }

    async fn ensure_records(&self, destination: &Destination, group: &Group, operation: &'static str) -> Result<()> {
        let config = json!({
            "name": self.names.records(destination, group),
            "subjects": [format!("{}.>", self.names.record(destination, group))],
            "retention": "limits",
            "storage": "file",
            "num_replicas": self.settings.replicas,
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_age": 0,
            "max_msg_size": -1,
            // One record for each message: a second copy of a dead letter takes the place of the first.
            "max_msgs_per_subject": 1,
            "discard": "old",
            "metadata": { NAME: destination, "anybroker-group": group },
        });
        self.ensure_stream(config, operation).await.map(drop).map_err(|error| error.with("group", group))
    }

    async fn ensure_stream(&self, config: Value, operation: &'static str) -> Result<Declared> {
        let name = config["name"].as_str().unwrap_or_default().to_owned();
        if let Some(found) = self.api.stream(operation, &name).await? {
            return same(&found, &config, operation);
        }
        match self.api.ask::<Value>(operation, &format!("STREAM.CREATE.{name}"), &config).await? {
            Ok(_) => Ok(Declared::Created),
            // Somebody with other settings was quicker.
            Err(error) if error.is(STREAM_EXISTS) => match self.api.stream(operation, &name).await? {
                Some(found) => same(&found, &config, operation),
                None => Err(error.into_error(operation)),
            },
            Err(error) => Err(error.into_error(operation)),
        }
    }

    /// Creates what a group needs where it is missing. An existing consumer's ack wait is only ever shortened: members
    /// that lease for longer renew in time.
    pub(crate) async fn ensure_group(
        &self,
        destination: &Destination,
        group: &Group,
        start: Start,
        ack_wait: Duration,
        operation: &'static str,
    ) -> Result<(Declared, ConsumerInfo)> {
        self.ensure(destination, operation).await?;
        self.ensure_records(destination, group, operation).await?;
        let (stream, name) = (self.names.stream(destination), Names::consumer(group));
        if let Some(found) = self.api.consumer(operation, &stream, &name).await? {
            return Ok((Declared::Existed, self.shorten(&stream, found, ack_wait, operation).await?));
        }
        let mut config = json!({
            "name": name,
            "durable_name": name,
            "ack_policy": "explicit",
            "ack_wait": nanos(ack_wait),
            // The server never buries: what becomes of a message is the retry policy's to say.
            "max_deliver": -1,
            // By default 1,000 for the whole group: so many delayed ones would stop all others.
            "max_ack_pending": -1,
            "replay_policy": "instant",
            "filter_subjects": [self.names.subject(destination), self.names.back(destination, group)],
            "metadata": { NAME: group },
        });
        match start {
            Start::Latest => config["deliver_policy"] = json!("new"),
            Start::Time(time) => {
                config["deliver_policy"] = json!("by_start_time");
                config["opt_start_time"] = json!(time.to_string());
            }
            Start::Position(position) => {
                config["deliver_policy"] = json!("by_start_sequence");
                config["opt_start_seq"] = json!(position.major.max(1));
            }
            _ => config["deliver_policy"] = json!("all"),
        }
        let body = json!({ "stream_name": stream, "config": config, "action": "create" });
        match self.api.ask(operation, &format!("CONSUMER.CREATE.{stream}.{name}"), &body).await? {
            Ok(created) => Ok((Declared::Created, created)),
            Err(error) => match self.api.consumer(operation, &stream, &name).await? {
                // Another member was quicker.
                Some(found) => Ok((Declared::Existed, self.shorten(&stream, found, ack_wait, operation).await?)),
                None => Err(error.into_error(operation).with("group", group)),
            },
        }
    }

    async fn shorten(
        &self,
        stream: &str,
        found: ConsumerInfo,
        ack_wait: Duration,
        operation: &'static str,
    ) -> Result<ConsumerInfo> {
        if found.ack_wait() <= ack_wait {
            return Ok(found);
        }
        let mut config = found.config.clone();
        config["ack_wait"] = json!(nanos(ack_wait));
        let body = json!({ "stream_name": stream, "config": config, "action": "update" });
        self.api.call(operation, &format!("CONSUMER.CREATE.{stream}.{}", found.name), &body).await
    }

    pub(crate) async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        match &spec.group {
            None => self.ensure(&spec.destination, "declare").await,
            Some(group) => {
                let ensured =
                    self.ensure_group(&spec.destination, group, spec.start, ack_wait(LEASE), "declare").await?;
                Ok(ensured.0)
            }
        }
    }

    pub(crate) async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        self.expect(&spec.destination, "verify").await?;
        if let Some(group) = &spec.group {
            self.expect_group(&spec.destination, group, "verify").await?;
        }
        Ok(())
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        let streams = self.api.streams_of("list", &self.names.all_subjects()).await?;
        let mut found: Vec<Destination> = streams.iter().filter_map(|stream| self.names.destination(stream)).collect();
        found.retain(|name| name.starts_with(prefix));
        found.sort();
        Ok(found)
    }

    pub(crate) async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let stream = self.names.stream(destination);
        let Some(group) = group else {
            self.expect(destination, "delete").await?;
            self.known.write().remove(destination);
            for records in self.api.streams_of("delete", &self.names.all_records(destination)).await? {
                self.delete_stream(&records).await?;
            }
            return match self.delete_stream(&stream).await? {
                true => Ok(()),
                false => Err(missing("delete", destination, None)),
            };
        };
        let subject = format!("CONSUMER.DELETE.{stream}.{}", Names::consumer(group));
        match self.api.ask::<Value>("delete", &subject, &Value::Null).await? {
            Ok(_) => {}
            Err(error) if error.is(CONSUMER_NOT_FOUND) || error.is(STREAM_NOT_FOUND) => {
                return Err(missing("delete", destination, Some(group)));
            }
            Err(error) => return Err(error.into_error("delete")),
        }
        self.delete_stream(&self.names.records(destination, group)).await.map(drop)
    }

    async fn delete_stream(&self, name: &str) -> Result<bool> {
        let asked = self.api.ask::<Value>("delete", &format!("STREAM.DELETE.{name}"), &Value::Null).await;
        let answer = match asked {
            // A cluster may leave it without an answer: the leader of the stream, which answers, is gone with it.
            Err(error)
                if error.kind() == ErrorKind::Timeout
                    && self.api.is_in_a_cluster()
                    && self.api.stream("delete", name).await?.is_none() =>
            {
                return Ok(true);
            }
            asked => asked?,
        };
        match answer {
            Ok(_) => Ok(true),
            Err(error) if error.is(STREAM_NOT_FOUND) => Ok(false),
            Err(error) => Err(error.into_error("delete")),
        }
    }

    pub(crate) async fn describe(&self, destination: &Destination) -> Result<Description> {
        let info = self.expect(destination, "describe").await?;
        let stream = self.names.stream(destination);
        let mut groups = Vec::new();
        for consumer in self.api.consumers("describe", &stream).await? {
            // Consumers that others made on the stream are no groups of ours.
            let Some(name) = consumer.config["metadata"][NAME].as_str() else { continue };
            let group = Group::from(name);
            let records = self.names.records(destination, &group);
            let filter = format!("{}.l.>", self.names.record(destination, &group));
            let letters = self.api.subjects("describe", &records, &filter).await.ok().map(|found| found.len() as u64);
            let lag = self.figures(destination, &consumer).await?;
            groups.push(GroupDescription {
                group,
                physical: consumer.name,
                dead_letters: records,
                dead_letter_count: letters,
                lag,
            });
        }
        groups.sort_by(|a, b| a.group.cmp(&b.group));
        let mut settings = BTreeMap::new();
        for field in ["num_replicas", "max_age", "max_bytes", "duplicate_window", "storage", "retention"] {
            settings.insert(field.to_owned(), info.config[field].to_string());
        }
        settings.insert("bytes".into(), info.state.bytes.to_string());
        Ok(Description {
            destination: destination.clone(),
            physical: stream,
            groups,
            messages: Some(info.state.messages),
            settings,
        })
    }

    pub(crate) async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        let consumer = self.expect_group(destination, group, "lag").await?;
        self.figures(destination, &consumer).await
    }

    /// What the server counts. It cannot tell what is delayed from what is in flight, or what a member has prefetched.
    async fn figures(&self, destination: &Destination, consumer: &ConsumerInfo) -> Result<Lag> {
        let approximate = |count| Some((count, Precision::Approximate));
        let mut lag = Lag {
            ready: approximate(consumer.num_pending),
            in_flight: approximate(consumer.num_ack_pending),
            ..Lag::default()
        };
        if consumer.num_pending + consumer.num_ack_pending > 0 {
            let subject = self.names.subject(destination);
            let query = json!({ "seq": consumer.ack_floor.stream_seq + 1, "next_by_subj": subject });
            let oldest = self.api.message("lag", &self.names.stream(destination), &query).await?;
            lag.oldest_age = oldest
                .and_then(|message| message.time.parse::<Timestamp>().ok())
                .map(|time| (Timestamp::now().since(time), Precision::Approximate));
        }
        Ok(lag)
    }
}

fn same(found: &StreamInfo, wanted: &Value, operation: &'static str) -> Result<Declared> {
    if found.config["subjects"] == wanted["subjects"] {
        return Ok(Declared::Existed);
    }
    let text = "a stream of that name exists with other subjects; set another prefix";
    Err(Error::new(ErrorKind::AlreadyExists, operation, text).with("stream", &wanted["name"]))
}

fn missing(operation: &'static str, destination: &Destination, group: Option<&Group>) -> Error {
    match group {
        None => Error::new(ErrorKind::NotFound, operation, "there is no such destination"),
        Some(group) => Error::new(ErrorKind::NotFound, operation, "there is no such group of this destination")
            .with("group", group),
    }
    .with("destination", destination)
}

/// How long the server waits for the ack of a message that is leased for so long: a little longer, so that most deliveries are
/// handed out within that time, and need not be renewed for it.
pub(crate) fn ack_wait(lease: Duration) -> Duration {
    lease + (lease / 4).max(Duration::from_millis(500))
}

/// JetStream's durations are nanoseconds.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
