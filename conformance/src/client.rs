//! Clients that record everything they do and see.

use std::collections::HashMap;
use std::time::Duration;

use anybroker_core::{
    Bus, DeadLetter, DeadLetterFilter, Destination, Effect, Error, Group, Message, PublishOptions, PublishOutcome,
    Reason, Receipt, RedriveOptions, RedriveReport, SubscribeSpec, TopologySpec, Verdict,
};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::case::{Proof, ensure};
use crate::checker::{self, Rules};
use crate::consumer::Consumer;
use crate::env::Env;
use crate::history::{Event, What, digest, is_earliest, micros};

/// The header that holds the run and case a message belongs to.
pub(crate) const RUN_HEADER: &str = "conformance-run";
/// The header that holds the fingerprint of everything else.
pub(crate) const SUM_HEADER: &str = "conformance-sum";

/// A destination and key.
type Stream<K> = (Destination, Option<K>);

/// A connection of its own.
pub(crate) struct Client<'e> {
    pub(crate) env: &'e Env,
    pub(crate) bus: Bus,
    number: u32,
    made: Mutex<HashMap<Stream<String>, u64>>,
    sent: Mutex<HashMap<Stream<Vec<u8>>, u64>>,
}

impl<'e> Client<'e> {
    pub(crate) fn new(env: &'e Env, bus: Bus, number: u32) -> Self {
        Self { env, bus, number, made: Mutex::default(), sent: Mutex::default() }
    }

