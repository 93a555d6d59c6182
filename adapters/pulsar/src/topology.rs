//! Topics and subscriptions: created, verified, described, deleted, by the admin endpoint.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{
    Declared, Description, Destination, Effect, Error, ErrorKind, Group, GroupDescription, Lag, Precision, Result,
    Start, Timestamp, TopologySpec,
};
use futures_util::future::try_join_all;
use parking_lot::RwLock;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::admin::{Admin, Verb};
use crate::batch::Window;
use crate::codec;
use crate::config::Settings;
use crate::link::Link;
use crate::names::{LETTERS_SUBSCRIPTION, Names};
use crate::producer::Producer;

/// The logical name of a group, among the properties of its subscription.
const GROUP: &str = "anybroker-group";
/// Between tries to reach a broker that does not serve.
const AGAIN: Duration = Duration::from_millis(200);

/// Where messages of a destination are published to.
pub(crate) struct Route {
    producers: Vec<Arc<Producer>>,
    next: AtomicUsize,
}

impl Route {
    /// The producer for a message of that key, as it is written.
    pub(crate) fn producer(&self, key: Option<&str>) -> &Arc<Producer> {
        let count = self.producers.len();
        let index = match key {
            _ if count == 1 => 0,
            Some(key) => codec::partition_of(key, count),
            None => self.next.fetch_add(1, Ordering::Relaxed) % count,
        };
        &self.producers[index]
    }

    fn is_open(&self) -> bool {
        self.producers.iter().all(|producer| producer.is_open())
    }
}

/// What is known of the broker's topics, and how to change it.
pub(crate) struct Topology {
    pub(crate) admin: Admin,
    pub(crate) names: Names,
    pub(crate) link: Arc<Link>,
    pub(crate) window: Window,
    settings: Settings,
    routes: RwLock<HashMap<Destination, Arc<Route>>>,
}

impl Topology {
    pub(crate) fn new(admin: Admin, names: Names, link: Arc<Link>, settings: &Settings) -> Self {
        let (window, settings, routes) = (Window::new(), settings.clone(), RwLock::default());
        Self { admin, names, link, window, settings, routes }
    }

    /// Where to publish; its topic is looked up, and created where the configuration says so, whenever its producers have
    /// to be opened. Tries again until the deadline while the broker does not serve.
    pub(crate) async fn route(&self, destination: &Destination, deadline: Instant) -> Result<Arc<Route>> {
        let known = self.routes.read().get(destination).cloned();
        if let Some(route) = known.filter(|route| route.is_open()) {
            return Ok(route);
        }
        let mut last = None;
        loop {
            match tokio::time::timeout_at(deadline, self.open_route(destination)).await {
                Ok(Err(error)) if error.kind() == ErrorKind::Unavailable => last = Some(error),
                Ok(opened) => return opened.map_err(|error| error.with_effect(Effect::NotDone)),
                Err(_) => {
                    let unknown = || Error::new(ErrorKind::Unavailable, "publish", "no producer in time");
                    return Err(last.unwrap_or_else(unknown).with_effect(Effect::NotDone));
                }
            }
            tokio::time::sleep_until(deadline.min(Instant::now() + AGAIN)).await;
            if Instant::now() >= deadline {
                let error = last.take().expect("set above, or returned");
                return Err(error.with_effect(Effect::NotDone));
            }
        }
    }

    async fn open_route(&self, destination: &Destination) -> Result<Arc<Route>> {
        let operation = "publish";
        let found = match self.settings.create_destinations {
            true => self.ensure(destination, operation).await.map(|(_, partitions)| partitions),
            false => self.expect(destination, operation).await,
        };
        let partitions = match found {
            Ok(partitions) => partitions,
            Err(error) => {
                self.routes.write().remove(destination);
                return Err(error);
            }
        };
        let topics = self.topics(&Names::topic(destination), partitions);
        let known = self.routes.read().get(destination).cloned();
        let route = match known.filter(|route| route.producers.len() == topics.len()) {
            Some(route) => route,
            None => {
                self.keeps_before_group(destination, partitions, operation).await?;
                let producers = topics.into_iter().map(|topic| Producer::new(topic, self.window.clone())).collect();
                Arc::new(Route { producers, next: AtomicUsize::new(0) })
            }
        };
        try_join_all(route.producers.iter().map(|producer| producer.open(&self.link, operation))).await?;
        self.routes.write().insert(destination.clone(), Arc::clone(&route));
        Ok(route)
    }

