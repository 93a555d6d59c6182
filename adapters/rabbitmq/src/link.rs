//! A connection that is made anew when it is lost.
//!
//! The client's own recovery is not used: it replays consumers and pending confirms by itself (lapin #312, #364, #416), and
//! two recoveries would register a consumer twice. Here a lost connection is gone with all its channels, and whoever needs
//! one asks for the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anybroker_core::{Credentials, Effect, Error, ErrorKind, Result, Retry, Secret};
use futures_util::StreamExt;
use lapin::uri::{AMQPUri, AMQPUserInfo};
use lapin::{Channel, Connection, ConnectionProperties, Event};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout, timeout_at};

use crate::config::Settings;
use crate::credentials::{refused, unprovided, user_and_password};
use crate::error::{failed, late, unconnected};
use crate::renewal::renew;

/// How soon a failed connection is tried again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// How long a server that was started anew may route to less than it has. Not a figure of the documentation: twice, in some hundreds
/// of restarts of 4.0.5, one message found no queue in the first half second.
const YOUNG: Duration = Duration::from_secs(10);

/// How long an address that did not answer is asked whether anybody listens there.
const ASKED: Duration = Duration::from_millis(500);

/// One connection, at a time.
pub(crate) struct Link {
    settings: Arc<Settings>,
    current: Mutex<Option<Arc<Connection>>>,
    /// When a lost one was made anew.
    renewed: parking_lot::Mutex<Option<Instant>>,
    /// Why there is none, where the last attempt failed.
    trouble: parking_lot::Mutex<Option<Error>>,
    is_closed: AtomicBool,
    was_connected: AtomicBool,
}

impl Link {
    pub(crate) fn new(settings: Arc<Settings>) -> Self {
        Self {
            settings,
            current: Mutex::default(),
            renewed: parking_lot::Mutex::default(),
            trouble: parking_lot::Mutex::default(),
            is_closed: AtomicBool::new(false),
            was_connected: AtomicBool::new(false),
        }
    }

    /// Whether a lost connection was made anew a moment ago, so that its server may have been started just now.
    pub(crate) fn is_young(&self) -> bool {
        self.renewed.lock().is_some_and(|at| at.elapsed() < YOUNG)
    }

    /// The connection, made if there is none. One attempt.
    pub(crate) async fn connection(&self, operation: &'static str, deadline: Instant) -> Result<Arc<Connection>> {
        let Ok(mut current) = timeout_at(deadline, self.current.lock()).await else {
            // Somebody else is still about it.
            let trouble = self.trouble.lock();
            return Err(trouble.as_ref().map_or_else(|| late(operation), Error::duplicate));
        };
        if self.is_closed.load(Ordering::Acquire) {
            return Err(Error::closed(operation));
        }
        if let Some(connection) = current.as_ref().filter(|connection| connection.status().connected()) {
            return Ok(Arc::clone(connection));
        }
        *current = None;
        let connected = self.connect(operation, deadline).await;
        let (connection, token) = noted(&mut self.trouble.lock(), connected, deadline)?;
        let connection = Arc::new(connection);
        if let Some(token) = token {
            tokio::spawn(renew(Arc::downgrade(&connection), self.settings.login.clone(), token));
        }
        if self.was_connected.swap(true, Ordering::AcqRel) {
            *self.renewed.lock() = Some(Instant::now());
        }
        *current = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// Answers the token too, where one was shown.
    async fn connect(&self, operation: &'static str, deadline: Instant) -> Result<(Connection, Option<Secret>)> {
        let addresses = self.settings.addresses();
        let deadline = deadline.min(Instant::now() + self.settings.connect_timeout);
        let (mut last, mut left) = (None, u32::try_from(addresses.len()).unwrap_or(1));
        for mut address in addresses {
            let credentials = self.credentials(operation, deadline).await?;
            let (username, password) = user_and_password(&credentials).map_err(|error| unprovided(operation, error))?;
            address.authority.userinfo = AMQPUserInfo { username, password: password.reveal().to_owned() };
            // A host that does not answer must not use up the time of the others.
            let share = deadline.saturating_duration_since(Instant::now()) / left.max(1);
            left = left.saturating_sub(1);
            let host = format!("{}:{}", address.authority.host, address.authority.port);
            let error = match timeout(share, self.reach(address)).await {
                Ok(Ok(connection)) => {
                    let token = matches!(credentials, Credentials::Token(_)).then_some(password);
                    return Ok((connection, token));
                }
                Ok(Err(error)) => error,
                Err(_) => unanswered(&host, share).await,
            };
            last = Some(refused(&self.settings.login, operation, error).with("host", host));
        }
        Err(last.unwrap_or_else(|| Error::new(ErrorKind::ConfigInvalid, "connect", "no host is configured")))
    }

    /// Asked anew for each connection. Where there is no answer, there is none for another host either.
    async fn credentials(&self, operation: &'static str, deadline: Instant) -> Result<Credentials> {
        let told = timeout_at(deadline, self.settings.login.now()).await.unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Timeout, operation, "the provider of the credentials gave no answer in time"))
        });
        told.map_err(|error| unprovided(operation, error))
    }

    async fn reach(&self, address: AMQPUri) -> Result<Connection> {
        let tls = self.settings.tls().await?;
        let properties = ConnectionProperties::default().with_connection_name("anybroker".into());
        let runtime = lapin::runtime::default_runtime().map_err(|error| unconnected(&error))?;
        Connection::connect_uri_with_config(address, properties, tls, runtime)
            .await
            .map_err(|error| unconnected(&error))
    }

    /// Whether the server may be shown something else by the next connection.
    pub(crate) fn may_change_login(&self) -> bool {
        self.settings.login.may_change()
    }

    /// A new channel. One attempt.
    pub(crate) async fn channel(&self, operation: &'static str, deadline: Instant) -> Result<Channel> {
        let connection = self.connection(operation, deadline).await?;
        // Every request has a deadline: on a connection that ends, the client may leave one unanswered (lapin #246, #409).
        match timeout_at(deadline, connection.create_channel()).await {
            Err(_) => Err(late(operation)),
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(failed(operation, &error)),
        }
    }

    /// A new channel, tried until the deadline while the server cannot be reached.
    pub(crate) async fn channel_until(&self, operation: &'static str, deadline: Instant) -> Result<Channel> {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.channel(operation, deadline).await {
                Err(error) if passes(&error) && Instant::now() + pause < deadline => tokio::time::sleep(pause).await,
                other => return other,
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Whether the server has stopped taking messages from this connection (memory or disk alarm).
    pub(crate) async fn is_blocked(&self) -> bool {
        self.current.lock().await.as_ref().is_some_and(|connection| connection.status().blocked())
    }

    /// Closes it for good.
    pub(crate) async fn close(&self, deadline: Instant) {
        self.is_closed.store(true, Ordering::Release);
        let connection = self.current.lock().await.take();
        if let Some(connection) = connection.filter(|connection| connection.status().connected()) {
            // What was on its way has been waited for; a server that does not answer gives everything back anyway.
            let _ = timeout_at(deadline, end(&connection)).await;
        }
    }
}

