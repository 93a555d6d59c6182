//! What a bare client does on RabbitMQ beside the peer.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, LazyLock};

use anybroker_core::naming::{escape, shorten};
use anybroker_core::{Declared, Destination, Error, ErrorKind, Group, Result, TopologySpec};
use lapin::options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use parking_lot::Mutex;

use crate::{disown, failed, is_owner, one_group};

/// The groups that this process has made: AMQP lists no queues.
static GROUPS: LazyLock<Mutex<HashMap<Destination, BTreeSet<String>>>> = LazyLock::new(Mutex::default);

/// One connection, opened anew when it was lost: what a case cuts must not stop what is beside the peer.
pub struct Topology {
    url: String,
    connection: Mutex<Arc<Connection>>,
}

fn token(name: &str) -> String {
    let escaped = escape(name, "=", |byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    if escaped.len() <= 100 { escaped } else { shorten(&escaped, "=", 60, name) }
}

/// The exchange of a destination, or its one queue.
#[must_use]
pub fn exchange(destination: &Destination) -> String {
    format!("peers.{}", token(destination))
}

/// The queue of a group.
#[must_use]
pub fn queue(destination: &Destination, group: &Group) -> String {
    format!("{}.{}", exchange(destination), token(group))
}

impl Topology {
    /// Connects.
    ///
    /// # Errors
    /// What the server or the network says, as with all of these.
    pub async fn connect(url: &str) -> Result<Self> {
        let connection = Mutex::new(Arc::new(Self::open(url).await?));
        Ok(Self { url: url.to_owned(), connection })
    }

    async fn open(url: &str) -> Result<Connection> {
        let connected = Connection::connect(url, ConnectionProperties::default()).await;
        connected.map_err(|error| failed(ErrorKind::Unavailable, "connect", error))
    }

    /// A channel of its own: what is not there closes the channel on which it was asked for.
    async fn channel(&self) -> Result<Channel> {
        let mut connection = Arc::clone(&self.connection.lock());
        if !connection.status().connected() {
            connection = Arc::new(Self::open(&self.url).await?);
            *self.connection.lock() = Arc::clone(&connection);
        }
        connection.create_channel().await.map_err(|error| failed(ErrorKind::Unavailable, "topology", error))
    }

    /// Whether the destination's exchange is there.
    ///
    /// # Errors
    /// See [`connect`](Self::connect).
    pub async fn has_exchange(&self, destination: &Destination) -> Result<bool> {
        let channel = self.channel().await?;
        let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let name = exchange(destination).into();
        found(channel.exchange_declare(name, ExchangeKind::Fanout, options, FieldTable::default()).await)
    }

    /// Whether a queue is there.
    ///
    /// # Errors
    /// See [`connect`](Self::connect).
    pub async fn has_queue(&self, name: &str) -> Result<bool> {
        let channel = self.channel().await?;
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        found(channel.queue_declare(name.into(), options, FieldTable::default()).await)
    }

    /// Creates the destination's exchange.
    ///
    /// # Errors
    /// See [`connect`](Self::connect).
    pub async fn create_exchange(&self, destination: &Destination) -> Result<()> {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let (channel, name) = (self.channel().await?, exchange(destination).into());
        let declared = channel.exchange_declare(name, ExchangeKind::Fanout, options, FieldTable::default()).await;
        declared.map_err(|error| failed(ErrorKind::Unavailable, "declare", error))
    }

    /// Creates a durable queue: a quorum queue whose attempts do not run out, or one without arguments.
    ///
    /// # Errors
    /// See [`connect`](Self::connect).
    pub async fn create_queue(&self, name: &str, is_quorum: bool) -> Result<()> {
        let mut arguments = FieldTable::default();
        if is_quorum {
            arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
            // RabbitMQ 4 drops what was returned more than 20 times; the cases count attempts by themselves.
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(10_000));
        }
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let channel = self.channel().await?;
        let declared = channel.queue_declare(name.into(), options, arguments).await;
        declared.map(drop).map_err(|error| failed(ErrorKind::Unavailable, "declare", error))
    }

    /// Notes a group, so that its queue is deleted with the destination.
    pub fn remember(&self, destination: &Destination, group: &Group) {
        GROUPS.lock().entry(destination.clone()).or_default().insert(queue(destination, group));
    }

    /// Deletes a destination with its groups, or one group.
    ///
    /// # Errors
    /// See [`connect`](Self::connect).
    pub async fn delete(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        let channel = self.channel().await?;
        let queues = match group {
            Some(group) => BTreeSet::from([queue(destination, group)]),
            None => GROUPS.lock().remove(destination).unwrap_or_default(),
        };
        let failed = |error| failed(ErrorKind::Unavailable, "delete", error);
        for name in queues {
            for name in [format!("{name}.retry"), name] {
                channel.queue_delete(name.into(), QueueDeleteOptions::default()).await.map_err(failed)?;
            }
        }
        if group.is_none() {
            let deleted = channel.exchange_delete(exchange(destination).into(), ExchangeDeleteOptions::default());
            deleted.await.map_err(failed)?;
        }
        Ok(())
    }

    /// Creates the one queue of a destination, where it is missing.
    ///
    /// # Errors
    /// `Unsupported` for a second group; else see [`connect`](Self::connect).
    pub async fn declare_one(&self, spec: &TopologySpec, is_quorum: bool) -> Result<Declared> {
        if let Some(group) = &spec.group {
            one_group(&spec.destination, group, "declare")?;
        }
        let name = exchange(&spec.destination);
        if self.has_queue(&name).await? {
            return Ok(Declared::Existed);
        }
        self.create_queue(&name, is_quorum).await?;
        Ok(Declared::Created)
    }

    /// Looks whether the one queue of a destination is there, and is the group's.
    ///
    /// # Errors
    /// `NotFound`; else see [`connect`](Self::connect).
    pub async fn verify_one(&self, spec: &TopologySpec) -> Result<()> {
        let is_groups = |group: &Group| is_owner(&spec.destination, group);
        let has_queue = self.has_queue(&exchange(&spec.destination)).await?;
        if has_queue && spec.group.as_ref().is_none_or(is_groups) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::NotFound, "verify", "there is no such queue"))
    }

    /// Deletes the one queue of a destination.
    ///
    /// # Errors
    /// `NotFound`; else see [`connect`](Self::connect).
    pub async fn delete_one(&self, destination: &Destination, group: Option<&Group>) -> Result<()> {
        self.verify_one(&TopologySpec { group: group.cloned(), ..TopologySpec::destination(destination) }).await?;
        disown(destination);
        self.delete_queue(&exchange(destination)).await
    }

    async fn delete_queue(&self, name: &str) -> Result<()> {
        let channel = self.channel().await?;
        let deleted = channel.queue_delete(name.into(), QueueDeleteOptions::default()).await;
        deleted.map(drop).map_err(|error| failed(ErrorKind::Unavailable, "delete", error))
    }

    /// Closes the connection.
    pub async fn close(&self) {
        let connection = Arc::clone(&self.connection.lock());
        let _ = connection.close(200, "OK".into()).await;
    }
}

fn found<T>(answer: lapin::Result<T>) -> Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(error) => match error.kind() {
            lapin::ErrorKind::ProtocolError(told) if told.get_id() == 404 => Ok(false),
            _ => Err(failed(ErrorKind::Unavailable, "topology", error)),
        },
    }
}