    /// A topic that keeps nothing, and that nobody subscribes to, would drop what is confirmed.
    async fn keeps_before_group(
        &self,
        destination: &Destination,
        partitions: u32,
        operation: &'static str,
    ) -> Result<()> {
        let local = Names::topic(destination);
        let answer = self.admin.topic(operation, Verb::Get, &local, "/retention?applied=true").await?;
        let retention: Value = match answer.read(operation) {
            // Policies are read by the tenant's administrators only (PulsarAuthorizationProvider.java).
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let stats = self.stats(operation, &local, partitions).await?.unwrap_or_default();
                if stats["subscriptions"].as_object().is_some_and(|groups| !groups.is_empty()) {
                    return Ok(());
                }
                let text = "the topic has no group, and this role may not see whether it keeps what is published";
                return Err(Error::new(error.kind(), operation, text).with("destination", destination));
            }
            answer => answer?,
        };
        if retention["retentionTimeInMinutes"].as_i64().unwrap_or(0) != 0 {
            return Ok(());
        }
        if self.settings.create_destinations {
            return self.retain(&local, operation).await;
        }
        match self.admin.subscriptions(operation, &local).await? {
            Some(groups) if !groups.is_empty() => Ok(()),
            _ => {
                let text = "the topic has neither a group nor a retention: what is published would be lost";
                Err(Error::new(ErrorKind::NotFound, operation, text).with("destination", destination))
            }
        }
    }

    async fn retain(&self, local: &str, operation: &'static str) -> Result<()> {
        let minutes = self.settings.retention.as_secs().div_ceil(60);
        let body = json!({
            "retentionTimeInMinutes": if minutes == 0 { -1 } else { i64::try_from(minutes).unwrap_or(-1) },
            "retentionSizeInMB": if self.settings.retention_mib == 0 { -1 } else { self.settings.retention_mib },
        });
        self.admin.topic(operation, Verb::Post(&body), local, "/retention").await?.done(operation)
    }

    /// Whole names of a topic: one for each partition.
    pub(crate) fn topics(&self, local: &str, partitions: u32) -> Vec<String> {
        let full = self.names.full(local);
        match partitions {
            0 => vec![full],
            count => (0..count).map(|index| format!("{full}-partition-{index}")).collect(),
        }
    }

    /// The partitions of a destination's topic; `NotFound` when it is missing.
    pub(crate) async fn expect(&self, destination: &Destination, operation: &'static str) -> Result<u32> {
        let found = self.admin.partitions(operation, &Names::topic(destination)).await?;
        found.ok_or_else(|| missing(operation, destination, None))
    }

    /// The partitions of a group's topic; `NotFound` when group or destination are missing.
    pub(crate) async fn expect_group(
        &self,
        destination: &Destination,
        group: &Group,
        operation: &'static str,
    ) -> Result<u32> {
        let local = Names::topic(destination);
        let (partitions, groups) =
            tokio::try_join!(self.expect(destination, operation), self.admin.subscriptions(operation, &local))?;
        let name = Names::subscription(group);
        match groups {
            Some(groups) if groups.contains(&name) => Ok(partitions),
            _ => Err(missing(operation, destination, Some(group))),
        }
    }

    /// Creates the destination where it is missing.
    pub(crate) async fn ensure(&self, destination: &Destination, operation: &'static str) -> Result<(Declared, u32)> {
        let local = Names::topic(destination);
        if let Some(partitions) = self.admin.partitions(operation, &local).await? {
            return Ok((Declared::Existed, partitions));
        }
        let partitions = self.settings.partitions;
        let created = if partitions == 0 {
            self.admin.topic(operation, Verb::Put(&json!({})), &local, "").await?
        } else {
            self.admin.topic(operation, Verb::Put(&json!(partitions)), &local, "/partitions").await?
        };
        if created.status == 409 {
            // Somebody was quicker.
            let found = self.admin.partitions(operation, &local).await?;
            return Ok((Declared::Existed, found.unwrap_or(partitions)));
        }
        created.done(operation).map_err(|error| error.with("destination", destination))?;
        self.retain(&local, operation).await?;
        Ok((Declared::Created, partitions))
    }

    /// Creates what a group needs where it is missing: first what brings back and buries, then the group.
    pub(crate) async fn ensure_group(
        &self,
        destination: &Destination,
        group: &Group,
        start: Start,
        operation: &'static str,
    ) -> Result<(Declared, u32)> {
        let (_, partitions) = self.ensure(destination, operation).await?;
        let name = Names::subscription(group);
        let earliest = json!({ "ledgerId": -1, "entryId": -1, "partitionIndex": -1, "properties": { GROUP: group } });
        let (back, letters) = (Names::back(destination, group), Names::letters(destination, group));
        // What brings back has the partitions of its source: the owner of one is the owner of the other.
        let bring_back = async {
            if partitions > 0 {
                let created = self.admin.topic(operation, Verb::Put(&json!(partitions)), &back, "/partitions").await?;
                if created.status != 409 {
                    created.done(operation)?;
                }
            }
            self.subscribe(operation, &back, &name, &earliest).await
        };
        let bury = self.subscribe(operation, &letters, LETTERS_SUBSCRIPTION, &earliest);
        tokio::try_join!(bring_back, bury, self.ensure_count(destination, group, operation))?;
        let mut body = earliest;
        let mut from = None;
        match start {
            Start::Latest | Start::Time(_) => {
                (body["ledgerId"], body["entryId"]) = (json!(i64::MAX), json!(i64::MAX));
                if let Start::Time(time) = start {
                    from = Some(time);
                }
            }
            Start::Position(position) => {
                if partitions > 0 {
                    let text = "a position is one partition's; start a group of a partitioned topic at a time";
                    return Err(Error::unsupported(operation, text).with("destination", destination));
                }
                (body["ledgerId"], body["entryId"]) = (json!(position.major), json!(position.minor));
            }
            _ => {}
        }
        let local = Names::topic(destination);
        let declared = self.subscribe(operation, &local, &name, &body).await?;
        if let (Declared::Created, Some(time)) = (declared, from) {
            let path = format!("/subscription/{name}/resetcursor/{}", time.as_millis().max(0));
            let reset = self.admin.topic(operation, Verb::Post(&json!({})), &local, &path).await;
            if let Err(error) = reset.and_then(|answer| answer.done(operation)) {
                // Left as it is, it would start with what comes now, and whoever tries again would find it there.
                let _ = self.admin.delete(operation, &local, &format!("/subscription/{name}")).await;
                return Err(error);
            }
        }
        Ok((declared, partitions))
    }

    /// Creates the topic on which hand-overs are counted. It has no subscription: what is older than a day is forgotten.
    async fn ensure_count(&self, destination: &Destination, group: &Group, operation: &'static str) -> Result<()> {
        let local = Names::hand_overs(destination, group);
        if self.admin.partitions(operation, &local).await?.is_some() {
            return Ok(());
        }
        let created = self.admin.topic(operation, Verb::Put(&json!({})), &local, "").await?;
        match created.done(operation) {
            // The group works without: a broker that has deleted the idle topic must not keep its members out.
            Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::PermissionDenied) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => {
                let day = json!({ "retentionTimeInMinutes": 24 * 60, "retentionSizeInMB": -1 });
                self.admin.topic(operation, Verb::Post(&day), &local, "/retention").await?.done(operation)
            }
        }
    }

    /// Whether the group has the topic for that. Brokers delete it when nobody has read it for a day.
    pub(crate) async fn counts_hand_overs(
        &self,
        destination: &Destination,
        group: &Group,
        operation: &'static str,
    ) -> Result<bool> {
        let found = self.admin.partitions(operation, &Names::hand_overs(destination, group)).await?;
        if found.is_none() {
            tracing::warn!(%destination, %group, "hand-overs are not counted: declare the group again");
        }
        Ok(found.is_some())
    }

    async fn subscribe(&self, operation: &'static str, local: &str, name: &str, body: &Value) -> Result<Declared> {
        let path = format!("/subscription/{name}");
        let mut answer = self.admin.topic(operation, Verb::Put(body), local, &path).await?;
        if answer.status == 404 {
            // The broker creates no topics by itself.
            let created = self.admin.topic(operation, Verb::Put(&json!({})), local, "").await?;
            if created.status != 409 {
                created.done(operation)?;
            }
            answer = self.admin.topic(operation, Verb::Put(body), local, &path).await?;
        }
        if answer.status == 409 {
            return Ok(Declared::Existed);
        }
        answer.done(operation).map(|()| Declared::Created)
    }

    pub(crate) async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        match &spec.group {
            None => Ok(self.ensure(&spec.destination, "declare").await?.0),
            Some(group) => Ok(self.ensure_group(&spec.destination, group, spec.start, "declare").await?.0),
        }
    }

    pub(crate) async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        match &spec.group {
            None => self.expect(&spec.destination, "verify").await.map(drop),
            Some(group) => self.expect_group(&spec.destination, group, "verify").await.map(drop),
        }
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        // Of a partitioned topic without a partition that is in use only the second list knows.
        let mut found: Vec<Destination> = Vec::new();
        for path in ["", "/partitioned"] {
            let path = format!("/persistent/{}{path}", self.names.space());
            let topics: Vec<String> = self.admin.ask("list", Verb::Get, &path).await?.read("list")?;
            found.extend(topics.iter().filter_map(|topic| self.names.destination(topic)));
        }
        found.retain(|name| name.starts_with(prefix));
        found.sort();
        found.dedup();
        Ok(found)
    }

    pub(crate) async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let operation = "delete";
        let local = Names::topic(destination);
        if let Some(group) = group {
            let subscription = format!("/subscription/{}", Names::subscription(group));
            if !self.admin.delete(operation, &local, &subscription).await? {
                return Err(missing(operation, destination, Some(group)));
            }
            let (back, letters) = (Names::back(destination, group), Names::letters(destination, group));
            self.delete_topic(operation, &back).await?;
            self.admin.delete(operation, &Names::hand_overs(destination, group), "").await?;
            return self.admin.delete(operation, &letters, "").await.map(drop);
        }
        self.expect(destination, operation).await?;
        let groups = self.admin.subscriptions(operation, &local).await?.unwrap_or_default();
        if let Some(route) = self.routes.write().remove(destination) {
            route.producers.iter().for_each(|producer| producer.close());
        }
        let deleted = self.delete_topic(operation, &local).await?;
        for group in groups {
            for kind in ["b", "c", "l"] {
                self.delete_topic(operation, &format!("{local}={kind}={group}")).await?;
            }
        }
        if deleted { Ok(()) } else { Err(missing(operation, destination, None)) }
    }

    async fn delete_topic(&self, operation: &'static str, local: &str) -> Result<bool> {
        match self.admin.partitions(operation, local).await? {
            None => Ok(false),
            Some(0) => self.admin.delete(operation, local, "").await,
            Some(_) => self.admin.delete(operation, local, "/partitions").await,
        }
    }

    /// What the broker counts for a topic; `None` when it is missing.
    async fn stats(&self, operation: &'static str, local: &str, partitions: u32) -> Result<Option<Value>> {
        let query = "getPreciseBacklog=true&getEarliestTimeInBacklog=true";
        let path = match partitions {
            0 => format!("/stats?{query}"),
            _ => format!("/partitioned-stats?perPartition=true&{query}"),
        };
        let answer = self.admin.topic(operation, Verb::Get, local, &path).await?;
        if answer.status == 404 { Ok(None) } else { answer.read(operation).map(Some) }
    }

    pub(crate) async fn describe(&self, destination: &Destination) -> Result<Description> {
        let operation = "describe";
        let partitions = self.expect(destination, operation).await?;
        let local = Names::topic(destination);
        let stats = self.stats(operation, &local, partitions).await?;
        let stats = stats.ok_or_else(|| missing(operation, destination, None))?;
        let mut groups = Vec::new();
        for (name, subscription) in stats["subscriptions"].as_object().into_iter().flatten() {
            let logical = subscription["subscriptionProperties"][GROUP].as_str();
            let group = Group::from(logical.unwrap_or(name));
            let (back, letters) = (format!("{local}=b={name}"), format!("{local}=l={name}"));
            let back = self.stats(operation, &back, partitions).await?;
            let dead = self.stats(operation, &letters, 0).await?;
            let dead = dead.and_then(|dead| dead["subscriptions"][LETTERS_SUBSCRIPTION]["msgBacklog"].as_u64());
            groups.push(GroupDescription {
                group,
                physical: name.clone(),
                dead_letters: self.names.full(&letters),
                dead_letter_count: dead,
                lag: figures(name, subscription, back.as_ref()),
            });
        }
        groups.sort_by(|a, b| a.group.cmp(&b.group));
        let retention = self.admin.topic(operation, Verb::Get, &local, "/retention?applied=true").await?;
        let mut settings = BTreeMap::new();
        settings.insert("partitions".into(), partitions.to_string());
        settings.insert("storage_size".into(), stats["storageSize"].to_string());
        if let Ok(retention) = retention.read::<Value>(operation) {
            settings.insert("retention_minutes".into(), retention["retentionTimeInMinutes"].to_string());
            settings.insert("retention_mib".into(), retention["retentionSizeInMB"].to_string());
        }
        let physical = self.names.full(&local);
        // Pulsar counts backlogs, not what is stored.
        Ok(Description { destination: destination.clone(), physical, groups, messages: None, settings })
    }

    pub(crate) async fn lag(&self, destination: &Destination, group: &Group) -> Result<Lag> {
        let operation = "lag";
        let partitions = self.expect(destination, operation).await?;
        let local = Names::topic(destination);
        let back = Names::back(destination, group);
        let (stats, back) =
            tokio::try_join!(self.stats(operation, &local, partitions), self.stats(operation, &back, partitions))?;
        let name = Names::subscription(group);
        let subscription = stats.as_ref().map(|stats| &stats["subscriptions"][&name]).filter(|found| found.is_object());
        let Some(subscription) = subscription else { return Err(missing(operation, destination, Some(group))) };
        Ok(figures(&name, subscription, back.as_ref()))
    }
}

