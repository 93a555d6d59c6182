//! What a service shows a broker of itself, and where that comes from.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::time::Instant;

use crate::config::{Config, Secret};
use crate::{Effect, Error, ErrorKind, Result, Retry};

/// What a service shows a broker of itself. No form of it prints a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Credentials {
    /// A user and a password: SASL PLAIN and SCRAM (Kafka), AMQP PLAIN (RabbitMQ), a user of NATS.
    Password {
        /// The user's name.
        user: String,
        /// The user's password; with RabbitMQ's OAuth 2 plugin it is the token.
        password: Secret,
    },
    /// A token: a JWT (Pulsar), the token of a NATS server.
    Token(Secret),
    /// A key that signs what the server asks (NATS), of a user that the server knows, or with the JWT that names one.
    Nkey {
        /// The user's JWT.
        jwt: Option<String>,
        /// The seed of the key.
        seed: Secret,
    },
    /// An access key (Amazon).
    AccessKey {
        /// Its id.
        id: String,
        /// The secret that requests are signed with.
        secret: Secret,
        /// The token of a session, where the key is temporary.
        session_token: Option<Secret>,
    },
}

impl Credentials {
    /// What they are, for messages.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Password { .. } => "user and password",
            Self::Token(_) => "a token",
            Self::Nkey { .. } => "an NKey",
            Self::AccessKey { .. } => "an access key",
        }
    }

    /// The error of an adapter that cannot show these: [`ConfigInvalid`](ErrorKind::ConfigInvalid), with what it expected.
    #[must_use]
    pub fn unfit(&self, expected: &str) -> Error {
        let text = format!("the credentials are {}; expected {expected}", self.kind());
        Error::new(ErrorKind::ConfigInvalid, "connect", text)
    }
}

/// Where credentials come from that change while a service runs: a vault, a file that is mounted, a token service.
///
/// It is asked before every connection, so also after one was lost, and after the broker has refused what it said last. Where
/// there are no connections (SQS) it is asked when that is a minute old. Credentials that are replaced should hold side by side
/// for a while: connections that exist go on with what they were made with, for as long as the broker lets them.
///
/// ```
/// use std::sync::atomic::{AtomicU32, Ordering};
/// use anybroker_core::{Config, Credentials, CredentialsProvider, Secret};
///
/// struct Vault(AtomicU32);
///
/// #[async_trait::async_trait]
/// impl CredentialsProvider for Vault {
///     async fn credentials(&self) -> anybroker_core::Result<Credentials> {
///         let lease = self.0.fetch_add(1, Ordering::Relaxed);
///         Ok(Credentials::Password { user: format!("orders-{lease}"), password: Secret::new("of the vault") })
///     }
/// }
///
/// let config = Config::from_url("amqps://broker").with_credentials(Vault(AtomicU32::new(0)));
/// # drop(config);
/// ```
#[async_trait]
pub trait CredentialsProvider: Send + Sync + 'static {
    /// The credentials that hold now. An answer that takes longer than `connect_timeout` is not waited for.
    ///
    /// # Errors
    /// Any; connecting fails with it. While a service runs it is asked again when the adapter tries to connect again.
    async fn credentials(&self) -> Result<Credentials>;
}

/// Credentials in a file, read anew each time: JSON, TOML or YAML, as the file's ending says, with either `user` and `password`, or
/// `token`, or `seed` and where needed `jwt`, or `access_key_id`, `secret_access_key` and where needed `session_token`.
///
/// The setting `credentials_file` of every endpoint is this. Replace the file at one stroke (write another one and rename it), as
/// Kubernetes does with secrets that it mounts.
#[derive(Debug, Clone)]
pub struct CredentialsFile(PathBuf);

impl CredentialsFile {
    /// The file at that path; it is not read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
}

/// What a file may hold: all of one of these, and nothing else.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Entries {
    Password { user: String, password: String },
    Token { token: String },
    Nkey { jwt: Option<String>, seed: String },
    AccessKey { access_key_id: String, secret_access_key: String, session_token: Option<String> },
}

const EXPECTED: &str =
    "either user and password, or token, or seed (and jwt), or access_key_id and secret_access_key (and session_token)";

impl From<Entries> for Credentials {
    fn from(entries: Entries) -> Self {
        match entries {
            Entries::Password { user, password } => Self::Password { user, password: Secret::new(password) },
            Entries::Token { token } => Self::Token(Secret::new(token)),
            Entries::Nkey { jwt, seed } => Self::Nkey { jwt, seed: Secret::new(seed) },
            Entries::AccessKey { access_key_id: id, secret_access_key, session_token } => Self::AccessKey {
                id,
                secret: Secret::new(secret_access_key),
                session_token: session_token.map(Secret::new),
            },
        }
    }
}

