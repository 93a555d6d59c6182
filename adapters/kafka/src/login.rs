//! Credentials that change while clients of librdkafka use them.
//!
//! A client keeps those that it was made with: librdkafka can take others (`rd_kafka_sasl_set_credentials`), and rust-rdkafka has no
//! safe call for that (0.39; its pull request #852). So when the cluster refuses them the provider is asked, and when it says
//! others the client is replaced. Connections that exist are left alone for as long as the cluster leaves them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anybroker_core::{Credentials, Effect, Error, ErrorKind, Login, Result};
use parking_lot::Mutex;
use rdkafka::admin::AdminClient;
use rdkafka::client::DefaultClientContext;
use rdkafka::config::FromClientConfig;
use tokio::runtime::Handle;

use crate::config::Settings;
use crate::error::failed;

/// What a client was made with.
pub(crate) struct Made {
    /// Where there may be others.
    login: Option<Login>,
    with: Option<Credentials>,
    runtime: Handle,
    asking: Arc<Asking>,
}

/// Asks as long as it is told to, one question at a time.
#[derive(Default)]
struct Asking {
    is_on: AtomicBool,
    asked: AtomicU32,
}

/// How long at least and at most before the provider is asked once more, while what it says is refused.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

impl Made {
    /// For a client that is about to be made.
    pub(crate) fn now(settings: &Settings, runtime: &Handle) -> Self {
        let login = settings.login().filter(|login| login.may_change()).cloned();
        let with = login.as_ref().and_then(Login::shown);
        Self { login, with, runtime: runtime.clone(), asking: Arc::default() }
    }

    pub(crate) fn may_change(&self) -> bool {
        self.login.is_some()
    }

    /// The cluster does not take them: the provider is asked for others. May be called as often as one likes.
    pub(crate) fn refused(&self) {
        let Some(login) = &self.login else { return };
        if self.is_outdated() || self.asking.is_on.swap(true, Ordering::AcqRel) {
            return;
        }
        let (login, asking) = (login.clone(), Arc::clone(&self.asking));
        self.runtime.spawn(async move {
            let asked = asking.asked.fetch_add(1, Ordering::Relaxed);
            if asked > 0 {
                tokio::time::sleep((PAUSES.0 * asked).min(PAUSES.1)).await;
            }
            login.refused();
            if let Err(error) = login.recent().await {
                tracing::warn!(%error, "the cluster refuses the credentials, and there are no others");
            }
            asking.is_on.store(false, Ordering::Release);
        });
    }

    /// The provider has said others since.
    pub(crate) fn is_outdated(&self) -> bool {
        self.login.as_ref().is_some_and(|login| login.shown() != self.with)
    }
}

impl Settings {
    /// What the provider says at first, which is told by its own kind.
    pub(crate) async fn check_login(&self) -> Result<()> {
        let Some(login) = self.login() else { return Ok(()) };
        match login.now().await? {
            Credentials::Password { .. } => Ok(()),
            other => Err(other.unfit("user and password")),
        }
    }

    /// Refused credentials may be others soon.
    pub(crate) fn may_be_let_in(&self) -> bool {
        self.login().is_some_and(Login::may_change)
    }

    /// Before a client is made for a single purpose.
    pub(crate) async fn renew(&self) -> Result<()> {
        match self.login() {
            Some(login) => login.recent().await.map(drop),
            None => Ok(()),
        }
    }
}

/// How long a broker may take to say who the controller is.
const CONTROLLER: Duration = Duration::from_secs(2);

type Admin = AdminClient<DefaultClientContext>;

/// The client for topics and groups.
pub(crate) struct Admins {
    settings: Settings,
    current: Mutex<(Made, Arc<Admin>)>,
}

impl Admins {
    pub(crate) fn new(settings: &Settings) -> Result<Arc<Self>> {
        let current = Mutex::new(made(settings)?);
        Ok(Arc::new(Self { settings: settings.clone(), current }))
    }

    /// The client of the moment, for something about that topic.
    ///
    /// librdkafka sends what is about topics to the controller that it knows, and waits for that one where it is away; which one it is
    /// now it learns with any metadata, every five minutes by itself (2.12, `rd_kafka_broker_controller_async`). So a broker is asked
    /// first. Found by the suite on three brokers: with one of them killed, no topic could be looked up for a minute.
    pub(crate) async fn client(&self, topic: &str) -> Result<Arc<Admin>> {
        self.settings.renew().await?;
        let client = {
            let mut current = self.current.lock();
            if current.0.is_outdated() {
                *current = made(&self.settings)?;
            }
            Arc::clone(&current.1)
        };
        let (asking, topic) = (Arc::clone(&client), topic.to_owned());
        let asked =
            tokio::task::spawn_blocking(move || asking.inner().fetch_metadata(Some(&topic), CONTROLLER).map(drop));
        if let Err(error) = asked.await.expect("asking for metadata cannot panic") {
            tracing::debug!(%error, "who the controller is could not be asked for");
        }
        Ok(client)
    }
}

fn made(settings: &Settings) -> Result<(Made, Arc<Admin>)> {
    let made = Made::now(settings, &Handle::current());
    let client = Admin::from_config(&settings.admin()).map_err(|error| failed("connect", &error))?;
    Ok((made, Arc::new(client)))
}

/// What a publish without a confirm comes to when the cluster refuses the credentials: nobody knows whether it was stored before.
pub(crate) fn refused_meanwhile(refusal: &str, login: Option<&Login>) -> Error {
    let text = format!("no confirm from the broker in time; it refuses the credentials: {refusal}");
    let error = Error::new(ErrorKind::Unauthenticated, "publish", text).with_effect(Effect::Unknown);
    match login {
        Some(login) => login.passing(error),
        None => error,
    }
}
