//! Tokens that are over while a connection lasts: the server goes on to deliver, and refuses what has to be permitted. So the next
//! token is told on the same connection (RabbitMQ, "OAuth 2.0 Authentication Backend", "Token Expiration and Refresh").

use std::sync::Weak;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anybroker_core::{Credentials, Login, Secret};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use lapin::Connection;
use serde::Deserialize;

/// How soon the provider is asked again when what it says is over or nearly so.
const SOONEST: Duration = Duration::from_secs(1);
/// How long the server may take to look at a token.
const REQUEST: Duration = Duration::from_secs(10);

/// Tells the server each next token, as long as the connection is there. One that does not say when it is over stays.
pub(crate) async fn renew(connection: Weak<Connection>, login: Login, mut token: Secret) {
    while let Some(left) = left(token.reveal()) {
        // At three quarters of what is left, so that there is time for another attempt.
        tokio::time::sleep((left * 3 / 4).max(SOONEST)).await;
        let Some(connection) = connection.upgrade().filter(|connection| connection.status().connected()) else {
            return;
        };
        let next = match login.now().await {
            Ok(Credentials::Token(next)) if next != token => next,
            Ok(_) => continue,
            Err(error) => {
                tracing::debug!(%error, "rabbitmq: no next token");
                continue;
            }
        };
        let telling = connection.update_secret(next.reveal().into(), "the token is replaced".into());
        match tokio::time::timeout(REQUEST, telling).await {
            Ok(Ok(())) => token = next,
            Ok(Err(error)) => tracing::debug!(%error, "rabbitmq: the next token is not taken"),
            Err(_) => {}
        }
    }
}

#[derive(Deserialize)]
struct Claims {
    exp: f64,
}

/// How long a JWT holds, where it says so (RFC 7519, 4.1.4). Whether it is genuine is the server's to see.
fn left(token: &str) -> Option<Duration> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?.trim_end_matches('=')).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    let ends = Duration::try_from_secs_f64(claims.exp).ok()?;
    Some(ends.saturating_sub(SystemTime::now().duration_since(UNIX_EPOCH).ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_token_tells_when_it_is_over() {
        let of = |claims: &str| left(&format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims)));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let hour = of(&format!(r#"{{"sub": "me", "exp": {}}}"#, now + 3_600)).unwrap();
        assert!(hour > Duration::from_secs(3_500) && hour <= Duration::from_secs(3_600), "{hour:?}");
        assert_eq!(of(r#"{"exp": 5}"#), Some(Duration::ZERO));
        for claims in ["{}", r#"{"exp": "soon"}"#, r#"{"exp": -1}"#, "x"] {
            assert_eq!(of(claims), None, "{claims}");
        }
        assert_eq!((left(""), left("opaque"), left("a.!.b")), (None, None, None));
    }
}