#[async_trait]
impl CredentialsProvider for CredentialsFile {
    async fn credentials(&self) -> Result<Credentials> {
        let path = self.0.clone();
        let reading = tokio::task::spawn_blocking(move || Config::table_of_file(&path));
        let table = reading.await.expect("reading a file cannot panic, and nobody aborts it")?;
        let wrong = |text: String| {
            Error::new(ErrorKind::ConfigInvalid, "read credentials", text).with("file", self.0.display())
        };
        // Only the names of keys are repeated, never their values.
        if let Some(name) = table.iter().find(|(_, value)| !value.is_string()).map(|(name, _)| name) {
            return Err(wrong(format!("`{name}` is no text; expected {EXPECTED}")));
        }
        let names: Vec<String> = table.keys().cloned().collect();
        let entries: Option<Entries> = serde_json::from_value(table.into()).ok();
        entries
            .map(Credentials::from)
            .ok_or_else(|| wrong(format!("found the keys {}; expected {EXPECTED}", names.join(", "))))
    }
}

/// How long what the provider said is used where there are no connections that it could be asked for.
const HOLDS: Duration = Duration::from_secs(60);
/// How soon it is asked again then, when what it said was refused.
const ASKED_AGAIN: Duration = Duration::from_secs(1);

/// An endpoint's credentials, for adapters: what the URL says, or a provider that is asked when it is time to.
#[derive(Clone)]
pub struct Login(Arc<Source>);

enum Source {
    Fixed(Credentials),
    Asked(Asked),
}

struct Asked {
    provider: Arc<dyn CredentialsProvider>,
    timeout: Duration,
    said: Mutex<Option<Said>>,
    /// Of those who would ask at the same time one does.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct Said {
    at: Instant,
    credentials: Credentials,
    is_refused: bool,
}

impl Asked {
    async fn ask(&self) -> Result<Credentials> {
        let answer = tokio::time::timeout(self.timeout, self.provider.credentials()).await;
        let credentials = answer.map_err(|_| {
            let text = format!("the provider of the credentials gave no answer within {:?}", self.timeout);
            Error::new(ErrorKind::Timeout, "connect", text)
        })??;
        *self.said.lock() = Some(Said { at: Instant::now(), credentials: credentials.clone(), is_refused: false });
        Ok(credentials)
    }

    fn known(&self) -> Option<Credentials> {
        let said = self.said.lock();
        let said = said.as_ref().filter(|said| !said.is_refused && said.at.elapsed() < HOLDS)?;
        Some(said.credentials.clone())
    }
}

impl Login {
    /// Credentials that stay as they are.
    #[must_use]
    pub fn fixed(credentials: Credentials) -> Self {
        Self(Arc::new(Source::Fixed(credentials)))
    }

    /// A provider, and how long it may take to answer.
    pub fn asked(provider: Arc<dyn CredentialsProvider>, timeout: Duration) -> Self {
        let (said, turn) = (Mutex::new(None), tokio::sync::Mutex::new(()));
        Self(Arc::new(Source::Asked(Asked { provider, timeout, said, turn })))
    }

    /// Whether they may change.
    #[must_use]
    pub fn may_change(&self) -> bool {
        matches!(&*self.0, Source::Asked(_))
    }

    /// The credentials for a connection that is made now.
    ///
    /// # Errors
    /// What the provider says; [`Timeout`](ErrorKind::Timeout) when it says nothing.
    pub async fn now(&self) -> Result<Credentials> {
        match &*self.0 {
            Source::Fixed(credentials) => Ok(credentials.clone()),
            Source::Asked(asked) => asked.ask().await,
        }
    }

    /// The credentials for a connection that takes the place of one that was lost. Whatever the provider fails with comes as
    /// [`Unavailable`](ErrorKind::Unavailable): it says nothing of a destination, and the next one may work.
    ///
    /// # Errors
    /// `Unavailable`, not done.
    pub async fn again(&self) -> Result<Credentials> {
        self.now().await.map_err(|error| unavailable(&error))
    }

    /// The credentials of a request where there are no connections: what the provider said within the last minute. When that was
    /// [refused](Self::refused) it is asked anew, once a second at most.
    ///
    /// # Errors
    /// As [`again`](Self::again).
    pub async fn recent(&self) -> Result<Credentials> {
        let asked = match &*self.0 {
            Source::Fixed(credentials) => return Ok(credentials.clone()),
            Source::Asked(asked) => asked,
        };
        if let Some(credentials) = asked.known() {
            return Ok(credentials);
        }
        let _turn = asked.turn.lock().await;
        if let Some(credentials) = asked.known() {
            return Ok(credentials);
        }
        let refused = asked.said.lock().as_ref().filter(|said| said.is_refused).map(|said| said.at);
        if let Some(at) = refused {
            tokio::time::sleep_until(at + ASKED_AGAIN).await;
        }
        asked.ask().await.map_err(|error| unavailable(&error))
    }

