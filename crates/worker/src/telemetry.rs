//! Structured log events (`tracing`) and metrics (the `metrics` facade), with the names that
//! dashboards and alerts rely on.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anybroker_core::{Delivery, Destination, Error, Group, Lag, Lane, Message, MessageId, Position, PublishOutcome};
use metrics::{Counter, Histogram};
use parking_lot::Mutex;

use crate::ErrorClass;

/// What became of a delivery, as the label `status` of `messages_consumed_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// Processed and acked.
    Success,
    /// Failed, comes back.
    Retry,
    /// Failed for good.
    DeadLetter,
    /// Given back uncounted.
    Released,
    /// Settled too late.
    Stale,
    /// Could not be settled.
    Unsettled,
}

impl Status {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Success, "success"),
        (Self::Retry, "retry"),
        (Self::DeadLetter, "dead_letter"),
        (Self::Released, "released"),
        (Self::Stale, "stale"),
        (Self::Unsettled, "unsettled"),
    ];
}

/// The metric handles of one topic, registered once.
pub(crate) struct Topic {
    pub(crate) destination: Destination,
    duration: Histogram,
    consumed: [Counter; Status::ALL.len()],
}

impl Topic {
    fn register(destination: &Destination, group: &Group) -> Self {
        let (topic, group) = (destination.as_str().to_owned(), group.as_str().to_owned());
        let consumed = Status::ALL.map(|(_, status)| {
            let (topic, group) = (topic.clone(), group.clone());
            metrics::counter!("messages_consumed_total", "topic" => topic, "consumer_group" => group, "status" => status)
        });
        let duration =
            metrics::histogram!("message_processing_duration_seconds", "topic" => topic, "consumer_group" => group);
        Self { destination: destination.clone(), duration, consumed }
    }

    pub(crate) fn handled(&self, latency: Duration) {
        self.duration.record(latency.as_secs_f64());
    }

    pub(crate) fn consumed(&self, status: Status, count: u64) {
        self.consumed[status as usize].increment(count);
    }
}

/// Logs and metrics of one subscription.
pub(crate) struct Telemetry {
    group: Group,
    /// The subscription's destinations; nearly always one.
    topics: Vec<Arc<Topic>>,
    /// Destinations that a pattern brought.
    others: Mutex<HashMap<Destination, Arc<Topic>>>,
    produced: Mutex<HashMap<Destination, Counter>>,
    buried: Mutex<HashMap<(Destination, ErrorClass), Counter>>,
}

/// What is remembered of a publish while it is on its way.
pub(crate) struct Producing {
    started: Instant,
    destinations: Vec<(Destination, Option<MessageId>)>,
}

impl Telemetry {
    pub(crate) fn new(destinations: &[Destination], group: &Group) -> Self {
        describe();
        Self {
            group: group.clone(),
            topics: destinations.iter().map(|name| Arc::new(Topic::register(name, group))).collect(),
            others: Mutex::default(),
            produced: Mutex::default(),
            buried: Mutex::default(),
        }
    }

    pub(crate) fn group(&self) -> &Group {
        &self.group
    }

    /// The handles of a topic.
    pub(crate) fn topic(&self, destination: &Destination) -> Arc<Topic> {
        if let Some(topic) = self.topics.iter().find(|topic| topic.destination == *destination) {
            return Arc::clone(topic);
        }
        let mut others = self.others.lock();
        if let Some(topic) = others.get(destination) {
            return Arc::clone(topic);
        }
        let topic = Arc::new(Topic::register(destination, &self.group));
        others.insert(destination.clone(), Arc::clone(&topic));
        topic
    }

    /// The handler begins.
    pub(crate) fn consumed(&self, delivery: &Delivery) {
        tracing::debug!(
            topic = %delivery.message().destination(),
            partition = delivery.lane().index,
            offset = delivery.position().map(display),
            consumer_group = %self.group,
            id = %delivery.message().id(),
            attempt = delivery.attempt(),
            "message_consumed"
        );
    }

    /// The ack is confirmed.
    pub(crate) fn acked(&self, what: &Subject, latency: Duration) {
        tracing::debug!(
            topic = %what.destination,
            partition = what.lane.index,
            offset = what.position.map(display),
            consumer_group = %self.group,
            id = %what.id,
            latency_ms = millis(latency),
            "message_acked"
        );
    }

    /// The nack is confirmed.
    pub(crate) fn nacked(&self, what: &Subject, class: &ErrorClass, delay: Duration, latency: Duration) {
        tracing::warn!(
            topic = %what.destination,
            partition = what.lane.index,
            offset = what.position.map(display),
            consumer_group = %self.group,
            id = %what.id,
            attempt = what.attempt,
            error_type = %class,
            error = what.error.as_deref().unwrap_or_default(),
            delay_ms = millis(delay),
            latency_ms = millis(latency),
            "message_nacked"
        );
    }

    /// The dead letter is confirmed.
    pub(crate) fn buried(&self, what: &Subject, class: &ErrorClass, reason: &str, latency: Duration) {
        let mut buried = self.buried.lock();
        let counter = buried.entry((what.destination.clone(), class.clone())).or_insert_with(|| {
            let (topic, class) = (what.destination.as_str().to_owned(), class.as_str().to_owned());
            metrics::counter!("dlq_messages_total", "topic" => topic, "error_type" => class)
        });
        counter.increment(1);
        tracing::error!(
            topic = %what.destination,
            partition = what.lane.index,
            offset = what.position.map(display),
            consumer_group = %self.group,
            id = %what.id,
            attempt = what.attempt,
            reason,
            error_type = %class,
            error = what.error.as_deref().unwrap_or_default(),
            latency_ms = millis(latency),
            "message_dlq"
        );
    }

