//! Queues by name: found, created, tagged, measured, deleted.

use std::collections::HashMap;

use anybroker_core::{Declared, Error, ErrorKind, Result};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::QueueAttributeName as Attribute;

use crate::error::failed;

/// The tag that says whose queue it is.
const GROUP_TAG: &str = "anybroker-group";
/// SQS's longest, so that nothing is forgotten as long as it may be kept. In seconds.
const RETENTION: &str = "1209600";

/// Requests about queues.
pub(crate) struct Queues {
    pub(crate) client: Client,
    /// `http://host:port` of an endpoint that is not Amazon's.
    endpoint: Option<String>,
}

/// What SQS tells of a queue, as text.
pub(crate) type Attributes = HashMap<Attribute, String>;

impl Queues {
    pub(crate) fn new(client: &Client, endpoint: Option<&String>) -> Self {
        Self { client: client.clone(), endpoint: endpoint.cloned() }
    }

    /// The queue's URL; `NotFound` when it is missing.
    pub(crate) async fn expect(&self, name: &str, operation: &'static str) -> Result<String> {
        let answer = self.client.get_queue_url().queue_name(name).send().await;
        let url = answer.map_err(|error| failed(operation, &error).with("queue", name))?.queue_url;
        let url = url.ok_or_else(|| Error::new(ErrorKind::Unexpected, operation, "an answer without a queue URL"))?;
        Ok(self.reachable(url))
    }

    /// As [`expect`](Self::expect); `None` when it is missing.
    pub(crate) async fn find(&self, name: &str, operation: &'static str) -> Result<Option<String>> {
        match self.expect(name, operation).await {
            Ok(url) => Ok(Some(url)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// An emulator answers with its own idea of its host: the path is the queue's, the rest is the endpoint's.
    fn reachable(&self, url: String) -> String {
        let Some(endpoint) = &self.endpoint else { return url };
        let path = url.split_once("://").and_then(|(_, rest)| rest.split_once('/')).map(|(_, path)| path);
        path.map_or(url.clone(), |path| format!("{endpoint}/{path}"))
    }

    /// Creates the queue where it is missing; a name that ends in `.fifo` makes it a FIFO one.
    pub(crate) async fn ensure(&self, name: &str, operation: &'static str) -> Result<(String, Declared)> {
        if let Some(url) = self.find(name, operation).await? {
            return Ok((url, Declared::Existed));
        }
        let mut request =
            self.client.create_queue().queue_name(name).attributes(Attribute::MessageRetentionPeriod, RETENTION);
        if name.ends_with(".fifo") {
            request = request.attributes(Attribute::FifoQueue, "true");
        }
        let answer = request.send().await.map_err(|error| failed(operation, &error).with("queue", name))?;
        match answer.queue_url {
            Some(url) => Ok((self.reachable(url), Declared::Created)),
            None => self.expect(name, operation).await.map(|url| (url, Declared::Created)),
        }
    }

    /// Everything that SQS tells of a queue.
    pub(crate) async fn attributes(&self, url: &str, operation: &'static str) -> Result<Attributes> {
        let request = self.client.get_queue_attributes().queue_url(url).attribute_names(Attribute::All);
        let answer = request.send().await.map_err(|error| failed(operation, &error))?;
        Ok(answer.attributes.unwrap_or_default())
    }

    /// Sets one attribute.
    pub(crate) async fn set(&self, url: &str, name: Attribute, value: &str, operation: &'static str) -> Result<()> {
        let request = self.client.set_queue_attributes().queue_url(url).attributes(name, value);
        request.send().await.map(|_| ()).map_err(|error| failed(operation, &error))
    }

    /// Whose queue it is, as the tag says.
    pub(crate) async fn owner(&self, url: &str, operation: &'static str) -> Result<Option<String>> {
        let answer = self.client.list_queue_tags().queue_url(url).send().await;
        let tags = answer.map_err(|error| failed(operation, &error))?.tags;
        Ok(tags.and_then(|mut tags| tags.remove(GROUP_TAG)))
    }

    /// Says whose queue it is.
    pub(crate) async fn tag(&self, url: &str, owner: &str, operation: &'static str) -> Result<()> {
        let tagged = self.client.tag_queue().queue_url(url).tags(GROUP_TAG, owner).send().await;
        tagged.map(|_| ()).map_err(|error| failed(operation, &error))
    }

    /// Makes it nobody's.
    pub(crate) async fn untag(&self, url: &str, operation: &'static str) -> Result<()> {
        let untagged = self.client.untag_queue().queue_url(url).tag_keys(GROUP_TAG).send().await;
        untagged.map(|_| ()).map_err(|error| failed(operation, &error))
    }

    /// Deletes the queue of that name; nothing happens when it is missing.
    pub(crate) async fn delete(&self, name: &str) -> Result<()> {
        let Some(url) = self.find(name, "delete").await? else { return Ok(()) };
        match self.client.delete_queue().queue_url(url).send().await.map_err(|error| failed("delete", &error)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// A figure among the attributes.
pub(crate) fn figure(attributes: &Attributes, name: &Attribute) -> u64 {
    attributes.get(name).and_then(|text| text.parse().ok()).unwrap_or_default()
}
