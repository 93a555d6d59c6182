//! What Pulsar's answers mean in the terms of the contract.

use anybroker_core::{Effect, Error, ErrorKind};
use pulsar::proto::ServerError;

/// The error of a command that the broker refused.
pub(crate) fn refused(operation: &'static str, code: i32, text: &str) -> Error {
    let code = ServerError::try_from(code).unwrap_or(ServerError::UnknownError);
    let kind = match code {
        ServerError::AuthenticationError => ErrorKind::Unauthenticated,
        ServerError::AuthorizationError => ErrorKind::PermissionDenied,
        ServerError::TopicNotFound | ServerError::SubscriptionNotFound => ErrorKind::NotFound,
        // The second one: a range of hashes that another consumer has.
        ServerError::ConsumerBusy | ServerError::ConsumerAssignError => ErrorKind::AlreadyExists,
        ServerError::TooManyRequests
        | ServerError::ProducerBlockedQuotaExceededError
        | ServerError::ProducerBlockedQuotaExceededException => ErrorKind::RateLimited,
        ServerError::InvalidTopicName | ServerError::NotAllowedError | ServerError::IncompatibleSchema => {
            ErrorKind::ConfigInvalid
        }
        ServerError::UnsupportedVersionError => ErrorKind::Unsupported,
        ServerError::ChecksumError => ErrorKind::InvalidMessage,
        _ => ErrorKind::Unavailable,
    };
    // A failed write to the bookies may have reached some of them.
    let is_unclear = matches!(code, ServerError::PersistenceError | ServerError::UnknownError);
    // The first line: a broker may send a whole stack trace.
    let text = text.lines().next().unwrap_or_default();
    let effect = if is_unclear { Effect::Unknown } else { Effect::NotDone };
    Error::new(kind, operation, format!("{}: {text}", code.as_str_name())).with_effect(effect)
}

/// The connection ended while an answer was waited for.
pub(crate) fn lost(operation: &'static str) -> Error {
    let text = "the connection was lost before the broker answered";
    Error::new(ErrorKind::Unavailable, operation, text).with_effect(Effect::Unknown)
}
