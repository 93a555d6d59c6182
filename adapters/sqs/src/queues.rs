//! Queues: found, created, verified, deleted. A queue has one group; a tag says which.

use std::collections::HashMap;

use anybroker_core::{Declared, Destination, Error, ErrorKind, Group, Result, Start, TopologyMode, TopologySpec};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use parking_lot::RwLock;

use crate::config::Settings;
use crate::error::failed;
use crate::names;

/// The tag that says whose queue it is.
const GROUP_TAG: &str = "anybroker-group";
/// SQS's longest, so that nothing is forgotten as long as it may be kept. In seconds.
const RETENTION: &str = "1209600";

/// The URLs of queues, and how to change queues.
pub(crate) struct Queues {
    client: Client,
    settings: Settings,
    known: RwLock<HashMap<Destination, String>>,
}

impl Queues {
    pub(crate) fn new(client: &Client, settings: &Settings) -> Self {
        Self { client: client.clone(), settings: settings.clone(), known: RwLock::default() }
    }

    /// The URL of a queue that is published to; created where the configuration says so.
    pub(crate) async fn route(&self, destination: &Destination) -> Result<String> {
        if let Some(url) = self.known.read().get(destination) {
            return Ok(url.clone());
        }
        let name = names::queue(destination);
        let url = match self.settings.create_destinations {
            true => self.ensure(&name, "publish").await?.0,
            false => self.expect(&name, "publish").await?,
        };
        self.known.write().insert(destination.clone(), url.clone());
        Ok(url)
    }

    /// Forgets a queue that is gone.
    pub(crate) fn forget(&self, destination: &Destination) {
        self.known.write().remove(destination);
    }

    /// The queue's URL; `NotFound` when it is missing.
    pub(crate) async fn expect(&self, name: &str, operation: &'static str) -> Result<String> {
        let answer = self.client.get_queue_url().queue_name(name).send().await;
        let url = answer.map_err(|error| failed(operation, &error).with("queue", name))?.queue_url;
        let url = url.ok_or_else(|| Error::new(ErrorKind::Unexpected, operation, "an answer without a queue URL"))?;
        Ok(self.reachable(url))
    }

    /// An emulator answers with its own idea of its host: the path is the queue's, the rest is the endpoint's.
    fn reachable(&self, url: String) -> String {
        let Some(endpoint) = &self.settings.endpoint else { return url };
        let path = url.split_once("://").and_then(|(_, rest)| rest.split_once('/')).map(|(_, path)| path);
        path.map_or(url.clone(), |path| format!("{endpoint}/{path}"))
    }