    /// A dead letter could not be stored: told once of each delivery, which is held while that is tried again.
    pub(crate) fn unburied(&self, delivery: &Delivery, reason: &str, error: &Error) {
        tracing::error!(
            topic = %delivery.message().destination(),
            partition = delivery.lane().index,
            offset = delivery.position().map(display),
            consumer_group = %self.group,
            id = %delivery.message().id(),
            attempt = delivery.attempt(),
            reason,
            %error,
            "message_unburied"
        );
    }

    /// A settle came too late, or could not be done.
    pub(crate) fn unsettled(&self, delivery: &Delivery, error: &Error) {
        tracing::warn!(
            topic = %delivery.message().destination(),
            partition = delivery.lane().index,
            offset = delivery.position().map(display),
            consumer_group = %self.group,
            id = %delivery.message().id(),
            %error,
            "message_unsettled"
        );
    }

    /// Lanes came or went.
    pub(crate) fn rebalance(&self, change: &'static str, lane: Lane, name: &str) {
        let topics: Vec<&str> = self.topics.iter().map(|topic| topic.destination.as_str()).collect();
        tracing::info!(
            topic = topics.join(","),
            consumer_group = %self.group,
            partition = lane.index,
            name,
            epoch = lane.epoch,
            change,
            "rebalance"
        );
    }

    /// What the group has left to do on a destination.
    pub(crate) fn lag(&self, destination: &Destination, lag: &Lag) {
        let gauge = |partition: &str, lag: &Lag| {
            let Some(total) = lag.total() else { return };
            let (topic, group) = (destination.as_str().to_owned(), self.group.as_str().to_owned());
            #[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
            metrics::gauge!(
                "consumer_lag", "topic" => topic, "consumer_group" => group, "partition" => partition.to_owned()
            )
            .set(total as f64);
        };
        // The whole destination stands only where no lanes are told of, so that a sum over partitions is right.
        if lag.lanes.is_empty() {
            gauge("", lag);
        }
        lag.lanes.iter().for_each(|(name, lag)| gauge(name, lag));
        let count = |figure: anybroker_core::Figure| figure.map(|(count, _)| count);
        tracing::info!(
            topic = %destination,
            consumer_group = %self.group,
            lag = lag.total(),
            ready = count(lag.ready),
            in_flight = count(lag.in_flight),
            delayed = count(lag.delayed),
            oldest_ms = lag.oldest_age.map(|(age, _)| millis(age)),
            "consumer_lag"
        );
    }

    pub(crate) fn producing(&self, messages: &[Message]) -> Producing {
        let logged = tracing::enabled!(tracing::Level::DEBUG);
        let of = |message: &Message| (message.destination().clone(), logged.then(|| message.id().clone()));
        Producing { started: Instant::now(), destinations: messages.iter().map(of).collect() }
    }

    pub(crate) fn produced(&self, sent: Producing, outcomes: &[PublishOutcome]) {
        let latency = sent.started.elapsed();
        for ((destination, id), outcome) in sent.destinations.into_iter().zip(outcomes) {
            let Ok(receipt) = outcome else { continue };
            let mut produced = self.produced.lock();
            let counter = produced.entry(destination.clone()).or_insert_with(|| {
                // A receipt does not tell the partition. An empty label is as good as none in Prometheus.
                metrics::counter!(
                    "messages_produced_total", "topic" => destination.as_str().to_owned(), "partition" => ""
                )
            });
            counter.increment(1);
            if let Some(id) = id {
                tracing::debug!(
                    topic = %destination,
                    offset = receipt.position.map(display),
                    %id,
                    latency_ms = millis(latency),
                    "message_produced"
                );
            }
        }
    }
}

/// What is remembered of a delivery while it is being settled, for the log.
pub(crate) struct Subject {
    destination: Destination,
    id: MessageId,
    lane: Lane,
    position: Option<Position>,
    attempt: u32,
    error: Option<String>,
}

impl Subject {
    pub(crate) fn of(delivery: &Delivery, error: Option<String>) -> Self {
        let message = delivery.message();
        Self {
            destination: message.destination().clone(),
            id: message.id().clone(),
            lane: delivery.lane(),
            position: delivery.position(),
            attempt: delivery.attempt(),
            error,
        }
    }

    pub(crate) fn destination(&self) -> &Destination {
        &self.destination
    }

    pub(crate) fn id(&self) -> &MessageId {
        &self.id
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn describe() {
    use metrics::Unit;
    metrics::describe_counter!("messages_produced_total", "Messages published by handlers and confirmed");
    metrics::describe_counter!("messages_consumed_total", "Deliveries, by what became of them");
    metrics::describe_gauge!("consumer_lag", "Messages that the group has not settled");
    metrics::describe_histogram!("message_processing_duration_seconds", Unit::Seconds, "How long handlers ran");
    metrics::describe_counter!("dlq_messages_total", "Messages that became dead letters");
    metrics::describe_gauge!("dlq_alert", "1 while a dead-letter queue holds at least the threshold, else 0");
}
