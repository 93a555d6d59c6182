//! What the server is shown at each connection, where that comes from, and what is told while it is refused.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Credentials, CredentialsProvider, Effect, Error, ErrorKind, Login, Result, Secret};
use async_nats::{Auth, AuthError, ConnectErrorKind, ConnectOptions};
use async_trait::async_trait;
use nkeys::KeyPair;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// How long an answer of the provider waits for a connection that needs it.
const KEEPS: Duration = Duration::from_secs(5);

/// The credentials of one endpoint.
pub(crate) struct Authentication {
    login: Option<Login>,
    /// What the provider said for the next connection.
    next: Mutex<Option<(Instant, Result<Credentials>)>>,
    /// Why there is no connection, where that is about credentials.
    trouble: watch::Sender<Option<Error>>,
}

impl Authentication {
    pub(crate) fn new(login: Option<Login>) -> Arc<Self> {
        Arc::new(Self { login, next: Mutex::default(), trouble: watch::Sender::new(None) })
    }

    /// Asks for what the first connection shows.
    pub(crate) async fn first(&self) -> Result<()> {
        self.ask().await;
        let next = self.next.lock();
        next.as_ref().and_then(|(_, told)| told.as_ref().err()).map_or(Ok(()), |error| Err(error.duplicate()))
    }

    /// The client's options, with which it asks here. The provider is asked before the server is dialled: a server waits two seconds
    /// for what it is shown (nats-server, `authorization.timeout`), and a provider may take longer.
    pub(crate) fn options(self: &Arc<Self>) -> ConnectOptions {
        if self.login.is_none() {
            return ConnectOptions::new();
        }
        let (asking, showing) = (Arc::clone(self), Arc::clone(self));
        // The client wants futures that are `Sync`, which a provider's need not be: it waits for a task.
        ConnectOptions::with_auth_callback(move |nonce| {
            let this = Arc::clone(&showing);
            let shown = tokio::spawn(async move { this.show(&nonce).await });
            async move { shown.await.map_err(AuthError::new)?.map_err(|error| AuthError::new(error.message())) }
        })
        .reconnect_to_server_callback(move |_, _| {
            let this = Arc::clone(&asking);
            let asked = tokio::spawn(async move { this.prepare().await });
            async move {
                // Only a provider that panics ends it; then there is nothing to show, as the other callback tells.
                let _ = asked.await;
                // The client chooses the server.
                None
            }
        })
    }

    /// For the next connection, which is another one than the first.
    async fn prepare(&self) {
        let is_fresh = |(since, told): &(Instant, Result<Credentials>)| told.is_ok() && since.elapsed() < KEEPS;
        if !self.next.lock().as_ref().is_some_and(is_fresh) {
            self.ask().await;
        }
        let failed = self.next.lock().as_ref().and_then(|(_, told)| told.as_ref().err().map(unprovided));
        self.trouble.send_if_modified(|trouble| match failed {
            Some(error) => {
                *trouble = Some(error);
                true
            }
            // What was refused is so until it is let in.
            None => trouble.take_if(|trouble| trouble.kind() == ErrorKind::Unavailable).is_some(),
        });
    }

    async fn ask(&self) {
        let Some(login) = &self.login else { return };
        let told = login.now().await.and_then(|credentials| auth(&credentials, b"").map(|_| credentials));
        *self.next.lock() = Some((Instant::now(), told));
    }

    /// What one connection shows; another server of the same attempt is shown what the provider says by then.
    async fn show(&self, nonce: &[u8]) -> Result<Auth> {
        if self.next.lock().is_none() {
            self.ask().await;
        }
        let told = self.next.lock().take();
        told.map_or_else(|| Ok(Auth::new()), |(_, told)| auth(&told?, nonce))
    }

    /// What the client says when a connection that was lost cannot be made anew.
    pub(crate) fn note(&self, failure: &str) {
        if failure != ConnectErrorKind::AuthorizationViolation.to_string() {
            return;
        }
        let error = Error::new(ErrorKind::Unauthenticated, "connect", "the server refuses the credentials");
        self.trouble.send_replace(Some(match &self.login {
            Some(login) => login.passing(error),
            None => error,
        }));
    }

    /// The connection stands.
    pub(crate) fn accepted(&self) {
        self.trouble.send_if_modified(|trouble| trouble.take().is_some());
    }

    /// Why there is no connection, where that is about credentials.
    pub(crate) fn trouble(&self) -> Option<Error> {
        self.trouble.borrow().as_ref().map(Error::duplicate)
    }

    /// Waits while the server refuses the credentials, or there are none to show; the reason at the deadline. The client would
    /// keep what it is given for the next connection, and nobody could say whether it is sent.
    pub(crate) async fn passed(&self, deadline: Instant) -> Result<()> {
        if self.trouble.borrow().is_none() {
            return Ok(());
        }
        let mut trouble = self.trouble.subscribe();
        let _ = timeout_at(deadline, trouble.wait_for(Option::is_none)).await;
        self.trouble().map_or(Ok(()), Err)
    }
}

/// A provider that fails while a service runs is like a broker that cannot be reached: it is asked again.
fn unprovided(error: &Error) -> Error {
    let text = format!("the provider of the credentials: {}", error.message());
    Error::new(ErrorKind::Unavailable, "connect", text).with_effect(Effect::NotDone).with_source(error.duplicate())
}