    /// Creates the queue where it is missing.
    pub(crate) async fn ensure(&self, name: &str, operation: &'static str) -> Result<(String, Declared)> {
        match self.expect(name, operation).await {
            Ok(url) => return Ok((url, Declared::Existed)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let request =
            self.client.create_queue().queue_name(name).attributes(Attribute::MessageRetentionPeriod, RETENTION);
        let answer = request.send().await.map_err(|error| failed(operation, &error).with("queue", name))?;
        match answer.queue_url {
            Some(url) => Ok((self.reachable(url), Declared::Created)),
            None => self.expect(name, operation).await.map(|url| (url, Declared::Created)),
        }
    }

    /// Whose queue it is.
    async fn owner(&self, url: &str, operation: &'static str) -> Result<Option<String>> {
        let answer = self.client.list_queue_tags().queue_url(url).send().await;
        let tags = answer.map_err(|error| failed(operation, &error))?.tags;
        Ok(tags.and_then(|mut tags| tags.remove(GROUP_TAG)))
    }

    /// Makes the queue the group's. Tells whether it was nobody's before.
    async fn claim(&self, url: &str, group: &Group, operation: &'static str) -> Result<bool> {
        let name = names::escaped(group);
        let is_new = match self.owner(url, operation).await? {
            Some(owner) => return if owner == name { Ok(false) } else { Err(taken(group, operation)) },
            None => {
                let tagged = self.client.tag_queue().queue_url(url).tags(GROUP_TAG, &name).send().await;
                tagged.map_err(|error| failed(operation, &error))?;
                true
            }
        };
        // Two may claim it at once; the one whose tag stayed has it.
        if self.owner(url, operation).await?.is_some_and(|owner| owner != name) {
            return Err(taken(group, operation));
        }
        Ok(is_new)
    }

    /// The queue of a destination and that of its dead letters, made ready for a group.
    pub(crate) async fn prepare(
        &self,
        destination: &Destination,
        group: &Group,
        start: Start,
        mode: TopologyMode,
        operation: &'static str,
    ) -> Result<((String, String), Declared)> {
        let (name, letters) = (names::queue(destination), names::dead_letters(destination));
        if mode != TopologyMode::Declare {
            let urls = (self.expect(&name, operation).await?, self.expect(&letters, operation).await?);
            self.expect_owner(&urls.0, group, operation).await?;
            return Ok((urls, Declared::Existed));
        }
        let (url, created) = self.ensure(&name, operation).await?;
        if start == Start::Latest && created == Declared::Existed && self.owner(&url, operation).await?.is_none() {
            let text = "the queue may hold earlier messages, and SQS cannot pass over them; start at the earliest";
            return Err(Error::unsupported(operation, text).with("destination", destination));
        }
        let is_new = self.claim(&url, group, operation).await?;
        let (letters, _) = self.ensure(&letters, operation).await?;
        Ok(((url, letters), if is_new { Declared::Created } else { Declared::Existed }))
    }

    async fn expect_owner(&self, url: &str, group: &Group, operation: &'static str) -> Result<()> {
        match self.owner(url, operation).await? {
            Some(owner) if owner == names::escaped(group) => Ok(()),
            _ => Err(Error::new(ErrorKind::NotFound, operation, "the queue is not this group's").with("group", group)),
        }
    }

    pub(crate) async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        match &spec.group {
            Some(group) => {
                let mode = TopologyMode::Declare;
                let prepared = self.prepare(&spec.destination, group, spec.start, mode, "declare").await?;
                Ok(prepared.1)
            }
            None => Ok(self.ensure(&names::queue(&spec.destination), "declare").await?.1),
        }
    }

    pub(crate) async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        match &spec.group {
            Some(group) => {
                let mode = TopologyMode::Verify;
                self.prepare(&spec.destination, group, spec.start, mode, "verify").await.map(|_| ())
            }
            None => self.expect(&names::queue(&spec.destination), "verify").await.map(|_| ()),
        }
    }

    /// The queue of a group's dead letters; `NotFound` when the source is not the group's.
    pub(crate) async fn dead_letters(&self, source: &Destination, group: &Group) -> Result<String> {
        let operation = "dead letters";
        let url = self.expect(&names::queue(source), operation).await?;
        self.expect_owner(&url, group, operation).await?;
        self.expect(&names::dead_letters(source), operation).await
    }

    pub(crate) async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let url = self.expect(&names::queue(destination), "delete").await?;
        if let Some(group) = group {
            self.expect_owner(&url, group, "delete").await?;
        }
        match self.expect(&names::dead_letters(destination), "delete").await {
            Ok(letters) => self.delete_queue(&letters).await?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        if group.is_some() {
            let untagged = self.client.untag_queue().queue_url(&url).tag_keys(GROUP_TAG).send().await;
            return untagged.map(|_| ()).map_err(|error| failed("delete", &error));
        }
        self.forget(destination);
        self.delete_queue(&url).await
    }

    async fn delete_queue(&self, url: &str) -> Result<()> {
        self.client.delete_queue().queue_url(url).send().await.map(|_| ()).map_err(|error| failed("delete", &error))
    }
}

fn taken(group: &Group, operation: &'static str) -> Error {
    let text = "the queue belongs to another group; fan-out by SNS is not written yet in this adapter";
    Error::unsupported(operation, text).with("group", group)
}
