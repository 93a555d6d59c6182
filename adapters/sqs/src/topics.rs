//! Topics of SNS, and the queues that are subscribed to them.

use anybroker_core::{Error, ErrorKind, Result};
use parking_lot::RwLock;
use serde_json::json;

use crate::clients::Topics as Clients;
use crate::error::failed;

/// Without it a queue gets SNS's envelope of JSON instead of the message.
const RAW: &str = "RawMessageDelivery";

/// Requests about topics.
pub(crate) struct Topics {
    clients: Clients,
    /// What comes before the name in the ARN of a topic of this account and region.
    prefix: RwLock<Option<String>>,
}

/// A queue that is subscribed to a topic.
pub(crate) struct Subscribed {
    pub(crate) arn: String,
    pub(crate) queue_arn: String,
}

impl Topics {
    pub(crate) fn new(clients: &Clients, prefix: Option<&String>) -> Self {
        Self { clients: clients.clone(), prefix: RwLock::new(prefix.cloned()) }
    }

    /// Asks SNS for anything at all.
    pub(crate) async fn probe(&self) -> Result<()> {
        self.learn("connect").await
    }

    /// Learns the ARNs' prefix from any topic there is. SNS has no look-up by name.
    async fn learn(&self, operation: &'static str) -> Result<()> {
        let answer = self.clients.sender.list_topics().send().await.map_err(|error| failed(operation, &error))?;
        if let Some(arn) = answer.topics().first().and_then(|topic| topic.topic_arn())
            && let Some((prefix, _)) = arn.rsplit_once(':')
        {
            self.prefix.write().get_or_insert_with(|| prefix.to_owned());
        }
        Ok(())
    }

    /// The topic's ARN; `NotFound` when it is missing.
    pub(crate) async fn expect(&self, name: &str, operation: &'static str) -> Result<String> {
        if self.prefix.read().is_none() {
            self.learn(operation).await?;
        }
        let missing = || Error::new(ErrorKind::NotFound, operation, "there is no such topic").with("topic", name);
        let arn = self.prefix.read().as_ref().map(|prefix| format!("{prefix}:{name}"));
        let arn = arn.ok_or_else(missing)?;
        match self.clients.topics.get_topic_attributes().topic_arn(&arn).send().await {
            Ok(_) => Ok(arn),
            Err(error) => Err(failed(operation, &error).with("topic", name)),
        }
    }

    /// Creates the topic where it is missing. SNS refuses to create one that exists with other attributes, and what exists
    /// keeps its settings: so it is looked up first.
    pub(crate) async fn ensure(&self, name: &str, operation: &'static str) -> Result<String> {
        match self.expect(name, operation).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            found => return found,
        }
        let mut request = self.clients.topics.create_topic().name(name);
        if name.ends_with(".fifo") {
            request = request.attributes("FifoTopic", "true");
        }
        let answer = match request.send().await {
            Ok(answer) => answer,
            // Somebody else may have created it meanwhile.
            Err(error) => {
                let error = failed(operation, &error).with("topic", name);
                return self.expect(name, operation).await.map_err(|_| error);
            }
        };
        let arn = answer.topic_arn.ok_or_else(|| {
            Error::new(ErrorKind::Unexpected, operation, "an answer without the topic's ARN").with("topic", name)
        })?;
        if let Some((prefix, _)) = arn.rsplit_once(':') {
            self.prefix.write().get_or_insert_with(|| prefix.to_owned());
        }
        Ok(arn)
    }

    /// The queues that are subscribed to a topic.
    pub(crate) async fn subscribed(&self, topic: &str, operation: &'static str) -> Result<Vec<Subscribed>> {
        let mut found = Vec::new();
        let mut from = None;
        loop {
            let request = self.clients.topics.list_subscriptions_by_topic().topic_arn(topic).set_next_token(from);
            let answer = request.send().await.map_err(|error| failed(operation, &error))?;
            for subscription in answer.subscriptions() {
                if subscription.protocol() == Some("sqs")
                    && let (Some(arn), Some(queue)) = (subscription.subscription_arn(), subscription.endpoint())
                {
                    found.push(Subscribed { arn: arn.to_owned(), queue_arn: queue.to_owned() });
                }
            }
            match answer.next_token {
                Some(next) if !next.is_empty() => from = Some(next),
                _ => return Ok(found),
            }
        }
    }

    /// Subscribes a queue to a topic.
    pub(crate) async fn subscribe(&self, topic: &str, queue_arn: &str, operation: &'static str) -> Result<()> {
        let request = self.clients.topics.subscribe().topic_arn(topic).protocol("sqs").endpoint(queue_arn);
        let answer = request.attributes(RAW, "true").return_subscription_arn(true).send().await;
        answer.map(|_| ()).map_err(|error| failed(operation, &error).with("topic", topic))
    }

    /// `AlreadyExists` where a subscription wraps messages in an envelope.
    pub(crate) async fn expect_raw(&self, subscription: &str, operation: &'static str) -> Result<()> {
        let request = self.clients.topics.get_subscription_attributes().subscription_arn(subscription);
        let answer = request.send().await.map_err(|error| failed(operation, &error))?;
        let is_raw = answer
            .attributes()
            .and_then(|attributes| attributes.get(RAW))
            .is_some_and(|value| value.eq_ignore_ascii_case("true"));
        if is_raw {
            return Ok(());
        }
        let text = "the queue's subscription wraps messages; expected RawMessageDelivery = true";
        Err(Error::new(ErrorKind::AlreadyExists, operation, text).with("subscription", subscription))
    }

    pub(crate) async fn unsubscribe(&self, subscription: &str) -> Result<()> {
        let answer = self.clients.topics.unsubscribe().subscription_arn(subscription).send().await;
        answer.map(|_| ()).map_err(|error| failed("delete", &error))
    }

    /// Deletes the topic with its subscriptions.
    pub(crate) async fn delete(&self, topic: &str) -> Result<()> {
        let answer = self.clients.topics.delete_topic().topic_arn(topic).send().await;
        answer.map(|_| ()).map_err(|error| failed("delete", &error))
    }
}

/// What lets a topic send to a queue.
pub(crate) fn policy(topic: &str, queue_arn: &str) -> String {
    json!({
        "Version": "2012-10-17",
        "Statement": [{
            "Sid": "anybroker-fanout",
            "Effect": "Allow",
            "Principal": { "Service": "sns.amazonaws.com" },
            "Action": "sqs:SendMessage",
            "Resource": queue_arn,
            "Condition": { "ArnEquals": { "aws:SourceArn": topic } },
        }],
    })
    .to_string()
}