    /// A refusal that can pass, where the provider may say other credentials: then it may be tried again
    /// [later](Retry::Later).
    #[must_use]
    pub fn passing(&self, error: Error) -> Error {
        let may_pass = error.kind() == ErrorKind::Unauthenticated && self.may_change();
        if may_pass { error.with_retry(Retry::Later(None)) } else { error }
    }

    /// What was shown last.
    #[must_use]
    pub fn shown(&self) -> Option<Credentials> {
        match &*self.0 {
            Source::Fixed(credentials) => Some(credentials.clone()),
            Source::Asked(asked) => asked.said.lock().as_ref().map(|said| said.credentials.clone()),
        }
    }

    /// The broker does not take what it was shown: the provider is asked before anything is shown again.
    pub fn refused(&self) {
        if let Source::Asked(asked) = &*self.0
            && let Some(said) = &mut *asked.said.lock()
        {
            said.is_refused = true;
        }
    }
}

fn unavailable(error: &Error) -> Error {
    let text = format!("the provider of the credentials failed: {error}");
    Error::new(ErrorKind::Unavailable, "connect", text).with_effect(Effect::NotDone)
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &*self.0 {
            Source::Fixed(credentials) => f.debug_tuple("Fixed").field(&credentials.kind()).finish(),
            Source::Asked(_) => f.write_str("Asked"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Counted(AtomicU32);

    #[async_trait]
    impl CredentialsProvider for Counted {
        async fn credentials(&self) -> Result<Credentials> {
            Ok(Credentials::Token(Secret::new(self.0.fetch_add(1, Ordering::Relaxed).to_string())))
        }
    }

    struct Silent;

    #[async_trait]
    impl CredentialsProvider for Silent {
        async fn credentials(&self) -> Result<Credentials> {
            std::future::pending().await
        }
    }

    fn token(text: &str) -> Credentials {
        Credentials::Token(Secret::new(text))
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_is_asked_for_each_connection_and_for_requests_when_its_answer_was_refused() {
        let login = Login::asked(Arc::new(Counted(AtomicU32::new(0))), Duration::from_secs(1));
        assert_eq!(login.shown(), None);
        assert_eq!(login.now().await.unwrap(), token("0"));
        assert_eq!(login.now().await.unwrap(), token("1"));
        assert_eq!((login.recent().await.unwrap(), login.recent().await.unwrap()), (token("1"), token("1")));
        login.refused();
        let started = Instant::now();
        let (one, other) = tokio::join!(login.recent(), login.recent());
        assert_eq!((one.unwrap(), other.unwrap(), login.shown()), (token("2"), token("2"), Some(token("2"))));
        assert_eq!(started.elapsed(), ASKED_AGAIN);
        tokio::time::advance(HOLDS).await;
        assert_eq!(login.recent().await.unwrap(), token("3"));
        let retry = |login: &Login, kind| login.passing(Error::new(kind, "publish", "no")).retry();
        assert_eq!(retry(&login, ErrorKind::Unauthenticated), Retry::Later(None));
        assert_eq!(retry(&login, ErrorKind::PermissionDenied), Retry::Never);
        assert_eq!(retry(&Login::fixed(token("x")), ErrorKind::Unauthenticated), Retry::Never);
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_does_not_answer_is_not_waited_for_without_end() {
        let error = Login::asked(Arc::new(Silent), Duration::from_secs(3)).now().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
    }

    #[tokio::test]
    async fn a_file_is_read_anew_and_no_message_repeats_a_secret() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("login.toml");
        let provider = CredentialsFile::new(&path);
        let kind = |error: Error| (error.kind(), error.to_string());
        assert_eq!(kind(provider.credentials().await.unwrap_err()).0, ErrorKind::NotFound);
        let mut found = Vec::new();
        for text in [
            "user = \"me\"\npassword = \"one\"",
            "token = \"two\"",
            "seed = \"three\"\njwt = \"of me\"",
            "access_key_id = \"AKIA\"\nsecret_access_key = \"four\"\nsession_token = \"five\"",
        ] {
            std::fs::write(&path, text).unwrap();
            found.push(provider.credentials().await.unwrap());
        }
        let expected = [
            Credentials::Password { user: "me".into(), password: Secret::new("one") },
            token("two"),
            Credentials::Nkey { jwt: Some("of me".into()), seed: Secret::new("three") },
            Credentials::AccessKey {
                id: "AKIA".into(),
                secret: Secret::new("four"),
                session_token: Some(Secret::new("five")),
            },
        ];
        assert_eq!(found, expected);
        for text in [
            "user = \"MARKER\"",
            "user = \"me\"\npassword = \"MARKER\"\ntoken = \"MARKER\"",
            "pasword = \"MARKER\"",
            "token = 5",
            "token = MARKER",
        ] {
            std::fs::write(&path, text).unwrap();
            let (kind, message) = kind(provider.credentials().await.unwrap_err());
            assert_eq!(kind, ErrorKind::ConfigInvalid, "{text}");
            assert!(!message.contains("MARKER"), "{message}");
        }
    }
}