    /// What the history calls it.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn record(&self, what: What) {
        self.env.history.record(self.number, what);
    }

    /// The next message of this producer for a destination and key. Its body names run, producer, key and
    /// sequence; a header holds the fingerprint of all the rest.
    pub(crate) fn message<'k>(&self, destination: &Destination, key: impl Into<Option<&'k str>>) -> Message {
        let key = key.into();
        let sequence = {
            let mut made = self.made.lock();
            let made = made.entry((destination.clone(), key.map(str::to_owned))).or_default();
            *made += 1;
            *made
        };
        let body = serde_json::json!({
            "run": self.env.scope(), "producer": self.number, "key": key, "sequence": sequence,
        });
        let mut message = Message::new(destination, body.to_string())
            .with_content_type("application/json")
            .with_header(RUN_HEADER, self.env.scope());
        if let Some(key) = key {
            message = message.with_key(key.to_owned());
        }
        let sum = format!("{:016x}", digest(&message));
        message.with_header(SUM_HEADER, sum)
    }

    /// `count` such messages.
    pub(crate) fn messages<'k>(
        &self,
        destination: &Destination,
        key: impl Into<Option<&'k str>>,
        count: usize,
    ) -> Vec<Message> {
        let key = key.into();
        (0..count).map(|_| self.message(destination, key)).collect()
    }

    /// Publishes a batch: one outcome per message.
    pub(crate) async fn publish(&self, batch: Vec<Message>) -> Proof<Vec<PublishOutcome>> {
        self.publish_with(batch, &PublishOptions::default()).await
    }

    pub(crate) async fn publish_with(
        &self,
        batch: Vec<Message>,
        options: &PublishOptions,
    ) -> Proof<Vec<PublishOutcome>> {
        self.publish_by(None, batch, options).await
    }

    /// Publishes with a deadline, which must be kept whatever happens to the connection.
    pub(crate) async fn publish_within(&self, batch: Vec<Message>, timeout: Duration) -> Proof<Vec<PublishOutcome>> {
        let options = PublishOptions::default().with_timeout(timeout);
        self.publish_by(Some(timeout), batch, &options).await
    }

    async fn publish_by(
        &self,
        deadline: Option<Duration>,
        batch: Vec<Message>,
        options: &PublishOptions,
    ) -> Proof<Vec<PublishOutcome>> {
        let calls = self.invoke(&batch);
        let submitting = async { self.bus.submit(batch, options).await.await };
        let outcomes = match deadline {
            Some(deadline) => self.env.in_time("publish", deadline, submitting).await?,
            None => self.env.bounded("publish", submitting).await?,
        };
        ensure!(outcomes.len() == calls.len(), "{} outcomes for a batch of {}", outcomes.len(), calls.len());
        for (call, outcome) in calls.into_iter().zip(&outcomes) {
            self.record(match outcome {
                Ok(receipt) => What::PublishOk { call, duplicate: receipt.duplicate, position: receipt.position },
                Err(error) if error.effect() == Effect::NotDone => What::PublishFail { call, kind: error.kind() },
                Err(error) => What::PublishInfo { call, kind: error.kind() },
            });
        }
        Ok(outcomes)
    }

    /// Hands a batch over and drops the confirms unread: what became of it is unknown to this client.
    pub(crate) async fn submit_and_forget(&self, batch: Vec<Message>) -> Proof {
        self.invoke(&batch);
        drop(self.env.bounded("publish", self.bus.submit(batch, &PublishOptions::default())).await?);
        Ok(())
    }

    pub(crate) fn invoke(&self, batch: &[Message]) -> Vec<u64> {
        let mut sent = self.sent.lock();
        let invoke = |message: &Message| {
            let call = self.env.history.number();
            let key = message.key().map(<[u8]>::to_vec);
            let sequence = sent.entry((message.destination().clone(), key.clone())).or_default();
            *sequence += 1;
            self.record(What::PublishInvoke {
                call,
                id: message.id().clone(),
                destination: message.destination().clone(),
                key,
                sequence: *sequence,
                digest: digest(message),
                instructed: message.delay().is_some() || message.ttl().is_some(),
                expires: message.ttl().is_some(),
            });
            call
        };
        batch.iter().map(invoke).collect()
    }

    /// Publishes one message.
    pub(crate) async fn send(&self, message: Message) -> Proof<PublishOutcome> {
        Ok(self.publish(vec![message]).await?.remove(0))
    }

    /// Publishes messages that must all be accepted.
    pub(crate) async fn publish_ok(&self, batch: Vec<Message>) -> Proof<Vec<Receipt>> {
        Ok(self.publish(batch).await?.into_iter().collect::<Result<Vec<_>, _>>()?)
    }

    /// Publishes `count` messages to a destination and key, and returns them.
    pub(crate) async fn fill<'k>(
        &self,
        destination: &Destination,
        key: impl Into<Option<&'k str>>,
        count: usize,
    ) -> Proof<Vec<Message>> {
        let batch = self.messages(destination, key, count);
        self.publish_ok(batch.clone()).await?;
        Ok(batch)
    }

    /// Publishes `count` messages of so many keys and buries each: they are dead letters when it returns.
    pub(crate) async fn bury(&self, spec: &SubscribeSpec, count: usize, keys: usize) -> Proof<Vec<Message>> {
        let (destination, group) = (&spec.destinations[0], &spec.group);
        let mut consumer = self.subscribe(spec.clone()).await?;
        let message = |number| self.message(destination, format!("key {}", number % keys).as_str());
        let sent: Vec<_> = (0..count).map(message).collect();
        self.publish_ok(sent.clone()).await?;
        for _ in 0..count {
            consumer.one().await?.dead_letter(Verdict::new(Reason::Rejected)).await?;
        }
        consumer.close().await?;
        self.letters_until(destination, group, count).await?;
        Ok(sent)
    }

    /// Opens a subscription that must open.
    pub(crate) async fn subscribe(&self, spec: SubscribeSpec) -> Proof<Consumer<'e>> {
        Ok(self.try_subscribe(spec).await??)
    }

    pub(crate) async fn try_subscribe(&self, spec: SubscribeSpec) -> Proof<Result<Consumer<'e>, Error>> {
        let subscription = self.env.history.number();
        let (group, destinations) = (spec.group.clone(), spec.destinations.clone());
        self.record(What::SubscribeInvoke { subscription, group: group.clone(), destinations: destinations.clone() });
        match self.env.bounded("subscribe", self.bus.subscribe(spec.clone())).await? {
            Err(error) => Ok(Err(error)),
            Ok(subscriber) => {
                self.record(What::Subscribed {
                    subscription,
                    group,
                    destinations,
                    order: spec.order,
                    on_failure: spec.on_failure,
                    earliest: is_earliest(spec.start),
                    lease_micros: micros(spec.lease),
                    max_attempts: spec.max_attempts,
                    crash_limit: spec.crash_limit,
                });
                Ok(Ok(Consumer::new(self.env, self.number, subscription, subscriber)))
            }
        }
    }

    /// Declares a group that keeps everything from here on.
    pub(crate) async fn declare(&self, spec: &TopologySpec) -> Proof {
        self.env.bounded("declare", self.bus.declare(spec)).await??;
        if let Some(group) = spec.group.clone() {
            self.record(What::Declared { destination: spec.destination.clone(), group });
        }
        Ok(())
    }

    /// All dead letters of a source and group.
    pub(crate) async fn letters(&self, source: &Destination, group: &Group) -> Proof<Vec<DeadLetter>> {
        Ok(self.scan(source, group).await?.1)
    }

    async fn scan(&self, source: &Destination, group: &Group) -> Proof<(u64, Vec<DeadLetter>)> {
        let scan = self.env.history.number();
        let letters = self.bus.dead_letters(source, group)?;
        let filter = DeadLetterFilter::all();
        let found = self.env.bounded("dead letters", letters.peek(&filter, usize::MAX)).await??;
        for letter in &found {
            self.record(What::Letter {
                scan,
                destination: source.clone(),
                group: group.clone(),
                id: letter.message.id().clone(),
                digest: digest(&letter.message),
                reason: letter.reason.to_string(),
                attempts: letter.attempts,
            });
        }
        Ok((scan, found))
    }

    /// Waits until the queue holds at least `count` letters.
    pub(crate) async fn letters_until(
        &self,
        source: &Destination,
        group: &Group,
        count: usize,
    ) -> Proof<Vec<DeadLetter>> {
        let deadline = Instant::now() + self.env.patience();
        loop {
            let found = self.letters(source, group).await?;
            if found.len() >= count {
                return Ok(found);
            }
            ensure!(
                Instant::now() < deadline,
                "{} dead letters of {count} after {:?}",
                found.len(),
                self.env.patience()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Redrives what the options choose.
    pub(crate) async fn redrive(
        &self,
        source: &Destination,
        group: &Group,
        options: &RedriveOptions,
    ) -> Proof<RedriveReport> {
        let letters = self.bus.dead_letters(source, group)?;
        let mut chosen = self.env.bounded("dead letters", letters.peek(&options.filter, usize::MAX)).await??;
        chosen.truncate(options.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX)));
        chosen.retain(|letter| letter.redrives < options.max_redrives);
        if !options.dry_run {
            let ids = chosen.iter().map(|letter| letter.message.id().clone()).collect();
            self.record(What::RedriveInvoke { destination: source.clone(), group: group.clone(), ids });
        }
        Ok(self.env.bounded("redrive", letters.redrive(options)).await??)
    }

    /// Purges what the filter chooses.
    pub(crate) async fn purge(&self, source: &Destination, group: &Group, filter: &DeadLetterFilter) -> Proof<u64> {
        let letters = self.bus.dead_letters(source, group)?;
        let chosen = self.env.bounded("dead letters", letters.peek(filter, usize::MAX)).await??;
        let ids = chosen.iter().map(|letter| letter.message.id().clone()).collect();
        self.record(What::PurgeInvoke { destination: source.clone(), group: group.clone(), ids });
        Ok(self.env.bounded("purge", letters.purge(filter)).await??)
    }

    /// Reads what is left of a group with this (fresh) client: acks until nothing comes for the quiet window and nothing that
    /// was returned is still owed, a canary behind it proves that something could still have come, and the dead letters are
    /// read. What is read is returned in order.
    pub(crate) async fn drain(&self, spec: SubscribeSpec) -> Proof<Vec<Message>> {
        let (source, group) = (spec.destinations[0].clone(), spec.group.clone());
        let mut consumer = self.subscribe(spec).await?;
        let mut drained = Vec::new();
        let mut last = Instant::now();
        loop {
            let batch = consumer.receive(100, self.env.quiet()).await?;
            if batch.is_empty() {
                // What is owed may take as long as anything that must happen; only then is it lost and not late.
                if last.elapsed() >= self.env.patience() || !self.lacks(&source, &group).await? {
                    break;
                }
                continue;
            }
            for held in batch {
                drained.push(held.message().clone());
                held.ack().await?;
            }
            last = Instant::now();
        }
        let canary = self.message(&source, "canary");
        self.publish_ok(vec![canary.clone()]).await?;
        loop {
            let held = consumer.one().await?;
            let found = held.message().clone();
            held.ack().await?;
            if found.id() == canary.id() {
                break;
            }
            drained.push(found);
        }
        consumer.close().await?;
        self.record(self.drained(&source, &group).await?);
        Ok(drained)
    }

    /// Whether the checker would miss something in the group if nothing more came.
    async fn lacks(&self, source: &Destination, group: &Group) -> Proof<bool> {
        let drained = self.drained(source, group).await?;
        let mut events = self.env.history.events();
        events.push(Event { at: self.env.now(), client: self.number, what: drained });
        Ok(checker::lacks(&events, group, Rules::of(&self.env.record)))
    }

    /// That nothing more comes, with a reading of the dead letters.
    async fn drained(&self, source: &Destination, group: &Group) -> Proof<What> {
        let scan = match self.env.record.dead_letter.is_given() {
            true => Some(self.scan(source, group).await?.0),
            false => None,
        };
        Ok(What::Drained { destination: source.clone(), group: group.clone(), scan })
    }

    /// Closes the connection.
    pub(crate) async fn close(&self) -> Proof {
        Ok(self.env.bounded("close", self.bus.close(self.env.patience())).await??)
    }
}
