//! A destination as the cluster has it.

use std::collections::BTreeMap;

use anybroker_core::{DeadLetterScope, Description, Destination, ErrorKind, GroupDescription, Result};
use rdkafka::admin::ResourceSpecifier;
use rdkafka::producer::Producer;

use crate::dead_letter::Letters;
use crate::error::failed;
use crate::lag::lag;
use crate::topology::{REQUEST, Topology, options};
use crate::{groups, names};

/// The settings of a topic that are shown.
const SHOWN: &[&str] =
    &["cleanup.policy", "retention.ms", "retention.bytes", "min.insync.replicas", "max.message.bytes"];

pub(crate) async fn describe(topology: &Topology, letters: &Letters, destination: &Destination) -> Result<Description> {
    let topic = names::topic(destination);
    let partitions = topology.expect(&topic, "describe").await?;
    let mut settings = configured(topology, &topic).await?;
    settings.insert("partitions".to_owned(), partitions.to_string());
    let mut described = Vec::new();
    for group in topology.groups(destination).await? {
        let lag = match lag(topology, destination, &group).await {
            Ok(lag) => lag,
            // Known, and without an offset of this topic: not a group of it.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let dead_letter_count = match letters.count(&DeadLetterScope::new(destination.clone(), group.clone())).await {
            Ok(count) => Some(count),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        described.push(GroupDescription {
            physical: names::group(&topic, &group),
            dead_letters: names::dead_letters(destination, &group),
            dead_letter_count,
            lag,
            group,
        });
    }
    let messages = stored(topology, topic.clone(), partitions).await?;
    Ok(Description {
        destination: destination.clone(),
        physical: topic,
        groups: described,
        messages: Some(messages),
        settings,
    })
}

/// The topic's settings among [`SHOWN`].
pub(crate) async fn configured(topology: &Topology, topic: &str) -> Result<BTreeMap<String, String>> {
    let resource = ResourceSpecifier::Topic(topic);
    let described = topology.admins().client(topic).await?.describe_configs([&resource], &options()).await;
    let described = described.map_err(|error| failed("describe", &error))?;
    let mut settings = BTreeMap::new();
    for resource in described {
        let resource = resource.map_err(|code| {
            anybroker_core::Error::new(crate::error::kind(code), "describe", code.to_string()).with("topic", topic)
        })?;
        for entry in resource.entries.into_iter().filter(|entry| SHOWN.contains(&entry.name.as_str())) {
            settings.extend(entry.value.map(|value| (entry.name, value)));
        }
    }
    Ok(settings)
}

/// How many records the topic holds; those that compaction or a transaction's marks left out are counted too.
async fn stored(topology: &Topology, topic: String, partitions: i32) -> Result<u64> {
    let client = topology.publisher().client();
    let asked = tokio::task::spawn_blocking(move || -> Result<u64> {
        let mut count = 0;
        for element in groups::partitions_of(&[(&topic, partitions)]).elements() {
            let (low, high) = client
                .client()
                .fetch_watermarks(&topic, element.partition(), REQUEST)
                .map_err(|error| failed("describe", &error))?;
            count += (high - low).max(0).unsigned_abs();
        }
        Ok(count)
    });
    asked.await.expect("asking for offsets cannot panic")
}
