//! Exchanges, queues and bindings.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Declared, Description, Destination, Error, ErrorKind, Figure, Group, GroupDescription, Lag, Precision, Result,
    Start, TopologySpec,
};
use lapin::options::{
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{Channel, ExchangeKind};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use crate::admin::Admin;
use crate::config::{QueueType, Settings};
use crate::delay::Range;
use crate::error::{late, untaken};
use crate::link::{Link, bounded};
use crate::names::Names;
use crate::state::Share;

/// How long a request about topology may take.
pub(crate) const REQUEST: Duration = Duration::from_secs(20);
/// The argument of a binding that holds the group's own name.
pub(crate) const GROUP: &str = "anybroker-group";

pub(crate) struct Topology {
    pub(crate) names: Names,
    pub(crate) link: Arc<Link>,
    pub(crate) admin: Option<Admin>,
    /// The type of groups' queues.
    pub(crate) queue: QueueType,
    consumer_timeout: Duration,
    /// What streams keep at least: seconds and bytes.
    pub(crate) stream_keeps: (u64, u64),
    /// Queues of waiting messages that were declared on this connection.
    waiting: Mutex<HashSet<String>>,
}

pub(crate) fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(value))
}

/// Returns of a message after which the server buries it: never, in practice. Its default is 20 (RabbitMQ 4.0, "Quorum
/// Queues", "Repeated Redeliveries"). Not -1: only with a limit does what is given back by a nack stand before what never was
/// out (`rabbit_fifo:handle_aux/5` of 4.0.5 appends it anew otherwise).
const DELIVERY_LIMIT: i64 = 1_000_000_000;
/// How long a new quorum queue is left alone. The server writes its name down some time after it answers: one that is killed
/// before has lost the queue with all that it has confirmed ("configured member of queue … was not found on this node"), and
/// starts it again without a leader, so that it never answers (4.0.5, also after another restart).
pub(crate) const SETTLES: Duration = Duration::from_secs(1);

/// The arguments of a queue that keeps the last message that was put in (`progress.rs`).
pub(crate) fn last_one() -> FieldTable {
    let mut arguments = quorum();
    arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    arguments.insert("x-overflow".into(), text("drop-head"));
    arguments
}

/// A quorum queue that never buries a message by itself.
pub(crate) fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT));
    arguments
}

/// That it refuses what there is no room for. What an operator's policy bounds (`max-length`) drops its oldest messages otherwise
/// ("drop-head", <https://www.rabbitmq.com/docs/maxlength>), which are confirmed and not read.
pub(crate) fn refusing(mut arguments: FieldTable) -> FieldTable {
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments
}

/// A classic queue. Nothing of ours expires in it; what another writer lets expire becomes a letter too, though at most once.
fn classic(letters: &str) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("classic"));
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(letters));
    refusing(arguments)
}

/// What expires goes on to `exchange`, and is kept until every queue there has confirmed it. That takes an overflow that
/// refuses rather than drops.
fn forwarding(mut arguments: FieldTable, exchange: &str, routing_key: &str) -> FieldTable {
    arguments.insert("x-dead-letter-exchange".into(), text(exchange));
    arguments.insert("x-dead-letter-routing-key".into(), text(routing_key));
    arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
    refusing(arguments)
}

impl Topology {
    pub(crate) fn new(settings: &Arc<Settings>, link: Arc<Link>) -> Result<Self> {
        Ok(Self {
            names: Names::new(&settings.prefix),
            link,
            admin: Admin::new(settings)?,
            queue: settings.queue,
            consumer_timeout: settings.consumer_timeout,
            stream_keeps: settings.stream_keeps,
            waiting: Mutex::default(),
        })
    }

    pub(crate) async fn channel(&self, operation: &'static str, deadline: Instant) -> Result<Channel> {
        self.link.channel_until(operation, deadline).await
    }