/// A group's figures: of its subscription, and of the topic that brings messages back to it.
fn figures(name: &str, subscription: &Value, back: Option<&Value>) -> Lag {
    let back = back.map_or(&Value::Null, |back| &back["subscriptions"][name]);
    let sum = |field: &str| [subscription, back].iter().filter_map(|of| of[field].as_u64()).sum::<u64>();
    let (backlog, unacked, delayed) = (sum("msgBacklog"), sum("unackedMessages"), sum("msgDelayed"));
    let times = [subscription, back].map(|of| of["earliestMsgPublishTimeInBacklog"].as_i64());
    let oldest = times.into_iter().flatten().filter(|time| *time > 0).min().map(Timestamp::from_millis);
    let approximate = |count| Some((count, Precision::Approximate));
    Lag {
        ready: approximate(backlog.saturating_sub(unacked + delayed)),
        in_flight: approximate(unacked),
        delayed: approximate(delayed),
        oldest_age: oldest.map(|time| (Timestamp::now().since(time), Precision::Approximate)),
        lanes: Vec::new(),
    }
}

pub(crate) fn missing(operation: &'static str, destination: &Destination, group: Option<&Group>) -> Error {
    match group {
        None => Error::new(ErrorKind::NotFound, operation, "there is no such destination"),
        Some(group) => Error::new(ErrorKind::NotFound, operation, "there is no such group of this destination")
            .with("group", group),
    }
    .with("destination", destination)
}
