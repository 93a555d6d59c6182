//! One connection to one broker: frames out, answers and messages in.
//!
//! Pulsar's binary protocol is spoken here, with the client library's frames and codec. The library's own consumers and
//! producers are not used: they cannot ask for receipts of acks (they connect as protocol version 12, receipts came with
//! 17), hide the redelivery count and grant permits of their own accord, ack a whole batch with one of its messages
//! (pulsar-rs #428), stop for good when a reconnect fails once (#263, #156, #118), and hold acks back while nobody reads
//! (#189).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Login, Result};
use bytes::BytesMut;
use futures_util::StreamExt;
use parking_lot::Mutex;
use pulsar::message::{Codec, Message, Payload};
use pulsar::proto::{self, BaseCommand, MessageIdData, base_command::Type};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_rustls::TlsConnector;
use tokio_util::codec::{Encoder, FramedRead};

use crate::config::{Settings, token};
use crate::error::{lost, refused};
use crate::producer::Producer;

/// The first protocol version in which brokers keep to everything that is asked for here (PulsarApi.proto).
const PROTOCOL: i32 = 19;
/// A connection on which nothing came for that long is asked whether it is alive.
const QUIET: Duration = Duration::from_secs(4);
/// So often it may be asked in vain.
const UNANSWERED: u32 = 3;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What comes for a consumer.
pub(crate) enum Inbound {
    Message(Box<Arrived>),
    /// The broker has closed it: the topic moves, is unloaded or deleted.
    Closed,
}

/// A message as the broker sent it.
pub(crate) struct Arrived {
    pub(crate) id: MessageIdData,
    pub(crate) payload: Payload,
    /// Of a batch: the messages that are not acked yet, as bits; empty for all.
    pub(crate) ack_set: Vec<i64>,
}

/// What the broker said when it was connected to.
pub(crate) struct Hello {
    pub(crate) server: String,
    pub(crate) max_message: u64,
}

/// One connection.
pub(crate) struct Conn {
    out: Mutex<BytesMut>,
    written: Notify,
    /// `None` once it is closed.
    requests: Mutex<Option<HashMap<u64, oneshot::Sender<BaseCommand>>>>,
    consumers: Mutex<HashMap<u64, mpsc::UnboundedSender<Inbound>>>,
    /// The broker has closed one.
    consumer_closed: Notify,
    producers: Mutex<HashMap<u64, Arc<Producer>>>,
    ids: AtomicU64,
    closed: watch::Sender<bool>,
    login: Option<Login>,
}

impl Conn {
    /// Connects to `address` (`host:port`); `through` names the broker behind a proxy.
    pub(crate) async fn open(
        settings: &Settings,
        address: &str,
        through: Option<String>,
    ) -> Result<(Arc<Self>, Hello)> {
        let opening = Self::open_now(settings, address, through);
        match tokio::time::timeout(settings.connect_timeout, opening).await {
            Ok(opened) => opened.map_err(|error| settings.passing(error).with("broker", address)),
            Err(_) => {
                let text = format!("no connection within {:?}", settings.connect_timeout);
                Err(Error::new(ErrorKind::Unavailable, "connect", text).with("broker", address))
            }
        }
    }