/// As the client shows it to a server that sent that nonce.
fn auth(credentials: &Credentials, nonce: &[u8]) -> Result<Auth> {
    let mut auth = Auth::new();
    match credentials {
        Credentials::Password { user, password } => {
            auth.username = Some(user.clone());
            auth.password = Some(password.reveal().to_owned());
        }
        Credentials::Token(token) => auth.token = Some(token.reveal().to_owned()),
        Credentials::Nkey { jwt, seed } => {
            let wrong = |_| Error::new(ErrorKind::Unauthenticated, "connect", "the seed is not that of an NKey");
            let key = KeyPair::from_seed(seed.reveal().trim()).map_err(wrong)?;
            // A JWT names the key.
            auth.nkey = jwt.is_none().then(|| key.public_key());
            auth.jwt.clone_from(jwt);
            auth.signature = Some(key.sign(nonce).map_err(wrong)?);
        }
        other => return Err(other.unfit("user and password, a token or an NKey")),
    }
    Ok(auth)
}

/// A .creds file, read anew for each connection: `nsc` writes it again when the user's JWT is replaced.
pub(crate) struct CredsFile(pub(crate) PathBuf);

#[async_trait]
impl CredentialsProvider for CredsFile {
    async fn credentials(&self) -> Result<Credentials> {
        let wrong = |why: &dyn std::fmt::Display| {
            let text = format!("the credentials file cannot be read: {why}");
            Error::new(ErrorKind::ConfigInvalid, "connect", text).with("credentials", self.0.display())
        };
        let text = tokio::fs::read_to_string(&self.0).await.map_err(|error| wrong(&error.kind()))?;
        decorated(&text).ok_or_else(|| wrong(&"expected a JWT and a seed, each between two lines of dashes"))
    }
}

/// JWT and seed, each alone between two lines that begin and end with dashes, in that order.
fn decorated(text: &str) -> Option<Credentials> {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let is_rule = |line: &str| line.len() > 6 && line.starts_with("---") && line.ends_with("---");
    let (mut found, mut rest) = (Vec::new(), lines.as_slice());
    while let [first, others @ ..] = rest {
        rest = others;
        if let [inner, last, others @ ..] = others
            && is_rule(first)
            && !is_rule(inner)
            && is_rule(last)
        {
            found.push(*inner);
            rest = others;
        }
    }
    let [jwt, seed] = found.get(..2)? else { return None };
    Some(Credentials::Nkey { jwt: Some((*jwt).to_owned()), seed: Secret::new(*seed) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    struct Silent;

    #[async_trait]
    impl CredentialsProvider for Silent {
        async fn credentials(&self) -> Result<Credentials> {
            std::future::pending().await
        }
    }

    #[test]
    fn each_kind_is_shown_as_nats_has_it_and_an_access_key_is_unfit() {
        let secret = Secret::new("secret");
        let of_user = auth(&Credentials::Password { user: "me".into(), password: secret.clone() }, b"n").unwrap();
        assert_eq!((of_user.username.as_deref(), of_user.password.as_deref()), (Some("me"), Some("secret")));
        assert_eq!(auth(&Credentials::Token(secret.clone()), b"n").unwrap().token.as_deref(), Some("secret"));
        let key = KeyPair::new_user();
        let seed = Secret::new(format!("{}\n", key.seed().unwrap()));
        for jwt in [None, Some("of me".to_owned())] {
            let shown = auth(&Credentials::Nkey { jwt: jwt.clone(), seed: seed.clone() }, b"nonce").unwrap();
            assert_eq!((shown.nkey, &shown.jwt), (jwt.is_none().then(|| key.public_key()), &jwt));
            key.verify(b"nonce", &shown.signature.unwrap()).unwrap();
        }
        let unfit = Credentials::AccessKey { id: "id".into(), secret: secret.clone(), session_token: None };
        assert_eq!(auth(&unfit, b"n").err().unwrap().kind(), ErrorKind::ConfigInvalid);
        let no_seed = auth(&Credentials::Nkey { jwt: None, seed: secret }, b"n").err().unwrap();
        assert_eq!(no_seed.kind(), ErrorKind::Unauthenticated);
        assert!(!format!("{no_seed:?}").contains("secret"), "{no_seed:?}");
    }

    #[test]
    fn a_creds_file_holds_a_jwt_and_a_seed() {
        let expected = Credentials::Nkey { jwt: Some("the.jwt".into()), seed: Secret::new("SEED") };
        let jwt = "-----BEGIN NATS USER JWT-----\nthe.jwt\n------END NATS USER JWT------\n";
        let seed = "-----BEGIN USER NKEY SEED-----\r\nSEED\r\n------END USER NKEY SEED------";
        for between in ["", "\n\n", "* one line *\n", "\n*** IMPORTANT ***\nThe seed is below.\n\n"] {
            assert_eq!(decorated(&format!("{jwt}{between}{seed}")), Some(expected.clone()), "{between}");
        }
        for text in ["", "SEED", jwt, "-----BEGIN-----\n-----END-----\n"] {
            assert_eq!(decorated(text), None, "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_is_told_until_it_is_let_in() {
        let login = Login::asked(Arc::new(Silent), Duration::from_secs(3));
        let authentication = Authentication::new(Some(login));
        let soon = || Instant::now() + Duration::from_secs(1);
        let kind = |result: Result<()>| result.map_err(|error| error.kind());
        assert_eq!(kind(authentication.first().await), Err(ErrorKind::Timeout));
        assert_eq!(kind(authentication.passed(soon()).await), Ok(()));
        authentication.note("IO error");
        assert_eq!(kind(authentication.passed(soon()).await), Ok(()));
        authentication.note("authorization violation");
        assert_eq!(kind(authentication.passed(soon()).await), Err(ErrorKind::Unauthenticated));
        // A provider without an answer is another reason, and not a refusal.
        authentication.prepare().await;
        assert_eq!(kind(authentication.passed(soon()).await), Err(ErrorKind::Unavailable));
        authentication.accepted();
        assert_eq!(kind(authentication.passed(soon()).await), Ok(()));
    }
}
