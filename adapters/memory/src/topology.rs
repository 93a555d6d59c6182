//! Destinations and groups: create, check, look, delete, lag.

use std::collections::BTreeMap;

use anybroker_core::{
    Declared, Description, Destination, Error, ErrorKind, Group, GroupDescription, Lag, Result, TopologySpec,
};

use crate::store::{Store, no_group};

pub(crate) fn declare(store: &Store, spec: &TopologySpec) -> Declared {
    let (topic, mut created) = store.topic_or_new(&spec.destination);
    if let Some(group) = &spec.group {
        created |= topic.ensure_group(store.uid(), group, spec.start, store.clock.now());
    }
    if created { Declared::Created } else { Declared::Existed }
}

pub(crate) fn verify(store: &Store, spec: &TopologySpec, operation: &'static str) -> Result<()> {
    let topic = store.topic(&spec.destination, operation)?;
    match &spec.group {
        Some(group) if !topic.has_group(group) => Err(no_group(&spec.destination, group, operation)),
        _ => Ok(()),
    }
}

pub(crate) fn describe(store: &Store, name: &Destination) -> Result<Description> {
    let topic = store.topic(name, "describe")?;
    let now = store.clock.now();
    let groups = topic.group_names().into_iter().filter_map(|group| {
        let letters = topic.read_group(&group, now, |_, state, _| state.letters().len() as u64)?;
        Some(GroupDescription {
            physical: group.to_string(),
            dead_letters: format!("{name}.dlq"),
            dead_letter_count: Some(letters.into_iter().sum()),
            lag: topic.lag(&group, now)?,
            group,
        })
    });
    let groups = groups.collect();
    let messages = (0..topic.lanes()).map(|lane| topic.lane(lane).log.stored() as u64).sum();
    let settings = BTreeMap::from([
        ("lanes".to_owned(), topic.lanes().to_string()),
        ("max_messages".to_owned(), store.settings.max_messages.to_string()),
        ("retention".to_owned(), store.settings.retention.to_string()),
    ]);
    Ok(Description {
        destination: name.clone(),
        physical: name.to_string(),
        groups,
        messages: Some(messages),
        settings,
    })
}

pub(crate) fn delete(store: &Store, name: &Destination, group: Option<&Group>) -> Result<()> {
    match group {
        None => store.remove(name),
        Some(group) if store.topic(name, "delete")?.remove_group(group) => Ok(()),
        Some(group) => Err(no_group(name, group, "delete")),
    }
}

pub(crate) fn lag(store: &Store, name: &Destination, group: &Group) -> Result<Lag> {
    let topic = store.topic(name, "lag")?;
    topic.lag(group, store.clock.now()).ok_or_else(|| no_group(name, group, "lag"))
}

pub(crate) fn other_order(name: &Destination, group: &Group) -> Error {
    let text = "the group's open subscriptions keep another order; close them, or subscribe with the same order and \
                on_failure";
    Error::new(ErrorKind::AlreadyExists, "subscribe", text).with("destination", name).with("group", group)
}