/// Closes a connection, or sees that it ends by itself. A channel that was dropped right before is closed by the client as
/// well; where the connection's close comes first, the client takes that for an error of the connection ("invalid channel state:
/// Closing", lapin 4.12, `InternalRPC::register_internal_future`), and the close had no answer.
async fn end(connection: &Connection) {
    let failing = connection.events_listener().any(|event| async move { matches!(event, Event::Error(_)) });
    tokio::select! {
        _ = connection.close(200, "closed".into()) => {}
        _ = failing => {}
    }
}

/// Why nothing came from an address. Where nobody listens the client may stay silent: its thread that dials can fail before the
/// request that waits for it is there, which is then never answered (lapin 4.12, `IoLoop::start` and `Connection::start`). So the
/// address is asked once more.
async fn unanswered(host: &str, share: Duration) -> Error {
    let (kind, text) = match timeout(ASKED, TcpStream::connect(host)).await {
        Ok(Err(error)) => (ErrorKind::Unavailable, error.to_string()),
        _ => (ErrorKind::Timeout, format!("no answer within {share:?}")),
    };
    Error::new(kind, "connect", text).with_effect(Effect::NotDone)
}

/// Keeps why an attempt failed. One that was cut short by the deadline tells less than the one before it.
fn noted<T>(trouble: &mut Option<Error>, attempt: Result<T>, deadline: Instant) -> Result<T> {
    match (&attempt, &*trouble) {
        (Err(error), Some(before)) if error.kind() == ErrorKind::Timeout && Instant::now() >= deadline => {
            Err(before.duplicate())
        }
        _ => {
            *trouble = attempt.as_ref().err().map(Error::duplicate);
            attempt
        }
    }
}

/// Whether the same attempt may succeed later.
pub(crate) fn passes(error: &Error) -> bool {
    match error.kind() {
        ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::RateLimited => true,
        ErrorKind::Unauthenticated => matches!(error.retry(), Retry::Later(_)),
        _ => false,
    }
}

/// Bounds one request of the client's.
pub(crate) async fn bounded<T>(
    operation: &'static str,
    deadline: Instant,
    request: impl Future<Output = lapin::Result<T>>,
) -> Result<T> {
    match timeout_at(deadline, request).await {
        Err(_) => Err(late(operation)),
        Ok(answer) => answer.map_err(|error| failed(operation, &error)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn an_attempt_that_is_cut_short_says_why_the_one_before_it_failed() {
        let (past, future) = (Instant::now(), Instant::now() + ASKED * 20);
        let mut trouble = None;
        let mut kind =
            |attempt: Result<()>, deadline| noted(&mut trouble, attempt, deadline).map_err(|error| error.kind());
        let refused = || Err(Error::new(ErrorKind::Unauthenticated, "connect", "no"));
        assert_eq!(kind(Err(late("publish")), past), Err(ErrorKind::Timeout));
        assert_eq!(kind(refused(), future), Err(ErrorKind::Unauthenticated));
        assert_eq!(kind(Err(late("publish")), past), Err(ErrorKind::Unauthenticated));
        // A whole attempt is another reason.
        assert_eq!(kind(Err(late("publish")), future), Err(ErrorKind::Timeout));
        assert_eq!(kind(Ok(()), future), Ok(()));
        assert!(trouble.is_none());
    }

    #[tokio::test]
    async fn an_address_where_nobody_listens_is_unavailable_and_one_that_is_silent_is_late() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = listener.local_addr().unwrap().to_string();
        let of_silence = unanswered(&silent, ASKED).await;
        assert_eq!((of_silence.kind(), of_silence.effect()), (ErrorKind::Timeout, Effect::NotDone), "{of_silence:?}");
        let of_nobody = unanswered("127.0.0.1:1", ASKED).await;
        assert_eq!((of_nobody.kind(), of_nobody.effect()), (ErrorKind::Unavailable, Effect::NotDone), "{of_nobody:?}");
    }
}
