//! What a bare client does on SQS beside the peer.

use std::time::Duration;

use anybroker_core::naming::{escape, shorten};
use anybroker_core::{Declared, Destination, Effect, Error, ErrorKind, Group, Result, TopologySpec};
use aws_config::{BehaviorVersion, Region};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::Credentials;
use aws_sdk_sqs::error::DisplayErrorContext;
use aws_sdk_sqs::types::QueueAttributeName;

use crate::{disown, failed, is_owner, one_group};

/// Of the emulator, which has one.
pub const REGION: &str = "elasticmq";

/// The address of a URL, as an endpoint.
#[must_use]
pub fn endpoint(url: &str) -> String {
    format!("http://{}", url.trim_start_matches("sqs://"))
}

/// The queue of a destination: letters, digits, dashes and underscores, at most 80.
#[must_use]
pub fn queue(destination: &Destination) -> String {
    let name = format!("p-{}", escape(destination, "_", |byte| byte.is_ascii_alphanumeric() || byte == b'-'));
    if name.len() <= 80 { name } else { shorten(&name, "_", 44, destination) }
}

/// Whether an error's text says that the queue does not exist. The peers' errors have no kinds.
#[must_use]
pub fn is_missing(text: &str) -> bool {
    text.contains("NonExistentQueue") || text.contains("QueueDoesNotExist")
}

/// A settle that failed. Whether it was done nobody knows: the client asks again where an answer is lost, and a handle that the service
/// does not know then may be one that the first request has deleted.
pub fn settle_failed(text: &str) -> Error {
    // Its documentation of DeleteMessage and ChangeMessageVisibility, "Errors".
    let is_stale = ["ReceiptHandleIsInvalid", "MessageNotInflight"].iter().any(|code| text.contains(code));
    let kind = match is_stale || is_missing(text) {
        true => ErrorKind::StaleDelivery,
        false => ErrorKind::Unavailable,
    };
    failed(kind, "settle", text).with_effect(Effect::Unknown)
}

/// The client's configuration.
pub async fn config(url: &str) -> aws_config::SdkConfig {
    aws_config::defaults(BehaviorVersion::latest())
        .endpoint_url(endpoint(url))
        .region(Region::new(REGION))
        .credentials_provider(Credentials::new("k", "s", None, None, "emulator"))
        .load()
        .await
}

/// One client.
pub struct Topology(Client);

impl Topology {
    /// To the server of a URL.
    pub async fn connect(url: &str) -> Self {
        Self(Client::new(&config(url).await))
    }

    /// Creates the queue of a destination, where it is missing. `visibility` is that of receives which name none.
    ///
    /// # Errors
    /// `Unsupported` for a second group, `Unavailable`.
    pub async fn declare(&self, spec: &TopologySpec, visibility: Duration) -> Result<Declared> {
        if let Some(group) = &spec.group {
            one_group(&spec.destination, group, "declare")?;
        }
        if self.queue_url(&spec.destination).await?.is_some() {
            return Ok(Declared::Existed);
        }
        self.create_queue(&spec.destination, visibility).await?;
        Ok(Declared::Created)
    }

    /// Looks whether the queue is there, and is the group's.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`.
    pub async fn verify(&self, spec: &TopologySpec) -> Result<()> {
        let is_groups = |group: &Group| is_owner(&spec.destination, group);
        let found = self.queue_url(&spec.destination).await?;
        if found.is_some() && spec.group.as_ref().is_none_or(is_groups) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, "verify", "there is no such queue"))
    }

    /// Deletes the queue.
    ///
    /// # Errors
    /// `NotFound`, `Unavailable`.
    pub async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.verify(&TopologySpec { group: group.cloned(), ..TopologySpec::destination(destination) }).await?;
        disown(destination);
        match self.queue_url(destination).await? {
            Some(url) => self.delete_queue(&url).await,
            None => Ok(()),
        }
    }

    async fn queue_url(&self, destination: &Destination) -> Result<Option<String>> {
        match self.0.get_queue_url().queue_name(queue(destination)).send().await {
            Ok(found) => Ok(found.queue_url),
            Err(error) => {
                let text = DisplayErrorContext(&error).to_string();
                if is_missing(&text) { Ok(None) } else { Err(failed(ErrorKind::Unavailable, "topology", text)) }
            }
        }
    }

    async fn create_queue(&self, destination: &Destination, visibility: Duration) -> Result<()> {
        let seconds = visibility.as_secs().to_string();
        let made = self.0.create_queue().queue_name(queue(destination));
        let made = made.attributes(QueueAttributeName::VisibilityTimeout, seconds).send().await;
        let unavailable = |error| failed(ErrorKind::Unavailable, "declare", DisplayErrorContext(&error));
        made.map(drop).map_err(unavailable)
    }

    async fn delete_queue(&self, url: &str) -> Result<()> {
        let gone = self.0.delete_queue().queue_url(url).send().await;
        gone.map(drop).map_err(|error| failed(ErrorKind::Unavailable, "delete", DisplayErrorContext(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_settle_that_failed_may_be_done_also_where_the_service_does_not_know_the_delivery() {
        let lost = settle_failed("service error: unhandled error (503)");
        assert_eq!((lost.kind(), lost.effect()), (ErrorKind::Unavailable, Effect::Unknown));
        for text in ["ReceiptHandleIsInvalid: The input receipt handle is invalid.", "QueueDoesNotExist"] {
            let stale = settle_failed(text);
            assert_eq!((stale.kind(), stale.effect()), (ErrorKind::StaleDelivery, Effect::Unknown));
        }
    }
}
