//! What the server's and the client's failures mean in the terms of the contract.

use std::error::Error as _;

use anybroker_core::{Effect, Error, ErrorKind};
use async_nats::client::RequestErrorKind;
use async_nats::{ConnectError, ConnectErrorKind, rustls};
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
/// `JSMessageSchedulesDisabledErr`: the stream was made without them.
const SCHEDULES_DISABLED: u32 = 10188;
/// `JSStreamDuplicateMessageConflict`: the same id is on its way through the cluster already, and not stored yet.
const BEING_STORED: u32 = 10158;
/// `JSStreamStoreFailedF`, `JSInsufficientResourcesErr`, `JSStorageResourcesExceededErr`, `JSMemoryResourcesExceededErr`,
/// `JSAccountResourcesExceededErr`.
const NO_ROOM: [u32; 5] = [10077, 10023, 10047, 10028, 10002];

impl ApiError {
    pub(crate) fn is(&self, err_code: u32) -> bool {
        self.err_code == err_code
    }

    /// The server answered: what it refuses it has not done.
    pub(crate) fn into_error(self, operation: &'static str) -> Error {
        if self.is(BEING_STORED) {
            // It is the answer to an earlier publish of this message that says whether it is stored.
            let text = format!("{} ({BEING_STORED})", self.description);
            return Error::new(ErrorKind::Unavailable, operation, text).with_effect(Effect::Unknown);
        }
        let kind = match self.err_code {
            STREAM_NOT_FOUND | CONSUMER_NOT_FOUND | NO_MESSAGE_FOUND => ErrorKind::NotFound,
            STREAM_EXISTS | SUBJECTS_OVERLAP => ErrorKind::AlreadyExists,
            code if CONSUMER_EXISTS.contains(&code) => ErrorKind::AlreadyExists,
            SCHEDULES_DISABLED => ErrorKind::Unsupported,
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
    let (kind, text) = match error.kind() {
        ConnectErrorKind::ServerParse => (ErrorKind::ConfigInvalid, error.to_string()),
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            (ErrorKind::Unauthenticated, error.to_string())
        }
        ConnectErrorKind::TimedOut => (ErrorKind::Timeout, error.to_string()),
        _ => match tls_failure(error) {
            Some(failure) if is_about_certificates(failure) => (ErrorKind::Unauthenticated, format!("TLS: {failure}")),
            Some(failure) => {
                (ErrorKind::ConfigInvalid, format!("TLS: {failure}; is the server set up for it at this port?"))
            }
            None => (ErrorKind::Unavailable, error.to_string()),
        },
    };
    Error::new(kind, "connect", text).with_effect(Effect::NotDone)
}

/// What of TLS failed.
fn tls_failure(error: &ConnectError) -> Option<&rustls::Error> {
    let mut cause = error.source();
    while let Some(found) = cause {
        let inner = found.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let found: &(dyn std::error::Error + 'static) = inner.map_or(found, |inner| inner);
        if let Some(failure) = found.downcast_ref::<rustls::Error>() {
            return Some(failure);
        }
        cause = found.source();
    }
    None
}

/// A certificate that is not trusted, not for this host, expired or missing, on either side.
fn is_about_certificates(failure: &rustls::Error) -> bool {
    use rustls::AlertDescription as Alert;
    match failure {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => true,
        rustls::Error::AlertReceived(alert) => matches!(
            alert,
            Alert::NoCertificate
                | Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::CertificateRequired
        ),
        _ => false,
    }
}
