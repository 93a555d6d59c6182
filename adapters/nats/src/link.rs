//! The connection: the client, whether it is connected, what the server refuses, and the board of answers.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Result};
use async_nats::{Client, ClientError, Event, ServerError};
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::authentication::Authentication;
use crate::board::Board;
use crate::config::Settings;
use crate::denials::Denials;
use crate::error::unconnected;

/// How often batches that nobody waits for are forgotten.
const SWEEP: Duration = Duration::from_secs(5);
/// How long a connection without its subscriptions waits before it is made anew. Who may not subscribe is refused again then.
const DEAF: Duration = Duration::from_secs(1);
/// Answers that are noted together.
const AT_ONCE: usize = 128;

/// What a future answers that is ready at once as a rule; `None` at the deadline. A timer is made only for one that is not.
pub(crate) async fn by<F: Future>(deadline: Instant, future: F) -> Option<F::Output> {
    tokio::pin!(future);
    let now = std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context)));
    if let Poll::Ready(output) = now.await {
        return Some(output);
    }
    tokio::time::timeout_at(deadline, future).await.ok()
}

/// Whether the connection stands. The epoch counts how often it was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) epoch: u64,
    pub(crate) is_connected: bool,
}

/// One connection to a server or cluster.
pub(crate) struct Link {
    pub(crate) client: Client,
    pub(crate) board: Arc<Board>,
    pub(crate) denials: Arc<Denials>,
    pub(crate) authentication: Arc<Authentication>,
    pub(crate) state: watch::Receiver<State>,
    listener: JoinHandle<()>,
}

impl Link {
    pub(crate) async fn connect(settings: &Settings) -> Result<Self> {
        let connecting = Self::connect_to_any(settings);
        // The client's own limit is for each server and address.
        let connected = tokio::time::timeout(settings.connect_timeout, connecting).await.unwrap_or_else(|_| {
            let text = format!("no server answered as it should within {:?}", settings.connect_timeout);
            Err(Error::new(ErrorKind::Timeout, "connect", text))
        });
        connected.map_err(|error| error.with_effect(anybroker_core::Effect::NotDone).with("url", &settings.url))
    }

    async fn connect_to_any(settings: &Settings) -> Result<Self> {
        let (sender, state) = watch::channel(State { epoch: 0, is_connected: true });
        let sender = Arc::new(sender);
        let noticed_state = Arc::clone(&sender);
        let denials = Arc::new(Denials::default());
        // Its inbox is only known once it is connected.
        let noticed: Arc<OnceLock<Arc<Board>>> = Arc::default();
        let (denied, boards) = (Arc::clone(&denials), Arc::clone(&noticed));
        let deaf = Arc::new(Notify::new());
        let is_deaf = Arc::clone(&deaf);
        let authentication = Authentication::new(settings.login.clone());
        authentication.first().await?;
        let (noticed_login, told_login) = (Arc::clone(&authentication), Arc::clone(&authentication));
        let options = settings.options(&authentication).await?.event_callback(move |event| {
            let (sender, denied, boards) = (Arc::clone(&sender), Arc::clone(&denied), Arc::clone(&boards));
            let (is_deaf, authentication) = (Arc::clone(&is_deaf), Arc::clone(&told_login));
            async move {
                match event {
                    Event::Disconnected => sender.send_modify(|state| {
                        *state = State { epoch: state.epoch + 1, is_connected: false };
                    }),
                    Event::Connected => {
                        authentication.accepted();
                        sender.send_modify(|state| state.is_connected = true);
                    }
                    Event::ClientError(ClientError::Other(text)) => authentication.note(&text),
                    Event::ServerError(ServerError::Other(text)) => {
                        tracing::debug!(%text, "nats");
                        match (denied.note(&text), boards.get()) {
                            (Some((true, subject)), Some(board)) => board.deny(&subject),
                            (Some((false, _)), _) => is_deaf.notify_one(),
                            _ => {}
                        }
                    }
                    // A dropped answer leaves an outcome unknown, a dropped delivery comes again; both are rare.
                    event => tracing::debug!(%event, "nats"),
                }
            }
        });
        let hosts: Vec<String> = settings.hosts.iter().map(|host| format!("nats://{host}")).collect();
        let client = options.skip_subject_validation(true).connect(hosts).await;
        let client = client.map_err(|error| unconnected(&error))?;
        let inbox = client.new_inbox();
        let subscribed = client.subscribe(format!("{inbox}.>")).await;
        let mut answers =
            subscribed.map_err(|error| Error::new(ErrorKind::Unavailable, "connect", error.to_string()))?;
        let board = Arc::new(Board::new(inbox));
        let _ = noticed.set(Arc::clone(&board));
        let (noted, connection) = (Arc::clone(&board), client.clone());
        let listener = tokio::spawn(async move {
            let mut sweep = tokio::time::interval(SWEEP);
            let mut came = Vec::with_capacity(AT_ONCE);
            let mut renewed_at = None;
            loop {
                tokio::select! {
                    () = deaf.notified() => {
                        renewed_at.get_or_insert(Instant::now() + DEAF);
                    }
                    // When a permission is taken back, the server ends subscriptions for good (nats-server, client.go,
                    // `removeUnauthorizedSubs`), also that on which the client waits for all answers. With the permission back
                    // again only a new connection subscribes anew.
                    () = tokio::time::sleep_until(renewed_at.unwrap_or_else(Instant::now)), if renewed_at.is_some() => {
                        renewed_at = None;
                        let _ = connection.force_reconnect().await;
                    }
                    answer = answers.next() => {
                        let Some(answer) = answer else { return };
                        came.push(answer);
                        while came.len() < AT_ONCE
                            && let Some(Some(answer)) = answers.next().now_or_never()
                        {
                            came.push(answer);
                        }
                        noted.note(&mut came);
                    }
                    _ = sweep.tick() => {
                        noted.sweep();
                        // The client drops events when there are too many of them (async-nats 0.51, `try_send`).
                        let is_connected = connection.connection_state() == async_nats::connection::State::Connected;
                        if is_connected {
                            noticed_login.accepted();
                        }
                        noticed_state.send_if_modified(|state| {
                            is_connected && !std::mem::replace(&mut state.is_connected, true)
                        });
                    }
                }
            }
        });
        Ok(Self { client, board, denials, authentication, state, listener })
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.state.borrow().is_connected
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.listener.abort();
    }
}
