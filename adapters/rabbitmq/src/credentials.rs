//! What the server is shown, and what it means when that cannot be had or is refused.

use anybroker_core::{Credentials, Effect, Error, ErrorKind, Login, Result, Secret};

const EXPECTED: &str = "user and password, or a token";

/// The server's own defaults, which it takes from the loopback interface only.
pub(crate) fn guest(password: Option<&Secret>) -> Login {
    let password = password.cloned().unwrap_or_else(|| Secret::new("guest"));
    Login::fixed(Credentials::Password { user: "guest".to_owned(), password })
}

/// User and password of a connection. The plugin for OAuth 2 takes a token as the password, and does not look at the user
/// (RabbitMQ, "OAuth 2.0 Authentication Backend", "Authorization Flow").
pub(crate) fn user_and_password(credentials: &Credentials) -> Result<(String, Secret)> {
    match credentials {
        Credentials::Password { user, password } => Ok((user.clone(), password.clone())),
        Credentials::Token(token) => Ok((String::new(), token.clone())),
        other => Err(other.unfit(EXPECTED).with_effect(Effect::NotDone)),
    }
}

/// What connecting for the first time is called: it fails at once, with what was wrong.
pub(crate) const FIRST: &str = "connect";

/// A provider that fails while a service runs is like a broker that cannot be reached: it is asked again.
pub(crate) fn unprovided(operation: &'static str, error: Error) -> Error {
    if operation == FIRST {
        return error.with_effect(Effect::NotDone);
    }
    let text = format!("the provider of the credentials: {}", error.message());
    Error::new(ErrorKind::Unavailable, operation, text).with_effect(Effect::NotDone).with_source(error)
}

/// What was refused may be let in later, where a provider may say something else by then.
pub(crate) fn refused(login: &Login, operation: &'static str, error: Error) -> Error {
    if error.kind() == ErrorKind::Unauthenticated {
        login.refused();
    }
    if operation == FIRST { error } else { login.passing(error) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::link::passes;

    struct Silent;

    #[async_trait::async_trait]
    impl anybroker_core::CredentialsProvider for Silent {
        async fn credentials(&self) -> Result<Credentials> {
            std::future::pending().await
        }
    }

    #[test]
    fn what_was_refused_is_tried_again_only_where_it_may_change_and_not_at_first() {
        let refusal = || Error::new(ErrorKind::Unauthenticated, "connect", "no");
        let asked = Login::asked(std::sync::Arc::new(Silent), std::time::Duration::from_secs(1));
        let outcomes = [(&guest(None), "publish"), (&asked, FIRST), (&asked, "publish")]
            .map(|(login, operation)| passes(&refused(login, operation, refusal())));
        assert_eq!(outcomes, [false, false, true]);
        let sealed = || Error::new(ErrorKind::NotFound, "read", "sealed");
        let kinds = [FIRST, "publish"].map(|operation| unprovided(operation, sealed()).kind());
        assert_eq!(kinds, [ErrorKind::NotFound, ErrorKind::Unavailable]);
    }

    #[test]
    fn a_token_stands_as_the_password_and_keys_are_unfit() {
        let secret = || Secret::new("secret");
        let password = Credentials::Password { user: "me".into(), password: secret() };
        assert_eq!(user_and_password(&password).unwrap(), ("me".to_owned(), secret()));
        assert_eq!(user_and_password(&Credentials::Token(secret())).unwrap(), (String::new(), secret()));
        let nkey = Credentials::Nkey { jwt: None, seed: secret() };
        let key = Credentials::AccessKey { id: "id".into(), secret: secret(), session_token: None };
        for unfit in [nkey, key] {
            let error = user_and_password(&unfit).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
            assert!(error.message().contains(EXPECTED), "{error}");
        }
    }
}