    pub(crate) async fn make_exchange(
        channel: &Channel,
        name: &str,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<()> {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let request = channel.exchange_declare(name.into(), ExchangeKind::Fanout, options, FieldTable::default());
        bounded(operation, deadline, request).await
    }

    pub(crate) async fn make_queue(
        channel: &Channel,
        name: &str,
        arguments: FieldTable,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<()> {
        let request = channel.queue_declare(name.into(), QueueDeclareOptions::durable(), arguments);
        bounded(operation, deadline, request).await.map(drop)
    }

    async fn has_exchange(&self, name: &str, operation: &'static str, deadline: Instant) -> Result<bool> {
        let channel = self.channel(operation, deadline).await?;
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let request = channel.exchange_declare(name.into(), ExchangeKind::Fanout, options, FieldTable::default());
        present(bounded(operation, deadline, request).await).map(|found| found.is_some())
    }

    /// Messages that are ready and consumers; `None` where there is no such queue.
    pub(crate) async fn look(
        &self,
        queue: &str,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<Option<(u64, u32)>> {
        let channel = self.channel(operation, deadline).await?;
        let request =
            channel.queue_declare(queue.into(), QueueDeclareOptions::durable().passive(), FieldTable::default());
        let found = present(bounded(operation, deadline, request).await)?;
        Ok(found.map(|queue| (u64::from(queue.message_count()), queue.consumer_count())))
    }

    /// Whether the destination with that exchange is there, with its stream where it is to have one.
    pub(crate) async fn is_there(&self, exchange: &str, operation: &'static str, deadline: Instant) -> Result<bool> {
        if self.queue.is_log() && self.look(&Names::stream(exchange), operation, deadline).await?.is_none() {
            return Ok(false);
        }
        self.has_exchange(exchange, operation, deadline).await
    }

    /// Whether a group is bound to the exchange. Only the management plugin tells; without it, what a publish found is all there is.
    pub(crate) async fn has_group(&self, exchange: &str, operation: &'static str, deadline: Instant) -> Result<bool> {
        let Some(admin) = &self.admin else { return Ok(false) };
        let bindings = timeout_at(deadline, admin.bindings(operation, exchange)).await;
        let bindings = bindings.map_err(|_| late(operation))??;
        Ok(bindings.is_some_and(|bindings| bindings.iter().any(|binding| binding.destination_type == "queue")))
    }

    /// Why a queue took nothing that was sent to it by its name: it is gone, or its server has just started and does not route to it yet.
    pub(crate) async fn takes_nothing(&self, queue: &str, operation: &'static str, deadline: Instant) -> Error {
        let found = self.look(queue, operation, deadline).await.map(|found| found.is_some());
        let none = "its queue does not exist any more";
        untaken(found, operation, none, "its queue takes nothing yet").with("queue", queue)
    }

    /// Makes sure that a destination is there: creates it, or finds it.
    pub(crate) async fn ensure(
        &self,
        destination: &Destination,
        creates: bool,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<()> {
        let exchange = self.names.exchange(destination);
        if creates {
            if self.queue.is_log() {
                if !self.ensure_stream(&exchange, operation, deadline).await? {
                    tokio::time::sleep(SETTLES).await;
                }
                return Ok(());
            }
            let channel = self.channel(operation, deadline).await?;
            return Self::make_exchange(&channel, &exchange, operation, deadline).await;
        }
        match self.is_there(&exchange, operation, deadline).await? {
            true => Ok(()),
            false => Err(missing(operation, destination, None)),
        }
    }

    /// Creates a group's queues, or finds them as they should be.
    pub(crate) async fn ensure_group(
        &self,
        destination: &Destination,
        group: &Group,
        start: Start,
        operation: &'static str,
    ) -> Result<Declared> {
        let deadline = Instant::now() + REQUEST;
        if self.queue.is_log() {
            return self.ensure_reader(destination, group, start, operation, deadline).await;
        }
        let (exchange, queue) = (self.names.exchange(destination), self.names.queue(destination, group));
        let existed = self.look(&queue, operation, deadline).await?.is_some();
        let channel = self.channel(operation, deadline).await?;
        Self::make_exchange(&channel, &exchange, operation, deadline).await?;
        // First the letters, then the queue that may forward to them, then the binding that fills it.
        let letters = Names::letters(&queue);
        Self::make_queue(&channel, &letters, refusing(quorum()), operation, deadline).await?;
        let mut arguments = match self.queue {
            QueueType::Quorum | QueueType::Stream => forwarding(quorum(), "", &letters),
            QueueType::Classic => classic(&letters),
        };
        self.bounds_deliveries(&mut arguments);
        Self::make_queue(&channel, &queue, arguments, operation, deadline).await?;
        Self::bind_group(&channel, (&queue, &exchange), group, operation, deadline).await?;
        if existed {
            return Ok(Declared::Existed);
        }
        tokio::time::sleep(SETTLES).await;
        Ok(Declared::Created)
    }

    /// How long a delivery of a group's queue may be out.
    pub(crate) fn bounds_deliveries(&self, arguments: &mut FieldTable) {
        let timeout = i64::try_from(self.consumer_timeout.as_millis()).unwrap_or(i64::MAX);
        arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(timeout));
    }

    /// Binds a group's queue, under the group's own name.
    pub(crate) async fn bind_group(
        channel: &Channel,
        (queue, exchange): (&str, &str),
        group: &Group,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<()> {
        let mut own = FieldTable::default();
        own.insert(GROUP.into(), text(group));
        let options = QueueBindOptions::default();
        let binding = channel.queue_bind(queue.into(), exchange.into(), "".into(), options, own);
        bounded(operation, deadline, binding).await
    }

    /// Binds what the group reads to the destination's exchange, as it was when the group was made. A server that is killed again while it
    /// starts may come back without a binding that it had confirmed, and routes nothing to the queue from then on (seen on 4.0.5: the
    /// exchange and the queue were there). Creates nothing: whoever attaches to what is gone is told so.
    pub(crate) async fn bind_again(
        &self,
        destination: &Destination,
        group: &Group,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<()> {
        let exchange = self.names.exchange(destination);
        let channel = self.channel(operation, deadline).await?;
        let bound = match self.queue.is_log() {
            true => Self::bind_stream(&channel, &exchange, operation, deadline).await,
            false => {
                let queue = self.names.queue(destination, group);
                Self::bind_group(&channel, (&queue, &exchange), group, operation, deadline).await
            }
        };
        present(bound).map(drop)
    }

    /// The queue where the members of a group that keep order agree who works: whoever holds a message of it. It has one
    /// active consumer, and goes on to the next when that one goes.
    /// With it the queue of the group's failures, where they are kept; answers whether that was made now.
    pub(crate) async fn ensure_owner(
        &self,
        queue: &str,
        keeps_failures: bool,
        operation: &'static str,
    ) -> Result<bool> {
        let deadline = Instant::now() + REQUEST;
        let mut is_new = self.look(&Names::owner(queue), operation, deadline).await?.is_none();
        self.make_owner(queue, operation, deadline).await?;
        let mut has_none = false;
        if keeps_failures {
            let failures = Names::failures(queue);
            has_none = self.look(&failures, operation, deadline).await?.is_none();
            if has_none {
                let channel = self.channel(operation, deadline).await?;
                Self::make_queue(&channel, &failures, last_one(), operation, deadline).await?;
                is_new = true;
            }
        }
        if is_new {
            tokio::time::sleep(SETTLES).await;
        }
        Ok(has_none)
    }

    pub(crate) async fn make_owner(&self, queue: &str, operation: &'static str, deadline: Instant) -> Result<()> {
        let mut arguments = quorum();
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
        let timeout = i64::from(u32::MAX);
        arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(timeout));
        let channel = self.channel(operation, deadline).await?;
        Self::make_queue(&channel, &Names::owner(queue), arguments, operation, deadline).await
    }

    /// The queue where a message waits for `delay` before it goes on: to the exchange `of`, or to the group's queue `of`.
    pub(crate) async fn ensure_waiting(
        &self,
        of: &str,
        is_exchange: bool,
        delay: Duration,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<String> {
        let name = Names::waiting(of, &Range::of(delay).to_string());
        if self.waiting.lock().contains(&name) {
            return Ok(name);
        }
        let (exchange, routing_key) = if is_exchange { (of, "") } else { ("", of) };
        let existed = self.look(&name, operation, deadline).await?.is_some();
        let channel = self.channel(operation, deadline).await?;
        let arguments = forwarding(quorum(), exchange, routing_key);
        Self::make_queue(&channel, &name, arguments, operation, deadline).await?;
        if !existed {
            tokio::time::sleep(SETTLES).await;
        }
        self.waiting.lock().insert(name.clone());
        Ok(name)
    }

    /// A queue of waiting messages was found missing.
    pub(crate) fn forget_waiting(&self, name: &str) {
        self.waiting.lock().remove(name);
    }

    pub(crate) async fn declare(&self, spec: &TopologySpec) -> Result<Declared> {
        let operation = "declare";
        if let Some(group) = &spec.group {
            return self.ensure_group(&spec.destination, group, spec.start, operation).await;
        }
        let deadline = Instant::now() + REQUEST;
        let existed = self.is_there(&self.names.exchange(&spec.destination), operation, deadline).await?;
        self.ensure(&spec.destination, true, operation, deadline).await?;
        Ok(if existed { Declared::Existed } else { Declared::Created })
    }

    pub(crate) async fn verify(&self, spec: &TopologySpec, operation: &'static str) -> Result<()> {
        self.ensure(&spec.destination, false, operation, Instant::now() + REQUEST).await?;
        match &spec.group {
            Some(group) => self.expect_group(&spec.destination, group, operation).await.map(drop),
            None => Ok(()),
        }
    }

    /// The queue of a group that has to be there, and how much of it is ready.
    pub(crate) async fn expect_group(
        &self,
        destination: &Destination,
        group: &Group,
        operation: &'static str,
    ) -> Result<(String, u64)> {
        let queue = self.names.queue(destination, group);
        match self.look(&queue, operation, Instant::now() + REQUEST).await? {
            Some((ready, _)) => Ok((queue, ready)),
            None => Err(missing(operation, destination, Some(group))),
        }
    }

    fn admin(&self, operation: &'static str) -> Result<&Admin> {
        let absent =
            || Error::unsupported(operation, "AMQP cannot list; set `admin` to the management plugin's address");
        self.admin.as_ref().ok_or_else(absent)
    }

    pub(crate) async fn describe(&self, destination: &Destination) -> Result<Description> {
        let operation = "describe";
        let admin = self.admin(operation)?;
        let exchange = self.names.exchange(destination);
        // The plugin tells no bindings of an exchange that is missing, too.
        self.ensure(destination, false, operation, Instant::now() + REQUEST).await?;
        let is_log = self.queue.is_log();
        let bindings = match is_log {
            true => admin.bindings(operation, &Names::readers(&exchange)).await?.or(Some(Vec::new())),
            false => admin.bindings(operation, &exchange).await?,
        };
        let bindings = bindings.ok_or_else(|| missing(operation, destination, None))?;
        let mut groups = Vec::new();
        for binding in bindings.iter().filter(|binding| binding.destination_type == "queue") {
            // Queues that others bound are no groups of ours.
            let Some(group) = binding.arguments[GROUP].as_str().map(Group::from) else { continue };
            let (lag, letters) = (self.lag(destination, &group, None).await?, Names::letters(&binding.destination));
            let count = self.look(&letters, operation, Instant::now() + REQUEST).await?.map(|(count, _)| count);
            groups.push(GroupDescription {
                group,
                physical: binding.destination.clone(),
                dead_letters: letters,
                dead_letter_count: count,
                lag,
            });
        }
        groups.sort_by(|a, b| a.group.cmp(&b.group));
        let settings = [("exchange", "fanout"), ("queues", self.queue.name())];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        // Each group has messages of its own; the destination itself keeps none.
        Ok(Description {
            destination: destination.clone(),
            physical: exchange,
            groups,
            messages: None,
            settings: BTreeMap::from(settings),
        })
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<Destination>> {
        let exchanges = self.admin("list")?.exchanges("list", &self.names.all_exchanges()).await?;
        let mut found: Vec<Destination> = exchanges.iter().filter_map(|name| self.names.destination(name)).collect();
        found.retain(|name| name.starts_with(prefix));
        found.sort();
        Ok(found)
    }

    pub(crate) async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let operation = "delete";
        let admin = self.admin(operation)?;
        let deadline = Instant::now() + REQUEST;
        let exchange = self.names.exchange(destination);
        // Only what ends like this belongs to it: other names may begin with this one.
        let (mut queues, starts) = match group {
            Some(group) => {
                let queue = self.expect_group(destination, group, operation).await?.0;
                let waiting = Names::waiting(&queue, "");
                let (letters, owner) = (Names::letters(&queue), Names::owner(&queue));
                let others = [letters, owner, Names::progress(&queue), Names::failures(&queue)];
                (std::iter::once(queue).chain(others).collect::<Vec<_>>(), vec![waiting])
            }
            None if self.has_exchange(&exchange, operation, deadline).await? => {
                (Vec::new(), vec![Names::all_groups(&exchange), Names::waiting(&exchange, "")])
            }
            None => return Err(missing(operation, destination, None)),
        };
        for start in starts {
            queues.extend(admin.queues(operation, &start).await?.into_iter().map(|queue| queue.name));
        }
        let channel = self.channel(operation, deadline).await?;
        if group.is_none() {
            // First, so that nothing new comes in.
            let options = ExchangeDeleteOptions::default();
            bounded(operation, deadline, channel.exchange_delete(exchange.as_str().into(), options)).await?;
            if self.queue.is_log() {
                let deleting = channel.exchange_delete(Names::readers(&exchange).as_str().into(), options);
                bounded(operation, deadline, deleting).await?;
                // Last, when no group is there any more that could miss it.
                queues.push(Names::stream(&exchange));
            }
        }
        for queue in queues {
            // One that is missing is no error to the server.
            let request = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default());
            bounded(operation, deadline, request).await?;
            self.forget_waiting(&queue);
        }
        Ok(())
    }

    /// `share` is what a member of this process has of a stream.
    pub(crate) async fn lag(&self, destination: &Destination, group: &Group, share: Option<Share>) -> Result<Lag> {
        let operation = "lag";
        let (queue, mut ready) = self.expect_group(destination, group, operation).await?;
        let mut out = 0;
        if self.queue.is_log() {
            let ahead = self.ahead(&self.names.exchange(destination), &queue, share).await?;
            (ready, out) = (ready + ahead, share.map_or(0, |share| share.out));
        }
        let approximate = |count| Some((count, Precision::Approximate)) as Figure;
        let mut lag = Lag { ready: approximate(ready), ..Lag::default() };
        if let Some(admin) = &self.admin {
            let figures = admin.queue(operation, &queue).await?;
            let unacknowledged = figures.and_then(|figures| figures.messages_unacknowledged).unwrap_or(0);
            lag.in_flight = approximate(unacknowledged + out);
            let mut delayed = 0;
            for waiting in admin.queues(operation, &Names::waiting(&queue, "")).await? {
                let ready = self.look(&waiting.name, operation, Instant::now() + REQUEST).await?;
                delayed += ready.map_or(0, |(ready, _)| ready) + waiting.messages_unacknowledged.unwrap_or(0);
            }
            lag.delayed = approximate(delayed);
        }
        Ok(lag)
    }
}

/// An answer about something that may be missing.
fn present<T>(answer: Result<T>) -> Result<Option<T>> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
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
