//! What the server's and the client's failures mean in the terms of the contract.

use anybroker_core::{Effect, Error, ErrorKind};
use async_nats::client::RequestErrorKind;
use async_nats::{ConnectError, ConnectErrorKind};
use serde::Deserialize;

/// An error of the JetStream API (nats-server `errors.json`).
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ApiError {
    #[serde(default)]
    pub(crate) code: u32,
    #[serde(default)]
    pub(crate) err_code: u32,
    #[serde(default)]
    pub(crate) description: String,
}

/// `JSStreamNotFoundErr`.
pub(crate) const STREAM_NOT_FOUND: u32 = 10059;
/// `JSConsumerNotFoundErr`.
pub(crate) const CONSUMER_NOT_FOUND: u32 = 10014;
/// `JSNoMessageFoundErr`.
pub(crate) const NO_MESSAGE_FOUND: u32 = 10037;
/// `JSStreamNameExistErr`: it exists with other settings.
pub(crate) const STREAM_EXISTS: u32 = 10058;
/// `JSStreamSubjectOverlapErr`.
const SUBJECTS_OVERLAP: u32 = 10065;
/// `JSStreamWrongLastSequenceErrF`.
pub(crate) const WRONG_LAST_SEQUENCE: u32 = 10071;
/// `JSConsumerAlreadyExists`, `JSConsumerExistingActiveErr`, `JSConsumerNameExistErr`.
const CONSUMER_EXISTS: [u32; 3] = [10105, 10148, 10013];
/// `JSStreamMessageExceedsMaximumErr`.
const MESSAGE_TOO_LARGE: u32 = 10054;
/// `JSNotEnabledErr`, `JSNotEnabledForAccountErr`.
const NOT_ENABLED: [u32; 2] = [10076, 10039];
/// `JSStreamStoreFailedF`, `JSInsufficientResourcesErr`, `JSStorageResourcesExceededErr`, `JSMemoryResourcesExceededErr`.
const NO_ROOM: [u32; 4] = [10077, 10023, 10047, 10028];

impl ApiError {
    pub(crate) fn is(&self, err_code: u32) -> bool {
        self.err_code == err_code
    }

    /// The server answered: what it refuses it has not done.
    pub(crate) fn into_error(self, operation: &'static str) -> Error {
        let kind = match self.err_code {
            STREAM_NOT_FOUND | CONSUMER_NOT_FOUND | NO_MESSAGE_FOUND => ErrorKind::NotFound,
            STREAM_EXISTS | SUBJECTS_OVERLAP => ErrorKind::AlreadyExists,
            code if CONSUMER_EXISTS.contains(&code) => ErrorKind::AlreadyExists,
            MESSAGE_TOO_LARGE => ErrorKind::TooLarge,
            code if NOT_ENABLED.contains(&code) => ErrorKind::Unsupported,
            code if NO_ROOM.contains(&code) => ErrorKind::Unavailable,
            _ => match self.code {
                403 => ErrorKind::PermissionDenied,
                404 => ErrorKind::NotFound,
                429 => ErrorKind::RateLimited,
                503 => ErrorKind::Unavailable,
                _ => ErrorKind::Unexpected,
            },
        };
        let text = format!("{} ({})", self.description, self.err_code);
        Error::new(kind, operation, text).with_effect(Effect::NotDone)
    }
}

/// A request that got no answer.
pub(crate) fn unanswered(operation: &'static str, error: &async_nats::client::RequestError) -> Error {
    let kind = match error.kind() {
        RequestErrorKind::TimedOut => ErrorKind::Timeout,
        // Nobody serves it: JetStream is disabled, starting, or without a leader.
        RequestErrorKind::NoResponders => {
            let text = "nobody answers for JetStream: it is disabled, starting, or has no leader";
            return Error::new(ErrorKind::Unavailable, operation, text).with_effect(Effect::NotDone);
        }
        RequestErrorKind::InvalidSubject => ErrorKind::Unexpected,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, operation, error.to_string()).with_effect(Effect::Unknown)
}

/// A connection that could not be made.
pub(crate) fn unconnected(error: &ConnectError) -> Error {
    let kind = match error.kind() {
        ConnectErrorKind::ServerParse => ErrorKind::ConfigInvalid,
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => ErrorKind::Unauthenticated,
        ConnectErrorKind::TimedOut => ErrorKind::Timeout,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, "connect", error.to_string()).with_effect(Effect::NotDone)
}
