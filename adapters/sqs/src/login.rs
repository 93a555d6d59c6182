//! Credentials of a provider, shown to SQS and SNS.
//!
//! There are no connections that would tell when to ask for them: the SDK asks for each request, and what was said within the last
//! minute is shown unless it was refused. A request that is refused for its credentials did nothing, and is made once more.

use anybroker_core::{Credentials, Login, Result};
use aws_credential_types::Credentials as AccessKey;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, future};
use aws_smithy_runtime_api::client::interceptors::context::InterceptorContext;
use aws_smithy_runtime_api::client::retries::classifiers::{ClassifyRetry, RetryAction, RetryClassifierPriority};

use crate::error::UNAUTHENTICATED;

/// What the SDK asks.
#[derive(Debug, Clone)]
pub(crate) struct Shown(pub(crate) Login);

impl Shown {
    /// Tells what the provider says at first by its own kind.
    pub(crate) async fn check(&self) -> Result<()> {
        access_key(self.0.now().await?).map(drop)
    }
}

fn access_key(credentials: Credentials) -> Result<AccessKey> {
    match credentials {
        Credentials::AccessKey { id, secret, session_token } => {
            let token = session_token.map(|token| token.reveal().to_owned());
            Ok(AccessKey::new(id, secret.reveal(), token, None, "provider"))
        }
        other => Err(other.unfit("an access key")),
    }
}

impl ProvideCredentials for Shown {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async {
            self.0.recent().await.and_then(access_key).map_err(CredentialsError::provider_error)
        })
    }
}

/// Lets the provider be asked anew when its credentials are refused.
#[derive(Debug)]
pub(crate) struct Refusals {
    pub(crate) login: Login,
    /// Nothing else is made again.
    pub(crate) is_only: bool,
}

impl ClassifyRetry for Refusals {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let is_refused = context.response().is_some_and(|response| {
            response.status().is_client_error() && response.body().bytes().is_some_and(names_refusal)
        });
        if is_refused {
            self.login.refused();
            return RetryAction::client_error();
        }
        if self.is_only { RetryAction::RetryForbidden } else { RetryAction::NoActionIndicated }
    }

    fn name(&self) -> &'static str {
        "refused credentials"
    }

    fn priority(&self) -> RetryClassifierPriority {
        RetryClassifierPriority::run_after(RetryClassifierPriority::transient_error_classifier())
    }
}

/// SQS answers in JSON, SNS in XML; both write the code as a word of its own.
fn names_refusal(body: &[u8]) -> bool {
    let text = String::from_utf8_lossy(body);
    text.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| UNAUTHENTICATED.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sqs_and_sns_answer_to_credentials_that_they_do_not_take_is_a_refusal() {
        let sqs = br#"{"__type":"com.amazon.coral.service#InvalidClientTokenId","message":"not valid"}"#;
        let sns = b"<ErrorResponse><Error><Type>Sender</Type><Code>ExpiredToken</Code></Error></ErrorResponse>";
        assert!(names_refusal(sqs) && names_refusal(sns));
        assert!(!names_refusal(br#"{"__type":"com.amazonaws.sqs#QueueDoesNotExist","message":"not there"}"#));
    }
}