    async fn open_now(settings: &Settings, address: &str, through: Option<String>) -> Result<(Arc<Self>, Hello)> {
        let unreachable = |error: &std::io::Error| {
            let kind = if is_untrusted(error) { ErrorKind::Unauthenticated } else { ErrorKind::Unavailable };
            Error::new(kind, "connect", error.to_string())
        };
        let tcp = TcpStream::connect(address).await.map_err(|error| unreachable(&error))?;
        let _ = tcp.set_nodelay(true);
        let stream: Box<dyn Stream> = if settings.tls {
            let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
            let name = rustls::pki_types::ServerName::try_from(host.to_owned()).map_err(|_| {
                Error::new(ErrorKind::ConfigInvalid, "connect", "the host is no name for a certificate")
            })?;
            let connector = TlsConnector::from(Arc::new(settings.tls()?));
            Box::new(connector.connect(name, tcp).await.map_err(|error| unreachable(&error))?)
        } else {
            Box::new(tcp)
        };
        let token = match &settings.login {
            Some(login) => Some(token(login.again().await?)?),
            None => None,
        };
        let (read, mut write) = tokio::io::split(stream);
        let mut read = FramedRead::with_capacity(read, Codec, 65_536);
        let mut first = BytesMut::new();
        let hello = proto::CommandConnect {
            client_version: concat!("anybroker-", env!("CARGO_PKG_VERSION")).to_owned(),
            auth_method_name: token.as_ref().map(|_| "token".to_owned()),
            auth_data: token.as_ref().map(|token| token.reveal().as_bytes().to_vec()),
            protocol_version: Some(PROTOCOL),
            proxy_to_broker_url: through,
            // Without it the broker ends the connection when the token has expired (ServerCnx.refreshAuthenticationCredentials).
            feature_flags: Some(proto::FeatureFlags { supports_auth_refresh: Some(true), ..Default::default() }),
            ..Default::default()
        };
        let command = BaseCommand { connect: Some(hello), ..command(Type::Connect) };
        encode(command, None, &mut first)?;
        write.write_all(&first).await.map_err(|error| unreachable(&error))?;
        let answer = match read.next().await {
            Some(Ok(answer)) => answer.command,
            Some(Err(error)) => return Err(Error::new(ErrorKind::Unavailable, "connect", error.to_string())),
            None => {
                let text = "the broker ended the connection at once: no Pulsar, or encrypted where this is not";
                return Err(Error::new(ErrorKind::Unavailable, "connect", text));
            }
        };
        if let Some(error) = answer.error {
            return Err(refused("connect", error.error, &error.message));
        }
        let Some(connected) = answer.connected else {
            return Err(Error::new(ErrorKind::Unexpected, "connect", "the broker did not answer as a Pulsar broker"));
        };
        if connected.protocol_version() < 17 {
            let text = "the broker confirms no acks; Pulsar 2.8 or later is needed";
            return Err(Error::unsupported("connect", text).with("server", connected.server_version));
        }
        let hello = Hello {
            max_message: u64::try_from(connected.max_message_size()).ok().filter(|max| *max > 0).unwrap_or(5_242_880),
            server: connected.server_version,
        };
        let conn = Arc::new(Self::new(settings.login.clone()));
        tokio::spawn(write_all(Arc::clone(&conn), write));
        tokio::spawn(read_all(Arc::clone(&conn), read));
        Ok((conn, hello))
    }

    /// What it is told is kept until somebody writes it.
    pub(crate) fn new(login: Option<Login>) -> Self {
        Self {
            out: Mutex::new(BytesMut::new()),
            written: Notify::new(),
            requests: Mutex::new(Some(HashMap::new())),
            consumers: Mutex::default(),
            consumer_closed: Notify::new(),
            producers: Mutex::default(),
            ids: AtomicU64::new(1),
            closed: watch::Sender::new(false),
            login,
        }
    }

    /// A number that no other request, consumer or producer of this connection has.
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Resolves when the connection has ended.
    pub(crate) async fn ended(&self) {
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// Queues a command.
    pub(crate) fn tell(&self, command: BaseCommand) {
        self.send(command, None);
    }

    /// Queues a frame. What the broker never gets, because the connection ends, is answered by that end.
    pub(crate) fn send(&self, command: BaseCommand, payload: Option<Payload>) {
        if encode(command, payload, &mut self.out.lock()).is_err() {
            // Only a message that cannot be written as protobuf, which memory ends before.
            self.close();
        }
        self.written.notify_one();
    }

    /// Asks, and waits for the answer; `make` is given the number of the request. The caller bounds the time.
    pub(crate) async fn ask(
        &self,
        operation: &'static str,
        make: impl FnOnce(u64) -> BaseCommand,
    ) -> Result<BaseCommand> {
        let id = self.next_id();
        let (sender, answer) = oneshot::channel();
        match self.requests.lock().as_mut() {
            Some(requests) => drop(requests.insert(id, sender)),
            None => return Err(lost(operation)),
        }
        self.tell(make(id));
        let answer = answer.await.map_err(|_| lost(operation))?;
        match answer.error {
            Some(error) => Err(refused(operation, error.error, &error.message)),
            None => Ok(answer),
        }
    }

    pub(crate) fn add_consumer(&self, id: u64) -> mpsc::UnboundedReceiver<Inbound> {
        // Bounded by the permits that are granted.
        let (sender, receiver) = mpsc::unbounded_channel();
        self.consumers.lock().insert(id, sender);
        if self.is_closed() {
            self.consumers.lock().remove(&id);
        }
        receiver
    }

    /// Whether it is there still, as far as is known here.
    pub(crate) fn has_consumer(&self, id: u64) -> bool {
        !self.is_closed() && self.consumers.lock().contains_key(&id)
    }

    /// Resolves when the broker has closed that consumer.
    pub(crate) async fn consumer_lost(&self, id: u64) {
        loop {
            let closed = self.consumer_closed.notified();
            if !self.has_consumer(id) {
                return;
            }
            closed.await;
        }
    }

    /// Subscribes to a topic that must exist. The caller bounds the time.
    pub(crate) async fn subscribe(&self, operation: &'static str, consumer: proto::CommandSubscribe) -> Result<()> {
        let subscribe = |request_id| BaseCommand {
            subscribe: Some(proto::CommandSubscribe { request_id, force_topic_creation: Some(false), ..consumer }),
            ..command(Type::Subscribe)
        };
        self.ask(operation, subscribe).await.map(drop)
    }

    /// Ends a consumer: what it has not acked goes back at once.
    pub(crate) async fn close_consumer(&self, consumer_id: u64) -> Result<()> {
        self.consumers.lock().remove(&consumer_id);
        let close = |request_id| BaseCommand {
            close_consumer: Some(proto::CommandCloseConsumer { consumer_id, request_id }),
            ..command(Type::CloseConsumer)
        };
        self.ask("close", close).await.map(drop)
    }

    /// Ends a consumer that nobody waits for.
    pub(crate) fn abandon_consumer(&self, consumer_id: u64) {
        self.consumers.lock().remove(&consumer_id);
        let request_id = self.next_id();
        self.tell(BaseCommand {
            close_consumer: Some(proto::CommandCloseConsumer { consumer_id, request_id }),
            ..command(Type::CloseConsumer)
        });
    }

    pub(crate) fn add_producer(&self, id: u64, producer: &Arc<Producer>) {
        self.producers.lock().insert(id, Arc::clone(producer));
    }

    /// Whether it is there still, as far as is known here.
    pub(crate) fn has_producer(&self, id: u64) -> bool {
        !self.is_closed() && self.producers.lock().contains_key(&id)
    }

    /// Ends a producer that is not needed any more. Nobody waits for it.
    pub(crate) fn close_producer(&self, producer_id: u64) {
        if self.producers.lock().remove(&producer_id).is_some() {
            let request_id = self.next_id();
            self.tell(BaseCommand {
                close_producer: Some(proto::CommandCloseProducer { producer_id, request_id }),
                ..command(Type::CloseProducer)
            });
        }
    }

    /// Ends the connection and everything that waits for it.
    pub(crate) fn close(&self) {
        self.closed.send_replace(true);
        self.requests.lock().take();
        self.consumers.lock().clear();
        let producers = std::mem::take(&mut *self.producers.lock());
        for (id, producer) in producers {
            producer.cut(id, &lost("publish"));
        }
        self.written.notify_one();
    }

    pub(crate) fn take_in(self: &Arc<Self>, message: Message) {
        let Message { command: came, payload } = message;
        match Type::try_from(came.r#type) {
            Ok(Type::Message) => {
                let (Some(message), Some(payload)) = (came.message, payload) else { return };
                let arrived = Box::new(Arrived { id: message.message_id, payload, ack_set: message.ack_set });
                if let Some(consumer) = self.consumers.lock().get(&message.consumer_id) {
                    let _ = consumer.send(Inbound::Message(arrived));
                }
            }
            Ok(Type::SendReceipt) => {
                let Some(receipt) = came.send_receipt else { return };
                let producer = self.producers.lock().get(&receipt.producer_id).cloned();
                if let Some(producer) = producer {
                    producer.stored(receipt.producer_id, receipt.sequence_id, receipt.message_id.as_ref());
                }
            }
            Ok(Type::SendError) => {
                let Some(error) = came.send_error else { return };
                let producer = self.producers.lock().get(&error.producer_id).cloned();
                if let Some(producer) = producer {
                    let why = refused("publish", error.error, &error.message);
                    producer.refused(error.producer_id, error.sequence_id, &why);
                }
            }
            Ok(Type::CloseProducer) => {
                let Some(close) = came.close_producer else { return };
                let closed = self.producers.lock().remove(&close.producer_id);
                if let Some(producer) = closed {
                    let text = "the broker closed the producer (its topic moves or was deleted) before it confirmed";
                    let why = Error::new(ErrorKind::Unavailable, "publish", text);
                    producer.cut(close.producer_id, &why.with_effect(anybroker_core::Effect::Unknown));
                }
            }
            Ok(Type::CloseConsumer) => {
                let Some(close) = came.close_consumer else { return };
                let closed = self.consumers.lock().remove(&close.consumer_id);
                if let Some(consumer) = closed {
                    let _ = consumer.send(Inbound::Closed);
                    self.consumer_closed.notify_waiters();
                }
            }
            Ok(Type::Ping) => {
                self.tell(BaseCommand { pong: Some(proto::CommandPong {}), ..command(Type::Pong) });
            }
            Ok(Type::AuthChallenge) => self.authenticate_again(),
            _ => self.answered(came),
        }
    }

    fn answered(&self, came: BaseCommand) {
        let id = came
            .success
            .as_ref()
            .map(|answer| answer.request_id)
            .or(came.error.as_ref().map(|answer| answer.request_id))
            .or(came.producer_success.as_ref().map(|answer| answer.request_id))
            .or(came.lookup_topic_response.as_ref().map(|answer| answer.request_id))
            .or(came.get_last_message_id_response.as_ref().map(|answer| answer.request_id))
            .or(came.ack_response.as_ref().and_then(|answer| answer.request_id));
        let Some(id) = id else { return };
        let waiting = self.requests.lock().as_mut().and_then(|requests| requests.remove(&id));
        if let Some(waiting) = waiting {
            let _ = waiting.send(came);
        }
    }

    /// What was shown has expired. Where there is nothing else to show the broker ends the connection.
    fn authenticate_again(self: &Arc<Self>) {
        let conn = Arc::clone(self);
        tokio::spawn(async move {
            let shown = match &conn.login {
                Some(login) => login.again().await.and_then(token).map(Some),
                None => Ok(None),
            };
            let shown = shown.inspect_err(|error| tracing::warn!(%error, "the broker asked for new credentials"));
            let data = shown.ok().flatten().map(|token| proto::AuthData {
                auth_method_name: Some("token".to_owned()),
                auth_data: Some(token.reveal().as_bytes().to_vec()),
            });
            let answer =
                proto::CommandAuthResponse { response: data, protocol_version: Some(PROTOCOL), ..Default::default() };
            conn.tell(BaseCommand { auth_response: Some(answer), ..command(Type::AuthResponse) });
        });
    }
}

/// A command of that type, to be filled.
pub(crate) fn command(kind: Type) -> BaseCommand {
    BaseCommand { r#type: kind as i32, ..Default::default() }
}

fn encode(command: BaseCommand, payload: Option<Payload>, into: &mut BytesMut) -> Result<()> {
    let written = Codec.encode(Message { command, payload }, into);
    written.map_err(|error| Error::new(ErrorKind::Unexpected, "send", error.to_string()))
}

/// Whether it is the broker's certificate that is wrong.
pub(crate) fn is_untrusted(error: &std::io::Error) -> bool {
    let Some(inner) = error.get_ref() else { return false };
    match inner.downcast_ref::<std::io::Error>() {
        // hyper-rustls wraps the error of the handshake in another one.
        Some(wrapped) => is_untrusted(wrapped),
        None => matches!(inner.downcast_ref(), Some(rustls::Error::InvalidCertificate(_))),
    }
}

/// Writes what is queued, everything at once, until the connection ends.
async fn write_all(conn: Arc<Conn>, mut write: impl AsyncWrite + Unpin) {
    let mut taken = BytesMut::new();
    loop {
        std::mem::swap(&mut taken, &mut *conn.out.lock());
        if taken.is_empty() {
            if conn.is_closed() {
                break;
            }
            conn.written.notified().await;
            continue;
        }
        let done = tokio::select! {
            biased;
            done = write.write_all(&taken) => done.is_ok(),
            () = conn.ended() => false,
        };
        if !done {
            break;
        }
        taken.clear();
    }
    conn.close();
    let _ = tokio::time::timeout(Duration::from_secs(1), write.shutdown()).await;
}

async fn read_all(conn: Arc<Conn>, mut read: FramedRead<impl AsyncRead + Unpin, Codec>) {
    let mut unanswered = 0;
    loop {
        let came = tokio::select! {
            came = tokio::time::timeout(QUIET, read.next()) => came,
            () = conn.ended() => break,
        };
        match came {
            Ok(Some(Ok(message))) => {
                unanswered = 0;
                conn.take_in(message);
            }
            Ok(Some(Err(error))) => {
                tracing::warn!(%error, "a frame of the broker cannot be read; connecting anew");
                break;
            }
            Ok(None) => break,
            Err(_) if unanswered == UNANSWERED => break,
            Err(_) => {
                unanswered += 1;
                conn.tell(BaseCommand { ping: Some(proto::CommandPing {}), ..command(Type::Ping) });
            }
        }
    }
    conn.close();
}
